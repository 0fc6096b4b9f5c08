"""The plugin dct-snn: thresholds of all clients together, conversion in a federation, kept frequencies at inference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp
from PIL import Image

from client import app as honest
from client.plugins.dct_snn import DctSnn
from client.plugins.spiking_energy import microjoules, operations
from server.app import serve_in_process
from tests.client.plugins.apps import forgetful_app
from tofu.data import FederatedData, LabeledImages, to_float
from tofu.errors import SettingError
from tofu.models import build_model
from tofu.models.spiking import DctEncoder, SpikingNetwork, balance_thresholds
from tofu.observers.base import Observer
from tofu.plugins import Batch, RoundContext, make_plugins
from tofu.reporting.folder import read_model
from tofu.reporting.panels import read_panels
from tofu.reporting.predict import predict_images
from tofu.rounds.record import RoundRecord
from tofu.settings import Settings

TINY: dict[str, Any] = {
    "model": "dct-snn-small", "clients": 3, "rounds": 4, "max_evals": 5, "ratio": 20.0, "secure_ratio": 2.0,
    "local_epochs": 2, "batch_size": 16, "lr": 0.3, "ema_decay": 0.0, "partition": "iid", "train_images": 300,
    "test_images": 100, "plugins": "dct-snn", "plugin_options": "dct-snn.cycles=1 dct-snn.images=30",
}  # fmt: skip


def federate(folder: Path, app: ClientApp = honest.app, observer: Observer | None = None, **more: object) -> Any:
    return serve_in_process(app, Settings.of(TINY | more | {"run_folder": str(folder)}), observer)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def broadcast_of(folder: Path) -> dict[str, Any]:
    plugins = make_plugins("dct-snn", TINY["plugin_options"])
    plugins.load(broadcast=read_model(folder)[2], max_bytes=10**6)
    return plugins[0].broadcast


def measured(data: LabeledImages, options: str, round_: int, rounds: int = 4) -> tuple[DctSnn, SpikingNetwork]:
    """A client's plugin after it has measured."""
    plugins = make_plugins("dct-snn", options)
    plugin, context = plugins[0], RoundContext(data.shape, round=round_, rounds=rounds)
    assert isinstance(plugin, DctSnn)
    model = plugins.setup(build_model("dct-snn-small", data.shape), context)
    assert isinstance(model, SpikingNetwork)
    plugin.on_train_begin(model, data)
    return plugin, model


def test_input_thresholds_are_percentiles_of_all_clients_components(digits: LabeledImages) -> None:
    parts = [digits.subset(digits.labels < 3), digits.subset(digits.labels >= 3)]
    parts = [part.subset(torch.arange(100)) for part in parts]
    plugins = [measured(part, "dct-snn.images=100 dct-snn.percentile=5", 1)[0] for part in parts]
    assert [sorted(plugin.export().sums) for plugin in plugins] == [["input"]] * 2
    total = {"input": torch.stack([plugin.export().sums["input"] for plugin in plugins]).sum(0)}
    found = plugins[0].reduce(total, 200, {})["input"]
    components = DctEncoder(4).components(to_float(torch.cat([part.images for part in parts]))).flatten()
    exact = components[components.abs() > 1e-4].quantile(torch.tensor([0.05, 0.95]))
    assert torch.allclose(found, exact, rtol=0.02)  # type: ignore[arg-type]
    alone = plugins[0].reduce(plugins[0].export().sums, 100, {})["input"]
    assert not torch.equal(alone, found)  # type: ignore[arg-type]


def test_neurons_thresholds_are_those_of_balancing(digits: LabeledImages) -> None:
    data = digits.subset(torch.arange(40))
    plugin, model = measured(data, "dct-snn.images=40 dct-snn.cycles=1 dct-snn.balance=99", 2)
    assert sorted(plugin.export().sums) == ["lif1", "lif2", "outputs"]
    assert not model.spiking  # the client still trains without spikes
    assert float(model.lif1.threshold) == 1  # type: ignore[arg-type]
    found = plugin.reduce(plugin.export().sums, 40, {"input": torch.tensor([-0.1, 0.1])})
    balance = balance_thresholds(model, to_float(data.images), quantile=0.99)
    expected = [sketch.quantile(0.99) for sketch in balance.sketches.values()]
    assert found["scale"] == pytest.approx(balance.scale, rel=1e-5)
    assert balance.scale > 1.5
    assert found["neurons"].tolist() == pytest.approx(expected, rel=1e-5)  # type: ignore[union-attr]
    assert found["input"].tolist() == pytest.approx([-0.1, 0.1])  # type: ignore[union-attr]


def test_setup_applies_what_was_agreed(digits: LabeledImages) -> None:
    plugins = make_plugins("dct-snn", "dct-snn.cycles=2 dct-snn.frequencies=6")
    plugins[0].broadcast = {"input": torch.tensor([-0.2, 0.3]), "neurons": torch.tensor([1.5, 0.7]), "scale": 2.5}
    model = plugins.setup(build_model("dct-snn-small", digits.shape), RoundContext(digits.shape, round=1, rounds=4))
    assert isinstance(model, SpikingNetwork)
    assert model.spiking
    assert model.steps == 32
    assert model.encoder.frequencies == 6
    assert model.encoder.thresholds.tolist() == pytest.approx([-0.2, 0.3])  # type: ignore[operator,union-attr]
    assert float(model.lif2.threshold) == pytest.approx(0.7)  # type: ignore[arg-type]
    assert float(model.mean.scale) == 2.5  # type: ignore[arg-type]
    assert not plugins.declare_sums(model).keys() - {"dct-snn/input"}


def test_batches_have_random_frequencies_and_what_follows_has_all(digits: LabeledImages) -> None:
    plugins = make_plugins("dct-snn", "dct-snn.random-frequencies=true dct-snn.frequencies=10")
    model = plugins.setup(build_model("dct-snn-small", digits.shape), RoundContext(digits.shape, round=1, rounds=4))
    batch, generator = Batch(to_float(digits.images[:4]), digits.labels[:4], torch.arange(4)), torch.Generator()
    drawn = []
    for _ in range(40):
        assert plugins.on_batch(batch, generator) is batch
        drawn.append(model.encoder.frequencies)  # type: ignore[union-attr]
    assert set(drawn) == {3, 6, 10}
    model.encoder.frequencies = 3  # type: ignore[union-attr,assignment]
    plugins.on_epoch_end(model, digits)
    assert model.encoder.frequencies == 10  # type: ignore[union-attr]


def test_random_frequencies_change_training_and_are_the_same_again(tmp_path: Path) -> None:
    options = TINY["plugin_options"]
    settings: dict[str, Any] = {"rounds": 2, "schedule": "fedavg", "train_images": 100}
    plain = federate(tmp_path / "plain", **settings)
    settings["plugin_options"] = f"{options} dct-snn.random-frequencies=true"
    ends = [federate(tmp_path / name, **settings)["weights_sha256"] for name in ("a", "b")]
    assert ends[0] == ends[1] != plain["weights_sha256"]


def test_images_without_contrast_keep_the_built_in_thresholds() -> None:
    data = LabeledImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), 10)
    plugin, _ = measured(data, "", 1)
    found = plugin.reduce(plugin.export().sums, 4, {})["input"]
    assert found[0] < 0 < found[1]  # type: ignore[index]


@pytest.mark.parametrize("schedule", ["compressed", "secure", "fedavg"])
def test_a_federation_trains_converts_and_fine_tunes(tmp_path: Path, schedule: str) -> None:
    run = tmp_path / "run"
    end = federate(run, schedule=schedule)
    records = rows(run)
    assert all(record["failures"] == [] for record in records)
    broadcast = broadcast_of(run)
    assert broadcast["input"][0] < 0 < broadcast["input"][1]
    assert len(broadcast["neurons"]) == 2
    assert float(broadcast["neurons"].min()) > 0
    assert float(end["final_accuracy"]) > (0.3 if schedule == "compressed" else 0.45)  # by chance: 0.1
    panel = read_panels(run)["dct-snn"]
    assert [series.name for series in panel.figures[0].series] == ["lif1", "lif2"]  # type: ignore[union-attr]
    assert panel.figures[2].rows[-1][0] == 16  # type: ignore[union-attr]
    assert panel.figures[2].rows[-1][3] > 0  # type: ignore[union-attr,operator]
    energies = [float(row[4]) for row in panel.figures[2].rows]  # type: ignore[union-attr]
    assert 0 < energies[0] < energies[-1]


def test_the_report_counts_operations_of_the_encoder_too(digits: LabeledImages) -> None:
    """Input spikes cost additions in the first convolution, spikes of the last neurons in the linear layer."""
    model = build_model("dct-snn-small", digits.shape)
    assert isinstance(model, SpikingNetwork)
    found = operations(model, digits.shape)
    assert [layer.source for layer in found.values()] == ["encoder", "lif1", "lif2"]
    spikes = {"encoder": 100.0, "lif1": 0.0, "lif2": 0.0}
    assert microjoules(found, spikes) == pytest.approx(100 * 16 * 9 * 0.9 / 1e6)  # 16 channels of 3x3


def test_payloads_of_5_bits_carry_a_spiking_update(tmp_path: Path) -> None:
    end = federate(tmp_path / "run", bits=5, correction=0.0, proxies=4, proxy_size=7, rounds=2)
    assert rows(tmp_path / "run")[-1]["failures"] == []
    assert float(end["final_accuracy"]) > 0.1


def test_predict_can_drop_frequencies_without_retraining(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "images"
    federate(run, schedule="fedavg", rounds=2)
    folder.mkdir()
    test = FederatedData.of(Settings.of(TINY).data, Settings.of(TINY).run.seed).test()
    for number in range(20):
        Image.fromarray(test.images[number, 0].numpy()).save(folder / f"{number:02}.png")
    weights, _, broadcast = read_model(run)
    plugins = make_plugins("dct-snn", TINY["plugin_options"])
    plugins.load(broadcast=broadcast, max_bytes=10**6)
    model = plugins.setup(build_model("dct-snn-small", test.shape), RoundContext(test.shape, round=2, rounds=2))
    model.load_state_dict(weights)
    probabilities = {}
    for kept in (16, 3):
        model.encoder.frequencies = kept  # type: ignore[union-attr]
        found = [row["probability"] for row in predict_images(run, folder, frequencies=kept)]
        with torch.no_grad():
            expected = model(to_float(test.images[:20])).softmax(1).max(1).values.tolist()
        assert found == pytest.approx(expected, abs=1e-5)
        probabilities[kept] = found
    assert probabilities[3] != pytest.approx(probabilities[16], abs=1e-4)
    with pytest.raises(SettingError, match=r"frequencies=17 .*1 to 16"):
        predict_images(run, folder, frequencies=17)


class KillAfter(Observer):
    def __init__(self, round_: int) -> None:
        self.round = round_

    def on_round_end(self, record: RoundRecord) -> None:
        if record.round == self.round:
            raise KeyboardInterrupt


@pytest.mark.parametrize("round_", [1, 2])
def test_a_resumed_run_is_bit_exact(tmp_path: Path, round_: int) -> None:
    """It stops after the input's thresholds have been set, or after the neurons' have."""
    settings: dict[str, Any] = {"rounds": 3, "train_images": 100}
    settings["plugin_options"] = "dct-snn.cycles=1 dct-snn.images=8 dct-snn.ann-fraction=0.6"
    whole = federate(tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "run", observer=KillAfter(round_), **settings)
    resumed = federate(tmp_path / "run", resume=str(tmp_path / "run"), **settings)
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert read_model(tmp_path / "run")[2] == read_model(tmp_path / "whole")[2]


def test_a_client_that_loses_its_state_goes_on(tmp_path: Path) -> None:
    federate(tmp_path / "run", forgetful_app("1", 3), rounds=3, train_images=100)
    assert [row["failures"] for row in rows(tmp_path / "run")[1:]] == [[]] * 3


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("dct-snn.cycles=0", "dct-snn.cycles='0' .*at least 1"),
        ("dct-snn.frequencies=17", "dct-snn.frequencies='17' .*at most 16"),
        ("dct-snn.percentile=50", "dct-snn.percentile='50' .*below 50"),
        ("dct-snn.balance=100", "dct-snn.balance='100' .*below 100"),
        ("dct-snn.ann-fraction=1", "dct-snn.ann-fraction='1' .*below 1"),
        ("dct-snn.steps=4", "dct-snn.steps='4' .*a known option"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: str, wanted: str) -> None:
    with pytest.raises(SettingError, match=wanted) as error:
        make_plugins("dct-snn", options)
    assert "\n" not in str(error.value)


def test_other_models_and_a_second_encoder_are_refused(digits: LabeledImages, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"plugins='dct-snn' .*a model with a DCT encoder"):
        make_plugins("dct-snn").setup(build_model("snn-small", digits.shape), RoundContext(digits.shape))
    with pytest.raises(SettingError, match="one plugin at most that encodes the input"):
        make_plugins("dct-snn,trend")
