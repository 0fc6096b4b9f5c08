"""The encoder of DCT-SNN against scipy's DCT and a loop over pixels; thresholds against exact quantiles."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.fft import dctn, idctn
from torch import Tensor
from torch.nn.functional import interpolate

from tofu.codec.surrogate import Surrogate
from tofu.data import ImageShape
from tofu.models import build_model
from tofu.models.spiking import (
    FREQUENCIES,
    DctEncoder,
    LeakyIntegrateFire,
    QuantileSketch,
    SpikingNetwork,
    balance_thresholds,
    spiking_vgg,
    thresholds_of,
)  # fmt: skip
from tofu.models.spiking.dct import dct_components

ZIGZAG = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0), (3, 1), (2, 2), (1, 3),
          (2, 3), (3, 2), (3, 3)]  # fmt: skip


def smooth_images(n: int = 8, channels: int = 3, side: int = 32) -> Tensor:
    """Images with most of their energy at low frequencies, as photographs have it."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, channels, 6, 6, generator=generator) * 0.5
    fine = torch.randn(n, channels, side, side, generator=generator) * 0.05
    return (interpolate(coarse, size=(side, side), mode="bicubic") + fine).clamp(-1, 1)


def reference_components(image: NDArray[np.float64], stride: int) -> NDArray[np.float64]:
    """[height, width] -> [16, height', width'] by scipy, block by block."""
    rows, columns = ((side - 4) // stride + 1 for side in image.shape)
    out = np.zeros((16, 4 * rows, 4 * columns))
    for row in range(rows):
        for column in range(columns):
            block = image[row * stride : row * stride + 4, column * stride : column * stride + 4]
            spectrum = dctn(block, norm="ortho")
            for k, place in enumerate(ZIGZAG):
                one = np.zeros((4, 4))
                one[place] = spectrum[place]
                out[k, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = idctn(one, norm="ortho")
    return out


@pytest.mark.parametrize("stride", [2, 4])
def test_components_are_those_of_scipy_in_zigzag_order(stride: int) -> None:
    images = smooth_images(2, 1, 12)
    encoder = DctEncoder(stride)
    found = encoder.components(images)
    for number in range(2):
        expected = reference_components(images[number, 0].double().numpy() / 2, stride)
        assert np.abs(found[:, number, 0].numpy() - expected).max() < 1e-6
    assert tuple(found.shape[3:]) == (4 * (8 // stride + 1),) * 2


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (1, 7, 30), (3, 3, 5)], ids=str)
def test_components_sum_to_the_image(stride: int, shape: tuple[int, int, int]) -> None:
    images = torch.rand(2, *shape) * 2 - 1
    encoder = DctEncoder(stride)
    assert torch.allclose(encoder.components(images).sum(0), encoder.expanded(images), atol=1e-6)
    assert encoder(images).shape == (48 * 2, shape[0], *map(encoder.encoded_side, shape[1:]))
    if stride == 4 and shape[1] % 4 == 0 and shape[0] == 1:
        assert torch.equal(encoder.expanded(images), images / 2)


def test_overlapping_blocks_are_beside_each_other() -> None:
    image = torch.arange(36.0).view(1, 1, 6, 6) / 36
    expanded = DctEncoder(2).expanded(image)[0, 0] * 2
    assert torch.equal(expanded[:4, :4], image[0, 0, :4, :4])
    assert torch.equal(expanded[:4, 4:], image[0, 0, :4, 2:])
    assert torch.equal(expanded[4:, :4], image[0, 0, 2:, :4])


def test_the_basis_is_orthonormal_and_colors_are_luminance_and_chrominance() -> None:
    basis = dct_components().flatten(1)
    assert torch.allclose(basis @ basis.T, torch.eye(FREQUENCIES), atol=1e-6)
    gray = torch.full((1, 3, 4, 4), 0.6)
    assert torch.allclose(DctEncoder(4).expanded(gray)[0, :, 0, 0], torch.tensor([0.3, 0.0, 0.0]), atol=1e-5)
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    expected = torch.tensor([0.299 - 0.5, -0.168736, 0.5])
    assert torch.allclose(DctEncoder(4).expanded(red)[0, :, 0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("frequencies", [1, 3, 16])
def test_spikes_are_those_of_a_loop(frequencies: int) -> None:
    images = smooth_images(1, 1, 8)
    encoder = DctEncoder(4)
    encoder.frequencies, encoder.steps = frequencies, 20
    low, high = -0.06, 0.11
    encoder.thresholds.copy_(torch.tensor([low, high]))
    found = encoder(images)[:, 0]
    parts = reference_components(images[0, 0].double().numpy() / 2, 4)
    for y in range(8):
        for x in range(8):
            potential, spikes = 0.0, []
            for step in range(20):
                potential += parts[step % 16, y, x] if step % 16 < frequencies else 0
                spike = 1 if potential > high else -1 if potential < low else 0
                potential -= high if spike > 0 else low if spike < 0 else 0
                spikes.append(spike)
            assert found[:, y, x].tolist() == spikes


def test_spikes_carry_the_image_with_a_third_of_the_spikes_of_a_poisson_code() -> None:
    images = smooth_images(16)
    encoder = DctEncoder(2)
    sketch = QuantileSketch()
    sketch.add(encoder.components(images))
    encoder.thresholds.copy_(torch.tensor([sketch.quantile(q, ignore_zeros=True) for q in (0.03, 0.97)]))
    spikes = encoder(images).unflatten(0, (48, -1))
    pixels = encoder.expanded(images)
    correlation = torch.corrcoef(torch.stack([spikes.sum(0).flatten(), pixels.flatten()]))[0, 1]
    assert correlation**2 >= 0.97
    assert spikes.abs().mean() <= (pixels + 0.5).mean() / 3  # a Poisson code's rate is the pixel in [0, 1]


def test_the_non_spiking_mode_uses_the_kept_frequencies() -> None:
    encoder, images = DctEncoder(2), torch.rand(2, 3, 12, 12) * 2 - 1
    encoder.spiking, encoder.frequencies = False, 3
    assert torch.equal(encoder(images), encoder.components(images)[:3].sum(0))
    assert not torch.allclose(encoder(images), encoder.expanded(images), atol=1e-2)


def test_the_codec_and_the_non_spiking_mode_see_expanded_pixels() -> None:
    images = smooth_images(2, 1, 8).requires_grad_()
    encoder = DctEncoder(2)
    with Surrogate(surrogate_beta=2.0):
        assert torch.equal(encoder(images), encoder.expanded(images))
        assert torch.autograd.grad(encoder(images).sum(), images)[0].min() > 0
    encoder.spiking = False
    assert torch.equal(encoder(images), encoder.expanded(images))


@given(seed=st.integers(0, 1000), scale=st.floats(1e-2, 50), q=st.floats(0.01, 0.99), parts=st.integers(1, 4))
def test_sums_of_sketches_give_the_quantiles_of_all_values(seed: int, scale: float, q: float, parts: int) -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    sketches = [QuantileSketch() for _ in range(parts)]
    for sketch, part in zip(sketches, values.chunk(parts), strict=True):
        sketch.add(part)
    total = QuantileSketch(torch.stack([sketch.counts for sketch in sketches]).sum(0))
    exact = float(values.quantile(q))
    spread = float(values.quantile(min(1.0, q + 1e-3)) - values.quantile(q - 1e-3))
    assert total.quantile(q) == pytest.approx(exact, rel=0.017, abs=spread + 2e-4)


def test_a_sketch_can_ignore_zeros() -> None:
    sketch = QuantileSketch()
    sketch.add(torch.tensor([0.0] * 90 + [-1.0] * 5 + [2.0] * 5))
    assert sketch.quantile(0.5) == 0
    assert sketch.quantile(0.25, ignore_zeros=True) == pytest.approx(-1, rel=0.01)
    assert sketch.quantile(0.75, ignore_zeros=True) == pytest.approx(2, rel=0.01)
    assert QuantileSketch().quantile(0.5) == 0


def test_thresholds_are_percentiles_of_the_currents_with_spikes_before() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = spiking_vgg([6, "A", 8, 4], ImageShape(1, 8, 8, 10), steps=6)
    network.spiking = False
    images = smooth_images(20, 1, 8)
    balance_thresholds(network, images, quantile=0.99, batch_size=7)
    assert network.spiking
    x = images
    for name, module in network.named_children():
        if isinstance(module, LeakyIntegrateFire):
            exact = float(x.detach().flatten().quantile(0.99))
            assert thresholds_of(network)[name] == pytest.approx(exact, rel=0.02)
        x = module(x)


@torch.no_grad()
def test_conversion_keeps_the_size_of_the_outputs() -> None:
    network = spiking_vgg([8, 8], ImageShape(1, 8, 8, 10), steps=16)
    images = smooth_images(20, 1, 8)
    network.spiking = False
    before = float(network(images).square().mean())
    balance = balance_thresholds(network, images)
    assert float(network(images).square().mean()) == pytest.approx(before, rel=1e-4)
    assert balance.scale > 1
    network.spiking = False
    assert float(network(images).square().mean()) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("name", ["dct-snn-small", "dct-snn-vgg5", "dct-snn-vgg9"])
def test_models_with_the_encoder_take_small_and_odd_images(name: str) -> None:
    for shape in (ImageShape(1, 8, 8, 10), ImageShape(3, 9, 14, 4)):
        model = build_model(name, shape)
        assert isinstance(model, SpikingNetwork)
        assert model.steps == 48
        model.steps = 16
        with torch.no_grad():
            assert model(torch.rand(1, shape.channels, shape.height, shape.width)).shape == (1, shape.classes)
