"""A whole session among clients in one process, with dropouts at chosen stages and a record of what the server got."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tofu.secagg.client import ClientSession
from tofu.secagg.graph import Topology
from tofu.secagg.identities import Identity
from tofu.secagg.masks import RingVector, largest
from tofu.secagg.participant import Participant
from tofu.secagg.server import ServerSession, Total

RUN = b"a run for tests"
STAGES = ("share", "mask", "confirm", "reveal")


def ring_bits(clients: int, value_bits: int) -> int:
    """Bits of the smallest ring in which the sum of `clients` values of `value_bits` bits cannot overflow."""
    return (2 * clients * (2 ** (value_bits - 1) - 1)).bit_length()


def names(count: int) -> list[str]:
    return [f"client-{number}" for number in range(count)]


def members(count: int, *, signed: bool, max_colluding: int = 0) -> dict[str, Participant]:
    """Members of one run, with identities or without."""
    if not signed:
        return {name: Participant(RUN, name, max_colluding=max_colluding, min_neighbors=1) for name in names(count)}
    identities = {name: Identity.generate(name) for name in names(count)}
    known = {name: identity.public for name, identity in identities.items()}
    return {
        name: Participant(RUN, name, identity, known, max_colluding=max_colluding, min_neighbors=1)
        for name, identity in identities.items()
    }


def random_vectors(count: int, values: int, bits: int, seed: int = 0) -> dict[str, RingVector]:
    generator = np.random.default_rng(seed)
    return {
        name: generator.integers(0, int(largest(bits)), values, dtype=np.uint64, endpoint=True) for name in names(count)
    }


def plain_sum(vectors: Mapping[str, RingVector], which: tuple[str, ...], bits: int) -> RingVector:
    """The sum mod 2^b in Python's integers of any size."""
    columns = zip(*(vectors[name].tolist() for name in which), strict=True)
    return np.array([sum(column) % 2**bits for column in columns], dtype=np.uint64)


@dataclass
class Session:
    """Both ends of a session.

    Attributes:
        vectors: of each client.
        gone: client -> the stage that it does not answer any more, nor any later.
        saved: clients are written to bytes and read back between all stages.
        received: what the server got, (client, stage, bytes).
    """

    vectors: Mapping[str, RingVector]
    bits: int
    topology: Topology
    signed: bool = False
    gone: Mapping[str, str] = field(default_factory=dict)
    saved: bool = False
    received: list[tuple[str, str, bytes]] = field(default_factory=list)
    clients: dict[str, ClientSession] = field(default_factory=dict)
    members: dict[str, Participant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.members = self.members or members(len(self.vectors), signed=self.signed)
        self.clients = {name: ClientSession(member) for name, member in self.members.items()}
        some = next(iter(self.members.values()))
        values = len(next(iter(self.vectors.values())))
        self.server = ServerSession(RUN, 3, values=values, bits=self.bits, known=some.known)
        self.down: dict[str, bytes] = {}
        self.rosters: dict[str, bytes] = {}

    def there(self, name: str, stage: str) -> bool:
        return name not in self.gone or STAGES.index(self.gone[name]) > STAGES.index(stage)

    def client(self, name: str) -> ClientSession:
        if self.saved:
            self.clients[name] = ClientSession.from_bytes(self.members[name], self.clients[name].to_bytes())
        return self.clients[name]

    def advertise(self) -> None:
        for name in self.members:
            data = self.client(name).advertise_keys()
            self.received.append((name, "advert", data))
            self.server.add_advert(name, data)
        self.rosters = self.down = self.server.rosters(self.topology)

    def share(self) -> None:
        for name, data in self.down.items():
            if self.there(name, "share"):
                answer = self.client(name).share_keys(data)
                self.received.append((name, "share", answer))
                self.server.add_shares(name, answer)
        self.down = self.server.deliveries()

    def mask(self) -> None:
        for name, data in self.down.items():
            if self.there(name, "mask"):
                answer = self.client(name).mask_input(self.vectors[name], data)
                self.received.append((name, "mask", answer))
                self.server.add_masked(name, answer)
        self.down = self.server.survivors()

    def confirm(self) -> None:
        for name, data in self.down.items():
            if self.there(name, "confirm"):
                answer = self.client(name).check_consistency(data)
                self.received.append((name, "confirm", answer))
                self.server.add_confirmation(name, answer)
        self.down = self.server.reveal_requests()

    def reveal(self) -> None:
        for name, data in self.down.items():
            if self.there(name, "reveal"):
                answer = self.client(name).unmask(data)
                self.received.append((name, "reveal", answer))
                self.server.add_reveal(name, answer)

    def until(self, stage: str) -> "Session":
        """All stages before this one."""
        steps = {"advert": self.advertise, "share": self.share, "mask": self.mask, "confirm": self.confirm}
        for name, step in {**steps, "reveal": self.reveal}.items():
            if name == stage:
                break
            if name != "confirm" or self.signed:
                step()
        return self

    def finish(self) -> Total:
        self.until("finish")
        return self.server.finish()
