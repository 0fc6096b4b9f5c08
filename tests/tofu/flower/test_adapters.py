"""A transformer with LoRA adapters in a Flower app: only the adapters travel, in each form in which apps send them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

import tofu
from tests.optional import transformers_and_peft
from tofu.errors import PayloadError, RunError, SettingError
from tofu.flower.in_process import run_in_process
from tofu.flower.update_codec import UpdateCodec
from tofu.weights import cosine

CLIENTS, TOKENS, WORDS = 3, 12, 60


def build(seed: int = 0) -> nn.Module:
    """A DistilBERT of random weights with LoRA on its queries and values; its classifier is trained, too."""
    transformers, peft = transformers_and_peft()  # not on import: it takes seconds
    torch.manual_seed(seed)
    shape = {
        "vocab_size": WORDS,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 64,
        "max_position_embeddings": 16,
    }
    base = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**shape, num_labels=2))
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_lin", "v_lin"])
    model: nn.Module = peft.get_peft_model(base, lora)
    return model


def texts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids; the class says whether words below 15 are frequent."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    ids = torch.randint(15, WORDS, (count, TOKENS), generator=generator)
    rare = torch.randint(0, 15, (count, TOKENS), generator=generator)
    chosen = torch.rand(count, TOKENS, generator=generator) < 0.4 * labels[:, None]
    return torch.where(chosen, rare, ids), labels


def held_out_loss(model: nn.Module) -> float:
    ids, labels = texts(300, 99)
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=labels).loss)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return dict(transformers_and_peft()[1].get_peft_model_state_dict(model))


def load(model: nn.Module, arrays: dict[str, Tensor], send: Callable[[nn.Module], dict[str, Tensor]]) -> None:
    if send is adapters:
        transformers_and_peft()[1].set_peft_model_state_dict(model, arrays)
    else:
        assert not model.load_state_dict(arrays, strict=False).unexpected_keys


def federate(send: Callable[[nn.Module], dict[str, Tensor]], *, compressed: bool, seed: int = 0) -> Any:
    """The app, with or without its two added lines."""
    options: dict[str, Any] = {"ratio": 20, "over_relaxation": 1.3}

    def train(message: Message, context: Context) -> Message:
        model = build()
        load(model, message.content["arrays"].to_torch_state_dict(), send)
        ids, labels = texts(160, int(context.node_config["partition-id"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for rows in torch.arange(160).split(16):
            optimizer.zero_grad()
            model.train()(input_ids=ids[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
        content = {"arrays": ArrayRecord(send(model)), "metrics": MetricRecord({"num-examples": 160})}
        return Message(RecordDict(content), reply_to=message)

    client, server, results = (
        ClientApp(mods=[tofu.compress(build, (4,), **options)] if compressed else []),
        ServerApp(),
        [],
    )
    client.train()(train)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy: Any = FedAvg(fraction_evaluate=0.0)
        if compressed:
            strategy = tofu.Compressed(strategy, lambda: build(seed), (4,), **options)
        arrays = ArrayRecord(send(build()))
        results.append(strategy.start(grid, arrays, num_rounds=3, train_config=ConfigRecord({"lr": 0.1})))

    # One thread: weights and dropout come from torch's global generator, which `build` seeds.
    run_in_process(server, client, run_config={}, num_supernodes=CLIENTS, workers=1)
    return results[0]


@pytest.mark.parametrize("send", [whole, trainable, adapters])
def test_only_adapters_travel_and_the_app_learns(send: Callable[[nn.Module], dict[str, Tensor]]) -> None:
    size = 4 * sum(value.numel() for value in trainable(build()).values())
    result = federate(send, compressed=True)
    metrics = result.train_metrics_clientapp[3]
    assert metrics["tofu-payload-bytes"] <= size / 20
    model = build()
    load(model, result.arrays.to_torch_state_dict(), send)
    assert held_out_loss(model) < held_out_loss(build()) - 0.01
    frozen = {name: p for name, p in build().named_parameters() if not p.requires_grad}
    pairs = [(p, frozen[name]) for name, p in model.named_parameters() if name in frozen]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)  # FedAvg rounds the mean of equal arrays


def test_other_frozen_weights_at_the_server_are_noticed() -> None:
    with pytest.raises(RunError, match=r"computes the same on server and client .*, such as frozen weights"):
        federate(adapters, compressed=True, seed=5)


def test_one_update_of_the_adapters_is_encoded_by_proxies() -> None:
    model = build()
    ids, labels = texts(64, 0)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = model.eval()(input_ids=ids, labels=labels).loss
    gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    update = {name: -0.1 * g for name, g in zip(parameters, gradients, strict=True)}
    message = tofu.encode(model, update, input_shape=(4,), ratio=20)
    assert b"proxy" in message[:60]
    decoded = tofu.decode(model, message, input_shape=(4,))
    assert decoded.keys() == update.keys()
    assert cosine(update, decoded) > 0.8
    assert tofu.decode(model, message, input_shape=(4, 32)).keys() == update.keys()
    with pytest.raises(PayloadError, match="input shape"):
        tofu.decode(model, message, input_shape=(5,))
    with pytest.raises(PayloadError, match="relative to weights"):
        tofu.decode(build(3), message)


def test_arrays_are_matched_by_the_names_that_the_app_gives_them() -> None:
    codec, model = UpdateCodec(build, (4,), ratio=20), build(1)
    for send in (whole, trainable, adapters):
        arrays = send(model)
        coded = codec.reference(arrays)
        expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(torch.equal(coded.reference.base[name], p) for name, p in expected.items())
    numbered = {str(i): value for i, value in enumerate(trainable(model).values())}
    assert codec.reference(numbered).names.keys() == trainable(model).keys()
    some = dict(list(adapters(model).items())[:-1])
    with pytest.raises(SettingError, match="every trainable parameter to be in the message"):
        codec.reference(some)
    with pytest.raises(SettingError, match="arrays, 12 trainable"):
        codec.reference({str(i): value for i, value in enumerate(list(trainable(model).values())[:-1])})


def test_the_frozen_network_is_not_copied_for_each_message() -> None:
    codec, model = UpdateCodec(build, (4,), ratio=20), build()
    first, second = (codec.reference(adapters(model)).reference.model for _ in range(2))
    pairs = zip(first.named_parameters(), second.named_parameters(), strict=True)
    assert all((a is b) == (not a.requires_grad) for (_, a), (_, b) in pairs)
    whole_model = codec.reference(copy.deepcopy(whole(model))).reference.model
    assert not any(p is dict(first.named_parameters())[name] for name, p in whole_model.named_parameters())
