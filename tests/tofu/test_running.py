"""`tofu.run` with Python objects: datasets, models, losses, optimizers, metrics and training functions of the user."""

import asyncio
import base64
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import tofu
from tofu.data import ImageShape, LabeledImages, open_data, to_float
from tofu.errors import RunError, SettingError
from tofu.models import build_model
from tofu.observers.base import Observer
from tofu.plugins import Export, Plugin, option
from tofu.rounds.record import RoundRecord, RunSummary
from tofu.running import RunResult
from tofu.training import TrainingContext

Row = dict[str, Any]
QUICK: Row = {
    "rounds": 2, "local_epochs": 1, "batch_size": 32, "lr": 0.05, "ratio": 20.0, "max_evals": 3, "ema_decay": 0.0,
    "progress": False,
}  # fmt: skip
DATA: Row = {"dataset": "digits", "partition": "iid", "train_images": 300, "test_images": 100, "clients": 3}


def tensors(data: LabeledImages) -> TensorDataset:
    return TensorDataset(to_float(data.images), data.labels)


@pytest.fixture(scope="module")
def parts() -> tuple[list[TensorDataset], TensorDataset]:
    """The clients' and the test images of the run that `DATA` names."""
    data = open_data("digits", clients=3, partition="iid", train_images=300, test_images=100, seed=0)
    return [tensors(data.client(number)) for number in range(3)], tensors(data.test())


def mlp() -> nn.Module:
    """A small perceptron on digits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def named_mlp() -> nn.Module:
    """What model=mlp builds for digits."""
    return build_model("mlp", open_data("digits", clients=1, partition="iid", seed=0).shape)


class Vectors(Dataset[tuple[Tensor, Tensor]]):
    """Rows of a linear map with noise: a regression from four numbers to one."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(40, 4, generator=generator)
        self.targets = self.inputs @ torch.tensor([1.0, -2.0, 0.5, 0.0])

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.inputs[row], self.targets[row]


def test_datasets_give_the_weights_of_the_named_run(
    tmp_path: Path, parts: tuple[list[TensorDataset], TensorDataset]
) -> None:
    named = tofu.run(**QUICK, **DATA, model="mlp", run_folder=str(tmp_path / "named"))
    clients, test = parts
    own = tofu.run(**QUICK, clients=clients, test=test, model=named_mlp, run_folder=str(tmp_path / "own"))
    mixed = tofu.run(**QUICK, **DATA, model=named_mlp, run_folder=str(tmp_path / "mixed"))
    assert own.summary.weights_sha256 == named.summary.weights_sha256 == mixed.summary.weights_sha256
    assert [row.accuracy for row in own.history] == [row.accuracy for row in named.history]
    assert own.history[-1].loss == pytest.approx(named.history[-1].loss)
    assert own.summary.uplink_bytes == named.summary.uplink_bytes
    assert own.summary.by_class == named.summary.by_class
    assert len(own.ledger) == len(named.ledger) > 0


def small_mlp() -> nn.Module:
    """What model=mlp builds for digits of 6x6 pixels."""
    return build_model("mlp", ImageShape(channels=1, height=6, width=6, classes=10))


@pytest.mark.parametrize("normalization", ["-1to1", "dataset", "0.3/0.4"])
def test_a_model_of_the_users_gets_the_images_that_a_named_one_gets(tmp_path: Path, normalization: str) -> None:
    chosen: Row = QUICK | DATA | {"resize": "7", "center_crop": "6", "normalization": normalization, "rounds": 1}
    named = tofu.run(**chosen, model="mlp", run_folder=str(tmp_path / "named"))
    own = tofu.run(**chosen, model=small_mlp, run_folder=str(tmp_path / "own"))
    assert own.summary.weights_sha256 == named.summary.weights_sha256
    assert own.summary.final_accuracy == named.summary.final_accuracy


@pytest.mark.parametrize(("schedule", "lr"), [("compressed", 30.0), ("secure", 3.0), ("secure", 30.0), ("fedavg", 3.0)])
def test_a_run_that_diverged_does_not_end_successfully(schedule: str, lr: float, tmp_path: Path) -> None:
    chosen = QUICK | DATA | {"lr": lr, "batch_size": 16, "partition": "dirichlet", "rounds": 3, "schedule": schedule}
    with pytest.raises(RunError, match="diverge"):
        tofu.run(**chosen, model="mlp", run_folder=str(tmp_path / "run"))


def test_a_short_run_that_noise_ruined_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dp_accounting")
    chosen = QUICK | DATA | {"model": "mlp", "schedule": "fedavg", "rounds": 1, "progress": True}
    tofu.run(**chosen, noise_multiplier=4.0, run_folder=str(tmp_path / "much"))
    assert re.search(r"the noise \(clip-norm 1, noise-multiplier 4\) is probably too much", capsys.readouterr().err)
    tofu.run(**chosen, noise_multiplier=0.001, run_folder=str(tmp_path / "little"))
    assert "the noise" not in capsys.readouterr().err


def test_the_result_has_the_run_as_objects(tmp_path: Path, parts: tuple[list[TensorDataset], TensorDataset]) -> None:
    clients, test = parts
    result = tofu.run(**QUICK, clients=clients, test=test, model=mlp, run_folder=str(tmp_path / "run"))
    assert result.folder == tmp_path / "run"
    assert [row.round for row in result.history] == [0, 1, 2]
    assert {row["direction"] for row in result.ledger} == {"uplink", "downlink"}
    images, labels = test.tensors
    right = (result.model()(images).argmax(1) == labels).float().mean()
    assert float(right) == pytest.approx(result.accuracy or 0.0)
    assert result.accuracy == result.summary.final_accuracy
    by_class = {int(one.name): (one.right, one.samples) for one in result.summary.by_class}
    predicted = result.model()(images).argmax(1)
    for digit in range(10):
        mine = labels == digit
        assert by_class[digit] == (int((predicted[mine] == digit).sum()), int(mine.sum()))
    assert "accuracy=0." in repr(result.history[-1])
    assert len(repr(result.history[-1])) <= 120
    assert result.weights.keys() == dict(mlp().named_parameters()).keys()
    for against in ("rounds", "bytes"):
        result.plot(against).save(tmp_path / "plot.svg")
        text = (tmp_path / "plot.svg").read_text()
        assert text.startswith("<svg")
        assert "polyline" in text
        style = text[text.index("<style>") : text.index("</style>")]
        used = {f".{name}" for names in re.findall(r'class="([^"]+)"', text) for name in names.split()}
        assert used <= set(re.findall(r"\.[a-z][\w-]*", style)), "what has no rule is black"
    plot = result.plot()
    assert repr(plot) == "Plot(accuracy by round)"
    image = re.fullmatch(r'<img alt="accuracy by round" src="data:image/svg\+xml;base64,(.*)">', plot._repr_html_())
    assert image is not None
    assert base64.b64decode(image[1]).decode() == plot.svg
    assert result.report().read_text().startswith("<!doctype html>")
    with pytest.raises(SettingError, match=r"against='round' .* 'rounds' or 'bytes'"):
        result.plot("round")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="path=3"):
        result.plot().save(3)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"path='.*plot.png' .* ends in .svg"):
        result.plot().save(tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_a_metric_that_fails_is_named(tmp_path: Path, parts: tuple[list[TensorDataset], TensorDataset]) -> None:
    clients, test = parts
    with pytest.raises(SettingError, match=r"metrics\['rmse'\]='<lambda>' .*ValueError"):
        tofu.run(**QUICK, clients=clients, test=test, model=mlp, metrics={"rmse": lambda outputs, targets: float("x")},
                 run_folder=str(tmp_path / "run"))  # fmt: skip


def test_a_run_without_progress_lines_warns_of_missing_replies(
    tmp_path: Path, parts: tuple[list[TensorDataset], TensorDataset]
) -> None:
    clients, test = parts

    def train(model: nn.Module, dataset: object, context: TrainingContext) -> None:
        if context.round == 1 and dataset is clients[1]:
            raise ValueError("no disk")

    with pytest.warns(UserWarning, match=r"replies missing: 1; the first, of client 1: .*no disk") as found:
        tofu.run(**QUICK, clients=clients, test=test, model=mlp, train=train, run_folder=str(tmp_path / "run"))
    assert found[0].filename == __file__


def test_a_result_is_one_line_in_a_notebook() -> None:
    result = RunResult(Path("runs/a"), RunSummary(final_accuracy=0.9167, rounds=3, uplink_bytes=13767), named_mlp)
    assert repr(result) == "RunResult('runs/a': 3 rounds, accuracy 91.7%, uplink 13.8 kB)"
    assert "no test data" in repr(RunResult(Path("a"), RunSummary(), named_mlp))


class Rounds(Observer):
    """Collects records, and interrupts a run after one of them."""

    def __init__(self, interrupt: int = 0) -> None:
        self.records: list[RoundRecord] = []
        self.notes: list[str] = []
        self._interrupt = interrupt

    def on_round_end(self, record: RoundRecord) -> None:
        self.records.append(record)
        if record.round == self._interrupt:
            raise KeyboardInterrupt

    def on_note(self, text: str, **where: Any) -> None:
        self.notes.append(text)


def test_own_loss_optimizer_metrics_and_callbacks_in_a_running_event_loop(
    tmp_path: Path, parts: tuple[list[TensorDataset], TensorDataset]
) -> None:
    clients, test = parts
    seen = Rounds()

    def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)

    def top3(outputs: Tensor, targets: Tensor) -> float:
        return float((outputs.topk(3, 1).indices == targets[:, None]).any(1).float().mean())

    async def notebook() -> tofu.running.RunResult:
        arguments = QUICK | {"lr": 0.003, "run_folder": str(tmp_path / "run")}
        return tofu.run(
            **arguments, clients=clients, test=test, model=mlp, loss=smoothed, optimizer=torch.optim.Adam,
            metrics={"top3": top3}, callbacks=[seen],
        )  # fmt: skip

    result = asyncio.run(notebook())
    last = result.history[-1]
    assert seen.records[-1].metrics == last.metrics
    assert 1 >= (last.metrics["top3"] or 0) > (last.accuracy or 1) > 0.3
    images, labels = test.tensors
    with torch.no_grad():
        outputs = result.model()(images)
    assert last.metrics["top3"] == pytest.approx(top3(outputs, labels))
    assert last.loss == pytest.approx(float(smoothed(outputs, labels)))


def test_an_own_training_function_trains_with_the_round_and_the_client(
    tmp_path: Path, parts: tuple[list[TensorDataset], TensorDataset]
) -> None:
    clients, _ = parts
    calls: list[tuple[str, int, int, float]] = []

    def train(model: nn.Module, data: TensorDataset, context: TrainingContext) -> float:
        calls.append((context.client, context.round, len(data), context.lr))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        return 7.0

    start = nn.Linear(64, 10, bias=False)
    model = nn.Sequential(nn.Flatten(), start)
    arguments = QUICK | {"schedule": "fedavg", "workers": 1, "run_folder": str(tmp_path / "run")}
    result = tofu.run(**arguments, clients=clients, model=model, train=train)
    assert sorted(calls) == [(str(c), r, len(clients[c]), 0.05) for c in range(3) for r in (1, 2)]
    torch.testing.assert_close(result.weights["1.weight"], start.weight.detach() + 2.0)
    assert result.history[1].train_loss == 7.0
    assert (result.accuracy, result.summary.final_accuracy, result.history[-1].loss) == (
        None,
        None,
        None,
    )  # no test data
    assert "training loss" in result.plot().svg
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().replace('"train_loss": 7.0', '"train_loss": null')
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    with pytest.raises(RunError, match="no accuracy and no loss to plot"):
        result.plot()
    assert result.report().exists()


def test_an_interrupted_run_resumes_to_the_same_weights(
    tmp_path: Path, parts: tuple[list[TensorDataset], TensorDataset]
) -> None:
    clients, test = parts
    arguments: Row = QUICK | {"clients": clients, "test": test, "model": mlp, "rounds": 3}
    whole = tofu.run(**arguments, run_folder=str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        tofu.run(**arguments, run_folder=str(tmp_path / "cut"), callbacks=[Rounds(interrupt=2)])
    with pytest.raises(
        SettingError, match=r"^test=None is not usable: expected the test data that the run in .*cut has"
    ):
        tofu.run(resume=tmp_path / "cut", clients=clients, model=mlp, progress=False)
    resumed = tofu.run(
        resume=tmp_path / "cut", clients=clients, test=test, model=mlp, progress=False
    )  # the settings are those of the folder
    assert resumed.summary.weights_sha256 == whole.summary.weights_sha256
    assert [row.accuracy for row in resumed.history] == [row.accuracy for row in whole.history]
    with pytest.raises(SettingError, match=r"has not finished, or rounds above 3$"):
        tofu.run(resume=str(tmp_path / "cut"), clients=clients, test=test, model=mlp, progress=False)


def unescape_tags(page: Path) -> str:
    """The text of a page without its tags."""
    return re.sub(r"<[^>]*>", "", page.read_text())


def test_a_regression_on_vectors_is_sent_as_proxies_and_secure_rounds_sum_it(tmp_path: Path) -> None:
    seen = Rounds()
    arguments: Row = QUICK | {"ratio": 2.0, "rounds": 6, "lr": 0.1, "compressor": "proxy"}
    own: Row = {
        "clients": [Vectors(seed) for seed in range(3)], "test": Vectors(9), "loss": nn.functional.mse_loss,
        "model": lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1), nn.Flatten(0)), "callbacks": [seen],
    }  # fmt: skip
    result = tofu.run(**arguments, **own, run_folder=str(tmp_path / "run"))
    losses = [row.loss or 0.0 for row in result.history]
    assert losses[-1] < losses[0] / 2
    assert result.summary.final_accuracy is None
    assert result.summary.by_class == ()
    assert f"{losses[-1]:.4g} test loss after 6 rounds" in unescape_tags(result.report())
    assert all("test loss" in result.plot(against).svg for against in ("rounds", "bytes"))
    assert repr(result.plot("bytes")) == "Plot(loss by uplink bytes)"
    assert result.loss == losses[-1]
    assert f"6 rounds, test loss {losses[-1]:.4g}, uplink" in repr(result)
    assert (result.history[-1].explained_variance or 0) > 0.3
    assert not seen.notes
    secure = tofu.run(**arguments | {"schedule": "secure"}, **own, run_folder=str(tmp_path / "secure"))
    assert (secure.history[-1].loss or 9) < losses[0] / 2


class Rows(Dataset[dict[str, Tensor]]):
    """Samples as mappings, as `datasets` from the Hugging Face hub have them."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"ids": torch.tensor([row % 6, row % 2]), "labels": torch.tensor(row % 2)}


class Bag(nn.Module):
    """An embedding bag whose output has an attribute `logits`, as models of transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Any:
        return type("Output", (), {"logits": self.head(self.bag(ids))})


def test_a_client_with_a_finite_but_huge_loss_has_diverged(tmp_path: Path) -> None:
    own: Row = {"clients": [Vectors(0)] * 2, "model": lambda: nn.Linear(4, 2), "train": lambda *_: 1e32}
    with pytest.raises(RunError, match=r"local training diverged \(loss 1e\+32\): a smaller lr than 0.05 may help"):
        tofu.run(**QUICK | {"schedule": "fedavg", "run_folder": str(tmp_path / "run")}, **own)


def test_mappings_are_passed_by_name_and_logits_are_read(tmp_path: Path) -> None:
    arguments = QUICK | {"ratio": 2.0, "rounds": 8, "lr": 1.0, "run_folder": str(tmp_path / "run")}
    seen = Rounds()
    result = tofu.run(**arguments, clients=[Rows(), Rows()], test=Rows(), model=Bag, callbacks=[seen])
    assert (result.summary.final_accuracy or 0) > 0.9
    (note,) = [note for note in seen.notes if "sparse correction alone" in note]
    assert "{'ids': int64 [2, 2]}, are floating-point tensors" in note  # token ids have no proxies


class Named(Dataset[dict[str, Tensor]]):
    """Samples as mappings of two floating-point inputs."""

    def __init__(self, seed: int, *, ids: bool = False) -> None:
        self._vectors, self._ids = Vectors(seed), ids

    def __len__(self) -> int:
        return len(self._vectors)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        x, y = self._vectors[row]
        return {"right": x[2:].long() if self._ids else x[2:], "left": x[:2], "labels": y}


class Sides(nn.Module):
    """A regression on two inputs, whose names are not in the order of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(2, 8), nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, *, left: Tensor, right: Tensor) -> Tensor:
        return self.head((self.left(left) + self.right(right.float())).relu()).flatten(0)


def test_mappings_of_floating_point_inputs_are_sent_as_proxies(tmp_path: Path) -> None:
    seen = Rounds()
    arguments: Row = QUICK | {"ratio": 2.0, "rounds": 3, "lr": 0.1, "proxies_below": 1.0}
    arguments |= {"model": Sides, "loss": nn.functional.mse_loss}
    data: Row = {"clients": [Named(0), Named(1)], "test": Named(9), "callbacks": [seen]}
    result = tofu.run(**arguments, **data, run_folder=tmp_path / "run")
    assert not seen.notes
    assert sum(row.with_proxies or 0 for row in result.history) > 0
    assert (result.history[-1].explained_variance or 0) > 0.3
    again = tofu.run(**arguments, **data, input_shape=((2,), (2,)), run_folder=tmp_path / "again")
    assert again.summary.weights_sha256 == result.summary.weights_sha256
    with pytest.raises(SettingError, match=r"input_shape=\(2,\) .* one shape for each of the inputs right, left"):
        tofu.run(**arguments, **data, input_shape=(2,), run_folder=tmp_path / "one")
    mixed: Row = {"clients": [Named(0, ids=True)] * 2, "test": Named(9, ids=True), "callbacks": [seen]}
    tofu.run(**arguments, **mixed, run_folder=tmp_path / "mixed")
    assert "not all inputs of the model, a batch {'right': int64 [2, 2], 'left': float32 [2, 2]}" in seen.notes[0]


@pytest.mark.parametrize("given", [{"input_shape": (1, 8, 8)}, {"forward": print}, {"collate": list}])
def test_an_argument_without_effect_is_refused(given: Row) -> None:
    (name,) = given
    with pytest.raises(SettingError, match=f"{name}=.* None where the settings name the data and the model"):
        tofu.run(**QUICK, **DATA, **given)


def test_a_run_without_room_for_a_proxy_says_so_before_round_1_and_in_its_report(tmp_path: Path) -> None:
    seen = Rounds()
    chosen: Row = QUICK | DATA | {"model": "mlp", "ratio": 2500.0, "rounds": 1, "run_folder": str(tmp_path / "run")}
    result = tofu.run(**chosen, callbacks=[seen])
    (note,) = [text for text in seen.notes if "no room for a proxy" in text]
    assert note in result.history[0].notes
    assert note in result.report().read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"clients": [Vectors(0)]}, "model=None .* a function that builds one"),
        ({"clients": [Vectors(0)], "model": "mlp"}, "model='mlp' .* a function that builds one"),
        (
            {"clients": [TensorDataset(torch.zeros(0, 4))], "model": mlp},
            r"clients\[0\]='TensorDataset' .*at least one sample",
        ),
        ({"clients": [iter(())], "model": mlp}, r"clients\[0\]='tuple_iterator' .*__len__"),
        ({"clients": [[torch.zeros(4)] * 3], "model": mlp}, r"clients\[0\]='samples float32 \[4\]' .* pairs"),
        ({"clients": {"a": Vectors(0)}, "model": mlp}, "clients='dict' .* a list of datasets"),
        ({"clients": Vectors(0), "model": mlp}, "clients='Vectors' .* a list of datasets"),
        ({"clients": "photos", "model": mlp}, "clients='str' .* a list of datasets, one per client, or their number"),
        ({"clients": [Vectors(0)], "model": mlp}, r"model='Sequential' .*accepts the inputs"),
        ({"clients": [Vectors(0)], "model": mlp, "plugins": "ood"}, "plugins='ood' .* Python objects"),
        ({"clients": [Vectors(0)], "model": mlp, "resize": "6"}, "resize='6' .* transform"),
        ({"model": mlp, "augmentation": "flip"}, "augmentation='flip' .* transform"),
        ({"clients": [Vectors(0)], "model": lambda: nn.Linear(4, 1), "ratio": 1.1}, "loss=None .* not class numbers"),
        (
            {"clients": [Vectors(0)], "model": lambda: nn.Linear(4, 1), "loss": nn.functional.nll_loss},
            "loss='nll_loss'",
        ),
        ({"model": mlp, "test": Vectors(0)}, "test='Vectors'"),
        ({"test": Vectors(0)}, "test='Vectors'"),
        ({"clients": 2, "rounds_": 3}, "rounds"),
        ({"model": mlp, "optimizer": "adam"}, r"optimizer='adam' .* \(parameters, lr=\) .* torch.optim.Adam"),
        ({"model": mlp, "optimizer": lambda parameters: None}, "optimizer='<lambda>' .*'lr'"),
        ({"model": mlp, "optimizer": lambda parameters, lr: 3}, r"optimizer='<lambda>' .* step\(\) .* int"),
        ({"model": mlp, "optimizer": torch.optim.LBFGS}, r"optimizer='LBFGS' .* step\(\)"),
        ({"model": mlp, "train": "x"}, r"train='x' .* \(model, dataset, context\)"),
        ({"model": mlp, "loss": "mse"}, "loss='mse' .* torch.nn.functional"),
        ({"model": mlp, "loss": lambda outputs, targets: 3.0}, "loss='<lambda>' .* float"),
        ({"model": mlp, "metrics": ["acc"]}, "metrics='list' .* a mapping"),
        ({"model": mlp, "metrics": {"acc": 3}}, r"metrics\['acc'\]=3 .* \(outputs, targets\) -> number"),
        ({"model": mlp, "callbacks": [3]}, r"callbacks\[0\]=3 .*Observer"),
        ({"model": mlp, "callbacks": Observer()}, "callbacks='Observer' .* a list"),
        ({"model": mlp, "progress": "yes"}, "progress='yes' .* True or False"),
        ({"model": mlp, "collate": 3}, r"collate=3 .* \(samples\)"),
        ({"model": mlp, "collate": lambda samples: 1 / 0}, "collate='<lambda>' .*ZeroDivisionError"),
        ({"model": mlp, "input_shape": 3}, "input_shape=3 .* such as"),
        ({"model": mlp, "input_shape": (1, 8, 8), "forward": 3}, "forward=3 .*at_embedding"),
        ({"model": mlp, "forward": lambda model, x: model(x)}, "input_shape=None"),
        ({"model": 3}, "model=3 .* a torch.nn.Module, or a function"),
        ({"model": nn.Linear}, "model='Linear' .*in_features"),
        ({"model": lambda: 1 / 0}, "model='<lambda>' .*ZeroDivisionError"),
        ({"clients": [Vectors(0)], "model": mlp, "test": 3}, "test=3 .* such as torch.utils.data.TensorDataset"),
        ({"clients": [Vectors(0), 3], "model": mlp}, r"clients\[1\]=3 .* such as torch.utils.data.TensorDataset"),
        ({"progress2": 1}, "progress2=1 .* the argument progress"),
        (
            {"callbacks": [type("Own", (Observer,), {"on_round_ends": lambda self, record: None})()]},
            r"callbacks\[0\]='Own.on_round_ends' .* on_round_end",
        ),
        (
            {"callbacks": [Observer(), type("Own", (Observer,), {"on_round_end": lambda self: None})()]},
            r"callbacks\[1\]='Own.on_round_end' .* \(self, record\)",
        ),
        ({"callback": 1}, "callback=1 .* the argument callbacks"),
    ],
)
def test_misuse_has_a_line_that_says_what_is_expected(tmp_path: Path, arguments: Row, reason: str) -> None:
    with pytest.raises((SettingError, RunError)) as caught:
        tofu.run(**QUICK | DATA | {"run_folder": str(tmp_path / "run")} | arguments)
    assert not (tmp_path / "run").exists()
    assert re.search(reason, str(caught.value))
    assert "\n" not in str(caught.value)


INPUTS = torch.linspace(-1, 1, 24).view(6, 4)
CLASSES = torch.arange(6) % 3
PAIRS = TensorDataset(INPUTS, CLASSES)
TRIPLES = TensorDataset(INPUTS, CLASSES, CLASSES)
VALUES = TensorDataset(INPUTS, torch.arange(6.0))
COLUMN = TensorDataset(INPUTS, torch.arange(6.0)[:, None])
SHAPES: Row = {"clients": [PAIRS], "model": lambda: nn.Linear(4, 3)}
ONE: Row = {"model": lambda: nn.Linear(4, 1), "loss": nn.functional.mse_loss}


def to_pairs(samples: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    return torch.stack([sample[0] for sample in samples]), torch.stack([sample[1] for sample in samples])


def all_pairs(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def in_a_column(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets[:, None]).square().mean()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"clients": [PAIRS, TRIPLES]}, ["clients[1]='samples (float32 [4], int64 [], int64 [])'", "`collate`"]),
        ({"clients": [[{"x": INPUTS[0], "y": 1}] * 2]}, ["clients[0]=", "{'x': float32 [4], 'y': int}", "labels"]),
        ({"clients": [(INPUTS, CLASSES)]}, ["clients[0]='samples float32 [6, 4]'", "TensorDataset"]),
        ({"clients": [[(INPUTS[0], 1), (INPUTS[0, :3], 1)]]}, ["clients[0]='samples (float32 [4]", "one shape"]),
        ({"clients": [[("text", None)] * 2]}, ["clients[0]='samples (str, NoneType)", "`collate`"]),
        ({"collate": lambda samples: 3}, ["collate='a function that returns int'", "pairs"]),
        ({"test": [1, 2]}, ["test='samples int'", "pairs"]),
        ({"test": TensorDataset(INPUTS[:, :3], CLASSES)}, ["test='a batch float32 [2, 3]'", "[2, 4] of clients[0]"]),
        ({"test": TensorDataset(INPUTS, CLASSES + 7)}, ["test='label 7'", "from 0 to 2, as the model has 3 outputs"]),
        ({"clients": [PAIRS, TensorDataset(INPUTS, CLASSES - 1)]}, ["clients[1]='label -1'"]),
        ({"clients": [PAIRS, TensorDataset(INPUTS, torch.arange(6))]}, ["clients[1]='label 3'"]),  # of a later sample
        ({"clients": [PAIRS, [(INPUTS[0], 9)]], "loss": nn.functional.cross_entropy}, ["clients[1]='label 9'"]),
        ({"clients": [TensorDataset(INPUTS, CLASSES.int())]}, ["clients[0]='targets int32 [2]'", "in int64"]),
        ({"clients": [PAIRS] * 3 + [TensorDataset(INPUTS[:, :3], CLASSES)]}, ["clients[3]='a batch float32 [2, 3]'"]),
        ({"clients": [PAIRS, VALUES], "loss": nn.functional.cross_entropy}, ["clients[1]='targets", "of clients[0]"]),
        ({"forward": tofu.at_embedding("bias_"), "input_shape": (4,)}, ["forward=", "at_embedding('bias_')"]),
        (ONE | {"clients": [VALUES]}, ["clients[0]='targets of shape []'", "[1] of the model's outputs"]),
        (ONE | {"clients": [COLUMN], "test": VALUES}, ["test='targets of shape []'"]),
        (ONE | {"clients": [VALUES], "loss": all_pairs}, ["clients[0]='targets of shape []'", "all_pairs would"]),
        (ONE | {"clients": [PAIRS], "loss": nn.functional.l1_loss}, ["clients[0]='targets of shape []'"]),
    ],
)
def test_a_dataset_that_does_not_fit_is_named_with_its_sample(tmp_path: Path, arguments: Row, parts: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        tofu.run(**QUICK | {"ratio": 1.0, "run_folder": str(tmp_path / "run")} | SHAPES | arguments)
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(caught.value)
    assert not [part for part in parts if part not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ONE | {"clients": [VALUES], "loss": in_a_column},
        ONE | {"clients": [VALUES], "loss": lambda outputs, targets: all_pairs(outputs.view_as(targets), targets)},
        ONE | {"clients": [COLUMN], "test": COLUMN},
        {"clients": [TRIPLES, PAIRS], "collate": to_pairs},
        {"clients": [TensorDataset(INPUTS, torch.tensor([0, 1, 2, -100, 1, 0]))]},  # cross-entropy ignores -100
    ],
)
def test_samples_that_the_loss_accepts_are_not_refused(tmp_path: Path, arguments: Row) -> None:
    quick = QUICK | {"compressor": "none", "rounds": 1, "run_folder": str(tmp_path / "run")}
    assert tofu.run(**quick | SHAPES | arguments).summary.rounds == 1


@dataclass
class Clip(Plugin):
    """Limit the gradient of each layer, by torch's own hooks."""

    limit: float = option(1.0, "largest L2 norm", gt=0)
    _largest: float = field(default=0.0, init=False)

    def on_train_begin(self, model: nn.Module, data: LabeledImages) -> None:
        for parameter in model.parameters():
            parameter.register_hook(self._clipped)

    def _clipped(self, gradient: Tensor) -> Tensor:
        norm = float(gradient.norm())
        self._largest = max(self._largest, norm)
        return gradient * min(1.0, self.limit / max(norm, 1e-12))

    def export(self) -> Export:
        return Export(metrics={"largest": self._largest})


def test_a_plugin_is_given_as_its_class(tmp_path: Path) -> None:
    made = [
        tofu.run(dataset="digits", clients=2, rounds=1, max_evals=2, progress=False, run_folder=str(tmp_path / name),
                 plugins=plugins, plugin_options=options)
        for name, plugins, options in (
            ("class", [Clip, "curvature"], {"clip.limit": 0.01, "curvature.probes": 1}),
            ("text", f"{__name__}:Clip,curvature", "clip.limit=0.01 curvature.probes=1"),
            ("free", [Clip, "curvature"], {"clip.limit": 1e6, "curvature.probes": 1}),
        )
    ]  # fmt: skip
    given, named, free = (result.summary.weights_sha256 for result in made)
    assert given == named != free
    assert made[0].history[-1].plugins["clip/largest"] > 0.01


def test_a_class_that_cannot_be_imported_is_one_line() -> None:
    class Local(Plugin):
        pass

    with pytest.raises(SettingError, match=r"plugins='.*<locals>.Local' is not usable: expected"):
        tofu.run(dataset="digits", clients=2, rounds=1, plugins=Local)
