"""A recorded run under attack, scored against the client's own images."""

import json
import re
import shutil
from pathlib import Path

import pytest

from attacks import evaluate
from attacks.base import AttackError
from attacks.messages import local_round
from attacks.recorded import attack_run, attacked_rounds, observation_of
from attacks.trials import AttackResult
from tests.attacks.conftest import attack_command
from tofu.compression import uplink_compressor
from tofu.data import open_data
from tofu.errors import PayloadError, RunError
from tofu.models import build_model
from tofu.recording import Recorder, read_recording, recordings
from tofu.reference_model import ReferenceModel
from tofu.rng import derive_generator
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig
from tofu.weights import add_update, fingerprint, weights_of
from tofu.wire import Payload

SETTINGS = Settings.of({"clients": 100, "local_epochs": 1, "batch_size": 16, "rounds": 2, "ratio": 50.0})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two rounds of one client with some 14 images, recorded as a server would."""
    data = open_data("digits", clients=100, partition="dirichlet", alpha=0.5, seed=0)
    model = build_model("mlp", data.shape, seed=0)
    network = ReferenceModel(model.eval(), data.shape).as_built()
    recorder = Recorder(tmp_path, ["4"], settings=SETTINGS, shape=data.shape)
    for round_ in (1, 2):
        base = weights_of(model.eval())
        how = LocalTrainingConfig(1, 16, SETTINGS.training.lr_of(round_))
        sent = local_round(network, data.client(4), how, derive_generator(0, round_, "4", "train"))
        compressor = uplink_compressor(SETTINGS, "compressed", network)
        compressed = compressor.compress(network, sent.update, generator=derive_generator(0, round_, "4", "encode"))
        payload = Payload(compressor.code, round_, fingerprint(base), compressed.body).to_bytes()
        recorder.save(round_, "4", kind="compressed", examples=len(data.client(4)), base=base, payload=payload)
        add_update(model, compressed.decoded)
    return tmp_path


def test_many_local_steps_are_told_before_the_attacks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    attack_run(run, run / "one", attacks=("label-counts",), log=lines.append)
    assert not any("seldom" in text for text in lines)  # it has one
    monkeypatch.setattr("attacks.recorded.MANY_STEPS", 0)
    attack_run(run, run / "many", attacks=("label-counts",), log=lines.append)
    (told,) = (text for text in lines if "seldom" in text)
    assert told.startswith("note: a message is the sum of 1 local step, which attacks seldom invert; a run that is")


def test_a_recorded_run_is_attacked_with_its_control(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(run), "--attacks", "analytic,proxy-images,label-counts", "--quiet"]
    assert attack_command(arguments) == 0
    assert "recorded correction" in capsys.readouterr().out
    rows = attack_run(run, run / "attacks", attacks=("analytic", "proxy-images", "label-counts"), log=print)
    assert not capsys.readouterr().out
    assert {(row["pretrain_rounds"], row["message"]) for row in rows} == {
        (rounds, message) for rounds in (0, 1) for message in ("exact", "recorded correction")
    }
    found = {(row["message"], row["attack"]): row for row in rows if row["pretrain_rounds"] == 0}
    assert found["exact", "analytic"]["psnr"] > found["recorded correction", "analytic"]["psnr"]
    assert found["exact", "proxy-images"]["refused"]
    assert found["exact", "label-counts"]["labels"] > 0.7
    assert (run / "attacks" / "report.html").is_file()
    trials = [path.name for path in (run / "attacks" / "trials").glob("*.json")]
    assert len(trials) == 12
    assert all(name.count("-exact-") + name.count("-recorded-") == 1 for name in trials)  # names do not grow


def test_a_time_limit_leaves_attacks_for_later(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(run), "--attacks", "label-counts"]
    assert attack_command([*arguments, "--time-limit", "0"]) == 0
    shown = capsys.readouterr()
    assert "messages: 2; attacks on each and on its exact update: 1; at most 1 min" in shown.err
    assert "- 4 of 4 attacks were not started (time limit): the same command continues." in shown.out
    document = json.loads((run / "attacks" / "attacks.json").read_text())
    assert (document["planned"], document["finished"]) == (4, 0)
    assert attack_command([*arguments, "--quiet"]) == 0
    assert json.loads((run / "attacks" / "attacks.json").read_text())["finished"] == 4


def test_a_longer_time_limit_repeats_what_a_shorter_one_stopped(run: Path) -> None:
    logged: list[str] = []
    options = {"attacks": ("idlg", "label-counts"), "rounds": 1}
    first = attack_run(run, run / "out", seconds=1e-9, log=logged.append, **options)
    assert [row["stopped_after"] for row in first if not row["refused"]].count(1e-9) >= 1
    # What a limit stopped before is shown until it is repeated.
    assert attack_run(run, run / "out", seconds=1e9, time_limit=0, log=logged.append, **options) == first
    made = {path: path.stat().st_mtime_ns for path in (run / "out" / "trials").glob("*.json")}
    second = attack_run(run, run / "out", seconds=1e9, log=logged.append, **options)
    assert all(row["stopped_after"] is None for row in second)
    changed = {path.name for path in made if path.stat().st_mtime_ns != made[path]}
    assert len(changed) == len([row for row in first if row["stopped_after"] is not None])


@pytest.mark.parametrize("option", ["--messages=exact", "--seeds=2", "--batch-sizes=1", "--lr=0.5", "--know-labels"])
def test_options_of_made_messages_are_refused_with_a_run(
    run: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attack_command([str(run), "--attacks", "label-counts", option]) == 2
    assert re.search(r"error: [a-z-]+=.* expected a command without a recorded run", capsys.readouterr().err)


def test_some_rounds_of_a_long_run_are_attacked_unless_all_are_asked_for(run: Path) -> None:
    for round_ in range(3, 12):
        shutil.copytree(run / "record" / "round-0002-client-4", run / "record" / f"round-{round_:04d}-client-4")
    assert attacked_rounds(run, 3) == [1, 6, 11]
    assert attacked_rounds(run, 1) == [1]
    assert attacked_rounds(run, 2) == [1, 11]
    assert attacked_rounds(run, 11) == attacked_rounds(run, 500) == list(range(1, 12))


def test_only_the_chosen_rounds_are_attacked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attack_command([str(run), "--attacks", "label-counts", "--recorded-rounds", "1"]) == 0
    shown = capsys.readouterr().err
    assert "messages: 1 of 2, from rounds 1; attacks on each and on its exact update: 1" in shown
    assert "round 1 client 4 exact label-counts: labels" in shown
    rows = json.loads((run / "attacks" / "attacks.json").read_text())["rows"]
    assert {row["pretrain_rounds"] for row in rows} == {0}
    assert attack_command([str(run), "--attacks", "label-counts", "--recorded-rounds", "0"]) == 2


def test_ctrl_c_leaves_a_report_of_the_attacks_that_had_ended(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = evaluate.save_row

    def interrupt(path: Path, row: evaluate.Row, result: AttackResult) -> None:
        if "round-0002" in path.name:
            raise KeyboardInterrupt
        made(path, row, result)

    monkeypatch.setattr("attacks.recorded.save_row", interrupt)
    assert attack_command([str(run), "--attacks", "label-counts", "--quiet"]) == 130
    page = run / "attacks" / "report.html"
    assert capsys.readouterr().err == (
        f"interrupted; the report of 2 attacks is {page}; the same command goes on from here\n"
    )
    assert "1 round before the attack" not in page.read_text()
    assert "2 of 4 attacks were not started (Ctrl-C): the same command continues." in page.read_text()
    monkeypatch.undo()
    assert attack_command([str(run), "--attacks", "label-counts", "--quiet"]) == 0
    assert len(json.loads((run / "attacks" / "attacks.json").read_text())["rows"]) == 4


def test_later_rounds_come_with_the_earlier(run: Path) -> None:
    rows = attack_run(run, run / "out", attacks=("accumulation",), seconds=1, log=lambda _: None)
    assert [bool(row["refused"]) for row in rows] == [True, True, False, False]


def test_a_model_that_the_message_was_not_made_for(run: Path) -> None:
    first = recordings(run)[0]
    text = (first / "record.json").read_text()
    (first / "record.json").write_text(text.replace('"model": "mlp"', '"model": "lenet5"'))
    with pytest.raises(AttackError, match="are not those of model='lenet5'"):
        observation_of(read_recording(first))
    (first / "record.json").write_text(text.replace('"codec-mode": "smooth"', '"codec-mode": "paper"'))
    with pytest.raises(PayloadError):
        observation_of(read_recording(first))
    (first / "record.json").write_text(text.replace('"height": 8', '"height": 9'))
    with pytest.raises((AttackError, RunError)):
        attack_run(run, run / "out", log=print)
