"""Folders and tables as users have them: what is read of each, or the line that refuses it.

An image of a class is filled with one gray value, and the feature "a" of a row is the number of its class in CLASSES,
so that a test can tell for each of them whether it has got the right label.
"""

import json
import os
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("cat", "dog", "owl", "0", "1", "2", "10", "False", "True", "caf\u00e9", "train", "Cat")


@dataclass(frozen=True)
class Read:
    """What is read: the classes in order, and the number of training, test and unreadable images or rows."""

    classes: tuple[str, ...] = ("cat", "dog")
    train: int = 8
    test: int = 4
    unreadable: int = 0


@dataclass(frozen=True)
class Case:
    """A folder or a file in it, the settings that it is read with, and what is read or the error."""

    build: Callable[[Path], object]
    expected: Read | str
    settings: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""


def picture(name: str, *, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.full(size, 20 * (1 + CLASSES.index(name)), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def frames(name: str, *formats: str) -> Callable[[Path], object]:
    """Two frames or pages in a file of each format, in the training folder of a class."""

    def build(root: Path) -> None:
        splits(root, "cat", "dog")
        first, second = (Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (20, 90))
        for format_ in formats:
            path = root / "train" / name / f"{format_}.jpg"
            first.convert("RGB").save(path, format_, save_all=True, append_images=[second.convert("RGB")])

    return build


def put(root: Path, *files: str, content: bytes = b"junk") -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def images(root: Path, *folders: str, count: int = 4, suffix: str = ".png", **written: Any) -> None:
    """Images in folders that are named like their class."""
    for folder in folders:
        name = unicodedata.normalize("NFC", Path(folder).name)
        for number in range(count):
            put(root, f"{folder}/{name}{number}{suffix}", content=picture(name, **written))


def splits(root: Path, *classes: str, train: str = "train", test: str = "test") -> None:
    images(root, *(f"{train}/{name}" for name in classes))
    images(root, *(f"{test}/{name}" for name in classes), count=2)


def parquet(path: Path, names: tuple[str, ...], columns: Mapping[str, Any], metadata: Any = None) -> None:
    """A parquet file of images of these classes, in a column `image` unless `columns` has images of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {key: pa.array(value) for key, value in columns.items()}
    if not any(pa.types.is_binary(each.type) or pa.types.is_struct(each.type) for each in arrays.values()):
        arrays = {"image": pa.array([picture(name) for name in names])} | arrays
    table = pa.table(arrays)
    if metadata is not None:
        text = metadata if isinstance(metadata, bytes) else json.dumps({"info": {"features": metadata}}).encode()
        table = table.replace_schema_metadata({b"huggingface": text})
    pq.write_table(table, path)


def both(
    root: Path, *, train: str = "train.parquet", test: str = "test.parquet", label: str = "label", **more: Any
) -> None:
    """Parquet files of cats and dogs with texts as labels."""
    for path, count in ((train, 4), (test, 2)):
        names = ("cat", "dog") * count
        other = {key: (value * len(names))[: len(names)] for key, value in more.items()}
        parquet(root / path, names, {label: list(names)} | other)


def csv(path: Path, header: str, rows: list[str], *, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n", encoding=encoding)


def animals(count: int = 6, end: str = "{name}", start: str = "{a},1.5,") -> list[str]:
    """Lines a,b,label of cats and dogs."""
    return [(start + end).format(a=a, name=name) for _ in range(count) for a, name in enumerate(("cat", "dog"))]


def metadata(root: Path, name: str, lines: list[str]) -> None:
    images(root, "cat", "dog")
    for folder in ("cat", "dog"):
        for path in sorted((root / folder).iterdir()):
            path.rename(root / path.name)
        (root / folder).rmdir()
    put(root, name, content="\n".join(lines).encode())


NAMED = [f"{name}{number}.png" for name in ("cat", "dog") for number in range(4)]
ROWS = [f"{name},{name[:3]}" for name in NAMED]
HELD = Read(train=6, test=2)  # a quarter of each class of four is held out: at least one image
LABELS = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}


def damage(root: Path, *files: str) -> None:
    splits(root, "cat", "dog")
    put(root, *files)


def sequence(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        for step in steps:
            step(root)

    return build


def numbers(root: Path, values: list[Any], **more: Any) -> None:
    """Images of "0", "1" and so on, four of each, whose labels are given in the same order."""
    kinds = [str(value) for value in range(len(values)) for _ in range(4)]
    labels = [value for value in values for _ in range(4)]
    parquet(root / "train.parquet", tuple(kinds), {"label": labels} | more)


IMAGES: dict[str, Case] = {
    # Folders of images
    "class_folders": Case(lambda r: images(r, "cat", "dog"), HELD),
    "splits": Case(lambda r: splits(r, "cat", "dog"), Read()),
    "splits_with_long_names": Case(lambda r: splits(r, "cat", "dog", train="training_set", test="test_set"), Read()),
    "validation_serves_as_test": Case(lambda r: splits(r, "cat", "dog", test="val"), Read()),
    "an_eval_split": Case(lambda r: splits(r, "cat", "dog", test="eval"), Read()),
    "more_suffixes": Case(lambda r: (images(r, "cat", suffix=".avif"), images(r, "dog", suffix=".JFIF")), HELD),
    "suffixes_without_a_reader": Case(
        lambda r: sequence(lambda p: splits(p, "cat", "dog"), lambda p: put(p, "train/cat/x.HEIC", "train/owl/y.heic"))(
            r
        ),
        Read(("cat", "dog", "owl"), unreadable=2),
    ),
    "classes_in_another_case": Case(
        lambda r: sequence(lambda p: images(p, "train/Cat", "train/dog"), lambda p: images(p, "test/cat", "test/dog"))(
            r
        ),
        "has class 'Cat' in split train and 'cat' in test: expected one spelling",
    ),
    "a_comma_in_a_class": Case(
        lambda r: images(r, "cat", "owl"), Read(("owl", "a, b", "cat"), 6, 2), {"class_names": 'owl, "a, b",cat'}
    ),
    "a_class_named_twice": Case(
        lambda r: images(r, "cat", "dog"), "has two classes named 'cat'", {"class_names": "cat,dog,cat"}
    ),
    "class_names_in_another_unicode_form": Case(
        lambda r: images(r, "cat", "caf\u00e9"), Read(("cat", "caf\u00e9"), 6, 2), {"class_names": "cat,cafe\u0301"}
    ),
    "line_breaks_in_names": Case(
        lambda r: damage(r, "train/cat/x\ny.png"), r"x y\.png cannot be read as an image", {"strict": True}
    ),
    "a_linked_class": Case(
        lambda r: sequence(
            lambda p: images(p, "train/cat", "other/dog"),
            lambda p: images(p, "test/cat", "test/dog", count=2),
            lambda p: (p / "train/dog").symlink_to(p / "other/dog"),
        )(r),
        Read(),
    ),
    "one_class": Case(lambda r: images(r, "cat"), r"has one class only \(cat\): expected at least two"),
    "images_beside_a_list": Case(
        lambda r: sequence(lambda p: images(p, "train"), lambda p: put(p, "labels.csv"))(r),
        "images directly in train, which names a split",
    ),
    "other_suffixes": Case(lambda r: (images(r, "cat", suffix=".BMP"), images(r, "dog", suffix=".tif")), HELD),
    "numbers_are_sorted_by_value": Case(lambda r: images(r, "10", "2", "1"), Read(("1", "2", "10"), 9, 3)),
    "unicode": Case(lambda r: images(r, "cat", "caf\u00e9"), Read(("caf\u00e9", "cat"), 6, 2)),
    "unicode_in_two_forms": Case(
        lambda r: sequence(
            lambda p: images(p, "train/cat", "train/caf\u00e9"),
            lambda p: images(p, "test/cat", "test/cafe\u0301", count=2),
        )(r),
        Read(("caf\u00e9", "cat")),
    ),
    "hidden_and_system_folders": Case(
        lambda r: sequence(
            lambda p: splits(p, "cat", "dog"),
            lambda p: put(
                p,
                "train/.git/x.png",
                "train/__MACOSX/cat/._cat0.png",
                "train/@eaDir/x.png",
                "train/cat/@eaDir/thumb.png",
                "train/$RECYCLE.BIN/x.png",
                "lost+found/x.png",
                "train/.ipynb_checkpoints/cat/x.png",
                content=picture("owl"),
            ),
        )(r),
        Read(),
    ),
    "hidden_files": Case(
        lambda r: damage(r, "train/cat/._cat0.png", "train/cat/.DS_Store", "train/dog/Thumbs.db"), Read()
    ),
    "empty_folders_are_no_classes": Case(
        lambda r: sequence(lambda p: splits(p, "cat", "dog"), lambda p: (p / "train" / "aaa").mkdir())(r), Read()
    ),
    "folders_of_other_files_are_no_classes": Case(
        lambda r: damage(r, "train/annotations/a.xml", "train/bin/a.txt"), Read()
    ),
    "images_outside_the_classes": Case(
        lambda r: sequence(lambda p: splits(p, "cat", "dog"), lambda p: put(p, "train/x.png", content=picture("owl")))(
            r
        ),
        Read(),
    ),
    "a_folder_beside_the_splits": Case(
        lambda r: sequence(lambda p: splits(p, "cat", "dog"), lambda p: images(p, "extra/owl"))(r), Read()
    ),
    "a_class_in_the_test_split_alone": Case(
        lambda r: sequence(lambda p: splits(p, "cat", "dog"), lambda p: images(p, "test/owl", count=1))(r),
        Read(("cat", "dog", "owl"), 8, 5),
    ),
    "a_class_named_like_a_split": Case(lambda r: images(r, "cat", "train"), Read(("cat", "train"), 6, 2)),
    "deeper_classes": Case(
        lambda r: images(r, "cat", "animals/dog"), r"animals/dog has images below a class folder: expected them in"
    ),
    "one_folder_around_all": Case(lambda r: images(r, "pets/cat", "pets/dog"), "or name .*pets as the dataset"),
    "images_below_a_class": Case(
        lambda r: images(r, "train/cat", "train/dog", "train/dog/more/dog"), "more/dog has images below"
    ),
    "two_training_splits": Case(
        lambda r: images(r, "train/cat", "training/cat"), "has both train and training for train: expected one"
    ),
    "images_in_splits_without_classes": Case(
        lambda r: [put(r, f"{name}/a.png", content=picture("cat")) for name in ("train", "test")],
        "images directly in test, train, which names a split",
    ),
    "no_folders": Case(lambda r: put(r, "a.png", content=picture("cat")), "has no labeled images: expected"),
    "empty": Case(lambda r: r.mkdir(exist_ok=True), "has no labeled images: expected"),
    "one_image_per_class": Case(lambda r: images(r, "cat", "dog", count=1), "too few images to hold one out"),
    # Damaged and odd images
    "corrupt_images": Case(
        lambda r: damage(r, "train/cat/x.png", "train/dog/y.jpg", "test/dog/z.png"), Read(unreadable=3)
    ),
    "an_empty_file": Case(
        lambda r: sequence(lambda p: splits(p, "cat", "dog"), lambda p: put(p, "train/cat/x.png", content=b""))(r),
        Read(unreadable=1),
    ),
    "a_folder_named_like_an_image": Case(
        lambda r: sequence(lambda p: splits(p, "cat", "dog"), lambda p: (p / "train/cat/x.png").mkdir())(r),
        Read(unreadable=1),
    ),
    "a_broken_link": Case(
        lambda r: sequence(lambda p: splits(p, "cat", "dog"), lambda p: (p / "train/cat/x.png").symlink_to("gone"))(r),
        Read(unreadable=1),
    ),
    "a_pipe": Case(
        lambda r: sequence(lambda p: splits(p, "cat", "dog"), lambda p: os.mkfifo(p / "train/cat/x.png"))(r),
        Read(unreadable=1),
    ),
    "several_pages_or_frames": Case(frames("cat", "TIFF", "GIF", "PNG", "WEBP"), Read(unreadable=4)),
    "several_frames_strict": Case(
        frames("cat", "GIF"),
        r"GIF\.jpg cannot be read as an image: it has several pages or frames",
        {"strict": True},
    ),
    "strict": Case(lambda r: damage(r, "train/cat/x.png"), r"x\.png cannot be read as an image", {"strict": True}),
    "all_corrupt": Case(
        lambda r: put(r, "cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png"), "none of 4 images can be read"
    ),
    "other_sizes": Case(
        lambda r: sequence(
            lambda p: splits(p, "cat", "dog"), lambda p: put(p, "train/cat/x.png", content=picture("cat", size=(9, 7)))
        )(r),
        r"x\.png has 9x7 pixels, the first image 8x8",
    ),
    "long_names": Case(
        lambda r: sequence(
            lambda p: splits(p, "cat", "dog"), lambda p: put(p, f"train/cat/{'n' * 251}.png", content=picture("cat"))
        )(r),
        Read(train=9),
    ),
    "names_that_are_not_utf8": Case(
        lambda r: sequence(
            lambda p: splits(p, "cat", "dog"), lambda p: put(p, "train/cat/caf\udce9.png", content=picture("cat"))
        )(r),
        Read(train=9),
    ),
    "spaces_and_quotes": Case(
        lambda r: sequence(
            lambda p: splits(p, "cat", "dog"),
            lambda p: put(p, 'train/cat/it\'s "new" {0}%s.png', content=picture("cat")),
        )(r),
        Read(train=9),
    ),
    "one_pixel": Case(lambda r: images(r, "cat", "dog", size=(1, 1)), HELD),
    "one_pixel_wide": Case(lambda r: images(r, "cat", "dog", size=(6, 1)), HELD),
    # Metadata beside images
    "metadata_csv": Case(lambda r: metadata(r, "metadata.csv", ["file_name,label", *ROWS]), HELD),
    "metadata_in_a_split": Case(lambda r: metadata(r / "train", "metadata.csv", ["file_name,label", *ROWS]), HELD),
    "metadata_jsonl": Case(
        lambda r: metadata(
            r, "metadata.jsonl", [json.dumps({"file_name": n, "label": n[:3], "age": 3}) for n in NAMED]
        ),
        HELD,
    ),
    "metadata_without_a_label": Case(
        lambda r: metadata(r, "metadata.csv", ["file_name,label", *ROWS, "cat0.png,"]),
        Read(train=6, test=2, unreadable=1),
    ),
    "metadata_column_is_named": Case(
        lambda r: metadata(r, "metadata.csv", ["file_name,species", *ROWS]), HELD, {"label_column": "species"}
    ),
    "metadata_names_an_absent_image": Case(
        lambda r: metadata(r, "metadata.csv", ["file_name,label", *ROWS[:6], "gone.png,dog"]),
        Read(train=5, test=1, unreadable=1),
    ),
    "metadata_with_an_image_twice": Case(
        lambda r: metadata(r, "metadata.csv", ["file_name,label", *ROWS, ROWS[0]]), Read(train=7, test=2)
    ),
    "metadata_with_two_labels": Case(
        lambda r: metadata(r, "metadata.csv", ["file_name,label", *ROWS, "cat0.png,dog"]),
        r"metadata\.csv has cat0\.png with the labels cat and dog",
    ),
    "metadata_without_labels": Case(
        lambda r: metadata(r, "metadata.csv", ["file_name,text", *ROWS]),
        r"metadata\.csv has no label column among file_name, text",
    ),
    "metadata_without_file_names": Case(
        lambda r: metadata(r, "metadata.csv", ["path,label", *ROWS]), r"metadata\.csv has no column 'file_name'"
    ),
    "metadata_twice": Case(
        lambda r: sequence(
            lambda p: metadata(p, "metadata.csv", ["file_name,label", *ROWS]), lambda p: put(p, "metadata.jsonl")
        )(r),
        r"has metadata\.csv and metadata\.jsonl: expected one",
    ),
    # Parquet
    "texts_as_labels": Case(both, Read()),
    "texts_beside_integers": Case(lambda r: both(r, age=[70, 80, 90], fold=[0, 1]), Read()),
    "an_integer_called_y_beside_a_label": Case(
        lambda r: both(r, y=[7, 8]), r"labels in label or y: name one \(label-column\)"
    ),
    "the_label_is_named": Case(lambda r: both(r, y=[7, 8]), Read(), {"label_column": "label"}),
    "only_other_columns": Case(
        lambda r: both(r, label="species", age=[1]), "has no label column among image, species, age: name it"
    ),
    "label_in_capitals": Case(lambda r: both(r, label="Label"), Read()),
    "empty_cells": Case(lambda r: both(r, mask=[picture("owl")], image=[b""]), "none of 8 images can be read"),
    "mask_first": Case(
        lambda r: parquet(
            r / "train.parquet",
            (),
            {
                "mask": [picture("owl")] * 8,
                "image": [picture(n) for n in ("cat", "dog") * 4],
                "label": ["cat", "dog"] * 4,
            },
        ),
        HELD,
    ),
    "two_image_columns": Case(
        lambda r: parquet(
            r / "train.parquet",
            (),
            {
                "left": [picture("owl")] * 8,
                "right": [picture(n) for n in ("cat", "dog") * 4],
                "label": ["cat", "dog"] * 4,
            },
        ),
        r"several image columns \(left, right\): name one \(image-column\)",
    ),
    "the_image_column_is_named": Case(
        lambda r: parquet(
            r / "train.parquet",
            (),
            {
                "left": [picture("owl")] * 8,
                "right": [picture(n) for n in ("cat", "dog") * 4],
                "label": ["cat", "dog"] * 4,
            },
        ),
        HELD,
        {"image_column": "right"},
    ),
    "the_image_column_holds_none": Case(
        both, "no encoded images in column 'label': expected one of image", {"image_column": "label"}
    ),
    "no_images": Case(lambda r: csv_as_parquet(r), "no column of encoded images among a, label"),
    "a_scanner": Case(
        lambda r: parquet(r / "my-test-scanner.parquet", ("cat", "dog") * 4, {"label": ["cat", "dog"] * 4}), HELD
    ),
    "train_and_test_in_one_name": Case(
        lambda r: parquet(r / "train-test.parquet", ("cat", "dog") * 4, {"label": ["cat", "dog"] * 4}), HELD
    ),
    "a_name_without_a_split": Case(
        lambda r: both(r, test="more.parquet"), r"more\.parquet has no split in its name, unlike other files"
    ),
    "two_configurations": Case(
        lambda r: [both(r / name) for name in ("en", "de")],
        "has files in .*de and in .*en: name the folder of one configuration",
    ),
    "two_configurations_by_name": Case(
        lambda r: [both(r, train=f"{name}-train.parquet", test=f"{name}-test.parquet") for name in ("en", "de")],
        r"has for test both .*de-test\.parquet and .*en-test\.parquet",
    ),
    "shards": Case(
        lambda r: [
            both(r, train=f"data/train-{n:05}-of-00002.parquet", test=f"data/test-{n:05}-of-00002.parquet")
            for n in (0, 1)
        ],
        Read(train=16, test=8),
    ),
    "shards_with_hashes": Case(
        lambda r: [
            both(
                r,
                train=f"data/train-{n:05}-of-00002-{n}123456789abcdef.parquet",
                test="data/test-00000-of-00001.parquet",
            )
            for n in (0, 1)
        ],
        Read(train=16, test=4),
    ),
    "folders_of_splits": Case(lambda r: both(r, train="train/0000.parquet", test="test/0000.parquet"), Read()),
    "converted_by_the_hub": Case(
        lambda r: both(r, train="default/train/0000.parquet", test="default/test/0000.parquet"), Read()
    ),
    "two_configurations_converted_by_the_hub": Case(
        lambda r: [both(r, train=f"{n}/train/0000.parquet", test=f"{n}/test/0000.parquet") for n in ("en", "de")],
        "name the folder of one configuration",
    ),
    "files_at_two_depths": Case(
        lambda r: [both(r, train=f"data/train/{name}0.parquet", test="data/test/0.parquet") for name in ("", "more/")],
        r"more/0\.parquet is in a folder of depth 3: expected at most 2",
    ),
    "partly_converted": Case(
        lambda r: [
            both(r, train=f"default/{n}/0000.parquet", test="default/test/0000.parquet")
            for n in ("train", "partial-train")
        ],
        "has for train both",
    ),
    "class_label_feature": Case(
        lambda r: parquet(r / "a.parquet", ("cat", "dog") * 4, {"animal": [0, 1] * 4}, {"animal": LABELS["label"]}),
        HELD,
    ),
    "class_label_beside_a_label": Case(
        lambda r: parquet(
            r / "a.parquet",
            ("cat", "dog") * 4,
            {"sex": [1, 1] * 4, "label": ["cat", "dog"] * 4},
            {"sex": {"_type": "ClassLabel", "names": ["f", "m"]}},
        ),
        HELD,
    ),
    **{
        f"broken_metadata_{number}": Case(
            lambda r, text=text: parquet(r / "a.parquet", ("cat", "dog") * 4, {"label": ["cat", "dog"] * 4}, text), HELD
        )
        for number, text in enumerate(
            (b"[" * 5000, b"\xff", b'{"info": {"features": {"label": {"names": 3}}}}', b'{"info": 1}')
        )
    },
    "other_names_in_the_test_split": Case(
        lambda r: [
            parquet(r / "train.parquet", ("cat", "dog") * 4, {"label": [0, 1] * 4}, LABELS),
            parquet(
                r / "test.parquet",
                ("dog", "cat") * 2,
                {"label": [0, 1] * 2},
                {"label": {"_type": "ClassLabel", "names": ["dog", "cat"]}},
            ),
        ],
        Read(),
    ),
    "numbers_as_labels": Case(lambda r: numbers(r, [0, 1, 2]), Read(("0", "1", "2"), 9, 3)),
    "numbers_as_texts": Case(lambda r: numbers(r, ["0", "1", "2"]), Read(("0", "1", "2"), 9, 3)),
    "whole_floats": Case(lambda r: numbers(r, [0.0, 1.0]), Read(("0", "1"), 6, 2)),
    "fractions": Case(
        lambda r: numbers(r, [0.5, 1.0]), "fractions in label column 'label': expected whole numbers or texts"
    ),
    "numbers_and_texts": Case(
        lambda r: [
            parquet(r / "train.parquet", ("cat", "dog") * 4, {"label": ["cat", "dog"] * 4}),
            parquet(r / "test.parquet", ("cat", "dog") * 2, {"label": [0, 1] * 2}),
        ],
        "labels that are numbers in split test and texts in train",
    ),
    "empty_labels": Case(lambda r: numbers(r, [0, 1, None]), Read(("0", "1"), 6, 2, 4)),
    "empty_labels_first": Case(
        lambda r: parquet(r / "a.parquet", ("owl", *("cat", "dog") * 4), {"label": [None, *("cat", "dog") * 4]}),
        Read(train=6, test=2, unreadable=1),
    ),
    "labels_that_are_not_finite": Case(lambda r: numbers(r, [0.0, 1.0, float("nan")]), Read(("0", "1"), 6, 2, 4)),
    "blank_labels": Case(lambda r: numbers(r, ["0", "1 ", " "]), Read(("0", "1"), 6, 2, 4)),
    "labels_that_say_nan": Case(lambda r: numbers(r, ["0", "1", "NaN"]), Read(("0", "1"), 6, 2, 4)),
    "no_labels": Case(lambda r: numbers(r, [None]), "has no labels in column 'label': all cells are empty"),
    "labels_too_large": Case(
        lambda r: parquet(r / "a.parquet", ("0",), {"label": np.array([2**63 + 1], np.uint64)}),
        "has label 9223372036854",
    ),
    "strict_about_labels": Case(
        lambda r: numbers(r, [0, 1, None]),
        r"train\.parquet, row 8 has no label in column 'label' \(strict=true\)",
        {"strict": True},
    ),
    "corrupt_cells": Case(
        lambda r: parquet(
            r / "train.parquet",
            (),
            {
                "image": [picture(n) for n in ("cat", "dog") * 4] + [b"junk", None],
                "label": ["cat", "dog"] * 5,
            },
        ),
        Read(train=7, test=1, unreadable=2),
    ),
    "no_parquet": Case(lambda r: put(r, "train.parquet"), r"train\.parquet cannot be read as parquet"),
    # Names of the classes of a run
    "named_classes": Case(
        lambda r: images(r, "cat", "owl"), Read(("cat", "dog", "owl"), 6, 2), {"class_names": "cat,dog,owl"}
    ),
    "another_order": Case(lambda r: images(r, "cat", "dog"), Read(("dog", "cat"), 6, 2), {"class_names": "dog,cat"}),
    "unknown_class": Case(
        lambda r: images(r, "cat", "owl"),
        "has the label 'owl': expected one of cat, dog",
        {"class_names": "cat,dog"},
    ),
    "numbers_that_are_names": Case(
        lambda r: numbers(r, [0, 1, 2]), Read(("2", "1", "0"), 9, 3), {"class_names": "2,1,0"}
    ),
}


def csv_as_parquet(root: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2], "label": ["cat", "dog"]}), root / "train.parquet")


TABLE_HELD = Read(train=10, test=2)

TABLES: dict[str, Case] = {
    "csv": Case(lambda r: csv(r / "t.csv", "a,b,label", animals()), TABLE_HELD, file="t.csv"),
    "csv_in_a_folder": Case(lambda r: csv(r / "t.csv", "a,b,label", animals()), TABLE_HELD),
    "train_and_test": Case(
        lambda r: [csv(r / "train.csv", "a,b,label", animals()), csv(r / "test.csv", "a,b,label", animals(2))],
        Read(train=12),
    ),
    "columns_in_another_order": Case(
        lambda r: [
            csv(r / "train.csv", "a,b,label", animals()),
            csv(r / "test.csv", "label,b,a", ["cat,1.5,0", "dog,1.5,1"]),
        ],
        Read(train=12, test=2),
    ),
    "a_test_set_without_the_last_class": Case(
        lambda r: [csv(r / "train.csv", "a,b,label", animals()), csv(r / "test.csv", "a,b,label", ["1,2,dog"])],
        Read(train=12, test=1),
    ),
    "texts_beside_the_features": Case(lambda r: csv(r / "t.csv", "a,who,label", animals(start="{a},Ann,")), TABLE_HELD),
    "byte_order_mark": Case(lambda r: csv(r / "t.csv", "a,b,label", animals(), encoding="utf-8-sig"), TABLE_HELD),
    "windows_line_ends": Case(
        lambda r: put(r, "t.csv", content="\r\n".join(["a,b,label", *animals()]).encode()), TABLE_HELD
    ),
    "quoted_commas": Case(lambda r: csv(r / "t.csv", 'a,"b,c",label', animals()), TABLE_HELD),
    "an_index_without_a_name": Case(
        lambda r: csv(r / "t.csv", ",a,label", [f"{n},{row}" for n, row in enumerate(animals(start="{a},"))]),
        TABLE_HELD,
    ),
    "an_index_of_pandas": Case(
        lambda r: pq.write_table(
            pa.table({"__index_level_0__": range(9, 21), "a": [0, 1] * 6, "label": ["cat", "dog"] * 6}), r / "t.parquet"
        ),
        TABLE_HELD,
    ),
    "underscores_in_numbers": Case(
        lambda r: csv(r / "t.csv", "a,b,label", [*animals(), "1,1_0,dog"]), Read(train=10, test=2, unreadable=1)
    ),
    "labels_in_another_case": Case(
        lambda r: [csv(r / "train.csv", "a,label", ["0,cat", "1,dog"]), csv(r / "test.csv", "a,label", ["0,Cat"])],
        "has class 'cat' in split train and 'Cat' in test",
    ),
    "semicolons": Case(lambda r: csv(r / "t.csv", "a;b;label", ["1;2;cat"] * 4), "no label column among a;b;label"),
    "latin_1": Case(
        lambda r: put(r, "t.csv", content="a,label\n0,\xe9\n1,b\n".encode("latin-1")),
        "that are not UTF-8, in label column",
    ),
    "ragged": Case(lambda r: csv(r / "t.csv", "a,b,label", ["1,2,cat", "1,cat"]), "cannot be read as a table"),
    "only_a_header": Case(lambda r: csv(r / "t.csv", "a,b,label", []), "has no rows"),
    "an_empty_file": Case(lambda r: put(r, "t.csv", content=b""), "cannot be read as a table"),
    "no_files": Case(lambda r: put(r, "readme.md"), "has no CSV or parquet files"),
    "two_label_columns": Case(lambda r: csv(r / "t.csv", "a,y,label", animals()), "labels in y or label: name one"),
    "the_label_is_named": Case(
        lambda r: csv(r / "t.csv", "a,y,label", animals()),
        TABLE_HELD,
        {"label_column": "label", "feature_columns": "a"},
    ),
    "no_label": Case(lambda r: csv(r / "t.csv", "a,b,kind", animals()), "no label column among a, b, kind: name it"),
    "a_column_twice": Case(
        lambda r: csv(r / "t.csv", "a,a,label", animals()), "has 2 columns 'a': expected different names"
    ),
    "the_label_twice": Case(
        lambda r: csv(r / "t.csv", "a,label,label", animals()), "has 2 columns 'label'", {"label_column": "label"}
    ),
    **{
        f"unusable_row_{number}": Case(
            lambda r, row=row: csv(r / "t.csv", "a,b,label", [row, *animals()]), Read(train=10, test=2, unreadable=1)
        )
        for number, row in enumerate(("1,,dog", "1,2,", "1,?,dog", "?,2,dog", "1,inf,dog", "1,1e300,dog", "1,nan,dog"))
    },
    "strict": Case(
        lambda r: csv(r / "t.csv", "a,b,label", [*animals(), "1,?,dog"]),
        r"t\.csv, row 12 has no finite number in column 'b' \(\?\) \(strict=true\)",
        {"strict": True},
    ),
    "unusable_row_of_the_second_file": Case(
        lambda r: [csv(r / f"part-{n}.csv", "a,b,label", animals(3) + ["1,,dog"] * n) for n in (0, 1)],
        r"part-1\.csv, row 6 has no finite number in column 'b'",
        {"strict": True},
    ),
    "unusable_row_of_a_client": Case(
        lambda r: csv(r / "t.csv", "a,who,label", [*animals(start="{a},Ann,"), ",Bob,dog"]),
        r"row 12 \(client Bob\) has no finite number in column 'a'",
        {"strict": True, "client_column": "who"},
    ),
    "no_usable_rows": Case(
        lambda r: csv(r / "t.csv", "a,b,label", ["1,,cat"] * 4),
        "none of 4 rows can be read",
        {"feature_columns": "a,b"},
    ),
    "columns_of_texts": Case(
        lambda r: csv(r / "t.csv", "a,b,label", animals()),
        "has text in column 'label': expected numbers",
        {"feature_columns": "a,label"},
    ),
    "spaces_around_labels": Case(lambda r: csv(r / "t.csv", "a,b,label", animals(end=" {name} ")), TABLE_HELD),
    "suffix_in_capitals": Case(lambda r: csv(r / "T.CSV", "a,b,label", animals()), TABLE_HELD),
    "quoted_line_ends": Case(lambda r: csv(r / "t.csv", "a,b,label", animals(start='{a},"x\ny",')), TABLE_HELD),
    "a_regression": Case(
        lambda r: csv(r / "t.csv", "a,b,target", ["0,1,0.25", "1,2,0.5"] * 4), "fractions in label column 'target'"
    ),
    "floats_as_labels": Case(lambda r: csv(r / "t.csv", "a,label", ["3,0.0", "4,1.0"] * 6), Read(("0", "1"), 10, 2)),
    "ten_before_two": Case(
        lambda r: csv(r / "t.csv", "a,label", ["6,10x", "5,2x"] * 6),
        "has the label '10x': expected one of 0, 1",
        {"class_names": "0,1"},
    ),
    "bools_as_labels": Case(
        lambda r: csv(r / "t.csv", "a,label", ["7,false", "8,true"] * 6), Read(("False", "True"), 10, 2)
    ),
    "negative_labels": Case(lambda r: csv(r / "t.csv", "a,label", ["1,-1", "2,1"] * 6), "has label -1 in column label"),
    "dates_as_labels": Case(
        lambda r: csv(r / "t.csv", "a,label", ["1,2020-01-01", "2,2021-01-01"] * 4),
        "values of type date32.* in label column",
    ),
    "other_columns_in_the_test_set": Case(
        lambda r: [csv(r / "train.csv", "a,b,label", animals()), csv(r / "test.csv", "a,c,label", animals())],
        "has no column 'b'",
    ),
    "two_tables": Case(
        lambda r: [csv(r / "users.csv", "a,b,label", animals()), csv(r / "items.csv", "a,b,label", animals())],
        r"has for train both .*items\.csv and .*users\.csv: name one",
    ),
    "csv_and_parquet": Case(
        lambda r: [
            csv(r / "train.csv", "a,b,label", animals()),
            pq.write_table(pa.table({"a": [0], "label": ["cat"]}), r / "train.parquet"),
        ],
        r"has for train both .*train\.csv and .*train\.parquet",
    ),
    "files_that_show_other_types": Case(
        lambda r: [csv(r / f"part-{n}.csv", "a,b,label", animals(3) + ["?,1,dog"] * n) for n in (0, 1)],
        Read(train=10, test=2, unreadable=1),
    ),
    "files_of_other_columns": Case(
        lambda r: [csv(r / f"part-{n}.csv", f"a,{'bc'[n]},label", animals(3)) for n in (0, 1)],
        "has column 'b' in some files only: expected the same columns in all",
    ),
    "numbered_shards": Case(lambda r: [csv(r / f"part-{n}.csv", "a,b,label", animals(3)) for n in (0, 1)], TABLE_HELD),
    "names_that_are_numbers_but_not_all": Case(
        lambda r: csv(r / "t.csv", "a,label", ["4,1", "5,2"] * 6),
        Read(("1", "2", "0"), 10, 2),
        {"class_names": "1,2,0"},
    ),
    "positions_of_named_classes": Case(
        lambda r: csv(r / "t.csv", "a,label", ["0,0", "1,1"] * 6), TABLE_HELD, {"class_names": "cat,dog"}
    ),
}
