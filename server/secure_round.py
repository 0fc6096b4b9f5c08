"""Secure rounds on the server: the exchanges of `tofu.secagg` around the training of a round.

    advert   keys, with the reply of the round before; only clients that sent none are asked for them apart
    share    the roster down, sealed shares up
    train    the weights and the neighbors' shares down, the masked vector up
    confirm  only with identities: who survived down, a signature up
    reveal   who survived down, one share for each neighbor up, and with it the keys for the next secure round

So a secure round takes three exchanges, or four with identities. A client that is silent or wrong in one of them is
left out; where fewer stay than the threshold the round is abandoned, and what was revealed by then opens nothing.
"""

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from server.checkpoint import Snapshot
from server.client_registry import Client, exchange, one_line
from server.ledger import Ledger
from tofu.errors import PayloadError, RunError, SettingError
from tofu.plugins import SumSpec
from tofu.secagg import coordinates
from tofu.secagg.encoding import EncodingConfig, RingEncoder, SecureMean, first_ranges, flat, nearest_range, purpose_of
from tofu.secagg.fixed_point import HEADROOM, FixedPoint
from tofu.secagg.identities import read_known
from tofu.secagg.server import ServerSession
from tofu.settings import MIN_SECURE, Settings
from tofu.weights import ParamSpec, Weights
from tofu.wire import FIELD, RECORD, SECURE, SecureAnswer, SecurePart, SecureQuery, TrainReply, run_name


class AbandonedError(RunError):
    """Too few clients stayed: nothing is known of this round's updates, and nothing is lost but the round."""


@dataclass(frozen=True)
class OpenRound:
    """A secure round whose clients have shared and are to train.

    Attributes:
        code: of their vectors.
        parts: client name -> what its train request carries.
    """

    round: int
    code: RingEncoder
    parts: Mapping[str, bytes]
    clients: Mapping[str, Client]
    session: ServerSession

    def add(self, client: Client, masked: object) -> None:
        """Add a client's masked vector. Raises PayloadError."""
        if not isinstance(masked, bytes):
            raise PayloadError("masked vector has 0 bytes, expected one of `tofu.secagg`")
        self.session.add_masked(client.name, masked)


MIN_EXPLAINED = 0.05
"""Of an update, by what its client says: less is taken for so much."""


@dataclass
class UpdateScaleTracker:
    """How large the clients' weighted values were where the server saw them, by tensor.

    Attributes:
        peaks: the largest of all rounds.
        powers: sum of the clients' mean squares in the last such round, in units of 2^-64: whole numbers, so that it
            does not depend on who answered first. Of what clients wanted to send, which is more than what arrived.
        clients: of that round.
        round: its number.
    """

    peaks: dict[str, float] = field(default_factory=dict)
    powers: dict[str, int] = field(default_factory=dict)
    clients: int = 0
    round: int = 0

    def add(self, update: Weights, examples: int, round_: int, explained: float) -> None:
        """A client's decoded update, and what share of its power that is by what the client says."""
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
        """Root mean squares, over the last round's clients."""
        return {name: math.sqrt(math.ldexp(power, -64) / self.clients) for name, power in self.powers.items()}


class SecureRounds:
    """What the server keeps for a run's secure rounds: keys that came ahead, and the ranges of the last sum."""

    def __init__(self, grid: Grid, ledger: Ledger, settings: Settings) -> None:
        self._grid, self._ledger, self._settings = grid, ledger, settings
        self._known = _known(settings)
        self._adverts: dict[str, bytes] = {}

    def begin(self, param_spec: ParamSpec) -> None:
        """Begin with a model: nothing is known of the ranges of its updates.

        Raises:
            SettingError: the noise that is asked for does not fit the ring.
        """
        settings = self._settings
        clients = max(round(settings.client_fraction * settings.clients), settings.min_clients, MIN_SECURE)
        share, bits = coordinates.settings_for(settings.secure_ratio, clients)
        levels = FixedPoint(clients, bits, 1.0).levels
        values = math.ceil(share * param_spec.float32_bytes / 4)
        settings.noise_in_sum(settings.topology(clients), clients, levels=levels, values=values)
        self._param_spec, self._turn = param_spec, 0
        self._ranges: tuple[float, ...] = ()
        self._seen = UpdateScaleTracker()

    @staticmethod
    def check(settings: Settings) -> None:
        """Raises SettingError where the identities cannot be read, or no graph bears the dropouts and max_colluding."""
        settings.topology(max(round(settings.client_fraction * settings.clients), settings.min_clients, MIN_SECURE))
        _known(settings)

    def save(self, snapshot: Snapshot) -> None:
        """Put what the next rounds need into a checkpoint. The keys are public ones."""
        adverts = {name: advert.hex() for name, advert in self._adverts.items()}
        snapshot.plain["secure"] = {
            "turn": self._turn,
            "ranges": self._ranges,
            "seen": vars(self._seen),
            "adverts": adverts,
        }

    def restore(self, snapshot: Snapshot, *, clients_kept: bool) -> None:
        """The inverse of `save`; clients that lost what they had are asked for keys anew."""
        plain = snapshot.plain["secure"]
        self._turn, self._ranges, self._seen = (
            plain["turn"],
            tuple(plain["ranges"]),
            UpdateScaleTracker(**plain["seen"]),
        )
        if clients_kept:
            self._adverts = {name: bytes.fromhex(advert) for name, advert in plain["adverts"].items()}

    def keep_advert(self, client: Client, advert: bytes) -> None:
        """Keys that a client sent ahead."""
        if advert:
            self._adverts[client.name] = advert

    def learn(self, update: Weights, reply: TrainReply, round_: int) -> None:
        """How large a client's decoded update is in a round that shows it, for the first secure round's ranges."""
        self._seen.add(update, reply.examples, round_, reply.explained_variance)

    def open(
        self,
        asked: Sequence[Client],
        round_: int,
        failures: dict[str, str],
        declared: Mapping[str, SumSpec],
        weights: Weights,
        initial: Tensor,
        broadcast: bytes,
    ) -> OpenRound:
        """Collect keys and shares.

        Args:
            failures: client name -> reason, filled in.
            declared: what plugins sum beside the update.
            weights: that clients train from.
            initial: those that the run began with, as one vector.
            broadcast: of the plugins.

        Raises:
            AbandonedError: too few clients took part.
        """
        lacking = [client for client in asked if client.name not in self._adverts]
        for client, answer in self._ask(lacking, "advert", {client.name: b"" for client in lacking}, round_, failures):
            self.keep_advert(client, answer.advert)
        able = [client for client in asked if client.name in self._adverts]
        with _abandoning():
            terms, code = self._terms(able, declared, flat(weights) - initial)
        purpose = purpose_of(terms, weights, broadcast)
        run, values = run_name(self._grid.run.run_id), code.length
        session = ServerSession(run, round_, values=values, bits=terms.bits, known=self._known, purpose=purpose)
        came = 0
        for client in able:
            with _blaming(client, failures):
                session.add_advert(client.name, self._adverts.pop(client.name))
                came += 1
        if came < MIN_SECURE:
            raise AbandonedError(f"{came} clients sent keys, a secure round takes at least {MIN_SECURE}")
        clients = {client.name: client for client in able}
        with _abandoning():
            rosters = session.rosters(self._settings.topology(came))
        for client, answer in self._ask(clients.values(), "share", rosters, round_, failures):
            with _blaming(client, failures):
                session.add_shares(client.name, answer.message)
        with _abandoning():
            deliveries = session.deliveries()
        part = terms.to_bytes()
        parts = {name: SecurePart(part, shares).to_bytes() for name, shares in deliveries.items()}
        return OpenRound(round_, code, parts, clients, session)

    def close(self, opened: OpenRound, failures: dict[str, str], *, again: bool) -> tuple[SecureMean, tuple[str, ...]]:
        """Settle who survived, collect what takes off the masks, and decode.

        Args:
            failures: client name -> reason, of clients that were left out of a later stage; a client whose vector
                came is in the sum all the same.
            again: another secure round may follow, for which the clients send keys.

        Returns:
            The mean update, and the names of the clients in it.

        Raises:
            AbandonedError: too few clients stayed.
        """
        session, clients, round_ = opened.session, opened.clients, opened.round
        with _abandoning():
            messages = session.survivors()
        if self._known is not None:
            for client, answer in self._ask(clients.values(), "confirm", messages, round_, failures):
                with _blaming(client, failures):
                    session.add_confirmation(client.name, answer.message)
            with _abandoning():
                messages = session.reveal_requests()
        for client, answer in self._ask(clients.values(), "reveal", messages, round_, failures, advert=again):
            with _blaming(client, failures):
                session.add_reveal(client.name, answer.message)
                self.keep_advert(client, answer.advert)
        with _abandoning():
            total = session.finish()
            mean = opened.code.decode(total.vector, len(total.survivors))
        self._ranges, self._turn = mean.ranges, self._turn + 1
        return mean, total.survivors

    def _terms(
        self, able: Sequence[Client], declared: Mapping[str, SumSpec], moved: Tensor
    ) -> tuple[EncodingConfig, RingEncoder]:
        """What these clients are to agree on."""
        settings, clients = self._settings, max(len(able), MIN_SECURE)
        unit = sum(client.examples for client in able) / len(able) if able else 1.0
        share, bits = coordinates.settings_for(settings.secure_ratio, clients)
        levels = FixedPoint(clients, bits, 1.0).levels
        # With ranges that nothing is known of, rounding to the nearest step could leave nothing at all.
        coarse = settings.coarse(levels) and bool(self._ranges or self._seen.powers)
        known = self._seen.deviations() if coarse else self._seen.peaks
        factor = (nearest_range(levels) if coarse else HEADROOM) / unit
        ranges = self._ranges or first_ranges(self._param_spec, {name: factor * size for name, size in known.items()})
        moved_ = moved if share < 1 else None

        def agreed(ranges: tuple[float, ...], digest: bytes) -> EncodingConfig:
            terms = EncodingConfig(clients, bits, unit, ranges, share, self._turn, digest, coarse)
            return EncodingConfig.from_bytes(terms.to_bytes())  # rounded as the clients will read them

        draft = RingEncoder(self._param_spec, agreed(ranges, b""), declared, moved_)
        topology = settings.topology(clients)
        if noise := settings.noise_in_sum(topology, clients, levels=draft.levels, values=draft.values):
            ranges = (noise.grid * draft.levels,) * len(self._param_spec.shapes)  # never adapts to what was summed
        terms = agreed(ranges, draft.digest)
        return terms, RingEncoder(self._param_spec, terms, declared, moved_)

    def _ask(
        self,
        clients: Collection[Client],
        stage: str,
        messages: Mapping[str, bytes],
        round_: int,
        failures: dict[str, str],
        *,
        advert: bool = False,
    ) -> Iterator[tuple[Client, SecureAnswer]]:
        """One exchange with those clients that have a message in `messages`; yields the answers that can be read."""
        seconds = self._settings.secure_timeout
        asked = {client.node: client for client in clients if client.name in messages}
        requests = []
        for node, client in asked.items():
            query = SecureQuery(stage, messages[client.name], advert).to_bytes()
            content = RecordDict({RECORD: ConfigRecord({FIELD: query})})
            request = Message(content, node, f"query.{SECURE}", group_id=str(round_), ttl=math.ceil(seconds))
            self._count(request, client, round_, "downlink")
            requests.append(request)
        silent = dict(asked)
        for node, reply in exchange(self._grid, requests, time.monotonic() + seconds) if requests else ():
            client = silent.pop(node)
            if reply.metadata.src_node_id == node:  # else it is an error of the network's own
                self._count(reply, client, round_, "uplink")
            answer = None
            with _blaming(client, failures):
                answer = _read(reply)
            if answer is not None:
                yield client, answer
        for client in silent.values():
            failures[client.name] = f"no answer at stage {stage} within {seconds:g} s"

    def _count(self, message: Message, client: Client, round_: int, direction: str) -> None:
        self._ledger.add(message, round_=round_, kind="secure", direction=direction, client=client.name, fedavg=False)


def _known(settings: Settings) -> dict[str, bytes] | None:
    return read_known(Path(settings.secure_identities)) if settings.secure_identities else None


def _read(reply: Message) -> SecureAnswer:
    """Raises PayloadError where the reply is an error, or no answer."""
    if reply.has_error():
        raise PayloadError(one_line(reply.error.reason))
    record = reply.content.config_records.get(RECORD)
    return SecureAnswer.from_bytes(record.get(FIELD) if record is not None else None)


@contextmanager
def _blaming(client: Client, failures: dict[str, str]) -> Iterator[None]:
    """A message that cannot be used is its sender's failure; the round goes on."""
    try:
        yield
    except PayloadError as error:
        failures[client.name] = str(error)


@contextmanager
def _abandoning() -> Iterator[None]:
    """What ends a session abandons the round."""
    try:
        yield
    except (RunError, SettingError) as error:
        raise AbandonedError(str(error)) from error
