"""A tree of class labels; `client.plugins.tree_metrics` grades predictions by it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tofu.errors import SettingError

TREES: dict[str, list[Any]] = {
    "digits": [[[0, 6], [8, 9]], [[3, 5], [2]], [[1, 7], [4]]],
    "cifar10": [[[0, 8], [1, 9]], [[2], [6], [3, 5], [4, 7]]],
    "cifar10-pairs": [[[0, 1]], [[2], [3, 4]]],
}
"""cifar10: vehicles (airplane, ship; car, truck) and animals (bird; frog; cat, dog; deer, horse).

cifar10-pairs: the five classes of subpopulations "0/8 1/9 2/6 3/5 4/7", which are vehicles (airplane or ship; car or
truck) and animals (bird or frog; the mammals: cat or dog, deer or horse).
"""


class LabelTree:
    """Nested lists whose leaves are the classes 0 to classes - 1; all leaves are padded to the same depth.

    Attributes:
        levels: int64 [depth, classes], the node of each class at each depth, counted from 0 within the depth. The
            last level is the class itself.
        ancestors: bool [classes, nodes], whether a node of the tree without padding is a class itself or above it. The
            root, which is above all classes, is left out.

    Example:
        >>> tree = LabelTree([[0, 1], [2]])
        >>> tree.levels.tolist()
        [[0, 0, 1], [0, 1, 2]]
        >>> tree.distance(torch.tensor([0, 0]), torch.tensor([1, 2])).tolist()
        [2, 4]
    """

    def __init__(self, nested: list[Any], label: str = "tree") -> None:
        """Raises: SettingError: the leaves are not each of the classes once."""
        paths = dict(_paths(nested, (), label))
        if sorted(paths) != list(range(len(paths))) or len(paths) < 2 or len(paths) != _count(nested):
            raise SettingError(label, str(nested), "nested lists that contain each class, 0 to n - 1, once")
        depth = max(map(len, paths.values()))
        rows = []
        for level in range(1, depth):
            # A leaf above this depth is its own only descendant.
            nodes = [path[:level] for _, path in sorted(paths.items())]
            numbers = {node: number for number, node in enumerate(sorted(set(nodes)))}
            rows.append([numbers[node] for node in nodes])
        self.levels = torch.tensor([*rows, list(range(len(paths)))])
        ordered = [path for _, path in sorted(paths.items())]
        inner = sorted({path[:level] for path in ordered for level in range(1, len(path) + 1)})
        self.ancestors = torch.tensor([[path[: len(node)] == node for node in inner] for path in ordered])

    @property
    def classes(self) -> int:
        return self.levels.shape[1]

    @property
    def widths(self) -> list[int]:
        """Number of nodes at each depth."""
        return [int(row.max()) + 1 for row in self.levels]

    def distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Edges between two classes in the padded tree, int64 [n]: 0 if equal, 2 if they share a parent, ..."""
        levels = self.levels.to(predicted.device)
        return 2 * (levels[:, predicted] != levels[:, target]).sum(0)

    def overlap(self, predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of nodes of `ancestors`, int64 [n] each: above both classes, above the predicted, above the true."""
        ancestors = self.ancestors.to(predicted.device)
        above = ancestors[predicted], ancestors[target]
        return (above[0] & above[1]).sum(1), above[0].sum(1), above[1].sum(1)


def _paths(node: list[Any], path: tuple[int, ...], label: str) -> Iterator[tuple[int, tuple[int, ...]]]:
    for number, child in enumerate(node):
        if isinstance(child, list) and child:
            yield from _paths(child, (*path, number), label)
        elif type(child) is int:
            yield child, (*path, number)
        else:
            raise SettingError(label, str(child), "nested lists of class numbers, none of them empty")


def _count(node: Any) -> int:
    return sum(map(_count, node)) if isinstance(node, list) else 1
