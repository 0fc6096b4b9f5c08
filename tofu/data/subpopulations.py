"""Subpopulation shift: labels of a dataset are grouped into broader classes, and some labels are not trained on.

Santurkar, Tsipras, Madry, "BREEDS: Benchmarks for Subpopulation Shift", ICLR 2021, arXiv 2008.04859: a class such as
"pet" is trained on cats and tested on dogs. The text of the setting has one word per class, SEEN/UNSEEN, with the
dataset's own labels separated by commas: "0,8/9 3/5" makes two classes of five labels. Images with other labels are not
used.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tofu.data.partition import IntArray
from tofu.data.splits import Split
from tofu.errors import SettingError

_FIELD = "subpopulations"


@dataclass(frozen=True)
class Subpopulations:
    """The grouping of labels into classes.

    Attributes:
        seen, unseen: for each class, its labels that are trained on, and those that are only tested on; not empty.

    Example:
        >>> shift = Subpopulations.parse("0,8/9 3/5")
        >>> shift.seen, shift.unseen
        (((0, 8), (3,)), ((9,), (5,)))
    """

    seen: tuple[tuple[int, ...], ...]
    unseen: tuple[tuple[int, ...], ...]

    @staticmethod
    def parse(text: str) -> "Subpopulations":
        """Parse the setting. Raises SettingError if it is malformed, repeats a label, or has fewer than two classes."""
        accepted = "two or more classes as SEEN/UNSEEN labels, for example '0,8/9 3/5', each label once"
        try:
            pairs = [tuple(_labels(side) for side in word.split("/")) for word in text.split()]
        except ValueError:
            raise SettingError(_FIELD, text, accepted) from None
        labels = list(itertools.chain(*itertools.chain(*pairs)))
        if len(pairs) < 2 or any(len(pair) != 2 for pair in pairs) or len(set(labels)) < len(labels):
            raise SettingError(_FIELD, text, accepted)
        return Subpopulations(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))

    def check(self, split: Split) -> None:
        """Raises SettingError if the dataset does not have one of the labels."""
        largest = max(itertools.chain(*self.seen, *self.unseen))
        if largest >= len(split.class_names):
            raise SettingError(_FIELD, largest, f"labels 0 to {len(split.class_names) - 1}, as the dataset has")

    def rows(self, labels: IntArray, part: Literal["seen", "unseen", "all"]) -> IntArray:
        """Return the rows, int64 [k], whose label (labels: int64 [n]) is in this part of a class."""
        groups = {"seen": self.seen, "unseen": self.unseen, "all": self.seen + self.unseen}[part]
        return np.flatnonzero(np.isin(labels, list(itertools.chain(*groups))))

    def regroup(self, split: Split) -> Split:
        """Return the split with classes as labels, and -1 for labels that are in no class."""
        classes = np.full(len(split.class_names), -1, dtype=np.int64)
        names = []
        for number, (seen, unseen) in enumerate(zip(self.seen, self.unseen, strict=True)):
            classes[[*seen, *unseen]] = number
            names.append(" or ".join(split.class_names[label] for label in (*seen, *unseen)))
        return replace(split, labels=classes[split.labels], class_names=tuple(names))


def _labels(text: str) -> tuple[int, ...]:
    """Raises ValueError unless the text is whole numbers separated by commas."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise ValueError(text)
    return tuple(int(part) for part in text.split(","))
