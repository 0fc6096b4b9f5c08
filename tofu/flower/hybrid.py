"""Compressed rounds first, secure rounds last, for any Flower app: one mod and one wrapper for both.

    app = ClientApp(mods=[tofu.hybrid(Net, (3, 32, 32), ratio=200)])                              # client
    strategy = tofu.Hybrid(FedAvg(), Net, (3, 32, 32), ratio=200, switch_round=40)                # server

The switch comes at a given round, or when a metric stalls (`tofu.rounds.schedule`). What compression has lost until
then is in the clients' error feedback, and is sent in the secure rounds.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from tofu.arguments import check_kind, check_options
from tofu.errors import PayloadError, RunError, SettingError
from tofu.flower.compress import Compressed, CompressMod
from tofu.flower.secure import SecureAggregation
from tofu.flower.secure_mod import RECORD as SECURE_RECORD
from tofu.flower.secure_mod import SecureMod
from tofu.flower.secure_options import SecureOptions
from tofu.flower.update_codec import RECORD, UpdateCodec, codec_of
from tofu.flower.wrapper import CLIPPED_BY_CLIENTS, CLIPPED_BY_SERVER, StrategyWrapper, TrainMod, refuse_around
from tofu.rounds.schedule import make_schedule
from tofu.settings import python_call
from tofu.settings.groups import RoundSettings
from tofu.wire import RECORD as STAGE

_FLOWERS_LOG = logging.getLogger("flwr")
"""Shows lines of the level INFO, as those that begin each round."""


@python_call
def hybrid(*arguments: Any, secure: Mapping[str, Any] | None = None, **options: Any) -> "HybridMod":
    """Return a mod for compressed and secure rounds; the strategy must be wrapped in `Hybrid` with the same arguments.

    Args:
        *arguments: of `UpdateCodec`.
        secure: options of `SecureOptions`. Its error feedback is by default that of the compressed rounds.
        **options: of `UpdateCodec`.

    Example:
        >>> from flwr.clientapp import ClientApp
        >>> app = ClientApp(mods=[hybrid(ratio=50, secure={"bits": 16})])
    """
    codec = codec_of(hybrid, arguments, options)
    secure_options = _secure_options(codec, secure)
    codec.joint = secure_options
    return HybridMod(codec, secure_options)


class HybridMod(TrainMod):
    """The client's part. The strategy's record in a message tells which kind of round it is."""

    name = "tofu.hybrid"

    def __init__(self, codec: UpdateCodec, options: SecureOptions) -> None:
        self._compress, self._secure = CompressMod(codec), SecureMod(options, codec)

    def train(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Return the reply of `CompressMod` or `SecureMod`.

        Raises:
            PayloadError: the server's strategy is another one, or this client could not take part in the secure rounds.
            PolicyError: the client's policy refuses one of the two kinds of round.
        """
        if RECORD in message.content:
            identified = message.content.config_records[RECORD].get("identified")
            self._secure.check_later(context, identified=bool(identified))
            return self._compress.train(message, context, call_next)
        if SECURE_RECORD in message.content or STAGE in message.content:
            return self._secure.train(message, context, call_next)
        raise PayloadError("this client compresses or masks its updates, but the server's strategy is not tofu.Hybrid")


class Hybrid(StrategyWrapper):
    """`Compressed` until the switch, `SecureAggregation` from then on.

    Args:
        inner: a strategy that averages.
        *arguments: of `UpdateCodec`, the same as given to `hybrid`.
        secure: as given to `hybrid`.
        switch_round: first secure round; 0 switches when `plateau` stalls.
        plateau: name of a metric that should rise, or, after a minus sign, fall: one of the clients' mean train or
            evaluate metrics, or of those that `evaluate_fn` returns.
        patience: rounds that may pass without gain before the switch.
        gain: smallest improvement of the metric that counts.
        identities: of `SecureAggregation`.
        stage_timeout: of `SecureAggregation`.
        delta: of `SecureAggregation`.
        **options: of `UpdateCodec`, the same as given to `hybrid`.

    Raises:
        SettingError: neither or both of `switch_round` and `plateau` are given, or the inner strategy needs the
            individual updates.

    Example:
        >>> from flwr.serverapp.strategy import FedAvg
        >>> strategy = Hybrid(FedAvg(), ratio=50, plateau="-train_loss", secure={"bits": 16})
    """

    @python_call
    def __init__(
        self, inner: Strategy, *arguments: Any, secure: Mapping[str, Any] | None = None, switch_round: int = 0,
        plateau: str = "", patience: int = 3, gain: float = 0.002, identities: str | None = None,
        stage_timeout: float = 300.0, delta: float = 1e-5, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(inner)
        if bool(switch_round) == bool(plateau) or switch_round < 0:
            raise SettingError("switch_round", switch_round, "a round, or 0 and a metric's name as plateau")
        codec = codec_of(type(self), arguments, options)
        secure_options = _secure_options(codec, secure)
        codec.joint = secure_options
        self._secure = SecureAggregation(
            inner, identities=identities, stage_timeout=stage_timeout, delta=delta, codec=codec,
            **vars(secure_options),
        )  # fmt: skip
        self._compressed = Compressed(inner, codec=codec)
        self._secure.mod = self._compressed.mod = "tofu.hybrid"
        self._compressed.told = {"identified": self._secure.identified}
        self._secure.acknowledged = self._compressed.acknowledged
        self._secure.training = self._compressed.training
        rounds = RoundSettings().replace(
            schedule="plateau" if plateau else "switch", recovery="secure", switch_round=switch_round,
            plateau_patience=patience, plateau_gain=gain,
        )  # fmt: skip
        self._schedule = make_schedule(rounds, 2**31)
        self._plateau = plateau
        self._scores: list[float] = []
        self._known: dict[str, object] = {}
        self._current: Compressed | SecureAggregation = self._compressed
        self._unchecked = True

    def start(self, *arguments: Any, **options: Any) -> Result:
        """Run the inner strategy's own `start`, which calls this wrapper's configure and aggregate steps.

        Raises:
            RunError: every secure round was abandoned because too few clients remained.
        """
        evaluate = options.get("evaluate_fn")
        if evaluate is not None:

            def watched(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
                metrics: MetricRecord | None = evaluate(server_round, arrays)
                self._see(metrics)
                return metrics

            options["evaluate_fn"] = watched
        self._scores, self._known = [-math.inf], {}
        self._unchecked = True
        self._compressed.begin()
        self._secure.begin(self._compressed.training)
        result = super().start(*arguments, **options)
        self._secure.check_summed()
        return result

    @python_call
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages of `Compressed` or of `SecureAggregation`.

        Raises:
            RunError: `plateau` names no metric of the round before, or the first round's messages could not be those
                of a secure round.
            SettingError: see `Compressed` and `SecureAggregation`.
        """
        refuse_around(self, (*CLIPPED_BY_CLIENTS, *CLIPPED_BY_SERVER))
        if self._plateau and server_round > 1:
            name = self._plateau.removeprefix("-")
            value = self._known.get(name)
            if not isinstance(value, int | float):
                raise RunError(f"plateau={self._plateau!r} names none of the metrics {', '.join(sorted(self._known))}")
            self._scores.append(-value if self._plateau.startswith("-") else value)
        secure = self._schedule.kind(server_round, self._scores) == "secure"
        if secure and self._current is self._compressed:
            _FLOWERS_LOG.info("round %d: secure rounds from here on", server_round)
        self._current = self._secure if secure else self._compressed
        messages = self._current.configure_train(server_round, arrays, config, grid)
        if self._unchecked and not secure:
            self._secure.check_messages(self._compressed.plain_messages)
        self._unchecked = False
        return messages

    @python_call
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate as `Compressed` or `SecureAggregation`. Raises RunError if no reply can be used."""
        arrays, metrics = self._current.aggregate_train(server_round, replies)
        self._see(metrics)
        return arrays, metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Call the inner strategy."""
        metrics = self._aggregate_evaluate(server_round, replies)
        self._see(metrics)
        return metrics

    def _see(self, metrics: MetricRecord | None) -> None:
        self._known.update(metrics or {})


def _secure_options(codec: UpdateCodec, secure: Mapping[str, Any] | None) -> SecureOptions:
    check_kind("secure", secure, Mapping | None, "a mapping of options, such as {'bits': 16}")
    check_options(secure or {}, SecureOptions, SecureOptions)
    return SecureOptions(**{"error_feedback": codec.error_feedback, **(secure or {})})
