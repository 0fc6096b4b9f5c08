"""`python -m benchmarks.plugins NAME [options]`: the benchmark of one plugin; --help after it lists options."""

import importlib
import sys
from pathlib import Path

from benchmarks.common import run_command


def main() -> None:
    folder = Path(__file__).parent
    names = sorted(path.stem for path in folder.glob("[!_]*.py") if "\ndef main(" in path.read_text())
    sys.argv[1:2] = [name.replace("-", "_") for name in sys.argv[1:2]]
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        raise SystemExit(f"error: expected one of {', '.join(names)}")
    run_command(importlib.import_module(f"benchmarks.plugins.{sys.argv.pop(1)}").main)


if __name__ == "__main__":
    main()
