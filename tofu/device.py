"""The device of local training, of the search for proxies, and of evaluation.

Everything else runs on the CPU, in particular decoding, which must give the same bits at both ends. Local training and
the search may round differently on different machines, because their results are sent.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tofu.errors import SettingError
from tofu.settings.groups import DEVICE_FORMS, DEVICE_NAME

CPU = torch.device("cpu")


def open_device(name: str) -> torch.device:
    """Return the device of this name, if this machine has it.

    With CUDA this disables TF32 and makes cuDNN deterministic for the whole process. The search takes differences of
    two gradients, for which the 10 bits of TF32 are not precise enough.

    Raises:
        SettingError: the name is unknown, or this machine has no such device.
    """
    if not DEVICE_NAME.fullmatch(name):
        raise SettingError("device", name, DEVICE_FORMS)
    count = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return CPU
    number = int(name.partition(":")[2] or 0)
    if number >= count:
        available = "cpu, or a torch built for CUDA" if torch.version.cuda is None else "cpu"
        available = f"cuda:0 to cuda:{count - 1}" if count else available
        raise SettingError("device", name, f"a device of this machine: {available}")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda", number)


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move the model to `device` within the block and back to the CPU after it."""
    if device == CPU:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(CPU)
