"""Secure aggregation: the server learns the sum of the clients' vectors and nothing else about them.

Double masking of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, on
the sparse neighbor graph of Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020.
Each client hides its vector with one pair mask per neighbor, which cancel in the sum, and with one self-mask. Neighbors
hold secret shares of what removes either kind, and each reveals one or the other, never both.

Two state machines exchange bytes, in pure Python and numpy: `ClientSession` and `ServerSession`. `FixedPoint` encodes
real vectors. The stages have the names of Bonawitz et al., figure 4; each is one message from and to a client:

    AdvertiseKeys          fresh keys up; travels with a reply of an earlier round, so it costs no exchange
    ShareKeys              roster down, encrypted shares up
    MaskedInputCollection  neighbors' encrypted shares down, masked vector up
    ConsistencyCheck       survivors down, signature up; only in a run with identities
    Unmasking              survivors (and signatures) down, one share per neighbor up

A client may drop out at any point. Its vector is in the sum if its masked vector arrived. docs/secure-aggregation.md
states what is guaranteed, and what is not.

Example:
    >>> import numpy as np
    >>> names = ["ann", "bob", "eve"]
    >>> code = FixedPoint(clients=3, bits=32, clip=1.0)
    >>> clients = {name: ClientSession(Participant(run=b"run", name=name)) for name in names}
    >>> server = ServerSession(b"run", 1, values=code.length(2), bits=code.bits)
    >>> for name, client in clients.items():
    ...     server.add_advert(name, client.advertise_keys())
    >>> for name, roster in server.rosters(Topology(neighbors=2, threshold=2)).items():
    ...     server.add_shares(name, clients[name].share_keys(roster))
    >>> for name, shares in server.deliveries().items():
    ...     vector, _ = code.encode(np.array([0.5, -0.25]), examples=1)
    ...     server.add_masked(name, clients[name].mask_input(vector, shares))
    >>> for name, survivors in server.survivors().items():
    ...     server.add_reveal(name, clients[name].unmask(survivors))
    >>> code.decode(server.finish().vector).mean.round(3).tolist()
    [0.5, -0.25]
"""

from tofu.secagg.client import ClientSession
from tofu.secagg.fixed_point import FixedPoint
from tofu.secagg.graph import Stage, Topology, choose_topology
from tofu.secagg.identities import Identity
from tofu.secagg.participant import Participant
from tofu.secagg.server import ServerSession, Total

__all__ = [
    "ClientSession",
    "FixedPoint",
    "Identity",
    "Participant",
    "ServerSession",
    "Stage",
    "Topology",
    "Total",
    "choose_topology",
]
