"""Evaluation of the global models on the server's held-out images."""

from collections.abc import Sequence, Sized
from contextlib import ExitStack, nullcontext

from torch import nn

from tofu.data import LabeledImages
from tofu.device import open_device
from tofu.evaluation import ClassCounts, Evaluation, evaluate
from tofu.plugins import Plugins
from tofu.tasks import TaskStream, only_classes
from tofu.weights import eval_mode
from tofu.workload import Workload, labeled_images


class Evaluator:
    """Evaluates the models that a run would end with.

    Args:
        test: held-out data.
        multi_head: restrict predictions to the classes of the image's task.
        device: as for `tofu.device.open_device`.
    """

    def __init__(
        self, test: Sized, stream: TaskStream, plugins: Plugins, workload: Workload, *, multi_head: bool, device: str
    ) -> None:
        self._test, self._stream, self._plugins, self._workload = test, stream, plugins, workload
        self._multi_head, self._device = multi_head, open_device(device)

    def evaluate(self, models: Sequence[nn.Module], classes: int) -> tuple[Evaluation, list[float], list[float]]:
        """Accuracy and loss averaged over tasks, and the accuracies of each task and of each group's model.

        Several groups' models are evaluated as an ensemble, by the plugins' `predict_groups`.
        """
        results = []
        for task in range(self._stream.tasks):
            heads = self._stream.classes_of(task) if self._multi_head else range(classes)
            data = self._test
            if self._stream.kind != "none":
                data = self._stream.images_of(labeled_images(data), task)
            results.append(self._on_task(models, heads, data))
        groups = []
        if len(models) > 1:
            groups = [self.evaluate([model], classes)[0].accuracy for model in models]
        accuracies = [result.accuracy for result in results]
        loss = sum(result.loss for result in results) / len(results)
        by_class = ClassCounts.total([result.by_class for result in results])
        return Evaluation(sum(accuracies) / len(results), loss, results[-1].metrics, by_class), accuracies, groups

    def _on_task(self, models: Sequence[nn.Module], heads: Sequence[int], data: Sized) -> Evaluation:
        if len(models) > 1:
            return evaluate_ensemble(models, labeled_images(data), self._plugins)
        with only_classes(models[0], heads) if isinstance(data, LabeledImages) else nullcontext():
            return self._workload.evaluate(models[0], data, predict=self._plugins.predict, device=self._device)


def evaluate_ensemble(models: Sequence[nn.Module], images: LabeledImages, plugins: Plugins) -> Evaluation:
    """Evaluate the ensemble of all groups' models, on the CPU."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(eval_mode(model))
        return evaluate(models[0], images, predict=lambda _, batch: plugins.predict_groups(models, batch))
