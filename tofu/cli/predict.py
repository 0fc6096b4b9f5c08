"""`tofu predict`: classify images with a run's model."""

import csv
import json
import sys
from io import StringIO
from pathlib import Path
from typing import Annotated

import typer

from tofu.cli.options import Json
from tofu.errors import SettingError
from tofu.formatting import printable


def predict(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    images: Annotated[list[Path], typer.Argument(help="images, or folders of images")],
    frequencies: Annotated[
        int, typer.Option(help="spatial frequencies that a DCT-SNN keeps, 1 to 16; 0 keeps those of the run")
    ] = 0,
    output: Annotated[Path | None, typer.Option("--output", help="file for the predictions: .csv or .json")] = None,
    json_: Json = False,
) -> None:
    """Classify images with a run's model; with the ood plugin, mark out-of-distribution images.

    The accuracy is printed if the images are in folders with the names of the classes.
    """
    _check_output(output)
    from tofu.reporting.predict import accuracy, predict_images

    rows = predict_images(run, *images, frequencies=frequencies)
    if output is not None:
        _write(rows, output)
        print(f"predictions: {output}", file=sys.stderr)
    if json_:
        print(json.dumps(rows))
        return
    width = max(len(str(row["image"])) for row in rows)
    names = max(10, *(len(str(row["name"])) for row in rows))
    for row in rows:
        verdict = "unknown" if row["unknown"] else printable(str(row["name"]))
        score = "" if row["score"] is None else f"   score {row['score']:.4f}"
        print(f"{printable(str(row['image'])):<{width}}   {verdict:<{names}} {row['probability']:7.1%}{score}")
    right, known = accuracy(rows)
    if known:
        print(f"accuracy {right / known:.2%} ({right} of {known} images with a known label)", file=sys.stderr)


def _check_output(output: Path | None) -> None:
    """Raises SettingError before any work for a file that could not be written, or that ends otherwise."""
    if output is None:
        return
    if output.suffix.lower() not in (".csv", ".json"):
        raise SettingError("output", str(output), "a name that ends in .csv or .json")
    if not output.parent.is_dir() or output.is_dir():
        raise SettingError("output", str(output), "a file in an existing folder")


def _write(rows: list[dict[str, object]], output: Path) -> None:
    """Write the predictions. Raises SettingError if the file cannot be written."""
    text = StringIO(newline="")
    if output.suffix.lower() == ".csv":
        table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    else:
        json.dump(rows, text, indent=1)
    try:
        output.write_text(text.getvalue(), encoding="utf-8")
    except OSError as error:
        raise SettingError("output", str(output), f"a file that can be written ({error.strerror})") from error
