"""`python -m benchmarks.plugins NAME [options]`: the benchmark of one plugin; --help after it lists options."""

import importlib
import pkgutil
import sys

import benchmarks.plugins


def main() -> None:
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.plugins.__path__))
    names.remove("__main__")
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        raise SystemExit(f"error: expected one of {', '.join(names)}")
    importlib.import_module(f"benchmarks.plugins.{sys.argv.pop(1)}").main()


if __name__ == "__main__":
    main()
