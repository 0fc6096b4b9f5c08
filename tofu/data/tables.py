"""Splits from parquet files, and from tables in the layout of Hugging Face datasets.

The image column is the one that `image-column` names, or else the only one of encoded images, or else the only one of
them with a usual name. `tofu.data.classes` has the rules for labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tofu.data.classes import check_column, check_unique, features_of, label_column, label_values, number_classes
from tofu.data.images import Pixels, read_image
from tofu.data.splits import Split
from tofu.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow

_IMAGE_NAMES = ("image", "img", "images", "pixels", "picture")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the images, their labels and their clients' names; "" where none is named."""

    image: str = ""
    label: str = ""
    client: str = ""


@dataclass(frozen=True)
class ImageTable:
    """A table that is read column by column.

    Attributes:
        schema: of the table; Hugging Face features in its metadata are used if there are any.
        read: names of columns -> the table of these columns.
        origin: where it is from, for error messages.
        folder: that the paths in the image column are relative to.
    """

    schema: "pyarrow.Schema"
    read: Callable[[list[str]], "pyarrow.Table"]
    origin: str
    folder: Path

    @staticmethod
    def of_files(files: Sequence[Path]) -> "ImageTable":
        """A table of parquet files of one schema. Raises DataError if a file is not parquet."""
        import pyarrow
        from pyarrow import parquet

        def read(columns: list[str]) -> "pyarrow.Table":
            tables = []
            for file in files:
                try:
                    tables.append(parquet.ParquetFile(file).read(columns=columns))
                except (OSError, pyarrow.ArrowException) as error:
                    raise DataError(f"{file} cannot be read as parquet: {first_line(error)}") from error
            try:
                return pyarrow.concat_tables(tables)
            except pyarrow.ArrowException as error:
                reason = f"has parquet files of differing columns: {first_line(error)}"
                raise DataError(f"{files[0].parent} {reason}") from error

        try:
            schema = parquet.read_schema(files[0])
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{files[0]} cannot be read as parquet: {first_line(error)}") from error
        return ImageTable(schema, read, str(files[0] if len(files) == 1 else files[0].parent), files[0].parent)


def table_splits(
    tables: Mapping[str, ImageTable], columns: Columns, class_names: tuple[str, ...] = ()
) -> dict[str, Split]:
    """Read the splits of a dataset from one table each, with one numbering of the classes. Images are read on use.

    Args:
        tables: by role; must not be empty.
        class_names: of the run, or () to use the tables' own.

    Raises:
        DataError: there is no unambiguous image or label column, or a label is missing or not one of the classes.
    """
    labels, declared, chosen = {}, {}, {}
    for role, table in tables.items():
        chosen[role] = (
            _image_column(table.schema, columns.image, table.origin),
            label_column(table.schema, columns.label, table.origin),
        )
        name = chosen[role][1]
        labels[role] = label_values(table.read([name])[name], name, table.origin)
        names = features_of(table.schema).get(name, {}).get("names")
        declared[role] = tuple(map(str, names)) if isinstance(names, list) else ()
    origin = tables.get("train", next(iter(tables.values()))).origin
    class_names, numbered = number_classes(labels, declared, class_names, origin)
    splits = {}
    for role, table in tables.items():
        image, label = chosen[role]
        read_as = f"images of column {image!r}, labels of column {label!r}"
        splits[role] = Split(
            numbered[role], class_names, _reader(table, image), f"{table.origin}, row {{}}".format,
            _ids(table, columns.client), read_as, _others(table.schema.names, image, label, columns.client),
        )  # fmt: skip
    return splits


def _others(names: list[str], *used: str) -> tuple[str, ...]:
    others = [name for name in names if name not in used]
    return (f"columns {', '.join(others)}",) if others else ()


def _reader(table: ImageTable, image: str) -> Callable[[int], Pixels]:
    images = cache(lambda: table.read([image])[image])

    def pixels(row: int) -> Pixels:
        value = images()[row].as_py()
        if isinstance(value, dict):
            value = value["bytes"] or (value["path"] and table.folder / value["path"])
        if not value:
            raise DataError("cannot be read as an image: the cell is empty")
        return read_image(value)

    return pixels


def _ids(table: ImageTable, client_column: str) -> "np.ndarray[tuple[int, ...], np.dtype[np.str_]] | None":
    if not client_column:
        return None
    check_column(table.schema.names, client_column, table.origin)
    return np.asarray(table.read([client_column])[client_column].to_numpy()).astype(str)


def _image_column(schema: "pyarrow.Schema", chosen: str, origin: str) -> str:
    """The column of the images: `chosen`, or if that is "" the only candidate. Raises DataError if there is none."""
    from pyarrow import types

    def encoded(type_: "pyarrow.DataType") -> bool:
        if types.is_struct(type_):
            return {"bytes", "path"} <= {field.name for field in type_}
        return bool(types.is_binary(type_) or types.is_large_binary(type_))

    features = features_of(schema)
    images: list[str] = [f.name for f in schema if features.get(f.name, {}).get("_type") == "Image" or encoded(f.type)]
    if chosen:
        check_column(schema.names, chosen, origin)
        if chosen not in images:
            raise DataError(f"{origin} has no encoded images in column {chosen!r}: expected one of {', '.join(images)}")
        return chosen
    check_unique(schema.names, origin)
    found = images if len(images) == 1 else [name for name in images if name.lower() in _IMAGE_NAMES]
    if len(found) == 1:
        return found[0]
    if images:
        raise DataError(f"{origin} has several image columns ({', '.join(images)}): name one (image-column)")
    raise DataError(f"{origin} has no column of encoded images among {', '.join(schema.names)}")
