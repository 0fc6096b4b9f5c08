"""What the server learns of the size of updates before the first secure round."""

import random

import pytest
import torch

from server.client_registry import Client
from server.secure_ranges import SecureRanges, UpdateScaleTracker
from tofu.settings import Settings
from tofu.weights import ParamSpec, Weights


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


def test_a_claim_of_many_examples_does_not_round_the_others_to_nothing() -> None:
    """The unit of weight is a typical client's: with 10^9 claimed by one of ten, the others' had 1e-6 of it."""
    settings = Settings.of({"clients": 10, "schedule": "secure"})
    spec = ParamSpec({"weight": torch.Size((3, 2))}, {})
    claims = [Client(number, str(number), 100 if number else 10**9) for number in range(10)]
    config, _ = SecureRanges(spec, settings).encoding(claims, {}, torch.zeros(6), 1.0)
    assert config.unit_weight == pytest.approx(190)
