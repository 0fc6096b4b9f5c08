import math
import os

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tofu.errors import PayloadError, SettingError
from tofu.secagg.graph import Graph, Topology, choose_topology
from tofu.secagg.identities import ADVERT, SURVIVORS, Identity, check_known, verify
from tofu.secagg.participant import Participant


def adverts(count: int) -> list[bytes]:
    return sorted(os.urandom(16) for _ in range(count))


@pytest.mark.parametrize(("count", "neighbors"), [(2, 1), (5, 4), (6, 5), (5, 2), (10, 4), (40, 12), (41, 38)])
def test_every_client_has_as_many_neighbors_and_they_have_it(count: int, neighbors: int) -> None:
    graph = Graph(adverts(count), neighbors)
    near = [graph.neighbors_of(one) for one in range(count)]
    for one in range(count):
        assert len(set(near[one])) == len(near[one]) == neighbors
        assert list(near[one]) == sorted(near[one])
        assert one not in near[one]
        assert all(one in near[other] for other in near[one])
    reached, more = {0}, {0}
    while more:
        more = {other for one in more for other in near[one]} - reached
        reached |= more
    assert len(reached) == count


def test_the_ring_s_order_depends_on_every_advert() -> None:
    some = adverts(50)
    assert [Graph(some, 4).neighbors_of(i) for i in range(50)] == [Graph(some, 4).neighbors_of(i) for i in range(50)]
    changed = [*some[:-1], b"\xff" * 16]
    assert [Graph(some, 4).neighbors_of(i) for i in range(9)] != [Graph(changed, 4).neighbors_of(i) for i in range(9)]


@pytest.mark.parametrize("neighbors", [-1, 0, 1, 3, 10, 11])
def test_what_is_no_graph_is_refused(neighbors: int) -> None:
    with pytest.raises(SettingError, match="expected 9, or an even number"):
        Graph(adverts(10), neighbors)


def test_a_complete_graph_bears_what_it_was_asked_to() -> None:
    for clients in range(2, 33):
        chosen = choose_topology(clients, dropout=0, corrupted=0)
        assert chosen == Topology(clients - 1, (clients - 1) // 2 + 1)
    chosen = choose_topology(10, dropout=0.2, corrupted=0.2)
    assert chosen == Topology(9, 7)
    assert choose_topology(100, dropout=0.2, corrupted=0.1, complete_up_to=100) == Topology(99, 60)


@pytest.mark.parametrize(("clients", "dropout", "corrupted"), [(100, 0.1, 0.05), (1000, 0.05, 0.05), (255, 0.2, 0.1)])
def test_a_sparse_graph_keeps_both_bounds_and_is_the_smallest(clients: int, dropout: float, corrupted: float) -> None:
    chosen = choose_topology(clients, dropout=dropout, corrupted=corrupted)
    assert chosen.neighbors < clients - 1
    assert chosen.neighbors % 2 == 0

    def tail(marked: int, draws: int, above: int) -> float:
        """clients * P[more than `above`], hypergeometric, by logarithms of the gamma function."""

        def log_choose(n: int, k: int) -> float:
            return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

        whole = log_choose(clients - 1, draws)
        terms = range(above + 1, min(marked, draws) + 1)
        return clients * sum(
            math.exp(log_choose(marked, x) + log_choose(clients - 1 - marked, draws - x) - whole)
            for x in terms
            if draws - x <= clients - 1 - marked
        )

    def holds(neighbors: int, threshold: int) -> bool:
        safe = tail(int(corrupted * clients), neighbors, threshold - neighbors // 2 - 1) <= 2**-40
        return safe and tail(int(dropout * clients), neighbors, neighbors - threshold) <= 2**-30

    assert holds(chosen.neighbors, chosen.threshold)
    fewer = chosen.neighbors - 2
    assert not any(holds(fewer, threshold) for threshold in range(fewer // 2 + 1, fewer + 1))


def test_too_many_dropouts_are_refused() -> None:
    with pytest.raises(SettingError, match=r"dropout=0.5 is not usable"):
        choose_topology(10, dropout=0.5, corrupted=0.1)
    with pytest.raises(SettingError, match="at least 2"):
        choose_topology(1, dropout=0, corrupted=0)
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(SettingError, match="a fraction"):
            choose_topology(10, dropout=share, corrupted=0)


def test_a_signature_is_for_one_name_purpose_and_text() -> None:
    one, other = Identity.generate("one"), Identity.generate("other")
    known = {"one": one.public, "other": other.public}
    signature = one.sign(ADVERT, b"ab", b"c")
    verify(known, "one", signature, ADVERT, b"ab", b"c")
    for name, sig, purpose, parts in (
        ("other", signature, ADVERT, (b"ab", b"c")),
        ("one", signature, SURVIVORS, (b"ab", b"c")),
        ("one", signature, ADVERT, (b"a", b"bc")),
        ("one", signature, ADVERT, (b"abc",)),
        ("one", bytes(64), ADVERT, (b"ab", b"c")),
        ("one", b"", ADVERT, (b"ab", b"c")),
    ):
        with pytest.raises(PayloadError, match=rf"^{name} did not sign this (advert|survivors)"):
            verify(known, name, sig, purpose, *parts)
    with pytest.raises(PayloadError, match="stranger is not among the 2 known identities"):
        verify(known, "stranger", signature, ADVERT, b"ab", b"c")


def test_a_member_that_does_not_fit_its_identity_is_refused() -> None:
    identity = Identity("one", Ed25519PrivateKey.generate())
    known = {"one": identity.public}
    Participant(b"run", "one", identity, known)
    with pytest.raises(SettingError, match=r"^secure-identities=None is .* if and only if"):
        Participant(b"run", "one", identity)
    with pytest.raises(SettingError, match=r"^secure-identities='of 1 clients' is .* if and only if"):
        Participant(b"run", "one", None, known)
    with pytest.raises(SettingError, match="that of two"):
        Participant(b"run", "two", identity, known)
    with pytest.raises(SettingError, match="own public key"):
        Participant(b"run", "one", identity, {"one": bytes(32)})
    with pytest.raises(SettingError, match="32 bytes, not 31"):
        check_known({"one": bytes(31)})
    for name in ("", "a\nb", "x" * 65):
        with pytest.raises(PayloadError, match="printable"):
            Participant(b"run", name)
