"""Metrics: assignment, laws, and that a blurry image does not count as recovered."""

from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.metrics import BEST_PSNR, lpips_network, score
from tofu.data import LabeledImages, to_float

from torchmetrics.functional.image import peak_signal_noise_ratio  # isort: skip  # after tofu's import of torchvision


def test_order_does_not_matter(digits: LabeledImages) -> None:
    truth, others = to_float(digits.images[:6]), to_float(digits.images[50:150])
    shuffled = torch.tensor([3, 0, 5, 1, 4, 2])
    found = score(
        truth[shuffled],
        digits.labels[:6][shuffled],
        truth=truth,
        true_labels=digits.labels[:6],
        others=others,
        classes=10,
    )
    assert found.psnr == BEST_PSNR
    assert found.ssim == pytest.approx(1)
    assert found.labels == 1
    assert found.recovered == 1
    assert [int(shuffled[p]) for p in found.pairs] == list(range(6))


def test_psnr_is_torchmetrics(digits: LabeledImages) -> None:
    truth = to_float(digits.images[:1])
    noisy = (truth + 0.2 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    found = score(noisy, None, truth=truth, true_labels=digits.labels[:1], others=truth[:0], classes=10)
    expected = peak_signal_noise_ratio((noisy + 1) / 2, (truth + 1) / 2, data_range=1.0)
    assert found.psnr == pytest.approx(float(expected), abs=1e-4)
    assert found.labels is None


def test_the_mean_of_all_digits_recovers_none(digits: LabeledImages) -> None:
    images = to_float(digits.images)
    blurry = images.mean(0, keepdim=True).expand(20, -1, -1, -1)
    found = score(blurry, None, truth=images[:20], true_labels=digits.labels[:20], others=images[20:220], classes=10)
    assert found.psnr is not None
    assert found.psnr > 9
    assert found.recovered == 0


def test_chance_is_how_often_random_images_pass() -> None:
    """Also the guess of labels: one of ten classes, or as many as there are of the rarest."""
    draws = torch.Generator().manual_seed(0)
    passed = []
    for _ in range(400):
        truth, others, images = (torch.rand(n, 1, 4, 4, generator=draws) * 2 - 1 for n in (8, 12, 1))
        found = score(images.expand(8, -1, -1, -1), None, truth=truth, true_labels=torch.arange(8), others=others,
                      classes=10)  # fmt: skip
        assert found.recovered is not None
        assert found.chance == pytest.approx(comb(8, round(8 * found.recovered)) / comb(20, round(8 * found.recovered)))
        passed.append(found.recovered >= 2 / 8)
    expected = (8 * 7) / (20 * 19)  # the two nearest of twenty images are of the batch
    assert sum(passed) / 400 == pytest.approx(expected, abs=0.05)
    labels = torch.tensor([0, 0, 0, 1])
    assert score(None, labels, truth=truth[:4], true_labels=labels, others=others, classes=2).labels_guess == 0.75


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 5), found=st.integers(1, 7), seed=st.integers(0, 1000))
def test_laws(count: int, found: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth, images, others = (torch.rand(n, 3, 8, 8, generator=generator) * 2 - 1 for n in (count, found, 9))
    labels = torch.randint(4, (count,), generator=generator)
    result = score(images, labels[:found], truth=truth, true_labels=labels, others=others, classes=4)
    used = [p for p in result.pairs if p >= 0]
    assert len(used) == len(set(used)) == min(count, found)
    assert result.recovered is not None
    assert 0 <= result.recovered <= 1
    assert result.labels == min(count, found) / count
    assert result.mse is not None
    assert 0 <= result.mse <= 1


def test_lpips_is_never_downloaded(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert lpips_network() is None
