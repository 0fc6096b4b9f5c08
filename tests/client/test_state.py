import torch
from flwr.app import ArrayRecord, Context, RecordDict

from client.state import load_state, save_state
from tofu.compression import ErrorFeedback
from tofu.weights import Layout

LAYOUT = Layout({"w": torch.Size([2, 3]), "b": torch.Size([])}, {"n": torch.Size([1])}, frozenset({"n"}))


def context() -> Context:
    return Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


def weights(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, value) for name, shape in LAYOUT.shapes.items()}


def test_round_trip() -> None:
    ctx = context()
    save_state(ctx, feedback=ErrorFeedback(weights(0.5), weights(-2.0), 7), memory=b"proxies")
    state = load_state(ctx, LAYOUT)
    assert state.memory == b"proxies"
    assert state.feedback.sent_round == 7
    assert torch.equal(state.feedback.residual["w"], torch.full((2, 3), 0.5))
    assert torch.equal(state.feedback.sent["b"], torch.tensor(-2.0))


def test_an_empty_context_is_a_fresh_start() -> None:
    state = load_state(context(), LAYOUT)
    assert state.feedback == ErrorFeedback()
    assert state.memory == b""


def test_the_state_of_another_model_is_not_used() -> None:
    ctx = context()
    save_state(ctx, feedback=ErrorFeedback(weights(0.5), weights(0.5), 7), memory=b"")
    other = Layout({"w": torch.Size([4]), "b": torch.Size([])}, {"n": torch.Size([1])})
    assert load_state(ctx, other).feedback == ErrorFeedback()
    del ctx.state["tofu.sent"]
    assert load_state(ctx, LAYOUT).feedback == ErrorFeedback()


def test_without_feedback_only_the_codecs_memory_is_kept() -> None:
    ctx = context()
    save_state(ctx, feedback=None, memory=b"m")
    assert not ctx.state.array_records
    assert load_state(ctx, LAYOUT).memory == b"m"


def test_loaded_weights_do_not_share_memory_with_the_record() -> None:
    ctx = context()
    save_state(ctx, feedback=ErrorFeedback(weights(0.5), weights(0.5), 7), memory=b"")
    load_state(ctx, LAYOUT).feedback.residual["w"].add_(1)
    record = ctx.state["tofu.residual"]
    assert isinstance(record, ArrayRecord)
    assert float(record.to_torch_state_dict()["w"].max()) == 0.5
