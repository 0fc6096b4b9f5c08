"""The digits of scikit-learn: 1,797 gray images of 8x8 pixels, embedded in the package."""

import numpy as np

from tofu.data.classes import number_classes
from tofu.data.splits import Split


def read_digits(class_names: tuple[str, ...] = ()) -> Split:
    """All digits as one split, scaled from 17 gray levels to 8 bits.

    Args:
        class_names: in the order of the labels, or () for "0" to "9".

    Raises:
        DataError: a digit is not among them.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    names = tuple(str(name) for name in bunch.target_names)
    names, labels = number_classes({"train": bunch.target.astype(np.int64)}, {"train": names}, class_names, "digits")
    return Split(labels["train"], names, images.__getitem__, "digits, image {}".format)
