from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tofu.secagg.harness import Session, members, random_vectors
from tofu.errors import PayloadError
from tofu.secagg.client import ClientSession
from tofu.secagg.graph import Session as SessionId
from tofu.secagg.graph import Terms, Topology
from tofu.secagg.masks import new_seed, public_key
from tofu.secagg.messages import Advert, Confirmation, Masked, Reveal, Roster, Shares, Survivors

SESSION = SessionId(7, bytes(range(16)))
KEYS = [public_key(new_seed()) for _ in range(4)]
ADVERTS = (Advert("one", KEYS[0], KEYS[1], b"s" * 64), Advert("zwei-äöü", KEYS[2], KEYS[3]))
TERMS = Terms(SESSION, 2, 12, 1000, 2, tuple(sorted(advert.digest for advert in ADVERTS)))

MESSAGES = [
    *ADVERTS,
    Roster(1, TERMS, ADVERTS),
    Shares(SESSION, 3, {0: b"a" * 92, 5: b"b" * 92}),
    Masked(SESSION, 3, b"packed"),
    Survivors(SESSION, (True, False, True) * 3),
    Survivors(SESSION, (True, False, True), {0: b"x" * 64, 2: b"y" * 64}, 2),
    Confirmation(SESSION, 65534, b"z" * 64),
    Reveal(SESSION, 0, {1: (True, b"p" * 32), 300: (False, b"q" * 32)}),
]
KINDS = [Advert, Roster, Shares, Masked, Survivors, Confirmation, Reveal]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message) -> None:  # type: ignore[no-untyped-def]
    data = message.to_bytes()
    again = type(message).from_bytes(data)
    assert again == message
    assert again.to_bytes() == data


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_cut_and_what_follows_is_refused(message) -> None:  # type: ignore[no-untyped-def]
    data, kind = message.to_bytes(), type(message)
    free = 6 if kind is Masked else 0  # what a masked vector must weigh only the terms say
    unsigned = len(data) - 64 if kind is Advert and message.signature else -1  # an advert without one is one
    for size in range(len(data) - free):
        if size != unsigned:
            with pytest.raises(PayloadError):
                kind.from_bytes(data[:size])
    if not free:
        with pytest.raises(PayloadError):
            kind.from_bytes(data + b"\0")


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_is_of_one_kind_and_version(message) -> None:  # type: ignore[no-untyped-def]
    data = message.to_bytes()
    for kind in KINDS:
        if kind is not type(message):
            with pytest.raises(PayloadError):
                kind.from_bytes(data)
    with pytest.raises(PayloadError, match="has version 2, expected version 1"):
        type(message).from_bytes(b"\2" + data[1:])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_a_message_or_a_payload_error(data: bytes) -> None:
    for number, kind in enumerate(KINDS):
        for noise in (data, bytes([1, number]) + data):
            with suppress(PayloadError):  # any other exception fails the test
                kind.from_bytes(noise)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(MESSAGES), st.data())
def test_changed_messages_are_messages_or_payload_errors(message, data) -> None:  # type: ignore[no-untyped-def]
    changed = bytearray(message.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    with suppress(PayloadError):
        again = type(message).from_bytes(bytes(changed))
        assert again.to_bytes() == bytes(changed)  # there is one way to write each message


@pytest.mark.parametrize("data", [None, 3, "text", bytearray(50), b""])
def test_what_is_no_message_is_refused(data: object) -> None:
    for kind in KINDS:
        with pytest.raises(PayloadError):
            kind.from_bytes(data)
    with pytest.raises(PayloadError, match="saved state was not written"):
        ClientSession.from_bytes(next(iter(members(1, signed=False).values())), data)


def test_values_that_cannot_be_right_are_refused() -> None:
    with pytest.raises(PayloadError, match="low order"):
        Advert.from_bytes(Advert("one", bytes(32), KEYS[0]).to_bytes())
    with pytest.raises(PayloadError, match="low order"):
        Advert.from_bytes(Advert("one", KEYS[0], bytes(32)).to_bytes())
    with pytest.raises(PayloadError, match="not UTF-8"):
        Advert.from_bytes(ADVERTS[0].to_bytes().replace(b"one", b"\xff\xff\xff"))
    for name in ("", "x" * 65, "a\x00b"):
        with pytest.raises(PayloadError, match="1 to 64 printable bytes"):
            Advert.from_bytes(Advert(name, *KEYS[:2]).to_bytes())
    with pytest.raises(PayloadError, match="ring of 65 bits"):
        Roster.from_bytes(Roster(1, Terms(SESSION, 2, 65, 9, 2, ()), ()).to_bytes())
    backwards = Terms(SESSION, 2, 12, 9, 2, (b"b" * 16, b"a" * 16))
    with pytest.raises(PayloadError, match="not in rising order"):
        Roster.from_bytes(Roster(1, backwards, ()).to_bytes())
    twice = bytearray(MESSAGES[3].to_bytes())
    twice[26 + 94 : 26 + 96] = bytes(2)
    with pytest.raises(PayloadError, match="client 0 after 0"):
        Shares.from_bytes(bytes(twice))
    with pytest.raises(PayloadError, match="beyond their 3 members"):
        Survivors.from_bytes(MESSAGES[6].to_bytes().replace(b"\3\0\5", b"\3\0\x0d"))
    with pytest.raises(PayloadError, match="kind 2, expected 0 or 1"):
        Reveal.from_bytes(MESSAGES[8].to_bytes().replace(b"\1p", b"\2p"))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["advert", "share", "mask", "confirm", "reveal"]), st.data())
def test_changed_bytes_to_both_ends_are_answered_or_payload_errors(stage: str, data: st.DataObject) -> None:
    session = _sessions(stage)
    messages = session.down if stage != "advert" else {name: c.to_bytes() for name, c in session.clients.items()}
    name, message = next(iter(messages.items()))
    changed = bytearray(message)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    hostile = bytes(changed)
    with suppress(PayloadError):
        client = ClientSession.from_bytes(session.members[name], session.clients[name].to_bytes())
        if stage == "advert":
            ClientSession.from_bytes(session.members[name], hostile)
        elif stage == "share":
            client.share_keys(hostile)
        elif stage == "mask":
            client.mask_input(session.vectors[name], hostile)
        elif stage == "confirm":
            client.check_consistency(hostile)
        else:
            client.unmask(hostile)
    server = session.server
    for take in (server.add_advert, server.add_shares, server.add_masked, server.add_confirmation, server.add_reveal):
        with suppress(PayloadError):
            take(name, hostile)


def test_every_term_and_the_run_enter_the_digest() -> None:
    changes: list[dict[str, object]] = [
        {"session": SessionId(8, SESSION.id)},
        {"session": SessionId(7, bytes(16))},
        {"threshold": 3},
        {"bits": 13},
        {"values": 1001},
        {"neighbors": 4},
        {"members": TERMS.members[:1]},
    ]
    digests = {replace(TERMS, **change).digest(b"run") for change in changes}  # type: ignore[arg-type]
    assert len(digests | {TERMS.digest(b"run"), TERMS.digest(b"another")}) == len(changes) + 2


_CACHE: dict[str, Session] = {}


def _sessions(stage: str) -> Session:
    """One session at each stage: what is tried on it changes neither its clients nor, being refused, its server."""
    if stage not in _CACHE:
        vectors = random_vectors(4, 10, 12)
        session = Session(vectors, 12, Topology(3, 2), signed=True)
        _CACHE[stage] = session.until(stage)
    return _CACHE[stage]
