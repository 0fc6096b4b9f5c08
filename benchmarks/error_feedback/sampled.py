"""Methods for clients that are sampled rarely, each in a loop of its own: SCAFCOM, EControl, and FetchSGD.

They keep other state than error feedback does, at the server too, so they are not built in. FedAvg and STC are run in
the same loop, which shows that it trains as the library does. All methods have the local training, data, clients per
round and average of weights of `mnist-100` in `benchmarks.error_feedback`, and a reply of at most 1/200 of the float32
bytes of an update. Their own parameters are chosen on a seed of its own, by final accuracy. Everything is a flat vector
in units of local progress (weights after local training minus weights before).

    SCAFCOM    Huang, Li, Li, ICLR 2024, arXiv 2308.08165: v = (1 - b) v + b g; the client sends C(v - c), where
               c is what it sent before; local steps are corrected by the server's mean of all c.
    EControl   Gao, Islamov, Stich, ICLR 2024, arXiv 2311.05645: the client sends C(p + b e - h); h is the sum of
               what it sent, and e the sum of what was lost.
    FetchSGD   Rothchild et al., ICML 2020, arXiv 2007.07682: replies are count sketches; momentum and error feedback
               are at the server; a client has no state.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.common import RESULTS, print_table, run_command, spread, versions
from benchmarks.error_feedback.__main__ import SEEDS, TUNING_SEED, Run, Table
from tofu.compression.stc import Stc
from tofu.data import FederatedData, LabeledImages, to_float
from tofu.evaluation import evaluate
from tofu.files import replace_file
from tofu.models import initial_model
from tofu.reference_model import NO_CALL, ReferenceModel
from tofu.rng import derive_generator
from tofu.settings import Settings
from tofu.training import shuffled_batches
from tofu.weights import layout_of

RATIO = 200
Row = dict[str, Any]


@dataclass
class Federation:
    """The clients' data, the network and the settings of one seed."""

    settings: Settings
    data: FederatedData
    model: nn.Module

    @staticmethod
    def of(seed: int, task: str = "mnist-100") -> "Federation":
        """Return that of a task of `benchmarks.error_feedback`."""
        settings = Run(task, "fedavg", 0, 1.0, 0.0, 1.0, seed).settings(Path("unused")).replace(test_images=0)
        data = FederatedData.of(settings.data, seed)
        return Federation(settings, data, initial_model(settings.model, data.shape, seed))

    def sampled(self, round_: int) -> list[int]:
        """Return the clients of a round."""
        count = round(self.settings.server.client_fraction * self.data.clients)
        generator = derive_generator(self.settings.run.seed, str(round_), "sampled clients")
        return torch.randperm(self.data.clients, generator=generator)[:count].tolist()

    def train(self, client: int, round_: int, start: Tensor, drift: Tensor | None = None) -> "Trained":
        """One round of local training from flat weights [d]; `drift` [d] is added to each gradient."""
        images: LabeledImages = self.data.client(client)
        training, parameters = self.settings.training, list(self.model.parameters())
        vector_to_parameters(start.clone(), parameters)
        self.model.train()
        steps, total = 0, torch.zeros_like(start)
        generator = derive_generator(self.settings.run.seed, f"{client} {round_}", "local training")
        for _ in range(training.local_epochs):
            for rows in shuffled_batches(len(images), training.batch_size, generator):
                loss = F.cross_entropy(self.model(to_float(images.images[rows])), images.labels[rows])
                gradient = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, parameters)])
                total, steps = total + gradient, steps + 1
                step = gradient if drift is None else gradient + drift
                vector_to_parameters(parameters_to_vector(parameters).detach() - training.lr * step, parameters)
        return Trained(parameters_to_vector(parameters).detach() - start, total / steps, steps, len(images))

    def accuracy(self, weights: Tensor) -> float:
        """Accuracy on all test images."""
        vector_to_parameters(weights.clone(), self.model.parameters())
        return evaluate(self.model, self.data.test()).accuracy


@dataclass(frozen=True)
class Trained:
    """Local progress [d], mean gradient [d], number of local steps, and number of images."""

    progress: Tensor
    gradient: Tensor
    steps: int
    examples: int


@dataclass
class Method:
    """A method's parameters and state; one instance runs once."""

    federation: Federation
    compressor: Stc = field(init=False)

    def __post_init__(self) -> None:
        model = self.federation.model
        self.spec = layout_of(model)
        self.compressor = Stc(ReferenceModel(model, NO_CALL), ratio=float(RATIO))
        self.clients = self.federation.data.clients
        self.zero = torch.zeros(self.spec.parameter_count)
        self.memory: dict[int, Tensor] = {}

    def compress(self, vector: Tensor, client: int, round_: int) -> Tensor:
        """C(x): what the receiver decodes from STC's payload."""
        generator = derive_generator(0, f"{client} {round_}", "compress")
        return self.compressor._decode(self.compressor._encode(vector, self.spec, generator, b""), self.spec)

    def round(self, weights: Tensor, round_: int, clients: list[int]) -> Tensor:
        """Return the new weights."""
        raise NotImplementedError


@dataclass
class FedAvg(Method):
    """Weighted mean of the uncompressed progress, times `step`."""

    step: float = 1.0

    def round(self, weights: Tensor, round_: int, clients: list[int]) -> Tensor:
        """Return the new weights."""
        return weights + self.step * _weighted([self.federation.train(client, round_, weights) for client in clients])


@dataclass
class ErrorFeedback(Method):
    """STC with over-relaxation w and step-ahead a, as `docs/error-feedback.md` defines them; `step` as in FedAvg."""

    w: float = 1.8
    a: float = 0.5
    step: float = 1.0

    def round(self, weights: Tensor, round_: int, clients: list[int]) -> Tensor:
        """Return the new weights."""
        total, examples = self.zero, 0
        for client in clients:
            residual = self.memory.get(client, self.zero)
            trained = self.federation.train(client, round_, weights + self.a * residual)
            target = trained.progress + residual
            decoded = self.w * self.compress(target, client, round_)
            self.memory[client] = target - decoded
            total, examples = total + trained.examples * decoded, examples + trained.examples
        return weights + self.step * total / examples


@dataclass
class Scafcom(Method):
    """SCAFCOM with local momentum b; the server's step is `step` times that of the mean client."""

    b: float = 0.2
    step: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.velocity: dict[int, Tensor] = {}
        self.control = self.zero

    def round(self, weights: Tensor, round_: int, clients: list[int]) -> Tensor:
        """Return the new weights."""
        change, steps = self.zero, 0
        for client in clients:
            own, velocity = self.memory.get(client, self.zero), self.velocity.get(client, self.zero)
            trained = self.federation.train(client, round_, weights, self.control - own)
            velocity = (1 - self.b) * velocity + self.b * trained.gradient
            decoded = self.compress(velocity - own, client, round_)
            self.memory[client], self.velocity[client] = own + decoded, velocity
            change, steps = change + decoded, steps + trained.steps
        count, lr = len(clients), self.federation.settings.training.lr
        weights = weights - self.step * lr * steps / count * (change / count + self.control)
        self.control = self.control + change / self.clients
        return weights


@dataclass
class EControl(Method):
    """EControl with the weight b of all errors; the server's step is `step` times its direction.

    With b = 0 it is EF21, and with m below 1, too, EF21-SGDM: m is the weight of a round in the client's direction.
    """

    b: float = 0.1
    step: float = 1.0
    m: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.errors: dict[int, Tensor] = {}
        self.velocity: dict[int, Tensor] = {}
        self.direction = self.zero

    def round(self, weights: Tensor, round_: int, clients: list[int]) -> Tensor:
        """Return the new weights."""
        change = self.zero
        for client in clients:
            sent, error = self.memory.get(client, self.zero), self.errors.get(client, self.zero)
            progress = self.m * self.federation.train(client, round_, weights).progress
            progress = self.velocity[client] = progress + (1 - self.m) * self.velocity.get(client, self.zero)
            decoded = self.compress(progress + self.b * error - sent, client, round_)
            self.errors[client] = error + progress - sent - decoded
            self.memory[client] = sent + decoded
            change = change + decoded
        self.direction = self.direction + change / self.clients
        return weights + self.step * self.direction


@dataclass
class FetchSgd(Method):
    """FetchSGD with momentum b, and `sent` times a sketch's values as entries of the server's step.

    What was sent leaves error and momentum by setting their cells to 0. Subtracting its sketch diverged everywhere,
    since cells are shared by 200 entries.
    """

    b: float = 0.9
    step: float = 1.0
    rows: int = 1
    sent: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.zero.numel()
        self.columns = int(4 * size / RATIO / 4 / self.rows)  # float32 values
        generator = derive_generator(0, "sketch", "columns and signs")
        self.column = torch.randint(self.columns, (self.rows, size), generator=generator)
        self.sign = torch.randint(2, (self.rows, size), generator=generator) * 2.0 - 1
        self.velocity = torch.zeros(self.rows, self.columns)
        self.error = torch.zeros(self.rows, self.columns)

    def sketch(self, vector: Tensor) -> Tensor:
        """Return the count sketch [rows, columns] of a vector [d]."""
        empty = torch.zeros(self.rows, self.columns)
        return empty.scatter_add_(1, self.column, self.sign * vector)

    def estimates(self, sketch: Tensor) -> Tensor:
        """Return the median over rows of each entry's value [d]."""
        return (self.sign * sketch.gather(1, self.column)).median(0).values

    def round(self, weights: Tensor, round_: int, clients: list[int]) -> Tensor:
        """Return the new weights."""
        mean = _weighted([self.federation.train(client, round_, weights) for client in clients])
        self.velocity = self.b * self.velocity + self.sketch(mean)  # the sketch of a mean is the mean of sketches
        self.error = self.error + self.step * self.velocity
        found = self.estimates(self.error)
        count = min(found.numel(), int(self.sent * self.rows * self.columns))
        largest = found.abs().topk(count).indices
        delta = torch.zeros_like(found).index_put_((largest,), found[largest])
        taken = self.sketch(delta) != 0
        self.error, self.velocity = self.error.masked_fill(taken, 0.0), self.velocity.masked_fill(taken, 0.0)
        return weights + delta


GRIDS: dict[str, tuple[Callable[..., Method], dict[str, tuple[float, ...]]]] = {
    "fedavg": (FedAvg, {"step": (1.0, 1.5, 2.0)}),
    "stc": (ErrorFeedback, {"w": (1.8,), "a": (0.5, 0.0), "step": (1.0, 1.5, 2.0)}),
    "ef21": (EControl, {"b": (0.0,), "step": (3.0, 10.0, 20.0)}),
    "ef21-sgdm": (EControl, {"b": (0.0,), "step": (10.0, 20.0), "m": (0.3, 0.6)}),
    "econtrol": (EControl, {"b": (0.03, 0.1, 0.3), "step": (3.0, 10.0, 20.0)}),
    "scafcom": (Scafcom, {"b": (0.1, 0.2, 0.5), "step": (3.0, 10.0, 20.0)}),
    "fetchsgd": (FetchSgd, {"b": (0.0, 0.9), "step": (0.1, 1.0), "rows": (1, 5), "sent": (0.1, 1.0, 10.0)}),
}
"""Method -> its class and the grid of its parameters."""


def _weighted(replies: list[Trained]) -> Tensor:
    """Mean progress, weighted by images."""
    total = sum(one.examples for one in replies)
    return torch.stack([one.progress * (one.examples / total) for one in replies]).sum(0)


def run(name: str, parameters: dict[str, float], seed: int) -> float:
    """Final accuracy of the averaged weights; NaN if training diverged."""
    return train(GRIDS[name][0](Federation.of(seed), **parameters))


def train(method: Method) -> float:
    """Train to the end of the task's rounds -> final accuracy of the averaged weights; NaN if training diverged."""
    federation = method.federation
    weights = averaged = parameters_to_vector(federation.model.parameters()).detach().clone()
    for round_ in range(1, federation.settings.training.rounds + 1):
        weights = method.round(weights, round_, federation.sampled(round_))
        if not bool(torch.isfinite(weights).all()):
            return float("nan")
        decay = min(federation.settings.server.ema_decay, 1 - 1 / round_)
        averaged = decay * averaged + (1 - decay) * weights
    return federation.accuracy(averaged)


def table(rows: list[Row]) -> Table:
    """Each method with its parameters that are best on the tuning seed, and its accuracy on the others."""
    lines = []
    for name in GRIDS:
        best = chosen(name, rows)
        found = [100 * row["final_accuracy"] for row in rows if (row["method"], row["parameters"]) == (name, best)
                 and row["seed"] in SEEDS and row["final_accuracy"] is not None]  # fmt: skip
        failed = "" if len(found) == len(SEEDS) else f" ({len(found)} of {len(SEEDS)} seeds)"
        lines.append([name, ", ".join(f"{key} = {value:g}" for key, value in best.items()), spread(found, 1) + failed])
    return ["method", "parameters", "200x"], lines


def chosen(name: str, rows: list[Row]) -> dict[str, float]:
    """The parameters of a method with the highest accuracy on the tuning seed; training that diverged counts as 0."""
    tuned = [row for row in rows if row["method"] == name and row["seed"] == TUNING_SEED]
    best: dict[str, float] = max(tuned, key=lambda row: row["final_accuracy"] or 0.0)["parameters"]
    return best


def main(
    output: Annotated[Path, typer.Option(help="results")] = RESULTS / "error-feedback-sampled.json",
) -> None:
    """Accuracy of methods for clients that are sampled rarely, tuned on one seed, and then on three others."""
    torch.set_num_threads(1)
    rows: list[Row] = json.loads(output.read_text())["rows"] if output.is_file() else []

    def measure(name: str, parameters: dict[str, float], seed: int) -> None:
        key = {"method": name, "parameters": parameters, "seed": seed}
        if any(key.items() <= row.items() for row in rows):
            return
        found = run(name, parameters, seed)
        rows.append(key | {"final_accuracy": found if found == found else None})
        print(f"{name} {parameters} seed {seed}: {found:.4f}", file=sys.stderr, flush=True)
        document = versions("python -m benchmarks.error_feedback.sampled") | {
            "settings": {"task": "mnist-100", "ratio": RATIO, "seeds": SEEDS, "tuning_seed": TUNING_SEED}, "rows": rows,
        }  # fmt: skip
        replace_file(output, (json.dumps(document, indent=1) + "\n").encode())

    for name, (_, grid) in GRIDS.items():
        for values in product(*grid.values()):
            measure(name, dict(zip(grid, values, strict=True)), TUNING_SEED)
        for seed in SEEDS:
            measure(name, chosen(name, rows), seed)
    print_table(*table(rows))


if __name__ == "__main__":
    run_command(main)
