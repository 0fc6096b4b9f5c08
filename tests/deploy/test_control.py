"""The operator's command while the SuperLink is slow: a stand-in for `flwr` answers late, or never."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy import control
from deploy.certificates import make_certificates
from deploy.control import Control, NoAnswerError

FLWR = """#!/bin/sh
echo "$1" >> asked
case $1 in
    run) echo started run 7 ;;
    ls) [ "$(grep -c ls asked)" -gt {late} ] || exec sleep 30
        sleep {seconds}
        echo '{{"success": true, "runs": [{{"status": "finished:completed", "status-details": "",
            "network-traffic": {{"total-bytes": 5}}}}]}}' ;;
    *) echo '{{"success": true}}' ;;
esac
"""


@pytest.fixture
def superlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Control:
    monkeypatch.setattr(control, "_BIN", tmp_path)
    monkeypatch.setattr(control, "_COMMAND_SECONDS", 0.5)
    monkeypatch.setattr(control, "_RESTART_SECONDS", 2.0)
    monkeypatch.setattr(control, "load_factor", lambda: 1.0)
    return Control(tmp_path / "control", "127.0.0.1:1", make_certificates(tmp_path / "keys", ["127.0.0.1"]).ca)


@pytest.mark.parametrize("late", [1, 1000])
def test_a_run_whose_superlink_answers_late_goes_on(superlink: Control, tmp_path: Path, late: int) -> None:
    (tmp_path / "flwr").write_text(FLWR.format(late=late, seconds=0))
    (tmp_path / "flwr").chmod(0o700)
    seen: list[str] = []
    if late == 1:
        assert superlink.run(None, {}, follow=seen.append).completed
        assert seen == ["started run 7", "the SuperLink does not answer; waiting 2 s for it"]
    else:
        with pytest.raises(NoAnswerError, match=r"no answer after 0\.5 s; the list of runs says whether run 7 went on"):
            superlink.run(None, {})
    assert "stop" not in (tmp_path / "control" / "asked").read_text()


def test_a_busy_machine_gets_more_time(superlink: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "load_factor", lambda: 200.0)
    (tmp_path / "flwr").write_text(FLWR.format(late=0, seconds=1))  # twice the limit of an idle machine
    (tmp_path / "flwr").chmod(0o700)
    seen: list[str] = []
    assert superlink.run(None, {}, follow=seen.append).completed
    assert seen == ["started run 7"]


def test_runs_that_are_started_at_the_same_time_keep_their_own_settings(
    superlink: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run's settings took the place of the first one's before it had read them."""
    monkeypatch.setattr(control, "_COMMAND_SECONDS", 60.0)
    script = FLWR.format(late=0, seconds=0).replace("started run 7", "$(sleep 1; cat $6) started run 7")
    (tmp_path / "flwr").write_text(script)
    (tmp_path / "flwr").chmod(0o700)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(superlink.run, None, {"rounds": 1})
        time.sleep(0.5)
        second = threads.submit(superlink.run, None, {"rounds": 2})
        logs = [first.result().log, second.result().log]
    assert [log.split(" started")[0] for log in logs] == ['"rounds" = 1', '"rounds" = 2']
    assert not list((tmp_path / "control").glob("run*.toml"))
