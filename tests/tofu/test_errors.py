"""The file and line of the user's code in errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import tofu
from tofu.errors import RunError, SettingError, described

DATA = TensorDataset(torch.rand(20, 4), torch.randint(2, (20,)))


class Buggy(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.missing(inputs)  # type: ignore[no-any-return, operator]


def _buggy_factory() -> nn.Module:
    raise KeyError("layers")


def _buggy_in_torch() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 2), nn.Linear(3, 2))(torch.rand(1, 4))  # type: ignore[no-any-return]


def _buggy_train(model: nn.Module, data: Any, context: Any) -> None:
    raise RuntimeError("no " + "way " * 200)


def line_of(text: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.strip().startswith(text))


def run(model: Callable[[], nn.Module], **arguments: Any) -> str:
    with pytest.raises((SettingError, RunError)) as caught:
        tofu.run(model=model, clients=[DATA, DATA], rounds=1, progress=False, **arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "line", "kind"),
    [
        (lambda: Buggy(4, 2), "return self.missing", "AttributeError: 'Buggy' object has no attribute 'missing'"),
        (_buggy_factory, 'raise KeyError("layers")', "KeyError: 'layers'"),
        (_buggy_in_torch, "return nn.Sequential", "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_an_error_of_a_users_model_names_its_line(model: Callable[[], nn.Module], line: str, kind: str) -> None:
    error = run(model)
    assert kind in error
    assert error.endswith(f", at test_errors.py line {line_of(line)})")


def test_an_error_of_a_client_names_its_line_even_if_it_is_long(tmp_path: Path) -> None:
    error = run(lambda: nn.Linear(4, 2), train=_buggy_train, ratio=1, run_folder=tmp_path / "run")
    assert "(RuntimeError: no way way" in error
    assert error.endswith(f", at test_errors.py line {line_of('raise RuntimeError(')})")
    assert len(error) < 400


def test_an_error_without_a_users_frame_has_no_place() -> None:
    assert described(ValueError("no such column")) == "ValueError: no such column"
