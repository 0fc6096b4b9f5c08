"""A whole evaluation: resumed, judged by its control, reported; and the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attacks.conclusions import conclusions, missing_attacks
from attacks.evaluate import AttackEvaluation, evaluate, finished, summarize, verdicts
from attacks.report import READING, print_tables, remarks, write_report
from attacks.trials import Scenario, drawn_clients, trained_network
from tests.attacks.conftest import attack_command
from tofu.errors import DataError, SettingError
from tofu.weights import weights_sha256

SMALL = AttackEvaluation(
    messages=("exact", "secure:2"),
    attacks=("idlg", "analytic", "label-counts"),
    batch_sizes=(2,),
    seeds=2,
    seconds=3600.0,
)


def test_an_evaluation_is_resumed_and_reported(tmp_path: Path) -> None:
    logged: list[str] = []
    rows = evaluate(SMALL, tmp_path, log=logged.append)
    assert len(rows) == len(logged) == 12
    again: list[str] = []
    assert evaluate(SMALL, tmp_path, log=again.append) == rows
    assert not again
    (damaged,) = list((tmp_path / "trials").glob("*.json"))[:1]
    damaged.write_text("{")
    evaluate(replace(SMALL, seeds=1), tmp_path, log=again.append)
    evaluate(SMALL, tmp_path, log=again.append)
    assert len(again) == 1

    (verdict,) = verdicts(rows)
    assert verdict["broke"]
    control, summed = summarize(rows)
    assert (control["message"], control["attack"], control["seeds"]) == ("exact", "idlg", 2)
    assert control["psnr"][0] > 30
    assert (summed["message"], summed["recovered"][0]) == ("secure:2", 1)
    # Stopped early: an attack that lacks a seed is not compared with one that has all.
    lucky = next(row for row in rows if (row["message"], row["attack"], row["seed"]) == ("exact", "idlg", 0))
    short = [row for row in rows if row["message"] == "exact"] + [lucky | {"attack": "dlg", "psnr": 99.0}]
    assert [entry["attack"] for entry in summarize(short)] == ["idlg"]
    document = json.loads((tmp_path / "attacks.json").read_text())
    assert (document["planned"], document["finished"], len(document["rows"])) == (12, 12, 12)

    page = write_report(rows, tmp_path).read_text()
    assert READING in page
    assert "analytic on exact, secure:2: the network does not begin with a linear layer" in page
    assert "data:image/png;base64," in page
    with np.load(tmp_path / rows[0]["images"]) as arrays:
        assert arrays["originals"].shape == arrays["reconstructions"].shape == (2, 1, 8, 8)


def test_a_control_that_does_not_break_says_that_the_rest_proves_nothing(tmp_path: Path) -> None:
    rows = evaluate(replace(SMALL, attacks=("label-counts", "proxy-images"), seeds=1), tmp_path, log=lambda _: None)
    (verdict,) = verdicts(rows)
    assert not verdict["broke"]
    assert "prove nothing" in verdict["text"]
    assert "prove nothing" in write_report(rows, tmp_path).read_text()


def test_messages_without_a_control_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attacked = evaluate(replace(SMALL, attacks=("idlg",), seeds=1), tmp_path, log=lambda _: None)
    rows = [row for row in attacked if row["message"] != "exact"]  # as in recordings of a Flower app's sums
    (verdict,) = verdicts(rows)
    assert (verdict["broke"], verdict["psnr"]) == (False, None)
    page = write_report(rows, tmp_path).read_text()
    print_tables(rows)
    for text in (page, capsys.readouterr().out):
        assert "secure:2" in text
        assert "the exact update is not known: low figures prove nothing here" in text
        assert f"{rows[0]['psnr']:.1f}" in text
        assert " ± " not in text  # of one seed
    lead = "Nothing can be concluded: no attack inverted an exact update (at most 9.0 dB, 30 needed)."
    assert lead in write_report([row | {"psnr": 9.0} for row in attacked], tmp_path).read_text()
    assert "no attack inverted an exact update" not in write_report(attacked, tmp_path).read_text()


def test_smooth_mode_leaking_more_is_said() -> None:
    entries = [
        {"message": f"proxy:{mode}:50", "psnr": (psnr, 0.0)} for mode, psnr in (("smooth", 21.0), ("paper", 9.0))
    ]
    (remark,) = remarks(entries)
    assert remark.startswith("At ratio 50 smooth mode leaks more than paper mode: it encodes the update better")
    entries[0]["psnr"] = (8.0, 0.0)
    assert remarks(entries) == ["At ratio 50 smooth mode leaks no more than paper mode (8.0 against 9.0 dB)."]


def test_the_page_escapes_everything(tmp_path: Path) -> None:
    rows = evaluate(replace(SMALL, seeds=1, attacks=("label-counts",)), tmp_path, log=lambda _: None)
    page = write_report([row | {"model": "<script>alert(1)</script>"} for row in rows], tmp_path).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_time_limit_leaves_cells_for_later(tmp_path: Path) -> None:
    rows = evaluate(SMALL, tmp_path, log=lambda _: None, seconds=0)
    assert {row["not_started"] for row in rows} == {"time limit"}
    assert summarize(rows) == []
    assert json.loads((tmp_path / "attacks.json").read_text())["finished"] == 0


def test_attacks_that_were_not_started_are_marked_and_nothing_follows_from_their_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = replace(SMALL, attacks=("label-counts", "idlg"), messages=("exact", "proxy:smooth:20"), seeds=1)
    done = evaluate(few, tmp_path, log=lambda _: None)
    for path in (tmp_path / "trials").glob("*.json"):
        row = json.loads(path.read_text())
        if (row["message"], row["attack"]) == ("proxy:smooth:20", "idlg"):
            path.unlink()
    rows = evaluate(few, tmp_path, log=lambda _: None, seconds=0)
    assert len(rows) == len(done)
    assert finished(rows) == done[:3]
    document = json.loads((tmp_path / "attacks.json").read_text())
    assert (document["planned"], document["finished"]) == (4, 3)
    page = write_report(rows, tmp_path).read_text()
    print_tables(rows)
    for text in (page, capsys.readouterr().out):
        assert "1 of 4 attacks was not started (time limit): the same command continues." in text
        assert "(1 attack not run)" in text
        assert " so far (guess" in text or " so far |" in text or " so far</td>" in text
        assert "of the labels were read so far, from proxy:smooth:20" in text
        assert "no image came back from another message" not in text
        assert "Whether images come back from other messages is not known yet." in text
    assert missing_attacks(done) == ""
    # The control itself lacks an attack.
    first = [row for row in done if row["attack"] == "label-counts"]
    lacking = [*first, rows[3], rows[3] | {"message": "exact"}]
    (verdict,) = verdicts(lacking)
    assert verdict["text"].startswith("the control did not break so far, and 1 attack on it did not run")
    assert conclusions(summarize(lacking), [verdict])[0].startswith("Nothing can be concluded yet: attacks on the")
    half = conclusions(summarize(lacking), [verdict, *verdicts(rows)])
    assert not any(text.startswith("No exact update was inverted") for text in half)


def test_situations_are_reproducible_and_spread_labels() -> None:
    scenario = Scenario("digits", "mlp", "group", 0.1, 1, 1, 10, 1)
    (client,) = drawn_clients(scenario, 1)
    assert len(set(client.labels.tolist())) == 10
    one, two = (weights_sha256(trained_network(scenario).base) for _ in range(2))
    assert one == two
    assert one != weights_sha256(trained_network(replace(scenario, pretrain_rounds=0)).base)
    with pytest.raises(DataError, match="a batch takes 1000"):
        drawn_clients(replace(scenario, batch_size=1000), 1)


@pytest.mark.parametrize(
    "change",
    [{"messages": ("topk:10",)}, {"attacks": ("x",)}, {"batch_sizes": (0,)}, {"batch_sizes": ()},
     {"pretrain_rounds": (-1,)}, {"seeds": 0}, {"lr": float("nan")}, {"seconds": 0.0}],
)  # fmt: skip
def test_what_cannot_be_run_is_one_line(change: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        replace(SMALL, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--messages", "foo"], "messages='foo' is not usable"),
        (["--batch-sizes", "1,x"], "batch-sizes='1,x' is not usable"),
        (["--attacks", "ddlg"], "attacks='ddlg' is not usable"),
        (["--model", "nonet"], "model='nonet' is not usable"),
        (["--dataset", "no/such/folder/here"], "no/such/folder/here"),
        (["--messages", "exact,proxy:smooth:1000000"], "ratio="),
        (["no-such-run"], "no-such-run does not exist"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attack_command([*arguments, "--folder", str(tmp_path / "out"), "--quiet", "--seeds", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--messages", "exact", "--batch-sizes", "1", "--seeds", "1", "--seconds", "3600"]
    assert attack_command([*arguments, "--attacks", "idlg", "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "the control broke" in printed.out
    assert "| exact" in printed.out
    assert "report.html" in printed.out
    assert "1/1 seed 0" in printed.err


def test_what_follows_is_said_for_who_must_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = evaluate(replace(SMALL, seeds=1), tmp_path, log=lambda _: None)
    summary, found = summarize(rows), verdicts(rows)
    came, labels, noise = conclusions(summary, found)
    assert came.startswith("Images came back from secure:2:")
    right, guess = (f"{100 * summary[1][name][0]:.0f}%" for name in ("labels", "labels_guess"))
    assert labels == (f"Up to {right} of the labels were read, from secure:2; "
                      f"guessing equally many of each class gets {guess}.")  # fmt: skip
    assert "noise-multiplier" in noise
    perhaps = [entry | {"recovered": (0.25, 0.0), "psnr": (9.0, 0.0), "chance": 0.3} for entry in summary]
    assert conclusions(perhaps, found)[0].startswith("Whether images came back from secure:2 is open")
    hidden = [entry | {"recovered": (0.0, 0.0)} for entry in summary]
    assert conclusions(hidden, found)[0].startswith("The exact update was inverted, and no image came back")
    silent = [verdict | {"broke": False} for verdict in found]
    nothing = conclusions(hidden, silent)[0]
    assert nothing.startswith("Nothing can be concluded: not even the exact update was inverted")
    assert "attack a message of a client with few images in few local steps, which is easier to invert" in nothing
    of_run = conclusions(hidden, silent, "tofu run --rounds 2 && tofu attack runs/few")[0]
    assert of_run.endswith("make an update easier to invert): tofu run --rounds 2 && tofu attack runs/few")
    unknown = [verdict | {"broke": False, "psnr": None} for verdict in found]  # of an app that was recorded
    assert conclusions(hidden, unknown)[0].startswith("Nothing can be concluded: no exact update was attacked, so")
    half = conclusions(hidden, [*found, *silent])
    assert any(text.startswith("No exact update was inverted in 1 of 2 tables") for text in half)
    assert conclusions(summary, silent)[1].startswith("No exact update was inverted in 1 of 1 tables")
    assert len(conclusions([], [])) == 1
    page = write_report(rows, tmp_path).read_text()
    print_tables(rows)
    for text in (page, capsys.readouterr().out):
        assert came in text


def test_an_attack_that_the_time_limit_stopped_is_named_and_repeated_with_more_time(tmp_path: Path) -> None:
    logged: list[str] = []
    few = replace(SMALL, attacks=("idlg", "label-counts"), seeds=1)
    rows = evaluate(replace(few, seconds=1e-9), tmp_path, log=logged.append)
    assert {row["stopped_after"] for row in rows if row["attack"] == "idlg"} == {1e-9}
    assert {row["stopped_after"] for row in rows if row["attack"] == "label-counts"} == {None}
    assert "(stopped after 1e-09 s)" in logged[0]
    assert any(
        text.startswith("The time limit stopped 2 of 4 attacks")
        for text in conclusions(summarize(rows), verdicts(rows))
    )
    stopped = len(logged)
    assert evaluate(replace(few, seconds=1e-10), tmp_path, log=logged.append) == rows
    assert len(logged) == stopped
    again = evaluate(few, tmp_path, log=logged.append)
    assert len(logged) == stopped + 2
    assert all(row["stopped_after"] is None for row in again)
    assert not any("time limit" in text for text in conclusions(summarize(again), verdicts(again)))
