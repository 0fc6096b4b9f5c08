"""Draw a client's most memorized images from the scores that the plugin `curvature` has saved on its machine.

    TOFU_CURVATURE_FOLDER=scores tofu run --plugins curvature --run-folder runs/a
    python -m client.plugins.contact_sheet scores/curvature-0.scores runs/a --output sheet.png

The second argument is the data that the client trained on: a folder of images, or a run folder, of which the simulated
client in the name of the file is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click
import torch
import typer
from PIL import Image, ImageDraw
from torch import Tensor

from client.plugins.curvature import SCORES, data_digest
from tofu.data import FederatedData, LabeledImages, local_folder
from tofu.errors import DataError, TofuError
from tofu.plugins import MAX_STATE_BYTES, state_from_bytes
from tofu.settings.fields import names_of

_CAPTION = 12  # pixels below an image


@dataclass(frozen=True)
class MemorizedImages:
    """The highest mean scores, in descending order.

    Attributes:
        rows: int64 [n], rows of the client's images.
        scores: float64 [n].
    """

    rows: Tensor
    scores: Tensor


def most_memorized(file: Path, data: LabeledImages, count: int, score: str = "curvature") -> MemorizedImages:
    """Read saved scores and return the `count` highest.

    Raises:
        DataError: the file cannot be read, is not one of scores, or belongs to other images.
    """
    try:
        state = state_from_bytes(file.read_bytes(), max_bytes=MAX_STATE_BYTES)
    except (OSError, TofuError) as error:
        raise DataError(f"{file} cannot be read as scores: {error}") from error
    rows, total, scorings = state.get("rows"), state.get(score), state.get("count")
    if not isinstance(rows, Tensor) or not isinstance(total, Tensor) or not isinstance(scorings, int):
        raise DataError(f"{file} holds no scores named {score}")
    if state.get("digest") != data_digest(data):
        raise DataError(f"{file} has scores of other images than these {len(data)}")
    mean = total / max(1, scorings)
    top = mean.argsort(descending=True, stable=True)[:count]
    return MemorizedImages(rows[top], mean[top])


def contact_sheet(data: LabeledImages, found: MemorizedImages, *, columns: int = 8, pixels: int = 64) -> Image.Image:
    """Return a sheet of images in reading order, each with its label and score below it.

    Args:
        columns: images in a row.
        pixels: height of an image; small images are enlarged without smoothing.
    """
    lines = -(-len(found.rows) // columns)
    width = max(pixels, round(pixels * data.shape.width / data.shape.height))
    sheet = Image.new("RGB", (columns * width, max(1, lines) * (pixels + _CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, score) in enumerate(zip(found.rows.tolist(), found.scores.tolist(), strict=True)):
        x, y = i % columns * width, i // columns * (pixels + _CAPTION)
        picture = data.images[row].permute(1, 2, 0).expand(-1, -1, 3) if data.shape.channels == 1 else (
            data.images[row].permute(1, 2, 0))  # fmt: skip
        image = Image.fromarray(picture.contiguous().numpy()).resize((width, pixels), Image.Resampling.NEAREST)
        sheet.paste(image, (x, y))
        draw.text((x + 2, y + pixels), f"{int(data.labels[row])}: {score:.2g}", fill="black")
    return sheet


def client_images(file: Path, data: Path, class_names: Sequence[str] = ()) -> LabeledImages:
    """Return the images that the scores belong to: those of a folder, or of the simulated client of a run.

    Raises:
        DataError: they cannot be read.
    """
    if not (data / "config.json").is_file():
        return local_folder(str(data), class_names=class_names)
    from tofu.reporting.run_settings import read_config

    client = file.stem.removeprefix("curvature-")
    if not client.isdigit():
        raise DataError(f"{file} is not named curvature-CLIENT.scores after a simulated client")
    return FederatedData.of(read_config(data).data, read_config(data).run.seed).client(int(client))


def main(
    scores: Annotated[Path, typer.Argument(help="a file in the folder that TOFU_CURVATURE_FOLDER named")],
    data: Annotated[Path, typer.Argument(help="the client's folder of images, or a run folder")],
    class_names: Annotated[str, typer.Option(help="the run's class-names, for a folder of images")] = "",
    score: Annotated[str, typer.Option(click_type=click.Choice(SCORES))] = "curvature",
    count: Annotated[int, typer.Option(min=1, help="number of images")] = 40,
    columns: Annotated[int, typer.Option(min=1)] = 8,
    output: Path = Path("memorized.png"),
) -> None:
    """Draw the images with the highest scores."""
    try:
        images = client_images(scores, data, names_of(class_names))
        found = most_memorized(scores, images, count, score)
        contact_sheet(images, found, columns=columns).save(output)
    except (TofuError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{len(found.rows)} images: {output}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
