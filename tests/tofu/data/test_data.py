"""Data: what is read is what was written, and every training image goes to exactly one client."""

import doctest
import io
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.processes import run
from tofu.data import (
    PARTITIONS,
    FederatedData,
    ImageShape,
    LabeledImages,
    federated,
    local_folder,
    open_data,
    partition_rows,
    to_float,
)
from tofu.data.splits import split_role
from tofu.errors import DataError, SettingError

SHARED = Path(os.environ.get("TOFU_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pixels_of(data: LabeledImages, i: int) -> np.ndarray:
    return data.images[i, 0].numpy()


def as_set(data: LabeledImages) -> set[tuple[bytes, int]]:
    return {(image.numpy().tobytes(), int(label)) for image, label in zip(data.images, data.labels, strict=True)}


def write_parquet(
    path: Path, images: Sequence[object], labels: Sequence[int | None], *, columns: Sequence[str] = ("image", "label")
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({columns[0]: pa.array(images), columns[1]: pa.array(labels)}), path)


def write_images(root: Path, images: Mapping[str, Sequence[np.ndarray]]) -> None:
    for name, of_class in images.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i, pixels in enumerate(of_class):
            (root / name / f"{i:03}.png").write_bytes(png(pixels))


@pytest.fixture(scope="module")
def digits() -> LabeledImages:
    return open_data("digits", clients=1, partition="iid", seed=0).client(0)


@pytest.fixture(scope="module")
def by_name(digits: LabeledImages) -> dict[str, list[np.ndarray]]:
    """Twelve digits of each class, under the English name of the digit."""
    return {
        name: [pixels_of(digits, i) for i in torch.nonzero(digits.labels == k)[:12, 0]] for k, name in enumerate(NAMES)
    }


@pytest.fixture(scope="module")
def as_parquet(tmp_path_factory: pytest.TempPathFactory, digits: LabeledImages) -> Path:
    """300 training and 50 test digits, in the hub's layout and with its features."""
    import datasets

    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=list(NAMES))})
    folder = tmp_path_factory.mktemp("parquet")
    for name, rows in (
        ("train-00000-of-00002", range(200)),
        ("train-00001-of-00002", range(200, 300)),
        ("test-00000-of-00001", range(300, 350)),
    ):
        columns = {
            "img": [{"bytes": png(pixels_of(digits, i)), "path": None} for i in rows],
            "fine_label": [int(digits.labels[i]) for i in rows],
        }
        (folder / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "data" / f"{name}.parquet")
    return folder


def open_(dataset: object, **settings: object) -> FederatedData:
    defaults: dict[str, object] = {"clients": 3, "partition": "iid", "seed": 0}
    return open_data(str(dataset), **(defaults | settings))  # type: ignore[arg-type]


# --- pixels


def test_to_float_maps_the_gray_levels_to_minus_one_to_one() -> None:
    levels = to_float(torch.arange(256, dtype=torch.uint8))
    assert levels.dtype == torch.float32
    assert levels[[0, 255]].tolist() == [-1.0, 1.0]
    assert len(set(levels.tolist())) == 256


def test_to_float_refuses_what_is_float_already() -> None:
    with pytest.raises(TypeError, match="float32"):
        to_float(torch.zeros(1))


def test_labeled_images_refuse_other_types_and_lengths() -> None:
    images, labels = torch.zeros(2, 1, 3, 4, dtype=torch.uint8), torch.tensor([0, 1])
    data = LabeledImages(images, labels, 5)
    assert (len(data), data.shape) == (2, ImageShape(1, 3, 4, 5))
    with pytest.raises(ValueError, match="uint8"):
        LabeledImages(images.float(), labels, 5)
    with pytest.raises(ValueError, match="int64"):
        LabeledImages(images, labels[:1], 5)


def test_subset_keeps_the_order_asked_for_and_copies(digits: LabeledImages) -> None:
    subset = digits.subset([5, 2])
    assert torch.equal(subset.images, torch.stack([digits.images[5], digits.images[2]]))
    assert subset.labels.tolist() == [digits.labels[5], digits.labels[2]]
    subset.images.zero_()
    assert digits.images[5].any()


def test_the_example_of_open_data_runs() -> None:
    assert doctest.testmod(federated).attempted
    assert not doctest.testmod(federated).failed


# --- digits


def test_digits_are_split_80_20_and_evenly_over_the_classes() -> None:
    from sklearn.datasets import load_digits

    data = open_("digits")
    train = data.class_counts().sum(0)
    test = torch.bincount(data.test().labels, minlength=10)
    assert data.shape == ImageShape(1, 8, 8, 10)
    assert (train + test).tolist() == np.bincount(load_digits().target).tolist()
    assert ((test / (train + test) - 0.2).abs() < 0.004).all()


def test_digits_use_the_whole_grey_scale_and_lose_no_level(digits: LabeledImages) -> None:
    assert (int(digits.images.min()), int(digits.images.max())) == (0, 255)
    assert len(set(digits.images.flatten().tolist())) == 17


def test_train_and_test_digits_are_apart_and_the_test_set_ignores_the_seed(digits: LabeledImages) -> None:
    first, other = open_("digits", seed=1).test(), open_("digits", seed=2, clients=7, partition="shards").test()
    assert torch.equal(first.images, other.images)
    assert not as_set(first) & as_set(digits)


# --- partitions


@settings(max_examples=60, deadline=None)
@given(
    partition=st.sampled_from(PARTITIONS),
    clients=st.integers(1, 60),
    alpha=st.floats(1e-4, 1e3),
    seed=st.integers(0, 2**31),
    classes=st.integers(1, 12),
    n=st.integers(60, 400),
)
def test_every_row_goes_to_exactly_one_client(
    partition: str, clients: int, alpha: float, seed: int, classes: int, n: int
) -> None:
    labels = np.random.default_rng(seed).integers(0, classes, n)
    parts = partition_rows(labels, clients=clients, partition=partition, alpha=alpha, shards_per_client=1, seed=seed)
    assert len(parts) == clients
    assert np.sort(np.concatenate(parts)).tolist() == list(range(n))
    assert min(len(part) for part in parts) >= min(10, n / clients / 2)


def test_iid_parts_are_even_and_alike(digits: LabeledImages) -> None:
    counts = open_("digits", clients=5).class_counts()
    assert counts.shape == (5, 10)
    assert int(counts.sum(1).max() - counts.sum(1).min()) <= 1
    assert int(counts.min()) >= 14, "about 29 of each digit is expected"


def test_a_small_alpha_is_skewed_and_a_large_one_is_not() -> None:
    def largest_share(alpha: float) -> float:
        counts = open_("digits", clients=5, partition="dirichlet", alpha=alpha).class_counts().double()
        return float((counts.amax(0) / counts.sum(0)).mean())

    assert largest_share(0.05) > 0.7
    assert largest_share(1000.0) < 0.3


def test_a_client_sees_the_classes_of_its_shards() -> None:
    counts = open_("digits", clients=10, partition="shards", shards_per_client=2).class_counts()
    assert int((counts > 0).sum(1).max()) <= 4, "a shard of 1/20 of the data may straddle two classes"
    assert int(counts.sum(1).max() - counts.sum(1).min()) <= 2
    assert torch.equal(
        open_("digits", clients=1, partition="shards", shards_per_client=1).class_counts().sum(0), counts.sum(0)
    )


@pytest.mark.parametrize("partition", PARTITIONS)
def test_another_seed_deals_otherwise_and_in_no_order_of_class(partition: str) -> None:
    first, other = (open_("digits", partition=partition, seed=seed).client(0) for seed in (1, 2))
    assert as_set(first) != as_set(other)
    assert int((first.labels.diff() != 0).sum()) > len(first) / 4


def test_train_images_is_a_random_subset_of_that_size(digits: LabeledImages) -> None:
    def taken(seed: int) -> set[tuple[bytes, int]]:
        data = open_("digits", train_images=100, seed=seed)
        assert int(data.class_counts().sum()) == 100
        return set().union(*(as_set(data.client(i)) for i in range(3)))

    assert taken(1) <= as_set(digits)
    assert taken(1) != taken(2)


def test_test_images_is_a_random_subset_of_the_test_images_that_no_seed_changes() -> None:
    every, first, other = (
        open_("digits", seed=seed, test_images=count).test() for seed, count in ((1, 0), (1, 100), (2, 100))
    )
    assert len(first) == 100 < len(every)
    assert as_set(first) <= as_set(every)
    assert torch.equal(first.images, other.images)
    assert not torch.equal(first.images, every.images[:100])


def test_the_deal_is_the_same_in_another_process_without_a_network(as_parquet: Path) -> None:
    code = f"""
import time
from tofu.data import open_data
for partition in {PARTITIONS}:
    data = open_data({str(as_parquet)!r}, clients=7, partition=partition, alpha=0.3, train_images=250, seed=11)
    print(partition, data.class_counts().tolist(), [int(data.client(i).images.sum()) for i in range(7)])
print(open_data("digits", clients=1, partition="shards", seed=0).test().images.sum(dim=(1, 2, 3)).tolist())
"""
    offline = ["unshare", "-rn"] if _can_unshare() else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "12345"}
    done = run([*offline, sys.executable, "-c", code], env=environment)
    assert done.returncode == 0, done.stderr
    *deals, digits_held_out = done.stdout.splitlines()
    assert digits_held_out == str(open_("digits").test().images.sum(dim=(1, 2, 3)).tolist())
    for line, partition in zip(deals, PARTITIONS, strict=True):
        data = open_(as_parquet, clients=7, partition=partition, alpha=0.3, train_images=250, seed=11)
        here = [int(data.client(i).images.sum()) for i in range(7)]
        assert line == f"{partition} {data.class_counts().tolist()} {here}"


def _can_unshare() -> bool:
    return (
        shutil.which("unshare") is not None and not subprocess.run(["unshare", "-rn", "true"], check=False).returncode
    )


def test_a_second_call_shares_what_was_opened_and_decoded(as_parquet: Path) -> None:
    assert open_(as_parquet).client(1) is open_(as_parquet).client(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clients", 0),
        ("clients", 2000),
        ("partition", "random"),
        ("alpha", 0.0),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("shards_per_client", 0),
        ("train_images", -1),
        ("train_images", 1439),
        ("test_images", -1),
        ("test_images", 360),
        ("strictness", True),
    ],
)
def test_a_setting_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(SettingError, match=f"^{field.replace('_', '-')}=") as caught:
        open_("digits", **{field: value})
    assert caught.value.field == field.replace("_", "-")


def test_more_shards_than_images_are_refused() -> None:
    with pytest.raises(SettingError, match=r"^shards-per-client=480 .* at most 479 \(1438 images, 3 clients\)"):
        open_("digits", partition="shards", shards_per_client=480)


@pytest.mark.parametrize("partition_id", [-1, 3])
def test_there_is_no_client_beyond_the_last(partition_id: int) -> None:
    with pytest.raises(SettingError, match="0 to 2"):
        open_("digits").client(partition_id)


# --- parquet


def test_parquet_of_the_hub_is_read_as_written(as_parquet: Path, digits: LabeledImages) -> None:
    data = open_(as_parquet, clients=4)
    assert data.class_names == NAMES
    assert torch.equal(data.test().images, digits.images[300:350])
    assert torch.equal(data.test().labels, digits.labels[300:350])
    dealt = [data.client(i) for i in range(4)]
    assert set().union(*map(as_set, dealt)) == as_set(digits.subset(range(300)))
    assert torch.equal(torch.stack([torch.bincount(part.labels, minlength=10) for part in dealt]), data.class_counts())


def test_only_the_images_asked_for_are_decoded(tmp_path: Path, by_name: dict[str, list[np.ndarray]]) -> None:
    images: list[bytes] = [png(pixels) for pixels in by_name["one"]]
    broken = 7
    images[broken] = b"no image"
    write_parquet(tmp_path / "train.parquet", images, [0] * 12)
    write_parquet(tmp_path / "test.parquet", images[:2], [1] * 2)
    parts = partition_rows(np.zeros(12, np.int64), clients=4, partition="iid", alpha=1.0, shards_per_client=1, seed=0)
    holder = next(i for i, part in enumerate(parts) if broken in part)
    data = open_(tmp_path, clients=4)
    for i in range(4):
        assert len(data.client(i)) == (2 if i == holder else 3)
        wrong = f"{tmp_path / 'train.parquet'}, row 7 cannot be read as an image: unknown format"
        assert data.client(i).unreadable == ((wrong,) if i == holder else ())


def test_a_plain_binary_column_is_read_whatever_its_name(tmp_path: Path, by_name: dict[str, list[np.ndarray]]) -> None:
    write_parquet(tmp_path / "mine.parquet", [png(p) for p in by_name["two"]], [4] * 12, columns=("scan", "target"))
    data = local_folder(str(tmp_path))
    assert data.shape == ImageShape(1, 8, 8, 5)
    assert np.array_equal(pixels_of(data, 3), by_name["two"][3])


def test_a_label_column_has_a_usual_name(tmp_path: Path, by_name: dict[str, list[np.ndarray]]) -> None:
    """The only column of whole numbers may be an age, a width or a fold."""
    images = [png(p) for p in by_name["two"][:2]]
    write = partial(pq.write_table, where=tmp_path / "train.parquet")
    write(pa.table({"id": [70, 80], "label": [1, 0], "image": images}))
    assert local_folder(str(tmp_path)).labels.tolist() == [1, 0]
    write(pa.table({"label": ["cat", "ant"], "age": [70, 80], "image": images}))
    assert local_folder(str(tmp_path)).labels.tolist() == [1, 0]
    for columns in ({"id": [1, 2], "age": [70, 80]}, {"age": [70, 80]}):
        write(pa.table(columns | {"image": images}))
        with pytest.raises(DataError, match=f"no label column among {', '.join(columns)}, image"):
            local_folder(str(tmp_path))


def test_one_of_several_image_columns_has_a_usual_name(tmp_path: Path, by_name: dict[str, list[np.ndarray]]) -> None:
    masks, images = ([png(p) for p in by_name[name][:2]] for name in ("one", "two"))
    pq.write_table(pa.table({"mask": masks, "image": images, "label": [0, 1]}), tmp_path / "train.parquet")
    assert np.array_equal(pixels_of(local_folder(str(tmp_path)), 0), by_name["two"][0])
    pq.write_table(pa.table({"mask": masks, "scan": images, "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"several image columns \(mask, scan\)"):
        local_folder(str(tmp_path))


@pytest.mark.parametrize("metadata", [b"no json", b"[]", b'{"info": null}', b'{"info": {"features": {"label": 1}}}'])
def test_broken_hugging_face_metadata_is_ignored(
    tmp_path: Path, by_name: dict[str, list[np.ndarray]], metadata: bytes
) -> None:
    table = pa.table({"image": [png(p) for p in by_name["two"][:2]], "label": [0, 1]})
    pq.write_table(table.replace_schema_metadata({b"huggingface": metadata}), tmp_path / "train.parquet")
    assert local_folder(str(tmp_path)).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("train", "train"), ("train-00000-of-00002", "train"), ("mnist_test", "test"), ("data_train_0001", "train"),
        ("Validation", "validation"), ("val-0", "validation"), ("my-test-scanner", None), ("latest", None), ("", None),
    ],
)  # fmt: skip
def test_a_split_is_what_a_name_begins_or_ends_with(name: str, role: str | None) -> None:
    assert split_role(name) == role


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("train.parquet", "more.parquet"), r"more\.parquet has no split in its name"),
        (("plain/train-0.parquet", "cropped/train-0.parquet"), "name the folder of one configuration"),
        (("a/0.parquet", "b/0.parquet"), "name the folder of one configuration"),
    ],
)
def test_parquet_files_that_may_not_belong_together_are_refused(
    tmp_path: Path, by_name: dict[str, list[np.ndarray]], names: Sequence[str], why: str
) -> None:
    for name in names:
        write_parquet(tmp_path / name, [png(p) for p in by_name["two"]], [0, 1] * 6)
    with pytest.raises(DataError, match=why):
        open_(tmp_path)


def test_splits_may_be_folders_of_parquet_files(tmp_path: Path, by_name: dict[str, list[np.ndarray]]) -> None:
    images = [png(p) for p in by_name["two"]]
    write_parquet(tmp_path / "train" / "0000.parquet", images[:8], [0, 1] * 4)
    write_parquet(tmp_path / "test" / "0000.parquet", images[8:], [0, 1] * 2)
    assert len(open_(tmp_path).test()) == 4


def test_images_may_be_files_beside_the_parquet(tmp_path: Path, by_name: dict[str, list[np.ndarray]]) -> None:
    (tmp_path / "a.png").write_bytes(png(by_name["two"][0]))
    write_parquet(tmp_path / "train.parquet", [{"bytes": None, "path": "a.png"}], [0])
    assert np.array_equal(pixels_of(local_folder(str(tmp_path)), 0), by_name["two"][0])


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ([None, None], "has no labels in column 'label'"),
        ([0, -1], "row 1 has label -1"),
        ([0, 10**5], "label 100000"),
        ([], "no rows"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, labels: list[int | None], why: str) -> None:
    images = pa.array([png(np.zeros((8, 8), np.uint8))] * len(labels), pa.binary())
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=why):
        local_folder(str(tmp_path))


@pytest.mark.parametrize(("test_label", "first"), [(1, 6), (-1, 9)])
def test_the_test_split_is_preferred_and_validation_serves_where_its_labels_are_withheld(
    tmp_path: Path, by_name: dict[str, list[np.ndarray]], test_label: int, first: int
) -> None:
    images = [png(pixels) for pixels in by_name["three"]]
    write_parquet(tmp_path / "train.parquet", images[:6], [0, 1] * 3)
    write_parquet(tmp_path / "test.parquet", images[6:9], [test_label] * 3)
    write_parquet(tmp_path / "val.parquet", images[9:], [1] * 3)
    data = open_(tmp_path)
    assert np.array_equal(pixels_of(data.test(), 0), by_name["three"][first])
    assert int(data.class_counts().sum()) == 6


def test_junk_for_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"train\.parquet cannot be read as parquet"):
        open_(tmp_path)


# --- folders of images


def test_a_folder_of_images_is_read_as_written(tmp_path: Path, by_name: dict[str, list[np.ndarray]]) -> None:
    write_images(tmp_path / "train", {name: by_name[name][:10] for name in NAMES[:3]})
    write_images(tmp_path / "test", {"two": by_name["two"][10:]})
    (tmp_path / "train" / "one" / "notes.txt").write_text("no image")
    data = open_(tmp_path, clients=2)
    assert data.class_names == ("one", "two", "zero")
    assert data.test().labels.tolist() == [1, 1]
    assert np.array_equal(pixels_of(data.test(), 1), by_name["two"][11])
    assert data.class_counts().sum(0).tolist() == [10, 10, 10]


def test_a_test_split_alone_is_a_servers_and_used_in_full(tmp_path: Path, by_name: dict[str, list[np.ndarray]]) -> None:
    write_images(tmp_path / "test", {name: by_name[name][:10] for name in NAMES[:3]})
    data = open_(tmp_path, clients=2)
    assert (data.class_names, len(data.test())) == (("one", "two", "zero"), 30)
    assert data.clients == 2
    with pytest.raises(DataError, match="a test split only: a client needs data of its own"):
        data.client(0)


def test_without_a_test_split_some_of_every_class_is_held_out(
    tmp_path: Path, by_name: dict[str, list[np.ndarray]], caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, {"one": by_name["one"], "two": by_name["two"][:2], "three": by_name["three"][:1]})
    with caplog.at_level(logging.WARNING, logger="tofu.data"):
        data, other = open_(tmp_path, seed=1), open_(tmp_path, seed=2)
    assert "no test split: 3 of its 15 images are held out" in caplog.text
    assert torch.bincount(data.test().labels, minlength=3).tolist() == [2, 0, 1]
    assert data.class_counts().sum(0).tolist() == [10, 1, 1]
    assert torch.equal(data.test().images, other.test().images)
    assert not as_set(data.test()) & set().union(*(as_set(data.client(i)) for i in range(3)))


def test_numbered_class_folders_are_ordered_as_numbers(tmp_path: Path, by_name: dict[str, list[np.ndarray]]) -> None:
    write_images(tmp_path, {str(k): by_name["one"][:4] for k in (0, 2, 10)})
    assert open_(tmp_path).class_names == ("0", "2", "10")


def test_a_class_may_be_named_like_a_split(tmp_path: Path, by_name: dict[str, list[np.ndarray]]) -> None:
    write_images(tmp_path, {"plane": by_name["one"], "train": by_name["two"]})
    assert torch.bincount(local_folder(str(tmp_path)).labels).tolist() == [12, 12]


def test_mixed_sizes_name_the_first_odd_image(tmp_path: Path, by_name: dict[str, list[np.ndarray]]) -> None:
    write_images(tmp_path, {"one": by_name["one"][:3]})
    (tmp_path / "one" / "001.png").write_bytes(png(np.zeros((9, 7), np.uint8)))
    (tmp_path / "one" / "002.png").write_bytes(png(np.zeros((5, 5), np.uint8)))
    with pytest.raises(DataError, match=r"one/001\.png has 9x7 pixels, the first image 8x8"):
        local_folder(str(tmp_path))


def test_images_directly_in_a_split_are_refused(tmp_path: Path, by_name: dict[str, list[np.ndarray]]) -> None:
    write_images(tmp_path, {"train": by_name["one"]})
    with pytest.raises(DataError, match="images directly in train"):
        open_(tmp_path)
    write_images(tmp_path, {"test": by_name["two"]})
    with pytest.raises(DataError, match="images directly in test, train"):
        open_(tmp_path)


def test_classes_that_lie_deeper_than_others_are_refused(tmp_path: Path, by_name: dict[str, list[np.ndarray]]) -> None:
    write_images(tmp_path, {"plane": by_name["one"], "animals/cat": by_name["two"]})
    with pytest.raises(DataError, match=r"animals/cat has images below a class folder"):
        open_(tmp_path)


def test_folders_without_images_are_no_classes_and_are_reported(
    tmp_path: Path, by_name: dict[str, list[np.ndarray]], caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, {"cat": by_name["one"], "dog": [], "__MACOSX": by_name["two"], "annotations": []})
    (tmp_path / "annotations" / "boxes.xml").write_text("<none/>")
    (tmp_path / "preview.png").write_bytes(png(by_name["one"][0]))
    data = local_folder(str(tmp_path))
    assert (len(data), data.classes) == (12, 1)
    for name in ("annotations", "dog"):
        assert f"folder {tmp_path / name}, which has no images: not read" in caplog.text
    assert f"1 images in {tmp_path} outside the class folders: not read" in caplog.text


# --- a client's own folder


def test_a_local_folder_uses_its_training_split(as_parquet: Path, digits: LabeledImages) -> None:
    data = local_folder(str(as_parquet))
    assert torch.equal(data.images, digits.images[:300])
    assert data.classes == 10


def test_class_names_fix_the_labels_of_a_client_that_lacks_some(
    tmp_path: Path, by_name: dict[str, list[np.ndarray]]
) -> None:
    write_images(tmp_path, {"three": by_name["three"]})
    assert set(local_folder(str(tmp_path)).labels.tolist()) == {0}
    named = local_folder(str(tmp_path), class_names=NAMES)
    assert (set(named.labels.tolist()), named.classes) == ({3}, 10)
    with pytest.raises(DataError, match=f"{tmp_path} has the label 'three': expected one of cat, dog"):
        local_folder(str(tmp_path), class_names=("cat", "dog"))


def test_class_names_are_checked_against_parquets_own(as_parquet: Path) -> None:
    assert local_folder(str(as_parquet), class_names=NAMES).classes == 10
    own, reverse = (local_folder(str(as_parquet), class_names=names).labels for names in (NAMES, NAMES[::-1]))
    assert torch.equal(own, 9 - reverse)
    with pytest.raises(DataError, match=r"has the label 'eight': expected one of zero, one, two"):
        local_folder(str(as_parquet), class_names=NAMES[:8])


# --- datasets that are not there


@pytest.mark.parametrize("dataset", ["", "mnsit", "./nothing", "/nothing/here", "a b/c", "a/b/c"])
def test_an_unknown_dataset_is_answered_with_what_is_accepted(dataset: str) -> None:
    with pytest.raises(SettingError, match=r"^dataset=.* expected 'digits', .* hub id .* folder"):
        open_(dataset)


@pytest.mark.parametrize("folders", [(), ("train",), ("train/cat", "test/cat")])
def test_a_folder_without_images_is_refused(tmp_path: Path, folders: Sequence[str]) -> None:
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    for opened in (open_, lambda path: local_folder(str(path))):
        with pytest.raises(DataError, match=f"^{tmp_path}.* has no labeled images: expected"):
            opened(tmp_path)


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    with pytest.raises(DataError, match="a folder per class"):
        local_folder(str(tmp_path))


def test_a_file_is_no_local_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        local_folder(str(tmp_path / "absent"))


def test_a_hub_dataset_comes_from_the_cache_and_an_absent_hub_is_one_line_within_seconds(
    tmp_path: Path, as_parquet: Path
) -> None:
    code = f"""
import pathlib
from datasets.packaged_modules.parquet.parquet import Parquet
from tofu.data import open_data
from tofu.errors import DataError
files = {{split: f"{as_parquet}/data/{{split}}-*" for split in ("train", "test")}}
Parquet(dataset_name="mini", repo_id="me/mini", hash="0", data_files=files).download_and_prepare()
cached = pathlib.Path({str(tmp_path)!r}, "datasets", "me___mini")
next(cached.iterdir()).rename(cached / "default")
data = open_data("me/mini", clients=2, partition="shards", seed=0)
print(int(data.class_counts().sum()), int(data.test().images.sum()), *data.class_names)
try:
    open_data("some/dataset", clients=2, partition="iid", seed=0)
except DataError as error:
    print(error)
"""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = run([sys.executable, "-c", code], env=environment)
    assert done.returncode == 0, done.stderr
    cached, absent = done.stdout.splitlines()
    assert cached == f"300 {open_(as_parquet).test().images.sum()} {' '.join(NAMES)}"
    assert absent.startswith("dataset 'some/dataset' cannot be loaded from the hub")
    assert all(word in absent for word in ("digits", "hub id", "folder"))


# --- the real thing, where it is at hand


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [("mnist", ImageShape(1, 28, 28, 10), (60_000, 10_000)), ("cifar10", ImageShape(3, 32, 32, 10), (50_000, 10_000))],
)
def test_a_downloaded_dataset_opens(name: str, shape: ImageShape, sizes: tuple[int, int]) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there (TOFU_SHARED_DATA names the folder to look in)")
    data = open_(SHARED / name, clients=200, partition="shards")
    assert data.shape == shape
    assert (int(data.class_counts().sum()), len(data.test())) == sizes
    assert data.client(0).images.float().std() > 20
