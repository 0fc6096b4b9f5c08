"""What a run's records say of it at the end: whether training has diverged."""

import dataclasses
import math

import pytest

from server.records import divergence, unlearned
from tofu.rounds.record import RoundRecord


def records(kind: str, *scores: tuple[float | None, float | None]) -> list[RoundRecord]:
    """A start and rounds with these accuracies and losses."""
    return [RoundRecord(n, kind if n else "start", accuracy=a, loss=loss) for n, (a, loss) in enumerate(scores)]


@pytest.mark.parametrize("kind", ["compressed", "secure", "fedavg"])
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([(0.1, 2.3), (0.8, 0.7), (0.1, None)], "the test loss is not finite, at the start it was 2.3"),
        ([(0.1, 2.3), (0.12, 900.0)], "the test loss is 900"),
        ([(0.1, 2.3), (0.8, 0.7), (0.11, 2.5)], "the accuracy was 0.8 and is 0.11, that of guessing"),
        ([(0.1, 2.3), (0.8, 0.7), (0.11, 2.2)], ""),  # the loss is below that of the start
        ([(0.1, 2.3), (0.2, 2.4), (0.11, 2.5)], ""),  # it had not learned
        ([(0.1, 2.3), (0.8, 0.7), (0.4, 90.0)], ""),  # it still knows something
        ([(0.1, 2.3), (0.8, None), (0.7, 1.0)], ""),  # it has recovered
        ([(None, None), (None, None)], ""),  # there are no test data
    ],
)
def test_divergence_is_told_from_learning_in_every_kind_of_round(
    kind: str, scores: list[tuple[float | None, float | None]], expected: str
) -> None:
    found = divergence(records(kind, *scores), 10)
    assert expected in found
    assert bool(found) == bool(expected)


def test_an_exploding_training_loss_is_divergence_where_nothing_was_learned() -> None:
    start, last = records("secure", (0.1, 2.3), (0.1, 2.5))
    assert divergence([start, last], 10) == ""
    assert "that of guessing" in divergence([start, dataclasses.replace(last, train_loss=32.0)], 10)
    assert "that of guessing" in divergence([start, last], 10, growth=12.0)
    assert divergence([start, last], 10, growth=3.0) == ""  # an adaptive optimizer's first steps


def test_a_model_that_does_not_classify_has_no_accuracy_of_guessing() -> None:
    assert divergence(records("secure", (None, 1.0), (None, 2.0)), 1) == ""
    assert divergence(records("secure", (None, 1.0), (None, 200.0)), 1)


def test_without_test_data_the_training_loss_tells() -> None:
    start, last = records("fedavg", (None, None), (None, None))
    assert divergence([start, dataclasses.replace(last, train_loss=200.0)], 10) == ""
    assert "training loss is 1e+03" in divergence([start, dataclasses.replace(last, train_loss=1000.0)], 10)
    assert divergence([start, dataclasses.replace(last, train_loss=1000.0)], 1) == ""
    assert "not finite" in divergence([start, last], 10, growth=math.nan)


def test_a_model_that_guesses_has_not_learned() -> None:
    """The note of runs with noise: also where training did not diverge."""
    assert unlearned(records("fedavg", (0.1, 2.3), (0.12, 2.2)), 10) == (
        "the final accuracy, 12.0%, is little better than that of guessing, 10.0%"
    )
    assert unlearned(records("fedavg", (0.1, 2.3), (0.12, 2.2), (0.4, 2.0)), 10) == ""
    assert unlearned(records("fedavg", (0.1, 2.3), (None, None)), 10) == ""  # no test data
    assert unlearned(records("fedavg", (0.1, 2.3)), 10) == ""  # no round was run
    assert unlearned(records("fedavg", (0.1, 2.3), (0.9, 2.3)), 1) == ""  # no classes
    start, last = records("fedavg", (0.1, 2.3), (0.1, 2.3))
    assert unlearned([start, dataclasses.replace(last, task_accuracies=(0.9, 0.0))], 10) == ""
