"""Where the bytes of a correction go, beside the entropy of its parts.

A federation sends the correction alone, with the default error feedback. What its clients would send in rounds 1, 5 and
15, residuals included, is recorded once (`--recordings`), so that other codes can be tried on the same updates. The
parts of a payload are compared with their entropy: of the positions if entries are equally likely inside a stratum, and
of the signs if it is known how often they are those of the weights' displacement.
"""

import json
import math
import statistics
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.common import RESULTS, find_data, joined, print_table, run_command, several, versions
from benchmarks.rivals.__main__ import COMPARISONS, FEDERATION
from tofu.codec import correction
from tofu.codec.correction import Strata, read_correction, slots_length, strata_of, write_correction
from tofu.compression import uplink_compressor
from tofu.compression.error_feedback import ErrorFeedback
from tofu.data import FederatedData, ImageShape
from tofu.files import replace_file
from tofu.models import initial_model
from tofu.reference_model import ReferenceModel
from tofu.rng import derive_generator
from tofu.rounds.aggregation import RunningMean
from tofu.settings import Settings
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import add_update, difference, load_weights, weights_of
from tofu.wire import HEADER_BYTES

CORRECTION = {"compressor": "proxy", "correction": 1.0}
TASKS: dict[str, dict[str, Any]] = {
    "cifar10": COMPARISONS["cifar10-group"][0] | {"rounds": 15},
    "mnist": COMPARISONS["mnist"][0] | {"lr": 0.2, "clients": 5, "train_images": 6000},
}
SHAPES = {"cifar10": ImageShape(3, 32, 32, 10), "mnist": ImageShape(1, 28, 28, 10)}
FEEDBACK = {"over_relaxation": 0.0, "step_ahead": 0.5}
RATIOS = (50, 200, 500, 1000, 2000)
MOMENTS = (1, 5, 15)
RECORDED = 2
"""Number of clients whose targets are recorded."""
PARTS = ("header", "prefix", "checksum", "magnitudes", "counts", "positions", "signs", "levels")
ENTROPIES = ("positions at entropy", "signs at entropy")
PREFIX_BYTES = 6
"""What the proxy codec puts before a correction."""

Row = dict[str, Any]


def open_case(task: str, ratio: int, seed: int) -> tuple[Settings, ReferenceModel]:
    """The settings, and the network at its initial weights."""
    own = TASKS[task]
    hub = own["dataset"]
    changes = {"dataset": find_data(hub.split("/")[1], hub), "seed": seed, "ratio": float(ratio)}
    settings = Settings.of(FEDERATION | own | CORRECTION | FEEDBACK | changes)
    model = initial_model(settings.model, SHAPES[task], seed)
    return settings, ReferenceModel(model.eval(), SHAPES[task]).as_built()


def record(task: str, ratio: int, seed: int) -> dict[int, dict[str, Any]]:
    """Round -> the weights of that round, and what its first clients would compress."""
    settings, network = open_case(task, ratio, seed)
    data = FederatedData.of(settings.data, seed)
    model, config = network.model, LocalTrainingConfig.of(settings.training, 1)
    compressor = uplink_compressor(settings, "compressed", network)
    feedback = [ErrorFeedback() for _ in range(settings.data.clients)]
    found = {}
    for round_ in range(1, MOMENTS[-1] + 1):
        base, mean, targets = weights_of(model), RunningMean(), []
        for client in range(settings.data.clients):
            images = data.client(client)
            ahead = feedback[client].ahead(base, round_ - 1, settings.codec.step_ahead, network.param_spec.parameters)
            load_weights(model, ahead)
            train_locally(model, images, config, generator=derive_generator(seed, round_, str(client), "train"))
            target = feedback[client].target(difference(weights_of(model), ahead), round_ - 1)
            load_weights(model, base)
            model.eval()
            decoded = compressor.compress(network, target, generator=derive_generator(seed, "none")).decoded
            feedback[client] = ErrorFeedback.after(target, decoded, round_)
            mean.add(decoded, len(images))
            targets.append(target)
        if round_ in MOMENTS:
            found[round_] = {"base": base, "targets": targets[:RECORDED]}
        add_update(model, mean.mean())
    return found


def parts(data: bytes, strata: Strata, moved: Tensor) -> dict[str, float]:
    """Bits of each part of a correction, and what its positions and signs would take at their entropy."""
    decoded = read_correction(data, strata)
    entries = torch.nonzero(decoded).flatten().numpy()
    slots = np.sort(strata.slots[entries])
    levels, counts = data[2], int(sum(int(size).bit_length() for size in strata.sizes))
    positions = slots_length(slots, strata) - counts
    inside = np.bincount(strata.numbers[entries], minlength=correction.STRATA)
    with_displacement = entries[moved.numpy()[entries] != 0]
    same = int((torch.sign(decoded[with_displacement]) == torch.sign(moved[with_displacement])).sum())
    entropy = sum(_entropy(int(count), int(size)) for count, size in zip(inside, strata.sizes, strict=True))
    signs = _entropy(same, with_displacement.size) + entries.size - with_displacement.size
    return {
        "entries": entries.size, "header": 8 * HEADER_BYTES, "prefix": 8 * PREFIX_BYTES,
        "checksum": 24, "magnitudes": 16 * levels, "counts": counts, "positions": positions,
        "signs": entries.size,
        "levels": 8 * len(data) - 24 - 16 * levels - counts - positions - entries.size,
        "positions at entropy": entropy, "signs at entropy": signs,
    }  # fmt: skip


def _entropy(count: int, size: int) -> float:
    """Bits of log2 (size choose count)."""
    return (math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)) / math.log(2)


def measure(task: str, ratio: int, seed: int, recording: dict[int, dict[str, Any]]) -> list[Row]:
    """One row for each update."""
    _, network = open_case(task, ratio, seed)
    budget = int(network.param_spec.float32_bytes / ratio) - HEADER_BYTES - PREFIX_BYTES
    rows = []
    for round_, moment in recording.items():
        load_weights(network.model, moment["base"])
        strata = strata_of(network)
        moved = torch.cat([value.flatten() for value in network.displacements()])
        for client, target in enumerate(moment["targets"]):
            vector = torch.cat([target[name].flatten() for name in network.param_spec.parameters])
            row: Row = {"task": task, "ratio": ratio, "seed": seed, "round": round_, "client": client}
            data = write_correction(vector, budget, strata)
            missed = (vector - read_correction(data, strata)).double()
            explained = 1 - float(missed.square().sum() / vector.double().square().sum())
            row |= {"explained": explained} | parts(data, strata, moved)
            rows.append(row)
    return rows


Table = tuple[list[str], list[list[str]]]
CASE = ("task", "ratio", "round")


def cases(rows: list[Row]) -> list[tuple[list[str], list[Row]]]:
    """Each task, ratio and round as the first cells of a line, and its rows."""
    found = sorted({tuple(row[key] for key in CASE) for row in rows})
    return [
        (
            [task, f"{ratio:,}x", f"{round_}"],
            [r for r in rows if tuple(r[key] for key in CASE) == (task, ratio, round_)],
        )
        for task, ratio, round_ in found
    ]


def where_bytes_go(rows: list[Row]) -> Table:
    """Header and lines: the parts of payloads, in % of all bytes."""
    lines = []
    for case, mine in cases(rows):
        bits = {part: statistics.fmean(row[part] for row in mine) for part in (*PARTS, *ENTROPIES)}
        total = sum(bits[part] for part in PARTS)
        explained = f"{statistics.fmean(row['explained'] for row in mine):.3f}"
        lines.append(
            [*case, explained, f"{total / 8:,.0f}", *(f"{100 * value / total:.1f}" for value in bits.values())]
        )
    return [*CASE, "explained variance", "bytes", *PARTS, *ENTROPIES], lines


def main(
    tasks: Annotated[Any, several(str, TASKS)] = joined(TASKS),
    ratios: Annotated[Any, several(int)] = joined(RATIOS),
    seeds: Annotated[Any, several(int)] = joined([0]),
    recordings: Annotated[Path, typer.Option(help="folder; made if it lacks one")] = Path("recordings"),
    output: Annotated[Path, typer.Option(help="results; what it has is not measured again")] = RESULTS / "coding.json",
) -> None:
    """Where the bytes of a correction go, beside the entropy of its parts."""
    torch.set_num_threads(1)
    rows: list[Row] = json.loads(output.read_text())["rows"] if output.is_file() else []
    done = {(row["task"], row["ratio"], row["seed"]) for row in rows}
    settings = {"tasks": TASKS, "federation": FEDERATION, "correction": CORRECTION, "error_feedback": FEEDBACK}
    for task, ratio, seed in product(tasks, ratios, seeds):
        if (task, ratio, seed) in done:
            continue
        path = recordings / f"coding-{task}-{ratio}-{seed}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(record(task, ratio, seed), path)
        rows += measure(task, ratio, seed, torch.load(path))
        document = versions("python -m benchmarks.coding") | {"settings": settings, "rows": rows}
        replace_file(output, (json.dumps(document, indent=1) + "\n").encode())
        print(f"{path.stem}: measured", flush=True)
    print_table(*where_bytes_go(rows))


if __name__ == "__main__":
    run_command(main)
