"""What every benchmark needs: where the data is, how results are kept, how a table is printed."""

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import typer

from tofu.files import replace_file

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("tofu-fl", "flwr", "torch", "torchvision", "numpy")


def find_data(name: str, hub: str) -> str:
    """A local copy of a dataset if there is one ($TOFU_SHARED_DATA/NAME), else its hub id."""
    base = os.environ.get("TOFU_SHARED_DATA")
    return str(Path(base) / name) if base and (Path(base) / name).is_dir() else hub


def hide_broken_torchaudio() -> None:
    """Hide a torchaudio that does not load (built for CUDA, with a torch that is not) from `transformers`."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = None  # type: ignore[assignment]


def run_command(main: Callable[..., None]) -> None:
    """Run a benchmark's function as a command, its parameters as options; an error prints Python's plain traceback."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()


def command_line(benchmark: str) -> str:
    """The command of this process; of an absolute path, which only this machine has, the last part remains."""
    arguments = (f"FOLDER/{Path(part).name}" if Path(part).is_absolute() else part for part in sys.argv[1:])
    return f"python -m benchmarks.{benchmark} {shlex.join(arguments)}".rstrip()


def versions(command: str) -> dict[str, object]:
    """Where results come from: the command, the versions of what it used, the machine."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "command": command,
        "versions": {package: version(package) for package in _PACKAGES} | {"python": platform.python_version()},
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        **gpu,
    }


def write_results(
    name: str, *, settings: Mapping[str, object], rows: Sequence[Mapping[str, object]], script: str = ""
) -> Path:
    """Write benchmarks/results/NAME.json: the command, versions, settings (with seeds) and rows."""
    path = RESULTS / f"{name}.json"
    document = versions(command_line(script or name)) | {
        "settings": dict(settings),
        "rows": [dict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    replace_file(path, (json.dumps(document, indent=1) + "\n").encode())
    return path


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as Markdown."""
    print(markdown_table(header, rows))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown, in columns of equal width."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(lines)


def several(kind: Callable[[str], Any] = str, accepted: Collection[str] = (), help: str = "") -> Any:
    """An option with several values, separated by commas."""

    def values(text: str) -> list[Any]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if wrong := [part for part in parts if accepted and part not in accepted]:
            raise typer.BadParameter(f"{wrong[0]} is not one of {', '.join(accepted)}")
        return [kind(part) for part in parts]

    return typer.Option(parser=values, metavar="A,B,...", help=help or None)


def joined(values: Iterable[object]) -> str:
    """The default of an option with several values."""
    return ",".join(map(str, values))
