import pytest
import torch
import torch.nn.functional as F
from torch import nn

from client.training import LocalTraining, SeededDropout, _batches, train_locally
from tofu.data import LabelledImages, to_float
from tofu.errors import RunError
from tofu.models import build_model
from tofu.weights import fingerprint, weights_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_epoch_is_plain_sgd_over_shuffled_batches(digits: LabelledImages) -> None:
    """Against a loop written out."""
    data = digits.subset(torch.arange(100))
    ours, theirs = build_model("mlp", data.shape, seed=1), build_model("mlp", data.shape, seed=1)
    result = train_locally(ours, data, LocalTraining(2, 32, 0.1), generator=generator(3))
    g = generator(3)
    for _ in range(2):
        order = torch.randperm(100, generator=g)
        for i in range(0, 100, 32):
            rows = order[i : i + 32]
            F.cross_entropy(theirs(to_float(data.images[rows])), data.labels[rows]).backward()
            for p in theirs.parameters():
                assert p.grad is not None
                p.data -= 0.1 * p.grad
                p.grad = None
    assert result.steps == 8
    for name, value in weights_of(ours).items():
        assert torch.allclose(value, weights_of(theirs)[name], atol=1e-6)


def test_training_learns_and_the_seed_decides(digits: LabelledImages) -> None:
    prints = []
    for seed in (1, 1, 2):
        model = build_model("mlp", digits.shape, seed=0)
        result = train_locally(model, digits, LocalTraining(1, 32, 0.05), generator=generator(seed))
        prints.append(fingerprint(weights_of(model)))
    assert prints[0] == prints[1] != prints[2]
    again = train_locally(model, digits, LocalTraining(1, 32, 0.05), generator=generator())
    assert again.loss < result.loss - 0.3


def test_dropout_draws_from_the_given_generator_only() -> None:
    layer = nn.Dropout(0.5)
    x = torch.ones(1000)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    with SeededDropout(generator(1)):
        a = layer(x)
    with SeededDropout(generator(1)):
        b = layer(x)
    with SeededDropout(generator(2)):
        c = layer(x)
        assert torch.equal(layer.eval()(x), x)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert set(a.tolist()) == {0.0, 2.0}
    assert 400 < int((a == 0).sum()) < 600
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_lone_last_image_is_left_out_as_batch_norm_could_not_take_it() -> None:
    assert [len(b) for b in _batches(65, 32, generator())] == [32, 32]
    assert [len(b) for b in _batches(66, 32, generator())] == [32, 32, 2]
    assert [len(b) for b in _batches(1, 32, generator())] == [1]


def test_divergence_is_an_error_that_says_what_may_help(digits: LabelledImages) -> None:
    with pytest.raises(RunError, match="a smaller lr than 1e\\+10 may help"):
        train_locally(build_model("mlp", digits.shape), digits, LocalTraining(1, 32, 1e10), generator=generator())
