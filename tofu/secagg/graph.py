"""Who shares masks with whom, and how many of them must stay.

Bell, Bonawitz, Gascon, Lepoint, Raykova, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020,
section 3: few clients make a complete graph; many stand in random order on a ring, each with its k/2 nearest on either
side (a Harary graph on a random permutation), which keeps every client's work at O(k) keys and shares.

The order is by SHA-256 of a seed and a client's advert, and the seed is the hash of all adverts, so every client draws
the graph by itself and a server cannot seat a client among its accomplices. What remains to a server that lies is to try
many adverts of its accomplices, each try another draw of the graph: 2^20 tries turn a bound of 2^-40 into 2^-20.

Threshold t of d neighbours, c of them at worst in league with the server: t > d/2 + c. Then

- c accomplices have fewer than t shares of either secret of a client;
- the server cannot have both: t shares of each need 2(t - c) > d - c honest neighbours, and an honest one gives one;
- all honest clients whose neighbours stay keep one connected graph: on one side of a client are only d/2 neighbours, so
  of t that stay one honest is on each side, and steps of at most k/2 around the ring pass next to everybody;
- two honest clients with t signatures each for different lists of survivors cannot be next to each other on the ring
  (their honest fellows, counted on the far side of each, would be 2(t - c) > d in two half windows of d/2).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tofu.errors import SettingError
from tofu.secagg.shamir import MOST_SHARES

COMPLETE_UP_TO = 32
"""Clients up to which everybody is everybody's neighbour: a sparse graph would save next to nothing."""


@dataclass(frozen=True)
class Topology:
    """How many neighbours a client has, and how many of them must answer to the end.

    Attributes:
        neighbours: d, of every client; even, or everybody else.
        threshold: t, shares that give a secret back.
    """

    neighbours: int
    threshold: int


def neighbourhoods(adverts: Sequence[bytes], neighbours: int) -> list[tuple[int, ...]]:
    """For each client its neighbours, as numbers into `adverts` in rising order.

    Args:
        adverts: digest of each client's advert, in the session's order.
        neighbours: d; n - 1 for a complete graph, otherwise an even number below it.

    Raises:
        SettingError: no such graph.
    """
    count = len(adverts)
    if neighbours == count - 1:
        return [tuple(other for other in range(count) if other != one) for one in range(count)]
    if not 2 <= neighbours < count - 1 or neighbours % 2:
        raise SettingError("neighbours", neighbours, f"{count - 1}, or an even number from 2 below it")
    seed = hashlib.sha256(b"tofu secagg 1 graph" + b"".join(adverts)).digest()
    ring = sorted(range(count), key=lambda one: hashlib.sha256(seed + adverts[one]).digest())
    reach = neighbours // 2
    result: list[tuple[int, ...]] = [()] * count
    for place, one in enumerate(ring):
        result[one] = tuple(sorted(ring[(place + step) % count] for step in range(-reach, reach + 1) if step))
    return result


def choose_topology(
    clients: int, *, dropout: float, corrupted: float, security_bits: int = 40, correctness_bits: int = 30
) -> Topology:
    """The smallest graph that is safe and that finishes.

    Bell et al., section 3.3: around the random ring a client's neighbours are a draw without replacement, so the number
    of accomplices (or dropouts) among them is hypergeometric; the bounds hold for all clients at once, by the union
    bound. With c and l the numbers that are exceeded only with those probabilities, t = floor(d/2) + c + 1 and the
    smallest d with d - l >= t is taken. A complete graph needs no probability: c and l are everybody.

    Args:
        clients: n.
        dropout: fraction of the clients that may drop out anywhere in the session.
        corrupted: fraction that may be in league with the server.
        security_bits: more accomplices than the threshold allows with probability at most 2^-security_bits.
        correctness_bits: too many dropouts around a client with probability at most 2^-correctness_bits.

    Raises:
        SettingError: fewer than 2 clients, a fraction outside [0, 1), or more dropouts and accomplices than any
            threshold bears.
    """
    if clients < 2:
        raise SettingError("clients", clients, "at least 2 for secure aggregation")
    for name, share in (("dropout", dropout), ("corrupted", corrupted)):
        if not 0 <= share < 1:
            raise SettingError(name, share, "a fraction from 0 to below 1")
    bad, lost = math.floor(corrupted * clients), math.floor(dropout * clients)
    for neighbours in range(2, min(clients - 1, MOST_SHARES + 1), 2) if clients > COMPLETE_UP_TO else ():
        worst = _exceeded(clients - 1, bad, neighbours, clients, security_bits)
        gone = _exceeded(clients - 1, lost, neighbours, clients, correctness_bits)
        threshold = neighbours // 2 + worst + 1
        if threshold <= neighbours - gone:
            return Topology(neighbours, threshold)
    everybody = clients - 1
    threshold = everybody // 2 + bad + 1
    if threshold > everybody - lost or everybody > MOST_SHARES:
        accepted = f"less: no threshold bears it beside corrupted={corrupted:g} among {clients} clients"
        raise SettingError("dropout", dropout, accepted)
    return Topology(everybody, threshold)


def _exceeded(population: int, marked: int, draws: int, tries: int, bits: int) -> int:
    """The smallest c with tries * P[more than c of the draws are marked] <= 2^-bits, by exact sums."""
    total = math.comb(population, draws)
    tail = 0
    for count in range(min(marked, draws), 0, -1):
        tail += math.comb(marked, count) * math.comb(population - marked, draws - count)
        if tries * tail << bits > total:
            return count
    return 0
