"""Prediction reads images exactly as training does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tofu.data import ImageShape, local_folder
from tofu.data.preprocessing import Preprocessing
from tofu.errors import DataError
from tofu.reporting.predict import _read_all


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_gray_image_of_any_depth_is_read_as_in_training(tmp_path: Path, bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (4, 6)).astype(np.uint8 if bits == 8 else np.uint16)
    values[0, 0] = 2**bits - 1
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    Image.fromarray(values).save(tmp_path / "a" / "0.png", exif=exif)
    trained_on = local_folder(str(tmp_path)).images[0]
    assert trained_on.shape == (1, 6, 4)
    assert len(trained_on.unique()) > 10
    files, pixels = _read_all([tmp_path / "a"], ImageShape(1, 6, 4, 1), Preprocessing())
    assert [file.name for file in files] == ["0.png"]
    assert torch.equal(pixels[0], trained_on)


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "0.png")
    with pytest.raises(DataError, match=r"0\.png has 4x6 pixels, expected 8x8 .*: train with --resize 8x8"):
        _read_all([tmp_path], ImageShape(1, 8, 8, 10), Preprocessing())
