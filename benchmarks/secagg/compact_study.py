"""Which spends a secure round's bytes best: fewer bits for every entry, or fewer entries with more bits each?

Federated averaging in memory, with the fixed point of secure rounds but no masks, which do not change a sum. Eight
rounds of top-1% updates with error feedback come first (cheap rounds, as a run has them); from there each setting goes
on by itself, with error feedback, and accuracy and loss on the test images are compared after the last rounds.

The range is that which clips a given fraction of the entries, as a server can steer by the count of clipped values, and
rounding is stochastic; but for kind "coarse", which secure rounds use: `tofu.secagg.encoding` with nearest rounding.
"""

import copy
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from benchmarks.common import RESULTS, find_data, joined, print_table, run_command, several, spread, versions
from server.secure_ranges import UpdateScaleTracker
from tofu.compression.hadamard import pieces, random_signs, rotate, rotate_back
from tofu.data import LabeledImages, open_data, to_float
from tofu.models import build_model
from tofu.rng import derive_generator
from tofu.secagg.coordinates import LEADING_FRACTION, decode, encode, select
from tofu.secagg.encoding import EncodingConfig, RingEncoder, first_ranges, flat, nearest_range
from tofu.secagg.fixed_point import FixedPoint
from tofu.secagg.masks import add, centered
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import Weights, layout_of

CLIENTS = 10
FIRST_ROUNDS = 8
CASES: dict[str, dict[str, Any]] = {
    "digits": {"dataset": "digits", "model": "mlp", "train_images": 0, "epochs": 5, "batch_size": 16},
    "mnist": {"dataset": "ylecun/mnist", "model": "lenet5", "train_images": 3_000, "epochs": 1, "batch_size": 16},
}
LR = 0.05
LAST_ROUNDS = (3, 9)


@dataclass(frozen=True)
class Way:
    """A setting: entries sent and bits of the ring.

    Attributes:
        kind: "coarse" is what secure rounds do; "led" selects coordinates by entries alone (`tofu.secagg.coordinates`),
            with the fraction `led`; "rotated" takes turns after a rotation by random
            signs and Walsh-Hadamard transforms, which makes all entries alike; "sketch" is M Q.
        clipped: fraction of entries that the range clips.
        whole_residual: error feedback takes what was clipped and rounded, and not only what was not sent.
    """

    share: float
    bits: int
    kind: str = "led"
    led: float = LEADING_FRACTION
    clipped: float = 1e-3
    whole_residual: bool = True

    @property
    def ratio(self) -> float:
        return 32 / (self.share * self.bits)


WAYS = [
    Way(1.0, 8, "coarse"),
    *(Way(2 / bits, bits, "coarse") for bits in (6, 7, 8)),
    *(Way(1.0, bits) for bits in (12, 8)),
    *(Way(8 / bits, bits) for bits in (10, 12, 16)),
    *(Way(2 / bits, bits) for bits in (5, 6, 8, 10, 12)),
    *(Way(2 / 8, 8, led=led) for led in (0.0, 0.5, 1.0)),
    *(Way(2 / 8, 8, kind) for kind in ("rotated", "sketch")),
    *(Way(share, 8, whole_residual=False) for share in (1.0, 2 / 8)),
    *(Way(share, 8, clipped=clipped) for share in (1.0, 2 / 8) for clipped in (0.0, 1e-2)),
]


class Federation:
    """One case and seed: the clients' data and the global model."""

    def __init__(self, case: str, seed: int) -> None:
        values = CASES[case]
        name = values["dataset"]
        local = name if name == "digits" else find_data(name.split("/")[1], name)
        data = open_data(local, clients=CLIENTS, partition="dirichlet", train_images=values["train_images"], seed=seed)
        self.seed = seed
        self.clients = [data.client(number) for number in range(CLIENTS)]
        self.test = data.test()
        self.model = build_model(values["model"], data.shape, seed=seed)
        self.config = LocalTrainingConfig(epochs=values["epochs"], batch_size=values["batch_size"], lr=LR)
        self.weights = nn.utils.parameters_to_vector(self.model.parameters()).detach()
        self.first = self.weights.clone()
        self.examples = [len(client) for client in self.clients]
        self.residuals = [torch.zeros_like(self.weights) for _ in range(CLIENTS)]
        self.round = 0
        self.param_spec = layout_of(self.model)
        self.seen = UpdateScaleTracker()
        self.ranges: tuple[float, ...] = ()

    def targets(self) -> list[Tensor]:
        """Every client's update plus its residual."""
        result = []
        for number, client in enumerate(self.clients):
            model = copy.deepcopy(self.model)
            nn.utils.vector_to_parameters(self.weights.clone(), model.parameters())
            train_locally(model, client, self.config, generator=derive_generator(self.seed, self.round, number))
            update = nn.utils.parameters_to_vector(model.parameters()).detach() - self.weights
            result.append(update + self.residuals[number])
        self.round += 1
        return result

    def named(self, vector: Tensor) -> Weights:
        """A vector as tensors by name."""
        parts: tuple[Tensor, ...] = torch.split(vector, [shape.numel() for shape in self.param_spec.shapes.values()])
        named = zip(self.param_spec.shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in named}

    def results(self) -> dict[str, float]:
        nn.utils.vector_to_parameters(self.weights.clone(), self.model.parameters())
        return test_results(self.model, self.test)


@torch.no_grad()
def test_results(model: nn.Module, data: LabeledImages) -> dict[str, float]:
    model.eval()
    batches: tuple[Tensor, ...] = torch.split(data.images, 1000)
    logits = torch.cat([model(to_float(images)) for images in batches])
    right = (logits.argmax(1) == data.labels).float().mean().item()
    return {"accuracy": right, "loss": functional.cross_entropy(logits, data.labels).item()}


def top_entries(federation: Federation, fraction: float) -> None:
    """A round of sparse updates with error feedback."""
    total, all_examples = torch.zeros_like(federation.weights), sum(federation.examples)
    for number, target in enumerate(federation.targets()):
        sent = torch.zeros_like(target)
        places = target.abs().topk(max(1, round(fraction * target.numel()))).indices
        sent[places] = target[places]
        federation.residuals[number] = target - sent
        explained = float(sent.square().sum() / target.square().sum())
        federation.seen.observe(federation.named(sent), federation.examples[number], federation.round, explained)
        total += federation.examples[number] / all_examples * sent
    federation.weights = federation.weights + total


def full_round(federation: Federation) -> None:
    """A round of float32 updates."""
    total = torch.zeros_like(federation.weights)
    for number, target in enumerate(federation.targets()):
        federation.residuals[number] = torch.zeros_like(target)
        total += federation.examples[number] / sum(federation.examples) * target
    federation.weights = federation.weights + total


Code = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def code_of(way: Way, federation: Federation, turn: int) -> Code:
    """Encoder and decoder of one round."""
    values = federation.weights.numel()
    if way.kind == "sketch":
        return sketch(way.share, federation, turn)
    if way.kind == "rotated":
        return rotation(way.share, federation, turn)
    taken = select(federation.weights - federation.first, way.share, turn, leading_fraction=way.led)
    return lambda update: encode(update, taken), lambda vector: decode(vector, taken, values)


def rotation(share: float, federation: Federation, turn: int) -> Code:
    """Entries of the rotated update that take turns."""
    values = federation.weights.numel()
    space = sum(pieces(values))
    signs = random_signs(space, derive_generator(federation.seed, "signs"))
    taken = select(torch.zeros(space), share, turn)

    def forth(update: Tensor) -> Tensor:
        return encode(rotate(functional.pad(update, (0, space - values)), signs), taken)

    return forth, lambda vector: rotate_back(decode(vector, taken, space), signs)[:values]


def sketch(share: float, federation: Federation, turn: int) -> Code:
    """Each matrix M [a, b] as M Q, with Q [b, r] orthonormal columns drawn afresh every turn; vectors as they are."""
    shapes = [parameter.shape for parameter in federation.model.parameters()]
    matrices = [(shape[0], math.prod(shape[1:])) for shape in shapes]
    sizes = [shape.numel() for shape in shapes]
    bases = []
    for place, (_, width) in enumerate(matrices):
        rank = max(1, round(share * width))
        random = torch.randn(width, rank, generator=derive_generator(federation.seed, turn, place))
        bases.append(torch.linalg.qr(random)[0])

    def forth(update: Tensor) -> Tensor:
        parts: tuple[Tensor, ...] = torch.split(update, sizes)
        return torch.cat([(part.view(m) @ q).flatten() for part, m, q in zip(parts, matrices, bases, strict=True)])

    def back(vector: Tensor) -> Tensor:
        lengths = [rows * q.shape[1] for (rows, _), q in zip(matrices, bases, strict=True)]
        parts: tuple[Tensor, ...] = torch.split(vector, lengths)
        return torch.cat([(part.view(-1, q.shape[1]) @ q.T).flatten() for part, q in zip(parts, bases, strict=True)])

    return forth, back


def compact_round(way: Way, federation: Federation, turn: int) -> None:
    """A secure round's arithmetic."""
    forth, back = code_of(way, federation, turn)
    targets = federation.targets()
    vectors = [forth(target).double().numpy() for target in targets]
    unit = statistics.fmean(federation.examples)
    weighted = np.abs(np.concatenate([v * e / unit for v, e in zip(vectors, federation.examples, strict=True)]))
    point = FixedPoint(CLIENTS, way.bits, float(np.quantile(weighted, 1 - way.clipped)) or 1e-9, unit)
    total = np.zeros(point.length(vectors[0].size), dtype=np.uint64)
    for number, (vector, examples) in enumerate(zip(vectors, federation.examples, strict=True)):
        ring, _ = point.encode(vector, examples)
        total = add(total, ring, way.bits)
        exact = centered(ring[: vector.size], way.bits) * (point.step * unit / examples)
        sent = back(torch.from_numpy(exact if way.whole_residual else vector).float())
        federation.residuals[number] = targets[number] - sent
    mean = point.decode(total).mean
    federation.weights = federation.weights + back(torch.from_numpy(mean).float())


def coarse_round(way: Way, federation: Federation, turn: int) -> None:
    """A secure round's arithmetic, by the code that makes it."""
    unit, param_spec = statistics.fmean(federation.examples), federation.param_spec
    levels = FixedPoint(CLIENTS, way.bits, 1.0).levels
    known = {name: nearest_range(levels) / unit * size for name, size in federation.seen.deviations().items()}
    ranges = federation.ranges if turn else first_ranges(param_spec, known)
    terms = EncodingConfig(CLIENTS, way.bits, unit, ranges, way.share, turn, nearest_rounding=True)
    code = RingEncoder(param_spec, terms, displacement=federation.weights - federation.first if way.share < 1 else None)
    total = np.zeros(code.length, dtype=np.uint64)
    for number, target in enumerate(federation.targets()):
        encoded = code.encode(federation.named(target), federation.examples[number], 0.0)
        total = add(total, encoded.vector, way.bits)
        federation.residuals[number] = target - flat(encoded.decoded)
    mean = code.decode(total, CLIENTS)
    federation.weights, federation.ranges = federation.weights + flat(mean.update), mean.ranges


def measure(case: str, seed: int, ways: list[Way]) -> list[dict[str, Any]]:
    """Accuracies of all ways from one common start."""
    start = Federation(case, seed)
    for _ in range(FIRST_ROUNDS):
        top_entries(start, 0.01)
    rows = [{"case": case, "seed": seed, "way": "start", "rounds": 0, **start.results()}]
    base = {"case": case, "seed": seed}
    rows += _goes_on(start, base | {"way": "top-1%"}, _top)
    rows += _goes_on(start, base | {"way": "float32"}, _full)
    for way in ways:
        row = base | {"way": way.kind, "ratio": way.ratio, **vars(way)}
        rows += _goes_on(start, row, partial(coarse_round if way.kind == "coarse" else compact_round, way))
    return rows


def _top(federation: Federation, turn: int) -> None:
    top_entries(federation, 0.01)


def _full(federation: Federation, turn: int) -> None:
    full_round(federation)


def _goes_on(start: Federation, row: dict[str, Any], step: Callable[[Federation, int], None]) -> list[dict[str, Any]]:
    federation = copy.copy(start)
    federation.model, federation.residuals = copy.deepcopy(start.model), list(start.residuals)
    rows = []
    for turn in range(max(LAST_ROUNDS)):
        step(federation, turn)
        if turn + 1 in LAST_ROUNDS:
            rows.append(row | {"rounds": turn + 1, **federation.results()})
            print(rows[-1], flush=True)
    return rows


def main(
    seeds: int = 3,
    cases: Annotated[Any, several(str, list(CASES))] = joined(list(CASES)),
) -> None:
    """Which spends a secure round's bytes best: fewer bits for every entry, or fewer entries with more bits each?"""
    torch.set_num_threads(1)
    rows = [row for case in cases for seed in range(seeds) for row in measure(case, seed, WAYS)]
    settings = {"cases": CASES, "clients": CLIENTS, "lr": LR, "first_rounds": FIRST_ROUNDS, "partition": "dirichlet"}
    path = RESULTS / "secagg_compact.json"
    document = versions("python -m benchmarks.secagg.compact_study") | {"settings": settings, "rows": rows}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(path)
    table = []
    keys = ("case", "rounds", "way", "ratio", "share", "bits", "led", "clipped", "whole_residual")
    for group in dict.fromkeys(tuple(row.get(key) for key in keys) for row in rows):
        mine = [row for row in rows if tuple(row.get(key) for key in keys) == group]
        cells = ["" if cell is None else f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in group]
        found = (spread([100 * row["accuracy"] for row in mine], 2), spread([row["loss"] for row in mine], 4))
        table.append((*cells, *found))
    print_table((*keys, "accuracy %", "loss"), table)


if __name__ == "__main__":
    run_command(main)
