"""Every kind of input and output: the codec needs a model and the shape of its input, not how it is trained."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tofu
from tofu.codec.options import CompressorOptions, ProxySettings
from tofu.codec.proxies import ProxyCode, gradients
from tofu.codec.search import encode
from tofu.errors import PayloadError, SettingError
from tofu.reference_model import (
    InputShape,
    ModelCall,
    ReferenceModel,
    as_tensor,
    at_embedding,
    call_of,
    resolve_compressor,
    shapes_of,
)
from tofu.weights import Weights, cosine


class TwoInputs(nn.Module):
    """An image and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(16 + 5, 3)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return self.head(torch.cat([self.image(image), vector], dim=1))


class Recurrent(nn.Module):
    """Token ids through an embedding and an LSTM; the last layer is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 12)
        self.lstm = nn.LSTM(12, 16, batch_first=True)
        self.head, self.unused = nn.Linear(16, 3), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0][:, -1])


class Sequence(nn.Module):
    """[tokens, dim] values through a transformer layer; one output per token."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"tokens": self.head(self.layer(x))}


def tabular() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))


def regression() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(0))


def signal() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(4), nn.Flatten(), nn.Linear(120, 3)
    )


def rectangle() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 3 * 9, 3)
    return nn.Sequential(*layers)


def volume() -> nn.Module:
    layers = (
        nn.Conv3d(1, 6, 3),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Flatten(),
        nn.Linear(6 * 4 * 5 * 3, 3),
    )
    return nn.Sequential(*layers)


KINDS: dict[str, tuple[Callable[[], nn.Module], InputShape]] = {
    "vector": (tabular, (20,)),
    "regression": (regression, (20,)),
    "signal": (signal, (2, 64)),
    "rectangle": (rectangle, (3, 16, 40)),
    "volume": (volume, (1, 10, 12, 8)),
    "two inputs": (TwoInputs, ((1, 12, 12), (5,))),
    "sequence": (Sequence, (6, 8)),
}


def trained_update(model: nn.Module, inputs: Callable[[], tuple[Tensor, ...]], *, steps: int = 5) -> Weights:
    """What a few steps of a loss of the model's own outputs change; the model is back at its weights afterwards."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.eval()
    for _ in range(steps):
        outputs = as_tensor(model(*inputs()))
        optimizer.zero_grad()
        F.mse_loss(outputs, torch.ones_like(outputs)).backward()
        optimizer.step()
    after = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(before)
    return {name: after[name] - before[name] for name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_of_any_kind_of_model_is_encoded_by_proxies(kind: str) -> None:
    torch.manual_seed(0)
    build, shape = KINDS[kind]
    model = build()
    update = trained_update(model, lambda: tuple(torch.randn(16, *s) for s in shapes_of(shape)))
    options = CompressorOptions(proxies=3, encoder=ProxySettings(bits=8, max_evals=40))
    message = tofu.encode(model, update, input_shape=shape, ratio=1.5, options=options)
    decoded = tofu.decode(model, message, input_shape=shape)
    assert cosine(update, decoded) > 0.3  # smaller proxies cannot be noise, as these inputs are
    with pytest.raises(PayloadError, match="input shape"):
        tofu.decode(model, message, input_shape=(3, 3))


def test_token_ids_go_through_the_embedding_or_by_the_correction_alone(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Recurrent()
    update = trained_update(model, lambda: (torch.randint(50, (16, 6)),))
    with caplog.at_level(logging.WARNING, "tofu"):
        message = tofu.encode(model, update, input_shape=(6,), ratio=8)
    (record,) = caplog.records
    assert record.message.startswith("updates are compressed by the sparse correction alone")
    assert b"sparse" in message[:60]
    assert cosine(update, tofu.decode(model, message, compressor="sparse", input_shape=(6,))) > 0.5
    with caplog.at_level(logging.WARNING, "tofu"):
        tofu.encode(model, update, ratio=8)
    assert caplog.messages[-1].endswith("without proxies: no input_shape is given")
    with pytest.raises(SettingError, match="input_shape"):
        tofu.encode(model, update, input_shape=(6,), compressor="proxy")

    options = CompressorOptions(proxies=3, encoder=ProxySettings(bits=8, max_evals=40))
    forward = at_embedding("embedding")
    message = tofu.encode(model, update, input_shape=(6, 12), forward=forward, ratio=2, options=options)
    decoded = tofu.decode(model, message, forward=forward)
    assert float(decoded["unused.weight"].abs().max()) == float(decoded["embedding.weight"].abs().max()) == 0
    recurrent = {name: value for name, value in update.items() if name.startswith(("lstm", "head"))}
    assert cosine(recurrent, decoded) > 0.6
    with pytest.raises(PayloadError, match="forward"):
        tofu.decode(model, message)


def test_a_loss_of_the_users_own_has_targets_of_its_own_shape() -> None:
    """Here the outputs have 400 values, and a target has two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 400))
    wave = torch.randn(2, 400)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets @ wave)

    x, y = torch.randn(1, 10), torch.randn(1, 2)
    gradients_ = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    update = {n: -g for (n, _), g in zip(model.named_parameters(), gradients_, strict=True)}
    options = CompressorOptions(proxies=1, encoder=ProxySettings(bits=8, max_evals=150, tolerance=0))
    message = tofu.encode(model, update, input_shape=(10,), loss=loss, target_shape=(2,), ratio=20, options=options)
    assert len(message) < 300
    assert cosine(update, tofu.decode(model, message, loss=loss)) > 0.8
    with pytest.raises(SettingError, match="ratio"):
        tofu.encode(model, update, input_shape=(10,), ratio=100, options=CompressorOptions(proxies=0))
    with pytest.raises(PayloadError, match="loss"):
        tofu.decode(model, message)
    with pytest.raises(SettingError, match="target-shape=None"):
        call_of(model, (10,), loss=loss)
    reference = ReferenceModel(model, call_of(model, (10,), loss=loss, target_shape=(2,)))
    with pytest.raises(SettingError, match="free, for a model that is no classifier"):
        ProxyCode.of(reference, ProxySettings(labels="simplex"), 1)


@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 4)),
        st.tuples(st.integers(1, 4), st.integers(1, 3000)),
        st.tuples(st.integers(1, 4), st.integers(1, 300), st.integers(1, 300)),
        st.tuples(st.integers(1, 4), *[st.integers(1, 60)] * 3),
    ),
    fraction=st.floats(0.05, 1),
)
def test_proxies_keep_channels_and_proportions(shape: tuple[int, ...], fraction: float) -> None:
    call = ModelCall((shape,), (2,))
    side = max(1, round(fraction * call.side))
    ((channels, *axes),) = call.proxy_shapes(side if call.side else 0)
    assert channels == shape[0]
    assert len(axes) == len(shape) - 1
    for axis, length in zip(axes, shape[1:], strict=True):
        assert abs(axis - length * side / call.side) <= 0.5 or axis == 1
    assert not axes or min(axes) == side
    assert call.proxy_shapes(call.side) == (shape,)
    with_forward = ModelCall((shape,), (2,), forward=lambda model, x: x)
    assert (with_forward.side, with_forward.proxy_shapes(0)) == (0, (shape,))


def test_the_gradient_is_that_of_the_resized_input_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = signal().eval()
    reference = ReferenceModel(model, call_of(model, (2, 64)))
    update = {name: torch.randn_like(p) for name, p in reference.base.items()}
    settings = ProxySettings(smooth=False, max_evals=3)
    encoding = encode(reference, update, 2, settings, generator=torch.Generator())
    proxies = ProxyCode.of(reference, settings, 2).read(encoding.body)
    (inputs,) = proxies.inputs
    assert inputs.shape == (2, 2, 16)
    whole = F.interpolate(inputs, size=64, mode="linear", align_corners=False)
    loss = torch.sum(model(whole) * proxies.labels)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    found = gradients(reference, proxies, settings)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found.values(), expected, strict=True))


@pytest.mark.parametrize(
    ("model", "shape", "named"),
    [
        (tabular(), (21,), "input-shape"),
        (tabular(), (), "input-shape"),
        (tabular(), ((20,), ()), "input-shape"),
        (tabular(), (0,), "input-shape"),
        (tabular(), ("20",), "input-shape"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(20, 2)), (20,), "model"),
        (nn.LSTM(4, 4), (3, 4), "model"),
    ],
)
def test_what_the_model_does_not_take_is_named(model: nn.Module, shape: Any, named: str) -> None:
    with pytest.raises(SettingError, match=f"^{named}="):
        resolve_compressor(None, model, shape)


def test_proxies_that_the_ratio_has_no_room_for_leave_the_correction_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2000, 2), nn.Linear(2, 2))
    update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    message = tofu.encode(model, update, input_shape=(2000,), ratio=50)
    assert math.prod(call_of(model, (2000,)).inputs[0]) / 2 > len(message)
    assert cosine(update, tofu.decode(model, message)) > 0.2
