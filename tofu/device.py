"""Where the heavy loops run: a client's local steps, the search of an encode, and the server's evaluation.

Everything else stays on the CPU. Above all decoding: both ends do it, and only the same arithmetic on both gives the
same update. Local steps and searches may round otherwise from machine to machine, because what they find is sent.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tofu.errors import SettingError

CPU = torch.device("cpu")

NAMES = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
DEVICES = "auto, cpu, cuda or cuda:N"
"""What a device may be called; auto is cuda where there is such a device, else cpu."""


def open_device(name: str) -> torch.device:
    """The device of this name, if this machine has it.

    With CUDA float32 is then float32 everywhere in this process, and convolutions take the same algorithms every time:
    the search differentiates by a difference of two gradients, in which TF32's ten bits would leave nothing.

    Raises:
        SettingError: no such device here.
    """
    if not NAMES.fullmatch(name):
        raise SettingError("device", name, DEVICES)
    count = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return CPU
    number = int(name.partition(":")[2] or 0)
    if number >= count:
        here = "cpu, or a torch built for CUDA" if torch.version.cuda is None else "cpu"
        here = f"cuda:0 to cuda:{count - 1}" if count else here
        raise SettingError("device", name, f"what this machine has: {here}")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda", number)


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model is on `device` within the block, and on the CPU after it."""
    if device == CPU:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(CPU)
