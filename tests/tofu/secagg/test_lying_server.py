"""What a client refuses from a server that lies, and that it says whom or what it is about."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.tofu.secagg.harness import RUN, Session, members, names, plain_sum, random_vectors
from tofu.errors import PayloadError
from tofu.secagg.client import ClientSession
from tofu.secagg.graph import Terms, Topology
from tofu.secagg.identities import ADVERT, Identity
from tofu.secagg.masks import new_seed, public_key
from tofu.secagg.messages import Advert, Confirmation, Reveal, Roster, Shares, Survivors

COUNT, THRESHOLD = 5, 3
VECTORS = random_vectors(COUNT, 20, 12)


def started(stage: str, *, signed: bool = True, threshold: int = THRESHOLD) -> Session:
    return Session(VECTORS, 12, Topology(COUNT - 1, threshold), signed=signed).until(stage)


def own_keys(name: str, identity: Identity | None = None) -> tuple[Advert, bytes]:
    """An advert for a name with keys that the server made, and the secret of its shares' key."""
    mask_secret, share_secret = new_seed(), new_seed()
    advert = Advert(name, public_key(mask_secret), public_key(share_secret))
    sign = identity.sign(ADVERT, RUN, name.encode(), advert.signed) if identity else bytes(64)
    return replace(advert, signature=sign), share_secret


def rebuilt(roster: Roster, own: Advert, others: list[Advert], **terms: int) -> bytes:
    """A roster that is right in itself, for other adverts of the neighbors."""
    ordered = sorted(others, key=lambda advert: advert.digest)
    digests = tuple(sorted(advert.digest for advert in [own, *others]))
    changed: Terms = replace(roster.terms, members=digests, neighbors=len(others))
    changed = replace(changed, **terms)  # type: ignore[arg-type]
    return Roster(digests.index(own.digest), changed, tuple(ordered)).to_bytes()


def victim(session: Session, name: str = "client-0") -> tuple[ClientSession, Roster, Advert]:
    own = next(data for who, what, data in session.received if (who, what) == (name, "advert"))
    return session.clients[name], Roster.from_bytes(session.down[name]), Advert.from_bytes(own)


def refused(action: Callable[..., bytes], *args: object, reason: str) -> None:
    with pytest.raises(PayloadError, match=reason):
        action(*args)


def test_a_swapped_key_is_refused_by_its_client_s_name() -> None:
    client, roster, own = victim(started("share"))
    swapped, _ = own_keys(roster.adverts[1].name)
    others = [roster.adverts[0], swapped, *roster.adverts[2:]]
    refused(client.share_keys, rebuilt(roster, own, others), reason=f"^{swapped.name} did not sign this advert")
    stranger, _ = own_keys("stranger", Identity.generate("stranger"))
    others = [stranger, *roster.adverts[1:]]
    refused(client.share_keys, rebuilt(roster, own, others), reason="^stranger is not among the 5 known identities")
    # The key of one signature under the name of another.
    borrowed = replace(swapped, signature=roster.adverts[1].signature)
    others = [roster.adverts[0], borrowed, *roster.adverts[2:]]
    refused(client.share_keys, rebuilt(roster, own, others), reason=f"^{swapped.name} did not sign this advert")
    client.share_keys(rebuilt(roster, own, list(roster.adverts)))


def test_without_identities_a_swapped_key_goes_through() -> None:
    """The check above is what stops it: this test fails if it stops being needed."""
    client, roster, own = victim(started("share", signed=False))
    swapped, _ = own_keys(roster.adverts[1].name)
    client.share_keys(rebuilt(roster, own, [roster.adverts[0], swapped, *roster.adverts[2:]]))


def test_a_signature_is_of_one_run() -> None:
    client, roster, own = victim(started("share"))
    session = started("share")
    name = roster.adverts[0].name
    identity = session.members[name].identity
    assert identity is not None
    other_run = Advert(name, *(public_key(new_seed()) for _ in range(2)))
    signed = replace(other_run, signature=identity.sign(ADVERT, b"other run", name.encode(), other_run.signed))
    refused(
        client.share_keys,
        rebuilt(roster, own, [signed, *roster.adverts[1:]]),
        reason=f"^{name} did not sign this advert",
    )


def test_rosters_that_must_not_be_answered() -> None:
    session = started("share", signed=False)
    client, roster, own = victim(session)
    others = list(roster.adverts)
    altered, _ = own_keys("client-0")
    refused(
        client.share_keys, rebuilt(roster, altered, others), reason="roster does not hold the advert that client-0 sent"
    )
    refused(client.share_keys, rebuilt(roster, own, [altered, *others[1:]]), reason="roster has client-0 twice")
    twin = replace(own_keys("twin")[0], mask_key=others[1].mask_key)
    refused(client.share_keys, rebuilt(roster, own, [twin, *others[1:]]), reason=r"roster has a key of .* twice")
    mirror = replace(own_keys("mirror")[0], share_key=own.mask_key)
    refused(client.share_keys, rebuilt(roster, own, [mirror, *others[1:]]), reason="roster has a key of mirror twice")
    same = own_keys("same")[0]
    same = replace(same, share_key=same.mask_key)
    refused(client.share_keys, rebuilt(roster, own, [same, *others[1:]]), reason="roster has a key of same twice")
    doubled = own_keys(others[1].name)[0]
    refused(client.share_keys, rebuilt(roster, own, [doubled, *others[1:]]), reason=f"roster has {doubled.name} twice")
    for threshold in (0, 1, 2, 5):
        incoming = rebuilt(roster, own, others, threshold=threshold)
        refused(client.share_keys, incoming, reason=f"roster has threshold {threshold}, expected 3 to 4")
    fewer = replace(roster, adverts=roster.adverts[1:]).to_bytes()
    refused(client.share_keys, fewer, reason="roster has 3 neighbors, expected 4")
    incoming = rebuilt(roster, own, others, neighbors=3)
    refused(client.share_keys, incoming, reason="roster has 4 neighbors, expected 3")
    wrong = replace(roster, client=(roster.client + 1) % COUNT).to_bytes()
    refused(client.share_keys, wrong, reason="roster is for client")
    shuffled = replace(roster, adverts=(others[1], others[0], *others[2:])).to_bytes()
    refused(client.share_keys, shuffled, reason="expected another client of the graph")
    odd = replace(roster.terms, neighbors=3)
    refused(
        client.share_keys,
        Roster(roster.client, odd, roster.adverts[:3]).to_bytes(),
        reason="expected 2 to 3|not describe a graph",
    )
    client.share_keys(roster.to_bytes())


def test_a_client_s_own_least_numbers_hold() -> None:
    session = started("share", signed=False)
    strict = replace(session.members["client-0"], min_neighbors=5)
    saved = session.clients["client-0"].to_bytes()
    refused(
        ClientSession.from_bytes(strict, saved).share_keys,
        session.down["client-0"],
        reason="4 neighbors, expected .* 5",
    )
    wary = replace(session.members["client-0"], max_colluding=1)
    refused(
        ClientSession.from_bytes(wary, saved).share_keys,
        session.down["client-0"],
        reason="threshold 3, expected 4 to 4",
    )


def test_a_neighbor_that_the_graph_does_not_have_is_refused() -> None:
    session = Session(random_vectors(9, 5, 12), 12, Topology(4, 3)).until("share")
    client, roster, _ = victim(session)
    others = [Roster.from_bytes(data) for name, data in session.down.items() if name != "client-0"]
    near = {advert.name for advert in roster.adverts} | {"client-0"}
    far = next(advert for other in others for advert in other.adverts if advert.name not in near)
    seated = replace(roster, adverts=(far, *roster.adverts[1:])).to_bytes()
    refused(client.share_keys, seated, reason=f"roster has {far.name} as neighbor")
    client.share_keys(roster.to_bytes())


@pytest.mark.parametrize("signed", [False, True])
def test_no_stage_is_answered_twice_or_out_of_order(signed: bool) -> None:
    session = Session(VECTORS, 12, Topology(COUNT - 1, THRESHOLD), signed=signed)
    client, vector = session.clients["client-0"], VECTORS["client-0"]
    incoming: dict[str, bytes] = dict.fromkeys(("share", "mask", "confirm", "reveal"), b"")

    def all_but(allowed: str, now: str) -> None:
        saved = client.to_bytes()
        for stage in incoming:
            if stage != allowed:
                args = (vector, incoming[stage]) if stage == "mask" else (incoming[stage],)
                refused(methods[stage], *args, reason=f"^client-0 got a message of .*, expected {now}$")
        if now != "AdvertiseKeys":
            refused(client.advertise_keys, reason=f"^client-0 got a message of AdvertiseKeys, expected {now}$")
        assert client.to_bytes() == saved

    methods = {
        "share": client.share_keys,
        "mask": client.mask_input,
        "confirm": client.check_consistency,
        "reveal": client.unmask,
    }

    all_but("", "AdvertiseKeys")
    stages = [
        ("share", "ShareKeys"),
        ("mask", "MaskedInputCollection"),
        ("confirm", "ConsistencyCheck"),
        ("reveal", "Unmasking"),
    ]
    if not signed:
        stages.remove(("confirm", "ConsistencyCheck"))
    steps = ["advertise", *(stage for stage, _ in stages)]
    for step, (stage, now) in zip(steps, stages, strict=False):
        getattr(session, step)()
        incoming[stage] = session.down["client-0"]
        all_but(stage, now)
    if not signed:
        refused(
            client.check_consistency,
            incoming["reveal"],
            reason="^client-0 got a message of ConsistencyCheck, expected Unmasking",
        )
    session.reveal()
    all_but("", "Done")
    total = session.server.finish()
    assert (total.vector == plain_sum(VECTORS, total.survivors, 12)).all()


@pytest.mark.parametrize("signed", [False, True])
def test_another_session_s_messages_are_refused(signed: bool) -> None:
    some = members(COUNT, signed=signed)
    one, other = (
        Session(VECTORS, 12, Topology(COUNT - 1, THRESHOLD), signed=signed, members=some).until("share")
        for _ in range(2)
    )
    client = one.clients["client-0"]
    refused(client.share_keys, other.down["client-0"], reason="roster does not hold the advert that client-0 sent")
    one.share()
    other.share()
    refused(client.mask_input, VECTORS["client-0"], other.down["client-0"], reason="shares are of another session")
    refused(
        client.mask_input,
        VECTORS["client-0"],
        one.down["client-1"],
        reason="shares are for client . and client-0 is|, and",
    )
    one.mask()
    other.mask()
    refused(
        client.check_consistency if signed else client.unmask, other.down["client-0"], reason="survivors are of another"
    )
    if signed:
        one.confirm()
        other.confirm()
        refused(client.unmask, other.down["client-0"], reason="survivors are of another session")
    one.reveal()
    assert (one.server.finish().vector == plain_sum(VECTORS, tuple(names(COUNT)), 12)).all()


def test_shares_that_are_forged_moved_or_too_few_are_refused_by_name() -> None:
    session = started("mask")
    client, vector, incoming = (
        session.clients["client-0"],
        VECTORS["client-0"],
        Shares.from_bytes(session.down["client-0"]),
    )
    roster = Roster.from_bytes(session.rosters["client-0"])
    (first, one), (second, two), *rest = incoming.sealed.items()
    name = {advert.digest: advert.name for advert in roster.adverts}[roster.terms.members[first]]

    def with_shares(sealed: dict[int, bytes]) -> bytes:
        return Shares(incoming.session, incoming.client, sealed).to_bytes()

    forged = one[:20] + bytes([one[20] ^ 1]) + one[21:]
    for sealed in ({first: forged}, {first: two, second: one}):
        refused(
            client.mask_input,
            vector,
            with_shares({**incoming.sealed, **sealed}),
            reason=f"^shares of {name} cannot be decrypted",
        )
    # What the client itself sealed for that neighbor comes back to it.
    reflected = next(data for who, what, data in session.received if (who, what) == ("client-0", "share"))
    refused(client.mask_input, vector, reflected, reason=f"^shares of {name} cannot be decrypted")
    few = with_shares(dict(rest))
    refused(client.mask_input, vector, few, reason="shares came from 2 neighbors, expected at least 3")
    refused(client.mask_input, vector, with_shares({incoming.client: one}), reason="is not a neighbor of client-0")
    refused(
        client.mask_input,
        vector,
        with_shares({**incoming.sealed, 77: one}),
        reason="client 77 is not a neighbor of client-0",
    )
    client.mask_input(vector, session.down["client-0"])


def test_clients_that_were_told_different_terms_do_not_talk() -> None:
    """Same keys and session, another threshold for one: its shares open nowhere."""
    session = started("share", threshold=3)
    incoming = Roster.from_bytes(session.down["client-0"])
    other = replace(incoming, terms=replace(incoming.terms, threshold=4)).to_bytes()
    session.server.add_shares("client-0", session.clients["client-0"].share_keys(other))
    del session.down["client-0"]
    session.share()
    refused(
        session.clients["client-1"].mask_input,
        VECTORS["client-1"],
        session.down["client-1"],
        reason="^shares of client-0 cannot be decrypted",
    )


def lists(session: Session) -> tuple[Survivors, dict[str, int]]:
    incoming = Survivors.from_bytes(session.down["client-0"])
    return incoming, {name: Roster.from_bytes(data).client for name, data in session.rosters.items()}


def without(incoming: Survivors, *gone: int) -> Survivors:
    return replace(incoming, present=tuple(here and n not in gone for n, here in enumerate(incoming.present)))


@pytest.mark.parametrize("signed", [False, True])
def test_survivors_that_must_not_be_answered(signed: bool) -> None:
    session = Session(VECTORS, 12, Topology(COUNT - 1, THRESHOLD), signed=signed, gone={"client-4": "share"}).until(
        "confirm"
    )
    incoming, number = lists(session)
    client = session.clients["client-0"]
    ask = client.check_consistency if signed else client.unmask
    smaller = without(incoming, number["client-1"])
    refused(ask, smaller.to_bytes(), reason="survivors include 2 neighbors, expected at least 3")
    refused(ask, without(incoming, number["client-0"]).to_bytes(), reason="survivors omit client-0, which sent")
    more = replace(incoming, present=(True,) * COUNT)
    refused(ask, more.to_bytes(), reason="survivors include client-4, whose shares client-0 did not receive")
    longer = replace(incoming, present=(*incoming.present, True))
    refused(ask, longer.to_bytes(), reason="survivors list 6 members, expected 5")
    ask(incoming.to_bytes())


def test_a_live_client_cannot_be_said_to_have_dropped_out() -> None:
    """One client is told that client-1 dropped out, the others that it did not: no one reveals on other signatures."""
    session = started("confirm")
    incoming, number = lists(session)
    lie = without(incoming, number["client-1"])
    deceived, honest = session.clients["client-0"], session.clients["client-2"]
    signatures = {}
    for name, client in session.clients.items():
        confirmation = Confirmation.from_bytes(
            client.check_consistency((lie if name == "client-0" else incoming).to_bytes())
        )
        signatures[confirmation.client] = confirmation.signature
    others = {who: sig for who, sig in signatures.items() if who not in (number["client-0"], number["client-1"])}
    lied = replace(lie, signatures=others)
    refused(deceived.unmask, lied.to_bytes(), reason="^client-. did not sign this survivors")
    refused(deceived.unmask, replace(lie, signatures={}).to_bytes(), reason="signed by 0 neighbors, expected 3")
    refused(
        deceived.unmask,
        replace(incoming, signatures=others).to_bytes(),
        reason="differ from those that client-0 signed",
    )
    own = {number["client-0"]: signatures[number["client-0"]]}
    refused(deceived.unmask, replace(lie, signatures=own).to_bytes(), reason="is not a neighbor of client-0")
    gone = {number["client-1"]: signatures[number["client-1"]]}
    reason = "survivors are signed by client-1, which is not one of them"
    refused(deceived.unmask, replace(lie, signatures=gone).to_bytes(), reason=reason)
    all_but_own = {who: sig for who, sig in signatures.items() if who != number["client-2"]}
    reason = "^client-0 did not sign this survivors"
    refused(honest.unmask, replace(incoming, signatures=all_but_own).to_bytes(), reason=reason)
    del all_but_own[number["client-0"]]
    honest.unmask(replace(incoming, signatures=all_but_own).to_bytes())


@pytest.mark.parametrize("signed", [False, True])
def test_never_both_shares_of_a_client(signed: bool) -> None:
    """Asked once for client-1 as a survivor and once as gone, a client answers once, with one of the two."""
    session = started("confirm" if not signed else "reveal", signed=signed)
    incoming, number = lists(session)
    client = session.clients["client-0"]
    saved = client.to_bytes()
    reveal = Reveal.from_bytes(client.unmask(session.down["client-0"]))
    assert sorted(reveal.shares) == sorted(set(range(COUNT)) - {number["client-0"]})
    assert all(survived for survived, _ in reveal.shares.values())
    lie = without(incoming, number["client-1"])
    refused(client.unmask, lie.to_bytes(), reason="^client-0 got a message of Unmasking, expected Done")
    again = ClientSession.from_bytes(session.members["client-0"], saved)
    if signed:  # even from a copy of its state from before, it stands by what it signed
        refused(again.unmask, lie.to_bytes(), reason="survivors differ from those that client-0 signed")
        return
    other = Reveal.from_bytes(again.unmask(lie.to_bytes()))
    for peer, (survived, share) in other.shares.items():
        assert survived == (peer != number["client-1"])
        assert (share == reveal.shares[peer][1]) == survived


def test_an_old_advert_of_a_neighbor_gets_no_pair_mask() -> None:
    """Its keys are gone, so nobody can make the ciphertexts without which no mask is made with it."""
    some = members(COUNT, signed=True)
    old = Session(VECTORS, 12, Topology(COUNT - 1, THRESHOLD), signed=True, members=some).until("finish")
    session = Session(VECTORS, 12, Topology(COUNT - 1, THRESHOLD), signed=True, members=some).until("share")
    client, roster, own = victim(session)
    played = next(Advert.from_bytes(data) for who, what, data in old.received if (who, what) == ("client-1", "advert"))
    others = [played if advert.name == "client-1" else advert for advert in roster.adverts]
    incoming = rebuilt(roster, own, others)
    shares = Shares.from_bytes(client.share_keys(incoming))
    number = Roster.from_bytes(incoming).terms.members.index(played.digest)
    noise = {peer: np.random.default_rng(peer).bytes(92) for peer in shares.sealed}
    refused(
        client.mask_input,
        VECTORS["client-0"],
        Shares(shares.session, shares.client, {number: noise[number]}).to_bytes(),
        reason="^shares of client-1 cannot be decrypted",
    )
