"""Secure rounds on the server: the stages of secure aggregation before and after the training of a round.

A secure round takes three exchanges with the clients, or four with identities (`tofu.flower.secure_stages`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message

from server.client_registry import Client
from server.collector import Collected, RoundState, TrainExchange
from server.global_model import GlobalModel
from server.ledger import Ledger
from server.secure_ranges import known_identities
from tofu.errors import PayloadError, RunError
from tofu.flower.secure_stages import AbandonedError, SecureExchange, abandoning
from tofu.flower.transport import Transport
from tofu.formatting import shortened
from tofu.observers.base import Observer
from tofu.plugins import Plugins
from tofu.secagg.encoding import RingEncoder, SecureMean, flat, purpose_of
from tofu.secagg.graph import Topology
from tofu.secagg.server import ServerSession
from tofu.settings import MIN_SECURE, Settings
from tofu.weights import weights_of
from tofu.wire import SecurePart, run_name


@dataclass(frozen=True)
class _Opened:
    """State of a secure round between the stages share and reveal.

    Attributes:
        encoder: encoder of the clients' vectors.
        clients: those that sent keys, by name.
        asked: names of all clients that were asked for keys.
        parts: client name -> what its train request carries.
        stages: the exchanges with these clients.
    """

    session: ServerSession
    encoder: RingEncoder
    clients: Mapping[str, Client]
    asked: set[str]
    parts: Mapping[str, bytes]
    stages: SecureExchange


class SecureCollector:
    """Collects secure rounds, of which the server learns only the sum of the updates."""

    def __init__(
        self,
        transport: Transport,
        exchange: TrainExchange,
        ledger: Ledger,
        observer: Observer,
        settings: Settings,
        plugins: Plugins,
    ) -> None:
        self._transport, self._exchange, self._ledger = transport, exchange, ledger
        self._observer, self._settings, self._plugins = observer, settings, plugins
        self._known = known_identities(settings.secure)

    def collect(self, model: GlobalModel, clients: list[Client], state: RoundState) -> Collected:
        """See `Collector.collect`; an abandoned round is reported in the result."""
        assert model.secure is not None
        self._observer.on_phase(state.round, "secure", "share", 0, len(clients))
        try:
            opened = self._open(model, clients, state)
            late = self._train(model, opened, state)
            self._observer.on_phase(state.round, "secure", "reveal", 0, len(opened.parts))
            mean, survivors = self._close(opened, state)
            with abandoning():
                self._plugins.check_sums(mean.sums, model.reference.model, clients=len(survivors))
        except AbandonedError as error:
            reasons = sorted(set(state.failures.values()))
            reason = f"{error}{f' ({shortened(reasons, 3)})' if reasons else ''}"
            self._observer.on_note(f"round {state.round} is abandoned: {reason}", round=state.round)
            return Collected(abandoned=reason)
        model.secure.advance(mean.ranges)
        if mean.clipped:
            self._observer.on_note(
                f"round {state.round}: {mean.clipped} values of all clients were clipped, the largest at most "
                f"{mean.largest_clipped:.3g} times its range; error feedback sends the remainder later",
                round=state.round,
            )
        for name in survivors:
            self._exchange.acknowledged[name] = state.round
        return Collected(mean.update, mean.examples, mean.sums, survivors=survivors, secure=mean, late=len(late))

    def _open(self, model: GlobalModel, clients: list[Client], state: RoundState) -> _Opened:
        """Collect keys and shares. Raises AbandonedError if too few clients take part."""
        assert model.secure is not None
        adverts = self._exchange.adverts
        busy = self._exchange.late & {client.name for client in clients}
        wanted = max(MIN_SECURE, state.wanted(len(clients)))
        self._stages(clients, state).collect_keys(adverts, busy=busy, wanted=wanted)
        able = [client for client in clients if client.name in adverts]
        stages = self._stages(able, state)
        weights = weights_of(model.downlink.reference.model)
        declared = self._plugins.declare_sums(model.reference.model)
        with abandoning():
            config, encoder = model.secure.encoding(able, declared, flat(weights) - model.initial, state.clip_norm)
        session = ServerSession(
            run_name(self._transport.run_id), state.round, values=encoder.length, bits=config.bits, known=self._known,
            purpose=purpose_of(config, weights, state.broadcast, *self._settings.meaning(state.round)),
        )  # fmt: skip
        deliveries = stages.share_keys(
            session, adverts, lambda count: Topology.of(self._settings.secure, count), min_clients=MIN_SECURE
        )
        parts = {name: SecurePart(config.to_bytes(), shares).to_bytes() for name, shares in deliveries.items()}
        asked = {client.name for client in clients}
        return _Opened(session, encoder, {client.name: client for client in able}, asked, parts, stages)

    def _train(self, model: GlobalModel, opened: _Opened, state: RoundState) -> set[str]:
        """Collect the masked vectors, and return the names of the clients that were not waited for."""
        trainers = [client for client in opened.clients.values() if client.name in opened.parts]
        arrived: set[str] = set()

        def enough() -> bool:
            return state.may_end(len(trainers), len(arrived)) and opened.session.has_enough

        for client, message in self._exchange.replies(model, trainers, state, opened.parts, enough=enough):
            with opened.stages.blaming(client.name):
                masked, _ = self._exchange.body(client, message, model, state)
                if not isinstance(masked, bytes):
                    raise PayloadError("masked vector has 0 bytes, expected one of `tofu.secagg`")
                opened.session.add_masked(client.name, masked)
                arrived.add(client.name)
                self._exchange.delivered(client, model, state)
            if len(arrived) >= state.wanted(len(opened.asked)) and opened.session.has_enough:
                break
        late = opened.asked - arrived - state.failures.keys()
        self._exchange.late |= late
        return late

    def _close(self, opened: _Opened, state: RoundState) -> tuple[SecureMean, tuple[str, ...]]:
        """Collect the shares that remove the masks, and decode the sum.

        A client that fails here stays in the sum. Raises AbandonedError if too few clients remain.
        """
        total = opened.stages.unmask(
            opened.session, self._exchange.adverts,
            identified=self._known is not None, request_keys=state.request_keys,
        )  # fmt: skip
        with abandoning():
            mean = opened.encoder.decode(total.vector, len(total.survivors))
            self._check_examples(mean, [opened.clients[name].examples for name in total.survivors])
        return mean, total.survivors

    def _check_examples(self, mean: SecureMean, claimed: Sequence[int]) -> None:
        """Raises RunError if the sum holds more examples than its clients have; noise may change the number."""
        if not self._settings.privacy.noise_multiplier and mean.examples > 1.01 * sum(claimed) + len(claimed):
            raise RunError(f"the sum holds {mean.examples} examples, its clients have {sum(claimed)}")

    def _stages(self, clients: list[Client], state: RoundState) -> SecureExchange:
        """Return the exchanges of a round with these clients, whose messages the ledger counts."""
        by_name = {client.name: client.node for client in clients}
        seconds = self._settings.secure.secure_timeout

        def count(message: Message, name: str, direction: str) -> None:
            self._ledger.add(message, round_=state.round, kind="secure", direction=direction, client=name, fedavg=False)

        return SecureExchange(
            self._transport, by_name, state.round, seconds, state.failures, count=count, silent=state.silent
        )
