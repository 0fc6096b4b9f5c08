"""Checks of the first samples of the datasets of `tofu.run`: before the run, one line names the dataset at fault."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from tofu.arguments import CALLS, shown
from tofu.errors import SettingError, described, user_code
from tofu.formatting import format_count

_LABELS = ("labels", "label", "targets", "target")
_FORM = f"pairs (input, target), or mappings with a key {' or '.join(_LABELS)}"
_IGNORED = -100
"""The class number that torch's cross-entropy ignores."""
_LONGEST = 120


def split_batch(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of a collated batch.

    Raises:
        SettingError: it is neither a pair nor a mapping with a key "labels".
    """
    if isinstance(batch, Mapping):
        for name in _LABELS:
            if name in batch:
                return {key: value for key, value in batch.items() if key != name}, batch[name]
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        return batch[0], batch[1]
    raise SettingError("collate", f"a function that returns {described_value(batch)}", f"batches that are {_FORM}")


def model_outputs(model: nn.Module, inputs: Any) -> Any:
    """Return the model's outputs: a mapping is passed by name and a sequence by position,
    as Hugging Face models expect.
    """
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    elif isinstance(inputs, Sequence):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    return getattr(outputs, "logits", outputs)


def described_value(value: Any) -> str:
    """Return types and shapes of a nested value, such as `(float32 [8], int)`."""
    text = _described(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_described(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_described, value)) + ")"
    shape = getattr(value, "shape", None)  # of an array
    return type(value).__name__ if shape is None else f"{getattr(value, 'dtype', '')} {list(shape)}"


@dataclass
class FirstSamples:
    """Checks the first samples of datasets, one dataset after the other.

    Attributes:
        collate, loss: as given to `tofu.run`.
        loss_of: (outputs, targets) -> loss, with the default loss if there is none.
    """

    collate: Callable[[list[Any]], Any]
    loss: Callable[..., Any] | None
    loss_of: Callable[[Any, Any], Any]
    _outputs: dict[str, Any] = field(default_factory=dict)
    _accepted: str = ""

    def batch(self, name: str, data: Any, rows: Sequence[int] = (0, 0)) -> tuple[Any, Any]:
        """Return inputs and targets of a batch of these samples of a dataset."""
        samples = [self.read(name, data, row) for row in rows]
        default, found = self.collate is default_collate, described_value(samples[0])
        if default:
            try:
                split_batch(samples[0])
            except SettingError:
                accepted = f"samples that are {_FORM}, such as those of TensorDataset(inputs, targets)"
                accepted += "; or a `collate` that makes them"
                raise SettingError(name, f"samples {found}", accepted) from None
        try:
            batch = self.collate(samples)
        except Exception as error:  # the user's own code may raise anything
            if not default:
                accepted = f"{CALLS['collate'].accepted} ({described(error)}, for {name} with samples {found})"
                raise SettingError("collate", shown(self.collate), accepted) from error
            each = f"samples {found}" if rows[0] == rows[-1] else f"samples {found} and {described_value(samples[-1])}"
            accepted = "samples of tensors, arrays or numbers that all have one shape, or a `collate` for others"
            raise SettingError(name, each, f"{accepted} ({described(error)})") from error
        return split_batch(batch)

    @staticmethod
    def read(name: str, data: Any, row: int = 0) -> Any:
        """Return a sample of a dataset."""
        with user_code(name, shown(data), "a dataset whose samples can be read by their numbers"):
            return data[row]

    @torch.no_grad()
    def outputs(self, name: str, model: nn.Module, inputs: Any) -> Any:
        """Return the model's outputs. The model is called once for all inputs of the same types and shapes."""
        key = _described(inputs)
        if key not in self._outputs:
            first = next(iter(self._outputs), None)
            found = f"the inputs of {name}, a batch {described_value(inputs)}"
            if first is None:
                wrong = user_code("model", type(model).__name__, f"a model that accepts {found}")
            else:
                accepted = f"inputs that the model accepts, such as the batch {first} of clients[0]"
                wrong = user_code(name, f"a batch {described_value(inputs)}", accepted)
            with wrong:
                self._outputs[key] = model_outputs(model, inputs)
        return self._outputs[key]

    def check_loss(self, name: str, data: Any, outputs: Any, targets: Any) -> None:
        """Raise SettingError unless the loss accepts the model's outputs and a batch's targets."""
        if self.loss is None:
            column = data.tensors[-1] if type(data) is TensorDataset and self.collate is default_collate else None
            self._check_labels(name, outputs, targets if column is None else column)
        found = f"outputs {described_value(outputs)} and targets {described_value(targets)} of {name}"
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Using a target size")  # it is refused below
                loss = self.loss_of(outputs, targets)
        except SettingError:
            raise
        except Exception as error:  # the user's own code may raise anything
            self._check_labels(name, outputs, targets)
            text = f"{described(error)}, for {found}"
            if self.loss is not None and not self._accepted:
                raise SettingError("loss", shown(self.loss), f"{CALLS['loss'].accepted} ({text})") from error
            usual = f"those of {self._accepted}" if self._accepted else "class numbers in int64, one per sample"
            raise SettingError(name, f"targets {described_value(targets)}",
                               f"targets that the loss accepts, such as {usual} ({text})") from error  # fmt: skip
        if not isinstance(loss, Tensor) or loss.dim():
            returned = f"{CALLS['loss'].accepted} (it returns {described_value(loss)}, for {found})"
            raise SettingError("loss", "cross_entropy" if self.loss is None else shown(self.loss), returned)
        if self.loss is not None:
            _check_broadcast(name, self.loss, outputs, targets)
        self._accepted = self._accepted or name

    def _check_labels(self, name: str, outputs: Any, targets: Any) -> None:
        """Raise SettingError for a class number without an output, if the targets are class numbers."""
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
            return
        if targets.is_floating_point() or targets.dim() != outputs.dim() - 1 or outputs.dim() < 2:
            return
        classes = outputs.shape[1]
        if classes == 1 and self.loss is not None:  # one output for two classes
            return
        wrong = targets[((targets < 0) & (targets != _IGNORED)) | (targets >= classes)]
        if len(wrong):
            accepted = f"class numbers from 0 to {classes - 1}, as the model has {format_count(classes, 'output')}"
            raise SettingError(name, f"label {int(wrong[0])}", accepted)


@torch.no_grad()
def _check_broadcast(name: str, loss: Callable[..., Any], outputs: Any, targets: Any) -> None:
    """Raise SettingError if a loss compares each output with the targets of all samples, as of [n, 1] with [n].

    It does so if it has another value for targets in the outputs' shape, and this is also its value for outputs in the
    targets' shape, and its mean or sum over single samples.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.numel() != targets.numel():
        return
    if outputs.shape == targets.shape or not outputs.is_floating_point() or len(outputs) != 2 or len(targets) != 2:
        return
    made, wanted = (torch.linspace(0, 1, v.numel()).view_as(v) for v in (outputs, targets))
    made, wanted = (0.2 + 0.5 * made).to(outputs), wanted.to(targets)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = float(loss(made, wanted))
            right = [float(loss(made, wanted.view_as(made))), float(loss(made.view_as(wanted), wanted))]
            single = sum(float(loss(made[row : row + 1], wanted[row : row + 1])) for row in (0, 1))
    except Exception:  # a loss that refuses other shapes does not broadcast them
        return
    same = [math.isclose(right[0], value, rel_tol=1e-4, abs_tol=1e-6) for value in (right[1], single, single / 2)]
    if same[0] and any(same[1:]) and not math.isclose(right[0], found, rel_tol=1e-4, abs_tol=1e-6):
        shape = tuple(outputs.shape[1:])
        accepted = (
            f"the shape {list(shape)} of the model's outputs, for example by target.view({shape}): "
            f"{shown(loss)} would compare each output with the targets of all samples of a batch"
        )
        raise SettingError(name, f"targets of shape {list(targets.shape[1:])}", accepted)
