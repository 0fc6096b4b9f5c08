"""The proxy compressor: proxies, and a sparse correction with the largest entries of the update that they miss.

Proxies explain the part of an update that resembles the gradient of a few images. The sparse correction explains large
entries of any origin. Early in training both together explain more than either alone in the same bytes; late in
training the correction alone often explains more. Therefore every `TRIAL_INTERVAL` encodes a client tries both bodies,
and keeps the better kind until the next trial. With error feedback a part of the update is enough, because the rest
follows: a client does not search for proxies where the correction alone explains `proxies_below` of an update. The
published method has no correction.

Body, little-endian:

    bytes  field
    1      flags: the settings that both ends must agree on (ProxySettings.flags)
    1      bits of a pixel and of a label
    2      number of proxies; 0 if there is a correction only
    2      shortest side of a proxy; 0 if proxies cannot be smaller than the input
    -      the proxies (`proxies.ProxyCode`), if there are any
    -      the buffers (`tofu.compression.base`)
    -      the correction (`correction.write_correction`), if the budget allows one
"""

import math
import struct
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tofu.codec.correction import Strata, min_bytes, read_correction, scale_correction, strata_of, write_correction
from tofu.codec.options import AUTOMATIC, DEFAULTS, CompressorOptions, ProxySettings, automatic_gain
from tofu.codec.proxies import ProxyCode, ProxyData, automatic_sides, decode, proxy_side
from tofu.codec.search import Encoding, encode
from tofu.compression import compressors
from tofu.compression.base import MAX_MAGNITUDE, BufferCode, CompressedUpdate, Compressor, PayloadContent
from tofu.errors import ModelError, PayloadError, SettingError
from tofu.reference_model import ReferenceModel
from tofu.weights import ParamSpec, Weights, check_finite, explained_variance, fingerprint, split_vector
from tofu.wire import HEADER_BYTES

_PREFIX = struct.Struct("<BBHH")

TRIAL_INTERVAL = 4
"""Number of encodes after which a client tries again which surrogate_beta, and whether proxies at all, are best."""

MAX_PROXIES = 8
"""Maximum number of proxies with a correction; more take longer to encode, and a larger correction explains as much."""

LARGEST_WITH_CORRECTION = 0.36
"""Largest side of a proxy over the input's with a correction (10 of 28 pixels, 11 of 32); larger proxies explain less
after as many evaluations."""

ENOUGH_PROXIES = 16
"""Number of proxies from which larger proxies explain as much as more proxies."""


@dataclass(frozen=True)
class Candidate:
    """A body that may be sent.

    Attributes:
        body: its bytes.
        explained: its approximation of the update, without gains and without buffers.
        decoded: the update that the receiver will decode, with gains and buffers.
        proxies: the bytes of its proxies; b"" if it has none.
    """

    body: bytes
    explained: Weights
    decoded: Weights
    proxies: bytes


@compressors.register("proxy")
class ProxyCompressor(Compressor):
    """Proxy images and a sparse correction instead of the update.

    Args:
        reference: the run's model, whose parameter and input shapes determine the sizes.
        ratio: float32 bytes of the update over bytes of the payload, header included.
        options: `proxies`, `correction`, `correction_gain`, `proxies_below` and `encoder` apply. Together with a
            correction, the number of proxies that the ratio allows is limited to `MAX_PROXIES`.

    Attributes:
        count: number of proxies in a payload that has any.
        settings: how proxies are encoded, with the side chosen.
        side: shortest side of a proxy; 0 if proxies cannot be smaller than the input.

    Raises:
        SettingError: this model cannot reach the ratio, or the proxies do not fit the network.
    """

    code = 2
    has_own_gain = True

    def __init__(self, reference: ReferenceModel, *, ratio: float, options: CompressorOptions = DEFAULTS) -> None:
        param_spec = reference.param_spec
        self._options = options
        self._overhead = _PREFIX.size + BufferCode(param_spec).nbytes
        smallest = min_bytes(param_spec.parameter_count) if options.correction else math.inf
        budget = int(param_spec.float32_bytes / ratio) - HEADER_BYTES - self._overhead
        self.settings, self.count = _choose_proxies(reference, ratio, options)
        if not self.count and budget < smallest:
            reach = _reach(reference, HEADER_BYTES + self._overhead + smallest)
            raise SettingError("ratio", ratio, f"at most {reach:.1f} for this model (a correction of one entry)")
        self._code, self.side = ProxyCode.of(reference, self.settings, self.count), proxy_side(reference, self.settings)
        self._budgets: dict[int, int] = {}
        """Number of proxies in a body -> bytes of its correction."""
        self._last: tuple[Weights, bytes, Strata] | None = None
        """Initial weights, fingerprint of the base weights and strata of the last body that was decoded."""
        if budget >= smallest:
            self._budgets[0] = budget
        if self.count:
            left = budget - self._code.nbytes
            self._budgets[self.count] = left if left >= smallest else 0
        self._note = "" if self.count or options.correction == 1 else self._without_proxies(reference, ratio)

    def _without_proxies(self, reference: ReferenceModel, ratio: float) -> str:
        reach = _reach(reference, _size(reference, 1, self.settings))
        return (
            f"at ratio {ratio:g} a payload of this model has {HEADER_BYTES + self.body_bytes(reference.param_spec)} "
            "bytes and no room for a proxy, so the sparse correction is sent alone: "
            + (f"a ratio of at most {reach:.1f} sends proxies" if reach >= 1 else "no ratio sends proxies")
        )

    def check(self, reference: ReferenceModel) -> None:
        if self.count:
            reference.check_differentiable()

    @property
    def correction(self) -> int:
        """Bytes of the correction that follows the proxies."""
        return self._budgets[self.count]

    def compress(
        self, reference: ReferenceModel, update: Weights, *, generator: torch.Generator, memory: bytes = b""
    ) -> CompressedUpdate:
        check_finite(update)
        age, last = self._read_memory(memory)
        age = (age + 1) % TRIAL_INTERVAL
        trial = not age or last is None
        strata = strata_of(reference) if any(self._budgets.values()) else None
        searches = self.count and not (age and last is None and 0 in self._budgets)
        alone, explained_alone = b"", -math.inf
        if 0 in self._budgets and (trial or self._options.proxies_below < 1):
            nothing = {name: torch.zeros((), dtype=w.dtype).expand(w.shape) for name, w in reference.base.items()}
            candidate = self._candidate(reference, update, b"", nothing, strata)
            explained = self.criterion(update, candidate)
            if explained >= self._options.proxies_below < 1:
                # The next encode that searches is a trial, and starts from the last proxies.
                return CompressedUpdate(candidate.body, candidate.decoded, bytes([TRIAL_INTERVAL - 1]) + memory[1:])
            if not searches:
                return CompressedUpdate(candidate.body, candidate.decoded, bytes([age]))
            if trial:
                alone, explained_alone = candidate.body, explained
            del candidate  # the search needs the memory, and the body is decoded again if it is the better one
        encoding = self._encoding(reference, update, trial=trial, generator=generator, last=last)
        best = self._candidate(reference, update, encoding.body, encoding.decoded, strata)
        if explained_alone >= self.criterion(update, best):
            del best
            return CompressedUpdate(alone, self._decoded(reference, alone, strata), bytes([age]), encoding.evals)
        return CompressedUpdate(best.body, best.decoded, bytes([age]) + best.proxies, encoding.evals)

    def _encoding(
        self, reference: ReferenceModel, update: Weights, *, trial: bool, generator: torch.Generator,
        last: ProxyData | None,
    ) -> Encoding:  # fmt: skip
        """Search for proxies; only a trial tries again which surrogate_beta is best."""
        settings = self.settings
        if last is not None and not trial and not settings.surrogate_beta:
            settings = replace(settings, surrogate_beta=last.surrogate_beta)
        try:
            return encode(reference, update, self.count, settings, generator=generator, start=last)
        except RuntimeError as error:
            if "checkpoint" not in str(error).lower():
                raise
            accepted = "no activation checkpointing in evaluation mode, or compressor=sparse"
            raise ModelError(reference.model, accepted) from error

    def criterion(self, update: Weights, candidate: Candidate) -> float:
        """Return the explained variance without gains; a client sends the body with the highest value."""
        return explained_variance({name: update[name] for name in candidate.explained}, candidate.explained)

    def decompress(self, reference: ReferenceModel, body: bytes) -> Weights:
        return self._decoded(reference, body, None)

    def _decoded(self, reference: ReferenceModel, body: bytes, strata: Strata | None) -> Weights:
        """Decompress a body; strata are those of the reference if they are known."""
        proxies = self._read_proxies(body)
        count = 0 if proxies is None else self.count
        split = _PREFIX.size + (self._code.nbytes if count else 0)
        end = split + self._overhead - _PREFIX.size
        data, budget = body[end:], self._budgets[count]
        if len(data) > budget:
            raise PayloadError(f"correction has {len(data)} bytes, expected at most {budget}")
        if proxies is None:
            explained = {name: torch.zeros_like(w) for name, w in reference.base.items()}
        else:
            explained = decode(reference, proxies, self.settings)
        correction = _correction(explained, data, strata or self._known_strata(reference)) if budget else None
        return self._combine(explained, correction) | BufferCode(reference.param_spec).read(body[split:end])

    def _known_strata(self, reference: ReferenceModel) -> Strata:
        """Return the strata of a reference, kept for the next body: a server decodes many at the same weights, and the
        strata take longer than the rest of a correction.
        """
        last, weights = self._last, fingerprint(reference.base)
        if last is None or last[0] is not reference.initial or last[1] != weights:
            last = self._last = reference.initial, weights, strata_of(reference)
        return last[2]

    def body_bytes(self, param_spec: ParamSpec) -> int:
        sizes = [(self._code.nbytes if count else 0) + budget for count, budget in self._budgets.items()]
        return self._overhead + max(sizes)

    def describe(self, body: bytes | None = None) -> PayloadContent:
        proxies = None if body is None else self._read_proxies(body)
        count = self.count if body is None or proxies is not None else 0
        parts = {
            "header": _PREFIX.size,
            "proxies": self._code.nbytes if count else 0,
            "buffers": self._overhead - _PREFIX.size,
        }
        parts["correction"] = self._budgets[count] if body is None else max(0, len(body) - sum(parts.values()))
        shape = (count, *self._code.shape) if count else (0,)
        return PayloadContent(parts, shape, proxies, self.settings, self._note)

    def _read_proxies(self, body: bytes) -> ProxyData | None:
        """Return the proxies in a body, checked; None if it has none.

        Raises:
            PayloadError: they differ from what this run sends, or a value is out of range.
        """
        if len(body) < _PREFIX.size:
            raise PayloadError(f"proxy body has {len(body)} bytes, expected at least {_PREFIX.size}")
        found = _PREFIX.unpack_from(body)
        count = 0 if found[2] == 0 and 0 in self._budgets else self.count
        for field, value, expected in zip(("flags", "bits", "count", "side"), found, self._fields(count), strict=True):
            if value != expected:
                raise PayloadError(f"proxy body has {field} {value}, this run uses {expected}")
        return self._code.read(body[_PREFIX.size : _PREFIX.size + self._code.nbytes]) if count else None

    def _fields(self, count: int) -> tuple[int, int, int, int]:
        return self.settings.flags, self.settings.bits, count, self.side

    def _candidate(
        self, reference: ReferenceModel, update: Weights, proxies: bytes, explained: Weights, strata: Strata | None
    ) -> Candidate:
        """Return the body with these proxies, whose approximation is `explained`, and a correction of the rest."""
        buffers, count = BufferCode(reference.param_spec), self.count if proxies else 0
        tail, data, correction, correction_gain = buffers.write(update), b"", None, 1.0
        if strata is not None and self._budgets[count]:
            missed = torch.empty(reference.param_spec.parameter_count)
            rest = _split(missed, explained)
            for name, part in rest.items():
                torch.sub(update[name], explained[name], out=part)
            data = write_correction(missed.clamp_(-MAX_MAGNITUDE, MAX_MAGNITUDE), self._budgets[count], strata)
            correction = _correction(explained, data, strata)
            if self._options.correction_gain == AUTOMATIC:  # it is part of the magnitudes: the receiver multiplies by 1
                correction_gain = automatic_gain(explained_variance(rest, correction))
                data = scale_correction(data, correction_gain)
                correction = _correction(explained, data, strata)
            del missed, rest
        body = _PREFIX.pack(*self._fields(count)) + proxies + tail + data
        decoded = self._combine(explained, correction) | buffers.read(tail)
        if correction is not None:
            explained = {name: correction[name].div_(correction_gain).add_(value) for name, value in explained.items()}
        return Candidate(body, explained, decoded, proxies)

    def _combine(self, proxies: Weights, correction: Weights | None) -> Weights:
        """proxies + correction_gain * correction; the magnitudes already contain an automatic gain."""
        gain = self._options.correction_gain or 1.0
        return {name: value + gain * correction[name] if correction else value for name, value in proxies.items()}

    def _read_memory(self, memory: bytes) -> tuple[int, ProxyData | None]:
        """Return the number of encodes since the last trial, and the last proxies;
        None if the last payload had none.
        """
        try:
            if len(memory) > 1 and self.count:
                return memory[0], self._code.read(memory[1:])
            return (memory[0], None) if len(memory) == 1 and 0 in self._budgets else (-1, None)
        except PayloadError:  # written with other settings, or damaged
            return -1, None


def _correction(like: Weights, data: bytes, strata: Strata) -> Weights:
    """Decode a correction to tensors of the shapes of `like`."""
    return _split(read_correction(data, strata), like)


def _split(vector: Tensor, like: Weights) -> Weights:
    return split_vector(vector, {name: value.shape for name, value in like.items()})


def _choose_proxies(reference: ReferenceModel, ratio: float, options: CompressorOptions) -> tuple[ProxySettings, int]:
    """Return the settings with the side chosen, and the number of proxies that fit; with a correction it may be 0."""
    if not options.correction:
        return _sized(reference, ratio, options)
    # If no proxy fits in the fraction that the correction leaves, one may still fit in the whole budget.
    for allowed in (ratio / (1 - options.correction), ratio) if options.correction < 1 else ():
        try:
            return _sized(reference, allowed, options)
        except SettingError as error:
            if error.field != "ratio":
                raise
    return replace(options.encoder, size=options.encoder.size or automatic_sides(reference)[-1]), 0


def _sized(reference: ReferenceModel, ratio: float, options: CompressorOptions) -> tuple[ProxySettings, int]:
    """Return the settings with the side chosen, and the number of proxies: that of the options, or as many as fit."""
    settings, count = options.encoder, options.proxies
    if not settings.size:
        settings = replace(settings, size=_side(reference, ratio, options))
    if count:
        return settings, count
    affordable = _affordable(reference, ratio, settings)
    return settings, min(affordable, MAX_PROXIES) if options.correction else affordable


def _side(reference: ReferenceModel, ratio: float, options: CompressorOptions) -> int:
    """Return the largest automatic side at which the ratio allows enough proxies."""
    sides, enough = automatic_sides(reference), ENOUGH_PROXIES
    if options.correction:
        largest = max(sides[-1], LARGEST_WITH_CORRECTION * reference.call.side)
        sides, enough = [side for side in sides if side <= largest], MAX_PROXIES
    budget = reference.param_spec.float32_bytes / ratio
    fitting = [side for side in sides if budget >= _size(reference, enough, replace(options.encoder, size=side))]
    return fitting[0] if fitting and not options.proxies else sides[-1]


def _size(reference: ReferenceModel, count: int, settings: ProxySettings) -> int:
    """Return the number of bytes of a payload with `count` proxies and no correction, header included."""
    code = ProxyCode.of(reference, settings, count)
    return HEADER_BYTES + _PREFIX.size + code.nbytes + BufferCode(reference.param_spec).nbytes


def _reach(reference: ReferenceModel, nbytes: float) -> float:
    """Return the highest ratio at which a payload may have this many bytes, rounded down so that it is usable."""
    return math.floor(10 * reference.param_spec.float32_bytes / nbytes) / 10


def _affordable(reference: ReferenceModel, ratio: float, settings: ProxySettings) -> int:
    """Return the largest number of proxies that the ratio allows.

    Raises:
        SettingError: not even one proxy fits.
    """
    budget = reference.param_spec.float32_bytes / ratio

    def size(count: int) -> int:
        return _size(reference, count, settings)

    if size(1) > budget:
        reach = _reach(reference, size(1))
        raise SettingError("ratio", ratio, f"at most {reach:.1f} for this model (one proxy of these settings)")
    # The size is affine in the count except for the rounding of bits to bytes: start from the estimate, then adjust.
    count = max(1, int((budget - size(1)) / ((size(65) - size(1)) / 64)))
    while count < 0xFFFF and size(count + 1) <= budget:
        count += 1
    while size(count) > budget:
        count -= 1
    return count
