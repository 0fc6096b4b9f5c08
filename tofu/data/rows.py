"""Datasets of rows: tables of features, and texts, for classification. Read from CSV, parquet or the hub.

Token ids are hashes of words, so that all clients have the same ids without a shared vocabulary.
"""

import math
import re
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tofu.data.classes import (
    check_column,
    check_several,
    check_unique,
    features_of,
    label_column,
    label_values,
    number_classes,
)
from tofu.data.folder import data_files
from tofu.data.partition import IntArray, partition_clients
from tofu.data.splits import files_by_role, hold_out, report_unusable, row_origin, subset_rows
from tofu.errors import DataError, first_line
from tofu.settings.datasets import TABLE_SUFFIXES, check_hub_table
from tofu.settings.fields import Value, build, comma_list, names_of
from tofu.settings.groups import EMBEDDED_TABLES, DataSettings

if TYPE_CHECKING:
    import pyarrow

ALL_NUMBERS = "*"
"""Selects all columns of numbers except label and client as features."""

_INDEX = re.compile(r"(Unnamed: \d+|__index_level_\d+__)?")
"""Names of columns in which pandas writes the index of a table, which is the number of a row."""
_WORD = re.compile(r"\w+|[^\w\s]")
_HELD_OUT = 0.15
_OPEN_LOCK = threading.Lock()


@dataclass(frozen=True)
class LabeledRows(Dataset[tuple[Tensor, Tensor]]):
    """Rows with their labels, as a torch dataset of pairs.

    Attributes:
        inputs: features, float32 [n, features], or token ids, int64 [n, tokens].
        labels: int64 [n], each in 0..classes-1.
        class_names: in the order of the labels.
        ids: name of each row's client [n], if there is a client column.
        read_as, left_out: as of `tofu.data.splits.Split`.
        unreadable: for each row that was left out, its origin and the reason. In a partitioned dataset the test rows
            have those of all rows.
    """

    inputs: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    ids: NDArray[np.str_] | None = None
    read_as: str = ""
    left_out: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.inputs[row], self.labels[row]

    @property
    def width(self) -> int:
        """Number of features, or of tokens."""
        return self.inputs.shape[1]

    def subset(self, rows: Sequence[int] | Tensor | IntArray) -> "LabeledRows":
        """Return the rows with these numbers, in that order; `unreadable` is empty."""
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        ids = self.ids[chosen.numpy()] if self.ids is not None else None
        return replace(self, inputs=self.inputs[chosen], labels=self.labels[chosen], ids=ids, unreadable=())

    def scaled(self, scaling: str) -> "LabeledRows":
        """Scale each feature to mean 0 and variance 1 if `scaling` is "client"; constant features become 0."""
        if scaling != "client" or not self.inputs.is_floating_point():
            return self
        std, mean = torch.std_mean(self.inputs, dim=0, correction=0)
        return replace(self, inputs=(self.inputs - mean) / torch.where(std > 0, std, torch.ones_like(std)))


@dataclass(frozen=True)
class FederatedRows:
    """A dataset of rows that is partitioned over clients.

    Attributes:
        clients: one dataset per client.
        test: the server's test rows.
        names: of the clients: the values of the client column with partition=natural, else their numbers.
        train_left_out: the training rows that belong to no client because they cannot be used, as `unreadable`.
    """

    clients: tuple[LabeledRows, ...]
    test: LabeledRows
    names: tuple[str, ...]
    train_left_out: tuple[str, ...] = ()

    @staticmethod
    def of(data: DataSettings, seed: int) -> "FederatedRows":
        """Return the table or texts of a run, as `open_rows` opens them. The same settings give the same partition.

        Raises:
            SettingError: a setting cannot be used with this dataset.
            DataError: the dataset cannot be read, or lacks a column.
        """
        # The threads of a simulation open the data at the same time; only one of them should read it.
        with _OPEN_LOCK:
            return _open(data, seed)

    def description(self) -> Mapping[str, object]:
        """Return which columns were read, which were left out, and the number of rows by split."""
        rows = sum(map(len, self.clients))
        return {"read_as": self.test.read_as, "left_out": list(self.test.left_out), "train": rows,
                "test": len(self.test)}  # fmt: skip

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels, in their order."""
        return self.class_names

    @property
    def width(self) -> int:
        return self.test.width

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.test.class_names


def token_ids(text: str, *, vocabulary: int, tokens: int) -> list[int]:
    """Return the ids of a text's words and signs: 1 to vocabulary - 1 by CRC-32 of the lower-case word; 0 is padding.

    >>> token_ids("To be, or not to be", vocabulary=1000, tokens=8)
    [590, 307, 133, 98, 350, 590, 307, 0]
    """
    ids = [1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in _WORD.findall(text.lower())[:tokens]]
    return ids + [0] * (tokens - len(ids))


def open_rows(dataset: str, *, seed: int, **settings: Value) -> FederatedRows:
    """Open a dataset of rows and partition it over clients. The same arguments give the same partition.

    Args:
        dataset: a CSV or parquet file, a folder with train.csv and test.csv (or parquet), a Hugging Face hub id, or one
            of `EMBEDDED_TABLES`. Without test rows, a stratified 15% is held out, the same in every run. Test rows
            alone are for a server whose clients have their own data: all of them are evaluated on.
        settings: the other fields of `DataSettings`, as for `tofu.data.open_data`.

    Raises:
        SettingError: an argument cannot be used, or not with this dataset.
        DataError: the dataset cannot be read, or lacks a column.

    Example:
        >>> data = open_rows("breast-cancer", feature_columns="*", clients=4, partition="iid", seed=0)
        >>> data.clients[0].inputs.shape, data.class_names
        (torch.Size([121, 30]), ('malignant', 'benign'))
    """
    return FederatedRows.of(build(DataSettings, {"dataset": dataset} | settings), seed)


def local_rows(path: str, data: DataSettings, class_names: tuple[str, ...] = ()) -> LabeledRows:
    """Read a real client's own rows: a CSV or parquet file, or the training rows of a folder.

    Args:
        data: names of the columns, and how they become tensors.
        class_names: the classes of the run in order, or () for those of the file.

    Raises:
        DataError: there is no such file, it lacks a column, or a label is not among `class_names`.
    """
    tables = _tables(str(Path(path).expanduser()))
    if "train" not in tables:
        raise DataError(f"{path} has no rows to train on")
    return _read({"train": tables["train"]}, data, class_names)["train"].scaled(data.feature_scaling)


@lru_cache(maxsize=4)
def _open(data: DataSettings, seed: int) -> FederatedRows:
    train, test, left_out = _splits(data)
    rows, test_rows = subset_rows(data.dataset, len(train), len(test), data.train_images, data.test_images, seed)
    parts, names = partition_clients(
        data, train.labels.numpy()[rows], None if train.ids is None else train.ids[rows], seed
    )  # fmt: skip
    own = tuple(train.subset(rows[part]).scaled(data.feature_scaling) for part in parts)
    tested = replace(test.subset(test_rows).scaled(data.feature_scaling), unreadable=left_out + test.unreadable)
    return FederatedRows(own, tested, names, left_out)


@lru_cache(maxsize=4)
def _splits(data: DataSettings) -> tuple[LabeledRows, LabeledRows, tuple[str, ...]]:
    """Training and test rows, and the training rows that cannot be used."""
    dataset = data.dataset
    if dataset in EMBEDDED_TABLES:
        rows = _embedded(dataset)
        train, test = hold_out(rows.labels.numpy(), 0.2)
        return rows.subset(train), rows.subset(test), ()
    found = _read(_tables(dataset), data, names_of(data.class_names))
    check_several(next(iter(found.values())).class_names, dataset)
    if "train" not in found:
        if "test" not in found:
            raise DataError(f"{dataset} has no rows to train or test on")
        return found["test"].subset(np.arange(0)), found["test"], ()
    rows = found["train"]
    test_rows = found.get("test") or found.get("validation")
    if test_rows is not None:
        unused = test_rows is not found.get("validation") and "validation" in found
        others = (f"split validation ({len(found['validation'])} rows)",) if unused else ()
        return rows, replace(test_rows, left_out=test_rows.left_out + others), rows.unreadable
    train, test = hold_out(rows.labels.numpy(), _HELD_OUT)
    if not len(test):
        raise DataError(f"{dataset} has no test rows and too few to hold some out: a class needs two")
    return rows.subset(train), rows.subset(test), rows.unreadable


def _embedded(name: str) -> LabeledRows:
    """Return a table of scikit-learn, each feature at mean 0 and variance 1."""
    from sklearn.datasets import load_breast_cancer, load_wine

    bunch = {"breast-cancer": load_breast_cancer, "wine": load_wine}[name]()
    inputs = torch.from_numpy(bunch.data).float()
    names = tuple(str(each) for each in bunch.target_names)
    return LabeledRows(inputs, torch.from_numpy(bunch.target.astype(np.int64)), names).scaled("client")


def _tables(dataset: str) -> dict[str, "_Table"]:
    """Return the table of each split."""
    import pyarrow

    path = Path(dataset)
    try:
        if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
            return {"train": _joined([path], str(path))}
        if path.is_dir():
            files = data_files(path, TABLE_SUFFIXES)
            if not files:
                raise DataError(f"{path} has no CSV or parquet files")
            return {role: _joined(own, str(path)) for role, own in files_by_role(path, files).items()}
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as a table: {first_line(error)}") from error
    check_hub_table(dataset)
    from tofu.data.hub import hub_tables

    found = {}
    for role, rows in hub_tables(dataset).items():
        where = f"{dataset} ({role})"
        found[role] = _Table(rows.data.table, where, f"{where}, row {{}}".format, typed=True)
    return found


class _Table(NamedTuple):
    """A table, where it and each of its rows are from, and whether its file gives the types of its columns."""

    data: "pyarrow.Table"
    where: str
    origin: Callable[[int], str]
    typed: bool


def _joined(paths: Sequence[Path], where: str) -> _Table:
    import pyarrow
    from pyarrow import csv, parquet

    options = csv.ParseOptions(newlines_in_values=True)
    are_csv = [path.suffix.lower() == ".csv" for path in paths]
    tables = [
        csv.read_csv(path, parse_options=options) if is_csv else parquet.read_table(path)
        for path, is_csv in zip(paths, are_csv, strict=True)
    ]
    if len(tables) > 1 and all(are_csv):  # each file may show other types
        texts = _columns_of_texts(tables, where)
        tables = [table.cast(_with_texts(table.schema, texts)) for table in tables]
    parts = [(str(path), len(table)) for path, table in zip(paths, tables, strict=True)]
    promoted = "permissive" if all(are_csv) else "default"
    joined = pyarrow.concat_tables(tables, promote_options=promoted) if len(tables) > 1 else tables[0]
    return _Table(joined, where, row_origin(parts), not any(are_csv))


def _columns_of_texts(tables: "Sequence[pyarrow.Table]", where: str) -> set[str]:
    """Return the columns that are texts in one of the files of a split.

    Raises DataError if the files differ in columns.
    """
    names = set(tables[0].column_names)
    if others := {name for table in tables for name in names ^ set(table.column_names)}:
        raise DataError(
            f"{where} has column {sorted(others)[0]!r} in some files only: expected the same columns in all"
        )
    return {field.name for table in tables for field in table.schema if str(field.type) == "string"}


def _with_texts(schema: "pyarrow.Schema", texts: set[str]) -> "pyarrow.Schema":
    import pyarrow

    fields = [field.with_type(pyarrow.string()) if field.name in texts else field for field in schema]
    return pyarrow.schema(fields, metadata=schema.metadata)


def _read(tables: Mapping[str, _Table], data: DataSettings, class_names: tuple[str, ...]) -> dict[str, LabeledRows]:
    """Return the rows of each split, with one numbering of the classes."""
    train = tables["train"] if "train" in tables else next(iter(tables.values()))
    label = label_column(train.data.schema, data.label_column, train.where)
    columns = (data.text_column,) if data.text_column else _feature_columns(train, label, data)
    usable, labels, declared = {}, {}, {}
    for role, table in tables.items():
        check_column(table.data.column_names, label, table.where)
        usable[role] = _usable(table, label, columns, data)
        labels[role] = usable[role].labels
        names = features_of(table.data.schema).get(label, {}).get("names")
        declared[role] = tuple(map(str, names)) if isinstance(names, list) else ()
        if labels[role].dtype != object and labels[role].min() < 0:
            raise DataError(
                f"{table.where} has label {labels[role].min()} in column {label}: expected class numbers from 0 on"
            )
    class_names, numbered = number_classes(labels, declared, class_names, train.where)
    read_as = (
        f"{'text of column' if data.text_column else 'features of columns'} {', '.join(columns)}, labels of {label!r}"
    )
    rows = {}
    for role, found in usable.items():
        others = [
            name
            for name in tables[role].data.column_names
            if name not in (*columns, label) and name != (data.client_column or None)
        ]
        rows[role] = LabeledRows(
            found.inputs, torch.from_numpy(numbered[role]), class_names, found.clients, read_as,
            (f"columns {', '.join(name or 'without a name' for name in others)}",) if others else (), found.unreadable,
        )  # fmt: skip
    return rows


class _Usable(NamedTuple):
    """The usable rows of a table, and the origin and reason for each other row."""

    inputs: Tensor
    labels: NDArray[Any]
    clients: NDArray[np.str_] | None
    unreadable: tuple[str, ...]


def _usable(table: _Table, label: str, columns: Sequence[str], data: DataSettings) -> _Usable:
    """Read inputs, labels and clients of the rows that have all of them. Raises DataError if no row has."""
    values, labeled = label_values(table.data[label], label, table.where)
    count = len(table.data)
    reasons = dict.fromkeys(set(range(count)) - set(labeled.tolist()), f"has no label in column {label!r}")
    clients = None
    if data.client_column:
        clients = np.array(_column(table, data.client_column).to_pylist(), dtype=object)
        for row in np.flatnonzero(clients == None).tolist():  # noqa: E711
            reasons.setdefault(row, f"names no client in column {data.client_column!r}")
    inputs = _token_ids(table, data, reasons) if data.text_column else _numbers(table, columns, reasons)
    kept = np.array([row not in reasons for row in range(count)], dtype=bool)
    unreadable = tuple(
        f"{table.origin(row)}{'' if clients is None or clients[row] is None else f' (client {clients[row]})'} {reason}"
        for row, reason in sorted(reasons.items())
    )
    if not kept.any():
        raise DataError(f"none of {count} rows can be read: {unreadable[0]}")
    report_unusable(unreadable, strict=data.strict)
    names = None if clients is None else np.array([str(name) for name in clients[kept]])
    return _Usable(inputs[torch.from_numpy(kept)], values[kept[labeled]], names, unreadable)


def _feature_columns(table: _Table, label: str, data: DataSettings) -> tuple[str, ...]:
    if data.feature_columns not in ("", ALL_NUMBERS):
        return comma_list(data.feature_columns)
    check_unique(table.data.column_names, "the table")
    return tuple(
        field.name
        for field in table.data.schema
        if field.name not in (label, data.client_column)
        and not _INDEX.fullmatch(field.name)
        and _holds_numbers(table, field.name)
    )


def _holds_numbers(table: _Table, name: str) -> bool:
    """Return whether a column has numbers; a CSV column also counts if most of its texts are numbers."""
    from pyarrow import types

    kind = table.data[name].type
    if types.is_string(kind) and not table.typed:
        return bool(np.isfinite(_parsed(table.data[name].to_pylist())).mean() > 0.5)
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


def _parsed(values: Sequence[str | None]) -> NDArray[np.float64]:
    """Parse the texts as numbers; NaN for texts that are not numbers."""

    def number(text: str | None) -> float:
        try:
            return math.nan if not text or "_" in text else float(text)  # float() accepts 1_000
        except ValueError:
            return math.nan

    return np.array([number(value) for value in values])


def _column(table: _Table, name: str) -> "pyarrow.ChunkedArray":
    check_column(table.data.column_names, name, table.where)
    return table.data[name]


def _token_ids(table: _Table, data: DataSettings, reasons: dict[int, str]) -> Tensor:
    """Return the token ids of the text column, int64 [n, tokens].

    The reason why a row has none is added to `reasons`.
    """
    texts = _column(table, data.text_column).to_pylist()
    for row, text in enumerate(texts):
        if text is None:
            reasons.setdefault(row, f"has an empty cell in column {data.text_column!r}")
    ids = [token_ids(str(text), vocabulary=data.vocabulary, tokens=data.tokens) for text in texts]
    return torch.tensor(ids, dtype=torch.int64).reshape(len(ids), data.tokens)


def _numbers(table: _Table, columns: Sequence[str], reasons: dict[int, str]) -> Tensor:
    """Return the features, float32 [n, columns]. The reason why a row lacks one is added to `reasons`."""
    from pyarrow import types

    if not columns:
        raise DataError(f"{table.where} has no columns of numbers to use as features")
    values = []
    for name in columns:
        column = _column(table, name)
        kind = column.type.value_type if types.is_dictionary(column.type) else column.type
        if types.is_string(kind) or types.is_large_string(kind):
            numbers = _parsed(column.to_pylist())
            usual = np.isfinite(numbers).mean() > 0.5
        else:
            usual = not (types.is_nested(kind) or types.is_temporal(kind) or "binary" in str(kind))
            numbers = np.array(column.cast(kind).cast("float64", safe=False).to_numpy()) if usual else np.zeros(0)
        if not usual:
            raise DataError(
                f"{table.where} has text in column {name!r}: expected numbers (one column of 0 and 1 per category)"
            )
        with np.errstate(over="ignore"):
            values.append(numbers.astype(np.float32))
        for row in np.flatnonzero(~np.isfinite(values[-1])).tolist():
            reasons.setdefault(row, f"has no finite number in column {name!r} ({column[row].as_py()})")
    return torch.from_numpy(np.stack(values, axis=1))
