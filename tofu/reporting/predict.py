"""Classify images with the model that a run ended with, or with the ensemble of its client groups' models."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from tofu.data import ImageShape, to_float
from tofu.data.images import IMAGE_SUFFIXES, fit_image, read_image
from tofu.data.preprocessing import Preprocessing, normalize_inputs
from tofu.errors import DataError, SettingError
from tofu.formatting import printable
from tofu.models import initial_model
from tofu.models.spiking import FREQUENCIES, DctEncoder
from tofu.plugins import MAX_STATE_BYTES
from tofu.privacy.adaptive import plugins_of
from tofu.reference_model import ReferenceModel
from tofu.reporting.folder import read_class_names, read_model, read_preprocessing
from tofu.reporting.run_settings import read_config
from tofu.tasks import round_context
from tofu.weights import load_weights

_AT_A_TIME = 500
_NOTES = 5


@torch.no_grad()
def predict_images(run: Path, *images: Path, frequencies: int = 0) -> list[dict[str, object]]:
    """Classify images, and all images of folders in the order of their names.

    Args:
        frequencies: number of spatial frequencies that a spiking network's DCT encoder keeps, 1 to 16; 0 leaves it as
            it is.

    Returns:
        For each image: image (its path), class (its number), name (of the class), probability (of the class), label
        (name of the image's folder, or None if that is no class), score and unknown. The last two are None if the run
        has no plugin that detects out-of-distribution images.

    Raises:
        SettingError: no such run, or none with a model; frequencies for a model that has no DCT encoder.
        DataError: there is no image that the model can take. Others are left out, with a note on standard error.
    """
    settings = read_config(run, field="run")
    weights, shape, broadcast = read_model(run)
    plugins = plugins_of(settings)
    plugins.load(broadcast=broadcast, max_bytes=MAX_STATE_BYTES)
    preprocessing, statistics = read_preprocessing(run)
    models = []
    for group in range(plugins.groups):
        context = round_context(settings, shape, settings.training.rounds, group=group)
        built = initial_model(settings.model, shape, settings.run.seed)
        normalize_inputs(built, statistics)
        model = ReferenceModel.of(built, shape, plugins, context).model
        load_weights(model, read_model(run, group=group)[0] if group else weights)
        if frequencies:
            _keep_frequencies(model, frequencies)
        models.append(model.eval())
    names = read_class_names(run, shape.classes)
    files, pixels = _read_all(images, shape, preprocessing)
    rows: list[dict[str, object]] = []
    for start in range(0, len(files), _AT_A_TIME):
        prediction = plugins.predict_groups(models, to_float(pixels[start : start + _AT_A_TIME]))
        best = prediction.logits.softmax(1).max(1)
        for at, file in enumerate(files[start : start + _AT_A_TIME]):
            rows.append(
                {
                    "image": str(file),
                    "class": int(best.indices[at]),
                    "name": names[int(best.indices[at])],
                    "probability": float(best.values[at]),
                    "label": file.parent.name if file.parent.name in names else None,
                    "score": None if prediction.score is None else float(prediction.score[at]),
                    "unknown": None if prediction.unknown is None else bool(prediction.unknown[at]),
                }
            )
    return rows


def accuracy(rows: Sequence[Mapping[str, object]]) -> tuple[int, int]:
    """Return the number of correct predictions, and of images whose label is known."""
    known = [row for row in rows if row["label"] is not None]
    return sum(row["name"] == row["label"] and not row["unknown"] for row in known), len(known)


def _keep_frequencies(model: nn.Module, frequencies: int) -> None:
    encoders = [module for module in model.modules() if isinstance(module, DctEncoder)]
    if not encoders:
        raise SettingError("frequencies", frequencies, "a run whose model has a DCT encoder, such as dct-snn-small")
    if not 1 <= frequencies <= FREQUENCIES:
        raise SettingError("frequencies", frequencies, f"1 to {FREQUENCIES}")
    encoders[0].frequencies = frequencies


def _files(images: Path) -> list[Path]:
    if not images.exists():
        raise DataError(f"{images} does not exist")
    found = [images] if images.is_file() else sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise DataError(f"{images} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def _wrong_size(found: Sequence[int], shape: ImageShape) -> str:
    """Return the error of an image that has another size than those of the run, and what to do about it."""
    size = f"{shape.height}x{shape.width}"
    way = f"train with --resize {size}, and predict resizes images as the run did"
    return f"has {found[0]}x{found[1]} pixels, expected {size} (height x width): {way}"


def _read_all(
    images: Sequence[Path], shape: ImageShape, preprocessing: Preprocessing
) -> tuple[list[Path], torch.Tensor]:
    """Return the files that the model can take, read exactly as in training, and their pixels:
    uint8 [n, channels, h, w].
    """
    files, pixels, left_out = [], [], []
    for file in (file for entry in images for file in _files(entry)):
        try:
            image = preprocessing(read_image(file))
            if image.shape[:2] != (shape.height, shape.width):
                raise DataError(_wrong_size(image.shape[:2], shape))
            pixels.append(torch.from_numpy(fit_image(image, shape).copy()))
            files.append(file)
        except DataError as error:
            left_out.append(f"{printable(str(file))} {error}")
    if not files:
        raise DataError(left_out[0])
    for reason in left_out[:_NOTES]:
        print(f"note: {reason}; it is left out", file=sys.stderr)
    if (more := len(left_out) - _NOTES) > 0:
        print(f"note: {more} more images are left out", file=sys.stderr)
    return files, torch.stack(pixels)
