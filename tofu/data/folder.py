"""Splits from a local folder: parquet files, or images in one folder per class.

A layout that can be read in two ways is refused in one line; nothing is guessed.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from tofu.data.images import IMAGE_SUFFIXES, Pixels, read_image
from tofu.data.splits import Split, files_by_role, split_role
from tofu.data.tables import parquet_split
from tofu.errors import DataError, first_line

_LOG = logging.getLogger("tofu.data")
_LAYOUTS = "parquet files, or images as <class>/*.png with a folder per class"


def folder_splits(folder: Path, class_names: tuple[str, ...], client_column: str = "") -> dict[str, Split]:
    """Read the splits of a local folder, by role ("train", "test", "validation").

    A parquet file belongs to the split that its name, or else its folder's name, begins or ends with
    (`tofu.data.splits.split_role`). Without such a name anywhere, everything is "train".

    Args:
        folder: to be read.
        class_names: the classes of the run in the order of their labels, or () for those of the folder.
        client_column: of parquet files, with the name of each image's client.

    Raises:
        DataError: the folder cannot be read, or its layout is ambiguous.
    """
    try:
        files = sorted((*folder.glob("*.parquet"), *folder.glob("*/*.parquet")))
        if files:
            roles = files_by_role(folder, files)
            return {role: parquet_split(paths, class_names, client_column) for role, paths in roles.items()}
        roots = {role: path for path in _subfolders(folder) if (role := split_role(path.name)) and _subfolders(path)}
        return _image_splits(roots if "train" in roots else {"train": folder}, class_names)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {first_line(error)}") from error


def _subfolders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def _class_folders(root: Path) -> dict[str, list[Path]]:
    """The images of each class: a folder of images, or an empty one. Other folders are skipped with a warning.

    Raises:
        DataError: a class has images in a folder below its own.
    """
    classes = {}
    if unlabeled := _images(root):
        _LOG.warning("%s has %d images outside the class folders, which are not read", root, len(unlabeled))
    for folder in _subfolders(root):
        for below in _subfolders(folder):
            if any(Path(name).suffix.lower() in IMAGE_SUFFIXES for _, _, names in os.walk(below) for name in names):
                raise DataError(f"{below} has images below a class folder: expected them in {folder} itself")
        images = _images(folder)
        if images or not any(folder.iterdir()):
            classes[folder.name] = images
        else:
            _LOG.warning("%s has files but no images and is not read as a class", folder)
    return classes


def _image_splits(roots: Mapping[str, Path], class_names: tuple[str, ...]) -> dict[str, Split]:
    """Read splits of <class>/*.png, with one numbering of the classes for all of them."""
    by_role = {role: _class_folders(root) for role, root in roots.items()}
    found = {name for classes in by_role.values() for name in classes}
    names = class_names or tuple(sorted(found, key=lambda name: name.zfill(20) if name.isdecimal() else name))
    if unknown := sorted(found - set(names)):
        raise DataError(f"{roots['train'] / unknown[0]} is no class of this run: expected {', '.join(names)}")
    splits = {}
    for role, classes in by_role.items():
        paths = [path for images in classes.values() for path in images]
        if not paths:
            raise DataError(f"{roots[role]} has no labeled images: expected {_LAYOUTS}")
        if not class_names and all(split_role(name) for name in classes):
            inside = ", ".join(sorted(classes))
            raise DataError(f"{roots[role]} has images directly in {inside}, which names a split: expected {_LAYOUTS}")
        labels = np.array([names.index(path.parent.name) for path in paths], dtype=np.int64)
        splits[role] = Split(labels, names, partial(_read_row, paths), partial(_row_origin, paths))
    return splits


def _read_row(paths: Sequence[Path], row: int) -> Pixels:
    return read_image(paths[row])


def _row_origin(paths: Sequence[Path], row: int) -> str:
    return str(paths[row])
