"""A temporal low-rank method like GradESTC, on the tasks of `benchmarks.error_feedback` in which all clients take part.

Zheng, Zhang, Deng, Min, Cui, "Communication-Efficient Federated Learning by Exploiting Spatio-Temporal Correlations of
Gradients", 2026, arXiv 2601.10491: an update of a layer, as a matrix, is a product of basis vectors and coefficients.
Server and client keep the basis of each layer over rounds; a message has the coefficients and the few vectors that are
replaced. The receiver thus keeps state for each client, which compressors of the library do not have, so that this
method has the loop of `benchmarks.error_feedback.sampled`.

Like the paper's method, but with a budget of bytes: a message takes the vectors, old and new, that explain most of the
update per byte, in all layers together. The paper fixes the number of each layer's vectors, and its first message has
all of them. Values are float16 here and float32 there. A layer has as many vectors as it has rows or columns, whichever
are fewer; a new vector takes the place of the one that explained least of late. Error feedback is ours.
"""

import json
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.common import RESULTS, print_table, run_command, spread, versions
from benchmarks.error_feedback.__main__ import SEEDS, TASKS, TUNING_SEED, Table
from benchmarks.error_feedback.sampled import ErrorFeedback, FedAvg, Federation, Row, train
from tofu.files import replace_file
from tofu.wire import HEADER_BYTES

RATIOS = (50, 200)
"""Beyond 200x a vector of LeNet's largest layer has more bytes than a message."""
GRID: dict[str, tuple[float, ...]] = {"w": (1.0, 1.8), "a": (0.0, 0.5), "step": (1.0, 2.0)}
"""Error feedback and the server's step, which are chosen on the tuning seed at 200x."""
TUNED_RATIO = 200
NAMES = ("cifar10", "mnist")
VALUE_BYTES, NUMBER_BYTES = 2, 2
"""Of a float16, and of the number of a layer's vector. A message has the library's payload header, too."""
FORGET = 0.5
"""Weight of earlier rounds in what a vector is said to explain."""


@dataclass
class Basis:
    """Vectors of one layer, which client and server both have.

    Attributes:
        vectors: orthonormal columns [length, count].
        power: what each explained of late [count].
    """

    vectors: Tensor
    power: Tensor

    @staticmethod
    def empty(length: int) -> "Basis":
        return Basis(torch.zeros(length, 0), torch.zeros(0))

    def replace(self, vector: Tensor, most: int) -> None:
        """Add a vector; if there are `most`, it takes the place of the one with the least power."""
        if self.power.numel() == most:
            kept = torch.arange(most) != self.power.argmin()
            self.vectors, self.power = self.vectors[:, kept], self.power[kept]
        self.vectors = torch.cat([self.vectors, vector[:, None]], dim=1)
        self.power = torch.cat([self.power, torch.zeros(1)])


@dataclass(frozen=True)
class Choice:
    """A vector that a message may have: a column of its layer's basis, or a new one that its bytes must carry."""

    layer: int
    vector: Tensor
    explained: float
    bytes: int
    old: bool


def choices(layer: int, matrix: Tensor, basis: Basis) -> list[Choice]:
    """Return what could explain a part of matrix [length, columns], each with its power and its bytes."""
    length, columns = matrix.shape
    powers = (basis.vectors.T @ matrix).square().sum(1)
    coefficients = NUMBER_BYTES + VALUE_BYTES * columns
    found = [Choice(layer, vector, float(power), coefficients, True)
             for vector, power in zip(basis.vectors.T, powers, strict=True)]  # fmt: skip
    rest = matrix - basis.vectors @ (basis.vectors.T @ matrix)
    new, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
    fresh = coefficients + VALUE_BYTES * length
    return found + [Choice(layer, vector, float(size) ** 2, fresh, False)
                    for vector, size in zip(new.T, sizes, strict=True) if size > 0]  # fmt: skip


def chosen_within(found: list[Choice], budget: int) -> list[Choice]:
    """Return those with the most power per byte that fit into `budget` bytes."""
    taken = []
    for choice in sorted(found, key=lambda one: one.explained / one.bytes, reverse=True):
        if choice.bytes <= budget:
            taken.append(choice)
            budget -= choice.bytes
    return taken


@dataclass
class Temporal(ErrorFeedback):
    """Low rank over space and time; the ratio is that of float32 bytes over the bytes of any message."""

    ratio: int = 50
    bases: dict[int, list[Basis]] = field(default_factory=dict)
    longest: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        wide = [(shape[0], torch.Size(shape[1:]).numel()) for shape in self.spec.parameters.values()]
        self.shapes = [(max(shape), min(shape)) for shape in wide]
        self.turned = [rows < columns for rows, columns in wide]
        self.budget = 4 * self.zero.numel() // self.ratio - HEADER_BYTES

    def compress(self, vector: Tensor, client: int, round_: int) -> Tensor:
        """What the receiver decodes: for each layer the chosen vectors times their coefficients."""
        if not bool(torch.isfinite(vector).all()):
            return vector  # training diverged, and the run ends with its weights
        matrices = self._matrices(vector)
        bases = self.bases.setdefault(client, [Basis.empty(length) for length, _ in self.shapes])
        found = [choice for layer, (matrix, basis) in enumerate(zip(matrices, bases, strict=True))
                 for choice in choices(layer, matrix, basis)]  # fmt: skip
        taken = chosen_within(found, self.budget)
        self.longest = max(self.longest, HEADER_BYTES + sum(choice.bytes for choice in taken))
        decoded = []
        for layer, (matrix, basis) in enumerate(zip(matrices, bases, strict=True)):
            mine = [choice for choice in taken if choice.layer == layer]
            sent = torch.stack([_half(choice.vector) for choice in mine], dim=1) if mine else matrix[:, :0]
            coefficients = _half(torch.linalg.lstsq(sent, matrix).solution) if mine else matrix[:0]
            decoded.append(sent @ coefficients)
            basis.power = FORGET * basis.power + (1 - FORGET) * (basis.vectors.T @ matrix).square().sum(1)
            for choice in mine:
                if not choice.old:
                    basis.replace(_half(choice.vector), self.shapes[layer][1])
                    basis.power[-1] = choice.explained
        return self._flat(decoded)

    def _matrices(self, vector: Tensor) -> list[Tensor]:
        """Return each layer's part of vector [d] as a matrix with no more columns than rows."""
        parts = torch.split(vector, [length * columns for length, columns in self.shapes])
        return [part.view(columns, length).T if turned else part.view(length, columns)
                for part, (length, columns), turned in zip(parts, self.shapes, self.turned, strict=True)]  # fmt: skip

    def _flat(self, matrices: list[Tensor]) -> Tensor:
        pairs = zip(matrices, self.turned, strict=True)
        return torch.cat([(matrix.T if turned else matrix).reshape(-1) for matrix, turned in pairs])


def _half(values: Tensor) -> Tensor:
    return values.half().float()


def measured(task: str, ratio: int, parameters: dict[str, float], seed: int) -> Row:
    """Make one run; ratio 0 is FedAvg in the same loop."""
    federation = Federation.of(seed, task)
    options: dict[str, Any] = dict(parameters)
    method = Temporal(federation, ratio=ratio, **options) if ratio else FedAvg(federation, **options)
    accuracy = train(method)
    row: Row = {"final_accuracy": accuracy if accuracy == accuracy else None}
    if isinstance(method, Temporal):
        row["reached"] = method.spec.float32_bytes / method.longest
    return row


def grid(ratio: int) -> list[dict[str, float]]:
    """The values among which the tuning seed chooses; FedAvg has the server's step only."""
    names = GRID if ratio else {"step": GRID["step"]}
    return [dict(zip(names, values, strict=True)) for values in product(*names.values())]


def chosen(rows: list[Row], task: str, ratio: int) -> dict[str, float]:
    """The parameters with the highest accuracy on the tuning seed; training that diverged counts as 0."""
    tuned = [
        row for row in rows if (row["task"], row["seed"]) == (task, TUNING_SEED) and bool(row["ratio"]) == bool(ratio)
    ]
    best: dict[str, float] = max(tuned, key=lambda row: row["final_accuracy"] or 0.0)["parameters"]
    return best


def table(rows: list[Row]) -> Table:
    """FedAvg in the same loop and the temporal method, each with the parameters of the tuning seed."""
    lines = []
    for task in NAMES:
        for ratio in (0, *RATIOS):
            mine = [row for row in rows if (row["task"], row["ratio"]) == (task, ratio) and row["seed"] in SEEDS]
            found = [100 * row["final_accuracy"] for row in mine if row["final_accuracy"] is not None]
            if not found:
                continue
            values = ", ".join(f"{key} = {value:g}" for key, value in chosen(rows, task, ratio).items())
            reached = f"{min(row['reached'] for row in mine):.0f}x" if ratio else ""
            few = "" if len(found) == len(SEEDS) else f" ({len(found)} of {len(SEEDS)} seeds)"
            lines.append([task, "temporal low rank" if ratio else "FedAvg", reached, values, spread(found, 1) + few])
    return ["task", "method", "ratio", "parameters", "accuracy"], lines


def main(
    table_only: Annotated[bool, typer.Option("--table", help="print the results so far, and stop")] = False,
    output: Annotated[Path, typer.Option(help="results")] = RESULTS / "rivals-temporal.json",
) -> None:
    """Accuracy of a temporal low-rank method, tuned on one seed, and then on three others; it resumes."""
    torch.set_num_threads(1)
    rows: list[Row] = json.loads(output.read_text())["rows"] if output.is_file() else []

    def measure(task: str, ratio: int, parameters: dict[str, float], seed: int) -> None:
        key: dict[str, Any] = {"task": task, "ratio": ratio, "parameters": parameters, "seed": seed}
        if any(key.items() <= row.items() for row in rows):
            return
        rows.append(key | measured(**key))
        print(f"{key}: {rows[-1]['final_accuracy']}", file=sys.stderr, flush=True)
        document = versions("python -m benchmarks.rivals.temporal") | {
            "settings": {task: TASKS[task] for task in NAMES} | {"tuning_seed": TUNING_SEED}, "rows": rows,
        }  # fmt: skip
        replace_file(output, (json.dumps(document, indent=1) + "\n").encode())

    for task in () if table_only else NAMES:
        for ratio in (0, TUNED_RATIO):
            for parameters in grid(ratio):
                measure(task, ratio, parameters, TUNING_SEED)
        for ratio, seed in product((0, *RATIOS), SEEDS):
            measure(task, ratio, chosen(rows, task, ratio), seed)
    print_table(*table(rows))


if __name__ == "__main__":
    run_command(main)
