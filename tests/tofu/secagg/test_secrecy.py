"""What the server receives says nothing about one client's vector, and what a client must forget is gone."""

import numpy as np
import pytest

from tests.tofu.secagg.harness import Session, names, plain_sum, random_vectors
from tofu.bytes_io import unpack
from tofu.secagg.client import ClientSession
from tofu.secagg.fixed_point import FixedPoint
from tofu.secagg.graph import Stage, Topology
from tofu.secagg.masks import RingVector, centered, largest
from tofu.secagg.messages import Masked, Reveal, Shares

BITS, VALUES = 12, 20_000


def masked_vectors(session: Session) -> dict[str, RingVector]:
    values = len(next(iter(session.vectors.values())))
    return {
        name: unpack(Masked.from_bytes(data).packed, values, session.bits, "vector")
        for name, stage, data in session.received
        if stage == "mask"
    }


@pytest.mark.parametrize("constant", [0, 1, 4095])
def test_a_constant_vector_is_uniform_under_its_masks(constant: int) -> None:
    vectors = {name: np.full(VALUES, constant, dtype=np.uint64) for name in names(4)}
    session = Session(vectors, BITS, Topology(3, 2)).until("reveal")
    bins = 256
    for vector in masked_vectors(session).values():
        for digits in (vector >> np.uint64(4), vector & np.uint64(255)):
            counts = np.bincount(digits.astype(np.int64), minlength=bins)
            chi_square = float(((counts - VALUES / bins) ** 2 / (VALUES / bins)).sum())
            assert abs(chi_square - (bins - 1)) < 6 * np.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("signed", [False, True])
def test_the_transcript_has_no_vector_but_the_sum(signed: bool) -> None:
    code = FixedPoint(6, BITS, 0.1)
    generator = np.random.default_rng(1)
    common = generator.normal(0, 0.02, VALUES)
    real = {name: common + generator.normal(0, 0.01, VALUES) for name in names(6)}
    vectors = {name: code.encode(value, 100)[0] for name, value in real.items()}
    # One drops out after sharing and one after its vector came, so that both kinds of secrets are revealed.
    gone = {"client-5": "mask", "client-4": "confirm" if signed else "reveal"}
    session = Session(vectors, BITS, Topology(5, 3), signed=signed, gone=gone)
    total = session.finish()
    assert (total.vector == plain_sum(vectors, total.survivors, BITS)).all()

    def correlation(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.corrcoef(one, other)[0, 1])

    bound = 5 / np.sqrt(VALUES)
    masked = masked_vectors(session)
    assert set(masked) == set(names(5))
    for name, value in real.items():
        plain = np.ascontiguousarray(vectors[name]).tobytes()
        for who, _, data in session.received:
            assert plain[:64] not in data, who
        for vector in masked.values():
            assert not (vector == vectors[name]).all()
            assert abs(correlation(centered(vector, BITS)[:VALUES], value)) < bound
        for sign in (1, -1):  # nor do two masked vectors together
            together = masked["client-0"] + np.uint64(sign % 2**64) * masked["client-1"] & largest(BITS)
            assert abs(correlation(centered(together, BITS)[:VALUES], value)) < bound
    # The same measure does see what may be seen.
    assert correlation(code.decode(total.vector).mean, real["client-0"]) > 0.5


def test_the_transcript_has_one_share_of_each_client_from_each_neighbor() -> None:
    vectors = random_vectors(6, 50, BITS)
    session = Session(vectors, BITS, Topology(5, 3), gone={"client-5": "mask"})
    held = {}
    session.until("reveal")
    for name, client in session.clients.items():
        if name != "client-5":
            held[name] = {peer: bytes(share) for peer, share in client._state.held.items()}
    session.reveal()
    session.server.finish()
    for name, stage, data in session.received:
        if stage != "reveal":
            continue
        revealed = Reveal.from_bytes(data).shares
        for peer, both in held[name].items():
            survived, share = revealed[peer]
            assert share == (both[:32] if survived else both[32:])
            assert (both[32:] if survived else both[:32]) not in data
        assert sum(not survived for survived, _ in revealed.values()) == 1


def test_secrets_are_gone_as_soon_as_they_have_served() -> None:
    session = Session(random_vectors(4, 50, BITS), BITS, Topology(3, 2), signed=True).until("mask")
    client = session.clients["client-0"]
    state = client._state
    buffers = [state.mask_secret, state.share_secret, state.self_seed]
    keys = [bytes(secret) for secret in buffers]
    assert all(len(key) == 32 and key in client.to_bytes() for key in keys)
    session.mask()
    assert all(len(buffer) == 0 for buffer in buffers)
    assert not any(key in client.to_bytes() for key in keys)
    shares = [bytes(share) for share in state.held.values()]
    assert len(shares) == 3
    assert all(share in client.to_bytes() for share in shares)
    session.confirm()
    session.reveal()
    assert client.stage is Stage.DONE
    assert not any(share[:32] in client.to_bytes() or share[32:] in client.to_bytes() for share in shares)
    assert not state.held
    assert state.advert is None
    assert state.roster is None
    assert len(client.to_bytes()) < 150


def test_closing_at_any_stage_erases_everything() -> None:
    for stage in ("share", "mask", "confirm", "reveal"):
        session = Session(random_vectors(4, 50, BITS), BITS, Topology(3, 2), signed=True).until(stage)
        client = session.clients["client-0"]
        before = len(client.to_bytes())
        client.close()
        assert client.stage is Stage.DONE
        assert len(client.to_bytes()) < 150 < before


def test_a_stage_repeated_from_an_old_state_uses_no_nonce_twice() -> None:
    session = Session(random_vectors(4, 5, BITS), BITS, Topology(3, 2)).until("share")
    saved, incoming = session.clients["client-0"].to_bytes(), session.down["client-0"]
    nonces = set()
    for _ in range(2):
        again = ClientSession.from_bytes(session.members["client-0"], saved)
        nonces |= {sealed[:12] for sealed in Shares.from_bytes(again.share_keys(incoming)).sealed.values()}
    assert len(nonces) == 6


def test_keys_and_seeds_are_fresh_for_every_session() -> None:
    seen = set()
    for _ in range(3):
        session = Session(random_vectors(3, 5, BITS), BITS, Topology(2, 2)).until("mask")
        for client in session.clients.values():
            state = client._state
            seen |= {bytes(state.mask_secret), bytes(state.share_secret), bytes(state.self_seed)}
    assert len(seen) == 3 * 3 * 3
