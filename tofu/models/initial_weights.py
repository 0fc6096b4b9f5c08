"""Initial weights of a run from a file: a checkpoint, pretrained weights, or the result of another run."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from tofu.errors import SettingError, first_line

_ACCEPTED = "a .safetensors file, a file of torch.save with a state dict, or the folder of a run"


def fill(model: nn.Module, path: str) -> tuple[str, ...]:
    """Copy the tensors of a file into the tensors of a model with equal names and shapes.

    The prefix "module." of `torch.nn.DataParallel` is removed, and a state dict may be under the key "state_dict".
    Pickled objects other than tensors are refused.

    Returns:
        The names of the model's tensors that the file does not have in that shape, such as those of a new head.

    Raises:
        SettingError: the file cannot be read, fits no tensor of the model, or has values that are not finite.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> file = tempfile.mkdtemp() + "/net.pt"
        >>> torch.save(nn.Linear(3, 2).state_dict(), file)
        >>> fill(nn.Linear(3, 2), file)
        ()
        >>> fill(nn.Linear(3, 5, bias=False), file)
        Traceback (most recent call last):
        ...
        tofu.errors.SettingError: initial-weights='...' is not usable: expected tensors of this model: none of ...
    """
    given, own = _tensors(path), model.state_dict()
    fitting = {name: value for name, value in given.items() if name in own and value.shape == own[name].shape}
    if not fitting:
        raise SettingError("initial_weights", path, f"tensors of this model: none of {', '.join(own)} is there")
    for name, value in fitting.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise SettingError("initial_weights", path, f"finite values ({name} has others)")
    model.load_state_dict(own | fitting)
    return tuple(name for name in own if name not in fitting)


def _tensors(path: str) -> Mapping[str, Tensor]:
    file = Path(path) / "weights.safetensors" if Path(path).is_dir() else Path(path)
    try:
        state = file.stat()
        return _read(file, state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise SettingError("initial_weights", path, f"{_ACCEPTED} ({error.strerror or first_line(error)})") from error
    except Exception as error:  # torch.load raises many types for other files
        raise SettingError("initial_weights", path, f"{_ACCEPTED} ({first_line(error)})") from error


@lru_cache(maxsize=2)
def _read(file: Path, changed: int, size: int) -> dict[str, Tensor]:
    """Return the tensors of a file, cached until it changes, because clients build models in every round."""
    del changed, size
    if file.suffix == ".safetensors":
        import safetensors.torch

        return safetensors.torch.load_file(file)
    read = torch.load(file, map_location="cpu", weights_only=True)
    read = read.get("state_dict", read) if isinstance(read, dict) else {}
    return {str(name).removeprefix("module."): value for name, value in read.items() if isinstance(value, Tensor)}
