"""What holds for every codec that the registry names."""

import math
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import Case
from tests.tofu.compression.common import bare, flat, generator, missed, update_of
from tofu.codec.options import AUTOMATIC, DEFAULTS, CompressorOptions, ProxySettings, automatic_gain
from tofu.compression import compressors, make_compressor
from tofu.compression.base import CompressedUpdate, Compressor
from tofu.compression.error_feedback import ErrorFeedback
from tofu.data import ImageShape
from tofu.errors import PayloadError, RunError, SettingError
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec, Weights, explained_variance
from tofu.wire import HEADER_BYTES

NAMES = compressors.names()
FIXED = {"none": 1.0, "signsgd": 16.0, "float16": 1.8}
"""Codecs that do not tune themselves to a ratio, and one that they reach for any network here."""

VECTORS = tuple(name for name in NAMES if name not in ("none", "proxy", "3sfc"))
"""Codecs of one vector."""

FILLING = ("topk", "eden", "qsgd")
"""Codecs whose size is as fine as a byte or so; stc is so at high ratios, and leaves out entries that do not help."""


def made(name: str, network: ReferenceModel, ratio: float) -> Compressor:
    return make_compressor(
        name, network, ratio=FIXED.get(name, ratio), options=CompressorOptions(encoder=ProxySettings(max_evals=5))
    )


def test_names_and_codes_are_fixed() -> None:
    network = bare((40, 50))
    codes = {name: made(name, network, 10).code for name in NAMES}
    expected = ("none", "proxy", "topk", "stc", "powersgd", "eden", "signsgd", "qsgd", "3sfc", "float16", "sparse")
    assert codes == {name: number for number, name in enumerate(expected, start=1)}
    assert all(made(name, network, 10).name == name for name in NAMES)


@pytest.mark.parametrize("ratio", [12, 50, 300])
@pytest.mark.parametrize("name", NAMES)
def test_a_network_s_update_within_its_budget(name: str, ratio: float, mlp_update: Case) -> None:
    network, update = mlp_update
    check(name, network, update, FIXED.get(name, ratio))


@pytest.mark.parametrize("ratio", [5, 9])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_tensor_within_its_budget(name: str, ratio: float, every_layer_update: Case) -> None:
    network, update = every_layer_update
    check(name, network, update, {"none": 1.0, "float16": 1.8}.get(name, ratio))


def check(name: str, network: ReferenceModel, update: Weights, ratio: float) -> None:
    """Round trip to the bit, budget kept and used, all tensors there, and nearer to the update than nothing is."""
    compressor = make_compressor(
        name, network, ratio=ratio, options=CompressorOptions(encoder=ProxySettings(max_evals=20))
    )
    compressed = compressor.compress(network, update, generator=generator())
    again = compressor.compress(network, update, generator=generator())
    assert again.body == compressed.body
    decoded = compressor.decompress(network, compressed.body)
    assert list(decoded) == list(network.param_spec.shapes)
    for tensor_name, value in decoded.items():
        assert value.dtype == torch.float32
        assert value.shape == network.param_spec.shapes[tensor_name]
        assert torch.equal(value, compressed.decoded[tensor_name])
    assert len(compressed.body) <= compressor.body_bytes(network.param_spec)
    if name != "none":  # which has the header on top of the update
        assert HEADER_BYTES + compressor.body_bytes(network.param_spec) <= network.param_spec.float32_bytes / ratio
    if name in FILLING or (name, ratio) == ("stc", 300):
        assert HEADER_BYTES + len(compressed.body) >= 0.95 * network.param_spec.float32_bytes / ratio
    assert missed(update, decoded, network) < 1


@pytest.mark.parametrize("name", [name for name in VECTORS if name not in FIXED])
def test_more_bytes_miss_less(name: str, mlp_update: Case) -> None:
    network, update = mlp_update
    left = [
        missed(update, made(name, network, ratio).compress(network, update, generator=generator()).decoded, network)
        for ratio in ((15, 60, 240) if name == "sparse" else (4, 15, 60, 240))  # below 10x its few levels limit it
    ]
    assert left == sorted(left)


@pytest.mark.parametrize("name", VECTORS)
def test_zero_stays_zero(name: str, every_layer_update: Case) -> None:
    network, update = every_layer_update
    compressor = make_compressor(name, network, ratio=1.8 if name == "float16" else 5)
    zero = {key: torch.zeros_like(value) for key, value in update.items()}
    compressed = compressor.compress(network, zero, generator=generator())
    assert all(not value.any() for value in compressed.decoded.values())
    for value in compressor.compress(network, zero, generator=generator(), memory=compressed.memory).decoded.values():
        assert not value.any()


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("size", [1e-42, 1e-20, 1e20, 3e38])
def test_huge_and_tiny_values_stay_finite(name: str, size: float) -> None:
    network = bare((50, 40), (300,), (0, 3), ())
    shapes = network.param_spec.parameters.values()
    update = update_of(network, *(torch.randn(s, generator=generator()).clamp(-1, 1) * size for s in shapes))
    decoded = made(name, network, 8).compress(network, update, generator=generator())
    assert all(torch.isfinite(value).all() for value in decoded.decoded.values())
    if size == 1e20 and name != "float16":
        assert missed(update, decoded.decoded, network) < 1


@pytest.mark.parametrize("name", VECTORS)
def test_tensors_that_are_views_of_others(name: str) -> None:
    network = bare((50, 40), (300,))
    x, y = torch.randn(40, 50, generator=generator()).T, torch.randn(600, generator=generator())[::2]
    compressor = made(name, network, 8)
    views = compressor.compress(network, update_of(network, x, y), generator=generator())
    copies = compressor.compress(network, update_of(network, x.contiguous(), y.clone()), generator=generator())
    assert views.body == copies.body


@pytest.mark.parametrize("name", VECTORS)
def test_an_update_that_is_not_finite_is_refused(name: str) -> None:
    network = bare((500,))
    compressor = make_compressor(name, network, ratio=1.5)
    for value in (torch.nan, torch.inf):
        with pytest.raises(RunError, match="not finite"):
            compressor.compress(network, update_of(network, torch.full((500,), value)), generator=generator())


@pytest.mark.parametrize("name", VECTORS)
def test_with_error_feedback_all_arrives_in_time(name: str, mlp_update: Case) -> None:
    """The same update 30 times: the sum of the decodes stays within a few updates of 30 times the update.

    Of signSGD, which contracts least here, it stays within 7; the others are far nearer.
    """
    network, update = mlp_update
    compressor, draw = made(name, network, 40), generator()
    feedback, memory, arrived = ErrorFeedback(), b"", torch.zeros(())
    for round_ in range(30):
        target = feedback.target(update, round_ - 1)
        compressed = compressor.compress(network, target, generator=draw, memory=memory)
        feedback, memory = ErrorFeedback.after(target, compressed.decoded, round_), compressed.memory
        arrived = arrived + flat(compressed.decoded, network)
    x = flat(update, network)
    assert float((arrived / 30 - x).norm() / x.norm()) < 0.3
    assert float(arrived @ x / (arrived.norm() * x.norm())) > 0.95


@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_a_ratio_out_of_reach_is_told_with_one_that_is_not(name: str, mlp_update: Case) -> None:
    network, _ = mlp_update
    with pytest.raises(SettingError, match=r"ratio=100000000\.0 is not usable: expected at most") as error:
        make_compressor(name, network, ratio=1e8)
    if name in VECTORS:
        reach = float(error.value.accepted.split()[2])
        assert make_compressor(name, network, ratio=reach).body_bytes(network.param_spec) > 0
        with pytest.raises(SettingError):
            make_compressor(name, network, ratio=reach * 1.02 + 0.01)


@cache
def victim(name: str) -> tuple[ReferenceModel, Compressor, bytes]:
    """A small network with buffers, its codec, and a body that the codec wrote."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10)
    network = ReferenceModel(nn.Sequential(*layers).eval(), ImageShape(1, 8, 8, 10))
    compressor = made(name, network, 8)
    update = {key: torch.randn(shape, generator=generator()) for key, shape in network.param_spec.shapes.items()}
    return network, compressor, compressor.compress(network, update, generator=generator()).body


def decodes_or_refuses(name: str, body: bytes) -> None:
    network, compressor, _ = victim(name)
    try:
        decoded = compressor.decompress(network, body)
    except PayloadError:
        return
    if name in VECTORS:  # the gradient at enormous proxies may overflow; the server's mean refuses that
        assert all(torch.isfinite(value).all() for value in decoded.values())
    assert {key: value.shape for key, value in decoded.items()} == network.param_spec.shapes


HOSTILE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", NAMES)
@HOSTILE
@given(seed=st.integers(0, 2**32), off=st.integers(-2, 2), short=st.none() | st.integers(0, 80))
@example(seed=1955, off=0, short=None)  # eden: a buffer whose finite scale overflows when it is multiplied
def test_bytes_of_anyone(name: str, seed: int, off: int, short: int | None) -> None:
    length = len(victim(name)[2]) + off if short is None else short
    decodes_or_refuses(name, Random(seed).randbytes(length))


@pytest.mark.parametrize("name", NAMES)
@HOSTILE
@given(data=st.data())
def test_bodies_that_were_tampered_with(name: str, data: st.DataObject) -> None:
    body = bytearray(victim(name)[2])
    places = st.integers(0, min(40, len(body) - 1)) | st.integers(0, len(body) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        body[place] = value
    cut = data.draw(st.integers(0, len(body)) | st.just(len(body)))
    decodes_or_refuses(name, bytes(body[:cut]) + data.draw(st.binary(max_size=3)))


@pytest.mark.parametrize("name", VECTORS)
def test_a_body_longer_than_any_is_refused_unread(name: str) -> None:
    network, compressor, body = victim(name)
    too_long = body + bytes(compressor.body_bytes(network.param_spec) + 1 - len(body))
    with pytest.raises(PayloadError, match=f"{name} body has {len(too_long)} bytes, expected"):
        compressor.decompress(network, too_long)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("none", "proxy", "3sfc")])
def test_over_relaxation_scales_what_both_ends_decode_and_not_the_bytes(name: str, every_layer_update: Case) -> None:
    network, update = every_layer_update
    ratio = {"float16": 1.8}.get(name, 5)
    plain = make_compressor(name, network, ratio=ratio)
    relaxed = make_compressor(name, network, ratio=ratio, options=CompressorOptions(gain=1.5))
    one, other = (c.compress(network, update, generator=generator()) for c in (plain, relaxed))
    assert one.body == other.body
    assert (relaxed.name, relaxed.code) == (plain.name, plain.code)
    received = relaxed.decompress(network, other.body)
    for key in update:
        assert torch.equal(received[key], other.decoded[key])
        factor = 1.5 if key in network.param_spec.parameters else 1.0
        assert torch.equal(received[key], factor * one.decoded[key])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("none", "proxy", "3sfc")])
def test_an_automatic_gain_follows_the_explained_variance_within_the_ratio(name: str, every_layer_update: Case) -> None:
    network, update = every_layer_update
    ratio = {"float16": 1.8}.get(name, 5)
    size = network.param_spec.float32_bytes
    plain = make_compressor(name, network, ratio=size / (size / ratio - 1))
    relaxed = make_compressor(name, network, ratio=ratio, options=CompressorOptions(gain=AUTOMATIC))
    compressed = relaxed.compress(network, update, generator=generator())
    body = compressed.body
    assert len(body) <= relaxed.body_bytes(network.param_spec) <= size / ratio
    inner = plain.decompress(network, body[:-1])
    parameters = {key: update[key] for key in network.param_spec.parameters}
    gain = 1 + body[-1] / 256
    assert gain == automatic_gain(explained_variance(parameters, inner))
    received = relaxed.decompress(network, body)
    for key in update:
        assert torch.equal(received[key], compressed.decoded[key])
        assert torch.equal(received[key], (gain if key in parameters else 1) * inner[key])
    with pytest.raises(PayloadError, match=f"{name} body has 0 bytes"):
        relaxed.decompress(network, b"")


@given(st.floats(-10, 2))
def test_an_automatic_gain_is_1_for_a_message_that_explains_all_and_nearly_1_8_for_nothing(explained: float) -> None:
    gain = automatic_gain(explained)
    assert 1 <= gain <= 1.8
    assert gain == pytest.approx(1 + 0.8 * (1 - min(1, max(0, explained))), abs=1 / 256)
    assert (gain - 1) * 256 == int((gain - 1) * 256)


class Halves(Compressor):
    """A user's own compressor, given as `package.module:Class`."""

    def __init__(self, reference: ReferenceModel, *, ratio: float, options: CompressorOptions) -> None:
        assert ratio == 1.8

    def compress(
        self, reference: ReferenceModel, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> CompressedUpdate:
        body = b"".join(update[name].half().numpy().tobytes() for name in reference.param_spec.shapes)
        return CompressedUpdate(body, self.decompress(reference, body))

    def decompress(self, reference: ReferenceModel, body: bytes) -> Weights:
        shapes = reference.param_spec.shapes
        pieces = torch.frombuffer(bytearray(body), dtype=torch.half).float().split([s.numel() for s in shapes.values()])
        return {name: piece.view(s) for (name, s), piece in zip(shapes.items(), pieces, strict=True)}

    def body_bytes(self, param_spec: ParamSpec) -> int:
        return param_spec.float32_bytes // 2


def test_a_users_own_compressor_needs_no_registration(every_layer_update: Case) -> None:
    network, update = every_layer_update
    compressor = make_compressor(f"{__name__}:Halves", network, ratio=1.8)
    assert (compressor.name, compressor.code, compressor.describe()) == ("halves", 255, None)
    assert missed(update, compressor.compress(network, update, generator=generator()).decoded, network) < 1e-6


class Flattens(Halves):
    """Returns flat tensors."""

    def decompress(self, reference: ReferenceModel, body: bytes) -> Weights:
        return {name: value.flatten() for name, value in super().decompress(reference, body).items()}


class Forgets(Halves):
    """Lacks a tensor."""

    def decompress(self, reference: ReferenceModel, body: bytes) -> Weights:
        return dict(list(super().decompress(reference, body).items())[1:])


class Overflows(Halves):
    """Has values that are not finite."""

    def decompress(self, reference: ReferenceModel, body: bytes) -> Weights:
        return {name: value / 0 for name, value in super().decompress(reference, body).items()}


class Doubles(Halves):
    """Has another type."""

    def decompress(self, reference: ReferenceModel, body: bytes) -> Weights:
        return {name: value.double() for name, value in super().decompress(reference, body).items()}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Flattens", r"torch.float32 \[\d+\], expected torch.float32 \["),
        ("Forgets", "is missing"),
        ("Overflows", "has values that are not finite"),
        ("Doubles", r"is torch.float64 \["),
    ],
)
def test_what_a_users_own_compressor_returns_is_checked(every_layer_update: Case, name: str, problem: str) -> None:
    network, update = every_layer_update
    compressor = make_compressor(f"{__name__}:{name}", network, ratio=1.8)
    with pytest.raises(SettingError, match=rf"^compressor='.*:{name}' is not usable: .* compress\(\) .*{problem}"):
        compressor.compress(network, update, generator=generator())
    body = Halves(network, ratio=1.8, options=CompressorOptions()).compress(network, update, generator=generator()).body
    with pytest.raises(PayloadError, match=rf"decompress\(\) of compressor .*:{name} returns no update .*{problem}"):
        compressor.decompress(network, body)


class Keeps(Halves):
    """Keeps something else than bytes."""

    def compress(self, *arguments: Any, **options: Any) -> CompressedUpdate:
        made = super().compress(*arguments, **options)
        return CompressedUpdate(made.body, made.decoded, torch.zeros(3))  # type: ignore[arg-type]


class Unbounded(Halves):
    def body_bytes(self, param_spec: ParamSpec) -> int:
        return math.inf  # type: ignore[return-value]


class Raises(Halves):
    def __init__(self, reference: ReferenceModel, *, ratio: float, options: CompressorOptions = DEFAULTS) -> None:
        raise ValueError("too high")


def test_a_users_own_compressor_that_cannot_be_used_is_one_line(every_layer_update: Case) -> None:
    network, update = every_layer_update
    own = {kind: f"{__name__}:{kind.__name__}" for kind in (Keeps, Unbounded, Raises)}
    with pytest.raises(SettingError, match=r"Keeps' is not usable: .*bytes as memory \(found Tensor\)"):
        make_compressor(own[Keeps], network, ratio=1.8).compress(network, update, generator=generator())
    with pytest.raises(SettingError, match=r"Unbounded' is not usable: .*a whole number of bytes \(found inf\)"):
        make_compressor(own[Unbounded], network, ratio=1.8).body_bytes(network.param_spec)
    with pytest.raises(
        SettingError, match=r"Raises' is not usable: .*ValueError: too high, at test_every_compressor.py"
    ):
        make_compressor(own[Raises], network, ratio=1.8)
