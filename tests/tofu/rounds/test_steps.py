"""The steps that an update passes on its way out, one by one, and what they keep together."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tofu.compression import CompressorOptions, make_compressor
from tofu.compression.error_feedback import ErrorFeedback
from tofu.data import ImageShape
from tofu.errors import PayloadError, SettingError
from tofu.privacy import Noise
from tofu.reference_model import ReferenceModel
from tofu.rounds.steps import (
    AddNoise,
    AddResidual,
    Clip,
    Compress,
    EncodeInRing,
    KeepDirection,
    KeepResidual,
    Outgoing,
    SubtractDirection,
    apply_steps,
    check_noise_grid,
)  # fmt: skip
from tofu.secagg.encoding import EncodingConfig, RingEncoder
from tofu.weights import Weights, dot


def reference(*, batch_norm: bool = False) -> ReferenceModel:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, 10)]
    if batch_norm:
        layers.append(nn.BatchNorm1d(10))
    return ReferenceModel(nn.Sequential(*layers).eval(), ImageShape(1, 8, 8, 10))


def update(seed: int = 0, scale: float = 1.0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = reference().param_spec.shapes
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def compress(seed: int = 0, **options: object) -> Compress:
    network = reference()
    return Compress(
        make_compressor("topk", network, ratio=20, options=CompressorOptions(**options)),  # type: ignore[arg-type]
        network,
        torch.Generator().manual_seed(seed),
    )


def test_the_residual_is_added_by_its_fraction_and_a_lost_reply_in_full() -> None:
    residual, sent, new = update(1), update(2), update(3)
    feedback = ErrorFeedback(residual, sent, sent_round=4)
    kept = AddResidual(acknowledged=4, fraction=0.5).apply(Outgoing(new, feedback)).update
    lost = AddResidual(acknowledged=3, fraction=0.5).apply(Outgoing(new, feedback)).update
    for name, value in new.items():
        assert torch.equal(kept[name], value + 0.5 * residual[name])
        assert torch.allclose(lost[name], value + 0.5 * residual[name] + sent[name])
    none = AddResidual(acknowledged=3, fraction=0).apply(Outgoing(new, feedback))
    assert none.update is new
    assert none.feedback == ErrorFeedback()


@settings(max_examples=25, deadline=None)
@given(
    arrives=st.lists(st.booleans(), min_size=1, max_size=8),
    name=st.sampled_from(["topk", "stc", "eden", "none"]),
    momentum=st.sampled_from([1.0, 0.3]),
    gain=st.sampled_from([1.0, 1.7]),
)
def test_a_client_s_direction_is_what_the_server_summed_up(
    arrives: list[bool], name: str, momentum: float, gain: float
) -> None:
    """Replies get lost; the next target is the direction minus all that arrived, for every compressor."""
    network = reference()
    compressor = make_compressor(name, network, ratio=1 if name == "none" else 10, options=CompressorOptions(gain=gain))
    outgoing, acknowledged, velocity = Outgoing({}), -1, update(0)
    received = {key: torch.zeros_like(value) for key, value in velocity.items()}
    for round_, arrived in enumerate(arrives):
        new = update(round_)
        velocity = {key: (1 - momentum) * velocity[key] + momentum * new[key] for key in new} if round_ else new
        outgoing = SubtractDirection(acknowledged, momentum, list(new)).apply(Outgoing(new, outgoing.feedback))
        for key, value in outgoing.update.items():
            assert torch.allclose(value, velocity[key] - received[key], atol=1e-4)
        outgoing = Compress(compressor, network, torch.Generator().manual_seed(round_)).apply(outgoing)
        outgoing = KeepDirection(round_, list(new)).apply(outgoing)
        if arrived:
            received = {key: received[key] + outgoing.decoded[key] for key in new}
            acknowledged = round_
    if name == "none" and arrives[-1]:
        assert all(torch.allclose(received[key], velocity[key], atol=1e-5) for key in velocity)


def test_the_direction_of_buffers_is_their_own_residual() -> None:
    """The server adds the mean of buffers once, not in every round."""
    new, residual = {"w": torch.ones(2), "buffer": torch.ones(2)}, {"w": -torch.ones(2), "buffer": 0.5 * torch.ones(2)}
    feedback = ErrorFeedback(residual, {"w": torch.zeros(2), "buffer": torch.zeros(2)}, 3, {"w": 3 * torch.ones(2)})
    outgoing = SubtractDirection(3, 0.5, ["w"]).apply(Outgoing(new, feedback))
    assert outgoing.update["w"].tolist() == [1.0, 1.0]  # 0.5 (3 + 1) - 1
    assert outgoing.update["buffer"].tolist() == [1.5, 1.5]
    kept = KeepDirection(4, ["w"]).apply(outgoing.replace(decoded={"w": torch.ones(2), "buffer": torch.ones(2)}))
    assert kept.feedback.residual["w"].tolist() == [-2.0, -2.0]
    assert kept.feedback.residual["buffer"].tolist() == [0.5, 0.5]
    assert kept.feedback.velocity["w"].tolist() == [2.0, 2.0]


def test_clip_bounds_the_norm_and_refuses_batch_counters() -> None:
    clipped = Clip(0.25, reference().param_spec).apply(Outgoing(update()))
    assert math.sqrt(dot(clipped.update, clipped.update)) == pytest.approx(0.25, rel=1e-5)
    with pytest.raises(SettingError, match="batch counters"):
        Clip(0.25, reference(batch_norm=True).param_spec).apply(Outgoing(update()))


def test_noise_has_the_deviation_of_the_mechanism() -> None:
    zero = {name: torch.zeros(100, 100) for name in ("a", "b")}
    noised = AddNoise(Noise(2.0, 0.5, 1)).apply(Outgoing(zero)).update
    assert float(torch.cat([value.flatten() for value in noised.values()]).std()) == pytest.approx(1.0, rel=0.05)


def test_compress_reports_what_the_receiver_decodes() -> None:
    step = compress()
    outgoing = step.apply(Outgoing(update(), memory=b"before"))
    decoded = step.compressor.decompress(step.reference, outgoing.body)
    assert all(torch.equal(decoded[name], outgoing.decoded[name]) for name in decoded)
    assert outgoing.memory == b"before"  # top-k has none of its own


def test_a_ring_vector_decodes_to_the_update() -> None:
    network = reference()
    ranges = (4.0,) * len(network.param_spec.shapes)
    encoder = RingEncoder(network.param_spec, EncodingConfig(clients=3, bits=32, unit_weight=5.0, ranges=ranges))
    outgoing = EncodeInRing(encoder, 5, 0.5, b"seed" * 8, {}).apply(Outgoing(update(scale=0.1)))
    assert outgoing.vector is not None
    mean = encoder.decode(outgoing.vector, 1)
    assert mean.examples == 5
    for name, value in outgoing.decoded.items():
        assert torch.allclose(mean.update[name], value, atol=1e-6)
        assert torch.allclose(value, outgoing.update[name], atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.sampled_from([1.0, 1.5, 1.9]))
def test_what_arrived_and_what_is_kept_add_up_to_all_updates(arrives: list[bool], gain: float) -> None:
    """Whichever replies are lost, and also with over-relaxation."""
    network, acknowledged, feedback = reference(), -1, ErrorFeedback()
    total = {name: torch.zeros(shape) for name, shape in network.param_spec.shapes.items()}
    received = {name: value.clone() for name, value in total.items()}
    for round_, ok in enumerate(arrives, start=1):
        new = update(round_)
        steps = (AddResidual(acknowledged), compress(round_, gain=gain), KeepResidual(round_))
        outgoing = apply_steps(steps, Outgoing(new, feedback))
        feedback = outgoing.feedback
        for name, value in new.items():
            total[name] += value
            received[name] += outgoing.decoded[name] if ok else 0
        acknowledged = round_ if ok else acknowledged
    for name, value in total.items():
        pending = 0 if arrives[-1] else feedback.sent[name]
        assert torch.allclose(received[name] + feedback.residual[name] + pending, value, atol=1e-4)


def test_with_fraction_0_nothing_is_kept() -> None:
    outgoing = compress().apply(Outgoing(update()))
    assert KeepResidual(1, fraction=0).apply(outgoing).feedback == ErrorFeedback()


def test_ranges_that_do_not_match_the_noise_are_refused() -> None:
    noise = Noise(1.0, 1.0, 3).on_ring(levels=2**20, values=100)
    range_ = noise.grid * 2**20
    check_noise_grid(noise, 2**20, 1, (range_, range_))
    check_noise_grid(None, 2**20, 7, (1.0,))
    for unit, ranges in ((1, (range_, 2 * range_)), (2, (range_,))):
        with pytest.raises(PayloadError, match="do not match the noise"):
            check_noise_grid(noise, 2**20, unit, ranges)
