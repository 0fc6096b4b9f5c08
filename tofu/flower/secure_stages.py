"""The stages of `tofu.secagg` before and after the training of a secure round, on the server.

    advert   public keys, sent with an answer of the round before; clients that sent none are asked separately
    share    the roster down, encrypted shares up
    confirm  only with identities: the survivors down, a signature up
    reveal   the survivors down, one share for each neighbor up, and with it the keys for the next secure round

Between share and confirm the caller sends the weights with the neighbors' shares, and collects the masked vectors. A
client that does not answer a stage, or answers it wrongly, is left out of the next ones. If fewer remain than the
threshold, the round is abandoned, and the shares that were revealed until then decrypt nothing.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from flwr.app import Message

from tofu.errors import PayloadError, RunError, SettingError
from tofu.flower.transport import Transport, body_of, error_reason, make_message, never
from tofu.secagg.graph import Topology
from tofu.secagg.server import ServerSession, Total
from tofu.wire import SECURE, SecureAnswer, SecureQuery


class AbandonedError(RunError):
    """Too few clients remain in a secure round: it reveals nothing, and the run continues with the next round."""


@dataclass
class SecureExchange:
    """Asks clients for the stages of one round.

    Attributes:
        clients: name -> node.
        seconds: maximum duration of a stage.
        failures: client name -> reason, in one line, why it could not be used; filled here.
        action: type of the messages.
        count: called with every message, the client's name and its direction.
        silent: names of clients that did not answer a stage; filled here.
    """

    transport: Transport
    clients: Mapping[str, int]
    round: int
    seconds: float
    failures: dict[str, str] = field(default_factory=dict)
    action: str = f"query.{SECURE}"
    count: Callable[[Message, str, str], None] = lambda message, name, direction: None
    silent: set[str] = field(default_factory=set)

    def ask(
        self,
        stage: str,
        messages: Mapping[str, bytes],
        *,
        advert: bool = False,
        enough: Callable[[], bool] = never,
        busy: Collection[str] = (),
    ) -> Iterator[tuple[str, SecureAnswer]]:
        """Run one stage with the clients that have a message in `messages`; yields the valid answers by name.

        Args:
            enough: whether to stop waiting for the others.
            busy: clients that do not fail if they do not answer.
        """
        silent = {node: name for name, node in self.clients.items() if name in messages}
        requests = []
        for node, name in silent.items():
            query = SecureQuery(stage, messages[name], advert).to_bytes()
            request = make_message(query, node, self.action, round_=self.round, ttl=math.ceil(self.seconds))
            self.count(request, name, "downlink")
            requests.append(request)
        deadline = time.monotonic() + self.seconds
        for node, reply in self.transport.exchange(requests, deadline, enough) if requests else ():
            name = silent.pop(node)
            if reply.metadata.src_node_id == node:  # an error made by Flower itself was not sent
                self.count(reply, name, "uplink")
            answer = None
            with self.blaming(name):
                if reply.has_error():
                    raise PayloadError(error_reason(reply))
                answer = SecureAnswer.from_bytes(body_of(reply))
            if answer is not None:
                yield name, answer
        for name in set(silent.values()) - set(busy):
            self.failures[name] = f"no answer at stage {stage} within {self.seconds:g} s"
            self.silent.add(name)

    @contextmanager
    def blaming(self, name: str) -> Iterator[None]:
        """Record an invalid message as its sender's failure, and continue the round."""
        try:
            yield
        except PayloadError as error:
            self.failures[name] = str(error)

    def collect_keys(self, adverts: dict[str, bytes], *, busy: Collection[str] = (), wanted: int = 0) -> None:
        """Ask clients that sent no keys ahead for them, and add them to `adverts`.

        Args:
            busy: clients that still work for an earlier round: they are not waited for once `wanted` others sent keys.
        """
        missing = {name: b"" for name in self.clients if name not in adverts}
        waiting = set(missing) - set(busy)

        def enough() -> bool:
            return not waiting and sum(name in adverts for name in self.clients) >= wanted

        for name, answer in self.ask("advert", missing, enough=enough if busy else never, busy=busy):
            waiting.discard(name)
            if answer.advert:
                adverts[name] = answer.advert

    def share_keys(
        self,
        session: ServerSession,
        adverts: dict[str, bytes],
        topology: Callable[[int], Topology],
        *,
        min_clients: int,
    ) -> dict[str, bytes]:
        """Exchange shares; return client name -> its neighbors' shares, for all clients that may train.

        Args:
            adverts: public keys by name; those of this round's clients are removed, because keys are used once.
            topology: makes the graph for a number of clients.

        Raises:
            AbandonedError: too few clients take part.
        """
        count = 0
        for name in self.clients:
            if name in adverts:
                with self.blaming(name):
                    session.add_advert(name, adverts.pop(name))
                    count += 1
        if count < min_clients:
            raise AbandonedError(f"{count} clients sent keys, a secure round takes at least {min_clients}")
        with abandoning():
            rosters = session.rosters(topology(count))
        for name, answer in self.ask("share", rosters):
            with self.blaming(name):
                session.add_shares(name, answer.message)
        with abandoning():
            return session.deliveries()

    def unmask(
        self, session: ServerSession, adverts: dict[str, bytes], *, identified: bool, request_keys: bool
    ) -> Total:
        """Collect the shares that remove the masks from the sum.

        A client that fails here stays in the sum.

        Args:
            adverts: receives the keys for the next secure round if `request_keys`.
            identified: clients have identities.

        Raises:
            AbandonedError: too few clients remain.
        """
        with abandoning():
            messages = session.survivors()
        if identified:
            for name, answer in self.ask("confirm", messages):
                with self.blaming(name):
                    session.add_confirmation(name, answer.message)
            with abandoning():
                messages = session.reveal_requests()
        for name, answer in self.ask("reveal", messages, advert=request_keys):
            with self.blaming(name):
                session.add_reveal(name, answer.message)
                if answer.advert:
                    adverts[name] = answer.advert
        with abandoning():
            total = session.finish()
        self.failures.update(total.wrong)
        return total


@contextmanager
def abandoning() -> Iterator[None]:
    """Turn errors of the session into an `AbandonedError`."""
    try:
        yield
    except (RunError, SettingError) as error:
        raise AbandonedError(str(error)) from error
