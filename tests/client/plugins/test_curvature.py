"""Loss curvature: the mathematics against autograd, suspects, the federation, and the contact sheet."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.clientapp import ClientApp
from PIL import Image
from torch import Tensor, nn

from client import app as honest
from client.plugins.contact_sheet import contact_sheet, most_memorized
from client.plugins.curvature import (
    BINS,
    FOLDER,
    LossCurvature,
    histogram,
    histogram_quantile,
    input_gradient,
    sample_scores,
)
from server.app import serve_in_process
from tests import processes
from tests.client.plugins.apps import forgetful_app
from tofu.data import FederatedData, LabeledImages, to_float
from tofu.errors import DataError, RunError, SettingError
from tofu.models import build_model
from tofu.observers.base import Observer
from tofu.plugins import Batch, Export, Plugins, RoundContext, make_plugins
from tofu.rounds.record import RoundRecord
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import fingerprint, load_weights, weights_of

CONFIG = LocalTrainingConfig(epochs=2, batch_size=32, lr=0.02, momentum=0.9)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_client(options: str = "") -> tuple[Plugins, LossCurvature]:
    plugins = make_plugins("curvature", options)
    plugin = plugins[0]
    assert isinstance(plugin, LossCurvature)
    return plugins, plugin


def mislabeled(data: LabeledImages, fraction: float) -> tuple[LabeledImages, Tensor]:
    """A copy in which the labels of a random fraction are others, and which ones: bool [n]."""
    flipped = torch.zeros(len(data), dtype=torch.bool)
    flipped[torch.randperm(len(data), generator=generator(1))[: round(fraction * len(data))]] = True
    shift = torch.randint(1, data.classes, (len(data),), generator=generator(2))
    return LabeledImages(data.images, torch.where(flipped, (data.labels + shift) % 10, data.labels), 10), flipped


def rounds(
    data: LabeledImages, options: str, count: int, state: dict[str, Any] | None = None
) -> tuple[nn.Module, LossCurvature]:
    """Rounds of one client, whose weights and private state go from round to round."""
    model = build_model("mlp", data.shape, seed=0)
    for round_ in range(1, count + 1):
        plugins, plugin = one_client(options)
        plugin.state = state or {}
        plugins.setup(model, RoundContext(data.shape, round=round_, rounds=count, client="0"))
        train_locally(model, data, CONFIG, generator=generator(round_), plugins=plugins)
        state = plugin.state
    return model, plugin


def auroc(scores: Tensor, positive: Tensor) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive.numpy(), scores.numpy()))


# Mathematics


class Quadratic(nn.Module):
    """Two logits (q(x), 0) with q = x^T A x / 2 over the pixels of an image."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = a

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).double()
        return torch.stack([(x @ self.a * x).sum(1) / 2, torch.zeros(len(x))], dim=1)


def test_curvature_is_the_trace_of_the_squared_hessian() -> None:
    """Against torch's Hessian of the same loss; the probes' mean has a standard error of a few percent."""
    a = torch.randn(9, 9, generator=generator(), dtype=torch.float64)
    model = Quadratic(a + a.T)
    images = torch.randint(0, 256, (3, 1, 3, 3), generator=generator(), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0])
    found = sample_scores(model, images, labels, probes=3000, step=1e-2, generator=generator(5))
    norms = sample_scores(model, images, labels, probes=3000, step=1e-2, squared=False, generator=generator(5))
    for i in range(3):
        x = to_float(images[i : i + 1])

        def loss(x: Tensor, i: int = i) -> Tensor:
            return F.cross_entropy(model(x), labels[i : i + 1])

        hessian = torch.autograd.functional.hessian(loss, x).reshape(9, 9)  # type: ignore[no-untyped-call]
        expected = float((hessian @ hessian).trace())
        assert float(found["curvature"][i]) == pytest.approx(expected, rel=0.1, abs=1e-6)
        assert float(norms["curvature"][i]) <= float(found["curvature"][i]) ** 0.5
        (gradient,) = torch.autograd.grad(loss(x.requires_grad_()), x)
        assert float(found["gradient"][i]) == pytest.approx(float(gradient.norm()), rel=1e-5, abs=1e-9)
        assert float(found["loss"][i]) == pytest.approx(float(loss(x).detach()), rel=1e-6)


def test_scores_do_not_depend_on_the_other_images_of_a_batch(digits: LabeledImages) -> None:
    """A batch norm in eval mode and summed losses: an image alone has the gradient that it has among others."""
    model = build_model("resnet18", digits.shape, norm="batch", seed=0).eval()
    x, y = to_float(digits.images[:7]), digits.labels[:7]
    losses, gradients = input_gradient(model, x, y)
    for i in range(7):
        loss, gradient = input_gradient(model, x[i : i + 1], y[i : i + 1])
        assert torch.allclose(gradient[0], gradients[i], atol=1e-6)
        assert float(loss) == pytest.approx(float(losses[i]), rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_averaging_over_training_finds_wrong_labels(digits: LabeledImages) -> None:
    data, flipped = mislabeled(digits, 0.05)
    _, plugin = rounds(data, "", 10)
    for name in ("curvature", "loss", "gradient"):
        assert auroc(plugin.mean_scores(name), flipped) > 0.95, name
    assert plugin.state["count"] == 30  # 10 rounds of 2 epochs, and once at each round's start


def test_histograms_add_up_and_give_quantiles() -> None:
    scores = torch.exp(4 * torch.randn(4000, generator=generator(), dtype=torch.float64))
    parts = histogram(scores[:1000]) + histogram(scores[1000:])
    assert torch.equal(parts, histogram(scores))
    for quantile in (0.1, 0.5, 0.9):
        exact = float(scores.quantile(quantile))
        assert exact / 1.15 < histogram_quantile(parts, quantile) < exact * 1.15
    extremes = histogram(torch.tensor([0.0, 1e30]))
    assert extremes[0] == extremes[BINS - 1] == 1


# Suspects


@pytest.mark.parametrize("over", ["client", "all"])
def test_suspects_are_dropped_or_weighted_after_the_warm_up(digits: LabeledImages, over: str) -> None:
    data, flipped = mislabeled(digits, 0.05)
    _, trained = rounds(data, "", 10)
    for action in ("none", "down-weight", "drop"):
        acts = "" if action == "none" else "curvature.warm-up=2 curvature.weight=0.25"
        for round_ in (2, 3):
            plugins, plugin = one_client(
                f"curvature.action={action} curvature.quantile=0.95 curvature.over={over} {acts}"
            )
            model = plugins.setup(build_model("mlp", data.shape, seed=0), RoundContext(data.shape, round_, rounds=4))
            plugin.state = dict(trained.state)
            plugin.broadcast = {"histogram": trained.export().sums["histogram"]}
            plugin.on_train_begin(model, data)
            flagged = int(plugin.export().sums["flagged"])
            assert 0.03 * len(data) < flagged < 0.07 * len(data)
            ids = torch.arange(len(data))
            given = Batch(to_float(data.images), data.labels, ids)
            batch = plugins.on_batch(given, generator())
            if action == "none" or round_ == 2:
                assert batch is given
            elif action == "drop":
                dropped = torch.ones(len(data), dtype=torch.bool)
                dropped[batch.ids] = False
                assert int(dropped.sum()) == flagged
                assert float(flipped[dropped].float().mean()) > 0.6
                assert torch.equal(batch.targets, data.labels[~dropped])
                assert torch.equal(batch.images, given.images[~dropped])
            else:
                assert batch.weights is not None
                assert sorted(batch.weights.unique().tolist()) == [0.25, 1.0]
                assert int((batch.weights < 1).sum()) == flagged


def test_a_batch_keeps_weights_and_images_that_other_plugins_added(digits: LabeledImages) -> None:
    plugins, plugin = one_client("curvature.action=drop curvature.warm-up=0")
    plugins.setup(build_model("mlp", digits.shape), RoundContext(digits.shape))
    plugin._suspects = torch.zeros(len(digits), dtype=torch.bool)
    plugin._suspects[[0, 1, len(digits) - 1]] = True
    x, y = to_float(digits.images[:4]), digits.labels[:4]
    batch = plugins.on_batch(Batch(x, y, torch.tensor([0, 2, -1, 3]), torch.tensor([1.0, 2.0, 3.0, 4.0])), generator())
    assert batch.ids.tolist() == [2, -1, 3]
    assert batch.weights is not None
    assert batch.weights.tolist() == [2.0, 3.0, 4.0]
    assert len(plugins.on_batch(Batch(x[:2], y[:2], torch.tensor([0, 3])), generator())) == 0  # one is too few
    plugin.action = "down-weight"
    batch = plugins.on_batch(Batch(x, y, torch.tensor([0, 2, -1, 3]), torch.tensor([1.0, 2.0, 3.0, 4.0])), generator())
    assert batch.weights is not None
    assert batch.weights.tolist() == pytest.approx([0.1, 2.0, 3.0, 4.0])


def test_other_data_starts_the_scores_anew(digits: LabeledImages) -> None:
    _, plugin = rounds(digits, "curvature.every=2", 2)
    assert plugin.state["count"] == 4
    labels = digits.labels.clone()
    labels[0] = (labels[0] + 1) % 10
    _, other = rounds(LabeledImages(digits.images, labels, 10), "curvature.every=2", 1, plugin.state)
    assert other.state["count"] == 2
    _, same = rounds(digits, "curvature.every=2", 1, plugin.state)
    assert same.state["count"] == 6


@pytest.mark.parametrize(("where", "scorings"), [("global", 1), ("local", 2), ("both", 3)])
def test_scoring_does_not_change_training(digits: LabeledImages, where: str, scorings: int) -> None:
    data = digits.subset(range(64))
    plain = build_model("resnet18", data.shape, norm="batch", seed=0)
    scored = build_model("resnet18", data.shape, norm="batch", seed=0)
    load_weights(scored, weights_of(plain))
    train_locally(plain, data, CONFIG, generator=generator())
    plugins, plugin = one_client(f"curvature.where={where} curvature.images=50")
    plugins.setup(scored, RoundContext(data.shape))
    train_locally(scored, data, CONFIG, generator=generator(), plugins=plugins)
    assert fingerprint(weights_of(scored)) == fingerprint(weights_of(plain))
    assert all(module.training for module in scored.modules())
    assert plugin.state["count"] == scorings
    assert plugins.export(scored).sums["curvature/histogram"].sum() == 50


def test_scores_are_never_exported(digits: LabeledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins, plugin = one_client()
    model = plugins.setup(build_model("mlp", digits.shape), RoundContext(digits.shape))
    plugin.on_train_begin(model, digits)
    sums = plugins.export(model).sums
    assert {name: tuple(value.shape) for name, value in sums.items()} == {
        "curvature/histogram": (BINS,),
        "curvature/flagged": (1,),
    }
    monkeypatch.setattr(LossCurvature, "export", lambda self: Export({"curvature": self.mean_scores()}))
    with pytest.raises(RunError, match="for its client alone"):
        plugins.export(model)


# Federations

TINY: dict[str, Any] = {
    "model": "mlp", "clients": 3, "rounds": 4, "max_evals": 5, "ratio": 50.0, "local_epochs": 1, "batch_size": 32,
    "lr": 0.05, "ema_decay": 0.0, "partition": "iid", "plugins": "curvature",
    "plugin_options": "curvature.action=drop curvature.warm-up=1 curvature.probes=2 curvature.over=all",
}  # fmt: skip


def federate(
    folder: Path, app: ClientApp = honest.app, observer: Observer | None = None, **more: Any
) -> dict[str, Any]:
    return serve_in_process(app, Settings.of(TINY | more | {"run_folder": str(folder)}), observer)


@pytest.mark.parametrize("schedule", ["compressed", "fedavg", "secure"])
def test_it_works_in_every_kind_of_round_and_draws_a_panel(tmp_path: Path, schedule: str) -> None:
    federate(tmp_path / "run", schedule=schedule)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["failures"] for row in rows[1:]] == [[]] * 4
    panel = json.loads((tmp_path / "run" / "panels.json").read_text())["curvature"]
    images, suspects = panel["figures"][0]["series"][0], panel["figures"][1]["series"][0]
    assert sum(images["values"]) == pytest.approx(1438)
    assert len(suspects["values"]) == 4
    assert suspects["values"][0] == 0  # there was no histogram yet
    assert 0 < suspects["values"][3] < 0.3


def test_a_client_that_loses_its_state_goes_on(tmp_path: Path) -> None:
    federate(tmp_path / "run", forgetful_app("1", 3))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["failures"] for row in rows[1:]] == [[]] * 4


class StopAfterTwo(Observer):
    def on_round_end(self, record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    whole = federate(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "run", observer=StopAfterTwo())
    resumed = federate(tmp_path / "run", resume=str(tmp_path / "run"))
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    panels = [(tmp_path / name / "panels.json").read_text() for name in ("whole", "run")]
    assert panels[0] == panels[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("curvature.quantile=1", ("curvature.quantile", "1", "below 1")),
        ("curvature.action=delete", ("curvature.action", "delete", "down-weight")),
        ("curvature.step=0", ("curvature.step", "0", "at least")),
        ("curvature.probe=3", ("curvature.probe", "3", "probes")),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: str, words: tuple[str, ...]) -> None:
    with pytest.raises(SettingError) as caught:
        Settings.of(TINY | {"plugin_options": options})
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_an_action_that_never_takes_effect_is_refused(digits: LabeledImages) -> None:
    plugins, _ = one_client("curvature.action=drop curvature.warm-up=4")
    with pytest.raises(SettingError, match="warm-up"):
        plugins.setup(build_model("mlp", digits.shape), RoundContext(digits.shape, rounds=4))


# The contact sheet


def test_the_contact_sheet_of_a_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: LabeledImages) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "scores"))
    federate(tmp_path / "run", rounds=2)
    files = sorted(path.name for path in (tmp_path / "scores").iterdir())
    assert files == [f"curvature-{client}.scores" for client in range(3)]
    command = [sys.executable, "-m", "client.plugins.contact_sheet", tmp_path / "scores" / files[1], tmp_path / "run"]
    processes.run([*command, "--output", tmp_path / "sheet.png", "--count", "12"], check=True, warm=True)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 64, 2 * 76)
    own = FederatedData.of(Settings.of(TINY).data, 0).client(1)
    found = most_memorized(tmp_path / "scores" / files[1], own, 5)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    picture = contact_sheet(own, found, columns=5, pixels=8)
    first = torch.tensor(list(picture.crop((0, 0, 8, 8)).convert("L").getdata())).view(8, 8)
    assert torch.equal(first, own.images[int(found.rows[0]), 0].long())
    with pytest.raises(DataError, match="other images"):
        most_memorized(tmp_path / "scores" / files[1], digits, 5)
    (tmp_path / "bad.scores").write_bytes(b"none")
    with pytest.raises(DataError, match=r"bad\.scores"):
        most_memorized(tmp_path / "bad.scores", own, 5)
