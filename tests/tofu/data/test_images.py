"""The image reader: every mode and bit depth, upright, and the same in training and prediction."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.app import app as client_app
from server.app import serve_in_process
from tofu.data import FederatedData, ImageShape, LabeledImages, local_folder, open_data
from tofu.data.images import fit_image, read_image, to_8_bits
from tofu.errors import DataError
from tofu.reporting.folder import read_preprocessing
from tofu.reporting.predict import _read_all
from tofu.rounds.record import RoundRecord, read_rounds
from tofu.settings import Settings
from tofu.settings.groups import DataSettings


def folder_of(root: Path, *images: np.ndarray) -> LabeledImages:
    """Write the images as PNG files of one class, and read them as a client does."""
    (root / "a").mkdir()
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(root / "a" / f"{number}.png")
    return local_folder(str(root))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_color_images_have_three_channels(tmp_path: Path, mode: str) -> None:
    (tmp_path / "a").mkdir()
    red_left = np.zeros((4, 6, 3), np.uint8)
    red_left[:, :3, 0] = 255
    Image.fromarray(red_left).convert(mode).save(tmp_path / "a" / "0.tif")
    Image.fromarray(np.full((4, 6), 9, np.uint8)).save(tmp_path / "a" / "1.png")
    data = local_folder(str(tmp_path))
    assert data.shape == ImageShape(3, 4, 6, 1)
    assert data.images[0, :, 0, [0, 5]].tolist() == [[255, 0], [0, 0], [0, 0]]
    assert set(data.images[1].flatten().tolist()) == {9}


def test_gray_images_keep_one_channel_and_16_bits_become_8(tmp_path: Path) -> None:
    images = (np.full((4, 4), 7, np.uint8), np.full((4, 4), 0x1234, np.uint16), np.full((4, 4), True))
    assert folder_of(tmp_path, *images).images[:, 0, 0, 0].tolist() == [7, 0x12, 255]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(("bits", "shift"), [(16, 8), (12, 4)])
def test_12_and_16_bit_values_use_the_whole_gray_scale(tmp_path: Path, suffix: str, bits: int, shift: int) -> None:
    ramp = np.linspace(0, 2**bits - 1, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / f"ramp{suffix}")
    pixels = to_8_bits(read_image(tmp_path / f"ramp{suffix}"))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, ramp >> shift)
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize(
    ("given", "values", "expected"),
    [
        (0, (4000, 60_000), [15, 234]),
        (0, (100, 4000), [6, 250]),
        (8, (100, 4000), [100, 255]),
        (16, (100, 4000), [0, 15]),
        (12, (4000, 60_000), [250, 255]),
    ],
)
def test_16_bit_gray_images_of_a_dataset_have_equally_many_bits(
    tmp_path: Path, given: int, values: tuple[int, int], expected: list[int]
) -> None:
    """The first image is dark: by itself, one could not say how many bits it has."""
    (tmp_path / "a").mkdir()
    for number, value in enumerate(values):
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / "a" / f"{number}.png")
    data = local_folder(str(tmp_path), DataSettings(gray_bits=given))
    assert data.images[:, 0, 0, 0].tolist() == expected


def test_simulated_clients_and_predict_use_the_bits_of_the_dataset(tmp_path: Path) -> None:
    """Client data, test data and the run's model.json agree, whichever of the images are dark."""
    photos, run = tmp_path / "photos", tmp_path / "run"
    for name, top in (("dark", 4000), ("light", 60_000)):
        (photos / name).mkdir(parents=True)
        for number in range(10):
            values = np.random.default_rng(number).integers(0, top, (8, 8)).astype(np.uint16)
            Image.fromarray(values).save(photos / name / f"{number}.png")
    settings = Settings.of(
        {"dataset": str(photos), "clients": 2, "rounds": 1, "schedule": "fedavg", "partition": "shards",
         "run-folder": str(run), "model": "mlp"}
    )  # fmt: skip
    serve_in_process(client_app, settings)
    data = FederatedData.of(settings.data, settings.run.seed)
    assert data.gray_bits == 16
    assert read_preprocessing(run)[0].gray_bits == 16
    assert json.loads((run / "data.json").read_text())["gray_bits"] == 16
    for images in (data.client(0), data.client(1), data.test()):
        assert int(images.images[images.labels == 0].max()) < 16
    _, pixels = _read_all([photos / "dark"], data.shape, read_preprocessing(run)[0])
    assert int(pixels.max()) < 16


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    """EXIF 2.32, table 8: where row 0 and column 0 of the stored image belong in the upright image."""
    upright = np.arange(24, dtype=np.uint8).reshape(4, 6)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(tmp_path / "0.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "0.png"), upright)


def test_damaged_exif_leaves_the_image_readable(tmp_path: Path) -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=b"Exif\0\0no TIFF header")
    assert np.array_equal(read_image(tmp_path / "0.png"), pixels)


def test_a_color_image_among_gray_ones_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1\.png is in color"):
        folder_of(tmp_path, np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8))


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(tmp_path / "0.png")
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:2000])
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_image(tmp_path / "0.png")


def test_a_gray_image_fills_the_channels_of_a_color_shape() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(fit_image(pixels, ImageShape(3, 3, 4, 2)), np.stack([pixels] * 3))
    with pytest.raises(DataError, match="expected 4x3"):
        fit_image(pixels, ImageShape(1, 4, 3, 2))


def noise_folder(root: Path, classes: int = 2, images: int = 10) -> Path:
    draw = np.random.default_rng(0)
    for name in map(str, range(classes)):
        (root / name).mkdir(parents=True)
        for number in range(images):
            pixels = draw.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}{number}.png")
    return root


def small_run(data: Path, run: Path, **settings: Any) -> tuple[dict[str, Any], list[RoundRecord]]:
    """The summary and the rounds of a run of two clients on a folder."""
    chosen = {"dataset": str(data), "run_folder": str(run), "clients": 2, "partition": "iid", "rounds": 1}
    summary = serve_in_process(client_app, Settings.of(chosen | {"schedule": "fedavg"} | settings))
    return summary, list(read_rounds(run / "metrics.jsonl"))


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_a_corrupt_image_is_left_out_counted_and_named_and_its_client_stays(
    damage: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = noise_folder(tmp_path / "data")
    file = data / "1" / "13.png"
    file.write_bytes(file.read_bytes()[:60] if damage is None else damage)
    with caplog.at_level("WARNING", logger="tofu.data"):
        summary, rounds = small_run(data, tmp_path / "run")
    assert f"{file} cannot be read as an image" in caplog.text
    assert summary["unreadable"] == 1
    assert [client.examples for client in rounds[1].by_client] in ([7, 8], [8, 7])  # 4 of 20 are held out
    assert not rounds[1].failures
    with pytest.raises(DataError, match=r"13\.png cannot be read .*strict=true"):
        local_folder(str(data), DataSettings(strict=True))
    with pytest.raises(DataError, match=r"13\.png cannot be read .*strict=true"):
        small_run(data, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_corrupt_first_image_does_not_decide_the_shape_and_only_corrupt_images_are_refused(tmp_path: Path) -> None:
    data = noise_folder(tmp_path / "data")
    (data / "0" / "00.png").write_bytes(b"")
    assert len(local_folder(str(data))) == 19
    for file in data.glob("*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of 20 images can be read"):
        local_folder(str(data))


def test_an_image_of_another_size_costs_no_client_but_ends_the_run_before_round_1(tmp_path: Path) -> None:
    data = noise_folder(tmp_path / "data")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(data / "1" / "13.png")
    with pytest.raises(DataError) as refused:
        small_run(data, tmp_path / "run")
    assert str(refused.value) == (
        f"{data / '1' / '13.png'} has 9x8 pixels, the first image 8x8 (height x width): of 20 images 19 have 8x8, "
        "1 has 9x8; --resize 8x8 (in Python resize='8x8') gives all images one size"
    )
    assert not (tmp_path / "run").exists()
    summary, rounds = small_run(data, tmp_path / "run", resize="8x8")
    assert len(rounds[1].by_client) == 2
    assert summary["unreadable"] == 0


def test_a_client_without_a_readable_image_is_a_failure_of_the_round(tmp_path: Path) -> None:
    data = noise_folder(tmp_path / "data")
    settings = Settings.of({"dataset": str(data), "clients": 2, "partition": "iid"})
    split = FederatedData.of(settings.data, settings.run.seed)
    for row in split._client_rows[1].tolist():
        Path(split._train.origin(row)).write_bytes(b"")
    _, rounds = small_run(data, tmp_path / "run")
    assert len(rounds[1].by_client) == 1
    assert ["none of" in failure.reason for failure in rounds[1].failures] == [True]


def test_the_commonest_size_is_suggested_and_not_that_of_the_first_image(tmp_path: Path) -> None:
    data = noise_folder(tmp_path)
    for number, size in enumerate([(12, 10), (12, 10), (7, 7), (6, 6), (5, 5)]):
        Image.fromarray(np.zeros(size, np.uint8)).save(data / "0" / f"0{number}.png")
    counts = r"of 20 images 15 have 8x8, 2 have 12x10, 1 has \dx\d, 2 have other sizes; --resize 8x8 "
    with pytest.raises(DataError, match=rf"0[2-9]\.png has \dx\d pixels, the first image 12x10 .*: {counts}"):
        local_folder(str(data))
    with pytest.raises(DataError, match=counts):
        open_data(str(data), clients=2, partition="iid", seed=0).client(0)
