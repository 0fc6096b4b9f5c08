"""The weights that the server sends: in full, or as its compressed step towards them.

With steps, the server's own weights differ from those that the clients hold. A round's step is their compressed
difference, so what compression loses remains in the difference and is sent later. This is error feedback on the
downlink (DoubleSqueeze, Tang et al., ICML 2019). Clients train from the weights that they hold, and the server decodes
their updates at those. Every client builds the initial model from the run's settings, so the first round sends none. A
client that missed rounds receives the missed steps, or the full weights if they are smaller. FedAvg rounds send full
weights.
"""

from dataclasses import dataclass, replace

from server.checkpoint import Snapshot
from tofu.fingerprint import SKETCH_BYTES, after_step, sketch
from tofu.payload import HEADER_BYTES, WEIGHTS, Payload, float32_bytes
from tofu.reference_model import ReferenceModel
from tofu.rng import derive_generator
from tofu.settings import Settings
from tofu.weights import (
    add_update,
    base_fingerprint,
    copy_model,
    difference,
    explained_variance,
    load_weights,
    weights_of,
)


@dataclass(frozen=True)
class Parts:
    """What a request carries: full weights, or steps."""

    payload: bytes
    steps: tuple[bytes, ...] = ()

    @property
    def nbytes(self) -> int:
        return len(self.payload) + sum(map(len, self.steps))


class Downlink:
    """The weights that the clients hold, and what each client must receive to hold them.

    Args:
        master: the server's own model. Without compression the clients hold its weights.

    Attributes:
        reference: the model at the weights that clients hold in this round.
        identity: of these weights.
        sketch: of these weights.
        explained_variance: of this round's step; None for full weights.
    """

    def __init__(self, master: ReferenceModel, settings: Settings) -> None:
        self._master, self._settings = master, settings
        self._compressor = settings.make_downlink(master)
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

    def save(self, snapshot: Snapshot) -> None:
        """Add the state to a checkpoint."""
        if self._compressor is None:
            return
        snapshot.put_tensors("downlink", weights_of(self.reference.model))
        snapshot.blobs["downlink/memory"] = self._memory
        for number, step in enumerate(self._steps):
            snapshot.blobs[f"downlink/step {number}"] = step
        snapshot.plain["downlink"] = {
            "identity": self.identity.hex(), "steps": len(self._steps), "held": self._held, "shared": self._shared
        }  # fmt: skip

    def restore(self, snapshot: Snapshot, *, clients_kept: bool) -> None:
        """Restore what `save` wrote.

        Args:
            clients_kept: the clients still have their weights; otherwise they receive full weights.
        """
        if self._compressor is None:
            return
        plain = snapshot.plain["downlink"]
        load_weights(self.reference.model, snapshot.tensors_of("downlink"))
        self.identity, self._memory = bytes.fromhex(plain["identity"]), snapshot.blobs["downlink/memory"]
        if clients_kept:
            self._steps = [snapshot.blobs[f"downlink/step {number}"] for number in range(plain["steps"])]
            self._held, self._shared = dict(plain["held"]), plain["shared"]

    def _step(self) -> None:
        assert self._compressor is not None
        target = difference(weights_of(self._master.model), weights_of(self.reference.model))
        generator = derive_generator(self._settings.seed, self._round, "server", "encode")
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
        """What to send to a client: the steps that it lacks, or full weights.

        Args:
            whole: the client asked for full weights.
        """
        held = self._held.get(client, self._shared)
        lacks = self._round - held
        if whole or not held or lacks > len(self._steps):
            return Parts(self._weights())
        return Parts(b"", tuple(self._steps[len(self._steps) - lacks :]))

    def _weights(self) -> bytes:
        """The payload of this round's full weights, made when the first client needs it."""
        if not self._whole:
            weights = weights_of(self.reference.model)
            body = float32_bytes(weights, self.reference.param_spec)
            self._whole = Payload(WEIGHTS, self._round, base_fingerprint(self.reference.model), body).to_bytes()
        return self._whole

    def delivered(self, client: str) -> None:
        """A client replied from this round's weights, so it holds them."""
        self._held[client] = self._round
