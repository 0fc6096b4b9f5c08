"""Crossbar pruning: tiles, penalty, levels and energy by hand or against loops, and federations."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from client import app as honest
from client.plugins.crossbar import CrossbarPruning
from client.plugins.crossbar_tiles import (
    AdcEnergy,
    ExponentialAdc,
    SurveyAdc,
    adc_energy,
    balanced_mask,
    column_counts,
    column_hoyer,
    from_tiles,
    occupancy_variance,
    percentile_threshold,
    round_to_level,
    to_tiles,
)  # fmt: skip
from server.app import serve_in_process
from tests.client.plugins.apps import forgetful_app
from tofu.data import FederatedData, LabeledImages, to_float
from tofu.errors import PayloadError, RunError, SettingError
from tofu.models import build_model
from tofu.observers.base import Observer
from tofu.plugins import Plugins, RoundContext, make_plugins
from tofu.reporting.folder import read_model
from tofu.reporting.panels import read_panels
from tofu.reporting.predict import predict_images
from tofu.reporting.report import write_report
from tofu.rounds.record import RoundRecord
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import layout_of, weights_of

MB = 1 << 24


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_matrix(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=generator(seed))


def only(options: str = "") -> tuple[Plugins, CrossbarPruning]:
    plugins = make_plugins("crossbar", options)
    plugin = plugins[0]
    assert isinstance(plugin, CrossbarPruning)
    return plugins, plugin


SIZES = st.integers(1, 21)


# Tiles, penalty, levels, energy


@given(SIZES, SIZES, st.sampled_from([2, 4, 8]), st.integers(0, 9))
def test_tiles_are_blocks_of_the_padded_matrix(outputs: int, inputs: int, tile: int, seed: int) -> None:
    matrix = random_matrix(outputs, inputs, seed)
    tiles = to_tiles(matrix, tile)
    assert tiles.shape == (math.ceil(outputs / tile), math.ceil(inputs / tile), tile, tile)
    assert torch.equal(from_tiles(tiles, outputs, inputs), matrix)
    block = matrix[-1:, :tile]  # the last output is a column of the last block of tiles
    assert torch.equal(tiles[-1, 0, (outputs - 1) % tile, : block.shape[1]], block[0])
    assert float(tiles.abs().sum()) == pytest.approx(float(matrix.abs().sum()), rel=1e-5)


def test_the_squared_hoyer_measure_counts_entries() -> None:
    columns = torch.tensor([[0.0, 0, 0, 0], [0, -3, 0, 0], [2, 2, 0, -2], [1, 1, 1, 1], [3, 1, 0, 0]])
    assert column_hoyer(columns).tolist() == pytest.approx([0, 1, 3, 4, 16 / 10], abs=1e-5)


def variance_by_loops(matrix: np.ndarray, tile: int) -> float:
    """Tile by tile, without padding, in float64."""
    variances = []
    for i in range(0, matrix.shape[0], tile):
        for j in range(0, matrix.shape[1], tile):
            block = matrix[i : i + tile, j : j + tile]
            hoyer = np.abs(block).sum(1) ** 2 / ((block**2).sum(1) + 1e-6)
            variances.append(hoyer.var(ddof=1) if len(hoyer) > 1 else 0.0)
    return float(np.mean(variances))


@given(SIZES, SIZES, st.sampled_from([2, 4, 8]), st.integers(0, 9))
def test_the_penalty_is_the_mean_over_tiles_of_the_variance_over_columns(
    outputs: int, inputs: int, tile: int, seed: int
) -> None:
    matrix = random_matrix(outputs, inputs, seed)
    found = occupancy_variance([matrix], tile)
    assert float(found) == pytest.approx(variance_by_loops(matrix.double().numpy(), tile), rel=1e-3, abs=1e-4)


def test_the_penalty_is_normalized_by_the_number_of_tiles() -> None:
    a, b = random_matrix(8, 16), random_matrix(4, 4, 1)
    expected = (8 * float(occupancy_variance([a], 4)) + float(occupancy_variance([b], 4))) / 9
    assert float(occupancy_variance([a, b], 4)) == pytest.approx(expected, rel=1e-5)
    assert float(occupancy_variance([], 4)) == 0


def test_only_columns_above_the_mean_are_pushed_and_towards_fewer_entries() -> None:
    matrix = random_matrix(6, 4).double().requires_grad_()
    occupancy_variance([matrix], 8).backward()
    hoyer = column_hoyer(matrix.detach())
    above = hoyer > hoyer.mean()
    assert 0 < above.sum() < 6
    assert matrix.grad is not None
    assert bool((matrix.grad[~above] == 0).all())
    # By hand: d Var / d H = 2 (H - mean) / (n - 1), times d H / d w by central differences.
    for row in above.nonzero().flatten().tolist():
        for i in range(4):
            shift = torch.zeros(4, dtype=torch.float64)
            shift[i] = 1e-6
            slope = (column_hoyer(matrix.detach()[row] + shift) - column_hoyer(matrix.detach()[row] - shift)) / 2e-6
            expected = 2 * (hoyer[row] - hoyer.mean()) / 5 * slope
            assert float(matrix.grad[row, i]) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    moved = matrix.detach() - 1e-3 * matrix.grad
    assert bool((column_hoyer(moved)[above] < hoyer[above]).all())


def level_by_sparsity(sparsity: float, tile: int) -> float:
    """The published rule: levels 1 - 2^-k for k = 0 ... log2 t + 1, and 1; from the middle of an interval on up."""
    levels = [1 - 2.0**-k for k in range(int(math.log2(tile)) + 2)] + [1.0]
    lower = max(level for level in levels if level <= sparsity)
    upper = min((level for level in levels if level > sparsity), default=1.0)
    return upper if sparsity >= (lower + upper) / 2 else lower


@pytest.mark.parametrize("tile", [2, 8, 32, 64])
def test_occupancies_are_rounded_to_powers_of_two(tile: int) -> None:
    largest = torch.arange(tile + 1)
    expected = [round(tile * (1 - level_by_sparsity(1 - n / tile, tile))) for n in range(tile + 1)]
    assert round_to_level(largest, tile).tolist() == expected
    assert round_to_level(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8]), 8).tolist() == [0, 1, 2, 2, 4, 4, 4, 8, 8]


def mask_by_loops(matrix: np.ndarray, tile: int, threshold: float) -> np.ndarray:
    mask = np.zeros(matrix.shape, dtype=bool)
    for i in range(0, matrix.shape[0], tile):
        for j in range(0, matrix.shape[1], tile):
            block = np.abs(matrix[i : i + tile, j : j + tile])
            sparsity = min((tile - (column > threshold).sum()) / tile for column in block)
            count = round(tile * (1 - level_by_sparsity(sparsity, tile)))
            for c, column in enumerate(block):
                mask[i + c, j : j + tile][np.argsort(-column)[:count]] = True
    return mask


@given(SIZES, SIZES, st.sampled_from([2, 4, 8]), st.floats(0, 2.5), st.integers(0, 9))
def test_masks_agree_with_a_loop_over_tiles(outputs: int, inputs: int, tile: int, threshold: float, seed: int) -> None:
    matrix = random_matrix(outputs, inputs, seed)
    mask = balanced_mask(matrix, tile, threshold)
    assert np.array_equal(mask.numpy(), mask_by_loops(matrix.numpy(), tile, threshold))
    counts = column_counts(to_tiles(mask, tile))
    assert set(counts.amax(-1).flatten().tolist()) <= {0, *(2**k for k in range(10)), inputs % tile}


def test_the_percentile_is_a_fraction_of_the_entries() -> None:
    matrix = torch.arange(1.0, 11).view(2, 5) * torch.tensor([1, -1, 1, -1, 1])
    assert percentile_threshold(matrix, 0.8) == 8
    assert percentile_threshold(matrix, 0.0) == 0
    assert int((matrix.abs() > percentile_threshold(matrix, 0.35)).sum()) == 7


def test_energy_by_hand() -> None:
    """Tiles of 4: one with at most 1 entry a column, an empty one, and two that reach into the padding."""
    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[0, 0] = mask[1, 3] = mask[3, 2] = True  # 4 columns of at most 1 entry: 1 bit
    mask[4, 0:3] = True  # 2 columns, the fullest has 3 entries: ceil(log2 3) + 1 = 3 bits
    mask[5, 4:7] = True
    # Dense: 4 entries are 3 bits; the second block of inputs has 3 rows, so 3 bits as well.
    assert adc_energy(ExponentialAdc(), mask, 4) == (4 * 2 + 0 + 2 * 8 + 2 * 8, 6 * 8 + 6 * 8)
    bits = {n: 100 * n + 0.001 * 4**n for n in (1, 3)}
    expected = (4 * bits[1] + 4 * bits[3], 12 * bits[3])
    assert adc_energy(SurveyAdc(), mask, 4, positions=5) == pytest.approx([5 * e for e in expected])
    assert adc_energy(ExponentialAdc(), torch.zeros(3, 3, dtype=torch.bool), 4)[0] == 0


@pytest.mark.parametrize("k", range(6))
def test_half_the_entries_of_all_columns_halve_the_energy(k: int) -> None:
    """As the paper assumes: a sparsity of 1 - 2^-k in every column saves k bits."""
    mask = random_matrix(32, 32).argsort(1) < 32 // 2**k
    bits = k - 5
    assert adc_energy(ExponentialAdc(), mask, 32) == (32 * 2.0 ** (1 - bits), 32 * 2.0**6)


class PerColumnAdc(AdcEnergy):
    """A converter for every column."""

    def tile(self, occupancy: Tensor, columns: Tensor) -> Tensor:
        return occupancy.double().sum(1)


def test_another_energy_model_is_selected_by_name() -> None:
    plugin = CrossbarPruning(energy=f"{__name__}:PerColumnAdc")
    assert isinstance(plugin._adc, PerColumnAdc)
    assert adc_energy(plugin._adc, torch.eye(6, 7, dtype=torch.bool), 4) == (6, 42)


# The client's and the server's half


def regularized(
    digits: LabeledImages, options: str, *, how: LocalTrainingConfig, model: str = "cnn"
) -> tuple[nn.Module, Plugins, CrossbarPruning]:
    """One client's training in the first of two rounds, and the plugin on the server after it."""
    context = RoundContext(digits.shape, round=1, rounds=2)
    plugins, plugin = only(options)
    network = plugins.setup(build_model(model, digits.shape, seed=0), context)
    train_locally(network, digits, how, generator=generator(), plugins=plugins)
    plugins.on_aggregate(network, context)
    return network, plugins, plugin


HOW = LocalTrainingConfig(epochs=1, batch_size=32, lr=0.05, momentum=0.9)


def test_the_penalty_evens_the_columns_out(digits: LabeledImages) -> None:
    data = digits.subset(torch.arange(600))
    variances = []
    for strength in (0.0, 0.1):
        plugins, _ = only(f"crossbar.tile=16 crossbar.strength={strength}")
        model = plugins.setup(build_model("cnn", data.shape, seed=0), RoundContext(data.shape, rounds=2))
        train_locally(model, data, LocalTrainingConfig(3, 32, 0.05), generator=generator(), plugins=plugins)
        variances.append(plugins.export(model).metrics["crossbar/column-variance"])
        assert variances[-1] == pytest.approx(
            float(occupancy_variance((p.detach().flatten(1) for p in model.parameters() if p.dim() > 1), 16)), rel=1e-4
        )
    assert variances[1] < 0.7 * variances[0]


@pytest.mark.parametrize("options", ["", "crossbar.rule=tolerance crossbar.tolerance=0.05", "crossbar.layers=conv"])
def test_the_server_prunes_and_a_client_builds_the_same_model(digits: LabeledImages, options: str) -> None:
    data = digits.subset(torch.arange(200))
    model, server, plugin = regularized(data, f"crossbar.tile=16 {options}", how=HOW)
    plain = {name: weight.clone() for name, weight in model.named_parameters()}
    later = RoundContext(data.shape, round=2, rounds=2)
    pruned = server.setup(model, later)
    client, _ = only(f"crossbar.tile=16 {options}")
    client.load(broadcast=server.broadcast_bytes(max_bytes=MB), max_bytes=MB)
    local = client.setup(build_model("cnn", data.shape, seed=3), later)
    assert layout_of(local) == layout_of(pruned)
    masked = {name.removeprefix("mask/") for name in plugin.broadcast if name.startswith("mask/")}
    every = {name for name, weight in plain.items() if weight.dim() > 1}
    assert masked == ({name for name in every if "conv" in name} if "conv" in options else every)
    sent = layout_of(pruned).parameter_count
    for name in masked:
        path, _, attribute = name.rpartition(".")
        weight, before = getattr(pruned.get_submodule(path), attribute), plain[name]
        threshold = percentile_threshold(before, 0.8) if "tolerance" not in options else 0.05
        mask = mask_by_loops(before.detach().flatten(1).numpy(), 16, threshold)
        assert torch.equal(weight.flatten(1), before.flatten(1) * torch.from_numpy(mask))
        sent += int((~mask).sum())
        assert plugin.broadcast[f"layer/{name}"][0] == pytest.approx((~mask).mean())  # type: ignore[index]
    assert sent == sum(weight.numel() for weight in plain.values())
    assert server.setup(pruned, later) is pruned  # and again


def test_fine_tuning_with_momentum_leaves_pruned_weights_at_zero(digits: LabeledImages) -> None:
    """Against SGD with momentum, written out: gradients, momenta and weights masked in every step."""
    data = digits.subset(torch.arange(64))
    model, server, _ = regularized(data, "crossbar.tile=8", how=HOW, model="mlp")
    masks = {name: w.new_tensor(mask_by_loops(w.detach().numpy(), 8, percentile_threshold(w, 0.8)))
             for name, w in model.named_parameters() if w.dim() > 1}  # fmt: skip
    oracle = copy.deepcopy(model)
    tuned = server.setup(model, RoundContext(data.shape, round=2, rounds=2))
    train_locally(tuned, data, LocalTrainingConfig(3, 64, 0.1, 0.9), generator=generator(), plugins=server)
    parameters = dict(oracle.named_parameters())
    momenta = {name: torch.zeros_like(p) for name, p in parameters.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask)
    for _ in range(3):
        loss = F.cross_entropy(oracle(to_float(data.images)), data.labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
                momenta[name] = 0.9 * momenta[name] + gradient
                p.sub_(0.1 * momenta[name])
                if name in masks:
                    p.mul_(masks[name])
                    momenta[name].mul_(masks[name])
    for name, p in parameters.items():
        path, _, attribute = name.rpartition(".")
        assert torch.allclose(getattr(tuned.get_submodule(path), attribute), p, atol=1e-5)


def test_local_masks_hold_weights_and_momenta_at_zero(digits: LabeledImages) -> None:
    data, options = digits.subset(torch.arange(200)), "crossbar.tile=16 crossbar.masks=local"
    model, plugins, plugin = regularized(data, options, how=HOW)
    zero = {name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() > 1}
    assert 0.5 < sum(int(z.sum()) for z in zero.values()) / sum(z.numel() for z in zero.values()) < 0.9
    assert not any(name.startswith("mask/") for name in plugin.broadcast)  # a mask says something about the client
    client, own = only(options)
    client.load(state=plugins.state_bytes(max_bytes=MB), max_bytes=MB)
    later = RoundContext(data.shape, round=2, rounds=2)
    dense = client.setup(build_model("cnn", data.shape, seed=5), later)
    momenta: list[dict[str, Tensor]] = []
    step = own.on_step

    def watch(model: nn.Module, before: Any, given: Any) -> None:
        step(model, before, given)
        momenta.append(given)

    own.on_step = watch  # type: ignore[method-assign]
    train_locally(dense, data, HOW, generator=generator(), plugins=client)
    for name, mask in zero.items():
        weight = dense.get_parameter(name)
        assert bool((weight[mask] == 0).all())
        assert bool((weight[~mask] != 0).any())
        assert bool((momenta[-1][name][mask] == 0).all())
    assert client.export(dense).metrics["crossbar/own-sparsity"] == pytest.approx(
        sum(int(z.sum()) for z in zero.values()) / sum(z.numel() for z in zero.values())
    )


def test_averaging_own_masks_loses_sparsity(digits: LabeledImages) -> None:
    """Two clients prune differently: the average has zeros only where both have."""
    options = "crossbar.tile=16 crossbar.masks=local"
    pruned = []
    for part in range(2):
        data = digits.subset(torch.arange(part, 600, 2))
        model, _, _ = regularized(data, options, how=LocalTrainingConfig(3, 32, 0.05))
        pruned.append(weights_of(model)["conv3.weight"])
    zeros = [float((weight == 0).float().mean()) for weight in pruned]
    both = float(((pruned[0] + pruned[1]) == 0).float().mean())
    assert both < min(zeros) - 0.02


class Grouped(nn.Module):
    """What the small networks lack: groups, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.stem(x)))).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_groups_and_attention(digits: LabeledImages) -> None:
    """Every group of a convolution is a matrix of its own, with other inputs, so on tiles of its own."""
    torch.manual_seed(0)
    model, context = Grouped(), RoundContext(digits.shape, round=1, rounds=2)
    plugins, plugin = only("crossbar.tile=4 crossbar.percentile=0.5")
    plugins.setup(model, context)
    plugins.on_aggregate(model, context)
    names = {name.removeprefix("mask/") for name in plugin.broadcast if name.startswith("mask/")}
    assert names == {"stem.weight", "grouped.weight", "attention.in_proj_weight", "attention.out_proj.weight",
                     "head.weight"}  # fmt: skip
    dense = {name: plugin.broadcast[f"layer/{name}"][2] for name in names}  # type: ignore[index]
    # Tiles of 4 have 2^3; 4 columns each. Groups: 4 x 36 inputs = 9 tiles, of 4 groups, at 64 positions.
    assert dense["grouped.weight"] == 4 * 9 * 4 * 8 * 64
    # Attention reads 64 tokens: 48 outputs and 16 inputs are 12 x 4 tiles.
    assert dense["attention.in_proj_weight"] == 12 * 4 * 4 * 8 * 64
    assert dense["head.weight"] == 4 * 10 * 8
    weight = model.grouped.weight.detach()
    pruned = plugins.setup(model, RoundContext(digits.shape, round=2, rounds=2))
    for group in range(4):
        own = weight[4 * group : 4 * group + 4].flatten(1)
        mask = mask_by_loops(own.numpy(), 4, percentile_threshold(own, 0.5))
        assert torch.equal(pruned.grouped.weight[4 * group : 4 * group + 4].flatten(1), own * torch.from_numpy(mask))
    data = digits.subset(torch.arange(32))
    before = weights_of(pruned)
    train_locally(pruned, data, LocalTrainingConfig(1, 32, 0.1), generator=generator(), plugins=plugins)
    assert all(bool((value != before[name]).any()) for name, value in weights_of(pruned).items())
    assert pruned.eval()(to_float(data.images)).shape == (32, 10)


# Refusals


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("crossbar.tile=48", "crossbar.tile=48 .*a power of two"),
        ("crossbar.tile=1", "crossbar.tile='1' .*at least 2"),
        ("crossbar.strength=-1", "crossbar.strength='-1' .*at least 0"),
        ("crossbar.percentile=1", "crossbar.percentile='1' .*below 1"),
        ("crossbar.rule=mean", "crossbar.rule='mean' .*percentile, tolerance"),
        ("crossbar.masks=own", "crossbar.masks='own' .*common, local"),
        ("crossbar.energy=flash", "crossbar.energy='flash' .*exponential, survey, or package.module:Class"),
        ("crossbar.energy=tofu.wire:SECURE", "crossbar.energy='tofu.wire:SECURE' .*AdcEnergy"),
        ("crossbar.levels=3", "crossbar.levels='3' .*a known option"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: str, wanted: str) -> None:
    with pytest.raises(SettingError, match=wanted) as error:
        make_plugins("crossbar", options)
    assert "\n" not in str(error.value)


def test_runs_that_cannot_work_are_refused(digits: LabeledImages) -> None:
    model = build_model("mlp", digits.shape)
    with pytest.raises(SettingError, match=r"crossbar\.after=4 .*less than the run's rounds, 4"):
        only("crossbar.after=4")[0].setup(model, RoundContext(digits.shape, rounds=4))
    with pytest.raises(SettingError, match=r"crossbar\.after=0 .*less than the run's rounds, 1"):
        only()[0].setup(model, RoundContext(digits.shape))
    with pytest.raises(SettingError, match="without client groups"):
        only()[0].setup(model, RoundContext(digits.shape, rounds=4, group=1))


def test_a_layer_of_which_nothing_would_remain_is_refused(digits: LabeledImages) -> None:
    context = RoundContext(digits.shape, round=1, rounds=2)
    plugins, _ = only("crossbar.rule=tolerance crossbar.tolerance=100")
    model = plugins.setup(build_model("mlp", digits.shape), context)
    with pytest.raises(RunError, match=r"no entry of fc1\.weight: a smaller tolerance"):
        plugins.on_aggregate(model, context)


@pytest.mark.parametrize(
    ("name", "bits", "wanted"),
    [
        ("fc1.weight", torch.ones(3, dtype=torch.uint8), "expected 1600 bytes"),
        ("fc1.weight", torch.ones(1600), "expected 1600 bytes"),
        ("fc1.weight", "text", "expected 1600 bytes"),
        ("fc1.weight", torch.zeros(1600, dtype=torch.uint8), "keeps nothing"),
        ("fc9.weight", torch.ones(1600, dtype=torch.uint8), "no such weight"),
        ("fc1.forward", torch.ones(1600, dtype=torch.uint8), "no such weight"),
        ("", torch.ones(1600, dtype=torch.uint8), "no such weight"),
    ],
)
def test_masks_that_do_not_fit_are_refused(digits: LabeledImages, name: str, bits: Any, wanted: str) -> None:
    plugins, plugin = only()
    plugin.broadcast = {f"mask/{name}": bits}
    with pytest.raises(PayloadError, match=wanted):
        plugins.setup(build_model("mlp", digits.shape), RoundContext(digits.shape, rounds=4))
    local, own = only("crossbar.masks=local")
    own.state = {f"mask/{name}": bits}
    model = local.setup(build_model("mlp", digits.shape), RoundContext(digits.shape, rounds=4))
    before = weights_of(model)
    own.on_train_begin(model, digits)  # a client's own state of another model is as good as none
    assert all(torch.equal(value, before[n]) for n, value in weights_of(model).items())


# Federations

TINY: dict[str, Any] = {
    "model": "mlp", "clients": 3, "rounds": 4, "max_evals": 5, "ratio": 20.0, "local_epochs": 1, "batch_size": 32,
    "lr": 0.05, "momentum": 0.9, "ema_decay": 0.0, "partition": "iid", "plugins": "crossbar",
    "plugin_options": "crossbar.tile=16 crossbar.strength=0.03",
}  # fmt: skip


def federate(folder: Path, app: ClientApp = honest.app, observer: Observer | None = None, **more: object) -> Any:
    return serve_in_process(app, Settings.of(TINY | more | {"run_folder": str(folder)}), observer)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("schedule", ["fedavg", "compressed", "secure"])
def test_pruned_weights_are_neither_sent_nor_encoded(tmp_path: Path, schedule: str) -> None:
    run = tmp_path / "run"
    federate(run, schedule=schedule)
    records = rows(run)
    assert all(record["failures"] == [] for record in records)
    weights, _, broadcast = read_model(run)
    only(TINY["plugin_options"])[0].load(broadcast=broadcast, max_bytes=MB)
    total = sum(value.numel() for value in weights.values())
    whole = layout_of(build_model("mlp", FederatedData.of(Settings.of(TINY).data, 0).shape)).parameter_count
    assert total < 0.45 * whole
    uplink = [record["uplink_bytes"] for record in records[1:]]
    assert uplink[3] < (total / whole + 0.1) * uplink[1]  # headers, and what else a secure round exchanges
    assert records[-1]["downlink_bytes"] < (total / whole + 0.05) * records[2]["downlink_bytes"]
    panel = read_panels(run)["crossbar"]
    table, picture = panel.figures[0], panel.figures[2]
    assert [row[0] for row in table.rows] == ["fc1.weight", "fc2.weight", "fc3.weight"]  # type: ignore[union-attr]
    assert all(0.5 < float(row[1]) < 0.9 for row in table.rows)  # type: ignore[union-attr]
    before, scale, after = np.split(np.array(picture.images[0]), [4, 5])  # type: ignore[union-attr]
    assert before.shape == after.shape == (4, 200)  # 64 inputs are 4 tiles
    assert scale.min() == 0
    assert scale.max() == 1
    assert set(np.unique(after.round(2))) <= {0.0, 0.06, 0.12, 0.13, 0.25, 0.5, 1.0}
    write_report(run)
    assert "Crossbar-aware pruning" in (run / "report.html").read_text()
    if schedule != "compressed":
        assert records[-1]["accuracy"] > 0.6


def test_predict_rebuilds_the_pruned_network(tmp_path: Path) -> None:
    """From the run's files alone: a plain network, zero where the saved bits are."""
    from PIL import Image

    run, folder = tmp_path / "run", tmp_path / "images"
    federate(run, schedule="fedavg", rounds=2)
    folder.mkdir()
    test = FederatedData.of(Settings.of(TINY).data, 0).test()
    for number in range(20):
        Image.fromarray(test.images[number, 0].numpy()).save(folder / f"{number:02}.png")
    predictions = predict_images(run, folder)
    weights, _, broadcast = read_model(run)
    plugins, plugin = only(TINY["plugin_options"])
    plugins.load(broadcast=broadcast, max_bytes=MB)
    model = build_model("mlp", test.shape).eval()
    for name, parameter in model.named_parameters():
        bits = plugin.broadcast.get(f"mask/{name}")
        if isinstance(bits, Tensor):
            flat = np.zeros(parameter.numel(), dtype=np.float32)
            kept = np.unpackbits(bits.numpy())[: parameter.numel()].astype(bool)
            flat[kept] = weights[name.replace(".weight", ".parametrizations.weight.original")].numpy()
            parameter.data = torch.from_numpy(flat).view(parameter.shape)
        else:
            parameter.data = weights[name]
    with torch.no_grad():
        expected = model(to_float(test.images[:20])).softmax(1).max(1)
    assert [row["class"] for row in predictions] == expected.indices.tolist()
    assert [row["probability"] for row in predictions] == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_local_masks_lose_sparsity_and_save_no_bytes(tmp_path: Path) -> None:
    federate(tmp_path / "run", plugin_options=TINY["plugin_options"] + " crossbar.masks=local", schedule="fedavg")
    records = rows(tmp_path / "run")
    assert all(record["failures"] == [] for record in records)
    assert records[-1]["uplink_bytes"] > 0.95 * records[2]["uplink_bytes"]
    table = read_panels(tmp_path / "run")["crossbar"].figures[0]
    weights, _, broadcast = read_model(tmp_path / "run")
    for name, zeros, *_ in table.rows:  # type: ignore[union-attr]
        assert zeros == pytest.approx(float((weights[str(name)] == 0).double().mean()))
        assert 0.3 < float(zeros) < 0.9
    assert b"mask/" not in broadcast


class KillAfter(Observer):
    def __init__(self, round_: int) -> None:
        self._round = round_

    def on_round_end(self, record: RoundRecord) -> None:
        if record.round == self._round:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("killed", "masks"), [(1, "common"), (2, "common"), (3, "common"), (3, "local")])
def test_a_resumed_run_is_bit_exact(tmp_path: Path, killed: int, masks: str) -> None:
    """Before the server prunes, right after it, and while the clients fine-tune."""
    options = {"plugin_options": f"{TINY['plugin_options']} crossbar.masks={masks}"}
    whole = federate(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "run", observer=KillAfter(killed), **options)
    resumed = federate(tmp_path / "run", resume=str(tmp_path / "run"), **options)
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert read_model(tmp_path / "run")[2] == read_model(tmp_path / "whole")[2]


@pytest.mark.parametrize("masks", ["common", "local"])
def test_a_client_that_loses_its_state_goes_on(tmp_path: Path, masks: str) -> None:
    options = f"{TINY['plugin_options']} crossbar.masks={masks}"
    federate(tmp_path / "run", forgetful_app("1", 4), plugin_options=options, downlink="proxy")
    assert [row["failures"] for row in rows(tmp_path / "run")[1:]] == [[]] * 4
