"""Naming a device, and what a name does where there is no such device."""

import pytest
import torch

from tofu.device import CPU, on_device, open_device
from tofu.errors import SettingError
from tofu.settings import Settings

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "mps", "cuda:1000"])
def test_a_device_has_one_of_four_forms(name: str) -> None:
    for check in (open_device, lambda value: Settings.of({"device": value})):
        with pytest.raises(SettingError, match="expected auto, cpu, cuda or cuda:N"):
            check(name)


def test_cpu_is_everywhere() -> None:
    assert open_device("cpu") == CPU


@without_gpu
def test_without_a_gpu_auto_is_the_cpu_and_cuda_says_what_there_is() -> None:
    assert open_device("auto") == CPU
    for name in ("cuda", "cuda:1"):
        with pytest.raises(SettingError, match=f"device='{name}' is not usable: expected .*: cpu"):
            open_device(name)


def test_nothing_happens_to_a_model_that_stays_where_it_is() -> None:
    model = torch.nn.Linear(2, 2)
    before = model.weight.data_ptr()
    with on_device(model, CPU):
        assert model.weight.data_ptr() == before
    assert model.weight.data_ptr() == before
