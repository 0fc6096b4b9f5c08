from dataclasses import replace

import numpy as np
import torch

from tests.tofu.compression.common import bare, generator
from tofu.codec.correction import BOUNDARIES, STRATA, strata_of
from tofu.reference_model import ReferenceModel


def displaced_by(network: ReferenceModel, *steps: torch.Tensor) -> ReferenceModel:
    """The network this far from its initial weights."""
    initial = {name: w - step for (name, w), step in zip(network.base.items(), steps, strict=True)}
    return replace(network, initial=initial)


def test_rows_and_columns_that_moved_most_come_first() -> None:
    network = bare((40, 50))
    step = torch.full((40, 50), 1e-3)
    step[7], step[:, 9] = 1.0, 1.0
    numbers = strata_of(displaced_by(network, step)).numbers.reshape(40, 50)
    assert numbers[7, 9] == numbers.min()
    assert numbers[7].max() < numbers[0, 0]
    assert numbers[:, 9].max() < numbers[0, 0]
    assert len(np.unique(np.delete(np.delete(numbers, 7, 0), 9, 1))) == 1


def test_strata_have_about_the_fractions_of_the_boundaries() -> None:
    network = bare((300, 400))
    rows, columns = torch.randn(300, 1, generator=generator()), torch.randn(1, 400, generator=generator(1))
    strata = strata_of(displaced_by(network, torch.exp(2 * rows + 2 * columns)))
    ends = np.cumsum(strata.sizes)[: len(BOUNDARIES)] / strata.numbers.size
    np.testing.assert_allclose(ends[2:], BOUNDARIES[2:], rtol=0.25)


def test_what_never_moved_comes_last_and_of_it_small_tensors_first() -> None:
    network = bare((4, 5), (60, 70), (10, 10))
    still = torch.zeros(60, 70)
    numbers = strata_of(displaced_by(network, torch.zeros(4, 5), still, torch.ones(10, 10))).numbers
    assert numbers[-1] < numbers[0] < numbers[20]
    assert strata_of(network).numbers[0] < strata_of(network).numbers[20]


def test_slots_go_through_the_classes_one_after_the_other() -> None:
    network = bare((30, 40))
    strata = strata_of(displaced_by(network, torch.randn(30, 40, generator=generator()) ** 3))
    assert strata.sizes.sum() == 1200
    assert strata.sizes.size == strata.starts.size == STRATA
    np.testing.assert_array_equal(strata.positions[strata.slots], np.arange(1200))
    np.testing.assert_array_equal(strata.numbers[strata.positions], np.sort(strata.numbers))


def test_rounding_leaves_the_classes_alone() -> None:
    """What another processor, or steps that were added up elsewhere, do to the weights."""
    network = bare((120, 400), (84, 120), (84,))
    steps = [
        torch.randn(shape, generator=generator(i)) * 1e-2 for i, shape in enumerate([(120, 400), (84, 120), (84,)])
    ]
    theirs = [step * (1 + 1e-7 * torch.randn(step.shape, generator=generator(9))) for step in steps]
    ours, others = strata_of(displaced_by(network, *steps)), strata_of(displaced_by(network, *theirs))
    assert ours.checksum == others.checksum
    assert ours.checksum != strata_of(displaced_by(network, *(2 * step**2 for step in steps))).checksum
