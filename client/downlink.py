"""How a client obtains the round's global weights: in full, or from weights that it kept and the steps it missed."""

from tofu.compression.base import Compressor
from tofu.errors import PayloadError
from tofu.payload import HEADER_BYTES, WEIGHTS, float32_from, read_payload
from tofu.reference_model import ReferenceModel
from tofu.rounds.downlink import KeptWeights, follow_steps
from tofu.weights import base_fingerprint, load_weights
from tofu.wire import TrainRequest


def receive_weights(
    request: TrainRequest, round_: int, network: ReferenceModel, kept: KeptWeights | None, compressor: Compressor | None
) -> None:
    """Load the round's weights, `request.identity`, into the network's model.

    Args:
        network: the run's initial model, which every client builds from the settings.
        kept: the weights that this client kept from an earlier round.
        compressor: compressor of the server's steps; None if the run sends full weights.

    Raises:
        ResyncError: this client lacks the weights that the steps start from, or arrives at other weights than the
            server.
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
