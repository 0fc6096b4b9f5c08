"""The round's global weights on the client: taken whole, or built from weights that it kept and the steps it lacks."""

from client.state import KeptWeights
from tofu.compression.base import Compressor
from tofu.errors import DataError, PayloadError, TofuError
from tofu.fingerprint import MAX_DRIFT, after_step, drift
from tofu.payload import HEADER_BYTES, WEIGHTS, float32_from, read_payload
from tofu.reference_model import ReferenceModel
from tofu.weights import add_update, fingerprint, load_weights, weights_of
from tofu.wire import TrainRequest


class ResyncError(TofuError):
    """The steps do not lead from what this client has to the round's weights: it must be sent them whole."""


def receive_weights(
    request: TrainRequest, round_: int, network: ReferenceModel, kept: KeptWeights | None, compressor: Compressor | None
) -> None:
    """Bring the network's model to the weights of the round, `request.identity`.

    Args:
        network: its model is the run's initial one, as every client builds it from the settings.
        kept: what this client has from an earlier round.
        compressor: of the server's steps; None where this run sends weights whole.

    Raises:
        ResyncError: this client lacks the weights that the steps start at, or comes out elsewhere than the server.
        TofuError: the payload cannot be trusted.
    """
    if request.payload:
        _take(request.payload, round_, network)
    else:
        _build(request, round_, network, kept, compressor)


def _take(data: bytes, round_: int, network: ReferenceModel) -> None:
    limit = HEADER_BYTES + network.param_spec.float32_bytes
    payload = read_payload(data, codec=WEIGHTS, round_=round_, fingerprint=None, max_bytes=limit)
    load_weights(network.model, float32_from(payload.body, network.param_spec))
    network.model.eval()
    if fingerprint(weights_of(network.model)) != payload.fingerprint:
        raise DataError("the global weights do not match their fingerprint: server and client built other models")


def _build(
    request: TrainRequest, round_: int, network: ReferenceModel, kept: KeptWeights | None, compressor: Compressor | None
) -> None:
    if compressor is None:
        raise DataError("the server sent steps, but this client's settings have downlink=full")
    if kept is not None:
        load_weights(network.model, kept.weights)
    network.model.eval()
    start = identity = kept.identity if kept is not None else fingerprint(weights_of(network.model))
    limit = HEADER_BYTES + compressor.body_bytes(network.param_spec)
    for number, data in enumerate(request.steps, start=round_ - len(request.steps) + 1):
        step = read_payload(data, codec=compressor.code, round_=number, fingerprint=None, max_bytes=limit)
        if step.fingerprint == identity:  # the first ones may have been taken already, in a reply that got lost
            try:
                add_update(network.model, compressor.decompress(network, step.body))
            except PayloadError as error:
                raise ResyncError(f"the step of round {number} cannot be taken from these weights: {error}") from error
            identity = after_step(identity, data)
    if identity != request.identity:
        raise ResyncError(f"weights {start.hex()} and {len(request.steps)} steps lead to {identity.hex()}, "
                          f"the round's weights are {request.identity.hex()}")  # fmt: skip
    away = drift(weights_of(network.model), request.sketch)
    if not away <= MAX_DRIFT:
        raise ResyncError(f"weights built from steps are {away:.1g} of their length away from the server's")
