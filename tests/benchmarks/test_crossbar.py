"""The training loop of the crossbar benchmark."""

import dataclasses

import torch

from benchmarks.plugins.crossbar import CASES, averaged
from tofu.data import LabeledImages
from tofu.models import build_model
from tofu.plugins import NO_PLUGINS
from tofu.weights import weights_of


def test_bfloat16_takes_the_steps_of_float32_closely(digits: LabeledImages) -> None:
    """A cast that is cached would keep the weights of an epoch's first step."""
    case = dataclasses.replace(CASES["mnist"], batch_size=16)
    ends = []
    for bfloat16 in (False, True):
        model = build_model("mlp", digits.shape, seed=0)
        averaged(model, [digits], dataclasses.replace(case, bfloat16=bfloat16), 0, 1, 1, lambda: NO_PLUGINS)
        ends.append(torch.cat([value.flatten() for value in weights_of(model).values()]))
    start = torch.cat([value.flatten() for value in weights_of(build_model("mlp", digits.shape, seed=0)).values()])
    assert (ends[1] - ends[0]).norm() < 0.3 * (ends[0] - start).norm()
