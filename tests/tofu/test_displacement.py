"""Levels of movement: the formula, and that no order of summing changes them."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tofu.weights import displacement_levels


@st.composite
def movements(draw: st.DrawFn) -> Tensor:
    """Rows and columns of very different lengths, at any scale."""
    rows, columns, seed = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    by_row, by_column = (torch.randn(n, generator=generator).mul(2).exp() for n in (rows, columns))
    return torch.randn(rows, columns, generator=generator) * by_row[:, None] * by_column * draw(st.floats(1e-6, 1e6))


@settings(max_examples=150, deadline=None)
@given(movements())
def test_levels_are_the_logarithms_of_rows_and_columns(moved: Tensor) -> None:
    """The formula in floating point, but where movements are so small that their rounding shows."""
    energy = moved.double().square().numpy()
    logs = 2 * np.log2(energy.mean(1, keepdims=True)), 2 * np.log2(energy.mean(0, keepdims=True))
    exact = logs[0] + logs[1] - 2 * np.log2(energy.mean())
    strong = np.minimum(*(log + 0 * energy for log in logs)) > 2 * np.log2(energy.max()) - 2 * 16
    assert np.all(np.abs(displacement_levels(moved).reshape(energy.shape) - exact)[strong] < 1.6)


@settings(max_examples=100, deadline=None)
@given(movements(), st.integers(0, 2**31))
def test_levels_go_with_their_entries(moved: Tensor, seed: int) -> None:
    """To the bit: sums of whole numbers do not know in which order they were made."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(n, generator=generator) for n in moved.shape)
    mixed = displacement_levels(moved[rows][:, columns]).reshape(moved.shape)
    assert np.array_equal(mixed, displacement_levels(moved).reshape(moved.shape)[rows.numpy()][:, columns.numpy()])


@settings(max_examples=100, deadline=None)
@given(movements(), st.integers(-20, 20))
def test_twice_as_far_is_four_levels_more(moved: Tensor, doublings: int) -> None:
    finite = displacement_levels(moved) > -5000  # a row or column that rounds to nothing stays far below
    assert np.array_equal(
        (displacement_levels(moved * 2.0**doublings) - displacement_levels(moved))[finite],
        np.full(finite.sum(), 4 * doublings),
    )


def test_what_has_not_moved_is_below_all_that_has() -> None:
    moved = torch.zeros(4, 3)
    moved[1, 2] = 1e-30
    assert displacement_levels(torch.zeros(2, 2)).max() < displacement_levels(moved).min()
    assert displacement_levels(torch.zeros(50, 2)).max() < displacement_levels(torch.zeros(2, 2)).min()
    assert displacement_levels(moved).reshape(4, 3)[1, 2] == displacement_levels(moved).max()
    assert displacement_levels(torch.tensor(0.5)).shape == (1,)
    assert displacement_levels(torch.zeros(0)).shape == (0,)
