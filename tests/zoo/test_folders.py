"""Folders and tables as users have them: every image and row has its own label, or one line says why not."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import tofu
from tests.zoo.folders import CLASSES, IMAGES, TABLES, Case, Read, animals, csv, images
from tofu.data import open_data, open_rows
from tofu.errors import TofuError


def check_labels(marks: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> None:
    """Each image or row is marked with the number of its class in CLASSES."""
    assert [CLASSES[int(mark)] for mark in marks] == [class_names[label] for label in labels.tolist()]


def read_images(case: Case, folder: Path) -> Read:
    data = open_data(str(folder), clients=1, partition="iid", seed=0, **case.settings)
    parts = (data.client(0), data.test())
    for part in parts:
        check_labels(part.images[:, 0, 0, 0].float() / 20 - 1, part.labels, data.class_names)
    return Read(data.class_names, len(parts[0]), len(parts[1]), sum(len(part.unreadable) for part in parts))


def read_rows(case: Case, folder: Path) -> Read:
    form = {"feature_columns": "*", **case.settings}
    data = open_rows(str(folder / case.file), clients=1, partition="iid", seed=0, **form)
    for part in (data.clients[0], data.test):
        check_labels(part.inputs[:, 0], part.labels, data.class_names)
    return Read(data.class_names, len(data.clients[0]), len(data.test), len(data.test.unreadable))


CASES = [(read_images, name, case) for name, case in IMAGES.items()]
CASES += [(read_rows, name, case) for name, case in TABLES.items()]


@pytest.mark.parametrize(
    ("read", "case"), [(r, c) for r, _, c in CASES], ids=[f"{r.__name__}-{n}" for r, n, _ in CASES]
)
def test_a_folder_is_read_with_the_right_labels_or_refused_in_one_line(read: Any, case: Case, tmp_path: Path) -> None:
    case.build(tmp_path)
    if isinstance(case.expected, Read):
        assert read(case, tmp_path) == case.expected
        return
    with pytest.raises(TofuError, match=case.expected) as error:
        read(case, tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_data_json_says_of_which_split_a_row_is_and_what_is_not_used(tmp_path: Path) -> None:
    for name, count in (("train", 6), ("val", 2), ("test", 3)):
        csv(tmp_path / f"{name}.csv", "a,b,label", [*animals(count), f"1,?,{name}"])
    tofu.run(
        dataset=str(tmp_path), feature_columns="*", clients=2, rounds=1, schedule="fedavg", checkpoint=False,
        run_folder=str(tmp_path / "run"), progress=False,
    )  # fmt: skip
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    reason = "has no finite number in column 'b' (?)"
    assert data["train_left_out"] == [f"{tmp_path}/train.csv, row 12 {reason}"]
    assert data["test_left_out"] == [f"{tmp_path}/test.csv, row 6 {reason}"]
    assert data["left_out"] == ["split validation (4 rows)"]


def test_a_validation_split_beside_a_test_split_is_reported_as_unused(tmp_path: Path) -> None:
    for name in ("train", "test", "val"):
        images(tmp_path, f"{name}/cat", f"{name}/dog", count=2)
    data = open_data(str(tmp_path), clients=1, partition="iid", seed=0)
    assert data.description()["left_out"] == ["split validation (4 images)"]


@pytest.mark.parametrize("size", [(1, 1), (6, 1)])
def test_images_with_a_side_of_one_pixel_train(size: tuple[int, int], tmp_path: Path) -> None:
    images(tmp_path / "photos", "cat", "owl", count=12, size=size)
    result = tofu.run(
        dataset=str(tmp_path / "photos"), clients=2, rounds=1, max_evals=3, checkpoint=False, progress=False,
        run_folder=str(tmp_path / "run"),
    )  # fmt: skip
    assert result.history[1].explained_variance > 0.5
