"""The temporal low-rank rival: its messages keep to their bytes, and a basis that lasts explains more each round."""

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from benchmarks.error_feedback.sampled import Federation
from benchmarks.rivals.temporal import Basis, Temporal, choices, chosen_within, table
from tofu.data import FederatedData
from tofu.models import initial_model
from tofu.settings import Settings


@pytest.fixture(scope="module")
def federation() -> Federation:
    settings = Settings.of({"dataset": "digits", "model": "lenet5", "clients": 2})
    data = FederatedData.of(settings.data, 0)
    return Federation(settings, data, initial_model(settings.model, data.shape, 0))


@pytest.fixture(scope="module")
def progress(federation: Federation) -> Tensor:
    start = parameters_to_vector(federation.model.parameters()).detach().clone()
    return federation.train(0, 1, start).progress


def lost(progress: Tensor, decoded: Tensor) -> float:
    return float((progress - decoded).square().sum() / progress.square().sum())


@pytest.mark.parametrize("ratio", [20, 100])
def test_a_lasting_update_is_explained_better_every_round_within_the_same_bytes(
    federation: Federation, progress: Tensor, ratio: int
) -> None:
    method = Temporal(federation, ratio=ratio)
    losses = [lost(progress, method.compress(progress, client=0, round_=round_)) for round_ in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0] < 0.8
    assert method.longest <= 4 * progress.numel() / ratio
    other = Temporal(federation, ratio=ratio)
    assert lost(progress, other.compress(progress, client=1, round_=1)) == pytest.approx(losses[0], rel=1e-3)
    again = lost(progress, method.compress(progress, client=1, round_=1))  # each client has a basis of its own
    assert again == pytest.approx(losses[0], rel=1e-3)


def test_layers_are_matrices_and_back(federation: Federation, progress: Tensor) -> None:
    method = Temporal(federation, ratio=50)
    matrices = method._matrices(progress)
    assert all(matrix.shape[0] >= matrix.shape[1] for matrix in matrices)
    torch.testing.assert_close(method._flat(matrices), progress, rtol=0, atol=0)


def test_a_vector_that_the_receiver_has_costs_its_coefficients_only() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(30, generator=generator), torch.randn(5, generator=generator)
    matrix, basis = torch.outer(left, right), Basis.empty(30)
    (new,) = (choice for choice in choices(0, matrix, basis) if choice.explained > 1e-3)
    assert new.explained == pytest.approx(float(matrix.square().sum()), rel=1e-4)
    basis.replace(new.vector, most=5)
    known = choices(0, matrix, basis)[0]
    assert (known.old, new.bytes - known.bytes) == (True, 2 * 30)
    assert known.explained == pytest.approx(new.explained, rel=1e-4)
    assert chosen_within([new, known], budget=new.bytes + known.bytes - 1) == [known]
    for _ in range(9):
        basis.replace(torch.randn(30, generator=generator), most=5)
    assert basis.vectors.shape == (30, 5)


def test_the_table_chooses_by_the_tuning_seed_and_counts_the_others() -> None:
    rows = [
        {"task": "mnist", "ratio": ratio, "parameters": {"step": step}, "seed": seed, "final_accuracy": accuracy,
         "reached": 51.0}
        for ratio, step, seed, accuracy in (
            (0, 1.0, 7, 0.9), (0, 2.0, 7, 0.8), (50, 2.0, 7, 0.7), (50, 1.0, 7, None), (0, 1.0, 0, 0.91),
            (50, 2.0, 0, 0.75), (50, 2.0, 1, 0.77),
        )
    ]  # fmt: skip
    _, lines = table(rows)
    assert lines == [
        ["mnist", "FedAvg", "", "step = 1", "91.0 (1 of 3 seeds)"],
        ["mnist", "temporal low rank", "51x", "step = 2", "76.0 ± 1.4 (2 of 3 seeds)"],
    ]
