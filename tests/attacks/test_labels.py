"""Labels are read off the last layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attacks.labels import LabelCounts, LabelSigns, _rounded, guessed_labels
from attacks.messages import local_round, observe, parse_message
from attacks.networks import attacked_model
from tests.attacks.conftest import Look
from tofu.data import LabeledImages
from tofu.reference_model import ReferenceModel
from tofu.training import LocalTrainingConfig


@pytest.mark.parametrize("model", ["lenet-smooth", "mlp", "lenet5"])
def test_the_sign_of_one_image_is_its_label(look: Look, model: str) -> None:
    seen, truth, _ = look("exact", model=model)
    labels = LabelSigns().run(seen, generator=torch.Generator().manual_seed(0)).labels
    assert labels is not None
    assert labels.tolist() == truth.labels.tolist()


@pytest.mark.parametrize("epochs", [1, 5])
def test_counts_of_a_skewed_batch(digits: LabeledImages, epochs: int) -> None:
    rows = torch.cat([(digits.labels == label).nonzero()[:count, 0] for label, count in ((3, 5), (7, 2), (9, 1))])
    network = ReferenceModel(attacked_model("lenet-smooth", digits.shape, seed=0).eval(), digits.shape)
    generator = torch.Generator().manual_seed(0)
    sent = local_round(network, digits.subset(rows), LocalTrainingConfig(epochs, 8, 0.1), generator)
    for message in ("exact", "proxy:smooth:50"):
        seen = observe(parse_message(message), [sent], generator=generator)
        labels = LabelCounts().run(seen, generator=generator).labels
        assert labels is not None
        counts = torch.bincount(labels, minlength=10)
        assert int(torch.minimum(counts, torch.bincount(digits.labels[rows], minlength=10)).sum()) >= 7


def test_known_labels_are_used(look: Look) -> None:
    seen, truth, _ = look("exact", batch=3, know_labels=True)
    assert torch.equal(guessed_labels(seen, torch.Generator()), truth.labels)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=12), st.integers(1, 64))
def test_rounded_counts_add_up(counts: list[float], total: int) -> None:
    labels = _rounded(torch.tensor(counts), total)
    assert len(labels) == total
    assert int(labels.max()) < len(counts)


def test_whole_counts_stay() -> None:
    labels = _rounded(torch.tensor([2.0, 0.0, 3.0, -1.0]), 5)
    assert torch.bincount(labels, minlength=4).tolist() == [2, 0, 3, 0]
