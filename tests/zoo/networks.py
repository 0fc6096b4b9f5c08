"""Small networks of many kinds: `ACCEPTED` must work in every kind of round, `REFUSED` must be refused in one line."""

import random
import threading
import weakref
from collections.abc import Callable
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tofu.models.torchvision_compat import torchvision

Layer = Callable[[Tensor], Tensor]
HIDDEN = 24


class Flat(nn.Module):
    """A perceptron with one hidden layer; `middle` is applied to the hidden values [n, HIDDEN]."""

    def __init__(self, channels: int, height: int, width: int, classes: int, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(channels * height * width, HIDDEN), nn.Linear(HIDDEN, classes)
        self.middle = middle or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.out(self.middle(self.into(images.flatten(1))))
        return result


class Conv(nn.Module):
    """A convolution, `middle` on its maps [n, 8, h, w], the mean over positions, and a linear layer."""

    def __init__(self, channels: int, height: int, width: int, classes: int, middle: nn.Module) -> None:
        super().__init__()
        self.into, self.middle, self.out = nn.Conv2d(channels, 8, 3, padding=1), middle, nn.LazyLinear(classes)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.out(self.middle(self.into(images)).flatten(2).mean(2))
        return result


class Do(nn.Module):
    """A function as a module; it receives the module's training mode, too."""

    def __init__(self, function: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.training)


class Sequence(nn.Module):
    """A network over the rows of an image [n, height, channels * width]; the last output is classified."""

    def __init__(self, channels: int, height: int, width: int, classes: int, body: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.into, self.body, self.out = nn.Linear(channels * width, 16), body(16), nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.body(self.into(images.transpose(1, 2).flatten(2)))
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        result: Tensor = self.out(outputs[:, -1])
        return result


class SelfAttention(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


class Buffers(nn.Module):
    """Buffers of every type that training does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((HIDDEN,), float("-inf")))
        self.register_buffer("keep", torch.ones(HIDDEN, dtype=torch.bool))
        self.register_buffer("bfloat16s", torch.ones(HIDDEN, dtype=torch.bfloat16))
        self.register_buffer("table", torch.ones(HIDDEN, dtype=torch.complex64))
        self.register_buffer("large", torch.tensor(2**40))
        self.register_buffer("float64s", torch.ones(HIDDEN, dtype=torch.float64))
        self.register_buffer("positions", torch.randn(500, HIDDEN))
        self.register_buffer("missing", torch.tensor(float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.mask) * self.keep * self.bfloat16s.float() + self.positions[:3].sum(0)


class Changing(nn.Module):
    """A buffer of a given type that every training step changes by `step`."""

    def __init__(self, start: Tensor, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("state", start)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.state.copy_(self.step(self.state))
        return x


class Extra(nn.Module):
    """Parameters without a gradient: never used, or used in training only."""

    def __init__(self, only_in_training: bool) -> None:
        super().__init__()
        self.extra, self.only_in_training = nn.Linear(HIDDEN, HIDDEN), only_in_training

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.extra(x) if self.training and self.only_in_training else x
        return result


class Experts(nn.Module):
    """A hard mixture: an expert that no image chooses has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(HIDDEN, 4), nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        choice = self.gate(x).argmax(1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = choice == number
            if bool(rows.any()):
                out = out.index_put((rows,), expert(x[rows]))
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.tanh(self.first(x)))
        return result


class Drawn(nn.Module):
    """A parameter whose initial values come from a global generator that torch does not seed."""

    def __init__(self, draw: Callable[[], float], trainable: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([draw() for _ in range(HIDDEN)]), requires_grad=trainable)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Unpooled(nn.Module):
    """Max-pooling with indices, and its inverse."""

    def forward(self, x: Tensor) -> Tensor:
        pooled, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(pooled, indices, 2)


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return torch.relu(x)


class Frozen(nn.Module):
    """BatchNorm whose statistics never change, as in fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x)
        return result


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(F.relu(self.a(x), inplace=True)), inplace=True)


class Pixels(nn.Module):
    """Pixels as indices of an embedding: no gradient reaches the images."""

    def __init__(self, channels: int, height: int, width: int, classes: int, sparse: bool = False) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(16, 8, sparse=sparse), nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        indices = ((images.flatten(1) + 1) * 7.5).round().long().clamp(0, 15)
        result: Tensor = self.out(self.table(indices).mean(1))
        return result


class Pair(Flat):
    """A network with an auxiliary output in training mode, as Inception's."""

    def forward(self, images: Tensor) -> Any:
        out = super().forward(images)
        return (out, out) if self.training else out


class Wrapped(Flat):
    def forward(self, images: Tensor) -> Any:
        return {"logits": super().forward(images)}


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x.unsqueeze(1))).mean(1)


def _flat(make: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    return lambda **shape: Flat(**shape, middle=make())


def _conv(make: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    return lambda **shape: Conv(**shape, middle=make())


def _rows(body: Callable[[int], nn.Module]) -> Callable[..., nn.Module]:
    return lambda **shape: Sequence(**shape, body=body)


def _do(function: Callable[[Tensor, bool], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Do(function)


def _halved(x: Tensor, keep: bool) -> Tensor:
    return x if keep else 0.5 * x


_ON_HIDDEN: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "relu_in_place": partial(nn.ReLU, inplace=True), "leaky_relu": nn.LeakyReLU, "elu": nn.ELU,
    "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "softplus": nn.Softplus,
    "hardswish": nn.Hardswish, "relu6": nn.ReLU6, "prelu": nn.PReLU, "mish": nn.Mish, "celu": nn.CELU,
    "threshold": partial(nn.Threshold, 0.1, 0.0),
    "relu_function": _do(lambda x, _: F.relu(x)), "relu_method": _do(lambda x, _: x.relu()),
    "clamp": _do(lambda x, _: x.clamp(min=0)), "maxout": _do(lambda x, _: torch.cat(x.chunk(2, 1), 1).abs()),
    "batch_norm_1d": partial(nn.BatchNorm1d, HIDDEN), "layer_norm": partial(nn.LayerNorm, HIDDEN),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(HIDDEN, HIDDEN)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(HIDDEN, HIDDEN)),
    "dropout": partial(nn.Dropout, 0.3), "alpha_dropout": partial(nn.AlphaDropout, 0.2),
    "feature_alpha_dropout": partial(nn.FeatureAlphaDropout, 0.2), "rrelu": nn.RReLU,
    "drop_path_torch": _do(lambda x, training: _halved(x, not training or bool(torch.rand(()) < 0.5))),
    "drop_path_numpy": _do(lambda x, training: _halved(x, not training or np.random.rand() < 0.5)),
    "drop_path_python": _do(lambda x, training: _halved(x, not training or random.random() < 0.5)),
    "stochastic_depth": partial(torchvision.ops.StochasticDepth, 0.5, "row"),
    "noise_in_training": _do(lambda x, training: x + 0.1 * torch.randn_like(x) if training else x),
    "noise_always": _do(lambda x, _: x + 0.1 * torch.randn_like(x)),
    "gumbel_softmax": _do(lambda x, _: F.gumbel_softmax(x)),
    "unused": partial(Extra, False), "only_in_training": partial(Extra, True), "experts": Experts, "tied": Tied,
    "frozen": lambda: nn.Linear(HIDDEN, HIDDEN).requires_grad_(False), "lazy": partial(nn.LazyLinear, HIDDEN),
    "constant_buffers": Buffers,
    "counter": lambda: Changing(torch.tensor(0), lambda n: n + 1),
    "average": lambda: Changing(torch.ones(3), lambda value: 0.9 * value),
    "half_average": lambda: Changing(torch.ones(3, dtype=torch.bfloat16), lambda value: 0.9 * value),
    "drawn_by_numpy": partial(Drawn, np.random.randn), "drawn_by_python": partial(Drawn, random.random),
    "drawn_and_frozen": partial(Drawn, random.random, False),
    "checkpointed": _do(lambda x, _: checkpoint(torch.tanh, x, use_reentrant=False)),
    "lock": Locked, "fft": _do(lambda x, _: torch.fft.rfft(x, n=2 * HIDDEN - 2, norm="ortho").abs()),
    "einsum": _do(lambda x, _: torch.einsum("ni,nj->ni", x, x.softmax(1))),
}  # fmt: skip
_ON_MAPS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": partial(nn.BatchNorm2d, 8), "batch_norm_cumulative": partial(nn.BatchNorm2d, 8, momentum=None),
    "batch_norm_plain": partial(nn.BatchNorm2d, 8, affine=False),
    "batch_norm_of_batch": partial(nn.BatchNorm2d, 8, track_running_stats=False), "batch_norm_frozen": Frozen,
    "group_norm": partial(nn.GroupNorm, 2, 8), "instance_norm": partial(nn.InstanceNorm2d, 8),
    "instance_norm_tracked": partial(nn.InstanceNorm2d, 8, affine=True, track_running_stats=True),
    "response_norm": partial(nn.LocalResponseNorm, 2), "dropout2d": partial(nn.Dropout2d, 0.3),
    "max_pool": partial(nn.MaxPool2d, 2), "max_pool_dilated": partial(nn.MaxPool2d, 3, 1, dilation=2),
    "max_pool_indices": Unpooled, "max_pool_adaptive": partial(nn.AdaptiveMaxPool2d, 3),
    "average_pool": partial(nn.AvgPool2d, 2), "lp_pool": partial(nn.LPPool2d, 2, 2),
    "fractional_pool": partial(nn.FractionalMaxPool2d, 2, output_size=3),
    "depthwise": partial(nn.Conv2d, 8, 8, 3, groups=8), "dilated": partial(nn.Conv2d, 8, 8, 3, dilation=2),
    "strided": partial(nn.Conv2d, 8, 8, 3, stride=2), "transposed": partial(nn.ConvTranspose2d, 8, 8, 2, stride=2),
    "volume": Volume, "residual": Residual, "upsampled": partial(nn.Upsample, scale_factor=2.0, mode="bilinear"),
    "pixel_shuffle": lambda: nn.PixelShuffle(2),
}  # fmt: skip
_ON_ROWS: dict[str, Callable[[int], nn.Module]] = {
    "rnn": lambda width: nn.RNN(width, 16, batch_first=True), "gru": lambda width: nn.GRU(width, 16, batch_first=True),
    "lstm": lambda width: nn.LSTM(width, 16, 2, batch_first=True, dropout=0.3),
    "attention": lambda width: SelfAttention(width, 0.0), "attention_dropout": lambda width: SelfAttention(width, 0.3),
    "transformer": lambda width: nn.TransformerEncoderLayer(width, 2, 32, dropout=0.2, batch_first=True),
}  # fmt: skip

ACCEPTED: dict[str, Callable[..., nn.Module]] = (
    {name: _flat(make) for name, make in _ON_HIDDEN.items()}
    | {name: _conv(make) for name, make in _ON_MAPS.items()}
    | {name: _rows(body) for name, body in _ON_ROWS.items()}
    | {"data_parallel": lambda **shape: nn.DataParallel(Flat(**shape)), "embedded_pixels": Pixels}
)


class Recurrent(nn.Module):
    """Adds the output of its last call, which is a Python attribute and no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.last is not None and self.last.shape == x.shape:
            x = x + 0.1 * self.last
        self.last = x.detach()
        return x


class Counting(nn.Module):
    """Counts its calls, or those in training mode."""

    calls = 0

    def __init__(self, only_in_training: bool = False) -> None:
        super().__init__()
        self.only_in_training = only_in_training

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training or not self.only_in_training
        return x * (1 + 0.01 * self.calls)


def _hooked(**shape: int) -> nn.Module:
    model = Flat(**shape)
    next(model.parameters()).register_hook(lambda gradient: 0.5 * gradient)
    model.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    return model


class Phased(nn.Module):
    """A table of complex numbers that is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phases", torch.polar(torch.ones(HIDDEN), torch.arange(float(HIDDEN))))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.phases).real


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.one(x)))  # type: ignore[no-any-return]


ACCEPTED |= {
    "hooked": _hooked, "complex_table": _flat(Phased), "one_layer_twice": _flat(Twice),
    "old_weight_norm": _flat(lambda: nn.utils.weight_norm(nn.Linear(HIDDEN, HIDDEN))),
}  # fmt: skip


class InPlace(Flat):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.mul_(2.0))


class CompiledFunction(nn.Module):
    @torch.compile
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def _compiled(**shape: int) -> nn.Module:
    """Compiled as a whole, in place, in part and in a function."""
    part: Any = torch.compile(nn.Linear(HIDDEN, HIDDEN))
    model = Flat(**shape, middle=nn.Sequential(part, CompiledFunction()))
    model.compile()
    whole: Any = torch.compile(model)
    return whole  # type: ignore[no-any-return]


class Expanded(nn.Module):
    """A parameter and a buffer whose elements share their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1).expand(HIDDEN))
        self.register_buffer("shift", torch.zeros(1).expand(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Noisy(nn.Module):
    """Adds noise in training from a generator of its own that nobody has seeded."""

    def __init__(self, generator: Any, draw: Callable[[Any], float]) -> None:
        super().__init__()
        self.generator, self.draw = generator, draw

    def forward(self, x: Tensor) -> Tensor:
        return x + self.draw(self.generator) if self.training else x


def _torch_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


ACCEPTED |= {
    "own_numpy_generator": _flat(lambda: Noisy(np.random.default_rng(), lambda g: g.normal())),
    "own_numpy_state": _flat(lambda: Noisy(np.random.RandomState(), lambda g: g.normal())),
    "own_python_generator": _flat(lambda: Noisy(random.Random(), lambda g: g.random())),
    "own_torch_generator": _flat(lambda: Noisy(_torch_generator(), lambda g: float(torch.rand((), generator=g)))),
}  # fmt: skip
_UNKNOWN_TO_MODULES = np.random.default_rng()
_DEPTHS = count(1)


class Teacher(nn.Module):
    """A moving average of a layer's weights as frozen parameters, updated when `when` is told the layer and itself."""

    def __init__(self, when: Callable[[nn.Linear, nn.Linear], object] | None = None) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)
        if when is not None:
            when(self.student, self.teacher)
        self.in_forward = when is None

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.in_forward:
            _average(self.student, self.teacher)
        result: Tensor = self.student(x) if self.training else self.teacher(x)
        return result


@torch.no_grad()
def _average(student: nn.Linear, teacher: nn.Linear) -> None:
    teacher.weight.mul_(0.9).add_(student.weight, alpha=0.1)


def _after_backward(student: nn.Linear, teacher: nn.Linear) -> None:
    student.weight.register_post_accumulate_grad_hook(lambda _: _average(student, teacher))


class Shared(nn.Module):
    """A parameter whose memory is also that of `other`."""

    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HIDDEN))
        shared = other(self.scale.data)
        if isinstance(shared, nn.Parameter):
            self.other = shared
        else:
            self.register_buffer("other", shared)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Packed(nn.Module):
    """A recurrent layer over packed sequences of different lengths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 4 + torch.arange(len(x)) % (x.shape[1] - 3)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        result: Tensor = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], True, total_length=x.shape[1])[0]
        return result


class ParameterLists(nn.Module):
    """Parameters in a list and a dict with names of other scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(HIDDEN) for _ in range(2)])
        self.shifts = nn.ParameterDict({"a b": torch.zeros(HIDDEN), "\u00e9": torch.zeros(HIDDEN)})

    def forward(self, x: Tensor) -> Tensor:
        for scale, shift in zip(self.scales, self.shifts.values(), strict=True):
            x = torch.tanh(x * scale + shift)
        return x


def _tensor_of_a_class(**shape: int) -> nn.Module:
    """Return a network whose outputs are of a class of tensors that every build makes anew."""
    kind = type("Logits", (Tensor,), {})
    return nn.Sequential(Flat(**shape), Do(lambda x, _: x.as_subclass(kind)))


def _gradients_off(**shape: int) -> nn.Module:
    torch.set_grad_enabled(False)
    return Flat(**shape)


ACCEPTED |= {
    "half_outputs": lambda **shape: nn.Sequential(Flat(**shape), Do(lambda x, _: x.half())),
    "packed": _rows(Packed), "parameter_lists": _flat(ParameterLists), "gradients_off": _gradients_off,
    "tensor_of_a_class": _tensor_of_a_class,
    "dropout_in_place": _flat(partial(nn.Dropout, 0.3, inplace=True)),
}  # fmt: skip


class Scaled(nn.Module):
    def __init__(self, scale: nn.Parameter) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Listed(nn.Module):
    """A tensor that is neither a parameter nor a buffer, from a generator that nobody seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = [torch.tensor(_UNKNOWN_TO_MODULES.normal(size=HIDDEN), dtype=torch.float32)]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.tensors[0]


class Unstored(nn.Module):
    """A buffer that training changes and that is not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.state *= 0.9
        return x * self.state


class Buffered(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.table.is_meta else torch.mm(self.table, x.T).T


class WeakParent(nn.Module):
    """A layer that reads a parameter of its parent through a weak reference, which copies share."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HIDDEN))
        self.parent = weakref.ref(self)

    def forward(self, x: Tensor) -> Tensor:
        parent = self.parent()
        assert parent is not None
        return x * parent.scale


class Recalled(nn.Module):
    """A mask of the size of the first batch."""

    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.mask = torch.full_like(x, 0.5) if self.mask is None else self.mask
        return x * self.mask


class Grown(nn.Module):
    """A table with one row for each example of the largest batch so far."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) < len(x):
            self.table = torch.ones_like(x)
        return x * self.table[: len(x)]


class Slotted(nn.Module):
    """An attribute that a copy lacks, because modules are copied by their dictionaries."""

    __slots__ = ("factor",)

    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class NotCopied(nn.Module):
    def __deepcopy__(self, memo: object) -> "NotCopied":
        raise NotImplementedError("no copies of this")

    def forward(self, x: Tensor) -> Tensor:
        return x


def _replaced_forward(**shape: int) -> nn.Module:
    """A function in place of a method: a copy of the model would call the layers of the original."""
    model = Flat(**shape)
    original = model.forward
    model.forward = lambda images: 2 * original(images)  # type: ignore[method-assign]
    return model


class Modes(Flat):
    """`train` and `eval` of a module that call `switch` with the module and the mode."""

    def __init__(self, switch: Callable[[nn.Module, bool], object], **shape: int) -> None:
        super().__init__(**shape)
        self.switch = switch

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        return self.switch(self, mode) or self


class NoMode(Flat):
    def train(self) -> Any:  # type: ignore[override]
        return super().train(True)


class Selected(Flat):
    def parameters(self, recurse: bool = True) -> Any:
        return self.out.parameters(recurse)


class Nested(Flat):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"model": super().state_dict(*args, **kwargs)}


def _double_by_default(**shape: int) -> nn.Module:
    torch.set_default_dtype(torch.float64)
    return Flat(**shape)


_MODULE_LAYER = nn.Linear(HIDDEN, HIDDEN)
_MODULE_PARAMETER = nn.Parameter(torch.ones(HIDDEN))
_ONE_MODEL = cache(lambda **shape: Flat(**shape))

ACCEPTED |= {"compiled": _compiled, "expanded": _flat(Expanded), "sparse_embedding": partial(Pixels, sparse=True)}

REFUSED: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "auxiliary_output": (Pair, "in training mode"),
    "inputs_in_place": (InPlace, "does not change its inputs in place"),
    "dictionary": (Wrapped, "found dict"),
    "scripted": (lambda **shape: torch.jit.script(Flat(**shape)), "torch.jit"),  # type: ignore[no-untyped-call]
    "changing_bool": (_flat(lambda: Changing(torch.tensor(True), torch.logical_not)), "middle.state of type bool"),
    "changing_double": (
        _flat(lambda: Changing(torch.ones(1, dtype=torch.float64), lambda v: 0.9 * v)), "middle.state of type float64",
    ),
    "changing_complex": (
        _flat(lambda: Changing(torch.ones(1, dtype=torch.complex64), lambda v: 0.9 * v)), "of type complex64",
    ),
    "large_counter": (_flat(lambda: Changing(torch.tensor(2**30), lambda n: n + 1)), "value 1073741824"),
    "double": (lambda **shape: Flat(**shape, middle=nn.Linear(HIDDEN, HIDDEN)).double(), "must have the same dtype"),
    "recurrent": (_flat(Recurrent), "two equal passes in evaluation mode have different outputs"),
    "counting": (_flat(Counting), "two equal passes in evaluation mode have different outputs"),
    "counting_in_training": (_flat(lambda: Counting(only_in_training=True)), "in training mode have different outputs"),
    "hidden_generator": (
        _flat(lambda: Noisy(None, lambda _: float(_UNKNOWN_TO_MODULES.normal()))), "two equal passes in training mode",
    ),
    "observed": (
        _flat(lambda: FakeQuantize.with_args(observer=MovingAverageMinMaxObserver)()),  # type: ignore[no-untyped-call]
        "buffers do not change in evaluation mode (middle.scale does)",
    ),
    "teacher": (_flat(Teacher), "frozen parameters do not change in training (middle.teacher.weight does)"),
    "buffer_of_a_parameter": (_flat(lambda: Shared(lambda w: w)), "middle.other and middle.scale do"),
    "tied_by_memory": (_flat(lambda: Shared(lambda w: nn.Parameter(w[3:]))), "middle.scale and middle.other do"),
    "nothing_to_train": (lambda **shape: Flat(**shape).requires_grad_(False), "at least one trainable parameter"),
    "too_few_outputs": (lambda classes, **shape: Flat(**shape, classes=classes - 1), "[2, 10]"),
    "one_model": (_ONE_MODEL, "two calls return the same Flat"),
    "layer_of_a_file": (_flat(lambda: _MODULE_LAYER), "two calls return the same middle"),
    "parameter_of_a_file": (_flat(lambda: Scaled(_MODULE_PARAMETER)), "two calls return the same middle.scale"),
    "unseeded_depth": (
        _flat(lambda: nn.Sequential(*[nn.Linear(HIDDEN, HIDDEN) for _ in range(next(_DEPTHS))])), "only one of two has",
    ),
    "unseeded_parameter": (
        _flat(lambda: Drawn(lambda: float(_UNKNOWN_TO_MODULES.normal()))), "middle.scale differs between two calls",
    ),
    "unseeded_tensor": (_flat(Listed), "the outputs differ between two calls"),
    "not_copied": (_flat(NotCopied), "deepcopy can copy (NotImplementedError: no copies of this, at networks.py line "),
    "train_returns_another": (partial(Modes, lambda model, _: model.out), "(found another object)"),
    "train_takes_no_mode": (NoMode, "train(mode) and eval() return the model, as torch's do (found TypeError: "),
    "frozen_in_one_mode": (
        partial(Modes, lambda model, mode: model.into.requires_grad_(mode) and None),
        "same trainable parameters in both modes (into.bias is trainable in one)",
    ),
    "weak_parent": (_flat(WeakParent), "methods, not functions or weak references that refer to layers"),
    "sparse_buffer": (_flat(lambda: Buffered(torch.eye(HIDDEN).to_sparse())), "middle.table is sparse: torch.sparse_"),
    "meta_buffer": (_flat(lambda: Buffered(torch.ones(3, device="meta"))), "middle.table has no values"),
    "built_in_inference_mode": (
        torch.inference_mode()(lambda **shape: Flat(**shape)), "into.weight was made in inference mode",
    ),
    "mask_of_the_first_batch": (_flat(Recalled), "takes batches of any size (of 3: RuntimeError: The size of tensor a"),
    "table_of_the_largest_batch": (_flat(Grown), "(of 3: buffer middle.table has another shape then)"),
    "two_examples_only": (_flat(_do(lambda x, _: x[:2] + x[2:].sum())), "(of 3: the output has the shape [2, 10]"),
    "squeezed": (lambda **shape: nn.Sequential(Flat(**shape), Do(lambda x, _: x.squeeze())), "(of 1: the output has"),
    "buffer_that_is_not_stored": (_flat(Unstored), "if training changes them (middle.state is not)"),
    "selected_parameters": (Selected, "have all parameters by name (into.weight is missing)"),
    "nested_state_dict": (Nested, "have all parameters by name (into.weight is missing)"),
    "slots": (_flat(Slotted), "copy.deepcopy can copy: its copy fails (AttributeError: "),
    "replaced_forward": (_replaced_forward, "methods, not functions or weak references that refer to layers"),
    "double_by_default": (_double_by_default, "must have the same dtype"),
    "no_module": (lambda **_: 5, "torch.nn.Module"),  # type: ignore[dict-item, return-value]
}  # fmt: skip
"""Name -> (factory, a part of the error message)."""


class Late(nn.Module):
    """A buffer that training changes from its fifth pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(1))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        return x + self.state.add_(1.0) if self.passes > 4 else x


def _by_thread() -> float:
    """A number that differs between the threads of the server and of the clients, as between machines."""
    return 0.5 if threading.current_thread() is threading.main_thread() else 0.7


class Attributes(nn.Module):
    """A Python attribute that the forward pass reads by `read`, and others that differ but that it does not read."""

    def __init__(self, value: Any, read: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.value, self.read = value, read
        self.began, self.place, self.unread = _by_thread(), f"/machine/{_by_thread()}", torch.full((3,), _by_thread())

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x, self.value)


class ZeroHead(Flat):
    """The last layer is zero, so that outputs show nothing of the others at the initial weights."""

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        nn.init.zeros_(self.out.weight)


_MACHINE: dict[str, Callable[..., nn.Module]] = {
    "number": _flat(lambda: Attributes(_by_thread(), lambda x, scale: scale * x)),
    "behind_zeros": lambda **shape: ZeroHead(**shape, middle=Attributes(_by_thread(), lambda x, scale: scale * x)),
    "list": _flat(
        lambda: Attributes([1.0, _by_thread()], lambda x, table: torch.cat([x[:, :4] * table[1], x[:, 4:]], 1))
    ),
    "arrays": _flat(
        lambda: Attributes({"a": np.full(HIDDEN, _by_thread(), np.float32)}, lambda x, t: x + torch.tensor(t["a"]))
    ),
    "word": _flat(lambda: Attributes("relu" if _by_thread() < 0.6 else "gelu", lambda x, name: getattr(F, name)(x))),
    "closure": _flat(lambda: Do(partial(lambda scale, x, _: x.abs() ** scale, _by_thread()))),
    "dropout": _flat(lambda: nn.Dropout(_by_thread())),
    "training_only": _flat(lambda: Do(partial(lambda scale, x, training: scale * x if training else x, _by_thread()))),
    "norm": _conv(lambda: nn.GroupNorm(2 if _by_thread() < 0.6 else 4, 8)),
}
MACHINE: dict[str, Callable[..., nn.Module]] = {f"machine_{name}": make for name, make in _MACHINE.items()}
"""Networks that compute something else in the clients than in the server, from equal weights."""


def _frozen_by_thread() -> nn.Module:
    return Drawn(_by_thread, trainable=False)


SPECIAL: dict[str, Callable[..., nn.Module]] = {
    "reentrant": _flat(_do(lambda x, _: checkpoint(torch.tanh, x, use_reentrant=True))),
    "late_buffer": _flat(Late),
    "late_teacher": _flat(lambda: Teacher(_after_backward)),
    "frozen_by_thread": _flat(_frozen_by_thread),
    "unread_by_thread": _flat(lambda: Attributes(None, lambda x, _: x)),
} | MACHINE


def __getattr__(name: str) -> Callable[..., nn.Module]:
    """The factories by name, as `--model tests.zoo.networks:NAME` finds them."""
    if name in ACCEPTED:
        return ACCEPTED[name]
    if name in REFUSED:
        return REFUSED[name][0]
    if name in SPECIAL:
        return SPECIAL[name]
    raise AttributeError(name)
