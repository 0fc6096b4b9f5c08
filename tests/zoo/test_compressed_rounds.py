"""Every second kind of network goes through secure and compressed rounds; test_compressed_rounds_2.py has the others.

The suite gives one file to one process, so these halves run at the same time.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.zoo.networks import ACCEPTED
from tests.zoo.test_networks import plain, run_twice
from tofu.data import to_float
from tofu.rng import GlobalGenerators
from tofu.rounds.schedule import Schedule


class Mixed(Schedule):
    """Two compressed rounds between secure ones: the first has unknown ranges, the last the residuals of all before."""

    kinds = ("secure", "compressed")

    def kind(self, round_: int, accuracies: Sequence[float]) -> str:
        return "secure" if round_ in (1, 4) else "compressed"


@torch.no_grad()
def plain_loss(name: str) -> float:
    """Return the test loss after one round in plain torch."""
    model, test = plain(name, 1)
    with GlobalGenerators(0):
        return float(F.cross_entropy(model.eval()(to_float(test.images)).float(), test.labels))


def check_rounds(name: str, folder: Path) -> None:
    """Check that secure sums are those of plain torch, and that proxies explain the updates."""
    result = run_twice(
        name, folder, schedule=f"{__name__}:Mixed", rounds=4, secure_ratio=2.0, downlink="proxy", downlink_ratio=8.0
    )
    _, secure, *proxies, last = result.history
    # A first round clips what moves too far, such as BatchNorm's statistics; the rest follows in later rounds.
    assert secure.loss == pytest.approx(plain_loss(name), abs=0.05 if secure.clipped else 1e-4)
    assert [record.kind for record in (secure, *proxies, last)] == ["secure", "compressed", "compressed", "secure"]
    for record in proxies:
        assert record.explained_variance > 0.5
        assert record.step_explained_variance > 0.5


@pytest.mark.parametrize("name", list(ACCEPTED)[::2])
def test_secure_sums_are_those_of_plain_torch_and_proxies_explain_updates(name: str, tmp_path: Path) -> None:
    check_rounds(name, tmp_path)
