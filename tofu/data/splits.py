"""One split of a dataset: rows whose labels are in memory and whose images are decoded when they are needed."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tofu.data.images import ImageShape, LabeledImages, Pixels, fit_image
from tofu.data.partition import IntArray
from tofu.errors import DataError

_SYNONYMS = {
    "train": ("training", "train"),
    "test": ("testing", "test"),
    "validation": ("validation", "valid", "val", "dev"),
}
_SHARD_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+)?$")


@dataclass(frozen=True)
class Split:
    """Rows of a dataset.

    Attributes:
        labels: int64 [n].
        class_names: in the order of the labels.
        read: row -> its image. Raises DataError, with a text that goes on from the row's origin.
        origin: row -> its file or its row in a table, for error messages.
    """

    labels: IntArray
    class_names: tuple[str, ...]
    read: Callable[[int], Pixels]
    origin: Callable[[int], str]

    def image_shape(self) -> ImageShape:
        """The shape of the first image, which all others must have. Raises DataError if it cannot be read."""
        try:
            pixels = self.read(0)
        except DataError as error:
            raise DataError(f"{self.origin(0)} {error}") from error
        return ImageShape(1 if pixels.ndim == 2 else 3, pixels.shape[0], pixels.shape[1], len(self.class_names))

    def decode(self, rows: IntArray, shape: ImageShape) -> LabeledImages:
        """Decode the images of some rows (int64 [k]).

        Raises:
            DataError: an image cannot be read, or differs from `shape` in size or color.
        """
        images = np.empty((len(rows), shape.channels, shape.height, shape.width), dtype=np.uint8)
        for i, row in enumerate(rows.tolist()):
            try:
                images[i] = fit_image(self.read(row), shape)
            except DataError as error:
                raise DataError(f"{self.origin(row)} {error}") from error
        return LabeledImages(torch.from_numpy(images), torch.from_numpy(self.labels[rows]), shape.classes)

    def check_labels(self) -> None:
        """Raises DataError if a label is not the index of a class name."""
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.class_names)))
        if len(wrong):
            label, last = self.labels[wrong[0]], len(self.class_names) - 1
            raise DataError(f"{self.origin(int(wrong[0]))} has label {label}: labels are expected to be 0 to {last}")


def split_role(name: str) -> str | None:
    """The split that a file (without its suffix), folder or hub split holds: "train", "test", "validation" or None.

    After the number of a shard has been removed, the name must begin or end with the name of the split, as a word of
    its own: "train-00000-of-00002" and "mnist_test" do, "my-test-scanner" does not.
    """
    words = re.split(r"[^a-z]+", _SHARD_NUMBER.sub("", name.lower()))
    for word in (words[0], words[-1]):
        for role, synonyms in _SYNONYMS.items():
            if word in synonyms:
                return role
    return None
