"""Sessions of `tofu.secagg` with both ends in one process."""

import statistics

import numpy as np

from benchmarks.secagg.cost import Case, Clock, Cost, sampled, update_of, wire_bytes
from tofu.bytes_io import pack, unpack
from tofu.secagg.client import ClientSession
from tofu.secagg.fixed_point import FixedPoint
from tofu.secagg.masks import RingVector, add_mask, new_seed
from tofu.secagg.participant import Participant
from tofu.secagg.server import ServerSession

RUN = b"benchmark"
EXAMPLES = 100
CLIP = 0.1


def fixed_point(clients: int, levels: int) -> FixedPoint:
    """The smallest ring with so many levels on either side of zero."""
    return FixedPoint(clients, (2 * clients * levels).bit_length(), CLIP, EXAMPLES)


def whole_session(case: Case, code: FixedPoint) -> Cost:
    """Every message of every client. The mean is checked, so that what is timed is right."""
    names = [f"client-{number}" for number in range(case.clients)]
    sessions = {name: ClientSession(Participant(RUN, name)) for name in names}
    clocks, clock = {name: Clock() for name in names}, Clock()
    up, down = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    server = ServerSession(RUN, 1, values=code.length(case.parameters), bits=code.bits)
    for name in names:
        advert = clocks[name].of(sessions[name].advertise_keys)
        up[name] += wire_bytes(b=advert)
        clock.of(server.add_advert, name, advert)
    for name, roster in clock.of(server.rosters, case.topology).items():
        down[name] += wire_bytes(b=roster)
        shares = clocks[name].of(sessions[name].share_keys, roster)
        up[name] += wire_bytes(b=shares)
        clock.of(server.add_shares, name, shares)
    deliveries = clock.of(server.deliveries)
    survivors = names[case.dropped :]
    exact = np.zeros(case.parameters)
    for number, name in enumerate(survivors):
        update = update_of(case.parameters, number)
        exact += update
        down[name] += wire_bytes(b=deliveries[name])
        vector, _ = clocks[name].of(code.encode, update, EXAMPLES)
        masked = clocks[name].of(sessions[name].mask_input, vector, deliveries[name])
        up[name] += wire_bytes(b=masked)
        clock.of(server.add_masked, name, masked)
    for name, request in clock.of(server.survivors).items():
        down[name] += wire_bytes(b=request)
        reveal = clocks[name].of(sessions[name].unmask, request)
        up[name] += wire_bytes(b=reveal)
        clock.of(server.add_reveal, name, reveal)
    total = clock.of(server.finish)
    mean = clock.of(code.decode, total.vector).mean
    if np.abs(mean - exact / len(survivors)).max() > code.step:
        raise AssertionError("the secure mean is not the mean")
    client = statistics.fmean(clocks[name].seconds for name in survivors)
    sent, received = (statistics.fmean(way[name] for name in survivors) for way in (up, down))
    return Cost(client, clock.seconds, sent, received, sampled=False)


def sampled_session(case: Case, code: FixedPoint, short: Cost, short_parameters: int) -> Cost:
    """A whole session of short vectors, and the operations on long ones timed on a sample and added.

    Args:
        short: `whole_session` of the same clients with `short_parameters`.
    """
    values, neighbors = code.length(case.parameters), case.topology.neighbors
    update = update_of(case.parameters, 0)
    vector, _ = code.encode(update, EXAMPLES)
    packed = pack(vector, code.bits)

    def masked() -> None:
        add_mask(vector, new_seed(), code.bits)

    def added() -> None:
        total = unpack(packed, values, code.bits, "masked vector")
        total += vector

    client = (
        sampled(1, lambda: code.encode(update, EXAMPLES))
        + sampled(1 + neighbors, masked)
        + sampled(1, lambda: pack(vector, code.bits))
    )
    # A client that is gone has left masks in those of its neighbors that stayed.
    left = round(case.dropped * neighbors * case.survivors / (case.clients - 1))
    decoding = sampled(1, lambda: code.decode(vector))
    server = sampled(case.survivors, added) + sampled(case.survivors + left, masked) + decoding
    longer = len(packed) - len(pack(_zeros(code.length(short_parameters)), code.bits))
    return Cost(short.client + client, short.server + server, short.up + longer, short.down, sampled=True)


def _zeros(values: int) -> RingVector:
    return np.zeros(values, dtype=np.uint64)
