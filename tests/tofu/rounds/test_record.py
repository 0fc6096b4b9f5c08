"""Records of rounds and runs: what is written is read back, and what does not fit is refused in one line."""

import inspect
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tofu.errors import RunError
from tofu.observers.base import Observer, Observers
from tofu.rounds.record import (
    Baseline,
    ClientRecord,
    Failure,
    RoundRecord,
    RunSummary,
    from_dict,
    read_rounds,
    read_summary,
    to_dict,
)

FULL = RoundRecord(
    3, "compressed", accuracy=0.5, loss=1.5, clients=2, failures=(Failure("1", "late", "7"),), explained_variance=0.7,
    cosine=0.8, uplink_bytes=5, epsilon=2.0, by_client=(ClientRecord("0", "6", 0.7, 30, 0.1, 0.2),),
    plugins={"gpm/rank": 4.0}, task=1, task_accuracies=(0.5, None), clipped=3, largest_clipped=1.5, abandoned="too few",
)  # fmt: skip


@pytest.mark.parametrize("record", [FULL, RoundRecord(0, "start"), RoundRecord(1, "secure", epsilon=math.inf)])
def test_a_round_is_read_back_as_written(record: RoundRecord) -> None:
    text = json.dumps(to_dict(record), allow_nan=False)
    assert from_dict(RoundRecord, json.loads(text), "line 1") == record


def test_a_summary_with_its_baseline_is_read_back_as_written(tmp_path: Path) -> None:
    summary = RunSummary(0.9, 3, 10, weights_sha256="ab", baseline=Baseline((FULL,), 0.95, 100, "runs/fedavg"))
    path = tmp_path / "summary.json"
    assert read_summary(path) is None
    path.write_text(json.dumps(to_dict(summary), allow_nan=False))
    assert read_summary(path) == summary


def test_a_run_without_privacy_has_no_epsilon_and_one_without_a_bound_has_null() -> None:
    assert "epsilon" not in to_dict(RoundRecord(1, "fedavg"))
    assert to_dict(RoundRecord(1, "fedavg", epsilon=math.inf))["epsilon"] is None


def test_values_that_are_not_finite_count_as_not_measured() -> None:
    assert to_dict(RoundRecord(1, "fedavg", loss=math.nan))["loss"] is None
    values = {"round": 1, "kind": "fedavg", "loss": math.inf, "accuracy": 10**400}
    assert from_dict(RoundRecord, values, "line 1") == RoundRecord(1, "fedavg")


def test_the_keys_of_an_older_run_are_read(tmp_path: Path) -> None:
    old: dict[str, Any] = {
        "round": 1, "kind": "secure", "accuracy": 0.2, "loss": None, "clients": 3, "failures": [
            {"client": "2", "reason": "late"}], "explained_variance": None, "cosine": None, "train_loss": 2.0,
        "uplink_bytes": 9, "downlink_bytes": 9, "fedavg_uplink_bytes": 9, "seconds": 1.0, "clipped": 0,
        "largest_clipped": None, "abandoned": "",
    }  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(old) + "\n" + json.dumps(old | {"round": 0}) + '\n{"round": 2, "ki')
    first, second = read_rounds(path)
    assert (first.round, second.round, second.failures) == (0, 1, (Failure("2", "late"),))


def test_an_old_kind_of_round_is_read_by_its_present_name() -> None:
    assert from_dict(RoundRecord, {"round": 1, "kind": "full"}, "line 1") == RoundRecord(1, "fedavg")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surprise": 1}, ("'surprise'", "found 1")),
        ({"clients": True}, ("'clients'", "found True")),
        ({"kind": 7}, ("'kind'", "found 7")),
        (
            {"by_client": [{"client": "0", "explained_variance": "x\ny"}]},
            ("by_client.0.explained_variance", "number"),
        ),
    ],
)
def test_what_does_not_fit_is_one_line_with_file_line_and_field(
    changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(RunError) as caught:
        from_dict(RoundRecord, {"round": 1, "kind": "fedavg"} | changes, "metrics.jsonl line 2")
    assert all(word in str(caught.value) for word in ("metrics.jsonl line 2", *words))
    assert "\n" not in str(caught.value)


def test_a_tracker_is_one_observer(tmp_path: Path) -> None:
    """Everything that an experiment tracker needs arrives through the interface."""

    class Csv(Observer):
        def on_history(self, folder: Path, records: Any) -> None:
            self.path = folder / "accuracy.csv"
            for record in records:
                self.on_round_end(record)

        def on_round_end(self, record: RoundRecord) -> None:
            with self.path.open("a") as file:
                file.write(f"{record.round},{record.accuracy}\n")

    observers = Observers((Observer(), Csv()))
    observers.on_history(tmp_path, [RoundRecord(0, "start", accuracy=0.1)])
    observers.on_round_end(RoundRecord(1, "compressed", accuracy=0.5))
    assert (tmp_path / "accuracy.csv").read_text() == "0,0.1\n1,0.5\n"


def test_every_event_reaches_every_observer() -> None:
    hooks = ["close", *(name for name in vars(Observer) if name.startswith("on_"))]
    seen = Mock(spec=Observer), Mock(spec=Observer)
    for hook in hooks:
        _, *parameters = inspect.signature(getattr(Observer, hook)).parameters.values()
        arguments = [object() for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        getattr(Observers(seen), hook)(*arguments)
        for observer in seen:
            getattr(observer, hook).assert_called_once_with(*arguments)


def test_a_field_is_read_by_the_name_that_it_had_in_earlier_runs() -> None:
    written = to_dict(FULL)
    written["furthest"] = written.pop("largest_clipped")
    assert from_dict(RoundRecord, written, "rounds.jsonl") == FULL
