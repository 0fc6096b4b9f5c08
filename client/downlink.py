"""How a client obtains the round's global weights: in full, or from weights that it kept and the steps it missed."""

from client.state import KeptWeights
from tofu.compression.base import Compressor
from tofu.errors import DataError, PayloadError, TofuError
from tofu.fingerprint import MAX_DRIFT, after_step, drift
from tofu.payload import HEADER_BYTES, WEIGHTS, float32_from, read_payload
from tofu.reference_model import ReferenceModel
from tofu.weights import add_update, base_fingerprint, load_weights, weights_of
from tofu.wire import TrainRequest


class ResyncError(TofuError):
    """The client cannot build the round's weights from the steps: the server must send them in full."""


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
        _apply_steps(request, round_, network, kept, compressor)


def _load_full(data: bytes, round_: int, network: ReferenceModel) -> None:
    limit = HEADER_BYTES + network.param_spec.float32_bytes
    payload = read_payload(data, codec=WEIGHTS, round_=round_, fingerprint=None, max_bytes=limit)
    load_weights(network.model, float32_from(payload.body, network.param_spec))
    network.model.eval()
    if base_fingerprint(network.model) != payload.fingerprint:
        raise DataError("the global weights do not match their fingerprint: server and client built other models "
                        "(frozen weights and constant buffers count, too)")  # fmt: skip


def _apply_steps(
    request: TrainRequest, round_: int, network: ReferenceModel, kept: KeptWeights | None, compressor: Compressor | None
) -> None:
    if compressor is None:
        raise DataError("the server sent steps, but this client's settings have downlink=full-weights")
    if kept is not None:
        load_weights(network.model, kept.weights)
    network.model.eval()
    start = identity = kept.identity if kept is not None else base_fingerprint(network.model)
    limit = HEADER_BYTES + compressor.body_bytes(network.param_spec)
    for number, data in enumerate(request.steps, start=round_ - len(request.steps) + 1):
        step = read_payload(data, codec=compressor.code, round_=number, fingerprint=None, max_bytes=limit)
        if step.fingerprint == identity:  # an earlier request may have brought the first ones
            try:
                add_update(network.model, compressor.decompress(network, step.body))
            except PayloadError as error:
                raise ResyncError(f"the step of round {number} cannot be applied to these weights: {error}") from error
            identity = after_step(identity, data)
    if identity != request.identity:
        raise ResyncError(f"weights {start.hex()} and {len(request.steps)} steps lead to {identity.hex()}, "
                          f"the round's weights are {request.identity.hex()}")  # fmt: skip
    away = drift(weights_of(network.model), request.sketch)
    if not away <= MAX_DRIFT:
        raise ResyncError(f"weights built from steps differ from the server's by {away:.1g} of their norm")
