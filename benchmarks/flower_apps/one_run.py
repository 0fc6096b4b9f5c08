"""One run of one app in a process of its own: python -m benchmarks.flower_apps.one_run (called by __main__)."""

import importlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.flower_apps.apps import APPS, MAX_CHANGED_LINES, App, changed
from benchmarks.flower_apps.local_hub import (
    keep_old_names,
    save_reviews,
    serve_datasets,
    serve_transformers,
    serve_vision_transformer,
    switch_off_services,
)


def run(
    name: str, variant: str, seed: int, *, examples: str, data: str, cache: str, options: str = ""
) -> dict[str, Any]:
    """Run an app once.

    Args:
        variant: plain, compress, sparse or secure.
        examples: folder with Flower's examples.
        data: see `serve_datasets`.
        cache: folder for what is converted or built once.
        options: more arguments of `tofu.compress` and `tofu.Compressed`, as Python source.

    Returns:
        The row of the results.
    """
    app = APPS[name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / name
        shutil.copytree(Path(examples) / name, copy)
        lines = changed(copy, app.edits(variant, options))
        if lines > MAX_CHANGED_LINES:
            raise ValueError(f"{name} has {lines} changed lines, expected at most {MAX_CHANGED_LINES}")
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        _prepare(app, Path(data), Path(cache), seed)
        started = time.perf_counter()
        row = {"app": name, "variant": variant, "options": options, "seed": seed, "changed_lines": lines}
        row |= _measured(app, copy)
        os.chdir("/")
        return row | {"seconds": round(time.perf_counter() - started, 1)}


def _prepare(app: App, data: Path, cache: Path, seed: int) -> None:
    import torch

    import tofu.models.torchvision_compat  # noqa: F401  (before the app imports torchvision)

    keep_old_names()
    switch_off_services()
    serve_datasets(data, cache / "imdb", app.examples, app.test)
    if app.package == "huggingface_example":
        save_reviews(cache / "imdb")
        serve_transformers(cache / "bert-tiny", cache / "imdb" / "train.parquet", app.examples)
    if app.package == "vitexample":
        serve_vision_transformer()
    if app.package == "mlxexample":
        importlib.import_module("mlx.core").random.seed(seed)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _measured(app: App, folder: Path) -> dict[str, Any]:
    """The final metric, and the bytes of all train replies of the clients."""
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import Result

    from tofu.flower.in_process import run_in_process
    from tofu.flower.internals import message_bytes

    results: list[Result] = []
    replies: list[int] = []
    errors: list[str] = []
    make, answer = Result.__init__, ClientApp.__call__

    def keep(self: Result, *args: Any, **options: Any) -> None:
        results.append(self)
        make(self, *args, **options)

    def weigh(self: ClientApp, message: Any, context: Any) -> Any:
        try:
            reply = answer(self, message, context)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            raise
        if reply.has_error():
            errors.append(reply.error.reason or "no reason")
        elif message.metadata.message_type.split(".")[0] == "train":
            replies.append(message_bytes(reply))
        return reply

    Result.__init__, ClientApp.__call__ = keep, weigh  # type: ignore[method-assign]
    tool = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    server, client = (
        getattr(importlib.import_module(module), attribute)
        for module, attribute in (tool["components"][f"{end}app"].split(":") for end in ("server", "client"))
    )
    config = tool.get("config", {}) | app.config
    run_in_process(server, client, run_config=config, num_supernodes=app.clients, workers=1)
    result = results[-1]
    evaluated = result.evaluate_metrics_serverapp or result.evaluate_metrics_clientapp
    if not evaluated:
        raise ValueError(f"the app evaluated nothing ({'; '.join(sorted(set(errors)))})")
    curve = [round(value, 5) for value in _values(evaluated, app.metric)]
    ratios = _values(result.train_metrics_clientapp, "tofu-ratio")
    explained = [round(value, 3) for value in _values(result.train_metrics_clientapp, "tofu-explained-variance")]
    return {
        "metric": app.metric, "final": curve[-1], "curve": curve, "rounds": len(result.train_metrics_clientapp),
        "uplink_bytes": sum(replies), "replies": len(replies), "errors": sorted(set(errors)),
        "payload_ratio": round(statistics.fmean(ratios), 2) if ratios else None, "explained_variance": explained,
    }  # fmt: skip


def _values(rounds: Mapping[int, Mapping[str, Any]], name: str) -> list[float]:
    """A metric in the order of the rounds."""
    return [float(metrics[name]) for _, metrics in sorted(rounds.items()) if name in metrics]


if __name__ == "__main__":
    print("\n" + json.dumps(run(**json.loads(sys.argv[1]))))
