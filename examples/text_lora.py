"""LoRA adapters of a transformer, federated: python examples/text_lora.py [--model distilbert-base-uncased].

Only the adapters and the classifier travel. Without --model the transformer is a tiny one with random weights and the
texts are generated, so nothing is downloaded. With --model, weights and tokenizer come from the Hugging Face hub.
"""

import argparse
import random

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DistilBertConfig
from transformers import DistilBertForSequenceClassification as DistilBert

import tofu
from tofu.data.rows import token_ids

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="")
parser.add_argument("--rounds", type=int, default=4)
parser.add_argument("--folder", default="")
arguments = parser.parse_args()
TOKENS, VOCABULARY = 16, 2000
torch.manual_seed(0)  # the frozen weights must be the same on every machine

if arguments.model:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    base = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=2)
else:
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=TOKENS,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    base = DistilBert(config)
lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_lin", "v_lin"])
model = get_peft_model(base, lora)
model.print_trainable_parameters()


def encoded(text):
    if arguments.model:
        found = tokenizer(text, padding="max_length", truncation=True, max_length=TOKENS)
        return {name: torch.tensor(found[name]) for name in ("input_ids", "attention_mask")}
    ids = torch.tensor(token_ids(text, vocabulary=VOCABULARY, tokens=TOKENS))
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def reviews(count, seed):
    """Samples as mappings, like those of a dataset from the hub: names of the model's arguments, and "labels"."""
    draw, words = random.Random(seed), (("poor", "dull", "awful", "slow"), ("great", "fine", "lovely", "brisk"))
    samples = []
    for _ in range(count):
        label, things = draw.randrange(2), ("film", "book", "meal", "trip", "song")
        text = f"the {draw.choice(things)} was {draw.choice(words[label])} and the {draw.choice(things)} so too"
        samples.append(encoded(text) | {"labels": torch.tensor(label)})
    return samples


result = tofu.run(
    clients=[reviews(80, seed) for seed in range(4)],
    test=reviews(100, 99),
    model=model,
    optimizer=torch.optim.AdamW,
    lr=1e-2,
    rounds=arguments.rounds,
    local_epochs=4,
    ratio=20,
    input_shape=(8, base.config.dim),  # a proxy is 8 tokens, in the place of their embeddings
    run_folder=arguments.folder,
)
sizes = sum(value.numel() for value in result.weights.values()), sum(p.numel() for p in model.parameters())
print(f"accuracy {result.summary.final_accuracy:.3f}; {sizes[0]:,} of {sizes[1]:,} parameters travel, "
      f"{result.summary.payload_ratio:.0f} times compressed")  # fmt: skip
