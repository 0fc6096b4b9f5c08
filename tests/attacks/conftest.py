"""Scenarios that leak, made by real local steps on the embedded digits."""

import sys
from collections.abc import Callable

import pytest
import torch

from attacks.messages import ClientRound, local_round, observe, parse_message
from attacks.networks import attacked_model
from attacks.observation import Observation
from tofu.cli import main
from tofu.data import LabeledImages
from tofu.reference_model import ReferenceModel
from tofu.training import LocalTrainingConfig

Observed = tuple[Observation, LabeledImages, LabeledImages]
"""What the attacker sees, the images in it, and other images."""

Look = Callable[..., Observed]


def distinct_rows(labels: torch.Tensor, count: int) -> torch.Tensor:
    """The first row of each of `count` classes."""
    return torch.stack([(labels == label).nonzero()[0, 0] for label in range(count)])


@pytest.fixture(scope="session")
def look(digits: LabeledImages) -> Look:
    """Makes an observation: look(message, model=, norm=, batch=, steps=, know_labels=)."""

    def make(message: str, *, model: str = "lenet-smooth", norm: str = "group", batch: int = 1, steps: int = 1,
             know_labels: bool = False) -> Observed:  # fmt: skip
        network = ReferenceModel(attacked_model(model, digits.shape, norm=norm, seed=0).eval(), digits.shape)
        parsed = parse_message(message)
        own = digits.subset(distinct_rows(digits.labels, batch * parsed.clients))
        how, generator = LocalTrainingConfig(epochs=steps, batch_size=batch, lr=0.1), torch.Generator().manual_seed(0)
        rounds: list[ClientRound] = [
            local_round(network, own.subset(range(i * batch, (i + 1) * batch)), how, generator)
            for i in range(parsed.clients)
        ]
        seen = observe(parsed, rounds, generator=generator, know_labels=know_labels)
        return seen, own, digits.subset(torch.arange(200, 400))

    return make


def attack_command(arguments: list[str]) -> int:
    """Run `tofu attack` in this process and return its exit status."""
    before = sys.argv
    sys.argv = ["tofu", "attack", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0
