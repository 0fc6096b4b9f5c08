"""TREND: an ensemble whose members quantize their input differently, so that attacks transfer badly between them.

Ravikumar, Kodge, Garg, Roy, "TREND: Transferability-based Robust ENsemble Design", IEEE TAI 4(3), 2023, arXiv
2008.01524. Every member is the global model of one client group, trained on its own quantizer. In the last round all
clients receive all members, attack each, and export how many images fool which of the others; the server fits the
paper's metric to the totals and chooses the members that vote. docs/plugins/trend.md has formulas and figures.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from client.plugins.round_start import subsample, subsample_rows
from client.plugins.transferability import (
    InputQuantizer,
    TransferCounts,
    choose_ensemble,
    count_transfers,
    named_quantizers,
    transferability,
    vote,
)  # fmt: skip
from tofu.data import LabeledImages, to_float
from tofu.errors import SettingError
from tofu.plugins import (
    Export,
    Panel,
    Plugin,
    PluginState,
    Prediction,
    RoundContext,
    RunRequirements,
    SumSpec,
    option,
    plugin_registry,
)  # fmt: skip
from tofu.rng import derive_generator
from tofu.rounds.panel import Chart, Series, TableFigure
from tofu.settings import MIN_SECURE
from tofu.weights import load_weights, under, weights_of


@plugin_registry.register("trend")
@dataclass
class Trend(Plugin):
    """Clustered federated learning of an ensemble with quantized inputs.

    `broadcast` holds the members' weights in the last round, and the transfer matrix and the chosen members after it.
    """

    encodes_input = True

    members: str = option("fp,1,2", "input quantizers of the client groups: fp, 1, 2, 4, 6, 8 (bits) or halftone")
    assign: dict = option({}, "group of each client by name; others by number or hash")  # type: ignore[type-arg]
    voters: int = option(0, "members that vote, chosen by the transferability metric; 0: all", ge=0)
    epsilons: list = option([0.05, 0.1, 0.15], "attack strengths for images in [0, 1]", gt=0, le=1)  # type: ignore[type-arg]
    at: float = option(8 / 255, "attack strength at which the metric is evaluated", gt=0, le=1)
    steps: int = option(10, "steps of the attack", ge=1, le=1000)
    images: int = option(100, "maximum number of a client's images that are attacked", ge=1, le=1_000_000)

    _quantizers: tuple[str, ...] = field(default=(), init=False, repr=False)
    _counts: TransferCounts | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._quantizers = named_quantizers("trend.members", self.members)
        if self.voters > self.groups:
            raise SettingError("trend.voters", self.voters, f"at most the number of members, {self.groups}")
        numbers = all(isinstance(epsilon, int | float) for epsilon in self.epsilons)
        if len(self.epsilons) < 2 or not numbers or sorted(set(self.epsilons)) != list(self.epsilons):
            raise SettingError("trend.epsilons", str(self.epsilons), "two or more increasing numbers, for a fit")
        for client, group in self.assign.items():
            if type(group) is not int or not 0 <= group < self.groups:
                raise SettingError("trend.assign", f"{client}: {group}", f"groups from 0 to {self.groups - 1}")

    @property
    def groups(self) -> int:
        return len(self._quantizers)

    def group_of(self, client: str) -> int:
        """As assigned, else the client's number, or a hash of its name, modulo the number of groups."""
        if client in self.assign:
            return int(self.assign[client])
        number = int(client) if client.isdecimal() else hashlib.sha256(client.encode()).digest()[0]
        return number % self.groups

    def incompatibility(self, run: RunRequirements) -> str:
        needed = self.groups * (MIN_SECURE if run.secure else 1)
        if run.clients < needed:
            kind = "clients in secure rounds" if run.secure else "clients"
            return f"a run of at least {needed} {kind}, for {self.groups} groups"
        if run.tasks > 1:
            return "a run without tasks: an ensemble has no heads for each task"
        return super().incompatibility(run)

    def setup(self, model: nn.Module, context: RoundContext) -> nn.Module:
        super().setup(model, context)
        if _hook_of(model) is None:
            _set_quantizer(model, self._quantizers[context.group])
        return model

    def declare_sums(self, model: nn.Module) -> Mapping[str, SumSpec]:
        if not self._measures:
            return {}
        matrix, bound = (self.groups, self.groups), float(self.images)
        by_strength = (*matrix, len(self.epsilons))
        return {"right": SumSpec(matrix, bound), "fooled": SumSpec(by_strength, bound),
                "transferred": SumSpec(by_strength, bound)}  # fmt: skip

    @property
    def _measures(self) -> bool:
        """Whether clients measure transfers in this round: they have received the weights of all members."""
        return any(name.startswith("member 0/") for name in self.broadcast)

    def on_train_begin(self, model: nn.Module, data: LabeledImages) -> None:
        if not self._measures:
            return
        context = self.context
        models = [self._member(model, group) for group in range(self.groups)]
        generator = derive_generator(context.seed, context.round, context.client, "trend")
        self._counts = count_transfers(
            models, to_float(subsample(data, self.images)), data.labels[subsample_rows(len(data), self.images)],
            epsilons=self.epsilons, steps=self.steps, generator=generator,
        )  # fmt: skip

    def _member(self, like: nn.Module, group: int) -> nn.Module:
        """Return a copy of a model, in eval mode, with the weights and the quantizer of a group."""
        model = copy.deepcopy(like).eval()
        _set_quantizer(model, self._quantizers[group])
        weights = under(self.broadcast, f"member {group}")
        load_weights(model, {name: value for name, value in weights.items() if isinstance(value, Tensor)})
        return model

    def export(self) -> Export:
        if self._counts is None:
            return Export()
        counts, diagonal = self._counts, range(self.groups)
        robust = 1 - counts.fooled[diagonal, diagonal].sum(0) / counts.right.diag().sum().clamp(min=1)
        metrics = {f"robust at {epsilon:g}": float(value) for epsilon, value in zip(self.epsilons, robust, strict=True)}
        sums = {"right": counts.right, "fooled": counts.fooled, "transferred": counts.transferred}
        return Export(sums, metrics)

    def reduce(self, sums: Mapping[str, Tensor], examples: int, broadcast: PluginState) -> PluginState:
        counts = TransferCounts(sums["right"], sums["fooled"], sums["transferred"])
        metric = transferability(counts, self.epsilons, self.at)
        chosen = choose_ensemble(metric, self.voters or self.groups)
        return {"metric": metric, "rates": counts.rates, "fooled": counts.fooled, "chosen": torch.tensor(chosen)}

    def on_aggregate(self, model: nn.Module, context: RoundContext) -> None:
        """Before the last round, broadcast the members' weights."""
        if context.round == context.rounds - 1:
            weights = {f"member {context.group}/{name}": value for name, value in weights_of(model).items()}
            self.broadcast = self.broadcast | weights

    def predict_groups(self, models: Sequence[nn.Module], images: Tensor) -> Prediction:
        """Return the majority vote of the chosen members, or of all before the last round."""
        chosen = self.broadcast.get("chosen")
        members = chosen.tolist() if isinstance(chosen, Tensor) else range(len(models))
        classes = self._context.shape.classes if self._context is not None else None
        return Prediction(vote(torch.stack([models[member](images)[:, :classes] for member in members])))

    def panel(self) -> Panel | None:
        metric, rates, chosen = (self.broadcast.get(name) for name in ("metric", "rates", "chosen"))
        if not (isinstance(metric, Tensor) and isinstance(rates, Tensor) and isinstance(chosen, Tensor)):
            return None
        names = [f"{group}: {name}" for group, name in enumerate(self._quantizers)]

        def table(title: str, matrix: Tensor) -> TableFigure:
            rows = tuple((name, *row) for name, row in zip(names, matrix.tolist(), strict=True))
            return TableFigure(title, ("target", *(f"from {name}" for name in names)), rows)

        strongest = float(self.epsilons[-1])
        lines = tuple(
            Series(f"{names[0]} to {name}", tuple(map(float, rates[target, 0])), x=tuple(map(float, self.epsilons)))
            for target, name in enumerate(names)
        )
        return Panel(
            "Transferability of attacks",
            f"Members that vote: {', '.join(names[int(member)] for member in chosen)}. A row is the model that is "
            "shown images made against the model of the column.",
            (
                table(f"Metric at {self.at:.3g}", metric),
                table(f"Fraction of adversarial images that transfer at {strongest:g}", rates[:, :, -1]),
                Chart("Transfer by attack strength", lines, x_label="strength", y_label="fraction"),
            ),
        )


def _hook_of(model: nn.Module) -> int | None:
    """Return the number of the hook that quantizes a model's input."""
    for number, hook in model._forward_pre_hooks.items():
        if isinstance(getattr(hook, "__self__", None), InputQuantizer):
            return number
    return None


def _set_quantizer(model: nn.Module, kind: str) -> None:
    """Quantize a model's input, by this quantizer alone. A hook leaves the names of the parameters as they are."""
    if (number := _hook_of(model)) is not None:
        del model._forward_pre_hooks[number]
    model.register_forward_pre_hook(InputQuantizer(kind).hook)
