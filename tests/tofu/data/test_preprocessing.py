"""Size, normalization and augmentation of images: in training, evaluation and prediction alike."""

import copy
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import nn
from torch.func import functional_call

from client.app import app as client_app
from client.local_round import client_data
from server.app import serve_in_process
from tofu.data import FederatedData, local_folder, open_data, to_float
from tofu.data.preprocessing import (
    AUGMENTATIONS,
    IMAGENET,
    PLAIN,
    Preprocessing,
    augment,
    normalize_inputs,
    parse_normalization,
)
from tofu.errors import DataError, SettingError
from tofu.models.torchvision_compat import torchvision  # noqa: F401
from tofu.observers.base import Observer
from tofu.reporting.predict import accuracy, predict_images
from tofu.rounds.record import RoundRecord
from tofu.settings import Settings
from tofu.settings.groups import DataSettings

Row = dict[str, Any]
TINY: Row = {
    "clients": 2, "rounds": 2, "local_epochs": 1, "batch_size": 8, "ratio": 10.0, "max_evals": 3, "ema_decay": 0.0,
    "partition": "iid",
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of two classes, bright left and bright right, each of a size of its own."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for number in range(count):
            height, width = random.integers(16, 40, 2)
            pixels = random.integers(0, 120, (height, width, 3)).astype(np.uint8)
            half = slice(0, width // 2) if number % 2 else slice(width // 2, width)
            pixels[:, half, : 1 + number % 3] += 120
            folder = root / split / ("left" if number % 2 else "right")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("resize", "crop", "found"),
    [("", "", (20, 30)), ("8x12", "", (8, 12)), ("10", "", (10, 15)), ("10", "8", (8, 8)), ("", "6x4", (6, 4))],
)
@pytest.mark.parametrize("color", [False, True])
def test_sizes(resize: str, crop: str, found: tuple[int, int], color: bool) -> None:
    pixels = np.zeros((20, 30, 3) if color else (20, 30), np.uint8)
    pixels[:, 15:] = 200
    result = Preprocessing(resize, crop)(pixels)
    assert result.dtype == np.uint8
    assert result.shape == found + (3,) * color
    assert result[:, 0].max() == 0
    assert result[:, -1].min() == 200


def test_statistics_are_parsed() -> None:
    assert parse_normalization("-1to1") == PLAIN
    assert parse_normalization("imagenet") == IMAGENET
    assert parse_normalization("0.5,0.25,0/0.2,0.3,1") == ((0.5, 0.25, 0.0), (0.2, 0.3, 1.0))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        *(({"resize": text}, "resize") for text in ("32x", "0x3", "axb", "3x4x5", "12345")),
        ({"center_crop": "-1"}, "center_crop"),
        *(({"gray_bits": bits}, "gray_bits") for bits in (-1, 7, 17)),
        ({"gray_bits": 12, "dataset": "wine"}, "gray_bits"),
        *(({"normalization": text}, "normalization") for text in ("none", "0.5", "1,2/3", "0.5/0", "nan/1", "2/1")),
        ({"augmentation": "flip,rotate"}, "augmentation"),
        ({"augmentation": "flip", "tasks": "pixels"}, "augmentation"),
        ({"augmentation": "flip", "record_clients": "0"}, "record_clients"),
        ({"normalization": "0.2/0.3", "record_clients": "0"}, "record_clients"),
        ({"resize": "8x8", "dataset": "wine"}, "resize"),
    ],
)
def test_what_cannot_be_used_is_refused(settings: Row, field: str) -> None:
    with pytest.raises(SettingError) as error:
        Settings.of(settings)
    assert error.value.field == field


def test_an_unknown_augmentation_gets_the_names() -> None:
    with pytest.raises(SettingError, match="augmentation='rotate' is not usable: expected names from flip, crop"):
        Settings.of({"augmentation": "flip,rotate"})


@pytest.mark.parametrize("statistics", [IMAGENET, ((0.1,), (0.3,))])
def test_a_model_normalizes_as_torchvision_does(statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    from torchvision.transforms import v2

    images = torch.randint(256, (5, len(statistics[0]), 4, 4), dtype=torch.uint8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 3))
    expected = model(v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*statistics)])(images))
    names = list(model.state_dict())
    normalize_inputs(model, PLAIN)
    assert not model._forward_pre_hooks
    normalize_inputs(model, statistics)
    assert list(model.state_dict()) == names
    for found in (
        model(to_float(images)),
        copy.deepcopy(model)(to_float(images)),
        functional_call(model, dict(model.named_parameters()), (to_float(images),)),
    ):
        assert torch.allclose(found, expected, atol=1e-5)


def test_augmentations_draw_from_the_given_generator_alone() -> None:
    images = torch.randint(1, 256, (40, 3, 16, 8), dtype=torch.uint8)
    state = torch.get_rng_state()
    for name in AUGMENTATIONS:
        first, second = (augment(images, [name], torch.Generator().manual_seed(seed)) for seed in (1, 2))
        assert torch.equal(first, augment(images, [name], torch.Generator().manual_seed(1)))
        assert not torch.equal(first, second)
        assert first.shape == images.shape
        assert first.dtype == images.dtype
    flipped = augment(images, ["flip"], torch.Generator().manual_seed(0))
    same = [torch.equal(found, image) for found, image in zip(flipped, images, strict=True)]
    assert {
        torch.equal(found, image.flip(2)) for found, image, kept in zip(flipped, images, same, strict=True) if not kept
    } == {True}
    assert 5 < sum(same) < 35
    cropped = augment(images, ["crop"], torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1, 1, 2, 2))
    windows = {
        tuple(w.flatten().tolist())
        for image in padded
        for w in (image[:, y : y + 16, x : x + 8] for y in range(5) for x in range(3))
    }
    shown = {tuple(image.flatten().tolist()) for image in cropped}
    assert shown <= windows
    assert len(shown - {tuple(image.flatten().tolist()) for image in images}) > 20
    assert torch.equal(torch.get_rng_state(), state)


def test_images_of_several_sizes_need_a_resize(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has \d+x\d+ pixels, the first image .*; --resize \d+x\d+ \("):
        local_folder(str(photos))
    assert local_folder(str(photos), DataSettings(resize="16x12")).images.shape == (24, 3, 16, 12)
    cells = []
    for path in sorted((photos / "train").rglob("*.png")):
        buffer = io.BytesIO()
        Image.open(path).save(buffer, "png")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    labels = [0] * 12 + [1] * 12
    parquet.write_table(pyarrow.table({"image": cells, "label": labels}), tmp_path / "train.parquet")
    table = open_data(str(tmp_path), clients=1, partition="iid", resize="16x12", seed=0)
    folder = open_data(str(photos), clients=1, partition="iid", resize="16x12", seed=0)
    held, all_ = table.test().images, folder.client(0).images
    assert held.shape[1:] == (3, 16, 12)
    assert all(any(torch.equal(image, other) for other in all_) for image in held)


def test_statistics_of_the_dataset(photos: Path) -> None:
    settings = Settings.of(TINY | {"dataset": str(photos), "resize": "16x16", "normalization": "dataset"})
    data = FederatedData.of(settings.data, 0)
    pixels = torch.cat([data.client(number).images for number in range(2)]).numpy() / 255
    mean, std = data.statistics
    assert mean == pytest.approx(pixels.mean((0, 2, 3)))
    assert std == pytest.approx(pixels.std((0, 2, 3)), rel=1e-3)
    own: Any = SimpleNamespace(node_config={"data": str(photos)}, state={})
    with pytest.raises(DataError, match="MEAN/STD"):
        client_data(settings.replace(class_names="left,right"), own)


def test_a_run_is_evaluated_resumed_and_predicts_with_one_preprocessing(photos: Path, tmp_path: Path) -> None:
    own = TINY | {
        "dataset": str(photos), "resize": "20", "center_crop": "16", "normalization": "imagenet",
        "augmentation": "flip,crop", "model": "cnn", "lr": 0.05,
    }  # fmt: skip

    class Kill(Observer):
        def on_round_end(self, record: RoundRecord) -> None:
            raise KeyboardInterrupt

    whole = serve_in_process(client_app, Settings.of(own | {"run_folder": str(tmp_path / "whole")}))
    with pytest.raises(KeyboardInterrupt):
        serve_in_process(client_app, Settings.of(own | {"run_folder": str(tmp_path / "run")}), Kill())
    resumed = serve_in_process(client_app, Settings.of(own | {"resume": str(tmp_path / "run"), "workers": 1}))
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    plain = serve_in_process(client_app, Settings.of(own | {"run_folder": str(tmp_path / "plain"), "augmentation": ""}))
    assert plain["weights_sha256"] != whole["weights_sha256"]
    run = tmp_path / "run"
    stored = json.loads((run / "model.json").read_text())
    assert stored["preprocessing"] == {
        "resize": "20",
        "center_crop": "16",
        "gray_bits": 0,
        "mean": list(IMAGENET[0]),
        "std": list(IMAGENET[1]),
    }
    rows = predict_images(run, photos / "test")
    right, known = accuracy(rows)
    assert known == 8
    assert right / known == pytest.approx(resumed["final_accuracy"])
    stored["preprocessing"]["mean"] = [0.0, 0.0, 0.0]
    (run / "model.json").write_text(json.dumps(stored))
    others = predict_images(run, photos / "test")
    assert [row["probability"] for row in others] != [row["probability"] for row in rows]
