"""The compressed downlink: the server sends steps, from which clients compute the weights of a round.

With steps, the server's own weights differ from those that the clients hold. A round's step is their compressed
difference, so what compression loses remains in the difference and is sent later. This is error feedback on the
downlink (DoubleSqueeze, Tang et al., ICML 2019). Clients train from the weights that they hold, and the server decodes
their updates at those. A client that missed rounds receives the missed steps, or the full weights if they are smaller.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tofu.compression.base import Compressor
from tofu.errors import PayloadError, TofuError
from tofu.reference_model import ReferenceModel
from tofu.rng import derive_generator
from tofu.weights import (
    MAX_DRIFT,
    SKETCH_BYTES,
    Weights,
    add_update,
    after_step,
    base_fingerprint,
    copy_model,
    difference,
    drift,
    explained_variance,
    load_weights,
    sketch,
    weights_of,
)
from tofu.wire import (
    CLASSES_LOST,
    HEADER_BYTES,
    RESYNC,
    WEIGHTS,
    Payload,
    TrainRequest,
    float32_bytes,
    float32_from,
    read_payload,
)


class ResyncError(TofuError):
    """The client cannot build the round's weights from the steps: the server must send them in full."""

    code: ClassVar[int] = RESYNC


class ClassesLostError(ResyncError):
    """The client has lost its state, and with it the numbering of the run's classes: the server must send both."""

    code = CLASSES_LOST


@dataclass(frozen=True)
class KeptWeights:
    """The global weights that a client stored in its last round, and their identity (`tofu.weights`)."""

    weights: Weights
    identity: bytes


@dataclass(frozen=True)
class Parts:
    """The content of a request: full weights, or steps."""

    payload: bytes
    steps: tuple[bytes, ...] = ()

    @property
    def nbytes(self) -> int:
        return len(self.payload) + sum(map(len, self.steps))


class WeightSteps:
    """The server's half: the weights that the clients hold, and the steps that each client must receive.

    Args:
        master: the server's own model. Without compression the clients hold its weights.
        compressor: compressor of the steps; None sends full weights.
        seed: seed of the compressor's random numbers.

    Attributes:
        reference: the model at the weights that clients hold in this round.
        identity: identity of these weights.
        sketch: sketch of these weights.
        explained_variance: of this round's step; None for full weights.
    """

    def __init__(self, master: ReferenceModel, compressor: Compressor | None, seed: int) -> None:
        self._master, self._seed = master, seed
        self._compressor = compressor
        self.reference = replace(master, model=copy_model(master.model)) if self._compressor else master
        self.identity = b""
        self.sketch = bytes(SKETCH_BYTES)
        self.explained_variance: float | None = None
        self._memory = b""
        self._steps: list[bytes] = []
        self._round = 0
        self._held: dict[str, int] = {}
        self._shared = 0
        self._whole = b""

    def begin(self, round_: int, *, whole: bool) -> None:
        """Determine the weights of a round; called once for each round in which this model is trained.

        Args:
            whole: send full weights to all clients.
        """
        self._round, self.explained_variance = round_, None
        self.reference.model.eval()
        if self._compressor is None or whole or not self.identity:
            load_weights(self.reference.model, weights_of(self._master.model))
            self.identity = base_fingerprint(self.reference.model)
            self._steps, self._held = [], {}
            # Before the first step all clients hold the initial model, later those that received weights.
            self._shared = round_ if round_ == 1 and self._compressor and not whole else 0
        else:
            self._step()
        self.sketch = sketch(weights_of(self.reference.model)) if self._compressor else bytes(SKETCH_BYTES)
        self._whole = b""

    def _step(self) -> None:
        assert self._compressor is not None
        target = difference(weights_of(self._master.model), weights_of(self.reference.model))
        generator = derive_generator(self._seed, self._round, "server", "encode")
        made = self._compressor.compress(self.reference, target, generator=generator, memory=self._memory)
        parameters = {name: target[name] for name in self.reference.param_spec.parameters}
        self.explained_variance = explained_variance(parameters, made.decoded)
        payload = Payload(self._compressor.code, self._round, self.identity, made.body).to_bytes()
        add_update(self.reference.model, made.decoded)
        self.identity, self._memory = after_step(self.identity, payload), made.memory
        self._steps.append(payload)
        whole = HEADER_BYTES + self.reference.param_spec.float32_bytes
        while self._steps and sum(map(len, self._steps)) >= whole:
            del self._steps[0]

    def parts(self, client: str, *, whole: bool = False) -> Parts:
        """Return the content of the request to a client: the steps that it missed, or full weights.

        Args:
            whole: the client asked for full weights.
        """
        held = self._held.get(client, self._shared)
        missed = self._round - held
        if whole or not held or missed > len(self._steps):
            return Parts(self._weights())
        return Parts(b"", tuple(self._steps[len(self._steps) - missed :]))

    def _weights(self) -> bytes:
        """Return the payload of this round's full weights, encoded on first use."""
        if not self._whole:
            weights = weights_of(self.reference.model)
            body = float32_bytes(weights, self.reference.param_spec)
            self._whole = Payload(WEIGHTS, self._round, base_fingerprint(self.reference.model), body).to_bytes()
        return self._whole

    def delivered(self, client: str) -> None:
        """Note that a client replied from this round's weights, so it holds them."""
        self._held[client] = self._round


def follow_steps(
    network: ReferenceModel,
    kept: KeptWeights | None,
    steps: Sequence[bytes],
    round_: int,
    compressor: Compressor,
    *,
    identity: bytes,
    sketch: bytes,
) -> None:
    """The client's half: apply steps to the network's weights, in place.

    Args:
        network: the network; without kept weights it must be at the weights that the steps start from.
        kept: the weights that this client kept from an earlier round.
        steps: payloads of the last rounds' steps, oldest first.
        compressor: compressor of the steps.
        identity: identity of the round's weights.
        sketch: sketch of the round's weights.

    Raises:
        ResyncError: this client does not have the weights that the steps start from, or computes other weights than
            the server.
        PayloadError: a payload fails validation.
    """
    if kept is not None:
        load_weights(network.model, kept.weights)
    network.model.eval()
    start = now = kept.identity if kept is not None else base_fingerprint(network.model)
    limit = HEADER_BYTES + compressor.body_bytes(network.param_spec)
    for number, data in enumerate(steps, start=round_ - len(steps) + 1):
        step = read_payload(data, codec=compressor.code, round_=number, fingerprint=None, max_bytes=limit)
        if step.fingerprint == now:  # the first steps may be known from an earlier request
            try:
                add_update(network.model, compressor.decompress(network, step.body))
            except PayloadError as error:
                raise ResyncError(f"the step of round {number} cannot be applied to these weights: {error}") from error
            now = after_step(now, data)
    if now != identity:
        raise ResyncError(
            f"weights {start.hex()} and {len(steps)} steps lead to {now.hex()}, "
            f"the round's weights are {identity.hex()}"
        )
    away = drift(weights_of(network.model), sketch)
    if not away <= MAX_DRIFT:
        raise ResyncError(f"weights built from steps differ from the server's by {away:.1g} of their norm")


def receive_weights(
    request: TrainRequest, round_: int, network: ReferenceModel, kept: KeptWeights | None, compressor: Compressor | None
) -> None:
    """Load the round's weights, `request.identity`, into the network's model.

    Args:
        network: the run's initial model, which every client builds from the settings.
        kept: the weights that this client kept from an earlier round.
        compressor: compressor of the server's steps; None if the run sends full weights.

    Raises:
        ResyncError: this client does not have the weights that the steps start from, or computes other weights than
            the server.
        TofuError: the payload fails validation.
    """
    if request.payload:
        _load_full(request.payload, round_, network)
    else:
        if compressor is None:
            raise PayloadError("the server sent steps, but this client's settings have downlink=full-weights")
        follow_steps(
            network, kept, request.steps, round_, compressor, identity=request.identity, sketch=request.sketch
        )  # fmt: skip


def _load_full(data: bytes, round_: int, network: ReferenceModel) -> None:
    limit = HEADER_BYTES + network.param_spec.float32_bytes
    payload = read_payload(data, codec=WEIGHTS, round_=round_, fingerprint=None, max_bytes=limit)
    load_weights(network.model, float32_from(payload.body, network.param_spec))
    network.model.eval()
    if base_fingerprint(network.model) != payload.fingerprint:
        raise PayloadError("the global weights do not match their fingerprint: server and client built other models "
                        "(frozen weights and constant buffers count, too)")  # fmt: skip
