import torch
from flwr.app import Context, RecordDict
from torch import nn

from client.state import SavedState, load_state, save_state
from tofu.compression.error_feedback import ErrorFeedback
from tofu.data import ImageShape
from tofu.reference_model import ReferenceModel
from tofu.rounds.downlink import KeptWeights


class Tiny(nn.Module):
    """Two parameters, a counter, and a constant that is not sent."""

    def __init__(self, shape: tuple[int, ...] = (2, 3), constant: float = 0.0) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(()))
        self.register_buffer("n", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("constant", torch.tensor(constant), persistent=False)


def reference(model: nn.Module) -> ReferenceModel:
    return ReferenceModel(model, ImageShape(1, 2, 2, 2))


MODEL = reference(Tiny())


def context() -> Context:
    return Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


def weights(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, value) for name, shape in MODEL.param_spec.shapes.items()}


def test_round_trip() -> None:
    ctx = context()
    save_state(ctx, MODEL, feedback=ErrorFeedback(weights(0.5), weights(-2.0), 7), memory=b"proxies")
    state = load_state(ctx, MODEL)
    assert state.memory == b"proxies"
    assert state.feedback.sent_round == 7
    assert torch.equal(state.feedback.residual["w"], torch.full((2, 3), 0.5))
    assert torch.equal(state.feedback.sent["b"], torch.tensor(-2.0))


def test_an_empty_context_is_a_fresh_start() -> None:
    state = load_state(context(), MODEL)
    assert state.feedback == ErrorFeedback()
    assert state.memory == b""


def test_the_state_of_another_model_is_not_used() -> None:
    ctx = context()
    save_state(ctx, MODEL, feedback=ErrorFeedback(weights(0.5), weights(0.5), 7), memory=b"proxies",
               kept=KeptWeights(weights(1.0), bytes(8)), plugins=b"state")  # fmt: skip
    # Fewer numbers, as many in another shape, and another constant.
    for other in (Tiny((4,)), Tiny((3, 2)), Tiny(constant=1.0)):
        assert load_state(ctx, reference(other)) == SavedState(ErrorFeedback(), b"", None, b"state")
    assert load_state(ctx, MODEL).kept is not None
    ctx.state["tofu"]["version"] = 1
    assert load_state(ctx, MODEL).kept is None


def test_kept_weights_come_back_with_their_identity() -> None:
    ctx = context()
    save_state(ctx, MODEL, feedback=None, memory=b"", kept=KeptWeights(weights(3.0), b"identity"))
    kept = load_state(ctx, MODEL).kept
    assert kept is not None
    assert kept.identity == b"identity"
    assert torch.equal(kept.weights["w"], torch.full((2, 3), 3.0))


def test_without_feedback_only_the_codecs_memory_is_kept() -> None:
    ctx = context()
    save_state(ctx, MODEL, feedback=None, memory=b"m")
    state = load_state(ctx, MODEL)
    assert (state.memory, state.kept, state.feedback) == (b"m", None, ErrorFeedback())


def test_loaded_weights_do_not_share_memory_with_the_record() -> None:
    ctx = context()
    save_state(ctx, MODEL, feedback=ErrorFeedback(weights(0.5), weights(0.5), 7), memory=b"")
    load_state(ctx, MODEL).feedback.residual["w"].add_(1)
    assert float(load_state(ctx, MODEL).feedback.residual["w"].max()) == 0.5
