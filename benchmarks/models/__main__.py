"""One update of each kind of model: bytes, explained variance early and late in training, time to encode.

    python -m benchmarks.models --data DATA

DATA has the folders mnist and cifar10, each with train.parquet and test.parquet. Each kind of message is decoded, too,
and compared with what its encoder predicts. The sparse correction alone has the same bytes. Rows are written at once,
so an interrupted benchmark continues with the same command.
"""

import copy
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import tofu
from benchmarks.common import (
    RESULTS,
    hide_broken_torchaudio,
    joined,
    print_table,
    run_command,
    several,
    spread,
    versions,
)
from benchmarks.models.kinds import KINDS, train
from tofu.files import replace_file
from tofu.weights import Weights, difference, explained_variance, layout_of, weights_of

STAGES = {"early": 0, "late": 6}
"""Epochs of training on other data of the same kind, before the local epoch whose update is encoded."""

Row = dict[str, Any]


def measure(name: str, stage: str, seed: int, ratio: float, data: Path) -> Row:
    """Train one local epoch from a stage of training, encode its update both ways, and decode it."""
    kind = KINDS[name]
    model = kind.build(seed)
    if STAGES[stage]:
        train(model, kind.data(data, 100 + seed, kind.examples), kind.lr, STAGES[stage], seed)
    own = kind.data(data, 200 + seed, kind.examples)
    base = copy.deepcopy(model)
    started = time.process_time()
    train(model, own, kind.lr, 1, seed)
    epoch_seconds = time.process_time() - started
    update = difference(weights_of(model), weights_of(base))
    spec = layout_of(base)
    row: Row = {"model": name, "stage": stage, "seed": seed, "values": spec.float32_bytes // 4}
    row["epoch_seconds"] = round(epoch_seconds, 3)
    methods: dict[str, dict[str, Any]] = {
        "proxy": {"input_shape": kind.input_shape, **kind.options}, "sparse": {"compressor": "sparse"},
    }  # fmt: skip
    for method, options in methods.items():
        started = time.process_time()
        message = tofu.encode(base, update, ratio=ratio, seed=seed, **options)
        encoded = time.process_time()
        forward = options.get("forward")
        decoded = tofu.decode(base, message, forward=forward)
        row |= {
            f"{method}_bytes": len(message),
            f"{method}_explained_variance": round(explained_variance(update, decoded), 4),
            f"{method}_encode_seconds": round(encoded - started, 3),
            f"{method}_decode_seconds": round(time.process_time() - encoded, 3),
            f"{method}_round_trip": same(decoded, tofu.decode(copy.deepcopy(base), message, forward=forward), base),
        }
    return row


def same(one: Weights, other: Weights, base: nn.Module) -> bool:
    """Whether two decoded updates are equal in every bit, complete and finite."""
    expected = layout_of(base).shapes
    return one.keys() == expected.keys() and all(
        torch.equal(one[name], other[name]) and bool(torch.isfinite(one[name]).all()) for name in one
    )


def table(rows: list[Row]) -> list[list[str]]:
    """One line for each kind of model and stage."""
    lines = []
    for name, stage in dict.fromkeys((row["model"], row["stage"]) for row in rows):
        own = [row for row in rows if (row["model"], row["stage"]) == (name, stage)]
        lines.append([
            name, stage, f"{own[0]['values']:,}", f"{own[0]['proxy_bytes']:,}",
            spread([row["proxy_explained_variance"] for row in own], 2),
            spread([row["sparse_explained_variance"] for row in own], 2),
            spread([row["proxy_encode_seconds"] / row["epoch_seconds"] for row in own], 1),
            spread([row["sparse_encode_seconds"] / row["epoch_seconds"] for row in own], 2),
            "equal" if all(row["proxy_round_trip"] and row["sparse_round_trip"] for row in own) else "DIFFERS",
            str(len(own)),
        ])  # fmt: skip
    return lines


def main(
    data: Annotated[Path, typer.Option()],
    models: Annotated[Any, several(str, KINDS)] = joined(list(KINDS)),
    seeds: Annotated[Any, several(int)] = joined([0, 1, 2]),
    ratio: float = 50.0,
    out: Path = RESULTS / "models.json",
) -> None:
    """One update of each kind of model: bytes, explained variance early and late in training, time to encode."""
    hide_broken_torchaudio()
    torch.set_num_threads(1)
    rows: list[Row] = json.loads(out.read_text())["rows"] if out.exists() else []
    about = versions("python -m benchmarks.models --data DATA") | {"settings": {"ratio": ratio}}
    for seed in seeds:
        for name in models:
            for stage in STAGES:
                if any((row["model"], row["stage"], row["seed"]) == (name, stage, seed) for row in rows):
                    continue
                rows.append(measure(name, stage, seed, ratio, data))
                print(json.dumps(rows[-1]), flush=True)
                rows.sort(key=lambda row: (list(KINDS).index(row["model"]), row["stage"], row["seed"]))
                replace_file(out, (json.dumps(about | {"rows": rows}, indent=1) + "\n").encode())
    print_table(
        ["model", "training", "values", "bytes", "explained", "sparse alone", "encode / epoch", "sparse / epoch",
         "decoded twice", "seeds"],
        table(rows),
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
