"""Adaptive clipping: the norm follows the quantile, the count costs what it says, and hostile norms are refused."""

import doctest
import math

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tofu.errors import PayloadError, SettingError
from tofu.privacy import Noise, adaptive, epsilon_of
from tofu.privacy.adaptive import REPORT, AdaptiveClip, clip_of, plugins_of
from tofu.secagg.encoding import EncodingConfig, RingEncoder
from tofu.secagg.fixed_point import FixedPoint
from tofu.secagg.masks import largest
from tofu.settings import PrivacySettings, Settings
from tofu.weights import layout_of, weights_of

MODEL = nn.Linear(1, 1)


def privacy_of(**changes: float) -> PrivacySettings:
    return PrivacySettings.model_validate({"noise_multiplier": 1.0, "clip_quantile": 0.5} | changes)


def round_of(clip: AdaptiveClip, privacy: PrivacySettings, norms: np.ndarray) -> None:
    """One round of clients with these norms, through the ring of a secure round."""
    declared = {f"adaptive-clip/{name}": spec for name, spec in clip.declare_sums(MODEL).items()}
    whole = Noise(privacy.joint_norm(clip.norm), privacy.noise_multiplier, len(norms))
    levels = FixedPoint(len(norms), 20, 1.0).levels
    zero = {name: torch.zeros_like(value) for name, value in weights_of(MODEL).items()}
    noise = whole.on_ring(levels=levels, values=3)
    config = EncodingConfig(len(norms), 20, 1.0, (noise.grid * levels,) * 2)
    encoder = RingEncoder(layout_of(MODEL), config, declared)
    assert encoder.values == 3
    reports = [clip.report(clipped=norm > clip.norm) for norm in norms]
    vectors = [encoder.encode_noised(zero, report, noise.steps).vector for report in reports]
    total = np.sum(vectors, axis=0, dtype=np.uint64) & largest(20)
    sums = encoder.decode(total, len(norms)).sums
    clip.broadcast = clip.reduce({"unclipped": sums[REPORT]}, len(norms), clip.broadcast)


@settings(max_examples=4, deadline=None)
@given(st.floats(0.2, 0.8), st.floats(0.2, 5), st.integers(0, 2**32 - 1))
def test_the_norm_converges_to_the_quantile(quantile, start, seed) -> None:  # type: ignore[no-untyped-def]
    privacy = privacy_of(clip_quantile=quantile, clip_norm=start, clip_lr=0.5, noise_multiplier=0.1)
    clip, generator = AdaptiveClip(privacy), np.random.default_rng(seed)
    norms, fractions = np.exp(generator.normal(size=30)), []
    for _ in range(60):
        round_of(clip, privacy, norms)
        fractions.append(float((norms <= clip.norm).mean()))
    assert np.mean(fractions[40:]) == pytest.approx(quantile, abs=0.08)


def test_update_and_count_together_cost_what_the_multiplier_says() -> None:
    """The deviations that are drawn, as two mechanisms of dp-accounting, against epsilon of the one multiplier."""
    privacy = privacy_of(clip_budget=0.2, noise_multiplier=2.0)
    clip = AdaptiveClip(privacy)
    noise = Noise(privacy.joint_norm(clip.norm), 2.0, sharers=4)
    zeros = {"a": torch.zeros(200_000)}
    update = float(noise.add(zeros)["a"].double().std()) * 2 / clip.norm  # of the sum of four parts
    drawn = np.array([float(noise.add(clip.report(clipped=False))[REPORT]) for _ in range(8000)]) / clip.unit - 0.5
    count = float(drawn.std()) * 2 / 0.5  # over the sensitivity of 1/2
    assert abs(drawn.mean()) < 5 * drawn.std() / math.sqrt(drawn.size)
    together = PLDAccountant().compose(GaussianDpEvent(update)).compose(GaussianDpEvent(count)).get_epsilon(1e-5)
    assert together == pytest.approx(epsilon_of(2.0, 1e-5), rel=0.02)
    assert 1 / count**2 == pytest.approx(0.2 / 2.0**2, rel=0.1)


def test_a_client_that_lies_moves_the_norm_by_a_bounded_factor() -> None:
    clip = AdaptiveClip(privacy_of(clip_norm=2.0))
    for total, factor in ((1e300, math.exp(-0.1)), (-1e300, math.exp(0.1)), (0.0, 1.0)):
        found = clip.reduce({"unclipped": torch.tensor([total])}, 10, {})["norm"]
        assert found == pytest.approx(2.0 * factor)


@pytest.mark.parametrize("norm", [0.0, -1.0, 1e30, "1", torch.ones(1)])
def test_a_client_refuses_a_norm_that_is_not_usable(norm: object) -> None:
    clip = AdaptiveClip(privacy_of())
    clip.broadcast = {"norm": norm}  # type: ignore[dict-item]
    with pytest.raises(PayloadError, match="clip norm is"):
        _ = clip.norm


def test_only_runs_with_a_quantile_have_it() -> None:
    assert clip_of(plugins_of(Settings.of({"noise-multiplier": 1.0}))) is None
    assert clip_of(plugins_of(Settings.of({"noise-multiplier": 1.0, "clip-quantile": 0.5}))) is not None
    with pytest.raises(SettingError, match="clip-quantile"):
        Settings.of({"clip-quantile": 0.5})


def test_the_examples_run() -> None:
    result = doctest.testmod(adaptive)
    assert result.attempted
    assert not result.failed
