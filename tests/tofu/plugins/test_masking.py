"""Kept entries: a masked parameter trains, travels and is measured as the vector of its kept entries."""

import pytest
import torch
from torch import nn

from tofu.plugins import keep_entries
from tofu.weights import layout_of


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_a_masked_weight_is_zero_outside_its_kept_entries_and_travels_without_them() -> None:
    model, mask = network(), torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    expected = model[0].weight.detach() * mask
    keep_entries(model, {"0.weight": mask})
    assert torch.equal(model[0].weight, expected)
    shapes = layout_of(model).parameters
    assert shapes["0.parametrizations.weight.original"] == torch.Size([int(mask.sum())])
    assert "0.weight" not in shapes
    model(torch.ones(1, 4)).sum().backward()
    assert model[0].parametrizations["weight"].original.grad is not None


def test_the_same_mask_again_changes_nothing_and_another_one_is_applied_anew() -> None:
    model, mask = network(), torch.eye(3, 4, dtype=torch.bool)
    keep_entries(model, {"0.weight": mask})
    kept = model[0].parametrizations["weight"].original
    keep_entries(model, {"0.weight": mask})
    assert model[0].parametrizations["weight"].original is kept
    mask[0, 0] = False
    keep_entries(model, {"0.weight": mask})
    assert model[0].weight[0, 0] == 0
    assert model[0].parametrizations["weight"].original.shape == (2,)


@pytest.mark.parametrize("mask", [torch.ones(2, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)])
def test_a_mask_of_another_shape_or_that_keeps_nothing_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"mask of 0\.weight"):
        keep_entries(network(), {"0.weight": mask})
