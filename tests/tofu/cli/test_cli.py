"""The command line: bad input takes one line and leaves nothing behind; plans agree with runs; help; reports."""

import dataclasses
import importlib
import io
import json
import logging
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attacks.evaluate import AttackEvaluation
from attacks.recorded import ATTACKS
from tests.processes import run
from tofu.cli import COMMANDS, load_command, main
from tofu.cli.run import run_settings
from tofu.errors import TofuError
from tofu.formatting import format_seconds, proxies_line
from tofu.settings import FIELDS, Settings, read_toml, section_of

ROOT = Path(__file__).parents[3]
TINY = ("--model=mlp", "--clients=2", "--rounds=2", "--max-evals=2")


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """What a command left: exit status, and what it wrote to stdout and stderr."""

    status: object
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        assert self.status == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)  # type: ignore[no-any-return]


Tofu = Callable[..., AttackResult]


@pytest.fixture
def tofu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Tofu]:
    """Runs the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    monkeypatch.setenv("FLWR_DISABLE_UPDATE_CHECK", "1")
    monkeypatch.setenv("COLUMNS", "120")
    level = logging.getLogger("flwr").level

    def call(*arguments: str) -> AttackResult:
        monkeypatch.setattr(sys, "argv", ["tofu", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        return AttackResult(exit_.value.code or 0, *capsys.readouterr())

    yield call
    logging.getLogger("flwr").setLevel(level)


def fails(outcome: AttackResult, *words: str) -> None:
    """Checks for one line of error that holds the words."""
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith("\n")
    for word in words:
        assert word in outcome.err


def pictures(folder: Path, count: int = 6) -> None:
    """Random grey images of 8x8 pixels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")


# Bad input


def test_the_list_of_commands_tells_what_the_commands_tell() -> None:
    for name, summary in COMMANDS.items():
        command = load_command(name)
        assert command.name == name
        assert " ".join((command.help or "").split("\n\n")[0].split()) == summary


@pytest.mark.parametrize(("group", "typo", "meant"), [((), "atack", "attack"), (("deploy",), "statsu", "status")])
def test_a_misspelled_command_is_named_with_one_suggestion(
    group: tuple[str, ...], typo: str, meant: str, tofu: Tofu
) -> None:
    outcome = tofu(*group, typo)
    assert outcome.status == 2
    assert f"No such command '{typo}'. Did you mean '{meant}'?" in outcome.err
    assert outcome.err.count("Did you mean") == 1


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--dataset=nosuch", ("dataset='nosuch'", "digits")),
        ("--dataset=/no/such/folder", ("dataset='/no/such/folder'",)),
        ("--dataset=", ("dataset=''",)),
        ("--model=alexnet", ("model='alexnet'", "lenet5")),
        ("--model=nowhere:net", ("model='nowhere:net'", "ModuleNotFoundError")),
        ("--model=json:loads", ("model='json:loads'", "TypeError")),
        ("--schedule=sometimes", ("schedule='sometimes'", "compressed, fedavg, secure, switch, plateau")),
        ("--schedule=secure", ("clients=2", "at least 3 for secure rounds")),
        ("--bits=7", ("bits=7", "2, 3, 4, 5, 6, 8, 16, 32")),
        ("--ratio=1e6", ("ratio=1000000.0", "at most")),
        ("--ratio=0.5", ("ratio=0.5", "at least 1")),
        ("--ratio=nan", ("ratio=nan",)),
        ("--rounds=-1", ("rounds=-1", "at least 1")),
        ("--rounds=0", ("rounds=0", "at least 1")),
        ("--rounds=99999999999999999999", ("rounds=99999999999999999999",)),
        ("--clients=5000", ("clients=5000", "at most")),
        ("--train-images=5000", ("train-images=5000", "at most")),
        ("--min-clients=3", ("min-clients=3", "at most clients, 2")),
        ("--lr=inf", ("lr=inf",)),
    ],
)
def test_a_value_that_cannot_be_used(
    tofu: Tofu, tmp_path: Path, command: str, option: str, words: tuple[str, ...]
) -> None:
    fails(tofu(command, *TINY, "--run-folder=run", option), *words)
    assert list(tmp_path.iterdir()) == []


def test_an_attack_without_its_extra_is_refused_before_anything_is_imported(
    tofu: Tofu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "attacks.evaluate", None)
    fails(tofu("attack"), "torchmetrics is not installed: pip install 'tofu-fl[attacks]'")


def test_noise_without_its_extra_leaves_no_folder(tofu: Tofu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the same command, after the installation, would be refused: its folder is not empty."""
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    fails(tofu("run", *TINY, "--quiet", "--run-folder=run", "--noise-multiplier=1"), "pip install 'tofu-fl[privacy]'")
    assert list(tmp_path.iterdir()) == []


def test_a_downlink_ratio_out_of_reach_leaves_no_folder(tofu: Tofu, tmp_path: Path) -> None:
    options = ("--run-folder=run", "--downlink=proxy", "--downlink-ratio=1e6")
    fails(tofu("run", *TINY, *options), "at most")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_many_lines_takes_one(tofu: Tofu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_net.py").write_text("def net(**shape): raise RuntimeError('one\\ntwo\\x1b[31m')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    outcome = tofu("run", *TINY, "--model=broken_net:net", "--run-folder=run")
    fails(outcome, "RuntimeError: one two?[31m")
    assert [path.name for path in tmp_path.iterdir()] == ["broken_net.py"]


def test_data_without_labels(tofu: Tofu, tmp_path: Path) -> None:
    pictures(tmp_path / "data")
    fails(tofu("run", *TINY, "--dataset=data", "--run-folder=run"), "data has no labeled images")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_data_with_a_damaged_image(tofu: Tofu, tmp_path: Path) -> None:
    for name in ("a", "b"):
        pictures(tmp_path / "data" / name)
    (tmp_path / "data" / "a" / "0.png").write_bytes(b"no picture")
    fails(tofu("run", *TINY, "--strict", "--dataset=data", "--run-folder=run"), "0.png cannot be read as an image")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_data_with_a_damaged_test_image(tofu: Tofu, tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/a", "test/b"):
        pictures(tmp_path / "data" / name)
    (tmp_path / "data" / "test" / "b" / "3.png").write_bytes(b"no picture")
    fails(tofu("run", *TINY, "--strict", "--dataset=data", "--run-folder=run"), "3.png cannot be read as an image")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("round = 3", ("round=3", "a known setting (rounds")),
        ("rounds = ", ("config='settings.toml'", "a TOML file")),
        ("rounds = 0", ("rounds=0", "at least 1")),
        ("rounds = '3'", ("rounds='3'", "a whole number")),
        ("[training]\nrounds = 3", ("training={'rounds': 3}", "a known setting")),
        ("tool = 3", ("config='settings.toml'",)),
    ],
)
def test_a_file_that_cannot_be_used(tofu: Tofu, tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    (tmp_path / "settings.toml").write_text(text)
    fails(tofu("run", "--config=settings.toml", "--run-folder=run"), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.toml"]


def test_a_file_that_is_missing(tofu: Tofu, tmp_path: Path) -> None:
    fails(tofu("run", "--config=settings.toml"), "config='settings.toml'", "No such file")
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_is_not_empty(tofu: Tofu, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    fails(tofu("run", *TINY, "--run-folder=run"), "run-folder='run'", "a new or empty folder")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_run_folder_that_cannot_be_made(tofu: Tofu, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("precious")
    fails(tofu("run", *TINY, f"--run-folder={folder}"), f"run-folder='{folder}'", "a folder that can be created")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_demo_folder_that_is_not_empty(tofu: Tofu, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    outcome = tofu("demo", *TINY, "--quiet", "--run-folder=run")
    assert outcome.status == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "--rounds=abc"), ("--rounds", "'abc'", "see `tofu run --help`")),
        (("run", "--ruonds=1"), ("--ruonds", "Did you mean", "'--rounds'", "see `tofu run --help`")),
        (("run", "--lr"), ("--lr", "requires an argument", "`tofu run --help`")),
        (("run", "--learning-rate", "0.1"), ("--learning-rate", "--lr", "`tofu run --help`")),
        (("--nosuch",), ("--nosuch", "see `tofu --help`")),
        (("nosuch",), ("'nosuch'", "see `tofu --help`")),
        (("report",), ("RUN", "see `tofu report --help`")),
        (("plan", "extra"), ("extra", "see `tofu plan --help`")),
        (("compare", "--compressors=topk"), ("--folder", "see `tofu compare --help`")),
        (("deploy", "up", "--nodes=x"), ("--nodes", "'x'", "see `tofu deploy up --help`")),
    ],
)
def test_usage_errors_take_one_line(
    tofu: Tofu, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    fails(tofu(*arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_group_without_a_command_prints_its_help(tofu: Tofu) -> None:
    outcome = tofu("deploy")
    assert "Usage: tofu deploy" in outcome.out + outcome.err
    assert "error:" not in outcome.err


def test_the_real_command_fails_in_one_line(tmp_path: Path) -> None:
    """In a process of its own, where nothing but the command itself could tidy up stderr."""
    command = [sys.executable, "-m", "tofu.cli", "run", "--model=mlp", "--rounds=0", "--run-folder=run"]
    process = run(command, cwd=tmp_path)
    fails(AttackResult(process.returncode, process.stdout, process.stderr), "rounds=0")
    assert list(tmp_path.iterdir()) == []


# Where settings come from


def test_options_go_over_the_file_over_the_folders_pyproject_over_the_defaults(tofu: Tofu, tmp_path: Path) -> None:
    def rounds(*arguments: str) -> int:
        made = tofu("plan", "--json", "--model=mlp", *arguments).json
        return int(made["compressed_rounds"])

    (tmp_path / "settings.toml").write_text("rounds = 7\n")
    assert rounds() == Settings().training.rounds == 20
    ours = '[tool.flwr.app.components]\nserverapp = "server.app:app"\n[tool.flwr.app.config]\nrounds = 4\n'
    (tmp_path / "pyproject.toml").write_text(ours)
    assert rounds() == 4
    assert rounds("--rounds=3") == 3
    assert rounds("--config=settings.toml") == 7
    assert rounds("--config=settings.toml", "--rounds=3") == 3


@pytest.mark.parametrize(
    "text",
    ['[tool.flwr.app.components]\nserverapp = "other:app"\n[tool.flwr.app.config]\nrounds = 4\nnosuch = 1\n',
     "tool = 1", "tool.flwr = 'x'", "not TOML", ""],
)  # fmt: skip
def test_a_pyproject_of_something_else_is_let_be(tofu: Tofu, tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    assert tofu("plan", "--json", "--model=mlp").json["compressed_rounds"] == 20


# Plans


@pytest.mark.parametrize(
    "options",
    [
        ("--ratio=50",),
        ("--ratio=1000",),
        ("--schedule=switch", "--recovery=fedavg", "--switch-round=2", "--proxies=8"),
        ("--schedule=switch", "--switch-round=2", "--clients=4"),
        ("--schedule=fedavg",),
        ("--client-fraction=0.5", "--clients=5", "--bits=4"),
    ],
)
def test_a_plan_agrees_with_the_run(tofu: Tofu, tmp_path: Path, options: tuple[str, ...]) -> None:
    planned = tofu("plan", "--json", *TINY, *options).json
    summary = tofu("run", "--json", *TINY, *options, "--run-folder=run").json
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    for direction in ("uplink", "downlink"):
        hello = sum(row["bytes"] for row in ledger if row["direction"] == direction and row["kind"] == "hello")
        assert hello > 0
        measured = summary[f"{direction}_bytes"] - hello
        assert planned[f"{direction}_bytes"] == pytest.approx(measured, rel=0.02)
        if direction == "uplink":
            assert planned["fedavg_uplink_bytes"] == pytest.approx(summary["fedavg_uplink_bytes"] - hello, rel=0.02)
    payloads = [row["payload_bytes"] for row in ledger if row["direction"] == "uplink" and row["kind"] == "compressed"]
    for bytes_ in payloads:  # what is left may be too little for one entry more
        assert planned["payload_bytes"] - 4 <= bytes_ <= planned["payload_bytes"]
    assert bool(payloads) == (planned["compressed_rounds"] > 0)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("compressed") == planned["compressed_rounds"]
    assert kinds.count("fedavg") == planned["fedavg_rounds"]
    assert kinds.count("secure") == planned["secure_rounds"]


def test_a_run_notes_given_settings_that_have_no_effect(tofu: Tofu) -> None:
    Path("own.toml").write_text("switch-round = 2\n")
    outcome = tofu("run", *TINY, "--config=own.toml", "--partition=iid", "--alpha=0.5")
    assert outcome.err.count("has no effect") == 2
    assert "note: alpha=0.5 has no effect: it needs partition=dirichlet" in outcome.err
    assert "note: switch-round=2 has no effect: it needs schedule=switch" in outcome.err


def test_a_plan_for_people(tofu: Tofu, tmp_path: Path) -> None:
    outcome = tofu("plan", *TINY)
    assert (outcome.status, outcome.err) == (0, "")
    assert "34,110 parameters" in outcome.out
    assert "2 compressed, 0 FedAvg, 0 secure" in outcome.out
    assert "uplink of FedAvg" in outcome.out
    assert "one compressed payload" in outcome.out
    assert "secure round" not in outcome.out
    secure = tofu("plan", *TINY, "--schedule=secure", "--clients=4")
    assert "compressed payload" not in secure.out
    assert re.search(r"one client, secure round +\d+\.\d kB in all stages, \d\.\d\dx less\n", secure.out)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_refuses_what_a_run_refuses_and_says_when_the_privacy_budget_is_spent(tofu: Tofu) -> None:
    private = ("plan", "--model=mlp", "--schedule=secure", "--noise-multiplier=4")
    refused = tofu(*private)
    fails(refused, "secure-ratio=4.0 is not usable: expected at most ", " with noise-multiplier 4")
    ratio = refused.err.partition("at most ")[2].split()[0]
    fails(tofu(*private, f"--secure-ratio={ratio}", "--max-epsilon=0.1"), "at least 0.9263, the epsilon of")
    outcome = tofu(*private, f"--secure-ratio={ratio}", "--max-epsilon=3")
    stop = re.search(r"the run stops after round (\d+): the next one would exceed max-epsilon 3", outcome.err)
    assert stop is not None
    spent = tofu(*private, f"--secure-ratio={ratio}", f"--rounds={stop[1]}", "--json").json
    assert spent["private_rounds"] == int(stop[1])
    assert 2 < spent["epsilon"] <= 3
    assert f"epsilon                   {spent['epsilon']:.4g} after round {stop[1]} at delta 1e-05" in outcome.out


def test_a_plan_warns_of_proxies_larger_than_the_update(tofu: Tofu) -> None:
    outcome = tofu("plan", *TINY, "--proxies=9000")
    assert outcome.status == 0
    assert outcome.err.startswith("warning: a payload of ")
    assert "no smaller than the update" in outcome.err
    assert outcome.err.count("\n") == 1
    (warning,) = tofu("plan", "--json", *TINY, "--proxies=9000").json["warnings"]
    assert outcome.err == f"warning: {warning}\n"


# Runs, demos, reports


def test_quiet_prints_where_the_report_is(tofu: Tofu, tmp_path: Path) -> None:
    outcome = tofu("run", *TINY, "--quiet", "--run-folder=run")
    assert (outcome.status, outcome.out, outcome.err) == (0, "run/report.html\n", "")
    assert (tmp_path / "run" / "report.html").exists()


def test_progress_goes_to_stderr_a_line_a_round(tofu: Tofu) -> None:
    outcome = tofu("run", *TINY, "--run-folder=run")
    assert (outcome.status, outcome.out) == (0, "report: run/report.html\n")
    lines = outcome.err.splitlines()
    assert lines[:2] == ["mlp on digits: 2 rounds, 2 clients", "results: run"]
    assert [line.split()[1] for line in lines[2:4]] == ["1/2", "2/2"]
    assert "came as proxies" in lines[4]
    assert lines[5].startswith("done: final accuracy")


def test_a_run_without_a_folder_makes_one_of_its_own(tofu: Tofu, tmp_path: Path) -> None:
    folders = [tofu("run", *TINY, "--schedule=fedavg", "--json").json["run"] for _ in range(2)]
    assert len(set(folders)) == 2
    assert sorted(f"runs/{path.name}" for path in (tmp_path / "runs").iterdir()) == sorted(folders)
    assert all("mlp-fedavg" in folder for folder in folders)


def test_demo_compares_two_runs(tofu: Tofu, tmp_path: Path) -> None:
    outcome = tofu("demo", *TINY, "--quiet", "--run-folder=run")
    assert outcome.status == 0
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run-fedavg", "run")]
    assert summaries[0]["uplink_ratio"] == 1
    assert summaries[1]["uplink_ratio"] > 20
    assert summaries[1]["baseline"]["final_accuracy"] == summaries[0]["final_accuracy"]
    for summary in summaries:
        assert f"{summary['final_accuracy']:.1%}" in outcome.out
    assert "report: run/report.html" in outcome.out
    rounds = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    compressed = [one for one in rounds if one.get("with_proxies") is not None]
    sent, updates = sum(one["with_proxies"] for one in compressed), sum(one["clients"] for one in compressed)
    assert updates == 4  # two clients, two rounds
    assert f"\n{proxies_line(sent, updates)}\n" in outcome.out
    assert f"\na payload is {summaries[1]['payload_ratio']:.0f}x smaller than an update;" in outcome.out


def test_report_writes_the_page_again(tofu: Tofu, tmp_path: Path) -> None:
    tofu("run", *TINY, "--quiet", "--run-folder=run")
    page = tmp_path / "run" / "report.html"
    before = page.read_text()
    page.unlink()
    outcome = tofu("report", "run")
    assert (outcome.status, outcome.out) == (0, "run/report.html\n")
    assert page.read_text() == before


def test_report_of_what_is_no_run(tofu: Tofu, tmp_path: Path) -> None:
    fails(tofu("report", "nosuch"), "nosuch")
    (tmp_path / "empty").mkdir()
    fails(tofu("report", "empty"), "config.json is missing")
    assert list((tmp_path / "empty").iterdir()) == []


# Help


def test_help_names_the_commands(tofu: Tofu) -> None:
    outcome = tofu("--help")
    assert outcome.status == 0
    for command in ("run", "plan", "demo", "compare", "report"):
        assert f"│ {command} " in outcome.out


@pytest.mark.parametrize("command", ["run", "plan", "demo", "compare"])
def test_help_lists_every_setting_under_its_section(tofu: Tofu, command: str) -> None:
    outcome = tofu(command, "--help")
    assert outcome.status == 0
    panels: dict[str, str] = {}
    for panel in outcome.out.split("╭─ ")[1:]:
        title, _, body = panel.partition(" ─")
        panels[title] = body
    for name in FIELDS:
        flag = f"--{name.replace('_', '-')}"
        assert re.search(rf"{flag}[ ,]", panels[section_of(name)]), name


def test_help_tells_defaults_and_choices(tofu: Tofu) -> None:
    text = " ".join(tofu("run", "--help").out.replace("│", " ").split())
    for default in ("mlp", "100.0", "true"):
        assert f"[default: {default}]" in text
    for choices in ("(sgd, momentum, adam, ef21)", "(iid, dirichlet, shards, natural)"):
        assert choices in text
    assert "[default: ]" not in text


def test_help_runs_quickly(tmp_path: Path) -> None:
    """It must not import what only a run needs: torch, Flower and its data sets take seconds.

    Nor do the commands that look after a federation need torch.
    """
    code = (
        "import sys\n"
        "from tofu.cli import main\n"
        "for sys.argv in (['tofu', '--help'], ['tofu', 'run', '--help']):\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code\n"
        "    light = {'pydantic', 'cryptography', 'numpy', 'tofu.cli.run'} & set(sys.modules)\n"
        "    assert not light or len(sys.argv) > 2, light\n"
        "import deploy.background, deploy.supervisor\n"
        "heavy = {'torch', 'flwr', 'ray', 'datasets', 'flwr_datasets', 'sklearn', 'torchvision', 'pandas'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    command = [sys.executable, "-c", code]
    process = run(command, cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "--rounds" in process.stdout


def test_version_and_settings(tofu: Tofu, tmp_path: Path) -> None:
    assert re.fullmatch(r"tofu \d+\.\d+.*\n", tofu("--version").out)
    (tmp_path / "all.toml").write_text(tofu("settings").out)
    assert Settings.of(read_toml(tmp_path / "all.toml")) == Settings()
    assert json.loads(tofu("settings", "--schema").out)["properties"]["lr"]["exclusiveMinimum"] == 0


def test_an_old_option_is_accepted_with_a_warning(
    tofu: Tofu, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tofu.settings.deprecated._warned", set())
    outcome = tofu("plan", "--json", *TINY, "--fraction=0.5")
    assert outcome.json["compressed_rounds"] == 2
    assert outcome.err == "warning: setting fraction is deprecated: use client-fraction\n"


# Runs: where the results are, how to go on, and what is refused


def test_a_run_says_where_its_results_are_and_names_its_compressor(tofu: Tofu, tmp_path: Path) -> None:
    outcome = tofu("run", *TINY, "--compressor=topk")
    folder = next((tmp_path / "runs").iterdir())
    assert folder.name.endswith("-mlp-topk")
    assert outcome.out == f"report: runs/{folder.name}/report.html\n"
    assert f"results: runs/{folder.name}\n" in outcome.err
    assert "round 2/2  topk " in outcome.err
    assert "proxy" not in outcome.err.replace("it needs compressor=proxy", "")
    assert ">topk</span>" in (folder / "report.html").read_text()


def test_a_run_names_the_files_that_clients_leave_out_once(tofu: Tofu, tmp_path: Path) -> None:
    for number in range(24):
        folder = tmp_path / "photos" / f"class-{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    for number in (4, 7):
        file = tmp_path / "photos" / f"class-{number % 2}" / f"{number}.png"
        file.write_bytes(file.read_bytes()[:60])
    outcome = tofu("run", *TINY, "--dataset=photos", "--partition=iid", "--run-folder=run")
    assert outcome.status == 0
    for name in ("class-0/4.png", "class-1/7.png"):
        assert outcome.err.count(f"{name} cannot be read as an image: ") == 1
    assert outcome.err.count("note: left out: ") == 1


def test_an_interrupted_comparison_says_how_to_go_on(tofu: Tofu, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.comparison.run_comparison", interrupt)
    outcome = tofu("compare", "--compressors=topk", "--ratios=20", "--folder=mine")
    assert (outcome.status, outcome.err) == (
        130, "interrupted; runs are in mine; the same command goes on from here\n"
    )  # fmt: skip
    monkeypatch.setattr("tofu.models.initial_model", interrupt)
    outcome = tofu("plan")
    assert (outcome.status, outcome.err) == (130, "interrupted\n")


def test_a_run_that_is_interrupted_before_its_first_line_says_that_nothing_was_written(
    tofu: Tofu, monkeypatch: pytest.MonkeyPatch
) -> None:
    import server.app

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(server.app, "serve_in_process", interrupt)
        outcome = tofu("run", *TINY, "--run-folder=run")
    assert (outcome.status, outcome.err) == (130, "interrupted before the first round: no results were written\n")
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["run", "--model=ccn"], "model='ccn' is not usable: expected one of lenet5, "),
        (["run", "--model=nowhere:net"], "model='nowhere:net' is not usable: .*No module named 'nowhere'"),
        (["plan", "--model=ccn"], "model='ccn' is not usable: expected one of lenet5, "),
        (["run", "--lr=-1"], "lr=-1.0 is not usable: expected a number above 0"),
        (["run", "--resume=nowhere"], "resume='nowhere' is not usable"),
        (["plan", "--lr=-1"], "lr=-1.0 is not usable: expected a number above 0"),
        (["plan", "--plugins=gmp"], "plugins='gmp' is not usable: expected one of .*gpm"),
        (["run", "--dataset=nowhere"], "dataset='nowhere' is not usable: expected 'digits', "),
        (["plan", "--dataset=nowhere.csv"], "dataset='nowhere.csv' is not usable: expected breast-cancer or wine, "),
        (["run", "--run-folder=used"], "run-folder='used' is not usable: expected a new or empty folder"),
        (["demo", "--run-folder=used"], "run-folder='used' is not usable: expected a new or empty folder"),
        (["demo", "--run-folder=new"], "run-folder='new-fedavg' is not usable: expected a new or empty folder"),
        (
            ["run", "--resume=used"],
            "resume='used' is not usable: expected a run that has not finished, or --rounds above ",
        ),
        (["run", "--record-clients=77"], "record-clients='77' is not usable: expected clients of this run, 0 to 9"),
        (["compare", "--compressors=topk", "--folder=f", "--initial-weights=w.pt"], "initial-weights='w.pt' is not"),
        (["demo", "--lr=-1"], "lr=-1.0 is not usable: expected a number above 0"),
        (["compare", "--compressors=topk", "--folder=f", "--lr=-1"], "lr=-1.0 is not usable"),
        (["attack", "--model=ccn"], "model='ccn' is not usable: expected one of lenet5, .*lenet-smooth"),
        (["attack", "--messages=exakt"], "messages='exakt' is not usable: expected exact, "),
        (["attack", "--batch-sizes=1,x"], "batch-sizes='1,x' is not usable: expected whole numbers"),
        (["attack", "--attacks=simulatoin"], "attacks='simulatoin' is not usable: expected one of .*simulation"),
    ],
)
def test_what_needs_no_torch_is_refused_before_it_is_imported(
    arguments: list[str], reason: str, tmp_path: Path
) -> None:
    for name in ("used", "new-fedavg"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "summary.json").write_text("{}")
    assert _refused(arguments, reason, tmp_path) == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["run", "--device=cuda:99"], "device='cuda:99' is not usable: expected a device of this machine"),
        (["demo", "--model=nets:smal"], "model='nets:smal' is not usable: .*module 'nets' has no attribute 'smal'"),
        (["plan", "--model=nets:other"], "model='nets:other' is not usable: .*missing a required argument: 'c'"),
        (["compare", "--compressors=topk", "--folder=f", "--device=cuda:99"], "device='cuda:99' is not usable"),
        (["run", "--model=nets:row", "--dataset=wine"], "model='nets:row' is not usable: .* features, classes by name"),
    ],
)
def test_devices_and_models_are_refused_before_data_are_read(arguments: list[str], reason: str, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("def other(c, h, w, k): pass\ndef row(width, classes): pass\n")
    assert _refused(arguments, reason, tmp_path) == "['torch']\n"


def _refused(arguments: list[str], reason: str, folder: Path) -> str:
    """Run a command that must be refused -> which slow packages it had imported."""
    code = ("import sys; from tofu.cli import main\ntry:\n main()\nfinally:\n"
            " print(sorted({'torch', 'flwr', 'sklearn'} & sys.modules.keys()))")  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    refused = run([sys.executable, "-c", code, *arguments], cwd=folder, env=environment)
    assert refused.returncode == 2
    assert re.search(reason, refused.stderr)
    return refused.stdout


def test_an_interrupted_run_says_how_to_go_on(tofu: Tofu, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.runner import RoundRunner

    run_round = RoundRunner.run_round

    def interrupt(self: RoundRunner, round_: int) -> object:
        if round_ == 2:
            raise KeyboardInterrupt
        return run_round(self, round_)

    with monkeypatch.context() as patched:
        patched.setattr(RoundRunner, "run_round", interrupt)
        outcome = tofu("run", *TINY, "--run-folder=run")
    assert outcome.status == 130
    assert outcome.err.splitlines()[-1] == (
        "interrupted after round 1; results are in run; `tofu run --resume run` goes on from there"
    )
    assert tofu("run", "--resume=run", "--json").json["rounds"] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--compressor=topk", "--codec-mode=paper"), ("codec-mode='paper'", "compressor=topk")),
        (("--record=9",), ("record-clients='9'", "0 to 1")),
        (("--noise-multiplier=0.5", "--max-epsilon=0.1"), ("max-epsilon=0.1", "epsilon of one round")),
        (("--resume=run", "--config=a.toml"), ("config='a.toml'", "--resume")),
        (("--server-optimizer=lion",), ("server-optimizer='lion'", "sgd, momentum, adam", "package.module:Class")),
    ],
)
def test_contradictory_options_are_refused(
    tofu: Tofu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.setattr("tofu.settings.deprecated._warned", {"setting record is deprecated: use record-clients"})
    fails(tofu("run", *TINY, *options), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("tofu pl", {"plan"}),
        ("tofu run --compressor t", {"topk"}),
        ("tofu run --partition ", {"iid", "dirichlet", "shards", "natural"}),
    ],
)
def test_shell_completion(tofu: Tofu, monkeypatch: pytest.MonkeyPatch, words: str, expected: set[str]) -> None:
    monkeypatch.setenv("_TOFU_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    assert set(tofu().out.split()) == expected


def test_a_finished_run_is_extended_as_if_it_had_had_more_rounds(tofu: Tofu) -> None:
    whole = tofu("run", *TINY, "--rounds=3", "--run-folder=whole", "--json").json
    tofu("run", *TINY, "--rounds=2", "--run-folder=run")
    fails(tofu("run", "--resume=run"), "resume='run'", "--rounds above 2")
    fails(tofu("run", "--resume=run", "--rounds=1"), "rounds=1", "at least the 2")
    extended = tofu("run", "--resume=run", "--rounds=3", "--json").json
    assert extended["weights_sha256"] == whole["weights_sha256"]
    assert extended["uplink_bytes"] == whole["uplink_bytes"]
    tofu("run", *TINY, "--no-checkpoint", "--run-folder=without")
    fails(tofu("run", "--resume=without", "--rounds=3"), "last checkpoint")


def test_predictions_have_names_labels_and_a_file(tofu: Tofu, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        pictures(tmp_path / "data" / name)
    start = ("run", *TINY, "--dataset=data", "--partition=iid")
    tofu(*start, "--run-folder=first")
    tofu(*start, "--run-folder=run", "--initial-weights=first", "--rounds=1", "--lr=1e-9", "--schedule=fedavg")
    outcome = tofu("predict", "run", "data/cat", "data/dog", "--output=found.csv")
    assert "predictions: found.csv\n" in outcome.err
    lines = (tmp_path / "found.csv").read_text().splitlines()
    assert len(lines) == 13
    assert lines[0].startswith("image,class,name,probability,label")
    right = sum(line.split(",")[2] == line.split(",")[4] for line in lines[1:])
    assert f"({right} of 12 images" in outcome.err
    assert all(word.split()[1] in ("cat", "dog") for word in outcome.out.splitlines())
    fails(tofu("predict", "run", "no-such-folder", "--output=found.txt"), "output='found.txt'", ".csv or .json")
    fails(tofu("predict", "run", "no-such-folder", "--output=no/found.csv"), "output='no/found.csv'", "existing folder")
    (tmp_path / "data" / "cat" / "broken.png").write_bytes(b"no image")
    outcome = tofu("predict", "run", "data")
    assert "broken.png cannot be read as an image: unknown format; it is left out" in outcome.err
    assert f"({right} of 12 images" in outcome.err
    fails(tofu("predict", "run", "data/cat/broken.png"), "unknown format")
    first, again = (tofu("predict", name, "data", "--json").out for name in ("first", "run"))
    assert [row["name"] for row in json.loads(first)] == [row["name"] for row in json.loads(again)]


def test_predict_names_the_argument_that_is_no_run(tofu: Tofu) -> None:
    fails(tofu("predict", "nosuch", "data"), "run='nosuch' is not usable: expected the folder of a run")


def test_a_fast_dev_run_refuses_more_clients_than_there_are_images_for(tofu: Tofu) -> None:
    outcome = tofu("run", "--fast-dev-run", "--clients=2000")
    fails(outcome, "clients=2000", "the number of training images")


def test_a_fast_dev_run_goes_through_every_kind_of_round_and_keeps_nothing(tofu: Tofu, tmp_path: Path) -> None:
    outcome = tofu("run", "--fast-dev-run", "--schedule=switch", "--rounds=500", "--local-epochs=50")
    assert (outcome.status, outcome.out.splitlines()[-1]) == (0, "fast dev run: every step works; nothing was kept")
    for words in ("2 rounds, 3 clients", "1/2  compressed", "round 2/2  secure", "resumes after round 2", "round 4/4"):
        assert words in outcome.err
    assert "results:" not in outcome.err  # they are in a temporary folder
    assert list(tmp_path.iterdir()) == []


def test_attack_help_tells_the_defaults_of_an_evaluation(tofu: Tofu) -> None:
    text = " ".join(tofu("attack", "--help").out.replace("│", " ").split())
    for field in dataclasses.fields(AttackEvaluation):
        default: Any = field.default
        if field.name != "know_labels":
            shown = (
                ",".join(map(str, default))
                if isinstance(default, tuple)
                else f"{default:g}"
                if field.name in ("lr", "seconds")
                else str(default)
            )
            assert f"--{field.name.replace('_', '-')}" in text
            assert f"(default: {shown}" in text.replace(", ", ",").replace("- ", "-"), field.name
    assert ",".join(ATTACKS) in text


def test_doctor_names_each_package_of_each_extra_that_users_install(monkeypatch: pytest.MonkeyPatch) -> None:
    doctor: Any = importlib.import_module("tofu.cli.doctor")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor._EXTRAS) == set(extras) - {"all", "trackers", "bench", "dev", "docs", "examples"}
    assert {"torchmetrics"} == set(doctor._packages_of("tofu-fl", "attacks"))
    assert {"ray"} == set(doctor._packages_of("tofu-fl", "simulation"))  # an extra of Flower

    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", missing)
    with pytest.raises(doctor._Note, match=r"needed for tofu attack.*: pip install 'tofu-fl\[attacks\]'"):
        doctor._optional("torchmetrics", "attacks")


def test_doctor(tofu: Tofu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = tofu("doctor")
    assert outcome.status == 0
    assert not re.findall(r"(?m)^ok .*(?:Error|fails|cannot).*$", outcome.out)
    assert re.search(r"ok +encode +an update of [\d,]+ bytes as ", outcome.out)
    monkeypatch.setattr(sys.modules["tofu.cli.doctor"], "_MIN_DISK", 10**18)
    monkeypatch.setattr("deploy.processes._BIN", tmp_path)
    (tmp_path / "ends_the_process.py").write_text("import os, sys; print('bad extension', file=sys.stderr); os.abort()")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setattr(sys.modules["tofu.cli.doctor"], "_TORCHVISION", "ends_the_process")
    outcome = tofu("doctor")
    assert outcome.status == 1
    assert re.search(r"problem +torchvision +\S+ cannot be imported: bad extension; install torch", outcome.out)
    assert re.search(r"problem +flower commands +.*flower-superlink is missing: pip install", outcome.out)
    assert re.search(r"problem +disk +.* free, expected at least", outcome.out)


def test_doctor_tells_that_only_the_library_can_import_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    doctor = importlib.import_module("tofu.cli.doctor")
    assert doctor._import_error("json") == ""
    assert doctor._import_error("tofu.nosuch") == "ModuleNotFoundError: No module named 'tofu.nosuch'"
    errors = {doctor._TORCHVISION: "", "torchvision": "RuntimeError: no nms"}
    monkeypatch.setattr(doctor, "_import_error", errors.get)
    with pytest.raises(doctor._Note, match=r"0.28 works for every .* in your own files .* may end in RuntimeError: no"):
        doctor._imported_elsewhere("0.28")


def test_plan_estimates_time_without_what_only_a_run_needs(tmp_path: Path) -> None:
    code = (
        "import sys, json, io; sys.argv = ['tofu', 'plan', '--json']\n"
        "from tofu.cli import main\n"
        "sys.stdout = io.StringIO()\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "found = json.loads(sys.stdout.getvalue())\n"
        "assert found['training_seconds'] > 0 and found['encoding_seconds'] > 0, found\n"
        "heavy = {'ray', 'sklearn', 'torchvision', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_report_has_both_directions_and_times_and_real_images_only_if_asked(tofu: Tofu, tmp_path: Path) -> None:
    tofu("run", *TINY, "--run-folder=run", "--train-images=100", "--correction=0")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Real images" not in page
    assert "<h2>Decoded proxies</h2>" in page
    assert re.search(r"Both directions: <b>[\d.]+ kB</b>, [\d.]+x less than FedAvg\.", page)
    found = re.search(
        r"Training ([\d.]+) s, Encoding ([\d.]+) s, Others and server ([\d.]+) s, Before and after ([\d.]+) s", page
    )
    assert found
    records = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    encoded = sum(one["encode_seconds"] for record in records for one in record.get("by_client", ()))
    assert f" and encoded for {format_seconds(encoded)}." in page
    whole = json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"]
    assert sum(map(float, found.groups())) == pytest.approx(whole, abs=0.5)
    with np.load(tmp_path / "run" / "samples.npz") as samples:
        assert "real" not in samples.files
    tofu("run", *TINY, "--run-folder=asked", "--train-images=100", "--correction=0", "--report-images")
    assert "<h2>Real images and decoded proxies</h2>" in (tmp_path / "asked" / "report.html").read_text()


def test_the_former_name_of_pretrain_rounds_is_accepted_with_a_warning(tofu: Tofu) -> None:
    outcome = tofu("attack", "--moments=x")
    assert outcome.status == 2
    assert outcome.err.startswith(
        "warning: setting moments is deprecated: use pretrain-rounds\nerror: pretrain-rounds='x'"
    )


def test_a_run_whose_streams_are_closed_ends_like_another(tmp_path: Path) -> None:
    """As started by a job scheduler; files of the run must not get the descriptors of the streams."""
    options = "--clients 2 --rounds 1 --schedule fedavg --local-epochs 1 --train-images 20 --test-images 20"
    command = f"exec {sys.executable} -m tofu.cli run {options} --run-folder run <&- >&- 2>&-"
    run(["sh", "-c", command], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 1
    for path in (tmp_path / "run").glob("*.json"):
        json.loads(path.read_text())


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "log", "said"), [(_Terminal, "text", 1), (_Terminal, "json", 0), (io.StringIO, "text", 0)]
)
def test_a_terminal_shows_something_before_torch_and_the_data_are_loaded(
    stream: type[io.StringIO], log: str, said: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", shown := stream())
    empty = Settings.of({"dataset": str(tmp_path), "run_folder": str(tmp_path / "run"), "log": log})
    with pytest.raises(TofuError):
        run_settings(empty, quiet=False)
    assert shown.getvalue().count("loading torch, Flower and the data\n") == said
