"""Collects the clients' updates of a round: the interface, the training exchange, and the collector of open rounds."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from flwr.app import Message
from torch import Tensor

from server.checkpoint import Snapshot
from server.client_registry import Client
from server.global_model import GlobalModel
from server.ledger import Ledger
from server.server_noise import ServerNoise
from tofu.errors import PayloadError, RunError
from tofu.flower.internals import LOST
from tofu.flower.transport import Transport, body_of, error_reason, make_message, never
from tofu.observers.base import Observer
from tofu.plugins import Export, Plugins, export_from_bytes
from tofu.recording import Recorder
from tofu.rounds import aggregators
from tofu.rounds.aggregation import Aggregator, example_cap, limit_norm
from tofu.rounds.downlink import Parts
from tofu.secagg.encoding import SecureMean
from tofu.settings.groups import ServerSettings
from tofu.weights import Weights, norm, weights_of
from tofu.wire import (
    CLASSES_LOST,
    CLIENT_ACCURACY,
    HEADER_BYTES,
    RESYNC,
    TrainReply,
    TrainRequest,
    broadcast_id,
    read_payload,
)

LARGE = 10.0
"""An update is reported if its norm is more than this many times the median of the round."""

_MIN_SECONDS = 1.0
"""No request is sent again if less is left of the round."""

_WINDOW = 256
"""Number of messages sent at a time, so that a round with many clients does not hold a model for each of them."""


@dataclass
class RoundState:
    """State of a round that all of its requests share.

    Attributes:
        kind: of the round, one of `tofu.rounds.KINDS`.
        deadline: time at which the round goes on without further replies (`time.monotonic`).
        broadcast: the plugins' state for all clients.
        request_keys: a secure round may follow, for which the clients send keys ahead.
        shown: name of the client whose proxies are kept for the report.
        failures: client name -> reason, in one line, why it could not be used; filled by the collectors.
        over_sampling: clients asked over the number of replies after which a round ends.
        label: of the round, for the user.
        clip_norm: to which clients clip their updates, with differential privacy.
        began: time at which the round began.
        soft_deadline: time from which the round ends as soon as half of the clients have replied.
        silent: names of clients that did not reply; filled by the collectors.
        last_reply: time at which the last reply arrived; written by the collectors.
    """

    round: int
    kind: str
    deadline: float
    broadcast: bytes = b""
    request_keys: bool = False
    shown: str = ""
    failures: dict[str, str] = field(default_factory=dict)
    over_sampling: float = 1.0
    label: str = ""
    clip_norm: float = 0.0
    began: float = 0.0
    soft_deadline: float = math.inf
    silent: set[str] = field(default_factory=set)
    last_reply: float = 0.0

    def may_end(self, asked: int, valid: int) -> bool:
        """Return whether the round may end now without the missing replies of the clients that were asked."""
        return time.monotonic() >= self.soft_deadline and 2 * valid >= asked

    def wanted(self, asked: int) -> int:
        """Return the number of valid replies after which a round with `asked` requests ends."""
        return max(1, math.ceil(asked / self.over_sampling - 1e-9))


@dataclass
class Collected:
    """The updates of one round of one client group.

    Attributes:
        update: mean update, weighted by examples; None if the round was abandoned.
        examples: number of examples of the clients in it.
        sums: totals of the plugins' sums, by name.
        replies: (client, its reply without the payload); empty in a secure round.
        metrics: client name -> metrics of its plugins; empty in a secure round.
        survivors: names of the clients in a secure sum.
        proxies: images [n, c, h, w] of the shown client, in a compressed round.
        with_proxies: number of payloads with proxies; None if the compressor has none.
        secure: all that a secure round revealed.
        abandoned: why a secure round was abandoned, or "".
        late: number of clients whose replies the round did not wait for.
        diversity: of the updates in an open round (`Aggregator.diversity`); None if it is not known.
    """

    update: Weights | None = None
    examples: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    replies: list[tuple[Client, TrainReply]] = field(default_factory=list)
    metrics: dict[str, Mapping[str, float]] = field(default_factory=dict)
    survivors: tuple[str, ...] = ()
    proxies: Tensor | None = None
    with_proxies: int | None = None
    secure: SecureMean | None = None
    abandoned: str = ""
    late: int = 0
    diversity: float | None = None


class Collector(Protocol):
    """One way to collect the updates of a round."""

    def collect(self, model: GlobalModel, clients: list[Client], state: RoundState) -> Collected:
        """Send train requests to the clients, collect their replies and aggregate the updates.

        Raises:
            RunError: no reply is valid.
        """


class TrainExchange:
    """Sends train requests, and repeats them with full weights for clients that cannot use the compressed steps.

    Args:
        ask_again: whether a request is repeated if it or its reply was lost, as all are if the SuperLink's clock is set
            forward: Flower's messages expire by the time of day. False under DP, where every reply counts.
        outputs: `output_sketch` of a user's model, with which clients compare theirs.
        tell_classes: sends the numbering of the run's classes to clients that have lost it.

    Attributes:
        acknowledged: client name -> last round whose reply was added; its error feedback continues from there.
        adverts: client name -> keys that it sent ahead of a secure round.
        late: names of clients whose last reply a round did not wait for: they may still work for it.
    """

    def __init__(
        self,
        transport: Transport,
        ledger: Ledger,
        observer: Observer,
        timeout: float,
        *,
        ask_again: bool = True,
        outputs: bytes = b"",
        tell_classes: Callable[[Sequence[Client], float, int], None] = lambda clients, end, round_: None,
    ) -> None:
        self._transport, self._ledger, self._observer, self._timeout = transport, ledger, observer, timeout
        self._outputs, self._tell_classes = outputs, tell_classes
        self._resent = (RESYNC, CLASSES_LOST, *LOST) if ask_again else (RESYNC, CLASSES_LOST)
        self.acknowledged: dict[str, int] = {}
        self.adverts: dict[str, bytes] = {}
        self.late: set[str] = set()
        self._broadcasts: dict[str, bytes] = {}

    def replies(
        self,
        model: GlobalModel,
        clients: list[Client],
        state: RoundState,
        secure_parts: Mapping[str, bytes] | None = None,
        *,
        enough: Callable[[], bool] = never,
    ) -> Iterator[tuple[Client, Message]]:
        """Send train requests to the clients and yield their replies, errors included, in the order of arrival.

        Args:
            secure_parts: client name -> what its request carries in a secure round.
            enough: whether to stop waiting for the others.
        """
        began = time.monotonic()
        lost: list[Client] = []
        silent = {client.name: client for client in clients}
        self._observer.on_phase(state.round, state.label, "train", 0, len(clients))
        untold: list[Client] = []
        for resend, some in ((False, clients), (True, lost)):
            self._tell_classes(untold, state.deadline, state.round)
            for client, reply in self._send(model, some, state, secure_parts or {}, enough, resend=resend):
                time_left = state.deadline - time.monotonic() > _MIN_SECONDS
                if not resend and time_left and reply.has_error() and reply.error.code in self._resent:
                    self._count_error(client, reply, state, fedavg=False)
                    text = f"round {state.round}: client {client.name} is sent full weights: {error_reason(reply)}"
                    self._observer.on_note(text, round=state.round, node=client.node)
                    lost.append(client)
                    untold += [client] if reply.error.code == CLASSES_LOST else []
                    continue
                silent.pop(client.name, None)
                self.late.discard(client.name)
                state.last_reply = time.monotonic()
                yield client, reply
                done = len(clients) - len(silent)
                self._observer.on_phase(state.round, state.label, "train", done, len(clients))
        waited = self._timeout if time.monotonic() >= state.deadline else round(time.monotonic() - began)
        for name in silent:
            state.failures[name] = f"no reply within {waited:g} s"
        state.silent.update(silent)

    def body(
        self, client: Client, message: Message, model: GlobalModel, state: RoundState
    ) -> tuple[object, TrainReply | None]:
        """Count a reply in the ledger and return its body, parsed unless the round is secure.

        Raises:
            PayloadError: the reply is an error or cannot be parsed.
        """
        if message.has_error():
            self._count_error(client, message, state)
            raise PayloadError(error_reason(message))
        body, reply = body_of(message), None
        nbytes = len(body) if isinstance(body, bytes) else 0
        if state.kind != "secure":
            reply = TrainReply.from_bytes(body)
            nbytes = len(reply.payload)
        self._ledger.add(
            message, round_=state.round, kind=state.kind, direction="uplink", client=client.name,
            payload_bytes=nbytes, full_payload_bytes=_full_bytes(model),
        )  # fmt: skip
        return body, reply

    def delivered(self, client: Client, model: GlobalModel, state: RoundState) -> None:
        """Note that a client holds this round's weights and broadcast, because it replied to them."""
        self._broadcasts[client.name] = broadcast_id(state.broadcast)
        model.downlink.delivered(client.name)

    def save(self, snapshot: Snapshot) -> None:
        """Add the state to a checkpoint. It contains public keys only."""
        snapshot.plain["exchange"] = {
            "acknowledged": self.acknowledged,
            "adverts": {name: advert.hex() for name, advert in self.adverts.items()},
            "broadcasts": {name: identity.hex() for name, identity in self._broadcasts.items()},
        }

    def restore(self, snapshot: Snapshot) -> None:
        """Restore what `save` wrote; only if the clients still have their state, too."""
        plain = snapshot.plain["exchange"]
        self.acknowledged = dict(plain["acknowledged"])
        self.adverts = {name: bytes.fromhex(text) for name, text in plain["adverts"].items()}
        self._broadcasts = {name: bytes.fromhex(text) for name, text in plain["broadcasts"].items()}

    def _send(
        self,
        model: GlobalModel,
        clients: list[Client],
        state: RoundState,
        secure_parts: Mapping[str, bytes],
        enough: Callable[[], bool],
        *,
        resend: bool,
    ) -> Iterator[tuple[Client, Message]]:
        for start in range(0, len(clients), _WINDOW):
            window = clients[start : start + _WINDOW]
            messages = []
            for client in window:
                parts = model.downlink.parts(client.name, whole=resend)
                request = self._request(client, model, parts, state, secure_parts, resend=resend)
                ttl = max(1.0, state.deadline - time.monotonic())
                message = make_message(request.to_bytes(), client.node, "train", round_=state.round, ttl=ttl)
                messages.append(message)
                self._ledger.add(
                    message, round_=state.round, kind=state.kind, direction="downlink", client=client.name,
                    payload_bytes=parts.nbytes, full_payload_bytes=_full_bytes(model), fedavg=not resend,
                )  # fmt: skip
            by_node = {client.node: client for client in window}
            for node, reply in self._transport.exchange(messages, state.deadline, enough):
                yield by_node[node], reply

    def _request(
        self,
        client: Client,
        model: GlobalModel,
        parts: Parts,
        state: RoundState,
        secure_parts: Mapping[str, bytes],
        *,
        resend: bool,
    ) -> TrainRequest:
        down, current = model.downlink, broadcast_id(state.broadcast)
        has = not resend and bool(current) and self._broadcasts.get(client.name) == current
        return TrainRequest(
            state.kind, self.acknowledged.get(client.name, -1), model.shape, parts.payload, down.identity, parts.steps,
            down.sketch, advert=state.request_keys and state.kind != "secure",
            secure=secure_parts.get(client.name, b""),
            broadcast=b"" if has else state.broadcast, kept=current if has else b"", outputs=self._outputs,
        )  # fmt: skip

    def _count_error(self, client: Client, message: Message, state: RoundState, *, fedavg: bool = True) -> None:
        if message.metadata.src_node_id == client.node:  # an error made by Flower itself was not sent
            self._ledger.add(
                message, round_=state.round, kind=state.kind, direction="uplink", client=client.name, fedavg=fedavg
            )


class OpenCollector:
    """Rounds whose updates the server decodes one by one: compressed and fedavg rounds.

    Attributes:
        recorder: saves the messages of some clients; None saves none.
        noise: that the server adds; None if it adds none.
    """

    def __init__(self, exchange: TrainExchange, plugins: Plugins, settings: ServerSettings, observer: Observer) -> None:
        self._exchange, self._plugins, self._settings, self._observer = exchange, plugins, settings, observer
        self.noise: ServerNoise | None = None
        self.recorder: Recorder | None = None

    def collect(self, model: GlobalModel, clients: list[Client], state: RoundState) -> Collected:
        """See `Collector.collect`."""
        rule = aggregators.get(self._settings.aggregator)
        collected = Collected()
        mean: Aggregator = rule(model.reference.param_spec, self._settings.malicious_fraction)
        if self.noise is not None:
            mean = self.noise.begin_mean()
        self._cap = example_cap([client.examples for client in clients], self._settings.max_example_ratio)
        self._norms: dict[str, float] = {}
        exports: dict[str, Export] = {}
        names = {client.name for client in clients}

        def enough() -> bool:
            return state.may_end(len(clients), len(collected.replies))

        for client, message in self._exchange.replies(model, clients, state, enough=enough):
            try:
                exports[client.name] = self._add(client, message, model, state, collected, mean)
            except PayloadError as error:
                state.failures[client.name] = str(error)
            if len(collected.replies) >= state.wanted(len(clients)):
                late = names - {client.name for client, _ in collected.replies} - state.failures.keys()
                collected.late = len(late)
                self._exchange.late |= late
                break
        if not collected.replies:
            reasons = "; ".join(sorted(set(state.failures.values())))
            raise RunError(f"round {state.round}: no valid reply from {len(clients)} clients ({reasons})")
        collected.replies.sort(key=lambda pair: clients.index(pair[0]))
        collected.update, collected.examples = mean.mean(), mean.examples
        collected.diversity = mean.diversity(collected.update)
        if self.noise is None:  # otherwise this is more than the noised mean tells
            self._warn_of_large(state.round)
        ordered = [exports[client.name] for client, _ in collected.replies]
        for name in self._plugins.declare_sums(model.reference.model):
            collected.sums[name] = sum((export.sums[name] for export in ordered[1:]), start=ordered[0].sums[name])
        collected.metrics = {name: export.metrics for name, export in exports.items()}
        return collected

    def _add(
        self,
        client: Client,
        message: Message,
        model: GlobalModel,
        state: RoundState,
        collected: Collected,
        mean: Aggregator,
    ) -> Export:
        """Validate, decode and add one reply. Raises PayloadError for an error or an invalid reply."""
        _, reply = self._exchange.body(client, message, model, state)
        assert reply is not None
        if reply.examples > client.examples:
            raise PayloadError(f"reply has {reply.examples} examples, expected at most {client.examples}")
        compressor, base = model.compressors[state.kind], model.downlink.reference
        payload = read_payload(
            reply.payload, codec=compressor.code, round_=state.round, fingerprint=model.downlink.identity,
            max_bytes=HEADER_BYTES + compressor.body_bytes(base.param_spec),
        )  # fmt: skip
        if self.recorder is not None and self.recorder.wants(client.name):
            self.recorder.save(
                state.round, client.name, kind=state.kind, examples=reply.examples,
                base=weights_of(base.model), payload=reply.payload,
            )  # fmt: skip
        update = compressor.decompress(base, payload.body)
        export = self._read_export(reply.exported, model)
        mean.add(limit_norm(update, base.param_spec, self._settings.max_update_norm), min(reply.examples, self._cap))
        self._norms[client.name] = norm(update, base.param_spec)
        if (planned := compressor.describe()) is not None and planned.proxy_shape[0]:
            content = compressor.describe(payload.body)
            proxies = None if content is None else content.proxies
            collected.with_proxies = (collected.with_proxies or 0) + (proxies is not None)
            if client.name == state.shown:
                collected.proxies = None if proxies is None else proxies.inputs[0]
        collected.replies.append((client, replace(reply, payload=b"", exported=b"")))
        self._exchange.acknowledged[client.name] = state.round
        self._exchange.delivered(client, model, state)
        if model.secure is not None:
            model.secure.scales.observe(update, reply.examples, state.round, reply.explained_variance)
            if reply.advert:
                self._exchange.adverts[client.name] = reply.advert
        return export

    def _warn_of_large(self, round_: int) -> None:
        """Report clients whose update is far longer than the others'."""
        typical = statistics.median(self._norms.values())
        for name, length in self._norms.items():
            if len(self._norms) > 2 and length > LARGE * typical:
                self._observer.on_note(
                    f"round {round_}: the update of client {name} is {length / max(typical, 1e-30):.3g} times as long "
                    f"as the median of the round; aggregator={self._settings.aggregator}",
                    round=round_,
                )  # fmt: skip

    def _read_export(self, data: bytes, model: GlobalModel) -> Export:
        """Parse a client's export. Raises PayloadError if it is not as declared."""
        if not self._plugins and not data:
            return Export()
        export = export_from_bytes(data, self._plugins.declare_sums(model.reference.model))
        try:
            self._plugins.check_sums(export.sums, model.reference.model)
        except RunError as error:
            raise PayloadError(str(error)) from error
        accuracy = export.metrics.get(CLIENT_ACCURACY, 0.0)
        if not 0 <= accuracy <= 1:
            raise PayloadError(f"reply has the accuracy {accuracy:g}, expected 0 to 1")
        return export


def _full_bytes(model: GlobalModel) -> int:
    return HEADER_BYTES + model.reference.param_spec.float32_bytes
