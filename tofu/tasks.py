"""Task streams for continual learning: a dataset as a sequence of tasks, and the metrics ACC and BWT.

A stream is a function of the seed: disjoint sets of classes, or permutations of the pixels (Goodfellow et al. 2014;
Kirkpatrick et al. 2017). ACC and BWT: Lopez-Paz & Ranzato, "Gradient Episodic Memory", NeurIPS 2017, section 2.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tofu.data import ImageShape, LabeledImages
from tofu.errors import DataError, SettingError
from tofu.plugins import RoundContext
from tofu.rng import derive_generator
from tofu.settings import Settings
from tofu.settings.groups import PluginSettings

STREAMS = ("none", "classes", "pixels")
ORDERS = ("same", "own")
_EXCLUDED = -1e9
"""A logit whose probability is 0 in float32. It is finite, so that its product with a soft target of 0 is not NaN."""


@dataclass(frozen=True)
class TaskStream:
    """Tasks 0 to tasks-1 of a dataset.

    Attributes:
        kind: "classes": each task has some of the classes; "pixels": each task has its own permutation of the pixels,
            task 0 the identity; "none": every task is the whole dataset.
        tasks: number of tasks.
        classes: number of classes of the dataset.
        seed: seed of the split or the permutations.
        order: "same": all clients learn the tasks in order; "own": each client in its own order.

    Raises:
        SettingError: a field is out of range.
    """

    kind: str
    tasks: int
    classes: int
    seed: int = 0
    order: str = "same"

    def __post_init__(self) -> None:
        for name, value, accepted in (("tasks", self.kind, STREAMS), ("task_order", self.order, ORDERS)):
            if value not in accepted:
                raise SettingError(name, value, f"one of {', '.join(accepted)}")
        if not 1 <= self.tasks <= (self.classes if self.kind == "classes" else 10_000):
            text = f"1 to {self.classes}, the number of classes" if self.kind == "classes" else "1 to 10000"
            raise SettingError("task_count", self.tasks, text)

    @staticmethod
    def of(plugins: PluginSettings, classes: int, seed: int) -> "TaskStream":
        """Return the tasks of a run. Raises SettingError for more tasks than classes."""
        return TaskStream(plugins.tasks, plugins.task_count, classes, seed, plugins.task_order)

    def number(self, position: int, client: str = "") -> int:
        """Return the task at a position (0 to tasks-1) of this client's stream."""
        self._check(position)
        if self.order == "same":
            return position
        generator = derive_generator(self.seed, client, "task order")
        return int(torch.randperm(self.tasks, generator=generator)[position])

    def classes_of(self, task: int) -> tuple[int, ...]:
        """Return the classes of a task in ascending order; the numbers of classes per task differ by at most one."""
        self._check(task)
        if self.kind != "classes":
            return tuple(range(self.classes))
        dealt = torch.randperm(self.classes, generator=derive_generator(self.seed, "task classes"))
        return tuple(sorted(torch.tensor_split(dealt, self.tasks)[task].tolist()))

    def permutation_of(self, task: int, pixels: int) -> Tensor:
        """int64 [pixels]: the source pixel of each pixel of the task's images, the same in all channels."""
        self._check(task)
        if self.kind != "pixels" or task == 0:
            return torch.arange(pixels)
        return torch.randperm(pixels, generator=derive_generator(self.seed, task, "task pixels"))

    def images_of(self, data: LabeledImages, task: int) -> LabeledImages:
        """Return the images of a task, with the dataset's labels.

        Raises:
            DataError: the data has no image of the task's classes.
        """
        if self.kind == "none":
            return data
        if self.kind == "classes":
            mine = torch.isin(data.labels, torch.tensor(self.classes_of(task)))
            if not bool(mine.any()):
                raise DataError(f"there is no image of task {task}, whose classes are {self.classes_of(task)}")
            return data.subset(mine.nonzero().flatten())
        pixels = self.permutation_of(task, data.images[0, 0].numel()) if len(data) else torch.arange(0)
        images = data.images.flatten(2)[:, :, pixels].view_as(data.images)
        return LabeledImages(images, data.labels, data.classes)

    def _check(self, task: int) -> None:
        if not 0 <= task < self.tasks:
            raise ValueError(f"task {task} is not usable: expected 0 to {self.tasks - 1}")


def round_context(
    settings: Settings, shape: ImageShape, round_: int, client: str = "", *, group: int = 0
) -> RoundContext:
    """Return the position of a round, counted from 1, in the run and in its task.

    All tasks have equally many rounds.
    """
    rounds, tasks = settings.training.rounds, settings.plugins.task_count
    each = rounds // tasks
    return RoundContext(
        shape,
        round=round_,
        rounds=rounds,
        task=(round_ - 1) // each,
        tasks=tasks,
        final=round_ % each == 0,
        client=client,
        seed=settings.run.seed,
        group=group,
    )


@contextmanager
def only_classes(model: nn.Module, classes: Sequence[int]) -> Iterator[None]:
    """Mask all logits but those of some classes within the block (multi-head evaluation and training).

    Masked logits get no gradient. Outputs beyond the dataset's classes (an auxiliary class) are masked unless named.
    """
    allowed = torch.tensor(sorted(classes))

    def mask(module: nn.Module, args: object, outputs: Tensor) -> Tensor:
        out = torch.ones(outputs.shape[1], dtype=torch.bool, device=outputs.device)
        out[allowed] = False
        return outputs.masked_fill(out, max(_EXCLUDED, torch.finfo(outputs.dtype).min))  # float16 ends at -65504

    with model.register_forward_hook(mask):
        yield


def mean_accuracy(matrix: Tensor) -> float:
    """Return ACC in percent: mean accuracy over all tasks after the last one.

    Args:
        matrix: [tasks, tasks]; entry (i, j) is the test accuracy on task j after task i.
    """
    return 100 * float(matrix[-1].double().mean())


def backward_transfer(matrix: Tensor) -> float:
    """BWT in percentage points: mean change of each task's accuracy since it was learned; 0 for a single task."""
    if len(matrix) < 2:
        return 0.0
    return 100 * float((matrix[-1].double() - matrix.double().diagonal())[:-1].mean())
