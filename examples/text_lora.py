"""LoRA adapters of a transformer, federated: python examples/text_lora.py [--model distilbert-base-uncased].

Only the adapters and the classifier travel. Without --model the transformer is a tiny one with random weights and the
texts are generated, so nothing is downloaded. With --model, weights and tokenizer come from the Hugging Face hub.
"""

import random

import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DistilBertConfig
from transformers import DistilBertForSequenceClassification as DistilBert

import tofu
from tofu.data.rows import token_ids

TOKENS, VOCABULARY = 16, 2000


def tiny_transformer():
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=TOKENS,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return DistilBert(config)


def encoded(text, tokenizer):
    if tokenizer is not None:
        found = tokenizer(text, padding="max_length", truncation=True, max_length=TOKENS)
        return {name: torch.tensor(found[name]) for name in ("input_ids", "attention_mask")}
    ids = torch.tensor(token_ids(text, vocabulary=VOCABULARY, tokens=TOKENS))
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def reviews(count, seed, tokenizer):
    """Samples as mappings, like those of a dataset from the hub: names of the model's arguments, and "labels"."""
    draw, words = random.Random(seed), (("poor", "dull", "awful", "slow"), ("great", "fine", "lovely", "brisk"))
    samples = []
    for _ in range(count):
        label, things = draw.randrange(2), ("film", "book", "meal", "trip", "song")
        text = f"the {draw.choice(things)} was {draw.choice(words[label])} and the {draw.choice(things)} so too"
        samples.append(encoded(text, tokenizer) | {"labels": torch.tensor(label)})
    return samples


def main(model: str = "", rounds: int = 4, folder: str = "") -> None:
    torch.manual_seed(0)  # the frozen weights must be the same on every machine
    tokenizer = AutoTokenizer.from_pretrained(model) if model else None
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2) if model else tiny_transformer()
    lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_lin", "v_lin"])
    adapted = get_peft_model(base, lora)
    adapted.print_trainable_parameters()
    result = tofu.run(
        clients=[reviews(80, seed, tokenizer) for seed in range(4)],
        test=reviews(100, 99, tokenizer),
        model=adapted,
        optimizer=torch.optim.AdamW,
        lr=1e-2,
        rounds=rounds,
        local_epochs=4,
        ratio=20,
        input_shape=(8, base.config.dim),  # a proxy is 8 tokens, in the place of their embeddings
        run_folder=folder,
    )
    sizes = sum(value.numel() for value in result.weights.values()), sum(p.numel() for p in adapted.parameters())
    print(f"accuracy {result.summary.final_accuracy:.3f}; {sizes[0]:,} of {sizes[1]:,} parameters travel, "
          f"{result.summary.payload_ratio:.0f} times compressed")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
