import pytest
import torch

from benchmarks import current_rivals
from benchmarks.current_rivals import MODELS, SHAPES, parameters, run_of
from benchmarks.rivals.reduced import LowRankHadamard
from tofu.models import build_model


def test_smaller_models_leave_at_least_one_bit_for_a_parameter() -> None:
    for (task, method), models in MODELS.items():
        for ratio in models:
            bits = 32 / float(run_of(task, method, ratio, 0).method_settings["ratio"])
            assert 0.8 < bits < 10, (task, method, ratio)


def test_each_run_sends_what_its_ratio_says() -> None:
    for run in current_rivals.all_runs():
        settings = run.method_settings
        share = settings["rounds"] / current_rivals.TASKS[run.task]["rounds"]
        assert settings["ratio"] / run.smaller / share == pytest.approx(run.ratio, rel=0.15), run.name


def test_every_run_has_its_own_name() -> None:
    names = [run.name for run in current_rivals.all_runs()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("layer", [torch.nn.Linear(200, 50), torch.nn.Conv2d(8, 50, 5, padding=2)])
@pytest.mark.parametrize("rank", [1, 3])
def test_fedpara_has_the_paper_s_rank_and_he_s_variance(layer: torch.nn.Linear | torch.nn.Conv2d, rank: int) -> None:
    torch.manual_seed(0)
    weights = []
    for _ in range(200):
        own = LowRankHadamard(layer, rank)
        x1, y1, x2, y2 = own.factors
        weights.append(((x1 @ y1.T) * (x2 @ y2.T)).detach())
    assert {int(torch.linalg.matrix_rank(weight)) for weight in weights} == {rank**2}
    variance = torch.stack(weights).var()
    assert float(variance * weights[0].shape[1]) == pytest.approx(2, rel=0.25)


@pytest.mark.parametrize("layer", [torch.nn.Linear(200, 50), torch.nn.Conv2d(8, 50, 5, padding=2)])
def test_fedpara_computes_its_layer_with_that_weight(layer: torch.nn.Linear | torch.nn.Conv2d) -> None:
    own = LowRankHadamard(layer, 2)
    x1, y1, x2, y2 = own.factors
    layer.load_state_dict({"weight": ((x1 @ y1.T) * (x2 @ y2.T)).view(layer.weight.shape), "bias": own.bias})
    inputs = torch.randn(3, 200) if isinstance(layer, torch.nn.Linear) else torch.randn(3, 8, 9, 9)
    assert torch.allclose(own(inputs), layer(inputs), atol=1e-5)


def test_fedpara_s_parameters_are_counted_by_hand() -> None:
    """Of LeNet-5's layers, 2 r (outputs + inputs) for each weight, and its 236 biases."""
    sizes = ((6, 25), (16, 150), (120, 400), (84, 120), (10, 84))
    expected = 2 * 2 * sum(map(sum, sizes)) + 236
    assert parameters("mnist", "benchmarks.rivals.reduced:fedpara_lenet5_2") == expected
    model = build_model("benchmarks.rivals.reduced:fedpara_lenet5_2", SHAPES["mnist"])
    assert not [name for name, _ in model.named_parameters() if name.endswith("weight")]
