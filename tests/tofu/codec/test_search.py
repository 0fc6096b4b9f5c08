import dataclasses

import pytest
import torch
from torch import nn

from tests.conftest import Case
from tofu.codec.options import ProxySettings, paper_settings
from tofu.codec.proxies import ProxyCode, ProxyData, decode, proxy_loss
from tofu.codec.search import ADAM_STEP, SURROGATE_BETAS, Encoding, _adam, _Objective, _Variables, encode
from tofu.data import ImageShape
from tofu.reference_model import ReferenceModel
from tofu.weights import Weights, cosine, explained_variance


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def explained(encoding: Encoding, update: Weights) -> float:
    return explained_variance({name: update[name] for name in encoding.decoded}, encoding.decoded)


def sent(network: ReferenceModel, encoding: Encoding, count: int) -> ProxyData:
    """The proxies as the receiver reads them."""
    return ProxyCode.of(network, ProxySettings(), count).read(encoding.body)


def test_adams_steps_are_torchs_to_the_bit() -> None:
    start = torch.randn(20, dtype=torch.float64, generator=generator())
    ours: list[torch.Tensor] = []

    def objective(vector: torch.Tensor) -> tuple[float, torch.Tensor]:
        ours.append(vector.clone())
        return 0.0, vector**3 + vector.cos()

    steps = _adam(objective, start)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=ADAM_STEP)
    for _ in range(10):
        next(steps)
        assert torch.equal(ours[-1], theirs.detach())
        theirs.grad = objective(theirs.detach())[1]
        ours.pop()
        optimizer.step()
    assert torch.equal(start, torch.randn(20, dtype=torch.float64, generator=generator()))


@pytest.mark.parametrize("mode", [ProxySettings(), paper_settings()], ids=["smooth", "paper"])
@pytest.mark.parametrize("case", ["mlp_update", "every_layer_update"])
def test_proxies_reproduce_an_update(case: str, mode: ProxySettings, request: pytest.FixtureRequest) -> None:
    network, update = request.getfixturevalue(case)
    encoding = encode(network, update, 16, mode, generator=generator())
    noise = encode(network, update, 16, dataclasses.replace(mode, max_evals=1, solve_labels=0), generator=generator())
    assert cosine(encoding.decoded, update) > {"mlp_update": 0.7, "every_layer_update": 0.5}[case]
    assert cosine(encoding.decoded, update) > cosine(noise.decoded, update) + 0.2


def test_smooth_mode_beats_paper_mode_at_the_same_bytes(mlp_update: Case) -> None:
    network, update = mlp_update
    smooth = encode(network, update, 8, ProxySettings(), generator=generator())
    paper = encode(network, update, 8, paper_settings(), generator=generator())
    assert len(smooth.body) <= len(paper.body) + 2 * len(network.param_spec.parameters)
    assert explained(smooth, update) > explained(paper, update) + 0.03


@pytest.mark.parametrize("mode", [ProxySettings(bits=4), paper_settings(bits=8), ProxySettings(bits=32)])
def test_the_receiver_decodes_to_the_bit_what_the_sender_saw(mlp_update: Case, mode: ProxySettings) -> None:
    network, update = mlp_update
    encoding = encode(network, update, 5, mode, generator=generator())
    received = ProxyCode.of(network, mode, 5).read(encoding.body)
    decoded = decode(network, received, mode)
    assert all(torch.equal(decoded[name], encoding.decoded[name]) for name in decoded)


def test_same_seed_same_bytes_other_seed_other_bytes(mlp_update: Case) -> None:
    network, update = mlp_update
    quick = ProxySettings(max_evals=5)
    one, two, three = (encode(network, update, 4, quick, generator=generator(s)).body for s in (1, 1, 2))
    assert one == two
    assert one != three


@pytest.mark.parametrize("mode", [ProxySettings(), paper_settings(smooth=True)], ids=["smooth", "simplex"])
def test_gradient_by_difference_is_the_gradient_by_differentiating_twice(mlp_update: Case, mode: ProxySettings) -> None:
    network, update = mlp_update
    objective = _Objective(network, update, mode)
    code = ProxyCode.of(network, mode, 4)
    simplex = mode.labels == "simplex"
    begin = ProxyData(
        (torch.randn(4, *code.shape, generator=generator()),),
        torch.randn(4, 10, generator=generator()).softmax(1) if simplex else torch.randn(4, 10, generator=generator()),
        torch.ones(4) if simplex else None,
        torch.zeros(code.tensors),
    )
    proxies = _Variables(begin, free=not simplex).proxies(_Variables(begin, free=not simplex).vector)
    value, ours = objective(proxies)

    weights = {name: w.clone().requires_grad_() for name, w in network.base.items()}
    given = [x.detach().requires_grad_() for x in (*proxies.inputs, proxies.labels, proxies.weights) if x is not None]
    leaves = dataclasses.replace(proxies, inputs=(given[0],), labels=given[1], weights=given[2] if simplex else None)
    grads = torch.autograd.grad(proxy_loss(network, weights, leaves, mode), list(weights.values()), create_graph=True)
    top = torch.stack([(update[name] * g).sum() for name, g in zip(weights, grads, strict=True)])
    bottom = torch.stack([(g * g).sum() for g in grads])
    power = sum(float((update[name] ** 2).sum()) for name in weights)
    explained = (top**2 / bottom).sum() if mode.scale == "tensor" else top.sum() ** 2 / bottom.sum()
    exact = torch.autograd.grad(1 - explained / power, given)
    assert value == pytest.approx(1 - float(explained) / power, rel=1e-3)
    for mine, true in zip(ours, exact, strict=True):
        assert float(torch.cosine_similarity(mine.flatten(), true.flatten(), dim=0)) > 0.999


def test_aligned_labels_have_the_largest_inner_product_with_the_update(mlp_update: Case) -> None:
    network, update = mlp_update
    objective, code = _Objective(network, update, ProxySettings()), ProxyCode.of(network, ProxySettings(), 4)
    begin = ProxyData(
        (torch.randn(4, *code.shape, generator=generator()),), torch.ones(4, 10), None, torch.ones(code.tensors)
    )
    labels = objective.align_labels(begin).labels
    inner = torch.zeros(4, 10)
    for i in range(4):
        for j in range(10):
            one = dataclasses.replace(begin, labels=torch.eye(40)[10 * i + j].view(4, 10))
            decoded = decode(network, one, ProxySettings())
            inner[i, j] = sum((update[name] * d).sum() for name, d in decoded.items())
    assert float(torch.cosine_similarity(labels.flatten(), inner.flatten(), dim=0)) > 0.999


def test_warm_start_begins_ahead(mlp_update: Case) -> None:
    network, update = mlp_update
    first = sent(network, encode(network, update, 6, ProxySettings(), generator=generator()), 6)
    quick = ProxySettings(max_evals=3)
    cold = encode(network, update, 6, quick, generator=generator(1))
    warm = encode(network, update, 6, quick, generator=generator(1), start=first)
    off = encode(network, update, 6, dataclasses.replace(quick, warm_start=False), generator=generator(1), start=first)
    assert explained(warm, update) > explained(cold, update) + 0.1
    assert off.body == cold.body


def test_a_warm_start_does_not_let_pixels_run_away(mlp_update: Case) -> None:
    network, update = mlp_update
    first = sent(network, encode(network, update, 6, ProxySettings(), generator=generator()), 6)
    huge = dataclasses.replace(first, inputs=(1e6 * first.inputs[0],), labels=1e6 * first.labels)
    warm = encode(network, update, 6, ProxySettings(), generator=generator(1), start=huge)
    assert float(sent(network, warm, 6).inputs[0].abs().max()) < 1e5
    assert float(sent(network, warm, 6).labels.abs().max()) < 1e5
    assert explained(warm, update) > 0.3


def test_early_stop_spends_fewer_evaluations(mlp_update: Case) -> None:
    network, update = mlp_update
    patient = encode(network, update, 6, ProxySettings(max_evals=300, tolerance=0), generator=generator())
    hasty = encode(network, update, 6, ProxySettings(max_evals=300, tolerance=0.01), generator=generator())
    assert hasty.evals < patient.evals
    assert explained(hasty, update) > explained(patient, update) - 0.1


def test_choosing_the_sharpness_costs_little_against_knowing_it(mlp_update: Case) -> None:
    network, update = mlp_update
    found = [
        explained(encode(network, update, 6, ProxySettings(surrogate_beta=s), generator=generator()), update)
        for s in (0.0, *SURROGATE_BETAS)
    ]
    assert found[0] > max(found) - 0.05


def test_a_zero_update_decodes_to_zero(mlp_update: Case) -> None:
    network, update = mlp_update
    zero = {name: torch.zeros_like(value) for name, value in update.items()}
    encoding = encode(network, zero, 3, ProxySettings(), generator=generator())
    assert all(float(value.abs().max()) == 0 for value in encoding.decoded.values())


def test_color_images_and_rectangles() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 10, 5))
    network = ReferenceModel(model, ImageShape(3, 8, 12, 5))
    update = {name: torch.randn_like(p) for name, p in network.base.items()}
    encoding = encode(network, update, 20, ProxySettings(), generator=generator())
    assert sent(network, encoding, 20).inputs[0].shape == (20, 3, 7, 11)
    assert explained(encoding, update) > 0.05
