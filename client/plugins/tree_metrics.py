"""Metrics of torchmetrics that grade a wrong prediction by where it is in a label tree.

They take predicted and true classes, int64 [n]; their state adds up over batches and processes. Hierarchical precision,
recall and F are those of Kiritchenko, Matwin, Nock, Famili, "Learning and Evaluation in the Presence of Class
Hierarchies", Canadian AI 2006: with A(c) the class c and all nodes above it but the root,

    hP = sum |A(predicted) & A(true)| / sum |A(predicted)|,    hR = sum |A(predicted) & A(true)| / sum |A(true)|

with sums over images. They differ only if some classes are deeper in the tree than others.
"""

import torch
from torch import Tensor

import tofu.models.torchvision_compat  # noqa: F401  # before torchmetrics, which imports torchvision
from client.plugins.label_tree import LabelTree
from tofu.errors import SettingError
from tofu.imports import from_extra

with from_extra("attacks"):
    from torchmetrics import Metric


class GraphDistance(Metric):
    """Mean number of edges between predicted and true class (the paper's catastrophic coefficient).

    Example:
        >>> from client.plugins.label_tree import LabelTree
        >>> metric = GraphDistance(LabelTree([[0, 1], [2, 3]]))
        >>> metric.update(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))
        >>> float(metric.compute())
        2.0
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, tree: LabelTree) -> None:
        super().__init__()
        self.tree = tree
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Raises: SettingError: see `_check`."""
        _check(self.tree, predicted, target)
        self.total += self.tree.distance(predicted, target).sum()
        self.count += len(target)

    def compute(self) -> Tensor:
        """Return the mean, float; NaN without samples."""
        return self.total / self.count


class HierarchicalF(Metric):
    """(1 + b^2) hP hR / (b^2 hP + hR).

    Example:
        >>> from client.plugins.label_tree import LabelTree
        >>> metric = HierarchicalF(LabelTree([[0, 1], 2]))
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([1, 2]))  # {01, 0} and {01, 1}; {01, 1} and {2}
        >>> round(float(metric.compute()), 4)  # hP = 1/4, hR = 1/3
        0.2857
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    common: Tensor
    predicted: Tensor
    true: Tensor

    def __init__(self, tree: LabelTree, beta: float = 1.0) -> None:
        """Args: beta: weight of recall; above 0."""
        if not 0 < beta < float("inf"):
            raise SettingError("beta", beta, "a finite number above 0")
        super().__init__()
        self.tree, self.beta = tree, beta
        for name in ("common", "predicted", "true"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Raises: SettingError: see `_check`."""
        _check(self.tree, predicted, target)
        common, above_predicted, above_true = self.tree.overlap(predicted, target)
        self.common += common.sum()
        self.predicted += above_predicted.sum()
        self.true += above_true.sum()

    def compute(self) -> Tensor:
        """Return a fraction, float; NaN without samples."""
        square = self.beta**2
        return (1 + square) * self.common / (square * self.true + self.predicted)


class HierarchicalPrecision(HierarchicalF):
    """hP, the fraction of the nodes above predicted classes that are above the true ones."""

    def __init__(self, tree: LabelTree) -> None:
        super().__init__(tree)

    def compute(self) -> Tensor:
        return self.common / self.predicted


class HierarchicalRecall(HierarchicalF):
    """hR, the fraction of the nodes above true classes that are above the predicted ones."""

    def __init__(self, tree: LabelTree) -> None:
        super().__init__(tree)

    def compute(self) -> Tensor:
        return self.common / self.true


def _check(tree: LabelTree, predicted: Tensor, target: Tensor) -> None:
    """Raises: SettingError: not two int64 vectors of one length with classes of the tree."""
    for name, classes in (("predicted", predicted), ("target", target)):
        accepted = f"int64 [{len(target) if target.dim() else 0}] with classes 0 to {tree.classes - 1}"
        if classes.dtype != torch.int64 or classes.dim() != 1 or len(classes) != len(target):
            raise SettingError(name, f"{classes.dtype} {list(classes.shape)}", accepted)
        if len(classes) and (int(classes.min()) < 0 or int(classes.max()) >= tree.classes):
            raise SettingError(name, f"{int(classes.min())} to {int(classes.max())}", accepted)
