"""`tofu compare` with real runs: what it leaves, that it goes on where it was, and what it refuses to touch."""

import json
import logging
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client.app import app as client_app
from server.app import serve_in_process
from server.comparison import run_comparison
from tests import processes
from tofu.cli import main
from tofu.files import lock_file
from tofu.formatting import format_bytes
from tofu.observers.base import Observer
from tofu.reporting.compare.plan import Comparison
from tofu.rounds.record import RoundRecord
from tofu.settings import Settings

TINY = ("--model=mlp", "--clients=2", "--rounds=2", "--train-images=200", "--local-epochs=1", "--max-evals=2",
        "--ratios=20,60")  # fmt: skip
ASKED = ("--compressors=topk,signsgd", "--seeds=2", *TINY)
RUNS = {f"{name}-seed{seed}" for name in ("none-1x", "topk-20x", "topk-60x", "signsgd-20x") for seed in (0, 1)}
RUN_FILES = ("config.json", "metrics.jsonl", "ledger.jsonl", "summary.json")


@dataclass(frozen=True)
class AttackResult:
    """What a command left: exit status, and what it wrote to stdout and stderr."""

    status: object
    out: str
    err: str


Compare = Callable[..., AttackResult]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Compare]:
    """Runs `tofu compare` in this process."""
    level = logging.getLogger("flwr").level

    def call(*arguments: str) -> AttackResult:
        monkeypatch.setattr(sys, "argv", ["tofu", "compare", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        return AttackResult(exit_.value.code or 0, *capsys.readouterr())

    yield call
    logging.getLogger("flwr").setLevel(level)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the printed document of a comparison that ran as a process of its own."""
    here = tmp_path_factory.mktemp("compare")
    command = [sys.executable, "-m", "tofu.cli", "compare", *ASKED, "--json", f"--folder={here / 'c'}"]
    process = processes.run(command, cwd=here, warm=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.count("\n") == 1
    return here / "c", json.loads(process.stdout)


@pytest.fixture
def copied(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the finished comparison that a test may change; run folders' recorded paths do not matter."""
    subprocess.run(["cp", "-a", str(done[0]), str(tmp_path / "c")], check=True)
    return tmp_path / "c"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def times(folder: Path) -> dict[str, int]:
    """When each file of each run was last written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.glob("*/*"))}


def fails(outcome: AttackResult, *words: str) -> None:
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1, outcome.err
    for word in ("error: ", *words):
        assert word in outcome.err


def test_every_cell_has_a_run_folder_for_each_seed(done: tuple[Path, dict[str, Any]]) -> None:
    folder, document = done
    assert {path.name for path in folder.iterdir() if path.is_dir()} == RUNS
    assert all((folder / run / name).is_file() for run in RUNS for name in RUN_FILES)
    assert document == json.loads((folder / "compare.json").read_text())
    assert document["runs_left"] == 0


def test_the_rows_are_what_the_runs_wrote(done: tuple[Path, dict[str, Any]]) -> None:
    folder, document = done
    assert {row["folder"] for row in document["runs"]} == RUNS
    for row in document["runs"]:
        run = folder / row["folder"]
        summary = json.loads((run / "summary.json").read_text())
        config, metrics = json.loads((run / "config.json").read_text()), rows(run / "metrics.jsonl")
        for name in ("final_accuracy", "uplink_bytes", "downlink_bytes", "uplink_ratio", "both_ratio", "payload_ratio"):
            assert row[name] == summary[name]
        assert (row["compressor"], row["seed"]) == (config["compressor"], config["seed"])
        assert row["ratio"] == (None if row["compressor"] == "none" else config["ratio"])
        assert row["accuracy_by_round"] == [line["accuracy"] for line in metrics]
        assert row["uplink_bytes_by_round"] == [line["uplink_bytes"] for line in metrics]
        assert sum(row["uplink_bytes_by_round"]) == row["uplink_bytes"]
        assert row["explained_variance_by_round"] == [line["explained_variance"] for line in metrics]
        assert row["encode_seconds"] == pytest.approx(sum(line["encode_seconds"] for line in metrics[1:]))
        assert row["train_seconds"] == pytest.approx(sum(line["train_seconds"] for line in metrics[1:]))


def test_equal_seeds_begin_alike_and_budgets_are_kept(done: tuple[Path, dict[str, Any]]) -> None:
    _, document = done
    for seed in (0, 1):
        starts = {row["accuracy_by_round"][0] for row in document["runs"] if row["seed"] == seed}
        assert len(starts) == 1
    for row in document["runs"]:
        if row["compressor"] != "none":
            assert row["payload_ratio"] >= row["ratio"]
            assert row["uplink_ratio"] > 10


def test_a_cell_is_the_run_that_the_run_command_does(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = done
    config = json.loads((folder / "topk-20x-seed1" / "config.json").read_text())
    again = serve_in_process(client_app, Settings.of(config | {"run-folder": str(tmp_path / "run")}))
    assert (
        again["weights_sha256"]
        == json.loads((folder / "topk-20x-seed1" / "summary.json").read_text())["weights_sha256"]
    )


def test_what_is_out_of_reach_is_shown_and_not_run(done: tuple[Path, dict[str, Any]], compare: Compare) -> None:
    folder, document = done
    (cell,) = (cell for cell in document["cells"] if cell["not_reachable"])
    assert (cell["compressor"], cell["ratios"], cell["seeds"]) == ("signsgd", [60.0], [])
    outcome = compare(*ASKED, f"--folder={folder}")
    assert f"not reachable: {cell['not_reachable']}" in outcome.out
    assert "signsgd at 60x is not reachable" in outcome.err
    assert "not reachable" in (folder / "compare.html").read_text()


def test_the_table_shows_the_numbers_of_the_files(done: tuple[Path, dict[str, Any]], compare: Compare) -> None:
    folder, _ = done
    lines = compare(*ASKED, "--quiet", f"--folder={folder}").out.splitlines()
    shown = {
        tuple(cells[:2]): cells[2:] for line in lines[2:7] if (cells := [c.strip() for c in line.strip("|").split("|")])
    }

    def ends(cell: str) -> tuple[list[float], list[float]]:
        summaries = [json.loads((folder / f"{cell}-seed{seed}" / "summary.json").read_text()) for seed in (0, 1)]
        return [s["final_accuracy"] for s in summaries], [s["uplink_bytes"] for s in summaries]

    fedavg, _ = ends("none-1x")
    places = {("\N{EN DASH}", "FedAvg"): "none-1x"}
    places |= {
        (ratio, name): f"{name}-{ratio}" for ratio, name in (("20x", "topk"), ("60x", "topk"), ("20x", "signsgd"))
    }
    for key, cell in places.items():
        accuracy, uplink = ends(cell)
        assert shown[key][0] == f"{100 * statistics.mean(accuracy):.2f} ± {100 * statistics.stdev(accuracy):.2f}"
        lost = [100 * (theirs - ours) for theirs, ours in zip(fedavg, accuracy, strict=True)]
        if cell != "none-1x":
            assert shown[key][1] == f"{statistics.mean(lost):.2f} ± {statistics.stdev(lost):.2f}"
        assert shown[key][2] == format_bytes(round(statistics.mean(uplink)))
    assert lines[-1] == f"report: {folder / 'compare.html'}"


def test_the_figure_is_well_formed(done: tuple[Path, dict[str, Any]]) -> None:
    tree = ET.parse(done[0] / "compare.svg").getroot()
    text = "".join(tree.itertext())
    assert all(name in text for name in ("topk at 20x", "topk at 60x", "signsgd at 20x", "FedAvg"))
    assert "signsgd at 60x" not in text


# Going on


def test_finished_runs_are_not_run_again(copied: Path, compare: Compare) -> None:
    before, document = times(copied), (copied / "compare.json").read_text()
    (copied / "compare.json").unlink()
    outcome = compare(*ASKED, "--workers=1", f"--folder={copied}")
    assert outcome.status == 0
    assert outcome.err.count(": finished before") == len(RUNS)
    assert times(copied) == before
    assert (copied / "compare.json").read_text().replace('"workers": 1', '"workers": 2') == document


def test_another_ratio_and_seed_run_only_what_is_new(copied: Path, compare: Compare) -> None:
    before = times(copied)
    outcome = compare("--compressors=topk", "--seeds=1", *TINY[:-1], "--ratios=40,20", "--json", f"--folder={copied}")
    assert outcome.status == 0
    new = {name.split("/")[0] for name in times(copied).keys() - before.keys()}
    assert new == {"topk-40x-seed0"}
    assert {name: time for name, time in times(copied).items() if name in before} == before
    assert len(json.loads(outcome.out)["runs"]) == 3


def test_an_unfinished_run_is_begun_again(copied: Path, compare: Compare) -> None:
    run = copied / "topk-60x-seed1"
    before, messages = times(copied), len(rows(run / "ledger.jsonl"))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    (run / ".summary.json.part").write_text("{")
    (run / "trackers").mkdir()
    (run / "trackers" / "mlflow.json").write_text("{}")
    assert compare(*ASKED, "--quiet", f"--folder={copied}").status == 0
    again = json.loads((run / "summary.json").read_text())
    assert again["weights_sha256"] == summary["weights_sha256"]
    assert len(rows(run / "ledger.jsonl")) == messages  # not appended to
    assert not {"trackers", ".summary.json.part"} & {path.name for path in run.iterdir()}
    others = {name: time for name, time in before.items() if not name.startswith(run.name)}
    assert {name: time for name, time in times(copied).items() if name in others} == others


def test_an_interrupted_comparison_ends_as_if_it_had_not_been(
    done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, expected = done
    shared = Settings.of(expected["settings"])
    comparison = Comparison.of(shared, compressors="topk", ratios="20,60", seeds=1, folder=tmp_path / "c")
    rounds: list[object] = []

    class Impatient(Observer):
        def on_round_end(self, record: RoundRecord) -> None:
            rounds.append(record)
            if len(rounds) == 3:  # in the middle of the second run
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_comparison(comparison, client_app, view=Impatient)
    watched = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert (len(watched["runs"]), watched["runs_left"]) == (1, 2)
    assert "not finished: 2 runs left" in (tmp_path / "c" / "compare.html").read_text()
    said: list[str] = []
    document = run_comparison(comparison, client_app, log=said.append)
    assert said[0] == "run 1 of 3: FedAvg, seed 0: finished before"
    assert said[1].startswith("run 2 of 3: topk at 20x, seed 0; ")
    assert said[1].endswith(" left")
    assert document["runs_left"] == 0
    old = {row["folder"]: row for row in expected["runs"]}
    for row in document["runs"]:
        assert row["accuracy_by_round"] == old[row["folder"]]["accuracy_by_round"]


def test_a_run_that_fails_is_shown_and_the_others_go_on(tmp_path: Path, compare: Compare) -> None:
    outcome = compare("--compressors=topk", "--seeds=1", *TINY, "--for=topk:lr=1e30", f"--folder={tmp_path / 'c'}")
    assert outcome.status == 2
    assert outcome.err.count("failed: round 1: no valid reply") == 2
    assert outcome.err.splitlines()[-1].startswith("error: every run of topk failed: see ")
    document = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert [bool(cell["failed"]) for cell in document["cells"]] == [False, True, True]
    assert document["overrides"] == {"topk": {"lr": 1e30}}
    assert "- topk was run with lr=1e+30." in outcome.out


# Tuning


def test_tuning_gives_each_cell_its_own_best(tmp_path: Path, compare: Compare) -> None:
    """With the first step size nothing can be learned, so the other is what every cell must choose."""
    arguments = (
        "--compressors=topk",
        *TINY[:-1],
        "--ratios=5",
        "--seeds=2",
        "--tune=lr=1e-7,0.1",
        f"--folder={tmp_path / 'c'}",
    )
    document = json.loads(compare(*arguments, "--json").out)
    assert document["tune"] == {"setting": "lr", "values": [1e-7, 0.1], "seed": 1000}
    tried = {(row["compressor"], row["tuned"]): row for row in document["tuning_runs"]}
    assert set(tried) == {("none", 1e-7), ("none", 0.1), ("topk", 1e-7), ("topk", 0.1)}
    for cell in document["cells"]:
        mine = {value: row for (name, value), row in tried.items() if name == cell["compressor"]}
        best = max(mine, key=lambda value: mine[value]["final_accuracy"])
        assert best == cell["tuned"] == 0.1
        assert {row["seed"] for row in mine.values()} == {1000}
    for row in document["runs"]:
        config = json.loads((tmp_path / "c" / row["folder"] / "config.json").read_text())
        assert config["lr"] == row["tuned"] == 0.1
        assert row["seed"] in (0, 1)
    assert len(document["runs"]) == 4
    before = times(tmp_path / "c")
    outcome = compare(*arguments, "--quiet")
    assert times(tmp_path / "c") == before
    header, _, *lines = outcome.out.splitlines()[:4]
    assert header.split("|")[-2].strip() == "lr"
    assert [line.split("|")[-2].strip() for line in lines] == ["0.1", "0.1"]


# Refusals


def test_a_finished_run_with_other_settings_is_kept(copied: Path, compare: Compare) -> None:
    before = times(copied)
    fails(compare(*ASKED, "--rounds=3", f"--folder={copied}"), "rounds=3", "expected 2", f"{copied / 'none-1x-seed0'}")
    fails(compare(*ASKED, "--for=topk:lr=0.3", f"--folder={copied}"), "lr=0.3", "expected 0.1", "topk-20x-seed0")
    assert times(copied) == before


def test_settings_that_a_finished_run_never_looked_at_may_change(copied: Path, compare: Compare) -> None:
    before = times(copied)
    compare(*ASKED, "--bits=8", "--max-evals=7", f"--folder={copied}")
    assert times(copied) == before
    fails(compare(*ASKED, "--downlink=proxy", f"--folder={copied}"), "downlink='proxy'")


def test_files_of_somebody_else_are_kept(copied: Path, compare: Compare) -> None:
    run = copied / "topk-60x-seed1"
    (run / "summary.json").unlink()
    (run / "thesis.txt").write_text("precious")
    before = times(copied)
    fails(compare(*ASKED, f"--folder={copied}"), str(run), "thesis.txt")
    assert times(copied) == before


def test_a_folder_in_use_is_let_be(copied: Path, compare: Compare) -> None:
    lock = lock_file(copied / "compare.json")
    assert lock is not None
    with lock:
        fails(compare(*ASKED, f"--folder={copied}"), "no other comparison is running")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--compressors=nosuch",), ("compressors='nosuch'",)),
        (("--ratios=20,x",), ("ratios='x'",)),
        (("--seeds=0",), ("seeds=0",)),
        (("--for=topk:nosuch=1",), ("for='topk:nosuch=1'",)),
        (("--tune=lr=1",), ("tune='lr=1'",)),
        (("--ratio=5",), ("ratio=5.0", "--ratios")),
        (("--compressor=topk",), ("compressor='topk'", "--compressors")),
        (("--run-folder=x",), ("run-folder='x'", "--folder")),
        (("--schedule=fedavg",), ("schedule='fedavg'",)),
        (("--model=nosuch",), ("model='nosuch'",)),
        (("--folder=file/below",), ("folder='file/below'",)),
    ],
)
def test_bad_input_takes_one_line_and_leaves_nothing(
    compare: Compare,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    fails(compare(*ASKED, "--folder=new", *arguments), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
