"""The live view, the plain lines and the choice between them."""

import dataclasses
import io
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tofu.formatting import format_bytes, format_factor, format_fraction, format_seconds, printable
from tofu.observers.base import Observer, Observers
from tofu.observers.terminal import LiveProgress, PlainProgress, make_progress
from tofu.rounds.record import RoundRecord, RunSummary

SUMMARY = RunSummary(final_accuracy=0.9473, uplink_bytes=2_550_000, fedavg_uplink_bytes=7_500_000, seconds=125.0)


def row(number: int, **changes: Any) -> RoundRecord:
    values = {
        "round": number,
        "kind": "compressed" if number else "start",
        "accuracy": 0.8 + number / 100,
        "explained_variance": 0.71 if number else None,
        "uplink_bytes": 25_000 if number else 0,
        "fedavg_uplink_bytes": 2_500_000 if number else 0,
        "seconds": 3.2,
    }
    return RoundRecord(**values | changes)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that stands still until told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(screen: io.StringIO, clock: Clock) -> Iterator[LiveProgress]:
    with LiveProgress(Console(force_terminal=True, file=screen, width=100), clock=clock) as progress:
        yield progress


def shown(screen: io.StringIO) -> str:
    """What was written, without the sequences that color it and move the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def test_one_is_not_written_as_many(screen: io.StringIO) -> None:
    with PlainProgress(screen) as progress:
        progress.on_run_start(1, 1, "digits, mlp")
        progress.on_run_start(2000, 1, "digits, mlp")
    assert screen.getvalue().splitlines() == ["digits, mlp: 1 round, 1 client", "digits, mlp: 2,000 rounds, 1 client"]


def test_plain_writes_one_line_a_round(screen: io.StringIO) -> None:
    with PlainProgress(screen) as progress:
        progress.on_run_start(12, 10, "digits, lenet5")
        progress.on_phase(1, "compressed", "train", 3, 10)
        progress.on_round_end(row(0))
        progress.on_round_end(row(1))
        progress.on_round_end(row(12, kind="secure", explained_variance=None, uplink_bytes=2_500_000))
        progress.on_run_end(SUMMARY)
    assert screen.getvalue().splitlines() == [
        "digits, lenet5: 12 rounds, 10 clients",
        "round  0/12  start       accuracy 80.00%  3.2 s",
        "round  1/12  compressed  accuracy 81.00%  explained  71.0%  uplink  25.0 kB (FedAvg: 100x as much)  3.2 s",
        "round 12/12  secure      accuracy 92.00%  uplink   2.5 MB  3.2 s",
        "done: final accuracy 94.73%; uplink 2.5 MB, 2.94x less than the 7.5 MB FedAvg sends; 2 min 05 s",
    ]


@pytest.mark.parametrize(
    ("uplink", "expected"),
    [
        (7_500_000, "uplink 7.5 MB, as much as the 7.5 MB FedAvg sends"),
        (7_520_000, "uplink 7.5 MB, as much as the 7.5 MB FedAvg sends"),
        (15_000_000, "uplink 15.0 MB, 2.00x more than the 7.5 MB FedAvg sends"),
    ],
)
def test_the_last_line_says_less_more_or_as_much(screen: io.StringIO, uplink: int, expected: str) -> None:
    with PlainProgress(screen) as progress:
        progress.on_run_end(dataclasses.replace(SUMMARY, uplink_bytes=uplink))
    assert expected in screen.getvalue()


def test_a_round_shows_the_epsilon_that_is_bounded(screen: io.StringIO) -> None:
    with PlainProgress(screen) as progress:
        progress.on_round_end(row(1, epsilon=4.5))
        progress.on_round_end(row(2, epsilon=4.5, model_epsilon=1.5))  # secret sampling
        progress.on_round_end(row(3, epsilon=math.inf, model_epsilon=1.5))  # noise of the server
        progress.on_round_end(row(4, epsilon=math.inf))
    found = re.findall(r"epsilon +(.+?)  ", screen.getvalue())
    assert found == ["4.5", "4.5", "1.5 (models)", "inf"]


def test_rounds_without_accuracy_have_their_loss(screen: io.StringIO) -> None:
    with PlainProgress(screen) as progress:
        progress.on_run_start(2, 10, "vectors")
        progress.on_round_end(row(1, accuracy=None, loss=0.25, explained_variance=None, uplink_bytes=0))
        progress.on_round_end(row(2, accuracy=None, train_loss=0.125, explained_variance=None, uplink_bytes=0))
        progress.on_run_end(RunSummary())
    assert screen.getvalue().splitlines()[1:] == [
        "round 1/2  compressed  test loss 0.25  3.2 s",
        "round 2/2  compressed  training loss 0.125  3.2 s",
        "done: final training loss 0.125",
    ]


def test_the_notes_on_settings_come_before_the_first_round(screen: io.StringIO, tmp_path: Path) -> None:
    progress = make_progress(screen, notes=["alpha=0.5 has no effect"])
    progress.on_history(tmp_path, ())
    assert screen.getvalue().splitlines() == [f"results: {tmp_path}", "note: alpha=0.5 has no effect"]


@pytest.mark.parametrize(
    ("sent", "line"),
    [
        ((1, 3), "4 of 20 updates came as proxies, the others as a sparse correction alone"),
        ((0, 0), "none of 20 updates came as proxies: the sparse correction alone explained enough"),
        ((10, 10), "20 of 20 updates came as proxies"),
        ((None, None), ""),
    ],
)
def test_the_end_tells_how_many_updates_had_proxies(
    screen: io.StringIO, sent: tuple[int | None, ...], line: str
) -> None:
    """Those of rounds before a resume are counted, too."""
    before, after = (row(number, with_proxies=count, clients=10) for number, count in enumerate(sent, start=1))
    live = io.StringIO()
    for progress in (PlainProgress(screen), LiveProgress(Console(file=live, width=200))):
        progress.on_history(Path("run"), [row(0), before])
        progress.on_run_start(2, 10, "digits")
        progress.on_round_end(after)
        progress.on_run_end(SUMMARY)
    for text in (screen.getvalue(), live.getvalue()):
        assert line in text
        assert ("came as proxies" in text) == bool(line)


def test_plain_names_failures_and_cuts_a_long_list(screen: io.StringIO) -> None:
    progress = PlainProgress(screen)
    for round_ in (4, 5):
        for client in range(5):
            progress.on_client_failure(round_, f"{client}", 100 + client, "timed out")
        progress.on_round_end(row(round_))
    lines = screen.getvalue().splitlines()
    assert lines[0] == "note: round 4: client 0: timed out"
    assert lines[3] == "note: round 4: 2 more failures"
    assert lines[5] == "note: round 5: client 0: timed out"
    assert len(lines) == 10


def test_plain_tells_abandoned_rounds_tasks_and_epsilon(screen: io.StringIO) -> None:
    progress = PlainProgress(screen)
    progress.on_run_start(12, 10, "digits")
    sent = {"explained_variance": None, "uplink_bytes": 0}
    progress.on_round_end(row(1, kind="secure", abandoned="too few", epsilon=0.0, **sent))
    progress.on_round_end(row(2, task=1, task_accuracies=(0.9, 0.8), **sent))
    progress.on_round_end(row(3, kind="secure", abandoned="", epsilon=4.3771, **sent))
    progress.on_round_end(row(4, kind="secure", epsilon=math.inf, **sent))
    progress.on_run_end(RunSummary(final_accuracy=0.5, epsilon=8.3849, delta=1e-5))
    progress.on_run_end(RunSummary(mean_accuracy=86.63, backward_transfer=-7.8, epsilon=math.inf, delta=1e-5))
    assert screen.getvalue().splitlines()[1:] == [
        "round  1/12  secure, abandoned  accuracy 81.00%  epsilon     0  3.2 s",
        "round  2/12  compressed  task 1  accuracy 82.00%  3.2 s",
        "round  3/12  secure      accuracy 83.00%  epsilon 4.377  3.2 s",
        "round  4/12  secure      accuracy 84.00%  epsilon   inf  3.2 s",
        "done: final accuracy 50.00%; epsilon 8.385 at delta 1e-05",
        "done: ACC 86.6%, BWT -7.8 points; epsilon inf at delta 1e-05",
    ]


def test_live_view_has_columns_for_tasks_and_epsilon_where_a_run_has_them(
    screen: io.StringIO, live: LiveProgress
) -> None:
    live.on_run_start(4, 4, "digits")
    live.on_round_end(row(1))
    live.close()
    assert not re.search("task|epsilon", shown(screen))
    live.on_run_start(4, 4, "digits")
    live.on_round_end(row(1))
    live.on_round_end(row(2, kind="secure", abandoned="too few", task=3, epsilon=12.8731))
    live.close()
    latest = shown(screen)
    assert re.search(r"round +kind +task +accuracy +variance +uplink +FedAvg +epsilon +time", latest)
    assert re.search(r"1 +compressed +- +81\.00% +71\.0% +25\.0 kB +100x +- +3\.2 s", latest)
    assert re.search(r"2 +secure, abandoned +3 +82\.00% +71\.0% +25\.0 kB +100x +12\.87 +3\.2 s", latest)


def test_nothing_hostile_reaches_the_terminal(screen: io.StringIO, live: LiveProgress) -> None:
    hostile = "\x1b[2J\x07[red]node\n\u202e"
    plain = io.StringIO()
    progress = PlainProgress(plain)
    progress.on_client_failure(1, hostile, 7, hostile)
    progress.on_round_end(row(1, kind="a\nb"))
    assert plain.getvalue().count("\n") == 2
    live.on_run_start(2, 1, hostile)
    live.on_phase(1, hostile, hostile, 0, 1)
    live.on_client_failure(1, hostile, 7, hostile)
    live.on_round_end(row(1, kind=hostile))
    live.close()
    for text in (plain.getvalue(), screen.getvalue()):
        assert "\x1b[2J" not in text
        assert "\x07" not in text
        assert "\u202e" not in text
        assert "[red]node" in text


def test_live_view_shows_phase_and_last_rounds(screen: io.StringIO, live: LiveProgress) -> None:
    live.on_run_start(12, 10, "digits, lenet5")
    assert "\x1b[" in screen.getvalue()
    for number in range(9):
        live.on_round_end(row(number))
    live.on_phase(9, "compressed", "train", 3, 10)
    live._live.refresh()  # type: ignore[union-attr]
    latest = shown(screen).rpartition("digits, lenet5: 12 rounds, 10 clients")[2]
    assert "8/12 rounds" in latest
    assert "round 9 (compressed): clients train 3/10" in latest
    assert [line.split()[0] for line in latest.splitlines() if "compressed " in line] == ["3", "4", "5", "6", "7", "8"]
    assert re.search(r"8 +compressed +88\.00% +71\.0% +25\.0 kB +100x +3\.2 s", latest)


def test_live_view_ends_without_what_was_under_way(screen: io.StringIO, live: LiveProgress) -> None:
    live.on_run_start(2, 10, "digits")
    live.on_round_end(row(1))
    live.on_phase(2, "compressed", "train", 3, 10)
    live.on_run_end(SUMMARY)
    latest = shown(screen).rpartition("digits: 2 rounds, 10 clients")[2]
    assert "clients train" not in latest
    assert " left" not in latest
    assert "final accuracy 94.73%" in latest
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1
    live.close()


def test_live_view_gives_the_terminal_back_after_an_error(screen: io.StringIO) -> None:
    def interrupted() -> None:
        with LiveProgress(Console(force_terminal=True, file=screen)) as progress:
            progress.on_run_start(2, 10, "digits")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "\x1b[?25h" in screen.getvalue()


def test_live_view_leaves_stdout_alone(live: LiveProgress) -> None:
    before = sys.stdout
    live.on_run_start(2, 10, "digits")
    assert sys.stdout is before


def test_time_left_follows_the_last_rounds(live: LiveProgress, clock: Clock) -> None:
    live.on_run_start(10, 10, "digits")
    assert live.seconds_left() is None
    clock.now += 50
    live.on_round_end(row(0))
    assert live.seconds_left() is None
    for number in (1, 2):
        clock.now += 4
        live.on_round_end(row(number))
    assert live.seconds_left() == pytest.approx(32)
    clock.now += 3
    assert live.seconds_left() == pytest.approx(29)
    clock.now += 1000
    assert live.seconds_left() == 0


def test_missing_values_are_shown_as_missing(screen: io.StringIO, live: LiveProgress) -> None:
    plain = io.StringIO()
    live.on_run_start(2, 1, "digits")
    for progress in (PlainProgress(plain), live):
        progress.on_round_end(RoundRecord(1, "fedavg"))
        progress.on_run_end(RunSummary())
    assert plain.getvalue() == "round 1/0  fedavg      accuracy      -\ndone\n"
    assert re.search(r"1 +fedavg +- +- +- +- +-", shown(screen))


def test_choice_follows_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_progress(io.StringIO()), PlainProgress)
    assert isinstance(make_progress(Terminal()), LiveProgress)
    assert type(make_progress(Terminal(), quiet=True)) is Observer
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress(Terminal()), PlainProgress)


@pytest.mark.parametrize("quiet", [False, True])
def test_stdout_stays_empty(capsys: pytest.CaptureFixture[str], quiet: bool) -> None:
    with make_progress(quiet=quiet) as progress:
        progress.on_run_start(1, 1, "digits")
        progress.on_phase(1, "compressed", "send", 0, 1)
        progress.on_note("careful")
        progress.on_round_end(row(1))
        progress.on_run_end(SUMMARY)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == (0 if quiet else 4)


def test_each_event_goes_to_every_observer_in_order() -> None:
    streams = [io.StringIO(), io.StringIO()]
    with Observers([PlainProgress(stream) for stream in streams]) as both:
        both.on_run_start(1, 1, "digits")
        both.on_note("careful")
        both.on_client_failure(1, "0", 7, "late")
        both.on_round_end(row(1))
        both.on_run_end(SUMMARY)
    assert streams[0].getvalue() == streams[1].getvalue()
    assert streams[0].getvalue().count("\n") == 5


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345, "12.3 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB")],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_format_bytes_of_extremes() -> None:
    assert format_bytes(10**19) == "10000.0 PB"
    with pytest.raises(ValueError, match="negative"):
        format_bytes(-1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0 s"),
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3840, "1 h 04 min"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_shares_factors_and_names() -> None:
    assert format_fraction(0.9625) == "96.2%"
    assert format_fraction(0.9625, 2) == "96.25%"
    assert [format_factor(f) for f in (2.136, 9.996, 21.37, 213.6, 1213.7)] == [
        "2.14x",
        "10.0x",
        "21.4x",
        "214x",
        "1,214x",
    ]
    assert printable("a\tb\nc\x1b[1m é") == "a b c?[1m é"
