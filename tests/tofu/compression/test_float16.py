import pytest
import torch

from tests.tofu.compression.common import bare, generator, update_of
from tofu.compression.float16 import Float16
from tofu.errors import SettingError


def test_halves_and_their_range() -> None:
    network = bare((200,))
    x = torch.full((200,), 0.1)
    x[:3] = torch.tensor([1e6, -1e6, 1e-9])
    decoded = Float16(network, ratio=1.5).compress(network, update_of(network, x), generator=generator()).decoded
    assert decoded["tensors.0"][:4].tolist() == [65504.0, -65504.0, 0.0, torch.tensor(0.1).half().item()]


def test_the_header_keeps_the_ratio_below_2() -> None:
    with pytest.raises(SettingError, match=r"ratio=2 is not usable: expected at most 1\.99 for this model with float1"):
        Float16(bare((10_000,)), ratio=2)
