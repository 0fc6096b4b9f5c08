"""The server's half of the compressed downlink together with the client's: what is sent leads to the same weights."""

import dataclasses

import pytest
import torch

from server.global_model import Downlink
from tofu.compression import downlink_compressor
from tofu.data import ImageShape
from tofu.errors import PayloadError
from tofu.models import build_model
from tofu.reference_model import ReferenceModel
from tofu.rounds.downlink import KeptWeights, Parts, ResyncError, receive_weights
from tofu.settings import Settings
from tofu.weights import Weights, add_update, load_weights, weights_of
from tofu.wire import HEADER_BYTES, TrainRequest

SHAPE = ImageShape(1, 8, 8, 10)
SETTINGS = Settings.of({"model": "mlp", "downlink": "proxy", "downlink-ratio": 12.0, "max_evals": 10, "bits": 8})


def network() -> ReferenceModel:
    return ReferenceModel(build_model("mlp", SHAPE, seed=0).eval(), SHAPE).as_built()


class Server:
    """A downlink, and a master whose weights move a little in each round."""

    def __init__(self, settings: Settings = SETTINGS) -> None:
        self.master, self.settings, self.round = network(), settings, 0
        self.downlink = Downlink(self.master, settings)
        self._generator = torch.Generator().manual_seed(1)

    def next_round(self, *, whole: bool = False) -> None:
        if self.round:
            old = weights_of(self.master.model)
            load_weights(
                self.master.model,
                {n: w + 0.02 * torch.randn(w.shape, generator=self._generator) for n, w in old.items()},
            )
        self.round += 1
        self.downlink.begin(self.round, whole=whole)

    def request(self, client: str, *, whole: bool = False) -> TrainRequest:
        parts = self.downlink.parts(client, whole=whole)
        down = self.downlink
        return TrainRequest("compressed", -1, SHAPE, parts.payload, down.identity, parts.steps, down.sketch)

    @property
    def weights(self) -> Weights:
        return weights_of(self.downlink.reference.model)


class Receiver:
    """What a client does with a request, and what it keeps."""

    def __init__(self, settings: Settings = SETTINGS) -> None:
        self.settings = settings
        self.kept: KeptWeights | None = None

    def take(self, request: TrainRequest, round_: int) -> Weights:
        own = network()
        receive_weights(request, round_, own, self.kept, downlink_compressor(self.settings, own))
        self.kept = KeptWeights(weights_of(own.model), request.identity)
        return self.kept.weights


def equal(a: Weights, b: Weights) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def test_steps_lead_to_the_servers_weights_to_the_bit() -> None:
    server, receiver = Server(), Receiver()
    sizes = []
    for _ in range(4):
        server.next_round()
        request = server.request("a")
        assert equal(receiver.take(request, server.round), server.weights)
        server.downlink.delivered("a")
        sizes.append(server.downlink.parts("a").nbytes)
    assert server.request("a").payload == b""
    whole = HEADER_BYTES + server.master.param_spec.float32_bytes
    request = server.request("b")
    assert len(request.steps) == 3
    assert all(0.8 * whole / 12 < len(step) <= whole / 12 for step in request.steps)


def test_the_first_round_sends_no_weights() -> None:
    server, receiver = Server(), Receiver()
    server.next_round()
    assert server.downlink.parts("a") == Parts(b"", ())
    assert equal(receiver.take(server.request("a"), 1), weights_of(network().model))


def test_what_compression_loses_is_sent_later(mlp_update: tuple[ReferenceModel, Weights]) -> None:
    server = Server()
    server.next_round()
    trained, update = mlp_update
    load_weights(server.master.model, weights_of(trained.model))
    add_update(server.master.model, update)
    still = server.master.model
    distances = []
    for _ in range(8):
        away = [(w - b).norm() for w, b in zip(weights_of(still).values(), server.weights.values(), strict=True)]
        distances.append(float(torch.stack(away).norm()))
        server.round += 1
        server.downlink.begin(server.round, whole=False)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.85 * distances[0]


def test_a_client_that_missed_rounds_gets_the_steps_it_lacks() -> None:
    server, receiver = Server(), Receiver()
    server.next_round()
    receiver.take(server.request("a"), 1)
    server.downlink.delivered("a")
    for _ in range(3):
        server.next_round()
    request = server.request("a")
    assert len(request.steps) == 3
    assert equal(receiver.take(request, 4), server.weights)


def test_a_reply_that_got_lost_does_not_make_a_client_take_a_step_twice() -> None:
    server, receiver = Server(), Receiver()
    server.next_round()
    receiver.take(server.request("a"), 1)
    server.downlink.delivered("a")
    server.next_round()
    receiver.take(server.request("a"), 2)  # its reply is lost: no delivered()
    server.next_round()
    assert len(server.request("a").steps) == 2
    assert equal(receiver.take(server.request("a"), 3), server.weights)


def test_whole_weights_are_sent_where_the_steps_would_be_more_bytes() -> None:
    server = Server()
    for _ in range(20):
        server.next_round()
    late = server.downlink.parts("late")
    assert late.steps == ()
    assert len(late.payload) == HEADER_BYTES + server.master.param_spec.float32_bytes
    receiver = Receiver()
    assert equal(receiver.take(server.request("late"), 20), server.weights)
    server.downlink.delivered("late")
    server.next_round()
    assert len(server.request("late").steps) == 1
    assert equal(receiver.take(server.request("late"), 21), server.weights)


def test_after_a_round_of_whole_weights_everyone_goes_on_from_them() -> None:
    server, receiver = Server(), Receiver()
    for whole in (False, False, True, False):
        server.next_round(whole=whole)
        assert equal(receiver.take(server.request("a"), server.round), server.weights)
        if whole:
            assert equal(server.weights, weights_of(server.master.model))
        server.downlink.delivered("a")
    assert server.downlink.parts("never heard of").steps == ()


@pytest.mark.parametrize("loss", ["forgot", "other weights", "gap", "swapped steps"])
def test_a_client_with_the_wrong_base_asks_for_the_weights(loss: str) -> None:
    server, receiver = Server(), Receiver()
    for _ in range(3):
        server.next_round()
        receiver.take(server.request("a"), server.round)
        server.downlink.delivered("a")
    assert receiver.kept is not None
    server.next_round()
    server.next_round()
    request = server.request("a")
    assert len(request.steps) == 2
    if loss == "forgot":
        receiver.kept = None
    elif loss == "other weights":
        receiver.kept = dataclasses.replace(
            receiver.kept, weights={name: 1.01 * value for name, value in receiver.kept.weights.items()}
        )
    elif loss == "gap":
        request = dataclasses.replace(request, steps=request.steps[1:])
    else:
        with pytest.raises(PayloadError, match="belongs to round"):
            receiver.take(dataclasses.replace(request, steps=request.steps[::-1]), 5)
        return
    before = receiver.kept
    with pytest.raises(ResyncError, match=r"lead to|away from the server's|cannot be applied"):
        receiver.take(request, 5)
    assert receiver.kept is before
    assert equal(receiver.take(server.request("a", whole=True), 5), server.weights)
    server.next_round()
    server.downlink.delivered("a")


def test_a_damaged_step_is_refused() -> None:
    server, receiver = Server(), Receiver()
    server.next_round()
    server.next_round()
    request = server.request("a")
    [step] = request.steps
    for bad in (step[:-1], step[:-1] + bytes([step[-1] ^ 1]), b"", step + bytes(10**6)):
        with pytest.raises(PayloadError, match="payload"):
            receiver.take(dataclasses.replace(request, steps=(bad,)), 2)


def test_a_client_whose_settings_have_no_steps_says_so() -> None:
    server = Server()
    server.next_round()
    server.next_round()
    with pytest.raises(PayloadError, match="downlink=full-weights"):
        Receiver(Settings.of({"model": "mlp"})).take(server.request("a"), 2)


def test_without_compression_clients_hold_the_master_itself() -> None:
    server = Server(Settings.of({"model": "mlp"}))
    for _ in range(3):
        server.next_round()
        assert server.downlink.reference is server.master
        assert equal(Receiver(server.settings).take(server.request("a"), server.round), server.weights)
        assert server.downlink.parts("a").steps == ()
