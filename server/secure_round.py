"""Secure rounds on the server: the stages of `tofu.secagg` around the training of a round.

    advert   public keys, sent with the reply of the round before; clients that sent none are asked separately
    share    the roster down, encrypted shares up
    train    the weights and the neighbors' shares down, the masked vector up
    confirm  only with identities: the survivors down, a signature up
    reveal   the survivors down, one share for each neighbor up, and with it the keys for the next secure round

A secure round takes three exchanges, or four with identities. A client that does not answer a stage, or answers it
wrongly, is left out of the next ones. If fewer remain than the threshold, the round is abandoned, and the shares that
were revealed until then decrypt nothing.
"""

import math
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from flwr.app import Message

from server.client_registry import Client
from server.collector import Collected, RoundState, TrainExchange
from server.global_model import GlobalModel
from server.ledger import Ledger
from server.secure_ranges import known_identities
from server.transport import Transport, body_of, error_reason, make_message
from tofu.errors import PayloadError, RunError, SettingError
from tofu.observers.base import Observer
from tofu.plugins import Plugins
from tofu.secagg.encoding import RingEncoder, SecureMean, flat, purpose_of
from tofu.secagg.server import ServerSession
from tofu.settings import MIN_SECURE, Settings
from tofu.weights import weights_of
from tofu.wire import SECURE, SecureAnswer, SecurePart, SecureQuery, run_name


class AbandonedError(RunError):
    """Too few clients remain in a secure round: it reveals nothing, and the run continues with the next round."""


@dataclass(frozen=True)
class _Opened:
    """A secure round between the stages share and reveal.

    Attributes:
        encoder: of the clients' vectors.
        parts: client name -> what its train request carries.
    """

    session: ServerSession
    encoder: RingEncoder
    clients: Mapping[str, Client]
    parts: Mapping[str, bytes]


class SecureCollector:
    """Rounds of which the server learns the sum of the updates only."""

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
        self._known = known_identities(settings)

    def collect(self, model: GlobalModel, clients: list[Client], state: RoundState) -> Collected:
        """See `Collector.collect`; an abandoned round is reported in the result."""
        assert model.secure is not None
        self._observer.on_phase(state.round, "secure", "share", 0, len(clients))
        try:
            opened = self._open(model, clients, state)
            self._train(model, opened, state)
            self._observer.on_phase(state.round, "secure", "reveal", 0, len(opened.parts))
            mean, survivors = self._close(opened, state)
        except AbandonedError as error:
            self._observer.on_note(f"round {state.round} is abandoned: {error}", round=state.round)
            return Collected(abandoned=str(error))
        model.secure.advance(mean.ranges)
        if mean.clipped:
            self._observer.on_note(
                f"round {state.round}: {mean.clipped} values of all clients were clipped, the largest at most "
                f"{mean.furthest:.3g} times its range; error feedback sends the remainder later",
                round=state.round,
            )
        for name in survivors:
            self._exchange.acknowledged[name] = state.round
        self._plugins.check_sums(mean.sums, model.reference.model, clients=len(survivors))
        return Collected(mean.update, mean.examples, mean.sums, survivors=survivors, secure=mean)

    def _open(self, model: GlobalModel, clients: list[Client], state: RoundState) -> _Opened:
        """Collect keys and shares. Raises AbandonedError if too few clients take part."""
        assert model.secure is not None
        able = self._collect_keys(clients, state)
        weights = weights_of(model.downlink.reference.model)
        declared = self._plugins.declare_sums(model.reference.model)
        with _abandoning():
            config, encoder = model.secure.encoding(able, declared, flat(weights) - model.initial)
        session = ServerSession(
            run_name(self._transport.run_id), state.round, values=encoder.length, bits=config.bits, known=self._known,
            purpose=purpose_of(config, weights, state.broadcast),
        )  # fmt: skip
        count = 0
        for client in able:
            with _blaming(client, state):
                session.add_advert(client.name, self._exchange.adverts.pop(client.name))
                count += 1
        if count < MIN_SECURE:
            raise AbandonedError(f"{count} clients sent keys, a secure round takes at least {MIN_SECURE}")
        with _abandoning():
            rosters = session.rosters(self._settings.topology(count))
        for client, answer in self._ask(able, "share", rosters, state):
            with _blaming(client, state):
                session.add_shares(client.name, answer.message)
        with _abandoning():
            deliveries = session.deliveries()
        parts = {name: SecurePart(config.to_bytes(), shares).to_bytes() for name, shares in deliveries.items()}
        return _Opened(session, encoder, {client.name: client for client in able}, parts)

    def _collect_keys(self, clients: list[Client], state: RoundState) -> list[Client]:
        """Ask clients that sent no keys ahead for them, and return those that have sent some."""
        adverts = self._exchange.adverts
        missing = {client.name: b"" for client in clients if client.name not in adverts}
        for client, answer in self._ask(clients, "advert", missing, state):
            if answer.advert:
                adverts[client.name] = answer.advert
        return [client for client in clients if client.name in adverts]

    def _train(self, model: GlobalModel, opened: _Opened, state: RoundState) -> None:
        """Have the clients train and add their masked vectors."""
        trainers = [client for client in opened.clients.values() if client.name in opened.parts]
        for client, message in self._exchange.replies(model, trainers, state, opened.parts):
            with _blaming(client, state):
                masked, _ = self._exchange.body(client, message, model, state)
                if not isinstance(masked, bytes):
                    raise PayloadError("masked vector has 0 bytes, expected one of `tofu.secagg`")
                opened.session.add_masked(client.name, masked)
                self._exchange.delivered(client, model, state)

    def _close(self, opened: _Opened, state: RoundState) -> tuple[SecureMean, tuple[str, ...]]:
        """Collect the shares that remove the masks, and decode the sum.

        A client that fails here is in the sum all the same. Raises AbandonedError if too few clients remain.
        """
        session, clients = opened.session, opened.clients.values()
        with _abandoning():
            messages = session.survivors()
        if self._known is not None:
            for client, answer in self._ask(clients, "confirm", messages, state):
                with _blaming(client, state):
                    session.add_confirmation(client.name, answer.message)
            with _abandoning():
                messages = session.reveal_requests()
        for client, answer in self._ask(clients, "reveal", messages, state, advert=state.request_keys):
            with _blaming(client, state):
                session.add_reveal(client.name, answer.message)
                if answer.advert:
                    self._exchange.adverts[client.name] = answer.advert
        with _abandoning():
            total = session.finish()
            return opened.encoder.decode(total.vector, len(total.survivors)), total.survivors

    def _ask(
        self,
        clients: Collection[Client],
        stage: str,
        messages: Mapping[str, bytes],
        state: RoundState,
        *,
        advert: bool = False,
    ) -> Iterator[tuple[Client, SecureAnswer]]:
        """Run one stage with the clients that have a message in `messages`; yields the valid answers."""
        seconds = self._settings.secure_timeout
        silent = {client.node: client for client in clients if client.name in messages}
        requests = []
        for node, client in silent.items():
            query = SecureQuery(stage, messages[client.name], advert).to_bytes()
            request = make_message(query, node, f"query.{SECURE}", round_=state.round, ttl=math.ceil(seconds))
            self._count(request, client, state, "downlink")
            requests.append(request)
        for node, reply in self._transport.exchange(requests, time.monotonic() + seconds) if requests else ():
            client = silent.pop(node)
            if reply.metadata.src_node_id == node:  # otherwise Flower made the error, and nothing was sent
                self._count(reply, client, state, "uplink")
            answer = None
            with _blaming(client, state):
                if reply.has_error():
                    raise PayloadError(error_reason(reply))
                answer = SecureAnswer.from_bytes(body_of(reply))
            if answer is not None:
                yield client, answer
        for client in silent.values():
            state.failures[client.name] = f"no answer at stage {stage} within {seconds:g} s"

    def _count(self, message: Message, client: Client, state: RoundState, direction: str) -> None:
        self._ledger.add(
            message, round_=state.round, kind="secure", direction=direction, client=client.name, fedavg=False
        )


@contextmanager
def _blaming(client: Client, state: RoundState) -> Iterator[None]:
    """Record an invalid message as its sender's failure, and continue the round."""
    try:
        yield
    except PayloadError as error:
        state.failures[client.name] = str(error)


@contextmanager
def _abandoning() -> Iterator[None]:
    """Abandon the round if the session ends."""
    try:
        yield
    except (RunError, SettingError) as error:
        raise AbandonedError(str(error)) from error
