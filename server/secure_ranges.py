"""Chooses the range of values of each tensor in secure sums from the rounds before."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from server.checkpoint import Snapshot
from server.client_registry import Client
from tofu.errors import SettingError
from tofu.plugins import SumSpec
from tofu.privacy import Noise
from tofu.rounds.aggregation import example_cap
from tofu.secagg import coordinates
from tofu.secagg.encoding import FEW_LEVELS, EncodingConfig, RingEncoder, first_ranges, nearest_range
from tofu.secagg.fixed_point import HEADROOM, FixedPoint
from tofu.secagg.graph import Topology
from tofu.secagg.identities import read_known
from tofu.settings import MIN_SECURE, Settings
from tofu.settings.groups import SecureSettings
from tofu.weights import ParamSpec, Weights

MIN_EXPLAINED = 0.05
"""Lower limit of the explained variance that a client may report of itself, so that it cannot inflate a range."""


@dataclass
class UpdateScaleTracker:
    """The magnitude of the clients' weighted updates per tensor, in rounds in which the server decodes them.

    Attributes:
        peaks: maximum magnitude in all rounds.
        powers: sum over clients of their updates' mean squares in the last such round, in units of 2^-64; integers, so
            that the sum does not depend on the order of replies. Estimated for the update before compression.
        clients: number of clients of that round.
        round: number of that round.
    """

    peaks: dict[str, float] = field(default_factory=dict)
    powers: dict[str, int] = field(default_factory=dict)
    clients: int = 0
    round: int = 0

    def observe(self, update: Weights, examples: int, round_: int, explained: float) -> None:
        """Add a client's decoded update and the fraction of its power that it explains, as the client reports it."""
        if round_ != self.round:
            self.powers, self.clients, self.round = {}, 0, round_
        self.clients += 1
        for name, value in update.items():
            if value.numel():
                peak, power = float(value.abs().max()), float(value.double().square().mean())
                self.peaks[name] = max(self.peaks.get(name, 0.0), peak * examples)
                power *= examples**2 / min(max(explained, MIN_EXPLAINED), 1.0)
                self.powers[name] = self.powers.get(name, 0) + round(math.ldexp(power, 64))

    def deviations(self) -> dict[str, float]:
        """Root mean square per tensor, over the clients of the last round."""
        return {name: math.sqrt(math.ldexp(power, -64) / self.clients) for name, power in self.powers.items()}


class SecureRanges:
    """Chooses the encoding of each secure round of one model.

    Raises:
        SettingError: the required noise does not fit the ring.
    """

    def __init__(self, param_spec: ParamSpec, settings: Settings) -> None:
        self._param_spec, self._settings = param_spec, settings
        self._ranges: tuple[float, ...] = ()
        self._turn = 0
        self.scales = UpdateScaleTracker()
        check_noise(param_spec, settings)

    def encoding(
        self, clients: Sequence[Client], declared: Mapping[str, SumSpec], displacement: Tensor, clip_norm: float
    ) -> tuple[EncodingConfig, RingEncoder]:
        """Return the encoding that these clients have to agree on.

        Args:
            declared: the plugins' sums.
            displacement: the round's weights minus the initial ones, as one vector [values].
            clip_norm: of the round, with differential privacy.
        """
        settings, count = self._settings, max(len(clients), MIN_SECURE)
        claimed = [client.examples for client in clients] or [1]
        cap = example_cap(claimed, settings.server.max_example_ratio)  # or one claim could round all others to nothing
        unit = sum(min(examples, cap) for examples in claimed) / len(claimed)
        fraction, bits = coordinates.settings_for(settings.secure.secure_ratio, count)
        levels = FixedPoint(count, bits, 1.0).levels
        # With unknown ranges, rounding to the nearest step could set all values to zero.
        nearest = levels < FEW_LEVELS and settings.residual_fraction == 1 and bool(self._ranges or self.scales.powers)
        sizes = self.scales.deviations() if nearest else self.scales.peaks
        factor = (nearest_range(levels) if nearest else HEADROOM) / unit
        ranges = self._ranges or first_ranges(self._param_spec, {name: factor * size for name, size in sizes.items()})
        sent = displacement if fraction < 1 else None

        def agreed(ranges: tuple[float, ...], digest: bytes) -> EncodingConfig:
            config = EncodingConfig(count, bits, unit, ranges, fraction, self._turn, digest, nearest)
            return EncodingConfig.from_bytes(config.to_bytes())  # rounded to float32, as the clients read them

        draft = RingEncoder(self._param_spec, agreed(ranges, b""), declared, sent)
        topology = Topology.of(settings.secure, count)
        noise = Noise.in_sum(
            settings.privacy, clip_norm, settings.secure, topology, count, levels=draft.levels, values=draft.values
        )
        if noise is not None:
            ranges = (noise.grid * draft.levels,) * len(self._param_spec.shapes)  # independent of the clients' data
        config = agreed(ranges, draft.digest)
        return config, RingEncoder(self._param_spec, config, declared, sent)

    def advance(self, ranges: tuple[float, ...]) -> None:
        """Use these ranges, derived from the last secure sum, in the next round."""
        self._ranges, self._turn = ranges, self._turn + 1

    def save(self, snapshot: Snapshot) -> None:
        """Add the state to a checkpoint."""
        snapshot.plain["secure"] = {"turn": self._turn, "ranges": self._ranges, "scales": vars(self.scales)}

    def restore(self, snapshot: Snapshot) -> None:
        """Restore what `save` wrote."""
        plain = snapshot.plain["secure"]
        self._turn, self._ranges = plain["turn"], tuple(plain["ranges"])
        self.scales = UpdateScaleTracker(**plain["scales"])


def check_noise(param_spec: ParamSpec, settings: Settings) -> None:
    """Raises SettingError, with the largest ratio that is usable, if the noise of a secure round does not fit."""
    given = settings.secure.secure_ratio
    refused = _refusal(param_spec, settings, given)
    if refused is None:
        return
    lower = [math.floor(3200 / bits) / 100 for bits in range(1, 33)]  # rounded down, so that the bits fit
    for ratio in lower:
        if ratio < given and _refusal(param_spec, settings, ratio) is None:
            wanted = f"at most {ratio:g} with noise-multiplier {settings.privacy.noise_multiplier:g}"
            raise SettingError("secure-ratio", given, f"{wanted}, whose noise needs the bits") from refused
    raise refused


def _refusal(param_spec: ParamSpec, settings: Settings, ratio: float) -> SettingError | None:
    """Return the error of a ratio of bytes that leaves too few bits for the noise, or None."""
    clients, privacy = _max_clients(settings), settings.privacy
    fraction, bits = coordinates.settings_for(ratio, clients)
    levels = FixedPoint(clients, bits, 1.0).levels
    values = math.ceil(fraction * param_spec.float32_bytes / 4)
    topology = Topology.of(settings.secure, clients)
    try:
        for octave in range(16 if privacy.clip_quantile else 1):  # whether a norm fits repeats with its double
            norm = privacy.clip_norm * 2 ** (octave / 16)
            Noise.in_sum(privacy, norm, settings.secure, topology, clients, levels=levels, values=values)
    except SettingError as error:
        return error
    return None


def check_secure_settings(settings: Settings) -> None:
    """Raises SettingError if the identities cannot be read, or no communication graph tolerates the dropouts.

    A round that ends before all replies are in makes the late clients dropouts.
    """
    tolerated = 1 / (1 - settings.secure.secagg_dropout_fraction)
    if settings.server.over_sampling > tolerated * (1 + 1e-9):
        wanted = f"at most {tolerated:.3g} with secagg-dropout-fraction {settings.secure.secagg_dropout_fraction:g}"
        raise SettingError("over-sampling", settings.server.over_sampling, f"{wanted}, as late clients drop out")
    Topology.of(settings.secure, _max_clients(settings))
    known_identities(settings.secure)


def known_identities(secure: SecureSettings) -> dict[str, bytes] | None:
    """Return a mapping: client name -> public key; None in a run without identities."""
    return read_known(Path(secure.secure_identities)) if secure.secure_identities else None


def _max_clients(settings: Settings) -> int:
    server = settings.server
    wanted = max(round(server.client_fraction * settings.data.clients), server.min_clients, MIN_SECURE)
    return min(math.ceil(wanted * server.over_sampling - 1e-9), max(settings.data.clients, wanted))
