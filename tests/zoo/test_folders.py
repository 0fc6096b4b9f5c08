"""Folders and tables as users have them: every image and row has its own label, or one line says why not."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.zoo.folders import CLASSES, IMAGES, TABLES, Case, Read
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
