"""Spatio-temporal pruning: moments, components and energies against numpy or by hand, and federations."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client import app as honest
from client.plugins.spatio_temporal import (
    Quantized,
    SpatioTemporalPruning,
    covariance_of,
    leading_channels,
    second_moments,
    significant_components,
    spikes_per_layer,
)  # fmt: skip
from client.plugins.spiking_energy import PJ_AC, PJ_MAC, dense_microjoules, microjoules, operations
from server.app import serve_in_process
from tests.client.plugins.apps import forgetful_app
from tofu.data import ImageShape, LabeledImages, open_data, to_float
from tofu.errors import PayloadError, SettingError
from tofu.models import build_model
from tofu.models.spiking import neurons_of, record_activity, spiking_vgg
from tofu.observers.base import Observer
from tofu.plugins import Plugins, RoundContext, make_plugins
from tofu.reporting.folder import read_model
from tofu.reporting.panels import read_panels
from tofu.reporting.predict import predict_images
from tofu.reporting.report import write_report
from tofu.rounds.record import RoundRecord
from tofu.settings import Settings

Row = dict[str, Any]
SHAPE = ImageShape(1, 8, 8, 10)
STEPS = 5


def tiny_network(channels: int, height: int, width: int, classes: int) -> nn.Module:
    return spiking_vgg((12, "A", 16, "A"), ImageShape(channels, height, width, classes), steps=1)


@pytest.fixture(scope="module")
def digits() -> LabeledImages:
    return open_data("digits", clients=1, partition="iid", seed=0).client(0)


def set_up(options: str = "", *, round_: int = 1, rounds: int = 8, seed: int = 0) -> tuple[nn.Module, Plugins]:
    plugins = make_plugins("spatio-temporal", f"spatio-temporal.steps={STEPS} {options}")
    torch.manual_seed(seed)
    return plugins.setup(tiny_network(1, 8, 8, 10), RoundContext(SHAPE, round=round_, rounds=rounds)), plugins


# The mathematics


def test_summed_moments_give_numpys_covariance_of_the_average_potential(digits: LabeledImages) -> None:
    """Two clients' sums are the pooled images' potentials: currents over all steps, without leak or reset."""
    model, _ = set_up()
    parts = [second_moments(model.eval(), images, 100.0) for images in (digits.images[:70], digits.images[70:100])]
    with torch.no_grad(), record_activity(model) as activity:
        model(to_float(digits.images[:100]))
    for name, neurons in (("conv1", "lif1"), ("conv2", "lif2")):
        rows = activity[neurons].potential.movedim(1, -1).flatten(0, -2).double().numpy()
        found = covariance_of(parts[0][f"moments/{name}"] + parts[1][f"moments/{name}"]).numpy()
        assert np.allclose(found, np.cov(rows.T, bias=True), atol=1e-6)
        values = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
        for variance in (0.5, 0.9, 0.99, 0.999):
            width = int(np.searchsorted(np.cumsum(values) / values.sum(), variance)) + 1
            assert significant_components(torch.from_numpy(found), variance) == width


def test_components_and_channels_by_hand() -> None:
    covariance = torch.diag(torch.tensor([4.0, 0.0, 90.0, 6.0], dtype=torch.float64))
    assert [significant_components(covariance, v) for v in (0.9, 0.91, 0.96, 0.97, 1.0)] == [1, 2, 2, 3, 3]
    assert leading_channels(covariance, 3).tolist() == [2, 3, 0]
    # Channel 1 is twice channel 0: after it, channel 0 has nothing left.
    copies = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    assert leading_channels(copies, 2).tolist() == [1, 2]
    assert significant_components(torch.zeros(3, 3, dtype=torch.float64), 0.99) == 1


@given(st.integers(1, 7), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_as_many_channels_as_the_rank_span_all(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(50, rank, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(rank, 8, generator=generator, dtype=torch.float64)
    covariance = rows.T @ rows / 50
    chosen = leading_channels(covariance, rank)
    assert len(set(chosen.tolist())) == rank
    left = rows - rows[:, chosen] @ torch.linalg.lstsq(rows[:, chosen], rows).solution
    assert float(left.abs().max()) < 1e-6 * float(rows.abs().max())


@given(st.integers(2, 8), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_quantized_weights_lie_on_the_grid_and_pass_gradients_through(bits: int, seed: int) -> None:
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    coarse = Quantized(bits)(weight)
    step = float(weight.detach().abs().max()) / (2 ** (bits - 1) - 1)
    levels = (coarse / step).detach()
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert len(levels.round().unique()) <= 2**bits - 1
    assert float((coarse - weight).detach().abs().max()) <= step / 2 * (1 + 1e-5)
    coarse.square().sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, 2 * coarse.detach())
    assert not Quantized(bits)(torch.zeros(3)).any()


def test_energy_by_hand() -> None:
    """conv1 multiplies 64 positions x 12 x 9 once; conv2 and fc add at spikes."""
    model, _ = set_up()
    found = operations(model, SHAPE)
    assert {name: layer.macs for name, layer in found.items()} == {
        "conv1": 64 * 12 * 9, "conv2": 16 * 16 * 12 * 9, "fc": 4 * 16 * 10
    }  # fmt: skip
    # A spike of lif1 is one of 4 x 4 x 12 inputs after pooling, and meets 16 * 9 weights of conv2.
    assert found["conv2"].fan_out == 16 * 9
    assert found["fc"].fan_out == 10
    energy = 64 * 12 * 9 * PJ_MAC + (7 * 16 * 9 + 3 * 10) * PJ_AC
    assert microjoules(found, {"lif1": 7.0, "lif2": 3.0}) == pytest.approx(energy / 1e6)
    dense = (64 * 12 * 9 + 16 * 16 * 12 * 9 + 4 * 16 * 10) * PJ_MAC
    assert dense_microjoules(found) == pytest.approx(dense / 1e6)


def test_spikes_are_counted_over_all_batches(digits: LabeledImages) -> None:
    model, _ = set_up()
    counts = spikes_per_layer(model.eval(), digits.images[:120])
    with torch.no_grad(), record_activity(model) as activity:
        model(to_float(digits.images[:120]))
    assert counts == {
        "lif1": (float(activity["lif1"].spikes.sum()), 12 * 64 * STEPS),
        "lif2": (float(activity["lif2"].spikes.sum()), 16 * 16 * STEPS),
    }


# The schedule


def test_steps_fall_one_at_a_time_if_there_are_enough_rounds() -> None:
    plugin = SpatioTemporalPruning(steps=12)
    steps = [plugin.steps_in(round_, 48) for round_ in range(1, 49)]
    assert steps[:24] == [12] * 24
    assert steps[41:] == [1] * 7
    assert {a - b for a, b in itertools.pairwise(steps)} == {0, 1}
    assert [SpatioTemporalPruning(steps=9, last_steps=3).steps_in(r, 4) for r in (1, 2, 3, 4)] == [9, 9, 3, 3]


def test_the_network_has_the_rounds_steps_and_bits() -> None:
    options = "spatio-temporal.bits=5 spatio-temporal.spatial=false"
    for round_, steps, coarse in ((1, 5, False), (4, 5, False), (5, 4, False), (7, 1, True), (8, 1, True)):
        model, plugins = set_up(options, round_=round_)
        assert model.steps == steps
        levels = len(model.get_submodule("conv2").weight.detach().unique())  # type: ignore[arg-type]
        assert (levels <= 31) is coarse
        assert plugins[0].quantizes(round_, 8) is coarse  # type: ignore[attr-defined]


def test_thresholds_fall_with_the_steps() -> None:
    plugin = SpatioTemporalPruning(steps=5, one_step_threshold=0.6)
    assert [round(plugin.threshold_factor(steps), 3) for steps in (5, 4, 3, 2, 1)] == [1.0, 0.9, 0.8, 0.7, 0.6]
    assert SpatioTemporalPruning(steps=1, one_step_threshold=0.6).threshold_factor(1) == 1.0
    options = "spatio-temporal.one-step-threshold=0.6 spatio-temporal.spatial=false"
    for round_, factor in ((1, 1.0), (5, 0.9), (8, 0.6)):
        model, _ = set_up(options, round_=round_)
        assert {round(layer.threshold_factor, 3) for layer in neurons_of(model).values()} == {factor}


# One client and the server


def measured(digits: LabeledImages, options: str = "") -> tuple[Plugins, nn.Module]:
    model, client = set_up(f"spatio-temporal.variance=0.9 {options}", round_=2)
    client.on_train_begin(model, digits)
    client.reduce(client.export(model).sums, len(digits))
    client.on_aggregate(model, RoundContext(SHAPE, round=2, rounds=8))
    return client, model


def test_the_server_and_a_client_build_the_same_narrow_network(digits: LabeledImages) -> None:
    server, model = measured(digits)
    plugin = server[0]
    assert isinstance(plugin, SpatioTemporalPruning)
    assert all(1 <= kept < built for kept, built in plugin.widths.values())
    wide = model.get_parameter("conv1.weight").detach().clone()
    later = RoundContext(SHAPE, round=3, rounds=8)
    narrow = server.setup(model, later)
    kept = plugin.broadcast["kept/conv1"]
    assert isinstance(kept, Tensor)
    assert torch.equal(narrow.get_parameter("conv1.weight"), wide[kept])
    client = make_plugins("spatio-temporal", f"spatio-temporal.steps={STEPS} spatio-temporal.variance=0.9")
    client.load(broadcast=server.broadcast_bytes(max_bytes=1 << 20), max_bytes=1 << 20)
    local = client.setup(tiny_network(1, 8, 8, 10), later)
    shapes = {name: p.shape for name, p in narrow.named_parameters()}
    assert shapes == {name: p.shape for name, p in local.named_parameters()}
    assert not any(name.startswith("moments") for name in client.declare_sums(local))
    assert server.setup(narrow, later) is narrow


def test_a_non_spiking_network_is_narrowed_too(digits: LabeledImages) -> None:
    plugins = make_plugins("spatio-temporal", "spatio-temporal.variance=0.9")
    context = RoundContext(SHAPE, round=2, rounds=8)
    model = plugins.setup(build_model("cnn", SHAPE, norm="none", seed=0), context)
    plugins.on_train_begin(model, digits)
    plugins.reduce(plugins.export(model).sums, len(digits))
    narrow = plugins.setup(model, RoundContext(SHAPE, round=3, rounds=8))
    widths = plugins[0].widths  # type: ignore[attr-defined]
    assert list(widths) == ["conv1", "conv2", "conv3", "fc1"]
    assert [len(narrow.get_parameter(f"{name}.weight")) for name in widths] == [kept for kept, _ in widths.values()]
    assert narrow(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_sums_stay_within_their_bounds(digits: LabeledImages) -> None:
    model, client = set_up("spatio-temporal.max-potential=0.5 spatio-temporal.images=30", round_=2)
    with torch.no_grad():
        model.get_parameter("conv1.weight").mul_(50)
    client.on_train_begin(model, digits)
    exported = client.export(model)  # checks the bounds
    moments = exported.sums["spatio-temporal/moments/conv1"]
    assert float(moments[-1]) == 30 * 64  # rows
    assert float(moments[0]) <= 30 * 64 * 0.25
    assert float(exported.sums["spatio-temporal/spikes"][-1]) == 30


def test_a_broadcast_that_does_not_fit_is_refused() -> None:
    for kept in (torch.ones(3, dtype=torch.int64), torch.zeros(12, dtype=torch.bool), torch.ones(13, dtype=torch.bool)):
        _, plugins = set_up()
        plugins[0].broadcast = {"kept/conv1": kept}
        with pytest.raises(PayloadError):
            plugins.setup(tiny_network(1, 8, 8, 10), RoundContext(SHAPE, rounds=8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("bits=1", "bits=1 is not usable: expected 0, or 2 to 16"),
        ("last-steps=6", "last-steps=6 is not usable: expected at most steps, 5"),
        ("variance=0", "variance='0'"),
        ("prune-after=8", "prune-after=8 is not usable: expected less than the run's rounds, 8"),
        ("reduce-after=6 spatio-temporal.reduce-until=5", "reduce-until=5 is not usable: expected at least reduce"),
        ("reduce-until=9", "reduce-until=9 is not usable: expected at most the run's rounds, 8"),
        ("bits=5 spatio-temporal.quantize-after=1", "quantize-after=1 is not usable: expected at least prune-after, 2"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_in_one_line(options: str, words: str) -> None:
    with pytest.raises(SettingError) as caught:
        set_up(f"spatio-temporal.{options}")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Federations

FEDERATION: Row = {
    "model": f"{__name__}:tiny_network", "clients": 3, "rounds": 8, "max_evals": 5, "ratio": 20.0, "local_epochs": 1,
    "batch_size": 32, "lr": 0.1, "momentum": 0.9, "ema_decay": 0.0, "partition": "iid", "train_images": 600,
    "plugins": "spatio-temporal",
    "plugin_options": "spatio-temporal.steps=4 spatio-temporal.variance=0.99 spatio-temporal.bits=5",
}  # fmt: skip


def federate(folder: Path, app: ClientApp = honest.app, observer: Observer | None = None, **more: object) -> Row:
    return serve_in_process(app, Settings.of(FEDERATION | more | {"run_folder": str(folder)}), observer)


@pytest.mark.parametrize("schedule", ["compressed", "fedavg", "secure"])
def test_a_federation_ends_narrow_fast_and_coarse(tmp_path: Path, schedule: str) -> None:
    """Also a client that loses its state in the round after the change; the saved model predicts with its widths."""
    app = honest.app if schedule == "secure" else forgetful_app("1", 3)
    end = federate(
        tmp_path / "run", app, schedule=schedule, downlink="topk" if schedule == "compressed" else "full-weights"
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["failures"] == [] for line in lines)
    assert end["final_accuracy"] > 0.2
    weights, shape, _ = read_model(tmp_path / "run")
    first, second = (weights[f"conv{i}.parametrizations.weight.original"] for i in (1, 2))
    assert first.shape[0] == second.shape[1] < 12
    assert second.shape[0] < 16
    panel = read_panels(tmp_path / "run")["spatio-temporal"]
    steps = panel.figures[0].series[0].values  # type: ignore[union-attr]
    assert steps == (4, 4, 4, 4, 3, 2, 1, 1)
    parameters = panel.figures[1].series[0].values  # type: ignore[union-attr]
    assert (
        parameters[1]
        > parameters[2]
        == parameters[7]
        == sum(w.numel() for name, w in weights.items() if name.endswith("original"))
    )
    assert "Spatio-temporal pruning" in write_report(tmp_path / "run").read_text()
    import numpy
    from PIL import Image

    Image.fromarray(numpy.zeros((8, 8), dtype=numpy.uint8)).save(tmp_path / "black.png")
    [row] = predict_images(tmp_path / "run", tmp_path / "black.png")
    assert 0 < float(str(row["probability"])) <= 1
    assert shape.classes == 10


def test_secure_rounds_choose_the_channels_of_open_ones(tmp_path: Path) -> None:
    """In round 1, where both have the same weights: the server needs only the sums."""
    options = f"{FEDERATION['plugin_options']} spatio-temporal.prune-after=1"
    shapes = []
    for schedule in ("fedavg", "secure"):
        federate(tmp_path / schedule, schedule=schedule, rounds=2, secure_ratio=1.2, plugin_options=options)
        shapes.append([value.shape for value in read_model(tmp_path / schedule)[0].values()])
    assert shapes[0] == shapes[1]


class KillAfter(Observer):
    """Ends the run after a round."""

    def __init__(self, round_: int) -> None:
        self._round = round_

    def on_round_end(self, record: RoundRecord) -> None:
        if record.round == self._round:
            raise KeyboardInterrupt


@pytest.mark.parametrize("round_", [2, 6])
def test_a_run_resumes_to_the_same_weights(tmp_path: Path, round_: int) -> None:
    """Killed just after the channels went, and with reduced steps just before weights are quantized."""
    whole = federate(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "run", observer=KillAfter(round_))
    run = federate(tmp_path / "run", resume=str(tmp_path / "run"))
    assert run["weights_sha256"] == whole["weights_sha256"]


def test_the_servers_model_has_the_steps_of_the_next_round(tmp_path: Path) -> None:
    """Where only the steps change, the model that decodes and is evaluated must still follow."""
    seen: list[int] = []

    class Watch(SpatioTemporalPruning):
        def on_aggregate(self, model: nn.Module, context: RoundContext) -> None:
            seen.append(model.steps)
            super().on_aggregate(model, context)

    globals()["Watch"] = Watch
    Watch.name = "spatio-temporal"
    federate(tmp_path / "run", schedule="fedavg", plugins=f"{__name__}:Watch",
             plugin_options="spatio-temporal.steps=4 spatio-temporal.spatial=false")  # fmt: skip
    expected = [SpatioTemporalPruning(steps=4).steps_in(round_, 8) for round_ in range(1, 9)]
    assert seen == expected
    assert math.prod(expected) > 1
