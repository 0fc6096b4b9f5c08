"""Initial weights from files: what fits is taken and all else named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tofu.errors import SettingError
from tofu.models.initial_weights import fill


def net(classes: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, classes))


@pytest.mark.parametrize("form", ["safetensors", "plain", "parallel", "nested"])
def test_every_form_of_file(tmp_path: Path, form: str) -> None:
    given, model, file = net(), net(), tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    state = given.state_dict()
    if form == "safetensors":
        save_file(state, file)
    else:
        state = {f"module.{name}": value for name, value in state.items()} if form == "parallel" else state
        torch.save({"state_dict": state} if form == "nested" else state, file)
    assert fill(model, str(file)) == ()
    assert all(torch.equal(value, given.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_new_head_keeps_its_values_and_is_named(tmp_path: Path) -> None:
    model = net(5)
    before = model.state_dict()["1.weight"].clone()
    torch.save(net().state_dict(), tmp_path / "w.pt")
    assert fill(model, str(tmp_path / "w.pt")) == ("1.weight", "1.bias")
    assert torch.equal(model.state_dict()["1.weight"], before)


@pytest.mark.parametrize("content", ["missing", "noise", "other", "nan", "code"])
def test_what_cannot_be_used_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "w.pt"
    if content == "noise":
        file.write_bytes(b"no tensors")
    elif content == "code":
        torch.save(net(), file)  # a pickled module: never executed
    elif content != "missing":
        torch.save(net().state_dict() if content == "nan" else {"a": torch.zeros(1)}, file)
    if content == "nan":
        torch.save({"0.bias": torch.full((4,), torch.nan)}, file)
    with pytest.raises(SettingError, match="initial-weights="):
        fill(net(), str(file))
