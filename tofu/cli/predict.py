"""`tofu predict`: classify images with a run's model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tofu.cli.options import Json
from tofu.formatting import printable


def predict(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    images: Annotated[Path, typer.Argument(help="an image, or a folder of images")],
    frequencies: Annotated[
        int, typer.Option(help="spatial frequencies that a DCT-SNN keeps, 1 to 16; 0 keeps those of the run")
    ] = 0,
    json_: Json = False,
) -> None:
    """Classify images with a run's model; with the ood plugin, mark those unlike its training data."""
    from tofu.reporting.predict import predict_images

    rows = predict_images(run, images, frequencies=frequencies)
    if json_:
        print(json.dumps(rows))
        return
    width = max(len(str(row["image"])) for row in rows)
    for row in rows:
        verdict = "unknown" if row["unknown"] else f"class {row['class']}"
        score = "" if row["score"] is None else f"   score {row['score']:.4f}"
        print(f"{printable(str(row['image'])):<{width}}   {verdict:<10} {row['probability']:7.1%}{score}")
