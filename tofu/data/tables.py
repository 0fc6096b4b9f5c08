"""Splits from parquet files, and from tables in the layout of Hugging Face datasets."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tofu.data.images import Pixels, read_image
from tofu.data.splits import Split
from tofu.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow

_IMAGE_NAMES = ("image", "img", "images", "pixels", "picture")
_LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "y")
_MAX_CLASSES = 1 << 16


def parquet_split(files: Sequence[Path], class_names: tuple[str, ...], client_column: str = "") -> Split:
    """Read one split from parquet files of one schema. The image column is read on first use.

    Args:
        files: of the split, in order.
        class_names, client_column: as in `table_split`.

    Raises:
        DataError: a file is not parquet, or the files have different columns; as `table_split`.
    """
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
            raise DataError(f"{files[0].parent} has parquet files of differing columns: {first_line(error)}") from error

    try:
        schema = parquet.read_schema(files[0])
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{files[0]} cannot be read as parquet: {first_line(error)}") from error
    origin = str(files[0] if len(files) == 1 else files[0].parent)
    return table_split(schema, read, origin, files[0].parent, class_names, client_column)


def table_split(
    schema: "pyarrow.Schema",
    read: Callable[[list[str]], "pyarrow.Table"],
    origin: str,
    folder: Path,
    class_names: tuple[str, ...] = (),
    client_column: str = "",
) -> Split:
    """Read one split from a table, column by column.

    Args:
        schema: of the table; Hugging Face features in its metadata are used if there are any.
        read: names of columns -> the table of these columns.
        origin: of the table, for error messages.
        folder: that the paths in the image column are relative to.
        class_names: of the run, or () to use the table's own.
        client_column: with the name of each image's client; "" if there is none.

    Raises:
        DataError: there is no unambiguous image or label column, a label is missing or not a class number, or the
            table's class names are not `class_names`.
    """
    features = _features(schema)
    image_name, label_name = _image_column(schema, features, origin), _label_column(schema, features, origin)
    column = read([label_name])[label_name]
    if column.null_count or not len(column):
        raise DataError(f"{origin} has {'rows without a label' if len(column) else 'no rows'}")
    labels = np.asarray(column.to_numpy(), dtype=np.int64)
    declared = features.get(label_name, {}).get("names")
    own_names = declared if isinstance(declared, list) else []
    if not own_names and labels.max() >= _MAX_CLASSES:
        raise DataError(f"{origin} has label {labels.max()} in column {label_name}: expected class numbers from 0 on")
    names = tuple(map(str, own_names or range(max(int(labels.max()) + 1, 1))))
    if class_names and own_names and names != class_names:
        raise DataError(f"{origin} has the classes {', '.join(names)}: expected {', '.join(class_names)}")
    images = cache(lambda: read([image_name])[image_name])

    def pixels(row: int) -> Pixels:
        value = images()[row].as_py()
        if isinstance(value, dict):
            value = value["bytes"] or (value["path"] and folder / value["path"])
        if not value:
            raise DataError("cannot be read as an image: the cell is empty")
        return read_image(value)

    ids = None
    if client_column:
        if client_column not in schema.names:
            raise DataError(f"{origin} has no column {client_column!r}: expected one of {', '.join(schema.names)}")
        ids = np.asarray(read([client_column])[client_column].to_numpy()).astype(str)
    return Split(labels, class_names or names, pixels, f"{origin}, row {{}}".format, ids)


def _features(schema: "pyarrow.Schema") -> dict[str, dict[str, object]]:
    """The Hugging Face features by column, as far as the schema's metadata holds any that can be read."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    items = features.items() if isinstance(features, dict) else ()
    return {name: feature for name, feature in items if isinstance(feature, dict)}


def _image_column(schema: "pyarrow.Schema", features: Mapping[str, Mapping[str, object]], origin: str) -> str:
    """The only column of encoded images, or the only one of them with a usual name."""
    from pyarrow import types

    def encoded(type_: "pyarrow.DataType") -> bool:
        if types.is_struct(type_):
            return {"bytes", "path"} <= {field.name for field in type_}
        return bool(types.is_binary(type_) or types.is_large_binary(type_))

    images: list[str] = [f.name for f in schema if features.get(f.name, {}).get("_type") == "Image" or encoded(f.type)]
    named = [name for name in images if name in _IMAGE_NAMES]
    found = images if len(images) == 1 else named
    if len(found) == 1:
        return found[0]
    problem = f"several image columns ({', '.join(images)})" if images else "no column of encoded images"
    expected = f"one, or exactly one of them named {', '.join(_IMAGE_NAMES)}"
    raise DataError(f"{origin} has {problem} among {', '.join(schema.names)}: expected {expected}")


def _label_column(schema: "pyarrow.Schema", features: Mapping[str, Mapping[str, object]], origin: str) -> str:
    """The only column with the feature ClassLabel, or the first of the usual names among the whole numbers."""
    from pyarrow import types

    numbers: list[str] = [field.name for field in schema if types.is_integer(field.type)]
    declared = [name for name in numbers if features.get(name, {}).get("_type") == "ClassLabel"]
    if len(declared) == 1:
        return declared[0]
    for name in _LABEL_NAMES:
        if name in (declared or numbers):
            return name
    expected = f"whole numbers in a column named {' or '.join(_LABEL_NAMES)}"
    raise DataError(f"{origin} has no label column among {', '.join(schema.names)}: expected {expected}")
