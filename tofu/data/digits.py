"""The digits of scikit-learn: 1,797 gray images of 8x8 pixels, embedded in the package."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from tofu.data.classes import number_classes
from tofu.data.splits import Split
from tofu.errors import DataError


def read_digits(class_names: tuple[str, ...] = ()) -> Split:
    """Return all digits as one split, scaled from 17 gray levels to 8 bits.

    The file is read without importing scikit-learn, which takes more than a second.

    Args:
        class_names: in the order of the labels, or () for "0" to "9".

    Raises:
        DataError: a digit is not among them, or scikit-learn is not installed.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError("dataset digits needs scikit-learn, which is not installed")
    with gzip.open(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as text:
        table = np.loadtxt(text, delimiter=",")
    images = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    names = tuple(map(str, range(10)))
    names, labels = number_classes({"train": table[:, -1].astype(np.int64)}, {"train": names}, class_names, "digits")
    return Split(labels["train"], names, images.__getitem__, "digits, image {}".format)
