"""Whole sessions: the sum is exact whoever drops out, or there is none."""

import doctest
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tofu.secagg
from tests.tofu.secagg.harness import RUN, STAGES, Session, members, names, plain_sum, random_vectors
from tofu.errors import PayloadError, RunError, SettingError
from tofu.secagg.client import ClientSession
from tofu.secagg.fixed_point import FixedPoint
from tofu.secagg.graph import Stage, Topology
from tofu.secagg.messages import Advert, Masked, Reveal, Roster, Shares
from tofu.secagg.participant import Participant
from tofu.secagg.server import ServerSession


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_sum_is_exact_whoever_drops_out(data: st.DataObject) -> None:
    signed, saved = data.draw(st.booleans()), data.draw(st.booleans())
    count = data.draw(st.integers(3, 9))
    complete = data.draw(st.booleans()) or count < 6
    neighbors = count - 1 if complete else data.draw(st.sampled_from(range(4, count - 1, 2)))
    threshold = data.draw(st.integers(neighbors // 2 + 1, neighbors))
    bits, values = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 40))
    leaving = data.draw(st.lists(st.sampled_from(names(count)), max_size=neighbors - threshold, unique=True))
    gone = {name: data.draw(st.sampled_from(STAGES)) for name in leaving}
    vectors = random_vectors(count, values, bits, seed=data.draw(st.integers(0, 99)))
    session = Session(vectors, bits, Topology(neighbors, threshold), signed=signed, gone=gone, saved=saved)
    total = session.finish()
    stayed = {name for name in names(count) if gone.get(name) not in ("share", "mask")}
    assert set(total.survivors) == stayed
    assert (total.vector == plain_sum(vectors, total.survivors, bits)).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("topology", [Topology(19, 11), Topology(12, 7)])
def test_dropouts_at_every_stage_of_one_session(topology: Topology, signed: bool) -> None:
    vectors = random_vectors(20, 1000, 12)
    gone = {f"client-{number}": stage for number, stage in enumerate(STAGES)}
    total = Session(vectors, 12, topology, signed=signed, gone=gone).finish()
    assert set(total.survivors) == set(names(20)[2:])
    assert (total.vector == plain_sum(vectors, total.survivors, 12)).all()


def test_a_mean_of_real_vectors_comes_through() -> None:
    code = FixedPoint(10, 12, 0.1, 300)
    generator = np.random.default_rng(0)
    values = {name: generator.normal(0, 0.02, 5000).astype(np.float32) for name in names(10)}
    examples = {name: 30 * (number + 1) for number, name in enumerate(values)}
    vectors = {name: code.encode(value, examples[name])[0] for name, value in values.items()}
    total = Session(vectors, code.bits, Topology(9, 6), gone={"client-3": "mask"}).finish()
    decoded = code.decode(total.vector)
    weights = np.array([examples[name] for name in total.survivors])
    mean = np.average([values[name].astype(float) for name in total.survivors], axis=0, weights=weights)
    assert decoded.examples == weights.sum()
    assert np.abs(decoded.mean - mean).max() < 9 * code.step / (weights.sum() / 300)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_there_is_no_sum_and_nothing_is_revealed(stage: str, signed: bool) -> None:
    if stage == "confirm" and not signed:
        return
    vectors = random_vectors(6, 10, 12)
    gone = dict.fromkeys(names(6)[:3], stage)
    session = Session(vectors, 12, Topology(5, 4), signed=signed, gone=gone)
    with pytest.raises(RunError, match=r"^3 of 6 clients .*: 2 too few for the threshold$"):
        session.finish()
    revealed = [client for client, what, _ in session.received if what == "reveal"]
    # Only where clients go silent after they were asked have the others answered: with fewer shares than it takes.
    assert len(revealed) == (3 if stage == "reveal" else 0)
    assert session.server.stage is Stage.DONE
    with pytest.raises(RunError, match="session is at Done"):
        session.server.finish()


def test_too_few_adverts_are_counted() -> None:
    session = Session(random_vectors(3, 5, 8), 8, Topology(5, 4))
    with pytest.raises(RunError, match="3 clients sent adverts, expected at least 6"):
        session.advertise()
    with pytest.raises(SettingError, match="neighbors=3"):
        Session(random_vectors(5, 5, 8), 8, Topology(3, 2)).advertise()


TAKE = {
    "share": ("add_shares", "its shares", "deliveries"),
    "mask": ("add_masked", "its masked vector", "survivors"),
    "confirm": ("add_confirmation", "its confirmation", "reveal_requests"),
    "reveal": ("add_reveal", "its reveal", "finish"),
}


@pytest.mark.parametrize("stage", TAKE)
def test_the_server_refuses_by_name_and_goes_on(stage: str) -> None:
    vectors = random_vectors(6, 20, 12)
    session = Session(vectors, 12, Topology(5, 3), signed=True, gone={"client-5": "share"}).until(stage)
    strange = Session(vectors, 12, Topology(5, 3), members=session.members, signed=True).until("finish")
    foreign = {kind: data for _, kind, data in strange.received}[stage]
    adder, what, closer = TAKE[stage]
    take, close = getattr(session.server, adder), getattr(session.server, closer)

    def refused(name: str, data: bytes, reason: str) -> None:
        with pytest.raises(PayloadError, match=rf"^{name} sent {what} {reason}"):
            take(name, data)

    refused("client-0", foreign, "of another session")
    refused("nobody", foreign, "but is not in this session")
    for later, (other, words, _) in list(TAKE.items())[list(TAKE).index(stage) + 1 :]:
        early = next(data for _, kind, data in strange.received if kind == later)
        with pytest.raises(PayloadError, match=rf"^client-0 sent {words} before its stage"):
            getattr(session.server, other)("client-0", early)
    down, session.down = session.down, {"client-0": session.down["client-0"]}
    with _kept_open(session.server, closer):
        getattr(session, stage)()
    answer = session.received[-1][2]
    refused("client-0", answer, "twice")
    refused("client-1", answer, "as client")
    session.down = {name: data for name, data in down.items() if name != "client-0"}
    getattr(session, stage)()
    if stage == "reveal":
        session.down = {}
    with pytest.raises(PayloadError, match=r"^client-0 sent its advert after its stage was closed"):
        session.server.add_advert("client-0", next(data for _, kind, data in strange.received if kind == "advert"))
    if stage != "reveal":
        refused("client-0", answer, "after its stage was closed")
    for rest in list(TAKE)[list(TAKE).index(stage) + 1 :]:
        getattr(session, rest)()
    total = close() if stage == "reveal" else session.server.finish()
    assert set(total.survivors) == set(names(5))
    assert (total.vector == plain_sum(vectors, total.survivors, 12)).all()


@contextmanager
def _kept_open(server: ServerSession, closer: str) -> Iterator[None]:
    """The stage's end does nothing meanwhile, so that its clients can answer one by one."""
    setattr(server, closer, dict)
    yield
    delattr(server, closer)


def test_the_server_refuses_adverts_that_cannot_be_right() -> None:
    some = members(3, signed=True)
    server = ServerSession(RUN, 1, values=5, bits=12, known=some["client-0"].known)
    adverts = {name: ClientSession(member).advertise_keys() for name, member in some.items()}
    server.add_advert("client-0", adverts["client-0"])
    with pytest.raises(PayloadError, match=r"^client-0 sent its advert twice"):
        server.add_advert("client-0", adverts["client-0"])
    with pytest.raises(PayloadError, match=r"^client-1 sent the advert of client-0"):
        server.add_advert("client-1", adverts["client-0"])
    first = Advert.from_bytes(adverts["client-0"])
    stolen = Advert("client-1", first.mask_key, first.share_key, first.signature)
    with pytest.raises(PayloadError, match=r"^client-1 sent a key that another client has"):
        server.add_advert("client-1", stolen.to_bytes())
    other = Advert.from_bytes(adverts["client-2"])
    with pytest.raises(PayloadError, match=r"^client-1 did not sign this advert"):
        server.add_advert("client-1", Advert("client-1", *_keys(other), other.signature).to_bytes())
    with pytest.raises(PayloadError, match=r"^stranger is not among the 3 known identities"):
        server.add_advert("stranger", Advert("stranger", *_keys(other), other.signature).to_bytes())
    server.add_advert("client-1", adverts["client-1"])


def _keys(advert: Advert) -> tuple[bytes, bytes]:
    return advert.mask_key, advert.share_key


def test_shares_and_vectors_that_do_not_fit_the_session_are_refused() -> None:
    vectors = random_vectors(4, 20, 12)
    session = Session(vectors, 12, Topology(3, 2)).until("share")
    shares = Shares.from_bytes(session.client("client-0").share_keys(session.down.pop("client-0")))
    fewer = Shares(shares.session, shares.client, dict(list(shares.sealed.items())[1:]))
    with pytest.raises(PayloadError, match=r"^client-0 sent shares for clients that are not its 3 neighbors"):
        session.server.add_shares("client-0", fewer.to_bytes())
    session.server.add_shares("client-0", shares.to_bytes())
    session.share()
    masked = Masked.from_bytes(session.client("client-1").mask_input(vectors["client-1"], session.down.pop("client-1")))
    with pytest.raises(PayloadError, match=r"^masked vector of client-1 has 29 bytes, expected 30"):
        session.server.add_masked("client-1", Masked(masked.session, masked.client, masked.packed[1:]).to_bytes())
    session.server.add_masked("client-1", masked.to_bytes())
    session.mask()
    reveal = Reveal.from_bytes(session.client("client-2").unmask(session.down.pop("client-2")))
    peer, (survived, share) = next(iter(reveal.shares.items()))
    for wrong in ({}, {**reveal.shares, peer: (not survived, share)}, {**reveal.shares, 9: (True, share)}):
        with pytest.raises(PayloadError, match=r"^client-2 revealed other shares"):
            session.server.add_reveal("client-2", Reveal(reveal.session, reveal.client, wrong).to_bytes())
    session.server.add_reveal("client-2", reveal.to_bytes())
    session.reveal()
    total = session.server.finish()
    assert (total.vector == plain_sum(vectors, tuple(names(4)), 12)).all()


def test_a_late_sharer_or_one_without_shares_has_no_vector_to_send() -> None:
    vectors = random_vectors(5, 20, 12)
    session = Session(vectors, 12, Topology(4, 3), gone={"client-0": "share"}).until("mask")
    donor = Masked.from_bytes(session.client("client-1").mask_input(vectors["client-1"], session.down["client-1"]))
    number = Roster.from_bytes(session.rosters["client-0"]).client
    with pytest.raises(PayloadError, match=r"^client-0 sent its masked vector without shares"):
        session.server.add_masked("client-0", Masked(donor.session, number, donor.packed).to_bytes())


def test_a_false_share_of_a_key_is_noticed() -> None:
    vectors = random_vectors(5, 20, 12)
    session = Session(vectors, 12, Topology(4, 3), gone={"client-4": "mask"}).until("reveal")
    for name, data in session.down.items():
        reveal = Reveal.from_bytes(session.client(name).unmask(data))
        false = {
            peer: (survived, share if survived else bytes(32)) for peer, (survived, share) in reveal.shares.items()
        }
        session.server.add_reveal(name, Reveal(reveal.session, reveal.client, false).to_bytes())
    with pytest.raises(RunError, match="shares of client-4's secret do not reconstruct it"):
        session.server.finish()


def reveal_falsely(session: Session, liars: tuple[str, ...], target: str) -> None:
    """Close with reveals in which the liars' shares of the target's secret are wrong."""
    order = {Roster.from_bytes(data).client: name for name, data in session.rosters.items()}
    for name, data in session.down.items():
        reveal = Reveal.from_bytes(session.client(name).unmask(data))
        false = {
            peer: (survived, bytes(32) if name in liars and order[peer] == target else share)
            for peer, (survived, share) in reveal.shares.items()
        }
        session.server.add_reveal(name, Reveal(reveal.session, reveal.client, false).to_bytes())


@pytest.mark.parametrize("gone", [{}, {"client-6": "mask"}], ids=["self-mask seed", "mask key"])
@pytest.mark.parametrize("liars", [("client-1",), ("client-1", "client-4")])
def test_wrong_shares_are_laid_to_their_holder_and_the_sum_is_right(
    gone: dict[str, str], liars: tuple[str, ...]
) -> None:
    named: set[str] = set()
    for _ in range(20):  # where the first shares happen to be right, which is seldom, nobody looks for wrong ones
        vectors = random_vectors(8, 20, 12)
        session = Session(vectors, 12, Topology(7, 4), gone=gone).until("reveal")
        reveal_falsely(session, liars, "client-6")
        total = session.server.finish()
        assert (total.vector == plain_sum(vectors, total.survivors, 12)).all()
        assert set(total.wrong) in (set(liars), set())
        for name, reason in total.wrong.items():
            assert reason == f"its share of client-6's secret is wrong: {name} changed it, or client-6 sent a wrong one"
        named |= set(total.wrong)
    assert named == set(liars)


def test_a_corrupt_sum_is_noticed_even_if_nobody_can_say_whose_share_was_wrong() -> None:
    session = Session(random_vectors(4, 20, 12), 12, Topology(3, 3)).until("reveal")
    reveal_falsely(session, ("client-1",), "client-2")
    with pytest.raises(RunError, match="shares of client-2's secret do not reconstruct it"):
        session.server.finish()


@pytest.mark.parametrize("signed", [False, True])
def test_a_saved_client_answers_as_one_that_was_never_saved(signed: bool) -> None:
    vectors = random_vectors(4, 30, 12)
    session = Session(vectors, 12, Topology(3, 2), signed=signed)
    session.advertise()
    session.share()
    for name, data in session.down.items():
        twin = ClientSession.from_bytes(session.members[name], session.clients[name].to_bytes())
        answer = session.clients[name].mask_input(vectors[name], data)
        assert twin.mask_input(vectors[name], data) == answer
        assert twin.to_bytes() == session.clients[name].to_bytes()
        session.server.add_masked(name, answer)
    session.down = session.server.survivors()
    if signed:
        session.confirm()
    for name, data in session.down.items():
        twin = ClientSession.from_bytes(session.members[name], session.clients[name].to_bytes())
        answer = session.clients[name].unmask(data)
        assert twin.unmask(data) == answer
        session.server.add_reveal(name, answer)
    assert (session.server.finish().vector == plain_sum(vectors, tuple(names(4)), 12)).all()


def test_a_state_is_of_one_client_and_run() -> None:
    some = members(2, signed=False)
    client = ClientSession(some["client-0"])
    client.advertise_keys()
    data = client.to_bytes()
    with pytest.raises(PayloadError, match="saved state is not of client-1"):
        ClientSession.from_bytes(some["client-1"], data)
    with pytest.raises(PayloadError, match="saved state is not of client-0"):
        ClientSession.from_bytes(Participant(b"another run", "client-0"), data)
    for size in range(len(data)):
        with pytest.raises(PayloadError):
            ClientSession.from_bytes(some["client-0"], data[:size])


def test_a_vector_that_is_not_the_session_s_is_a_mistake_of_the_caller() -> None:
    session = Session(random_vectors(3, 5, 12), 12, Topology(2, 2)).until("mask")
    data = session.down["client-0"]
    for vector in (
        np.zeros(4, dtype=np.uint64),
        np.zeros((5, 1), dtype=np.uint64),
        np.zeros(5, dtype=np.int64),
        np.full(5, 4096, dtype=np.uint64),
    ):
        with pytest.raises(ValueError, match="5 elements of uint64 below"):
            session.client("client-0").mask_input(vector, data)
    session.client("client-0").mask_input(np.full(5, 4095, dtype=np.uint64), data)


@pytest.mark.parametrize("module", [tofu.secagg, tofu.secagg.fixed_point])
def test_the_examples_run(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
