import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.plugins.ood import ood_metrics
from client.plugins.ood import BINS, OutOfDistribution, histogram, mix_within_classes, threshold
from tofu.data import LabeledImages, open_data, to_float
from tofu.errors import SettingError
from tofu.models import build_model
from tofu.plugins import Batch, Plugins, RoundContext, make_plugins
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import difference, fingerprint, load_weights, weights_of

HOW = LocalTrainingConfig(epochs=5, batch_size=32, lr=0.02, momentum=0.9)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_client(options: str = "") -> tuple[Plugins, OutOfDistribution]:
    plugins = make_plugins("ood", options)
    ood = plugins[0]
    assert isinstance(ood, OutOfDistribution)
    return plugins, ood


@pytest.fixture(scope="module")
def test_images() -> LabeledImages:
    return open_data("digits", clients=1, partition="iid", seed=0).test()


@pytest.fixture(scope="module")
def trained(digits: LabeledImages) -> tuple[nn.Module, Plugins, OutOfDistribution]:
    """The small cnn after 20 epochs; the second round's exports calibrated the threshold."""
    weights = weights_of(one_client()[0].setup(build_model("cnn", digits.shape, seed=0), RoundContext(digits.shape)))
    for round_ in (1, 2):
        plugins, ood = one_client()
        model = plugins.setup(build_model("cnn", digits.shape, seed=0), RoundContext(digits.shape, round=round_))
        load_weights(model, weights)
        train_locally(model, digits, HOW, generator=generator(round_), plugins=plugins)
        weights = weights_of(model)
    plugins.reduce(plugins.export(model).sums, len(digits))
    return model.eval(), plugins, ood


def outside(like: Tensor) -> dict[str, Tensor]:
    """Images in [-1, 1] that are no digits."""
    return {"uniform": torch.rand(like.shape, generator=generator(1)) * 2 - 1, "inverted": -like}


def test_it_knows_noise_and_inverted_digits_and_loses_no_accuracy(
    trained: tuple[nn.Module, Plugins, OutOfDistribution], digits: LabeledImages, test_images: LabeledImages
) -> None:
    model, plugins, ood = trained
    images = to_float(test_images.images)
    erm = build_model("cnn", digits.shape, seed=0)
    for round_ in (1, 2):
        train_locally(erm, digits, HOW, generator=generator(round_))
    with torch.no_grad():
        inside = plugins.predict(model, images)
        plain = erm.eval()(images)
    assert inside.score is not None
    assert inside.logits.shape == (len(images), 10)
    correct = [float((logits.argmax(1) == test_images.labels).float().mean()) for logits in (inside.logits, plain)]
    assert correct[0] >= correct[1] - 0.01
    for others in outside(images).values():
        with torch.no_grad():
            score = plugins.predict(model, others).score
            msp = -erm(others).softmax(1).max(1).values
        assert score is not None
        ours, theirs = ood_metrics(inside.score, score), ood_metrics(-plain.softmax(1).max(1).values, msp)
        assert ours["auroc"] >= 0.99
        assert ours["fpr95"] <= 0.02
        assert ours["auroc"] > theirs["auroc"]
        assert ood.unknown(score).float().mean() > 0.95
    assert ood.unknown(inside.score).float().mean() <= 0.12  # 5% of the clients' own; of unseen digits some more


def test_setup_is_the_same_everywhere_and_leaves_a_set_up_model_alone(digits: LabeledImages) -> None:
    about = RoundContext(digits.shape)
    models = [one_client()[0].setup(build_model("cnn", digits.shape, seed=3), about) for _ in range(2)]
    assert fingerprint(weights_of(models[0])) == fingerprint(weights_of(models[1]))
    plain = build_model("cnn", digits.shape, seed=3)
    assert [n for n, _ in models[0].named_parameters()] == [n for n, _ in plain.named_parameters()]
    x = to_float(digits.images[:5])
    out = models[0](x)
    assert torch.equal(out[:, :10], plain(x))
    assert torch.equal(out[:, 10], torch.zeros(5))
    assert one_client()[0].setup(models[0], about) is models[0]
    assert models[0](x).shape == (5, 11)


@pytest.mark.parametrize("name", ["mlp", "lenet5", "cnn", "resnet18", "vgg11", "vit_tiny"])
def test_every_models_head_is_widened(name: str, digits: LabeledImages) -> None:
    plugins, _ = one_client()
    model = plugins.setup(build_model(name, digits.shape), RoundContext(digits.shape)).eval()
    with torch.no_grad():
        assert model(to_float(digits.images[:2])).shape == (2, 11)
        assert plugins.predict(model, to_float(digits.images[:2])).logits.shape == (2, 10)


def test_a_model_without_a_linear_head_is_refused(digits: LabeledImages) -> None:
    model = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(SettingError, match="a model that ends in a linear layer"):
        one_client()[0].setup(model, RoundContext(digits.shape))


@pytest.mark.parametrize("soft", [False, True])
def test_a_batch_gets_half_as_many_images_mixed_with_noise(digits: LabeledImages, soft: bool) -> None:
    plugins, _ = one_client("ood.noise=0.7")
    plugins.setup(build_model("mlp", digits.shape), RoundContext(digits.shape))
    x, y = to_float(digits.images[:40]), digits.labels[:40]
    given = Batch(x, F.one_hot(y, 10).float() if soft else y, torch.arange(40))
    batch = plugins.on_batch(given, generator())
    images, targets = batch.images, batch.targets
    assert batch.ids.tolist() == [*range(40), *[-1] * 20]
    assert images.shape == (60, 1, 8, 8)
    assert targets.shape == (60, 11)
    assert torch.equal(images[:40], x)
    assert torch.equal(targets[:40].argmax(1), y)
    assert torch.allclose(targets.sum(1), torch.ones(60))
    assert float(images.abs().max()) <= 1
    unknown = targets[40:, 10]
    assert 0 <= float(unknown.min()) < 0.2
    assert 0.8 < float(unknown.max()) <= 1
    # What is left after taking (1 - unknown) of the image away is noise of that deviation, where nothing was cut.
    rows = torch.randperm(40, generator=generator())[:20]
    assert torch.equal(targets[40:, :10].argmax(1), y[rows])
    noise = (images[40:] - (1 - unknown).view(-1, 1, 1, 1) * x[rows]) / unknown.view(-1, 1, 1, 1)
    inner = noise[(images[40:].abs() < 1) & (x[rows].abs() < 0.3)]
    assert 0.55 < float(inner.std()) < 0.85
    assert abs(float(inner.mean())) < 0.15
    again = plugins.on_batch(Batch(x, y, torch.arange(40)), generator())
    assert torch.equal(again.images, images)


def test_partners_are_of_the_same_class(digits: LabeledImages) -> None:
    labels = digits.labels[:64]
    coded = labels.float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)  # an image that shows its class in every pixel
    assert torch.allclose(mix_within_classes(coded, labels, generator()), coded)
    x = to_float(digits.images[:64])
    mixed = mix_within_classes(x, labels, generator())
    assert (mixed != x).flatten(1).any(1).float().mean() > 0.5


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=30), min_size=1, max_size=4),
    st.sampled_from([0.01, 0.05, 0.2]),
)
@settings(max_examples=100, deadline=None)
def test_histograms_add_up_and_the_threshold_keeps_its_promise(clients: list[list[float]], share: float) -> None:
    """And it is the least edge that does: one bin lower, more than the share would be flagged."""
    parts = [histogram(torch.tensor(scores, dtype=torch.float64), "auxiliary") for scores in clients]
    pooled = torch.tensor(list(itertools.chain(*clients)), dtype=torch.float64)
    total = torch.stack(parts).sum(0)
    assert torch.equal(total, histogram(pooled, "auxiliary"))
    line = threshold(total, "auxiliary", share)
    # An infinite log-odds counts in the last bin, whose upper edge is then the threshold: 1 in floating point.
    flagged = int((pooled.clamp(max=1 - 1e-16) >= line * (1 + 1e-12)).sum())
    assert flagged <= share * len(pooled)
    lower = torch.sigmoid(torch.logit(torch.tensor(line, dtype=torch.float64)) - 80 / BINS)
    if 1e-17 < line < 1 - 1e-9:
        assert int((pooled >= lower * (1 - 1e-12)).sum()) > share * len(pooled)


@pytest.mark.parametrize("kind", ["auxiliary", "angle", "energy"])
def test_every_score_calibrates(kind: str, digits: LabeledImages) -> None:
    """A threshold from two clients' summed histograms flags the wanted share of their images at the round's weights."""
    about = RoundContext(digits.shape)
    plugins, _ = one_client()
    model = plugins.setup(build_model("mlp", digits.shape, seed=0), about)
    train_locally(model, digits, LocalTrainingConfig(2, 32, 0.1), generator=generator(), plugins=plugins)
    start = copy.deepcopy(model)
    halves = [digits.subset(torch.arange(i, len(digits), 2)) for i in range(2)]
    sums = []
    for half in halves:
        plugins, ood = one_client(f"ood.score={kind} ood.false-alarms=0.1 ood.images=100000")
        local = plugins.setup(copy.deepcopy(start), about)
        train_locally(local, half, LocalTrainingConfig(1, 32, 0.05), generator=generator(), plugins=plugins)
        assert any(bool(v.any()) for v in difference(weights_of(local), weights_of(start)).values())
        sums.append(plugins.export(local).sums)
    assert not ood.unknown(torch.ones(3)).any()
    plugins.reduce({name: sums[0][name] + sums[1][name] for name in sums[0]}, len(digits))
    with torch.no_grad():
        score = plugins.predict(start.eval(), to_float(digits.images)).score
    assert score is not None
    assert 0.07 < float(ood.unknown(score).float().mean()) <= 0.1


@pytest.mark.parametrize("kind", ["auxiliary", "angle", "energy"])
def test_the_server_calibrates_at_the_weights_that_it_saves(kind: str, digits: LabeledImages) -> None:
    """A threshold for half of its images flags about as many of the other half."""
    plugins, ood = one_client(f"ood.score={kind} ood.false-alarms=0.1 ood.images=100000")
    model = plugins.setup(build_model("mlp", digits.shape, seed=0), RoundContext(digits.shape))
    train_locally(model, digits, LocalTrainingConfig(2, 32, 0.1), generator=generator(), plugins=plugins)
    ood.broadcast = {"threshold": -1e9}
    halves = [digits.subset(torch.arange(i, len(digits), 2)) for i in range(2)]
    saved = plugins.calibrated_bytes(model, halves[0], max_bytes=10**4)
    assert model.training
    assert ood.broadcast == {"threshold": -1e9}  # clients are still told what clients found
    plugins.load(broadcast=saved, max_bytes=10**4)
    with torch.no_grad():
        flagged = [ood.unknown(ood.predict(model.eval(), to_float(half.images)).score) for half in halves]
    assert 0.06 < float(flagged[0].float().mean()) <= 0.1
    assert 0.04 < float(flagged[1].float().mean()) < 0.17


def test_measuring_leaves_the_trained_model_as_it_was(digits: LabeledImages) -> None:
    prints = []
    for plugins in (one_client("ood.images=10")[0], one_client("ood.images=500")[0]):
        model = plugins.setup(build_model("resnet18", digits.shape, norm="batch"), RoundContext(digits.shape))
        data = digits.subset(torch.arange(32))
        train_locally(model, data, LocalTrainingConfig(1, 16, 0.05), generator=generator(), plugins=plugins)
        assert all(module.training for module in model.modules())
        assert plugins.export(model).sums["ood/histogram"].sum() == min(32, plugins[0].images)  # type: ignore[attr-defined]
        prints.append(fingerprint(weights_of(model)))
    assert prints[0] == prints[1]
