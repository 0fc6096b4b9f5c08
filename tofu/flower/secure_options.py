"""The arguments that both ends of secure rounds in a Flower app share, and how the server encodes each round."""

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tofu.arguments import check_kind, check_number
from tofu.errors import SettingError
from tofu.flower.agreement import arguments_text, plain_number
from tofu.plugins import SumSpec
from tofu.privacy import Noise
from tofu.privacy.adaptive import REPORT, AdaptiveClip
from tofu.secagg.coordinates import MIN_LEVELS
from tofu.secagg.encoding import FEW_LEVELS, MAX_RANGE, EncodingConfig, RingEncoder, SecureMean, nearest_range
from tofu.secagg.fixed_point import HEADROOM, FixedPoint
from tofu.secagg.graph import Topology, choose_topology
from tofu.settings import python_call
from tofu.settings.fields import comma_list
from tofu.settings.groups import PrivacySettings
from tofu.weights import FINGERPRINT_BYTES, ParamSpec

VERSION = 1

FIRST_BITS = 48
"""Minimum bits of the ring in the first round, whose ranges are so wide that no value is clipped."""

_FIRST_FLOATS, _FIRST_INTEGERS, _FIRST_EXAMPLES = 16.0, 2.0**16, 2.0**20
_WIDE_BITS, _WIDE_HEADROOM = 24, 64.0
_SMALLEST = 2.0**-8
"""Minimum range of a tensor relative to the largest range, so that a tensor without changes can change again."""

_METRIC_BOUND = 2.0**50
_FINE_BOUND = _METRIC_BOUND / 2**39


@dataclass(frozen=True, kw_only=True)
class SecureOptions:
    """Options of secure rounds; `secure` and `SecureAggregation` must have the same.

    Attributes:
        bits: bits per value of an update, from the second round on. With n clients, the range of each tensor has
            2^bits / 2n steps. 32 is about as precise as float32.
        error_feedback: fraction of what clipping and rounding lost that a client adds to its next update.
        metrics: maximum number of metric values of a reply; a list counts by its length.
        noise_multiplier: standard deviation of the noise in the sum, in units of `clip_norm`; 0 adds none.
        clip_norm: with noise, each update is clipped to this L2 norm, and every client counts as one example.
        clip_quantile, clip_lr, clip_budget: with noise and a quantile above 0, the norm follows it from round to round
            (`tofu.privacy.adaptive`).
        dropout: fraction of the clients that may drop out of a round.
        collusion: fraction of the clients that may collude with the server.
        weight_step: clients' weights (numbers of examples) are rounded to multiples of it, at most 2^32 - 1 of them;
            below 1 for weights that are no whole numbers, such as 1e-6. With noise every weight is 1.
        app: packages, separated by commas, whose code all clients of a sum and the server must share.

    Raises:
        SettingError: an option is out of range, or a package cannot be found.
    """

    bits: int = 32
    error_feedback: float = 0.0
    metrics: int = 16
    noise_multiplier: float = 0.0
    clip_norm: float = 1.0
    clip_quantile: float = 0.0
    clip_lr: float = 0.2
    clip_budget: float = 0.01
    dropout: float = 0.2
    collusion: float = 0.1
    weight_step: float = 1.0
    app: str = ""

    @python_call
    def __post_init__(self) -> None:
        for field, low, high in (
            ("bits", MIN_LEVELS, 56), ("error_feedback", 0, 1), ("metrics", 0, 1024), ("noise_multiplier", 0, 1e6),
            ("clip_norm", 1e-9, 1e9), ("clip_quantile", 0, 0.99), ("clip_lr", 1e-9, 10), ("clip_budget", 1e-9, 0.5),
            ("dropout", 0, 0.99), ("collusion", 0, 0.99), ("weight_step", 1e-9, 1),
        ):  # fmt: skip
            check_number(field, getattr(self, field), low, high)
            object.__setattr__(self, field, plain_number(getattr(self, field)))
        for field in ("bits", "metrics"):
            check_kind(field, getattr(self, field), int, "a whole number")
        check_kind("app", self.app, str, "names of packages, separated by commas")
        object.__setattr__(self, "app", ",".join(self.packages))
        if self.clip_quantile and not self.noise_multiplier:
            raise SettingError("clip_quantile", self.clip_quantile, "0 without noise_multiplier")
        for package in self.packages:
            spec = importlib.util.find_spec(package) if package.isidentifier() else None
            if spec is None or not spec.submodule_search_locations or spec.origin is None:
                raise SettingError("app", package, "names of packages with an __init__.py that can be imported")

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages that `app` names."""
        return comma_list(self.app)

    @property
    def unit(self) -> float:
        """Number of steps in a weight of 1."""
        return 1.0 if self.noise_multiplier else 1 / self.weight_step

    @property
    def digest(self) -> bytes:
        """Identifies the options in 8 bytes."""
        shared = [VERSION, dataclasses.asdict(self)]
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).digest()[:FINGERPRINT_BYTES]

    @property
    def text(self) -> str:
        """The options that are not defaults, for error messages."""
        return arguments_text(vars(self), self.defaults())

    @staticmethod
    def defaults() -> dict[str, object]:
        """Name -> default of each option."""
        return {field.name: field.default for field in dataclasses.fields(SecureOptions)}

    def clip(self, norm: float) -> AdaptiveClip | None:
        """Return the clip norm of a round, if it follows a quantile."""
        if not self.clip_quantile:
            return None
        clip = AdaptiveClip(self._privacy)
        clip.broadcast = {"norm": norm}
        return clip

    def declared(self, norm: float) -> dict[str, SumSpec]:
        """Return the sums of metrics times examples, of which the second holds what rounding took from the first.

        With a clip norm that follows a quantile, also the count of clipped clients.

        Args:
            norm: to which clients clip their updates.

        Raises:
            PayloadError: the norm is not usable.
        """
        clip = self.clip(norm)
        return {
            "coarse": SumSpec((self.metrics,), _METRIC_BOUND),
            "fine": SumSpec((self.metrics,), _METRIC_BOUND / 2**39),
        } | (clip.declared if clip else {})

    def topology(self, clients: int) -> Topology:
        """Return the graph of neighbors. Raises SettingError if none allows the dropouts and the collusion."""
        return choose_topology(clients, dropout=self.dropout, corrupted=self.collusion)

    def noise_in_sum(self, topology: Topology, clients: int, encoder: RingEncoder, norm: float) -> Noise | None:
        """Return one client's part of the noise for updates clipped to `norm`.

        Raises:
            SettingError: the ring has too few bits for it.
        """
        if not self.noise_multiplier:
            return None
        honest = topology.honest(clients, self.collusion)
        whole = Noise(self._privacy.joint_norm(norm), self.noise_multiplier, honest)
        return whole.on_ring(levels=encoder.levels, values=encoder.values)

    @property
    def _privacy(self) -> PrivacySettings:
        return PrivacySettings(
            noise_multiplier=self.noise_multiplier, clip_norm=self.clip_norm, clip_quantile=self.clip_quantile,
            clip_lr=self.clip_lr, clip_budget=self.clip_budget,
        )  # fmt: skip

    def metric_sums(self, values: list[float]) -> dict[str, Tensor]:
        """At most `metrics` values within the bound, as the two sums that `declared` describes."""
        padded = torch.zeros(self.metrics, dtype=torch.float64)
        padded[: len(values)] = torch.tensor(values, dtype=torch.float64)
        step = _METRIC_BOUND / (2**39 - 1)
        coarse = (padded / step).round() * step
        return {"coarse": coarse, "fine": (padded - coarse).clamp(-_FINE_BOUND, _FINE_BOUND)}

    def fits(self, value: float) -> bool:
        """Return whether a metric times examples is finite and within the bound."""
        return abs(value) <= _METRIC_BOUND


class RangeTracker:
    """Chooses the encoding of each round from the sums before.

    The first ranges are 16 for floating-point arrays (or 8 times the array's largest value) and 65,536 for integers,
    with up to a million examples: so wide that practically nothing is clipped, which takes `FIRST_BITS` bits.

    Attributes:
        norm: to which clients clip their updates in the next round.
    """

    def __init__(self, options: SecureOptions) -> None:
        self._options, self.norm = options, float(options.clip_norm)
        self._ranges: tuple[float, ...] = ()
        self._unit = options.unit
        self._turn = 0

    def encoding(self, base: Mapping[str, Tensor], spec: ParamSpec, clients: int) -> tuple[EncodingConfig, RingEncoder]:
        """Return the encoding of a round.

        Args:
            base: the arrays that are sent.
            clients: maximum number of clients in the sum.

        Raises:
            SettingError: the ring has too few bits for the clients, or for the noise.
        """
        options, unit, ranges, bits = self._options, self._unit, self._ranges, self._options.bits
        if not ranges:
            ranges = _first_ranges(base, spec)
            bits = bits if options.noise_multiplier else max(bits, FIRST_BITS)
        nearest = bool(self._ranges) and self._nearest(clients)
        if options.noise_multiplier:
            draft = RingEncoder(spec, EncodingConfig(clients, bits, 1.0, ranges), options.declared(self.norm))
            for octave in range(16 if options.clip_quantile else 1):  # whether a norm fits repeats with its double
                options.noise_in_sum(options.topology(clients), clients, draft, self.norm * 2 ** (octave / 16))
            noise = options.noise_in_sum(options.topology(clients), clients, draft, self.norm)
            assert noise is not None
            ranges, unit, nearest = (noise.grid * draft.levels,) * len(ranges), 1.0, False
        config = EncodingConfig(clients, bits, unit, ranges, turn=self._turn, nearest_rounding=nearest)
        config = EncodingConfig.from_bytes(config.to_bytes())  # rounded to float32, as the clients read it
        return config, RingEncoder(spec, config, options.declared(self.norm))

    def advance(self, mean: SecureMean, config: EncodingConfig, clients: int) -> None:
        """Derive the next round's ranges and clip norm from the sum of `clients` clients."""
        if (clip := self._options.clip(self.norm)) is not None:
            self.norm = clip.next_norm(mean.sums[REPORT], clients)
        unit = mean.examples / clients
        headroom = _WIDE_HEADROOM if self._options.bits >= _WIDE_BITS else HEADROOM
        if self._nearest(config.clients):
            levels = FixedPoint(config.clients, self._options.bits, 1.0).levels
            sizes = [2 * nearest_range(levels) * float(v.double().square().mean() ** 0.5) for v in mean.update.values()]
        else:
            sizes = [headroom * float(v.abs().max()) if v.numel() else 0.0 for v in mean.update.values()]
        if not any(sizes):  # all clients returned what they received: their next updates will have the size of others
            return
        minimum = _SMALLEST * max(max(sizes), 1e-9)
        scale = config.unit_weight / unit
        known = zip(sizes, mean.ranges, config.ranges, strict=True)
        # The encoder widens a range in which it has clipped a value.
        ranges = [max(size, minimum, out * scale if out > before else 0.0) for size, out, before in known]
        if config.nearest_rounding:
            ranges = [out * scale for out in mean.ranges]
        self._ranges = tuple(min(range_, MAX_RANGE) for range_ in ranges)
        self._unit, self._turn = unit, self._turn + 1

    def _nearest(self, clients: int) -> bool:
        """Return whether values are rounded to the nearest step, which requires error feedback."""
        options = self._options
        few = FixedPoint(clients, options.bits, 1.0).levels < FEW_LEVELS
        return few and options.error_feedback == 1 and not options.noise_multiplier


def _first_ranges(base: Mapping[str, Tensor], spec: ParamSpec) -> tuple[float, ...]:
    ranges = []
    for name in spec.shapes:
        value = base[name]
        first = _FIRST_INTEGERS if name in spec.integers else _FIRST_FLOATS
        if name not in spec.integers and value.numel():
            first = max(first, 8 * float(value.abs().max()))
        ranges.append(min(first * _FIRST_EXAMPLES, MAX_RANGE))
    return tuple(ranges)
