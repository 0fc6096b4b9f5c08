"""Both directions compressed: runs are kept and read again, and the table compares with FedAvg of the same seed."""

from pathlib import Path

import pytest

from benchmarks import downlink
from benchmarks.downlink import one_run, table_rows


def test_a_run_is_kept_and_both_directions_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(downlink.CASES, "mnist", {"dataset": "digits", "model": "lenet5", "clients": 2})
    monkeypatch.setitem(downlink.COMMON, "rounds", 2)
    rows = [one_run("mnist", method, down, 0, tmp_path) for method, down in (("fedavg", 0), ("stc", 50))]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert rows == [one_run("mnist", method, down, 0, tmp_path) for method, down in (("fedavg", 0), ("stc", 50))]
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    fedavg, stc = rows
    assert stc["uplink_bytes"] < fedavg["uplink_bytes"] / 50
    assert stc["downlink_bytes"] < fedavg["downlink_bytes"]
    first, second = table_rows(rows)
    assert first[:3] == ("mnist", "fedavg", "")
    assert second[:3] == ("mnist", "stc", "50x")
    lost = 100 * (fedavg["final_accuracy"] - stc["final_accuracy"])
    assert second[4] == f"{lost:.2f}"


def test_an_interrupted_run_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(downlink.CASES, "mnist", {"dataset": "digits", "model": "lenet5", "clients": 2})
    monkeypatch.setitem(downlink.COMMON, "rounds", 1)
    left = tmp_path / "mnist" / "fedavg-0x-0"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    assert one_run("mnist", "fedavg", 0, 0, tmp_path)["final_accuracy"] > 0
