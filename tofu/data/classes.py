"""The label column of a table, and the numbering of its classes: one set of rules for all kinds of data.

The label column is the one that `label-column` names, or else the only one with a usual name, or else the only one
with the Hugging Face feature ClassLabel. Its values are whole numbers or texts.
"""

import json
import unicodedata
from collections.abc import Iterable, Mapping
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tofu.data.partition import IntArray
from tofu.errors import DataError

if TYPE_CHECKING:
    import pyarrow

_LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "y")
_MAX_CLASSES = 1 << 16
_TEXTS = ("string", "large_string", "string_view")
_MISSING = ("", "nan", "<na>", "#n/a")
"""Cells of texts without a label, as pandas and spreadsheets write them; NA, None and null may be names."""

_NO_LABEL = -1
"""Label of rows with a secret label in a benchmark."""

Features = Mapping[str, Mapping[str, object]]


def features_of(schema: "pyarrow.Schema") -> Features:
    """Return the Hugging Face features by column, from the schema's metadata; empty if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    items = features.items() if isinstance(features, dict) else ()
    return {name: feature for name, feature in items if isinstance(feature, dict)}


def label_column(schema: "pyarrow.Schema", chosen: str, origin: str) -> str:
    """Return the column of the labels: `chosen`, or if that is "" the only candidate.

    Raises:
        DataError: there is no such column, none or more than one.
    """
    if chosen:
        check_column(schema.names, chosen, origin)
        return chosen
    check_unique(schema.names, origin)
    found: list[str] = [name for name in schema.names if name.lower() in _LABEL_NAMES]
    features = features_of(schema)
    found = found or [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{origin} may have its labels in {' or '.join(found)}: name one (label-column)")
    raise DataError(f"{origin} has no label column among {', '.join(schema.names)}: name it (label-column)")


def check_column(names: list[str], name: str, origin: str) -> None:
    """Raises DataError unless exactly one column has this name."""
    if names.count(name) != 1:
        problem = f"{names.count(name)} columns" if name in names else "no column"
        raise DataError(f"{origin} has {problem} {name!r}: expected one of {', '.join(names)}")


def check_unique(names: list[str], origin: str) -> None:
    """Raises DataError if two columns have the same name."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{origin} has {names.count(twice[0])} columns {twice[0]!r}: expected different names")


def label_values(column: "pyarrow.ChunkedArray", name: str, origin: str) -> tuple[NDArray[Any], IntArray]:
    """Return the labels as int64 or as texts (objects) [k], and the rows that have one, int64 [k].

    A row has no label if the cell is empty, "nan" or not a finite number. Texts are stripped and normalized to Unicode
    form NFC, as names of folders are. Whole numbers that were read as floats become int64.

    Raises:
        DataError: the column has no labels, or fractions or another type.
    """
    from pyarrow import types

    if not len(column):
        raise DataError(f"{origin} has no rows (column {name!r})")
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    column = column.cast(kind)
    rows, labels = np.arange(0), np.arange(0)
    if str(kind) in _TEXTS or types.is_boolean(kind):
        texts = [
            "" if value is None else unicodedata.normalize("NFC", str(value)).strip() for value in column.to_pylist()
        ]
        rows = np.flatnonzero([text.casefold() not in _MISSING for text in texts])
        labels = np.array([texts[row] for row in rows], dtype=object)
    elif types.is_floating(kind):
        values = column.to_numpy()
        rows = np.flatnonzero(np.isfinite(values))
        values = values[rows]
        if not np.all((values == np.floor(values)) & (np.abs(values) < _MAX_CLASSES)):
            raise DataError(f"{origin} has fractions in label column {name!r}: expected whole numbers or texts")
        labels = values.astype(np.int64)
    elif types.is_integer(kind):
        numbers = column.drop_null().to_pylist()
        if largest := [number for number in numbers if number > np.iinfo(np.int64).max]:
            raise DataError(f"{origin} has label {largest[0]}: expected class numbers from 0 on")
        rows, labels = np.flatnonzero(column.is_valid().to_numpy()), np.array(numbers, dtype=np.int64)
    elif "binary" in str(kind):
        raise DataError(f"{origin} has bytes, or texts that are not UTF-8, in label column {name!r}")
    elif not types.is_null(kind):
        raise DataError(f"{origin} has values of type {kind} in label column {name!r}: expected numbers or texts")
    if not len(rows):
        raise DataError(f"{origin} has no labels in column {name!r}: all cells are empty")
    return labels, rows


def check_several(names: tuple[str, ...], origin: str) -> None:
    """Raises DataError if the data of a run have only one class."""
    if len(names) == 1:
        raise DataError(f"{origin} has one class only ({names[0]}): expected at least two (class-names can name all)")


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in the order of their numbers: whole numbers by value, everything else as texts.

    >>> sorted_names(["10", "9", "cat"])
    ('9', '10', 'cat')
    """
    return tuple(sorted(set(names), key=lambda name: name.zfill(20) if name.isdecimal() else name))


def number_classes(
    values: Mapping[str, NDArray[Any]], declared: Mapping[str, tuple[str, ...]], wanted: tuple[str, ...], origin: str
) -> tuple[tuple[str, ...], dict[str, IntArray]]:
    """Return the names of the classes, and each split's labels as class numbers, int64 [n].

    Args:
        values: labels of each split, as `label_values` returns them; -1 is a secret label.
        declared: for each split, the names that the data declare for the numbers 0, 1, ...; () if there are none.
        wanted: the classes of the run in order; () takes those of the data: the declared ones, or all numbers up to
            the largest, or the texts in the order of `sorted_names`. If all labels are numbers without declared names,
            they are matched to the wanted names as texts, or if that fails, are positions in `wanted`.

    Raises:
        DataError: a label is not one of the classes, or one split has numbers where another has texts.
    """
    for role, labels in values.items():
        if labels.dtype != object and labels.max() >= _MAX_CLASSES and not declared.get(role):
            raise DataError(f"{origin} has label {labels.max()}: expected class numbers from 0 on")
    declared, wanted = {role: _normalized(names) for role, names in declared.items()}, _normalized(wanted)
    for names in (wanted, *declared.values()):
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{origin} has two classes named {twice[0]!r}: expected different names")
    first = next((declared[role] for role in ("train", *values) if declared.get(role)), ())
    texts = {role: _texts(labels, declared.get(role) or first) for role, labels in values.items()}
    if not wanted:
        _check_spelling(texts, origin)
    names = wanted or first or _own_names(values, texts)
    position = {name: number for number, name in enumerate(names)}
    found = {text for some in texts.values() for text in some if text != str(_NO_LABEL)}
    bare = [role for role, labels in values.items() if labels.dtype != object and not (declared.get(role) or first)]
    worded = [role for role in values if values[role].dtype == object]
    for role, other in product(bare, worded):
        if set(texts[role]).isdisjoint(texts[other]):
            raise DataError(
                f"{origin} has labels that are numbers in split {role} and texts in {other}: expected one kind"
            )
    if unknown := found - position.keys():
        if len(bare) == len(values) and max(map(int, found)) < len(names) and min(map(int, found)) >= 0:
            return names, dict(values)
        label = sorted_names(unknown)[0]
        raise DataError(f"{origin} has the label {label!r}: expected one of {', '.join(names)}")
    numbered = {
        role: np.array([position.get(text, _NO_LABEL) for text in some], dtype=np.int64) for role, some in texts.items()
    }
    return names, numbered


def _normalized(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", name) for name in names)


def _check_spelling(texts: Mapping[str, list[str]], origin: str) -> None:
    """Raises DataError if two splits have one class each that the other lacks, in another case or with other spaces."""
    found = {role: set(some) for role, some in texts.items()}
    for role, other in combinations(sorted(found, key=lambda role: role != "train"), 2):
        spelled = {name.casefold().strip(): name for name in found[role] - found[other]}
        for name in sorted(found[other] - found[role]):
            if same := spelled.get(name.casefold().strip()):
                raise DataError(
                    f"{origin} has class {same!r} in split {role} and {name!r} in {other}: expected one spelling"
                )


def _texts(labels: NDArray[Any], declared: tuple[str, ...]) -> list[str]:
    if labels.dtype == object:
        return [str(label) for label in labels]
    return [declared[label] if 0 <= label < len(declared) else str(label) for label in labels.tolist()]


def _own_names(values: Mapping[str, NDArray[Any]], texts: Mapping[str, list[str]]) -> tuple[str, ...]:
    if all(labels.dtype != object for labels in values.values()):
        return tuple(map(str, range(max(max(int(labels.max()) for labels in values.values()) + 1, 1))))
    return sorted_names(text for some in texts.values() for text in some)
