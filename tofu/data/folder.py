"""Splits from a local folder: parquet files, images in one folder per class, or images with a metadata file.

The rules:

- If there are parquet files other than metadata files, they are the dataset.
- Folders with the name of a split (`tofu.data.splits.split_role`) are the splits, if one of them is for training; else
  the folder of the dataset is the training split.
- A metadata file (metadata.csv, .jsonl or .parquet) in the folder of a split names its images in the column
  file_name, and their labels in another.
- Otherwise each folder with images in a split is a class. Images in deeper folders are refused.
- Hidden folders and those of operating systems, empty folders and images outside the classes are left out and reported.

An ambiguous layout is refused.
"""

import logging
import os
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tofu.data.classes import check_column, label_column, label_values, number_classes
from tofu.data.images import IMAGE_SUFFIXES, RawPixels, read_image
from tofu.data.splits import Split, files_by_role, split_role
from tofu.data.tables import Columns, ImageTable, table_splits
from tofu.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow

_LOG = logging.getLogger("tofu.data")
_LAYOUTS = "parquet files, or images as <class>/*.png with a folder per class"
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_FILE_NAME = "file_name"
_MAX_DEPTH = 2
"""Of folders with tables in the folder of a dataset: <configuration>/<split>."""
_OF_SYSTEMS = frozenset((
    "@eadir", "#recycle", "#snapshot", "lost+found", "$recycle.bin", "system volume information",
))  # fmt: skip


def folder_splits(folder: Path, class_names: tuple[str, ...], columns: Columns) -> dict[str, Split]:
    """Read the splits of a local folder, by role ("train", "test", "validation").

    Args:
        folder: to be read.
        class_names: the classes of the run in the order of their labels, or () for those of the folder.
        columns: of parquet and metadata files.

    Raises:
        DataError: the folder cannot be read, or its layout is ambiguous.
    """
    try:
        if files := data_files(folder, (".parquet",)):
            tables = {role: ImageTable.of_files(paths) for role, paths in files_by_role(folder, files).items()}
            return table_splits(tables, columns, class_names)
        return _image_splits(folder, class_names, columns)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {first_line(error)}") from error


def data_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files of tables in a folder, to a depth of two (<configuration>/<split>/0000.parquet,
    as on the hub).
    """
    below = [folder, *_subfolders(folder)]
    below += [deeper for path in below[1:] for deeper in _subfolders(path)]
    found = sorted(path for parent in below for path in _tables_in(parent, suffixes))
    for path in below if found else ():
        if len(path.relative_to(folder).parts) == _MAX_DEPTH:
            for deeper in _subfolders(path):
                for file in _tables_in(deeper, suffixes):
                    raise DataError(f"{file} is in a folder of depth {_MAX_DEPTH + 1}: expected at most {_MAX_DEPTH}")
    return found


def _tables_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    return [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes
        and path.name not in _METADATA
        and not path.name.startswith(".")
        and path.is_file()
    ]


def _subfolders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not _is_of_a_system(path.name))


def _is_of_a_system(name: str) -> bool:
    return name.startswith((".", "__")) or name.lower() in _OF_SYSTEMS


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def _visible_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]


def _image_splits(folder: Path, class_names: tuple[str, ...], columns: Columns) -> dict[str, Split]:
    """Read splits of images, with one numbering of the classes for all of them."""
    roots, left_out = _split_folders(folder)
    paths: dict[str, list[Path]] = {}
    labels: dict[str, NDArray[Any]] = {}
    read_as: dict[str, str] = {}
    unusable: dict[str, tuple[str, ...]] = {}
    for role, root in roots.items():
        if metadata := _metadata(root):
            paths[role], labels[role], unusable[role], read_as[role] = _read_metadata(metadata, columns)
            unlisted = len(set(_images(root)) - set(paths[role]))
            left_out += [f"{unlisted} images in {root} that {metadata.name} does not name"] if unlisted else []
        else:
            classes = _class_folders(root, left_out)
            paths[role] = [path for images in classes.values() for path in images]
            named = [name for name, images in classes.items() for _ in images]
            labels[role], read_as[role] = np.array(named, dtype=object), "images of one folder per class"
            if classes and not class_names and all(split_role(name) for name in classes):
                inside = ", ".join(sorted(classes))
                raise DataError(f"{root} has images directly in {inside}, which names a split: expected {_LAYOUTS}")
        if not paths[role]:
            raise DataError(f"{root} has no labeled images: expected {_LAYOUTS}")
    names, numbered = number_classes(labels, {}, class_names, str(next(iter(roots.values()))))
    for text in left_out:
        _LOG.warning("%s: not read", text)
    splits = {}
    for role in roots:
        read, origin = partial(_read_row, paths[role]), partial(_row_origin, paths[role])
        splits[role] = Split(
            numbered[role], names, read, origin, None, read_as[role], tuple(left_out), unusable.get(role, ())
        )
    return splits


def _split_folders(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the folder of each split, and descriptions of other folders.

    Raises DataError if two folders are of one split.
    """
    roots: dict[str, Path] = {}
    others = []
    for path in _subfolders(folder):
        role = split_role(path.name)
        if role is None or not (_subfolders(path) or _metadata(path)):
            others.append(path)
        elif role in roots:
            raise DataError(f"{folder} has both {roots[role].name} and {path.name} for {role}: expected one of them")
        else:
            roots[role] = path
    if list(roots) == ["test"] and not others:  # the data of a server whose clients have their own
        return roots, []
    if "train" not in roots:
        return {"train": folder}, []
    return roots, [f"folder {path}, which is no split" for path in others]


def _class_folders(root: Path, left_out: list[str]) -> dict[str, list[Path]]:
    """Return the images of each class. Adds descriptions of what is not read to `left_out`.

    Raises:
        DataError: there are images below a class folder.
    """
    classes: dict[str, list[Path]] = {}
    if unlabeled := _images(root):
        left_out.append(f"{len(unlabeled)} images in {root} outside the class folders")
    for folder in _subfolders(root):
        if deep := _folder_below_with_images(folder):
            hint = f", or name {folder} as the dataset" if len(_subfolders(root)) == 1 else ""
            raise DataError(f"{deep} has images below a class folder: expected them in {folder} itself{hint}")
        name = unicodedata.normalize("NFC", folder.name)
        if name in classes:
            raise DataError(f"{root} has two folders for class {name}, in different Unicode forms: expected one")
        if images := _images(folder):
            classes[name] = images
            if others := sorted({path.suffix for path in _visible_files(folder)} - {path.suffix for path in images}):
                left_out.append(f"files in {folder} that are no images ({', '.join(others)})")
        else:
            left_out.append(f"folder {folder}, which has no images")
    return classes


def _folder_below_with_images(folder: Path) -> Path | None:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_of_a_system(name))
        has_images = any(Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".") for name in files)
        if has_images and Path(parent) != folder:
            return Path(parent)
    return None


def _metadata(root: Path) -> Path | None:
    """Return the metadata file of a folder of images. Raises DataError if there are several."""
    found = [root / name for name in _METADATA if (root / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{root} has {found[0].name} and {found[1].name}: expected one of them")
    return found[0] if found else None


def _read_metadata(file: Path, columns: Columns) -> tuple[list[Path], NDArray[Any], tuple[str, ...], str]:
    """Return the images that a metadata file names, their labels, the rows without a label, and how they were read."""
    table = _table(file)
    check_column(table.column_names, _FILE_NAME, str(file))
    label = label_column(table.schema, columns.label, str(file))
    labels, rows = label_values(table[label], label, str(file))
    names = table[_FILE_NAME].to_pylist()
    unlabeled = sorted(set(range(len(names))) - set(rows.tolist()))
    unusable = tuple(f"{file}, row {row} has no label in column {label!r}" for row in unlabeled)
    paths = [file.parent / str(names[row] or "") for row in rows]
    given: dict[Path, object] = {}
    for path, value in zip(paths, labels.tolist(), strict=True):
        if given.setdefault(path, value) != value:
            raise DataError(
                f"{file} has {path.name} with the labels {given[path]} and {value}: expected one for an image"
            )
    return paths, labels, unusable, f"images and labels of columns {_FILE_NAME!r} and {label!r} of {file.name}"


def _table(file: Path) -> "pyarrow.Table":
    import pyarrow
    from pyarrow import csv, json, parquet

    read: Any = {".csv": csv.read_csv, ".jsonl": json.read_json, ".parquet": parquet.read_table}[file.suffix]
    try:
        return read(file)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} cannot be read as a table: {first_line(error)}") from error


def _read_row(paths: Sequence[Path], row: int) -> RawPixels:
    return read_image(paths[row])


def _row_origin(paths: Sequence[Path], row: int) -> str:
    return str(paths[row])
