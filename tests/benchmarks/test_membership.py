"""Membership inference: the curve's laws, and that it finds members where they can be found."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attacks.base import AttackError
from attacks.messages import local_round, observe, parse_message
from benchmarks.attacks.membership import calibrated_statistic, loss_statistic, payload_statistic, roc, shadow_models
from tofu.data import LabeledImages
from tofu.models import build_model
from tofu.reference_model import ReferenceModel
from tofu.training import LocalTrainingConfig, train_locally

VALUES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)


@given(VALUES, VALUES)
def test_area_is_the_chance_that_a_member_scores_higher(members: list[float], others: list[float]) -> None:
    found = roc(torch.tensor(members), torch.tensor(others))
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert found.area == pytest.approx(sum(pairs) / len(pairs))
    assert found.curve[-1] == (1.0, 1.0)
    assert found.found[0.001] <= found.found[0.01]


def test_few_others_allow_no_false_positive() -> None:
    found = roc(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))
    assert found.found == {0.01: 0.5, 0.001: 0.5}


def test_a_statistic_without_values_is_one_line() -> None:
    with pytest.raises(AttackError, match="statistic of others has 0 values"):
        roc(torch.ones(2), torch.ones(0))


def test_an_overfitted_model_gives_its_members_away(digits: LabeledImages) -> None:
    members, others, pool = digits.subset(range(40)), digits.subset(range(400, 800)), digits.subset(range(800, 1200))
    model = build_model("mlp", digits.shape, seed=0)
    how = LocalTrainingConfig(40, 8, 0.1)
    train_locally(model, members, how, generator=torch.Generator().manual_seed(0))
    plain = roc(loss_statistic(model, members), loss_statistic(model, others))
    shadows = shadow_models("mlp", pool.subset(range(80)), how, norm="group", count=3, seed=5)
    calibrated = roc(*(calibrated_statistic(model, shadows, data) for data in (members, others)))
    assert plain.area > 0.65
    assert calibrated.area > 0.65


def test_a_payload_gives_its_images_away(digits: LabeledImages) -> None:
    members, others = digits.subset(range(8)), digits.subset(range(400, 500))
    network = ReferenceModel(build_model("mlp", digits.shape, seed=0).eval(), digits.shape)
    generator = torch.Generator().manual_seed(0)
    sent = local_round(network, members, LocalTrainingConfig(3, 8, 0.1), generator)
    areas = {}
    for message in ("exact", "proxy:smooth:50", "dp:1"):
        seen = observe(parse_message(message), [sent], generator=generator)
        areas[message] = roc(payload_statistic(seen, members), payload_statistic(seen, others)).area
    assert areas["exact"] > 0.75
    assert areas["proxy:smooth:50"] > 0.7
    assert 0.2 < areas["dp:1"] < 0.8
