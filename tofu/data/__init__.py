"""The images of a run: what each client trains on, and what the server tests on.

`open_data` deals a dataset to simulated clients by the partitioners of flwr-datasets; `local_folder` reads a real
client's own. Parquet is read by pyarrow itself and images are decoded in memory: nothing is written to a cache, and
only a hub id ever reaches for the network. Labels are read at once, images when they are asked for.
"""

import errno
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tofu.errors import DataError, SettingError

if TYPE_CHECKING:
    import pyarrow

IntArray = NDArray[np.int64]
Pixels = NDArray[np.uint8]

PARTITIONS = ("iid", "dirichlet", "shards")
ACCEPTED_DATASETS = (
    "'digits', a Hugging Face hub id such as 'ylecun/mnist', or an existing folder of parquet files or images"
)

_LOG = logging.getLogger(__name__)
_OPENING = threading.Lock()
_FIXED_SEED = 20240229  # of splits that stay the same from run to run
_HELD_OUT = 0.15
_MIN_IMAGES = 10
_MAX_CLASSES = 1 << 16
_HUB_TIMEOUT = 10.0  # seconds
_IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"))
_IMAGE_NAMES = ("image", "img", "images", "pixels", "picture")
_LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "y")
_ROLES = {
    "train": frozenset(("train", "training")),
    "test": frozenset(("test", "testing")),
    "validation": frozenset(("validation", "valid", "val", "dev")),
}


@dataclass(frozen=True)
class ImageShape:
    """What a model must know of the images: channels (1 grey, 3 color), height and width in pixels, and classes."""

    channels: int
    height: int
    width: int
    classes: int


@dataclass(frozen=True)
class LabeledImages:
    """Images with their labels. Instances are cached and shared, so do not write into their tensors.

    Attributes:
        images: uint8 [n, channels, height, width].
        labels: int64 [n], each in 0..classes-1.
        classes: the number of classes of the dataset, whether or not all of them occur here.
    """

    images: Tensor
    labels: Tensor
    classes: int

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(f"images must be uint8 [n, c, h, w], not {self.images.dtype} {list(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be int64 [n], not {self.labels.dtype} {list(self.labels.shape)}")

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def shape(self) -> ImageShape:
        channels, height, width = self.images.shape[1:]
        return ImageShape(channels, height, width, self.classes)

    def subset(self, indices: Tensor | Sequence[int]) -> "LabeledImages":
        """A copy of the images at `indices` (int [k]), in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return LabeledImages(self.images[chosen], self.labels[chosen], self.classes)


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1].

    The scale is fixed, where a dataset's mean and deviation would be statistics of the clients' data.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"to_float takes uint8 images, not {images.dtype}")
    return (images.to(torch.float32) / 255 - 0.5) / 0.5


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of `to_float`; values beyond [-1, 1] are clamped."""
    return ((images.to(torch.float32) * 0.5 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)


class FederatedData:
    """A dataset dealt to clients. Build it with `open_data`."""

    def __init__(
        self, train: "_Split", test: "_Split", test_rows: IntArray, client_rows: tuple[IntArray, ...], shape: ImageShape
    ) -> None:
        self._train, self._test = train, test
        self._test_rows, self._client_rows = test_rows, client_rows
        self._shape = shape
        self._decoded: dict[int, LabeledImages] = {}

    @property
    def shape(self) -> ImageShape:
        return self._shape

    @property
    def clients(self) -> int:
        return len(self._client_rows)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in the order of their labels; the numbers themselves where the data has no names."""
        return self._train.names

    def client(self, partition_id: int) -> LabeledImages:
        """The images of one client (0..clients-1), in a random order that the seed fixes. Decoded on the first call.

        Raises:
            SettingError: there is no such client.
            DataError: an image cannot be read, or differs in size or color from the dataset's first.
        """
        if not 0 <= partition_id < self.clients:
            raise SettingError(
                "partition-id", partition_id, f"0 to {self.clients - 1}, there being {self.clients} clients"
            )
        return self._load(partition_id, self._train, self._client_rows[partition_id])

    def test(self) -> LabeledImages:
        """The server's held-out images: the dataset's test split, or what was held out of its training split.

        Raises:
            DataError: an image cannot be read, or differs in size or color from the dataset's first.
        """
        return self._load(-1, self._test, self._test_rows)

    def class_counts(self) -> Tensor:
        """The number of images by client and class: int64 [clients, classes]."""
        labels, classes = self._train.labels, self.shape.classes
        return torch.from_numpy(np.stack([np.bincount(labels[rows], minlength=classes) for rows in self._client_rows]))

    def _load(self, key: int, split: "_Split", rows: IntArray) -> LabeledImages:
        if key not in self._decoded:
            self._decoded[key] = _decode(split, rows, self.shape)
        return self._decoded[key]


def open_data(
    dataset: str,
    *,
    clients: int,
    partition: str,
    alpha: float = 0.5,
    shards_per_client: int = 2,
    train_images: int = 0,
    test_images: int = 0,
    seed: int,
) -> FederatedData:
    """Open a dataset and deal its training images to clients. The same arguments give the same deal in any process.

    A local folder holds parquet files as on the hub (train.parquet, data/test-00000-of-00001.parquet, ...), or images
    as train/<class>/*.png and test/<class>/*.png. A folder is read once per process: later changes to it go unseen.
    Where there is no test split, a stratified 15% of the training images is held out, the same in every run.

    Args:
        dataset: "digits" (8x8, embedded in scikit-learn), a local folder, or a Hugging Face hub id.
        clients: number of clients.
        partition: "iid"; "dirichlet" (each class is dealt in proportions drawn from a Dirichlet distribution); or
            "shards" (the images sorted by class, cut into even shards, `shards_per_client` random shards for each).
        alpha: concentration of the Dirichlet distribution; smaller is more skewed.
        train_images: use a random subset of so many training images; 0 is all.
        test_images: test on a random subset of so many images; 0 is all.
        seed: of the training subset and the deal; the test images do not depend on it.

    Raises:
        SettingError: an argument cannot be used, or not with this dataset.
        DataError: the dataset cannot be found, reached or read.
    """
    for field, value, least in (
        ("clients", clients, 1),
        ("shards_per_client", shards_per_client, 1),
        ("train_images", train_images, 0),
        ("test_images", test_images, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise SettingError(field, value, f"a whole number of at least {least}")
    if partition not in PARTITIONS:
        raise SettingError("partition", partition, f"one of {', '.join(PARTITIONS)}")
    if not 0 < alpha < math.inf:
        raise SettingError("alpha", alpha, "a number above 0")
    # A simulation's threads ask for the data at once; one of them should read it.
    with _OPENING:
        source = _resolve(dataset)
        return _open(source, clients, partition, float(alpha), shards_per_client, train_images, test_images, seed)


def local_folder(path: str, *, class_names: Sequence[str] = ()) -> LabeledImages:
    """A real client's own images: parquet files or <class>/*.png in a folder, all of them (or its training split).

    Args:
        path: the folder.
        class_names: the classes of the run in the order of their labels. Without it the labels are those of this folder
            alone, which agree with the other clients' only if every folder has all the classes (empty ones count).

    Raises:
        DataError: no such folder, no images or labels in it, an image that cannot be read or differs from the first in
            size or color, a class that is not among `class_names`.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"{path} is not a folder")
    split = _find_splits(folder.resolve(), tuple(class_names)).get("train")
    if split is None:
        raise DataError(f"{path} has a test split but no images to train on")
    _check_labels(split)
    return _decode(split, np.arange(len(split.labels)), _probe(split))


def partition_rows(
    labels: IntArray, *, clients: int, partition: str, alpha: float, shards_per_client: int, seed: int
) -> tuple[IntArray, ...]:
    """Deal the rows 0..n-1, whose labels are int64 [n], to clients: every row to exactly one, each in a random order.

    A Dirichlet draw leaves no client with fewer than min(10, n / clients / 2) rows: those short of it take rows from
    the client that has the most. (flwr-datasets' own minimum draws ten times more and then gives up, as it does for
    many clients or a small alpha; its balancing divides by zero once every client drawn is full.) Shards are cut here
    because its ShardPartitioner drops the rows that do not fill a shard, and its PathologicalPartitioner whole classes.

    Raises:
        SettingError: more clients, or more shards, than rows.
    """
    n = len(labels)
    if clients > n:
        raise SettingError("clients", clients, f"at most the number of training images, {n}")
    rng = np.random.default_rng([seed, 1])
    if partition == "shards":
        if clients * shards_per_client > n:
            raise SettingError(
                "shards_per_client", shards_per_client, f"at most {n // clients} ({n} images, {clients} clients)"
            )
        shards = np.array_split(np.argsort(labels, kind="stable"), clients * shards_per_client)
        hands = rng.permutation(len(shards)).reshape(clients, shards_per_client)
        parts = [np.concatenate([shards[shard] for shard in hand]) for hand in hands]
    else:
        parts = _flower_partition(labels, clients, partition, alpha, rng)
        _top_up(parts, math.ceil(min(_MIN_IMAGES, n / clients / 2)))
    return tuple(rng.permutation(part) for part in parts)


def _flower_partition(
    labels: IntArray, clients: int, partition: str, alpha: float, rng: np.random.Generator
) -> list[IntArray]:
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner

    rows = rng.permutation(len(labels))
    partitioner: Partitioner
    if partition == "iid":
        partitioner = IidPartitioner(clients)
    else:
        draw = int(rng.integers(2**31))
        partitioner = DirichletPartitioner(clients, "label", alpha, min_partition_size=0, shuffle=False, seed=draw)
    partitioner.dataset = Dataset.from_dict({"row": rows, "label": labels[rows]})
    return [np.asarray(partitioner.load_partition(i)[:]["row"], dtype=np.int64) for i in range(clients)]


def _top_up(parts: list[IntArray], least: int) -> None:
    """Move rows from the largest part, one at a time, until each has `least` (at most the mean: always possible)."""
    sizes = np.array([len(part) for part in parts])
    for short in np.flatnonzero(sizes < least):
        while sizes[short] < least:
            largest = int(sizes.argmax())
            parts[short] = np.append(parts[short], parts[largest][-1])
            parts[largest] = parts[largest][:-1]
            sizes[short] += 1
            sizes[largest] -= 1


@dataclass(frozen=True)
class _Split:
    """Rows with labels, and a way to see one row's image.

    Attributes:
        labels: int64 [n].
        names: the class names, in the order of the labels.
        pixels: row -> uint8 [height, width] or [height, width, 3].
        where: row -> its file or row, for messages.
    """

    labels: IntArray
    names: tuple[str, ...]
    pixels: Callable[[int], Pixels]
    where: Callable[[int], str]


def _probe(split: _Split) -> ImageShape:
    """The shape of the first image, which all others must share."""
    pixels = _pixels(split, 0)
    return ImageShape(1 if pixels.ndim == 2 else 3, pixels.shape[0], pixels.shape[1], len(split.names))


def _decode(split: _Split, rows: IntArray, shape: ImageShape) -> LabeledImages:
    images = np.empty((len(rows), shape.channels, shape.height, shape.width), dtype=np.uint8)
    for i, row in enumerate(rows.tolist()):
        pixels = _pixels(split, row)
        if pixels.shape[:2] != (shape.height, shape.width):
            found = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise DataError(
                f"{split.where(row)} is {found} pixels where the first image is {shape.width}x{shape.height}"
            )
        if pixels.ndim == 3 and shape.channels == 1:
            raise DataError(f"{split.where(row)} is in color where the first image is grey")
        images[i] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return LabeledImages(torch.from_numpy(images), torch.from_numpy(split.labels[rows]), shape.classes)


def _pixels(split: _Split, row: int) -> Pixels:
    from PIL.Image import DecompressionBombError

    try:
        return split.pixels(row)
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, DecompressionBombError) as error:
        raise DataError(f"{split.where(row)} cannot be read as an image: {_one_line(error)}") from error


def _read_image(source: bytes | Path) -> Pixels:
    from PIL import Image

    with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
        if image.mode.startswith("I;16"):
            return (np.asarray(image) >> 8).astype(np.uint8)
        if image.mode in ("I", "F"):
            raise ValueError(f"mode {image.mode} (32-bit pixels) is not supported")
        if image.mode in ("1", "LA", "La"):
            return np.asarray(image.convert("L"))
        return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))


@lru_cache(maxsize=4)
def _open(
    dataset: str,
    clients: int,
    partition: str,
    alpha: float,
    shards_per_client: int,
    train_images: int,
    test_images: int,
    seed: int,
) -> FederatedData:
    train, test, train_rows, test_rows = _load(dataset)
    shape = _probe(train)
    for field, wanted, rows in (("train_images", train_images, train_rows), ("test_images", test_images, test_rows)):
        if wanted > len(rows):
            raise SettingError(field, wanted, f"at most {len(rows)}, which {dataset} has (0 is all)")
    if train_images:
        train_rows = np.random.default_rng([seed, 0]).permutation(train_rows)[:train_images]
    if test_images:
        test_rows = np.random.default_rng(_FIXED_SEED).permutation(test_rows)[:test_images]
    parts = partition_rows(
        train.labels[train_rows],
        clients=clients,
        partition=partition,
        alpha=alpha,
        shards_per_client=shards_per_client,
        seed=seed,
    )
    return FederatedData(train, test, test_rows, tuple(train_rows[part] for part in parts), shape)


@lru_cache(maxsize=4)
def _load(dataset: str) -> tuple[_Split, _Split, IntArray, IntArray]:
    """The training and test splits of a resolved dataset, and the rows to use of each."""
    if dataset == "digits":
        digits = _digits()
        return digits, digits, *_hold_out(digits.labels, 0.2)
    splits = _find_splits(Path(dataset), ()) if Path(dataset).is_absolute() else _hub(dataset)
    if "train" not in splits:
        raise DataError(f"{dataset} has no split named train")
    train = splits["train"]
    # A test split whose labels are all -1 is one whose labels are withheld.
    test = next(
        (splits[role] for role in ("test", "validation") if role in splits and splits[role].labels.max() >= 0), None
    )
    if test is None:
        train_rows, test_rows = _hold_out(train.labels, _HELD_OUT)
        if not len(test_rows):
            raise DataError(f"{dataset} has no test split and too few images to hold one out: a class needs two")
        _LOG.warning(
            "%s has no test split: %d of its %d images are held out", dataset, len(test_rows), len(train.labels)
        )
        _check_labels(train)
        return train, train, train_rows, test_rows
    names = max(train.names, test.names, key=len)
    if train.names != names[: len(train.names)] or test.names != names[: len(test.names)]:
        raise DataError(f"{dataset} has other class names in its test split than in its training split")
    train, test = replace(train, names=names), replace(test, names=names)
    _check_labels(train)
    _check_labels(test)
    return train, test, np.arange(len(train.labels)), np.arange(len(test.labels))


def _check_labels(split: _Split) -> None:
    odd = np.flatnonzero((split.labels < 0) | (split.labels >= len(split.names)))
    if len(odd):
        label, last = split.labels[odd[0]], len(split.names) - 1
        raise DataError(f"{split.where(int(odd[0]))} has label {label}: labels are expected to be 0 to {last}")


def _hold_out(labels: IntArray, fraction: float) -> tuple[IntArray, IntArray]:
    """Rows (kept, held out): `fraction` of each class held out, at least one of two images or more."""
    rng = np.random.default_rng(_FIXED_SEED)
    held = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held.append(rows[: max(round(fraction * len(rows)), min(1, len(rows) - 1))])
    test_rows = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), test_rows), test_rows


def _resolve(dataset: str) -> str:
    """ "digits", an absolute path, or a hub id."""
    if dataset == "digits":
        return dataset
    try:
        folder = Path(dataset).expanduser()
        if dataset and folder.is_dir():
            return str(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise SettingError("dataset", dataset, f"{ACCEPTED_DATASETS} ({_one_line(error)})") from error
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", dataset):
        raise SettingError("dataset", dataset, ACCEPTED_DATASETS)
    return dataset


def _digits() -> _Split:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    names = tuple(str(name) for name in bunch.target_names)
    return _Split(bunch.target.astype(np.int64), names, images.__getitem__, "digits, image {}".format)


def _find_splits(folder: Path, class_names: tuple[str, ...]) -> dict[str, _Split]:
    """The splits of a local folder by role; all of it is "train" if it is not split."""
    try:
        if files := sorted((*folder.glob("*.parquet"), *folder.glob("*/*.parquet"))):
            by_role: dict[str, list[Path]] = {}
            for file in files:
                by_role.setdefault(_role(str(file.relative_to(folder))) or "train", []).append(file)
            return {role: _parquet_split(paths, class_names) for role, paths in by_role.items()}
        # A folder named like a split may also be a class: a split has folders in it.
        roots = {role: path for path in _folders(folder) if (role := _role(path.name)) and _folders(path)}
        return _image_splits(roots if "train" in roots else {"train": folder}, class_names)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {_one_line(error)}") from error


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _role(name: str) -> str | None:
    """The split that a file, folder or hub split is by its name: "train", "test", "validation" or None."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((role for word in words for role, synonyms in _ROLES.items() if word in synonyms), None)


def _image_splits(roots: Mapping[str, Path], class_names: tuple[str, ...]) -> dict[str, _Split]:
    """Splits from folders of <class>/*.png, with one numbering of the classes for all of them."""
    folders = {role: _folders(root) for role, root in roots.items()}
    found = {path.name for paths in folders.values() for path in paths}
    names = class_names or tuple(sorted(found, key=lambda name: name.zfill(20) if name.isdecimal() else name))
    if unknown := sorted(found - set(names)):
        raise DataError(f"{roots['train'] / unknown[0]} is no class of this run: expected {', '.join(names)}")
    splits = {}
    for role, root in roots.items():
        files = [
            (file, names.index(path.name))
            for path in folders[role]
            for file in sorted(path.iterdir())
            if file.suffix.lower() in _IMAGE_SUFFIXES and not file.name.startswith(".")
        ]
        if not files:
            raise DataError(
                f"{root} has no labeled images: expected parquet files, or <class>/*.png with a folder per class"
            )
        paths = [file for file, _ in files]
        labels = np.array([label for _, label in files], dtype=np.int64)
        splits[role] = _Split(labels, names, partial(_path_pixels, paths), partial(_path_name, paths))
    return splits


def _path_pixels(paths: Sequence[Path], row: int) -> Pixels:
    return _read_image(paths[row])


def _path_name(paths: Sequence[Path], row: int) -> str:
    return str(paths[row])


def _parquet_split(files: Sequence[Path], class_names: tuple[str, ...]) -> _Split:
    """One split from parquet files of one schema. The image column is read on first use."""
    import pyarrow
    from pyarrow import parquet

    def read(columns: list[str]) -> "pyarrow.Table":
        tables = []
        for file in files:
            try:
                tables.append(parquet.ParquetFile(file).read(columns=columns))
            except (OSError, pyarrow.ArrowException) as error:
                raise DataError(f"{file} cannot be read as parquet: {_one_line(error)}") from error
        try:
            return pyarrow.concat_tables(tables)
        except pyarrow.ArrowException as error:
            raise DataError(f"{files[0].parent} has parquet files of differing columns: {_one_line(error)}") from error

    try:
        schema = parquet.read_schema(files[0])
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{files[0]} cannot be read as parquet: {_one_line(error)}") from error
    origin = str(files[0] if len(files) == 1 else files[0].parent)
    return _table_split(schema, read, origin, files[0].parent, class_names)


def _table_split(
    schema: "pyarrow.Schema",
    read: Callable[[list[str]], "pyarrow.Table"],
    origin: str,
    folder: Path,
    class_names: tuple[str, ...] = (),
) -> _Split:
    """One split from a table in the Hugging Face layout, read column by column."""
    metadata = (schema.metadata or {}).get(b"huggingface", b"{}")
    features = json.loads(metadata).get("info", {}).get("features", {})
    image_name, label_name = _columns(schema, features, origin)
    column = read([label_name])[label_name]
    if column.null_count or not len(column):
        raise DataError(f"{origin} has {'rows without a label' if len(column) else 'no rows'}")
    labels = np.asarray(column.to_numpy(), dtype=np.int64)
    feature = features.get(label_name, {})
    own_names = feature.get("names") if isinstance(feature, dict) else None
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
            raise ValueError("there is no image in it")
        return _read_image(value)

    return _Split(labels, class_names or names, pixels, f"{origin}, row {{}}".format)


def _columns(schema: "pyarrow.Schema", features: Mapping[str, Any], origin: str) -> tuple[str, str]:
    """The names of the image and the label column: by type, and where that leaves a choice by name."""
    from pyarrow import types

    def kind(name: str) -> object:
        feature = features.get(name)
        return feature.get("_type") if isinstance(feature, dict) else None

    def encoded(type_: "pyarrow.DataType") -> bool:
        if types.is_struct(type_):
            return {"bytes", "path"} <= {field.name for field in type_}
        return bool(types.is_binary(type_) or types.is_large_binary(type_))

    images = [field.name for field in schema if kind(field.name) == "Image" or encoded(field.type)]
    numbers = [field.name for field in schema if types.is_integer(field.type)]
    labels = [name for name in numbers if kind(name) == "ClassLabel"] or numbers
    image = next((name for name in _IMAGE_NAMES if name in images), images[0] if images else "")
    label = next((name for name in _LABEL_NAMES if name in labels), labels[0] if len(labels) == 1 else "")
    if not image or not label:
        missing = "label" if image else "image"
        expected = (
            "encoded images" if not image else f"whole numbers, one column only or named {', '.join(_LABEL_NAMES)}"
        )
        raise DataError(f"{origin} has no {missing} column (of {expected}) among its columns {', '.join(schema.names)}")
    return image, label


def _hub(dataset: str) -> dict[str, _Split]:
    """The splits of a hub dataset: the copy in the Hugging Face cache if there is one, else downloaded into it."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        try:
            found = Cache(dataset_name=dataset.split("/")[1], repo_id=dataset, version="auto", hash="auto").as_dataset()
        except (ValueError, FileNotFoundError):  # not there, or another process is at it
            # One request with a short time-out: by itself load_dataset tries an absent network for half a minute.
            HfApi().dataset_info(dataset, timeout=_HUB_TIMEOUT)
            found = datasets.load_dataset(dataset)
    except Exception as error:
        # Whatever httpx, huggingface_hub, datasets or the file system raise, the user's choice is the same.
        reason = _one_line(error)
        if isinstance(error, RepositoryNotFoundError):
            reason = "there is none of that name, or it is private"
        elif isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES):
            reason += "; HF_HOME can name a folder to write to"
        raise DataError(
            f"dataset {dataset!r} cannot be had from the hub ({reason}): expected {ACCEPTED_DATASETS}"
        ) from error
    return {
        role: _table_split(rows.features.arrow_schema, rows.data.table.select, f"{dataset} ({name})", Path())
        for name, rows in found.items()
        if (role := _role(str(name)))
    }


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".:") or type(error).__name__
