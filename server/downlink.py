"""The weights that the server of a run sends: in full, or as its compressed step towards them (`tofu.rounds.downlink`).

Every client builds the initial model from the run's settings, so the first round sends none. FedAvg rounds send full
weights.
"""

from server.checkpoint import Snapshot
from tofu.compression import downlink_compressor
from tofu.reference_model import ReferenceModel
from tofu.rounds.downlink import WeightSteps
from tofu.settings import Settings
from tofu.weights import load_weights, weights_of


class Downlink(WeightSteps):
    """The weights that the clients of a run hold, also across restarts of the server.

    Args:
        master: the server's own model.
    """

    def __init__(self, master: ReferenceModel, settings: Settings) -> None:
        super().__init__(master, downlink_compressor(settings, master), settings.run.seed)

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
