"""Splits from parquet files, and from tables in the layout of Hugging Face datasets.

The image column is that of the setting `image-column`, or the only column of encoded images, or the only one of these
with a usual name. `tofu.data.classes` has the rules for labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tofu.data.classes import check_column, check_unique, features_of, label_column, label_values, number_classes
from tofu.data.images import RawPixels, read_image
from tofu.data.partition import IntArray
from tofu.data.splits import Split, row_origin
from tofu.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow

_IMAGE_NAMES = ("image", "img", "images", "pixels", "picture")


@dataclass(frozen=True)
class Columns:
    """Names of the columns of images, labels and client names; "" if a name is not given."""

    image: str = ""
    label: str = ""
    client: str = ""


@dataclass(frozen=True)
class ImageTable:
    """A table that is read column by column.

    Attributes:
        schema: of the table; Hugging Face features in its metadata are used if there are any.
        read: names of columns -> the table of these columns.
        origin: name of the file or dataset, for error messages.
        row_origin: row -> its origin, for error messages.
        folder: base of relative paths in the image column.
    """

    schema: "pyarrow.Schema"
    read: Callable[[list[str]], "pyarrow.Table"]
    origin: str
    row_origin: Callable[[int], str]
    folder: Path

    @staticmethod
    def of_files(files: Sequence[Path]) -> "ImageTable":
        """Open a table of parquet files of one schema. Raises DataError if a file is not parquet."""
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
        origin = str(files[0] if len(files) == 1 else files[0].parent)

        def origin_of(row: int) -> str:
            return row_origin([(str(file), parquet.read_metadata(file).num_rows) for file in files])(row)

        return ImageTable(schema, read, origin, origin_of, files[0].parent)


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
    labels, declared, chosen, rows, unusable = {}, {}, {}, {}, {}
    for role, table in tables.items():
        chosen[role] = (
            _image_column(table.schema, columns.image, table.origin),
            label_column(table.schema, columns.label, table.origin),
        )
        name = chosen[role][1]
        labels[role], rows[role], unusable[role] = _usable(table, name, columns.client)
        names = features_of(table.schema).get(name, {}).get("names")
        declared[role] = tuple(map(str, names)) if isinstance(names, list) else ()
    origin = tables.get("train", next(iter(tables.values()))).origin
    class_names, numbered = number_classes(labels, declared, class_names, origin)
    splits = {}
    for role, table in tables.items():
        image, label = chosen[role]
        read_as = f"images of column {image!r}, labels of column {label!r}"
        ids = _ids(table, columns.client)
        splits[role] = Split(
            numbered[role], class_names, _reader(table, image, rows[role]), partial(_origin, table, rows[role]),
            np.array(ids)[rows[role]].astype(str) if ids else None, read_as,
            _others(table.schema.names, image, label, columns.client), unusable[role],
        )  # fmt: skip
    return splits


def _origin(table: ImageTable, rows: IntArray, row: int) -> str:
    return table.row_origin(int(rows[row]))


def _usable(table: ImageTable, label: str, client: str) -> tuple[NDArray[Any], IntArray, tuple[str, ...]]:
    """Return the labels of the rows that have label and client, these rows, and why the others are left out."""
    column = table.read([label])[label]
    labels, rows = label_values(column, label, table.origin)
    reasons = dict.fromkeys(set(range(len(column))) - set(rows.tolist()), f"has no label in column {label!r}")
    for row, name in enumerate(_ids(table, client)):
        if name is None:
            reasons.setdefault(row, f"names no client in column {client!r}")
        elif row in reasons:
            reasons[row] = f"(client {name}) {reasons[row]}"
    kept = np.array([row not in reasons for row in rows.tolist()], dtype=bool)
    return labels[kept], rows[kept], tuple(f"{table.row_origin(row)} {reasons[row]}" for row in sorted(reasons))


def _others(names: list[str], *used: str) -> tuple[str, ...]:
    others = [name for name in names if name not in used]
    return (f"columns {', '.join(others)}",) if others else ()


def _reader(table: ImageTable, image: str, rows: IntArray) -> Callable[[int], RawPixels]:
    images = cache(lambda: table.read([image])[image])

    def pixels(row: int) -> RawPixels:
        value = images()[int(rows[row])].as_py()
        if isinstance(value, dict):
            value = value["bytes"] or value["path"]
        if not value:
            raise DataError("cannot be read as an image: the cell is empty")
        return read_image(table.folder / value if isinstance(value, str) else value)

    return pixels


def _ids(table: ImageTable, client_column: str) -> list[str | None]:
    """Return the name of each row's client; [] without a client column."""
    if not client_column:
        return []
    check_column(table.schema.names, client_column, table.origin)
    values = table.read([client_column])[client_column].to_pylist()
    return [None if value is None else str(value) for value in values]


def _image_column(schema: "pyarrow.Schema", chosen: str, origin: str) -> str:
    """Return the column of the images: `chosen`, or if that is "" the only candidate.

    Raises DataError if there is none.
    """
    from pyarrow import types

    def encoded(name: str, type_: "pyarrow.DataType") -> bool:
        if types.is_struct(type_):
            return {"bytes", "path"} <= {field.name for field in type_}
        paths = features.get(name, {}).get("_type") == "Image" and str(type_) in ("string", "large_string")
        return str(type_) in ("binary", "large_binary", "binary_view") or paths

    features = features_of(schema)
    images: list[str] = [field.name for field in schema if encoded(field.name, field.type)]
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
