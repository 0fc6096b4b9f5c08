"""One split of a dataset: labels in memory, and images that are decoded when they are needed."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tofu.data.images import MAX_12_BIT, ImageShape, LabeledImages, RawPixels, fit_image, to_8_bits
from tofu.data.partition import IntArray
from tofu.data.preprocessing import Preprocessing
from tofu.errors import DataError, NoneReadableError, SettingError

_SYNONYMS = {
    "train": ("training", "train"),
    "test": ("testing", "test", "evaluation", "eval"),
    "validation": ("validation", "valid", "val", "dev"),
}
_LOG = logging.getLogger("tofu.data")
_MAX_NAMED = 20
"""Maximum number of rows that are left out for which the log has a line."""
_MAX_SIZED, _MAX_SIZES = 1000, 3
"""Maximum number of images whose sizes are counted for an error, and of sizes that it names."""
_FIXED_SEED = 20240229  # seeds the splits that are the same in every run
_SHARD_NUMBER = re.compile(r"[-_.]?\d+(-of-\d+(-[0-9a-f]{16})?)?$")


@dataclass(frozen=True)
class Split:
    """Rows of a dataset.

    Attributes:
        labels: int64 [n].
        class_names: in the order of the labels.
        read: row -> its image, as its file has it. Raises DataError with a text that completes "ORIGIN ...".
        origin: row -> its file or its row in a table, for error messages.
        ids: name of each row's client [n], if the data have such a column.
        read_as: a sentence about the columns or folders that were read as images and labels.
        left_out: descriptions of files and columns that were not read.
        unusable: for each row that is left out because it has no label or client, its origin and the reason.
    """

    labels: IntArray
    class_names: tuple[str, ...]
    read: Callable[[int], RawPixels]
    origin: Callable[[int], str]
    ids: NDArray[np.str_] | None = None
    read_as: str = ""
    left_out: tuple[str, ...] = ()
    unusable: tuple[str, ...] = ()

    def prepared(self, preprocessing: Preprocessing) -> "Split":
        """Return the split with its images in 8 bits, resized and cropped."""
        return replace(self, read=lambda row: preprocessing(self.read(row)))

    def gray_bits(self) -> int:
        """Return the significant bits of 16-bit gray images: 12 if no image exceeds 4095, else 16.

        Returns 0 if the first readable image is of another kind, without reading further ones.
        """
        bits = 0
        for row in range(len(self.labels)):
            with suppress(DataError):
                pixels = self.read(row)
                if pixels.dtype != np.uint16:
                    if not bits:
                        return 0
                elif pixels.max(initial=0) > MAX_12_BIT:
                    return 16
                else:
                    bits = 12
        return bits

    def image_shape(self) -> ImageShape:
        """Return the shape of the first readable image, which all others must have.

        Raises DataError if there is none.
        """
        first = ""
        for row in range(len(self.labels)):
            try:
                pixels = self.read(row)
            except DataError as error:
                first = first or f"{self.origin(row)} {error}"
            else:
                return ImageShape(1 if pixels.ndim == 2 else 3, pixels.shape[0], pixels.shape[1], len(self.class_names))
        raise DataError(f"none of {len(self.labels)} images can be read: {first}")

    def decode(self, rows: IntArray, shape: ImageShape, *, strict: bool = False) -> LabeledImages:
        """Decode the images of some rows (int64 [k]). Those that cannot be read are left out, with a warning for each.

        Args:
            strict: raise an error for an image that cannot be read.

        Raises:
            NoneReadableError: no image can be read.
            DataError: one differs from `shape` in size or color.
        """
        images = np.empty((len(rows), *shape.chw), dtype=np.uint8)
        kept: list[int] = []
        unreadable: list[str] = []
        for row in rows.tolist():
            try:
                pixels = self.read(row)
            except DataError as error:
                unreadable.append(f"{self.origin(row)} {error}")
                if strict:
                    raise DataError(f"{unreadable[-1]} (strict=true)") from error
                continue
            if pixels.shape[:2] != (shape.height, shape.width):
                raise DataError(f"{self.origin(row)} {self._size_problem(pixels, shape)}")
            try:
                images[len(kept)] = fit_image(to_8_bits(pixels), shape)
            except DataError as error:
                raise DataError(f"{self.origin(row)} {error}") from error
            kept.append(row)
        if unreadable and not kept:
            raise NoneReadableError(f"none of {len(unreadable)} images can be read: {unreadable[0]}")
        for text in unreadable:
            _LOG.warning("%s: it is left out", text)
        labels = torch.from_numpy(self.labels[np.array(kept, dtype=np.int64)])
        return LabeledImages(torch.from_numpy(images[: len(kept)]), labels, shape.classes, tuple(unreadable))

    def _size_problem(self, pixels: RawPixels, shape: ImageShape) -> str:
        """Return what is wrong with an image of another size than `shape`, and which `resize` fits most images."""
        rows = np.linspace(0, len(self.labels) - 1, min(len(self.labels), _MAX_SIZED)).astype(int).tolist()
        sizes: Counter[str] = Counter()
        for row in rows:
            with suppress(DataError):
                sizes[_size(*self.read(row).shape[:2])] += 1
        first = _size(shape.height, shape.width)
        named = sizes.most_common(_MAX_SIZES)
        counts = [f"{count} {'has' if count == 1 else 'have'} {size}" for size, count in named]
        if others := sizes.total() - sum(count for _, count in named):
            counts.append(f"{others} {'has another size' if others == 1 else 'have other sizes'}")
        best = named[0][0] if len(sizes) > 1 else first
        return (
            f"has {_size(*pixels.shape[:2])} pixels, the first image {first} (height x width): of {sizes.total()} "
            f"images {', '.join(counts)}; --resize {best} (in Python resize={best!r}) gives all images one size"
        )

    def check_labels(self) -> None:
        """Raises DataError if a label is not the index of a class name."""
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.class_names)))
        if len(wrong):
            label, last = self.labels[wrong[0]], len(self.class_names) - 1
            raise DataError(f"{self.origin(int(wrong[0]))} has label {label}: labels are expected to be 0 to {last}")


def _size(height: int, width: int) -> str:
    return f"{height}x{width}"


def row_origin(parts: Sequence[tuple[str, int]]) -> Callable[[int], str]:
    """Return a function that names the file of a row of joined tables, and its row in that file, counted from 0.

    Args:
        parts: the name of each file and its number of rows.

    >>> row_origin([("a.csv", 10), ("b.csv", 5)])(12)
    'b.csv, row 2'
    """
    ends = np.cumsum([count for _, count in parts])

    def origin(row: int) -> str:
        part = int(np.searchsorted(ends, row, side="right"))
        return f"{parts[part][0]}, row {row - int(ends[part]) + parts[part][1]}"

    return origin


def report_unusable(unusable: Sequence[str], *, strict: bool) -> None:
    """Log the rows that are left out. Raises DataError for the first one if `strict`."""
    if unusable and strict:
        raise DataError(f"{unusable[0]} (strict=true)")
    for text in unusable[:_MAX_NAMED]:
        _LOG.warning("%s: it is left out", text)
    if len(unusable) > _MAX_NAMED:
        _LOG.warning("%d more rows are left out", len(unusable) - _MAX_NAMED)


def split_role(name: str) -> str | None:
    """Return the split that a file (without its suffix), folder or hub split holds:
    "train", "test", "validation" or None.

    After the number of a shard has been removed, the name must begin or end with the name of one split, as a word of
    its own: "train-00000-of-00002" and "mnist_test" do, "my-test-scanner" and "train-test" do not.
    """
    words = re.split(r"[^a-z]+", shard_stem(name.lower()))
    roles = {role for word in (words[0], words[-1]) for role, synonyms in _SYNONYMS.items() if word in synonyms}
    return roles.pop() if len(roles) == 1 else None


def shard_stem(name: str) -> str:
    """Return a name without the number of its shard.

    >>> shard_stem("train-00000-of-00002"), shard_stem("part.3"), shard_stem("train-00000-of-00001-0f1e2d3c4b5a6978")
    ('train', 'part', 'train')
    """
    return _SHARD_NUMBER.sub("", name)


def hold_out(labels: IntArray, fraction: float) -> tuple[IntArray, IntArray]:
    """Return the rows (kept, held out): `fraction` of each class is held out,
    at least one image of a class of two or more.
    """
    rng = np.random.default_rng(_FIXED_SEED)
    held = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held.append(rows[: max(round(fraction * len(rows)), min(1, len(rows) - 1))])
    test_rows = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), test_rows), test_rows


def subset_rows(
    dataset: str, train: int, test: int, train_images: int, test_images: int, seed: int
) -> tuple[IntArray, IntArray]:
    """Return random rows 0..train-1 to train on and 0..test-1 to test on; the latter do not depend on the seed.

    Raises:
        SettingError: there are fewer rows than wanted (0 uses all).
    """
    for field, wanted, count in (("train_images", train_images, train), ("test_images", test_images, test)):
        if wanted > count:
            raise SettingError(field, wanted, f"at most {count}, the number that {dataset} has (0 uses all)")
    train_rows, test_rows = np.arange(train), np.arange(test)
    if train_images:
        train_rows = np.random.default_rng([seed, 0]).permutation(train_rows)[:train_images]
    if test_images:
        test_rows = np.random.default_rng(_FIXED_SEED).permutation(test_rows)[:test_images]
    return train_rows, test_rows


def files_by_role(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Group the files of a dataset by split, from the name of the file or else of its folder.

    All files must be of one configuration: in one folder, or in folders of the splits inside it. The names of a split's
    files may differ only in the number of a shard.

    Raises:
        DataError: the files are of several configurations, or some names have a split and others do not.
    """
    by_role: dict[str, list[Path]] = {}
    unnamed, configurations = [], set()
    for file in files:
        in_folder = split_role(file.parent.name) if file.parent != folder else None
        role = split_role(file.stem) or in_folder
        if role is None:
            unnamed.append(file)
        configurations.add(file.parent.parent if in_folder else file.parent)
        by_role.setdefault(role or "train", []).append(file)
    if unnamed and len(unnamed) < len(files):
        raise DataError(
            f"{unnamed[0]} has no split in its name, unlike other files: expected train, test or validation"
        )
    if len(configurations) > 1:
        first, second, *_ = sorted(configurations)
        raise DataError(f"{folder} has files in {first} and in {second}: name the folder of one configuration")
    for role, paths in by_role.items():
        kinds = sorted({(path.parent, shard_stem(path.stem), path.suffix): path for path in paths}.values())
        if len(kinds) > 1:
            found = f"{kinds[0]} and {kinds[1]}"
            raise DataError(f"{folder} has for {role} both {found}: name one of them, or the folder of one")
    return by_role
