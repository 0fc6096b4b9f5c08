"""What the server learns of the size of updates before the first secure round."""

import random

import pytest
import torch

from server.secure_ranges import UpdateScaleTracker
from tofu.weights import Weights


def updates(count: int) -> list[tuple[Weights, int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ({"weight": torch.randn(30, 20, generator=generator) * 10.0**-n, "none": torch.zeros(0)}, 7 + n)
        for n in range(count)
    ]


def test_the_last_rounds_deviation_and_the_largest_value_of_all() -> None:
    seen, sent = UpdateScaleTracker(), updates(5)
    seen.observe({"weight": torch.full((30, 20), 100.0)}, 3, 1, 1.0)
    for update, examples in sent:
        seen.observe(update, examples, 2, 0.25)
    weighted = torch.stack([update["weight"] * examples for update, examples in sent])
    assert seen.deviations() == {"weight": pytest.approx(2 * float(weighted.square().mean().sqrt()), rel=1e-6)}
    assert seen.peaks == {"weight": 300.0}
    assert UpdateScaleTracker(**vars(seen)) == seen


@pytest.mark.parametrize(("said", "counts"), [(0.0, 0.05), (-3.0, 0.05), (1e-9, 0.05), (0.5, 0.5), (7.0, 1.0)])
def test_what_a_client_says_of_itself_moves_a_range_only_so_far(said: float, counts: float) -> None:
    seen = UpdateScaleTracker()
    seen.observe({"weight": torch.ones(4)}, 1, 1, said)
    assert seen.deviations()["weight"] == pytest.approx(counts**-0.5)


def test_the_order_of_answers_changes_nothing() -> None:
    found = []
    for seed in range(6):
        seen, sent = UpdateScaleTracker(), updates(8)
        random.Random(seed).shuffle(sent)
        for update, examples in sent:
            seen.observe(update, examples, 1, 1.0)
        found.append((seen.powers, seen.peaks))
    assert all(one == found[0] for one in found)
