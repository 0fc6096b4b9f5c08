"""A subpopulation shift: which labels form a class, which are trained on, and which are tested."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tofu.data import LabeledImages, local_folder, open_data
from tofu.data.digits import read_digits
from tofu.data.subpopulations import Subpopulations
from tofu.errors import SettingError
from tofu.settings import Settings
from tofu.settings.groups import DataSettings

SHIFT = "0,8/9 3/5"


def opened(part: str = "unseen", **more: int) -> tuple[LabeledImages, LabeledImages, tuple[str, ...]]:
    """All clients' images, the test images and the class names."""
    chosen: Any = {"subpopulations": SHIFT, "test_subpopulations": part} | more
    data = open_data("digits", clients=3, partition="iid", seed=0, **chosen)
    clients = [data.client(k) for k in range(3)]
    images, labels = (torch.cat([getattr(client, name) for client in clients]) for name in ("images", "labels"))
    return LabeledImages(images, labels, data.shape.classes), data.test(), data.class_names


def leaves(data: LabeledImages) -> Counter[tuple[int, int]]:
    """(digit, class) -> how many, by looking the images up among all digits."""
    split = read_digits()
    digit = {np.asarray(split.read(row)).tobytes(): int(label) for row, label in enumerate(split.labels)}
    return Counter((digit[i.numpy().tobytes()], int(k)) for i, k in zip(data.images[:, 0], data.labels, strict=True))


def test_unseen_labels_are_never_trained_on() -> None:
    train, _, names = opened()
    assert names == ("0 or 8 or 9", "3 or 5")
    assert train.classes == 2
    plain = open_data("digits", clients=1, partition="iid", seed=0).client(0).labels.bincount(minlength=10)
    assert leaves(train) == {(0, 0): int(plain[0]), (8, 0): int(plain[8]), (3, 1): int(plain[3])}


@pytest.mark.parametrize(
    ("part", "tested"),
    [
        ("unseen", {(9, 0), (5, 1)}),
        ("seen", {(0, 0), (8, 0), (3, 1)}),
        ("all", {(0, 0), (8, 0), (9, 0), (3, 1), (5, 1)}),
    ],
)
def test_the_test_images_are_of_the_part_asked_for(part: str, tested: set[tuple[int, int]]) -> None:
    train, test, _ = opened(part)
    counts = leaves(test)
    assert set(counts) == tested
    plain = open_data("digits", clients=1, partition="iid", seed=0).test().labels.bincount(minlength=10)
    assert all(counts[digit, class_] == plain[digit] for digit, class_ in tested)
    assert leaves(train) == leaves(opened()[0])


def test_subsets_are_of_the_images_that_are_left() -> None:
    train, test, _ = opened(train_images=50, test_images=20)
    assert (len(train), len(test)) == (50, 20)
    with pytest.raises(SettingError, match=r"train-images=1000 .*at most \d{3},"):
        opened(train_images=1000)


@pytest.mark.parametrize(
    "text", ["0/1", "0,1 2/3", "0/1/2 3/4", "0/ 1/2", "0/1 1/2", "a/1 2/3", "0/1 -2/3", "0/1 2,/3", " "]
)
def test_wrong_texts_are_refused_in_one_line_when_a_run_is_configured(text: str) -> None:
    with pytest.raises(SettingError, match=r"subpopulations=.* is not usable: expected two or more classes") as error:
        Settings.of({"subpopulations": text})
    assert "\n" not in str(error.value)


def test_a_label_that_the_data_lacks_is_refused() -> None:
    with pytest.raises(SettingError, match=r"subpopulations=10 .*labels 0 to 9"):
        open_data("digits", clients=1, partition="iid", seed=0, subpopulations="0/1 2/10")
    with pytest.raises(SettingError, match=r"test-subpopulations='some' .*unseen, seen, all"):
        open_data("digits", clients=1, partition="iid", seed=0, test_subpopulations="some")


@given(st.permutations(range(10)), st.integers(1, 3), st.integers(1, 3), st.integers(2, 3))
@settings(max_examples=30, deadline=None)
def test_every_image_is_of_one_part_of_one_class(order: list[int], seen: int, unseen: int, classes: int) -> None:
    rest = iter(order)
    sides = [[[next(rest, None) for _ in range(n)] for n in (seen, unseen)] for _ in range(classes)]
    words = ["/".join(",".join(str(k) for k in side if k is not None) for side in pair) for pair in sides]
    if any(not side for word in words for side in word.split("/")):
        with pytest.raises(SettingError):
            Subpopulations.parse(" ".join(words))
        return
    split, shift = read_digits(), Subpopulations.parse(" ".join(words))
    parts = {part: shift.rows(split.labels, part) for part in ("seen", "unseen", "all")}  # type: ignore[arg-type]
    assert sorted([*parts["seen"], *parts["unseen"]]) == parts["all"].tolist()
    grouped = shift.regroup(split)
    assert np.flatnonzero(grouped.labels >= 0).tolist() == parts["all"].tolist()
    for digit in range(10):
        expected = [k for k, pair in enumerate(sides) if any(digit in side for side in pair)] or [-1]
        assert set(grouped.labels[split.labels == digit].tolist()) == set(expected)


def test_a_real_clients_folder_has_the_same_classes(tmp_path: Path) -> None:
    for number, name in enumerate("abcd"):
        (tmp_path / name).mkdir()
        for k in range(number + 1):
            Image.fromarray(np.full((4, 4), 10 * number + k, dtype=np.uint8)).save(tmp_path / name / f"{k}.png")
    data = local_folder(str(tmp_path), DataSettings(subpopulations="1/0 3/2"))
    assert (data.classes, data.labels.tolist()) == (2, [0] * 2 + [1] * 4)
    assert data.images[:, 0, 0, 0].tolist() == [10, 11, 30, 31, 32, 33]
    with pytest.raises(SettingError, match=r"subpopulations=4 .*labels 0 to 3"):
        local_folder(str(tmp_path), DataSettings(subpopulations="1/0 3/4"))
