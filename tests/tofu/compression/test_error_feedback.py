import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tofu.compression.error_feedback import ErrorFeedback
from tofu.weights import Weights


def lossy(target: Weights) -> Weights:
    """Keeps the larger half of the values."""
    value = target["w"]
    return {"w": torch.where(value.abs() >= value.abs().median(), value, torch.zeros(()))}


@settings(max_examples=100, deadline=None)
@given(
    present=st.lists(st.booleans(), min_size=1, max_size=12),
    arrives=st.lists(st.booleans(), min_size=12, max_size=12),
    seed=st.integers(0, 2**31),
)
def test_nothing_is_lost_or_counted_twice(present: list[bool], arrives: list[bool], seed: int) -> None:
    """What the server added plus what the client still remembers is all that the client ever computed."""
    generator = torch.Generator().manual_seed(seed)
    feedback, acknowledged = ErrorFeedback(), -1
    computed, server = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for round_, here in enumerate(present):
        if not here:  # sits this round out
            continue
        update = {"w": torch.randn(8, generator=generator)}
        computed += update["w"]
        target = feedback.target(update, acknowledged)
        decoded = lossy(target)
        feedback = ErrorFeedback.after(target, decoded, round_)
        if arrives[round_]:
            server += decoded["w"]
            acknowledged = round_
    remembered = feedback.target({"w": torch.zeros(8)}, acknowledged)["w"]
    assert torch.allclose(server + remembered, computed, atol=1e-4)


def test_a_share_of_the_residual_fades_but_a_lost_reply_returns_whole() -> None:
    target = {"w": torch.tensor([4.0, 1.0])}
    feedback = ErrorFeedback.after(target, {"w": torch.tensor([4.0, 0.0])}, 3)
    zero = {"w": torch.zeros(2)}
    assert feedback.target(zero, 3, fraction=0.5)["w"].tolist() == [0.0, 0.5]
    assert feedback.target(zero, 2, fraction=0.5)["w"].tolist() == [4.0, 0.5]
    assert feedback.target(zero, -1, fraction=0.0)["w"].tolist() == [4.0, 0.0]


def test_a_residual_halves_with_the_rounds_that_its_client_missed() -> None:
    feedback = ErrorFeedback({"w": torch.tensor([4.0])}, {"w": torch.tensor([8.0])}, 3)
    assert feedback.aged(4, 2.0) is feedback
    assert feedback.aged(9, 0.0) is feedback
    aged = feedback.aged(8, 2.0)
    assert aged.residual["w"].tolist() == [1.0]
    assert aged.target({"w": torch.zeros(1)}, 2)["w"].tolist() == [9.0]  # a lost reply does not age
    assert ErrorFeedback().aged(5, 2.0).residual == {}


def test_the_first_round_has_nothing_to_add() -> None:
    update = {"w": torch.ones(2)}
    assert torch.equal(ErrorFeedback().target(update, -1)["w"], update["w"])


@settings(max_examples=100, deadline=None)
@given(
    present=st.lists(st.booleans(), min_size=1, max_size=12),
    arrives=st.lists(st.booleans(), min_size=12, max_size=12),
    step_ahead=st.sampled_from([0.0, 0.5, 1.0]),
    gain=st.sampled_from([1.0, 1.8]),
    seed=st.integers(0, 2**31),
)
def test_step_ahead_and_over_relaxation_keep_the_sum_of_all_local_progress(
    present: list[bool], arrives: list[bool], step_ahead: float, gain: float, seed: int
) -> None:
    """Replies get lost and rounds are missed; the server's weights plus the residual are always the start plus all
    local progress. The local objective pulls towards a point of its own, so progress depends on the starting point."""
    generator = torch.Generator().manual_seed(seed)
    goal, feedback, acknowledged = torch.randn(8, generator=generator), ErrorFeedback(), -1
    nothing = {"w": torch.zeros(8), "buffer": torch.zeros(8)}
    progress, server = torch.zeros(8), nothing
    for round_, here in enumerate(present):
        if not here:
            continue
        start = feedback.ahead(server, acknowledged, step_ahead, ["w"])
        assert torch.equal(start["buffer"], server["buffer"])
        missing = feedback.target(nothing, acknowledged)["w"]
        assert torch.allclose(start["w"], server["w"] + step_ahead * missing, atol=1e-5)
        update = {"w": 0.3 * (goal - start["w"]), "buffer": torch.ones(8)}
        progress += update["w"]
        target = feedback.target(update, acknowledged)
        decoded = {"w": gain * lossy(target)["w"], "buffer": target["buffer"]}
        feedback = ErrorFeedback.after(target, decoded, round_)
        if arrives[round_]:
            server = {name: value + decoded[name] for name, value in server.items()}
            acknowledged = round_
    remembered = feedback.target(nothing, acknowledged)["w"]
    assert torch.allclose(server["w"] + remembered, progress, atol=1e-3)
