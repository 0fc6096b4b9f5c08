"""Codes updates between client and server of a compressed Flower app.

A Flower app keeps its weights in an `ArrayRecord`. The codec handles them as a `ReferenceModel`: the user's model, or a
module with the arrays as its parameters, which is enough for compressors that do not differentiate through the model.
"""

import copy
import dataclasses
import hashlib
import inspect
import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from types import CodeType
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tofu.arguments import CALLS, check_call, check_calls, check_kind, check_number, check_options
from tofu.codec.options import DEFAULTS, CompressorOptions, ProxySettings
from tofu.compression import compressors, make_compressor
from tofu.compression.base import Compressor
from tofu.errors import PayloadError, SettingError
from tofu.flower.agreement import arguments_text, plain_number, under
from tofu.flower.secure_options import SecureOptions
from tofu.models.behavior import OUTPUT_BYTES, check_outputs, output_sketch
from tofu.models.checks import drop_constant_buffers
from tofu.recording import AppCodec
from tofu.reference_model import (
    LOG,
    NEEDS_CALL,
    Forward,
    InputShape,
    Loss,
    ModelCall,
    ReferenceModel,
    Shape,
    resolve_compressor,
)
from tofu.settings import python_call
from tofu.weights import (
    FINGERPRINT_BYTES,
    ParamSpec,
    Weights,
    added,
    base_fingerprint,
    difference,
    has_differences,
    in_float32,
    load_weights,
)
from tofu.wire import HEADER_BYTES, Payload, read_payload

RECORD = "tofu"
"""Key of the `ConfigRecord` that the strategy adds to a train message, and the mod to its reply."""

VERSION = 2

_BUFFERS = ("running_mean", "running_var")
"""Names of floating-point arrays that are no parameters, in messages of which no model is known."""

_SHRUNK = 0.3
"""Norm of the new weights relative to the old ones below which an app's reply is taken for differences."""


class UpdateCodec:
    """Codes the difference between two sets of arrays. Client and server must build it from equal arguments.

    Args:
        model: the app's network, or a function without arguments that builds it. Without it the codec sees only arrays,
            and every array counts as trainable.
        input_shape: shape of one example, without the batch, such as (3, 32, 32) or (features,), or a tuple of such
            shapes for several inputs; proxies need it.
        forward, loss, target_shape: how to call a model that cannot simply be called, as for `tofu.encode`.
        compressor: a registered name or `package.module:Class`. By default `proxy`, or `sparse` where proxies are
            impossible: there is no model or input shape, or the model takes integers and there is no `forward`.
        ratio: float32 bytes of an update over the bytes of its payload.
        correction: smallest fraction of a proxy payload that is left to the sparse correction.
        proxies_below: the client searches for proxies only where the correction alone explains less than this fraction
            of its update; 1 always searches, as without error feedback.
        over_relaxation: factor on the decoded update, with proxies on the correction alone (docs/error-feedback.md); 0
            lets each message choose it. Without error feedback it is 1.
        downlink: float32 bytes of the weights over those of a compressed step, which the server sends to clients that
            hold the weights of an earlier round; 0 sends full weights to all clients.
        step_ahead: fraction of the residual that is added to the weights before local training; see
            docs/error-feedback.md.
        error_feedback: fraction of what compression lost that the client adds to its next update.
        differences: the app returns differences from the arrays that it received, or gradients, instead of new arrays.
            By default (None) replies that look like that are refused.
        seed: seed of the search for proxies.

    Raises:
        SettingError: an argument is out of range, or the compressor needs a model that is not given.
    """

    @python_call
    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module] | None = None,
        input_shape: InputShape | None = None,
        *,
        forward: Forward | None = None,
        loss: Loss | None = None,
        target_shape: Shape | None = None,
        compressor: str | None = None,
        ratio: float = 50.0,
        correction: float = 0.4,
        proxies_below: float = 0.33,
        over_relaxation: float = 0.0,
        downlink: float = 0.0,
        step_ahead: float = 0.5,
        error_feedback: float = 1.0,
        differences: bool | None = None,
        seed: int = 0,
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            check_call("model", model, CALLS["model"])
        check_calls({"forward": forward, "loss": loss})
        check_kind("compressor", compressor, str | None, "a name, such as 'topk', or 'package.module:Class'")
        check_kind("seed", seed, Integral, "a whole number")
        if compressor is not None:
            compressors.get(compressor)
        if compressor in NEEDS_CALL and (model is None or input_shape is None):
            raise SettingError("compressor", compressor, "model and input_shape to be given, or compressor=sparse")
        for name, value, low, high in (
            ("error_feedback", error_feedback, 0, 1), ("step_ahead", step_ahead, 0, 1),
            ("correction", correction, 0, 1), ("proxies_below", proxies_below, 0, 1),
            ("over_relaxation", 1 if over_relaxation == 0 else over_relaxation, 1, 2), ("ratio", ratio, 1, 1e6),
            ("downlink", 1 if downlink == 0 else downlink, 1, 1e6),
        ):  # fmt: skip
            check_number(name, value, low, high)
        self._model, self._shape, self._ratio = model, input_shape, plain_number(ratio)
        self._compressor, self._correction = compressor, plain_number(correction)
        self._proxies_below, self._over_relaxation = plain_number(proxies_below), plain_number(over_relaxation)
        self._call = {"forward": forward, "loss": loss, "target_shape": target_shape}
        self.downlink = plain_number(downlink)
        self.joint: SecureOptions | None = None
        """Further options that client and server must share: those of the secure rounds of `tofu.hybrid`."""
        self.error_feedback, self.step_ahead, self.seed = plain_number(error_feedback), plain_number(step_ahead), seed
        self.differences = differences
        self._noted = False

    @property
    def has_model(self) -> bool:
        """Whether the app's model is given, so that its buffers are known."""
        return self._model is not None

    @cached_property
    def _resolved(self) -> tuple[str, ModelCall]:
        """The compressor's name, and how it calls the model, which is built for this at the first message."""
        return resolve_compressor(self._compressor, self._built_once, self._shape, **self._call)

    @cached_property
    def _options(self) -> CompressorOptions:
        gain = self._over_relaxation if self.error_feedback else 1.0
        if self._resolved[0] != "proxy":
            return dataclasses.replace(DEFAULTS, gain=gain)
        encoder = ProxySettings(bits=4, warm_start=False)
        below = self._proxies_below if self.error_feedback else 1.0
        return CompressorOptions(
            correction=self._correction, correction_gain=gain, proxies_below=below, encoder=encoder
        )

    @property
    def digest(self) -> bytes:
        """Identifies the arguments that client and server must share, in 8 bytes.

        `forward` and `loss` count by their names and by the names, texts and floating-point numbers in their code,
        which do not depend on the version of Python.
        """
        options = dataclasses.asdict(self._options)
        name, call = self._resolved
        functions = [_function_identity(f) for f in (call.forward, call.loss) if f]
        joint = self.joint.digest.hex() if self.joint else ""
        shared = [VERSION, name, self._ratio, self.downlink, call.inputs, call.target, functions, options, joint]
        shared += [bool(self.differences), self.error_feedback, self.step_ahead]
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).digest()[:FINGERPRINT_BYTES]

    @property
    def text(self) -> str:
        """The arguments that both ends must share and that are not defaults, for error messages."""
        name, call = self._resolved
        functions = {key: _function_text(f) for key, f in (("forward", call.forward), ("loss", call.loss)) if f}
        given: dict[str, object] = {
            "compressor": name, "input_shape": call.inputs, "target_shape": call.target, **functions,
            "ratio": self._ratio, "downlink": self.downlink, "differences": bool(self.differences),
            "correction": self._correction, "proxies_below": self._proxies_below,
            "over_relaxation": self._over_relaxation, "error_feedback": self.error_feedback,
            "step_ahead": self.step_ahead,
        }  # fmt: skip
        given |= {"secure": "given", **under("secure", vars(self.joint))} if self.joint else {}
        return arguments_text(given, self.defaults())

    @staticmethod
    def defaults() -> dict[str, object]:
        """Name -> default of each argument in `text`."""
        given = {name: p.default for name, p in inspect.signature(UpdateCodec).parameters.items()}
        given |= {"input_shape": (), "target_shape": (), "differences": False}
        return given | under("secure", SecureOptions.defaults())

    @property
    def arguments(self) -> AppCodec:
        """The arguments for a recording.

        Raises:
            SettingError: the codec has code of the user, which recordings do not contain.
        """
        name = self._resolved[0]
        if any(value is not None for value in self._call.values()) or ":" in name:
            raise SettingError("compressor", name, "a registered one, and no forward or loss, for recordings")
        return AppCodec(name, self._ratio, self._correction, self._over_relaxation)

    def reference(self, arrays: Mapping[str, Tensor]) -> "ArrayModel":
        """Return the app's model with these arrays as its weights.

        Raises:
            SettingError: the arrays are not those of the model, or the model does not accept the input shape.
        """
        if self._built_once is None and not any(value.is_floating_point() for value in arrays.values()):
            found = ", ".join(sorted({str(value.dtype) for value in arrays.values()})) or "none"
            raise SettingError("arrays", found, "floating-point numbers, whose differences can be compressed")
        call, model = self._resolved[1], self._built_once  # the first calls the model, which initializes lazy layers
        names = {} if model is None else _matched(arrays, model)
        if model is None:
            model, names = _bare(arrays)
        tied = _tied_names(model)
        for own, first in tied.items():
            if own in names and first not in names:
                names[first] = names.pop(own)
        model = _copy(model, names)
        load_weights(model, {own: arrays[name] for own, name in names.items() if own not in tied})
        drop_constant_buffers(model, frozenset(name for name, value in model.named_buffers() if has_differences(value)))
        reference = ReferenceModel(model.eval(), call)
        tied = {own: first for own, first in tied.items() if own in names}
        return ArrayModel(reference.param_spec, names, reference, tied=tied)

    def origin(self, base: Mapping[str, Tensor], returned: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """Return what the app's replies to `base` are relative to: `base`, or zeros if they are differences.

        Raises:
            PayloadError: `returned` looks like differences, and the user has not said what it is.
        """
        if self.differences:
            return {name: torch.zeros_like(value) for name, value in base.items()}
        if returned and self.differences is None:
            floats = [name for name, value in returned.items() if value.is_floating_point() and name in base]
            old, new = (_norm(arrays[name] for name in floats) for arrays in (base, returned))
            if new < _SHRUNK * old:
                raise PayloadError(
                    f"the app returned arrays of less than {_SHRUNK:.0%} of the norm of those that it received: pass "
                    "differences=True to both ends if they are differences or gradients, else differences=False"
                )
        return base

    def compressor(self, reference: ReferenceModel) -> Compressor:
        """Return the compressor for this model. Raises SettingError if it does not reach the ratio."""
        made = make_compressor(self._resolved[0], reference, ratio=self._ratio, options=self._options)
        content = made.describe()
        if content is not None and content.note and not self._noted:
            LOG.warning("%s", content.note)
            self._noted = True
        return made

    def step_compressor(self, reference: ReferenceModel) -> Compressor:
        """Return the compressor of the server's steps: proxies if updates are coded by them, otherwise sparse."""
        name = "proxy" if self._resolved[0] == "proxy" else "sparse"
        options = CompressorOptions(correction=self._correction, encoder=ProxySettings(bits=4, warm_start=False))
        return make_compressor(name, reference, ratio=self.downlink, options=options)

    def payload(
        self, compressor: Compressor, reference: ReferenceModel, body: bytes, round_: int, identity: bytes = b""
    ) -> bytes:
        """Return a body with a header that names compressor, round and the weights that the update is relative to.

        Args:
            identity: identity of these weights; by default their fingerprint.
        """
        return Payload(compressor.code, round_, identity or base_fingerprint(reference.model), body).to_bytes()

    def decode(self, reference: ReferenceModel, data: object, round_: int, identity: bytes = b"") -> Weights:
        """Decode a payload into an update, by the model's names.

        Args:
            identity: identity of the weights that it should be relative to; by default their fingerprint.

        Raises:
            PayloadError: the payload is damaged, of another round or compressor, or relative to other weights.
        """
        if not isinstance(data, bytes):
            raise PayloadError(f"payload is {type(data).__name__}, expected bytes")
        compressor = self.compressor(reference)
        limit = HEADER_BYTES + compressor.body_bytes(reference.param_spec)
        base = identity or base_fingerprint(reference.model)
        payload = read_payload(data, codec=compressor.code, round_=round_, fingerprint=base, max_bytes=limit)
        return compressor.decompress(reference, payload.body)

    @cached_property
    def _built_once(self) -> nn.Module | None:
        """The user's model, on the CPU and in float32; built only once, as that may load a pretrained network."""
        if self._model is None:
            return None
        model = copy.deepcopy(self._model).cpu() if isinstance(self._model, nn.Module) else self._model().cpu()
        return in_float32(model)


def codec_of(function: Callable[..., object], arguments: tuple[Any, ...], options: dict[str, Any]) -> UpdateCodec:
    """Return the codec for the arguments that a function passes on. Raises SettingError for unknown names."""
    check_options(options, UpdateCodec, function)
    return UpdateCodec(*arguments, **options)


@dataclass(frozen=True)
class ArrayNames:
    """The arrays of a message that are trained, with their names in the model.

    Attributes:
        param_spec: of what is trained.
        names: own name -> name of the array. Frozen parameters and buffers may be missing.
        tied: own name -> the own name of the parameter that it shares its values with.
    """

    param_spec: ParamSpec
    names: dict[str, str]
    tied: dict[str, str] = field(default_factory=dict, kw_only=True)

    @staticmethod
    def of(arrays: Mapping[str, Tensor]) -> "ArrayNames":
        """Return all arrays, by their own names: floating-point ones count as parameters, others as integer buffers."""
        floats = {name: value.shape for name, value in arrays.items() if value.is_floating_point()}
        others = {name: value.shape for name, value in arrays.items() if name not in floats}
        return ArrayNames(ParamSpec(floats, others, frozenset(others)), {name: name for name in arrays})

    def own(self, arrays: Mapping[str, Tensor]) -> Weights:
        """Return the trained arrays by their own names, float32; zeros for buffers that the app does not send."""
        shapes = self.param_spec.shapes.items()
        return {own: arrays[self.names[own]].float() if own in self.names else torch.zeros(s) for own, s in shapes}

    def update(self, base: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Weights:
        """new - base of all that is trained, by its own names; zero for arrays that the app does not return.

        Raises:
            PayloadError: the arrays differ in names or shapes, or one changed that the model does not train.
        """
        if not new or any(name not in base or base[name].shape != value.shape for name, value in new.items()):
            raise PayloadError("the app returned arrays of other names or shapes than it received")
        new = self._tied({**base, **new}) if len(new) < len(base) else new
        for own, name in self.names.items():
            expected = new[self.names[self.tied[own]]] if own in self.tied else base[name]
            if own not in self.param_spec.shapes and not new[name].equal(expected):
                raise PayloadError(f"the app changed array {name!r}, which the model declares as not trainable")
        update = difference(self.own(new), self.own(base))
        for own, name in self.names.items():
            if own in update and base[name].dtype != torch.float32:  # float32 holds neither int64 nor float64
                update[own] = _exact(new[name]).sub(_exact(base[name])).float()
        return update

    def replaced(self, arrays: Mapping[str, Tensor], weights: Weights) -> dict[str, Tensor]:
        """Return the arrays with the trained ones replaced by `weights`, in the arrays' types."""
        sent = {self.names[own]: value for own, value in weights.items() if own in self.names}
        return self._tied({**arrays, **{name: value.to(arrays[name].dtype) for name, value in sent.items()}})

    def _tied(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the arrays with the values of shared parameters under all of their names."""
        return arrays | {self.names[own]: arrays[self.names[first]] for own, first in self.tied.items()}

    def add(self, base: Mapping[str, Tensor], update: Weights) -> dict[str, Tensor]:
        """base + update, by the arrays' names; integers are rounded, buffers that the app does not send left out."""
        new = dict(base)
        for own, name in self.names.items():
            if own in update:
                change = update[own] if base[name].is_floating_point() else update[own].round()
                new[name] = added(name, _exact(base[name]), change.to(_exact(base[name]).dtype))
        return self._tied(new)


@dataclass(frozen=True)
class ArrayModel(ArrayNames):
    """A model whose weights are a message's arrays; the names are those of its state dict."""

    reference: ReferenceModel

    @cached_property
    def outputs(self) -> bytes:
        """`output_sketch` of the model; b"" without floating-point inputs."""
        return output_sketch(self.reference.model, self._outputs)

    def check_outputs(self, expected: object) -> None:
        """Raises SettingError if the model computes something else than the server's, whose `outputs` are given."""
        if isinstance(expected, bytes) and len(expected) == OUTPUT_BYTES:
            model = self.reference.model
            check_outputs(model, self._outputs, expected, type(model).__name__)

    def _outputs(self, model: nn.Module) -> object:
        call = self.reference.call
        inputs = [torch.randn(2, *shape, generator=torch.Generator()) for shape in call.inputs]
        try:
            return () if not inputs else call.forward(model, *inputs) if call.forward else model(*inputs)
        except Exception:  # of the user's code: an app may call its model in another way in training mode
            return ()


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """Return an `ArrayRecord` as detached CPU tensors by name, in its order.

    Raises:
        PayloadError: an array cannot be read.
    """
    for array in record.values():
        array_shape(array)
    try:
        return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}
    except (ValueError, TypeError) as error:  # numpy refuses the shape, or torch the type
        raise PayloadError(f"arrays cannot be read ({type(error).__name__})") from error


def array_shape(array: Array) -> tuple[int, ...]:
    """Return an array's shape, after a check that its bytes are as many numbers.

    Raises:
        PayloadError: they are not.
    """
    try:
        stream = io.BytesIO(array.data)
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        if array.stype != "numpy.ndarray" or math.prod(shape) * dtype.itemsize != len(array.data) - stream.tell():
            raise ValueError("other bytes than its header says")
    except Exception as error:  # numpy's parser has no list of what it raises
        raise PayloadError(f"arrays cannot be read ({type(error).__name__})") from error
    if dtype.kind not in "fiub" or not dtype.isnative:
        found = f"type {dtype.name[:40]}" if dtype.isnative else f"byte order of {dtype.str[:40]}"
        raise PayloadError(f"arrays cannot be read: their {found} is not usable, expected real numbers, native order")
    return tuple(shape)


def record_of(tensors: Mapping[str, Tensor], like: ArrayRecord | None = None) -> ArrayRecord:
    """Pack tensors as an `ArrayRecord`, with the names, order and types of `like` if it is given."""
    if like is None:
        return ArrayRecord({name: Array(value.numpy()) for name, value in tensors.items()})
    return ArrayRecord(
        {name: Array(tensors[name].numpy().astype(array.dtype, copy=False)) for name, array in like.items()}
    )


def _matched(arrays: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """State-dict name -> name of the array.

    Apps send the whole state dict, or less: what is trainable, or the adapters of a PEFT model, whose names lack the
    adapter's own. Arrays without such names are taken to be all of these in order.

    Raises:
        SettingError: names, number or shapes differ.
    """
    if any(map(is_lazy, model.parameters())):
        raise SettingError("model", "lazy layers without weights", "input_shape to be given, or a model called once")
    own, trainable = model.state_dict(), [name for name, p in model.named_parameters() if p.requires_grad]
    short = {_without_adapter(name, model): name for name in own}
    if arrays.keys() <= own.keys():
        names = {name: name for name in own if name in arrays}
    elif len(arrays) == len(own):
        names = dict(zip(own, arrays, strict=True))
    elif arrays.keys() <= short.keys():
        names = {name: array for array, name in short.items() if array in arrays}
    elif len(arrays) == len(trainable):
        names = dict(zip(trainable, arrays, strict=True))
    else:
        odd = min(arrays.keys() ^ own.keys())
        expected = f"the {len(arrays)} of the message ({odd!r} is on one side)"
        raise SettingError("model", f"{len(own)} arrays, {len(trainable)} trainable", expected)
    missing = set(trainable) - names.keys() - {_tied_names(model).get(name) for name in names}
    if missing:
        raise SettingError("model", f"trainable {min(missing)}", "every trainable parameter to be in the message")
    for name, array in names.items():
        if own[name].shape != arrays[array].shape:
            found, other = list(own[name].shape), list(arrays[array].shape)
            raise SettingError("model", f"{name} of shape {found}", f"{other}, as array {array!r} of the message")
    return names


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Return the name of a parameter that occurs under several -> the first of these."""
    first: dict[int, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first.setdefault(id(p), name) != name}


def _exact(values: Tensor) -> Tensor:
    """Return the values in a type that holds their differences:
    int64, float64, or float32 for smaller floating-point types.
    """
    if not values.is_floating_point():
        return values.to(torch.int64)
    return values if values.dtype == torch.float64 else values.float()


def _function_identity(function: Callable[..., object]) -> list[object]:
    """Return a function's name and what its code refers to; a callable object's class alone."""
    code = getattr(function, "__code__", None)
    if code is None:
        return [type(function).__qualname__]
    return [function.__qualname__, *_references(code, function.__doc__)]


def _function_text(function: Callable[..., object]) -> str:
    """Return a function's name and a digest of its identity, which differs where the digest of the arguments does."""
    identity = json.dumps(_function_identity(function)).encode()
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name.rpartition('.')[2]} ({hashlib.sha256(identity).hexdigest()[:6]})"


def _references(code: CodeType, doc: str | None = None) -> list[object]:
    """Return names, texts and floating-point numbers in a function's code and those within it,
    but not its docstring.
    """
    inner = [_references(value) for value in code.co_consts if isinstance(value, CodeType)]
    values = sorted(repr(value) for value in code.co_consts if isinstance(value, str | float) and value != doc)
    return [code.co_argcount, sorted(code.co_names), values, inner]


def _without_adapter(name: str, model: nn.Module) -> str:
    """Return a PEFT model's state-dict name as `get_peft_model_state_dict` gives it; other names are unchanged."""
    for adapter in getattr(model, "peft_config", ()):
        name = f"{name}.".replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".")[:-1]
    return name


def _norm(values: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values))


def _copy(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Return a copy of the model that shares the frozen parameters which are not in `names`,
    because nothing changes them.
    """
    frozen = [p for name, p in model.named_parameters() if not p.requires_grad and name not in names]
    return copy.deepcopy(model, {id(parameter): parameter for parameter in frozen})


def _bare(arrays: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, str]]:
    """Return a module that has these arrays as parameters (floating point) and buffers (others, and the statistics of
    normalization layers), and no forward pass; and its names -> the arrays' names. They are the same unless torch does
    not accept these: "type", "a..b", or "a" and "a.b".
    """
    try:
        return _module_of(arrays), {name: name for name in arrays}
    except KeyError:
        names = {f"array{at}": name for at, name in enumerate(arrays)}
        return _module_of({own: arrays[name] for own, name in names.items()}), names


def _module_of(arrays: Mapping[str, Tensor]) -> nn.Module:
    """Return a module with these arrays under their names. Raises KeyError if torch does not accept one."""
    root = nn.Module()
    for name, value in arrays.items():
        module = root
        *path, leaf = name.split(".")
        for part in path:
            if not isinstance(getattr(module, part, None), nn.Module):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        if value.is_floating_point() and leaf not in _BUFFERS:  # FedAdam and others turn arrays into float64
            module.register_parameter(leaf, nn.Parameter(value.float()))
        else:
            module.register_buffer(leaf, value.clone())
    return root
