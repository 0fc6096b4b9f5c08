"""Flower's SecAgg+ of the installed version: its own functions in the order of its client mod and server workflow.

The mod's four stages are called as they are. The workflow refuses the Context of today's Flower, so its loops are timed
by the functions that they call, each on a sample and scaled to the number of calls. Left out, in its favor: what its
stages do besides these calls.
"""

import os
from typing import Any

from flwr.app import ConfigRecord
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

from benchmarks.secagg.cost import Case, Clock, Cost, sampled, update_of, wire_bytes

CLIPPING_RANGE, TARGET_RANGE, MOD_RANGE, MAX_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0
"""Its defaults."""

EXAMPLES = 100


def cost(case: Case) -> Cost:
    """Of one round; a client's costs are of one client with all its neighbors."""
    shares, threshold = case.topology.neighbors + 1, case.topology.threshold  # its graph counts the client itself
    setup = {
        Key.SAMPLE_NUMBER: case.clients,
        Key.SHARE_NUMBER: shares,
        Key.THRESHOLD: threshold,
        Key.CLIPPING_RANGE: CLIPPING_RANGE,
        Key.TARGET_RANGE: TARGET_RANGE,
        Key.MOD_RANGE: MOD_RANGE,
        Key.MAX_WEIGHT: MAX_WEIGHT,
    }
    states = [SecAggPlusState(nid=number) for number in range(1, shares + 1)]
    own, clock = states[0], Clock()
    up = wire_bytes(**clock.of(_setup, own, ConfigRecord(setup)))  # type: ignore[arg-type]
    down = wire_bytes(**setup)
    for state in states[1:]:
        _setup(state, ConfigRecord(setup))  # type: ignore[arg-type]
    keys: dict[str, Any] = {str(state.nid): [state.pk1, state.pk2] for state in states}
    down += wire_bytes(**keys)
    up += wire_bytes(**clock.of(_share_keys, own, ConfigRecord(keys)))

    arrived = {Key.CIPHERTEXT_LIST: _ciphertexts(own, states[1:]), Key.SOURCE_LIST: [s.nid for s in states[1:]]}
    down += wire_bytes(**arrived)
    parameters = ndarrays_to_parameters([update_of(case.parameters, 0)])
    masked = clock.of(_collect_masked_vectors, own, ConfigRecord(arrived), EXAMPLES, parameters)  # type: ignore[arg-type]
    up += wire_bytes(**masked)

    gone = round(case.topology.neighbors * case.dropped / (case.clients - 1))
    numbers = [state.nid for state in states]
    lists = {Key.ACTIVE_NODE_ID_LIST: numbers[: shares - gone], Key.DEAD_NODE_ID_LIST: numbers[shares - gone :]}
    down += wire_bytes(**lists)
    up += wire_bytes(**clock.of(_unmask, own, ConfigRecord(lists)))  # type: ignore[arg-type]
    server = _server(case, masked[Key.MASKED_PARAMETERS], own, states[1], shares - gone)  # type: ignore[arg-type]
    return Cost(clock.seconds, server, up, down, sampled=True)


def _ciphertexts(own: Any, neighbors: list[Any]) -> list[bytes]:
    """What the neighbors would send, with random bytes for shares: to make true ones takes hours at 1,000 clients."""
    seed_share, key_share = (len(shares[own.nid]) for shares in (own.rd_seed_share_dict, own.sk1_share_dict))
    result = []
    for state in neighbors:
        key = generate_shared_key(bytes_to_private_key(state.sk2), bytes_to_public_key(own.pk2))
        plain = share_keys_plaintext_concat(state.nid, own.nid, os.urandom(seed_share), os.urandom(key_share))
        result.append(encrypt(key, plain))
    return result


def _server(case: Case, masked: list[bytes], dropped: Any, neighbor: Any, holders: int) -> float:
    """Seconds of the workflow's loops. It puts together all shares that came, not a threshold of them."""
    threshold = case.topology.threshold
    total = [bytes_to_ndarray(array) for array in masked]
    shapes = [array.shape for array in total]

    def add() -> None:
        parameters_addition(total, [bytes_to_ndarray(array) for array in masked])

    def unmask() -> None:
        parameters_subtraction(total, pseudo_rand_gen(os.urandom(32), MOD_RANGE, shapes))

    def unmask_pair() -> None:
        key = generate_shared_key(bytes_to_private_key(dropped.sk1), bytes_to_public_key(neighbor.pk1))
        parameters_addition(total, pseudo_rand_gen(key, MOD_RANGE, shapes))

    def finish() -> None:
        _, vector = factor_extract(parameters_mod(total, MOD_RANGE))
        for array in dequantize(vector, CLIPPING_RANGE, TARGET_RANGE):
            array += -(case.survivors - 1) * CLIPPING_RANGE  # noqa: PLW2901 (in place)
            array *= 0.5  # noqa: PLW2901

    seeds = create_shares(os.urandom(32), threshold, holders)
    keys = create_shares(dropped.sk1, threshold, holders)
    parts = (
        sampled(case.survivors, add),
        sampled(1, lambda: parameters_mod(total, MOD_RANGE)),
        sampled(case.survivors, lambda: combine_shares(seeds), sample=1),
        sampled(case.dropped, lambda: combine_shares(keys), sample=1),
        sampled(case.survivors, unmask),
        sampled(case.dropped * case.topology.neighbors, unmask_pair),
        sampled(1, finish),
    )
    return sum(parts)
