"""Gradient projection memory: learn tasks in sequence without changing the outputs for inputs of earlier tasks.

Saha, Garg, Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021. The output of a layer y = W x for an
old input x does not change if the update dW has dW x = 0. After a task the server therefore keeps a basis M of most of
a layer's input space, and in later tasks every update is projected: dW (I - M M^T).

In a federation the basis must span the inputs of all clients, because the average of updates is orthogonal to them only
if each update is. The sum over clients of G = sum x x^T has that span (equations 5 to 9 need only G) and can be added
under secure aggregation. The server sends M to all clients. With `memory=local` each client projects by its own inputs
alone, for comparison. The inputs of layers after the first are those in each client's own network after the last round
of a task, not in the average that follows, so with several clients these layers are protected only approximately.
(Inputs at the round's global weights gave no better results in our measurements.)

Differences from the published code, which projects gradients and supports only plain SGD without biases:

- The update is projected after the optimizer's step. That is the same for plain SGD, and correct with momentum and
  weight decay.
- Biases: a 1 is appended to the layer's inputs and [W | b] is projected (`bias=append`), or biases are frozen after the
  first task (`bias=freeze`). All other parameters (of normalization layers, embeddings, and layers that
  `client.plugins.layers` does not find) and the statistics of BatchNorm are frozen after the first task.
- `scaling`: Saha & Roy, "Continual Learning with Scaled Gradient Projection", AAAI 2023: dW (I - M diag(l) M^T), with
  importances l = (a + 1) s / (a s + max s) of a task's singular values s along M, added up over tasks, at most 1.

Privacy: G of the first layer contains the second moments of a client's raw images. With one client, or without secure
aggregation, the server learns them; for a client with few images they nearly determine the images. `first-layer=noise`
adds Gaussian noise whose standard deviation is `noise` times the largest contribution of one image.
`first-layer=skip` does not send G of the first layer, and freezes that layer after the first task. The G of other
layers are statistics of the data as well.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from client.plugins.layers import Site, grams, packed, rows_per_image, sites, unpacked
from tofu.data import LabeledImages
from tofu.errors import PayloadError
from tofu.plugins import (
    Export,
    Plugin,
    PluginState,
    RoundContext,
    RunRequirements,
    SumSpec,
    Weights,
    option,
    plugin_registry,
)
from tofu.privacy import normals
from tofu.rng import derive_generator
from tofu.secagg.masks import Stream, new_seed
from tofu.weights import under

_NOISE_REACH = 9.0  # deviations; `normals` has none beyond 8.6


@plugin_registry.register("gpm")
@dataclass
class GradientProjectionMemory(Plugin):
    """See the module. State (`broadcast`, or `state` where memory=local): "tasks", the number of tasks remembered; for
    every site "basis/SITE", orthonormal float32 [columns, k], and with scaling "importance/SITE", float32 [k]."""

    needs_task_boundaries: ClassVar[bool] = True
    order: ClassVar[int] = Plugin.PROJECTION
    why_inexact: ClassVar[str] = "an average of updates that each spare their own client's inputs spares nobody's"

    # fmt: off
    threshold: float = option(0.97, "fraction of the power of a layer's inputs that its memory must hold", gt=0, le=1)
    first_threshold: float = option(0.0, "the same of the first layer; 0: as threshold", ge=0, le=1)
    threshold_step: float = option(0.0, "added to the thresholds with every task", ge=0, le=0.1)
    rule: str = option("paper", "paper: reach the threshold; code: as published, one vector less after the first task", choices=("paper", "code"))  # noqa: E501
    samples: int = option(300, "images of a client that count for its memory of a task", ge=1, le=100_000)
    max_fraction: float = option(1.0, "largest fraction of a layer's input dimensions that may be kept", gt=0, le=1)
    memory: str = option("union", "union: of all clients' inputs; local: of the client's own", choices=("union", "local"))  # noqa: E501
    scaling: float = option(0.0, "a of scaled gradient projection (10 in the paper); 0 projects wholly", ge=0, le=1000)
    bias: str = option("append", "append: project them with their layer; freeze: after the first task", choices=("append", "freeze"))  # noqa: E501
    head: str = option("project", "project: as any layer; free: not at all, for tasks with rows of their own in it", choices=("project", "free"))  # noqa: E501
    first_layer: str = option("gram", "what is exported of it: gram, noise (with noise) or skip (nothing; frozen after the first task)", choices=("gram", "noise", "skip"))  # noqa: E501
    noise: float = option(0.5, "deviation of first-layer=noise, in the most that one image contributes", gt=0, le=1000)
    max_norm: float = option(100.0, "norm of an input row; longer ones are scaled to it, which bounds what is summed", gt=0, le=1e6)  # noqa: E501
    # fmt: on

    _sites: tuple[Site, ...] = field(default=(), init=False, repr=False)
    _projections: dict[str, "_Projection"] = field(default_factory=dict, init=False, repr=False)
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def averages_exactly(self) -> bool:
        return self.memory == "union"

    def incompatibility(self, run: RunRequirements) -> str:
        """Accept `memory=local`, although it protects only a client's own inputs."""
        return (
            super().incompatibility(run)
            if self.averages_exactly
            else super().incompatibility(RunRequirements(1, run.tasks))
        )

    def setup(self, model: nn.Module, context: RoundContext) -> nn.Module:
        super().setup(model, context)
        self._sites, self._projections, self._sums = (), {}, {}
        if context.task > 0:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.register_forward_pre_hook(_use_running_statistics)
        return model

    def declare_sums(self, model: nn.Module) -> Mapping[str, SumSpec]:
        context = self.context
        if not context.final or self.memory == "local":
            return {}
        shape, specs = context.shape, {}
        per_image = rows_per_image(model, *shape.chw)
        for site in self._remembered(model):
            size = self._size(site)
            contribution = per_image[site.name] * self._reach(site) ** 2
            bound = contribution * (self.samples + (_NOISE_REACH * self.noise if self._noisy(site) else 0))
            specs[site.name] = SumSpec((size * (size + 1) // 2,), bound * (1 + 1e-9))
        return specs

    def on_step(self, model: nn.Module, before: Weights, momenta: Mapping[str, Tensor]) -> None:
        if not self._memory.get("tasks"):
            return
        parameters = dict(model.named_parameters())
        free = before.keys() - self._project(model, parameters, before)
        if self.head == "free":
            head = self._all(model)[-1]
            free -= {head.weight, head.bias or head.weight}
        for name in free:
            parameters[name].copy_(before[name])

    def _project(self, model: nn.Module, parameters: Mapping[str, Tensor], before: Weights) -> set[str]:
        """Project the updates of all parameters with a basis in the memory; return the names of these parameters."""
        if not self._projections:
            self._projections = {
                s.name: _Projection.of(self._memory, s.name, self._size(s)).on(parameters[s.weight].device)
                for s in self._remembered(model)
            }
        done: set[str] = set()
        for site in self._remembered(model):
            rows, projection = slice(site.start, site.stop), self._projections[site.name]
            weight, old = parameters[site.weight][rows], before[site.weight][rows]
            step = (weight - old).flatten(1)
            with_bias = self._size(site) > site.columns
            if with_bias:
                assert site.bias is not None
                bias, old_bias = parameters[site.bias][rows], before[site.bias][rows]
                step = torch.cat([step, (bias - old_bias)[:, None]], dim=1)
                done.add(site.bias)
            step = projection(step)
            if with_bias:
                bias.copy_(old_bias + step[:, -1])
                step = step[:, :-1]
            weight.copy_(old + step.reshape(old.shape))
            done.add(site.weight)
        return done

    def on_task_end(self, model: nn.Module, data: LabeledImages, final: bool) -> None:
        context = self.context
        if not final:
            return
        generator = derive_generator(context.seed, context.round, context.client, self.name)
        chosen = torch.randperm(len(data), generator=generator)[: self.samples]
        full = grams(model, data.images[chosen], bias=self.bias == "append", max_norm=self.max_norm)
        remembered = {site.name: full[site.name] for site in self._remembered(model)}
        if self.memory == "local":
            self.state = self._remember(remembered, self.state)
            self._projections = {}
            return
        shape = context.shape
        per_image = rows_per_image(model, *shape.chw)
        for site in self._remembered(model):
            triangle = packed(remembered[site.name])
            if self._noisy(site):
                deviation = self.noise * per_image[site.name] * self._reach(site) ** 2
                triangle += deviation * torch.from_numpy(normals(len(triangle), Stream(new_seed())))
            self._sums[site.name] = triangle

    def export(self) -> Export:
        """Return the Gram matrices' upper triangles, row by row;
        and the fraction of every layer's inputs that is frozen.
        """
        frozen = {
            f"frozen/{name}": basis.shape[1] / basis.shape[0]
            for name, basis in under(self._memory, "basis").items()
            if isinstance(basis, Tensor)
        }
        return Export(self._sums, frozen)

    def reduce(self, sums: Weights, examples: int, broadcast: PluginState) -> PluginState:
        return self._remember({name: unpacked(packed) for name, packed in sums.items()}, broadcast)

    def _remember(self, gram: Mapping[str, Tensor], memory: PluginState) -> PluginState:
        """Add a task to the memory, from every site's Gram matrix of its inputs (equations 5 to 9)."""
        assert self._sites, "declare_sums or on_task_end comes first"
        task = _tasks(memory)
        new: PluginState = {"tasks": task + 1}
        for name, total in gram.items():
            first = name == self._sites[0].name
            threshold = (first and self.first_threshold) or self.threshold
            threshold = min(1.0, threshold + task * self.threshold_step)
            old = memory.get(f"basis/{name}")
            basis = old.double() if isinstance(old, Tensor) else total.new_zeros(len(total), 0)
            less = int(self.rule == "code" and task == 0)
            wider = extend_basis(basis, total, threshold, max_columns=int(self.max_fraction * len(total)), less=less)
            new[f"basis/{name}"] = wider.float()
            if self.scaling:
                known = memory.get(f"importance/{name}")
                known = known.double() if isinstance(known, Tensor) else total.new_zeros(0)
                new[f"importance/{name}"] = importances(wider, total, known, self.scaling).float()
        return new

    @property
    def _memory(self) -> PluginState:
        return self.state if self.memory == "local" else self.broadcast

    def _all(self, model: nn.Module) -> tuple[Site, ...]:
        # Not in `setup`, because a later plugin may still change the model there.
        self._sites = self._sites or sites(model)
        return self._sites

    def _remembered(self, model: nn.Module) -> Iterable[Site]:
        every = self._all(model)
        return every[self.first_layer == "skip" : len(every) - (self.head == "free")]

    def _size(self, site: Site) -> int:
        return site.columns + (self.bias == "append" and site.bias is not None)

    def _noisy(self, site: Site) -> bool:
        return self.first_layer == "noise" and site is self._sites[0]

    def _reach(self, site: Site) -> float:
        """Largest norm of an input row; images are in [-1, 1], as is the 1 for the bias."""
        return min(self.max_norm, math.sqrt(self._size(site))) if self._noisy(site) else self.max_norm


def extend_basis(basis: Tensor, gram: Tensor, threshold: float, *, max_columns: int, less: int = 0) -> Tensor:
    """Return an orthonormal basis that also holds a new task's inputs.

    Args:
        basis: float64 [d, k], orthonormal, of the tasks so far.
        gram: float64 [d, d], the sum of x x^T over the task's inputs.
        threshold: fraction of the inputs' power (the trace) to hold; vectors are added, strongest first, until then.
        max_columns: maximum number of columns of the result.
        less: number of the new vectors to omit.

    Returns:
        float64 [d, k + added].
    """
    gram = (gram + gram.T) / 2
    residual = gram - basis @ (basis.T @ gram)
    residual = residual - (residual @ basis) @ basis.T
    values, vectors = torch.linalg.eigh((residual + residual.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    # With noisy Gram matrices, the power of the residual alone could be negative.
    held = (basis * (gram @ basis)).sum().clamp(min=0)
    power = held + values.sum()
    if power <= 0:
        return basis
    shares = (held + values.cumsum(0)) / power
    added = 0 if held / power >= threshold else int((shares < threshold - 1e-12).sum()) + 1
    added = max(0, min(added - less, max_columns - basis.shape[1], int((values > 1e-12 * values[0]).sum())))
    wider = torch.cat([basis, vectors[:, :added]], dim=1)
    return _orthonormal(wider) if added else basis


def importances(basis: Tensor, gram: Tensor, known: Tensor, alpha: float) -> Tensor:
    """Importance of each basis vector, float64 [k] in 0..1 (SGP, section 4): a new task's along the vectors that there
    were before adds to what was `known` of those."""
    strengths = (basis * (gram @ basis)).sum(0).clamp(min=0).sqrt()
    total = torch.cat([known, known.new_zeros(len(strengths) - len(known))])
    if len(strengths) == 0 or float(strengths.max()) == 0:
        return total
    return (total + (alpha + 1) * strengths / (alpha * strengths + strengths.max())).clamp(max=1)


@dataclass(frozen=True)
class _Projection:
    """dW -> dW (I - M M^T), computed with M or, if that takes less work, with a basis of its complement."""

    basis: Tensor
    importance: Tensor | None
    complement: bool

    @staticmethod
    def of(memory: PluginState, name: str, size: int) -> "_Projection":
        """Raises PayloadError if the memory has no basis of vectors of this size."""
        basis, importance = memory.get(f"basis/{name}"), memory.get(f"importance/{name}")
        if not (isinstance(basis, Tensor) and basis.dtype == torch.float32 and basis.dim() == 2 and len(basis) == size):
            raise PayloadError(f"memory of {name} is not a float32 basis of {size} dimensions")
        if isinstance(importance, Tensor):
            if importance.dtype != torch.float32 or importance.shape != basis.shape[1:]:
                raise PayloadError(
                    f"memory of {name} has importances {list(importance.shape)} of {basis.shape[1]} vectors"
                )
            return _Projection(basis, importance, False)
        rows, columns = basis.shape
        if 2 * columns <= rows:
            return _Projection(basis, None, False)
        full = torch.linalg.qr(basis.double(), mode="complete").Q
        return _Projection(full[:, columns:].float().contiguous(), None, True)

    def on(self, device: torch.device) -> "_Projection":
        importance = self.importance.to(device) if self.importance is not None else None
        return _Projection(self.basis.to(device), importance, self.complement)

    def __call__(self, step: Tensor) -> Tensor:
        along = step @ self.basis
        if self.importance is not None:
            along = along * self.importance
        return along @ self.basis.T if self.complement else step - along @ self.basis.T


def _orthonormal(basis: Tensor) -> Tensor:
    """Nearly orthonormal vectors, made orthonormal to the precision of float64, in their order."""
    q, r = torch.linalg.qr(basis)
    signed: Tensor = q * r.diagonal().sign()
    return signed


def _tasks(memory: PluginState) -> int:
    tasks = memory.get("tasks", 0)
    assert isinstance(tasks, int)
    return tasks


def _use_running_statistics(module: nn.Module, args: object) -> None:
    module.eval()
