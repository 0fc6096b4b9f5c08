import copy
from collections.abc import Mapping
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.plugins.utilized_rank import rank_picture
from client.plugins.layers import sites
from client.plugins.utilized_rank import Core, LayerRank, UtilizedRank, grams, top_eigenvectors
from tofu.codec.compressor import ProxyCompressor
from tofu.codec.options import CompressorOptions, ProxySettings
from tofu.data import LabeledImages, open_data, to_float
from tofu.errors import RunError
from tofu.models import build_model
from tofu.plugins import Plugins, RoundContext, RunRequirements, make_plugins
from tofu.reference_model import ReferenceModel
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import difference, explained_variance, fingerprint, layout_of, load_weights, weights_of

MB = 1 << 28
HOW = LocalTrainingConfig(epochs=3, batch_size=32, lr=0.02, momentum=0.9)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def only(options: str = "") -> tuple[Plugins, UtilizedRank]:
    plugins = make_plugins("rank", options)
    rank = plugins[0]
    assert isinstance(rank, UtilizedRank)
    return plugins, rank


def measured(model: nn.Module, parts: list[LabeledImages], options: str) -> tuple[Plugins, UtilizedRank]:
    """The server's plugins after the first round, in which clients trained copies of the model on their parts."""
    about, totals = RoundContext(parts[0].shape), {}
    for part in parts:
        plugins, _ = only(options)
        local = plugins.setup(copy.deepcopy(model), about)
        train_locally(local, part, LocalTrainingConfig(1, 32, 0.01), generator=generator(), plugins=plugins)
        totals = {name: totals.get(name, 0) + value for name, value in plugins.export(local).sums.items()}
    server, rank = only(options)
    server.setup(model, about)
    server.check_sums(totals, model, clients=len(parts))
    server.reduce(totals, sum(map(len, parts)))
    return server, rank


@pytest.fixture(scope="module")
def halves(digits: LabeledImages) -> list[LabeledImages]:
    return [digits.subset(torch.arange(i, len(digits), 2)) for i in range(2)]


@pytest.fixture(scope="module")
def trained(digits: LabeledImages) -> nn.Module:
    """The small cnn, trained on the digits."""
    model = build_model("cnn", digits.shape, seed=0)
    train_locally(model, digits, HOW, generator=generator())
    return model


def accuracy(model: nn.Module, data: LabeledImages) -> float:
    with torch.no_grad():
        return float((model.eval()(to_float(data.images)).argmax(1) == data.labels).float().mean())


def projected(model: nn.Module, rank: UtilizedRank) -> nn.Module:
    """A copy with P_T W P_S written out, layer by layer: the oracle."""
    copied = copy.deepcopy(model)
    for name in rank.ranks:
        v_s, v_t = (rank.broadcast.get(f"{name}/{side}") for side in ("inputs", "outputs"))
        if isinstance(v_s, Tensor) and isinstance(v_t, Tensor):
            weight = copied.get_parameter(name)
            weight.data = (v_t @ v_t.T @ weight.data.flatten(1) @ v_s @ v_s.T).view(weight.shape)
    return copied


@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.floats(0.01, 1), min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_averaging_cores_averages_weights(k_s: int, k_t: int, shares: list[float], seed: int) -> None:
    g = generator(seed)
    v_s, v_t = (torch.linalg.qr(torch.randn(8, k, generator=g))[0] for k in (k_s, k_t))
    make = Core(v_s, v_t, torch.Size((8, 2, 2, 2)))
    cores = torch.randn(len(shares), k_t, k_s, generator=g)
    share = torch.tensor(shares) / sum(shares)
    averaged = make(torch.einsum("n,nij->ij", share, cores))
    assert torch.allclose(averaged, sum(s * make(c) for s, c in zip(share, cores, strict=True)), atol=1e-6)
    assert torch.allclose(make.right_inverse(averaged), torch.einsum("n,nij->ij", share, cores), atol=1e-5)


@given(st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_leading_subspace_is_that_of_the_rows(dimension: int, seed: int) -> None:
    rows = torch.randn(40, dimension, generator=generator(seed), dtype=torch.float64)
    rows = rows @ torch.randn(dimension, 8, generator=generator(seed + 1), dtype=torch.float64)
    basis = top_eigenvectors(rows.T @ rows, 1 - 1e-12)
    assert basis.shape == (8, dimension)
    assert torch.allclose(rows @ basis @ basis.T, rows, atol=1e-5)
    few = top_eigenvectors(rows.T @ rows, 0.7)
    held = float((rows @ few).square().sum() / rows.square().sum())
    assert held >= 0.7 - 1e-12
    if few.shape[1] > 1:
        assert float((rows @ few[:, :-1]).square().sum() / rows.square().sum()) < 0.7


def test_clients_sums_are_those_of_the_pooled_images(trained: nn.Module, halves: list[LabeledImages]) -> None:
    """At the round's weights, however each client then trained; so the server has exactly the pooled subspaces."""
    images = torch.cat([half.images for half in halves])
    own = sites(trained)[1:]
    pooled = grams(copy.deepcopy(trained), images, own, 0.0)
    _, rank = measured(trained, halves, "rank.energy=0.99 rank.images=100000")
    assert [f"{site.name}" for site in own] == list(rank.ranks)
    for site in own:
        for side, count in (("inputs", rank.ranks[site.name].inputs), ("outputs", rank.ranks[site.name].outputs)):
            basis, found = (
                top_eigenvectors(pooled[f"{site.name}/{side}"], 0.99).float(),
                rank.broadcast[f"{site.name}/{side}"],
            )
            assert isinstance(found, Tensor)
            assert found.shape == basis.shape == (len(basis), count)
            assert torch.allclose(found @ found.T, basis @ basis.T, atol=1e-4)


def test_output_sums_are_of_the_outputs_before_the_bias(trained: nn.Module, digits: LabeledImages) -> None:
    model, images = copy.deepcopy(trained).eval(), digits.images[:40]
    sums = grams(model, images, sites(model), 0.0)
    with torch.no_grad():
        assert isinstance(model, nn.Sequential)
        fed = model[:-1](to_float(images))
        out = F.conv2d(to_float(images), model.conv1.weight, padding=1).transpose(0, 1).flatten(1).double()
    logits = (fed @ model.fc2.weight.T).double()
    assert torch.allclose(sums["fc2.weight/outputs"], logits.T @ logits, rtol=1e-4, atol=1e-3)
    assert torch.allclose(sums["conv1.weight/outputs"], out @ out.T, rtol=1e-4, atol=1e-2)


def test_factorized_layers_compute_the_projected_weights(trained: nn.Module, halves: list[LabeledImages]) -> None:
    server, rank = measured(trained, halves, "rank.energy=0.99")
    oracle = projected(trained, rank)
    model = server.setup(copy.deepcopy(trained), RoundContext(halves[0].shape, round=2))
    x = to_float(halves[0].images[:20])
    with torch.no_grad():
        expected = oracle.eval()(x)
        assert torch.allclose(model.eval()(x), expected, atol=1e-4)
    param_spec, whole = layout_of(model), layout_of(trained)
    cores = sum(r.inputs * r.outputs for r in rank.ranks.values())
    plain = sum(r.columns * r.rows for r in rank.ranks.values())
    assert param_spec.parameter_count == whole.parameter_count - plain + cores < whole.parameter_count / 2
    assert param_spec.float32_bytes == 4 * param_spec.parameter_count  # the bases are no buffers that travel
    # Another client builds the same from its own fresh weights, the broadcast's bytes and the server's cores.
    client, _ = only("rank.energy=0.99")
    client.load(broadcast=server.broadcast_bytes(max_bytes=MB), max_bytes=MB)
    local = client.setup(
        build_model("cnn", halves[0].shape, seed=5), RoundContext(halves[0].shape, round=2, client="1")
    )
    load_weights(local, weights_of(model))
    assert fingerprint(weights_of(local)) == fingerprint(weights_of(model))
    assert client.setup(local, RoundContext(halves[0].shape, round=3)) is local
    assert client.declare_sums(local) == {}
    with torch.no_grad():
        assert torch.equal(local.eval()(x), model(x))
        for module in [module for module in local.modules() if parametrize.is_parametrized(module)]:
            parametrize.remove_parametrizations(module, "weight")
        assert torch.allclose(local(x), expected, atol=1e-4)
    assert layout_of(local).parameters.keys() == whole.parameters.keys()


def test_half_the_parameters_lose_no_accuracy_after_fine_tuning(
    trained: nn.Module, halves: list[LabeledImages]
) -> None:
    """A round of two clients on the cores, averaged."""
    test = open_data("digits", clients=1, partition="iid", seed=0).test()
    server, rank = measured(trained, halves, "rank.energy=0.99")
    about = RoundContext(halves[0].shape, round=2)
    model = server.setup(copy.deepcopy(trained), about)
    locals_: list[Mapping[str, Tensor]] = []
    for half in halves:
        client, _ = only("rank.energy=0.99")
        client.load(broadcast=server.broadcast_bytes(max_bytes=MB), max_bytes=MB)
        local = client.setup(copy.deepcopy(model), about)
        train_locally(local, half, LocalTrainingConfig(1, 32, 0.01, 0.9), generator=generator(), plugins=client)
        assert client.export(local).metrics == {"rank/utilization": rank.broadcast["utilization"]}
        locals_.append(weights_of(local))
    load_weights(model, {name: (value + locals_[1][name]) / 2 for name, value in locals_[0].items()})
    assert layout_of(model).parameter_count < layout_of(trained).parameter_count / 2
    used = rank.broadcast["utilization"]
    assert isinstance(used, float)
    assert 0 < used < 0.75
    assert accuracy(model, test) >= accuracy(trained, test) - 0.004  # one of 270 images


def test_the_codec_encodes_cores(trained: nn.Module, halves: list[LabeledImages]) -> None:
    server, _ = measured(trained, halves, "rank.energy=0.99")
    model = server.setup(copy.deepcopy(trained), RoundContext(halves[0].shape, round=2))
    base = weights_of(model)
    train_locally(model, halves[0], LocalTrainingConfig(1, 32, 0.01), generator=generator())
    update = difference(weights_of(model), base)
    load_weights(model, base)
    network = ReferenceModel(model.eval(), halves[0].shape)
    codec = ProxyCompressor(
        network, ratio=20, options=CompressorOptions(correction=0.4, encoder=ProxySettings(max_evals=20, bits=4))
    )
    compressed = codec.compress(network, update, generator=generator())
    decoded = codec.decompress(network, compressed.body)
    assert all(torch.equal(decoded[name], value) for name, value in compressed.decoded.items())
    assert explained_variance(update, decoded) > 0.2


class Strided(nn.Module):
    """What the small networks lack: strides, padding by reflection, no bias, BatchNorm, groups, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.conv = nn.Conv2d(12, 16, (3, 2), stride=2, padding=1, bias=False, padding_mode="reflect")
        self.batch = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.twice = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.batch(self.conv(F.relu(self.stem(x)))))
        x = F.relu(self.grouped(x)).mean((2, 3))
        return self.head(F.relu(self.twice(F.relu(self.twice(x)))))


@pytest.mark.parametrize("name", ["vit_tiny", "lenet5", "strided"])
def test_other_networks(name: str, digits: LabeledImages) -> None:
    """Attention's two projections, and convolutions with strides and without a bias; train and eval mode alike."""
    data = digits.subset(torch.arange(64))
    torch.manual_seed(0)
    model = Strided() if name == "strided" else build_model(name, data.shape, seed=0)
    server, rank = measured(model, [data], "rank.energy=0.9 rank.images=48")
    if name == "vit_tiny":
        attention = "encoder.layers.encoder_layer_0.self_attention"
        assert {f"{attention}.in_proj_weight", f"{attention}.out_proj.weight"} <= rank.ranks.keys()
        assert rank.ranks[f"{attention}.in_proj_weight"].rows == 3 * 64
    if name == "strided":
        assert list(rank.ranks) == ["conv.weight", "twice.weight", "head.weight"]
    oracle = projected(model, rank)
    factored = server.setup(copy.deepcopy(model), RoundContext(data.shape, round=2))
    assert layout_of(factored).parameter_count < 0.6 * layout_of(model).parameter_count
    x = to_float(data.images[:4])
    with torch.no_grad():
        assert torch.allclose(factored.eval()(x), oracle.eval()(x), atol=1e-3, rtol=1e-3)
    assert torch.allclose(factored(x), oracle(x), atol=1e-3, rtol=1e-3)
    before = weights_of(factored)
    train_locally(factored, data, LocalTrainingConfig(1, 32, 0.01), generator=generator(), plugins=server)
    assert all(bool(value.any()) for value in difference(weights_of(factored), before).values())


def test_the_first_layer_is_left_out_unless_asked_for(trained: nn.Module, digits: LabeledImages) -> None:
    for options, first in (("", "conv2.weight"), ("rank.first-layer=gram", "conv1.weight")):
        plugins, _ = only(options)
        plugins.setup(trained, RoundContext(digits.shape))
        assert next(iter(plugins.declare_sums(trained))) == f"rank/{first}/inputs"


def test_only_the_chosen_round_measures(trained: nn.Module, digits: LabeledImages) -> None:
    for round_, exports in ((1, False), (2, True), (3, False)):
        plugins, _ = only("rank.after=2")
        model = plugins.setup(copy.deepcopy(trained), RoundContext(digits.shape, round=round_))
        data = digits.subset(torch.arange(40))
        train_locally(model, data, LocalTrainingConfig(1, 20, 0.01), generator=generator(), plugins=plugins)
        assert bool(plugins.export(model).sums) is exports
        assert bool(plugins.declare_sums(model)) is exports


def test_measuring_only_leaves_the_network_alone(trained: nn.Module, halves: list[LabeledImages]) -> None:
    server, rank = measured(trained, halves, "rank.factorize=false")
    model = server.setup(copy.deepcopy(trained), RoundContext(halves[0].shape, round=2))
    assert layout_of(model) == layout_of(trained)
    assert rank.ranks


def test_rows_are_shortened_to_bound_the_sums(trained: nn.Module, digits: LabeledImages) -> None:
    data = digits.subset(torch.arange(40))
    _, rank = only()
    assert "rank.max-norm above 0" in rank.incompatibility(RunRequirements(secure=True))
    plugins, rank = only("rank.max-norm=0.5 rank.images=10")
    assert rank.incompatibility(RunRequirements(secure=True)) == ""
    model = plugins.setup(copy.deepcopy(trained), RoundContext(digits.shape))
    train_locally(model, data, LocalTrainingConfig(1, 20, 0.01), generator=generator(), plugins=plugins)
    declared, sums = plugins.declare_sums(model), plugins.export(model).sums
    for name, value in sums.items():
        assert 0 < float(value.abs().max()) <= declared[name].bound < float("inf")
    # The longest row of the largest layer is 0.5, so the trace is at most its number of rows times 0.25.
    assert float(sums["rank/conv2.weight/inputs"].trace()) <= 10 * 16 * 0.25 + 1e-9
    with pytest.raises(RunError, match="reaches"):
        plugins.check_sums({name: 1e6 * value for name, value in sums.items()}, model)


def test_the_picture_has_a_pair_of_bars_for_every_layer() -> None:
    ranks = {"conv2.weight": LayerRank(28, 288, 11, 64), "fc<2>.weight": LayerRank(9, 128, 10, 10)}
    picture = rank_picture(ranks)
    root = ElementTree.fromstring(picture)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"conv2", "28 of 288", "11 of 64", "fc<2>", "9 of 128", "10 of 10"} <= set(texts)
    widths = [float(element.get("width", 0)) for element in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert [widths[i + 1] / widths[i] for i in (0, 2, 4, 6)] == pytest.approx(
        [28 / 288, 11 / 64, 9 / 128, 1], abs=0.001
    )
    assert abs(ranks["conv2.weight"].utilization - 11 / 64) < 1e-12


def test_it_goes_with_the_wider_head_of_ood(digits: LabeledImages) -> None:
    data, about = digits.subset(torch.arange(200)), RoundContext(digits.shape)
    plugins = make_plugins("ood,rank", "rank.energy=0.99")
    model = plugins.setup(build_model("mlp", data.shape, seed=0), about)
    train_locally(model, data, LocalTrainingConfig(2, 32, 0.05), generator=generator(), plugins=plugins)
    plugins.reduce(plugins.export(model).sums, len(data))
    later = make_plugins("ood,rank", "rank.energy=0.99")
    later.load(broadcast=plugins.broadcast_bytes(max_bytes=MB), max_bytes=MB)
    small = later.setup(model, RoundContext(digits.shape, round=2))
    assert layout_of(small).parameters["fc3.parametrizations.weight.original"][0] <= 11
    train_locally(small, data, LocalTrainingConfig(1, 32, 0.05), generator=generator(), plugins=later)
    assert later.export(small).sums.keys() == {"ood/histogram"}
    with torch.no_grad():
        found = later.predict(small.eval(), to_float(data.images))
    assert found.logits.shape == (200, 10)
    assert found.score is not None


class TiedLayers(nn.Module):
    """Two layers with one weight, and a layer that is applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.other.weight = self.one.weight
        self.twice, self.last = nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.one(F.relu(self.first(images.flatten(1)))))
        return self.last(self.twice(F.relu(self.twice(F.relu(self.other(hidden))))))  # type: ignore[no-any-return]


def test_a_weight_that_layers_share_is_left_as_it_is(digits: LabeledImages) -> None:
    model = TiedLayers()
    plugin = UtilizedRank(energy=0.9)
    plugin.setup(model, RoundContext(digits.shape, round=1))
    assert {name.rpartition("/")[0] for name in plugin.declare_sums(model)} == {"twice.weight", "last.weight"}
