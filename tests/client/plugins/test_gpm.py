from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.plugins.gpm import learn
from client.plugins.gpm import GradientProjectionMemory, extend_basis, importances
from client.plugins.layers import rows_per_image
from tofu.data import LabeledImages, open_data, to_float
from tofu.errors import PayloadError, SettingError
from tofu.models import build_model
from tofu.plugins import Plugins, RoundContext, RunRequirements, make_plugins
from tofu.tasks import TaskStream, backward_transfer, mean_accuracy
from tofu.training import LocalTrainingConfig, train_locally
from tofu.weights import load_weights, weights_of

MOST = 1 << 24
EXACT = "gpm.threshold=1"


class Wide(nn.Module):
    """Layers of each kind, wide enough that a few images leave room in them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3, padding=1)
        self.batch = nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 32, 3, stride=4, padding=1, groups=2)
        self.norm = nn.LayerNorm(32)
        self.position = nn.Parameter(torch.zeros(4, 32))
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.batch(self.conv(x)))))
        x = self.norm(x.flatten(2).transpose(1, 2) + self.position)
        x = x + self.attention(x, x, x)[0]
        out: Tensor = self.head(x.mean(1))
        return out


def wide() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Wide()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def after_a_task(model: nn.Module, data: LabeledImages, options: str = EXACT, *, tasks: int = 3) -> Plugins:
    """Plugins, with what a server with this one client remembers of a task, set up for the next."""
    plugins = make_plugins("gpm", options)
    plugins.setup(model, RoundContext(data.shape, tasks=tasks))
    train_locally(model, data, LocalTrainingConfig(2, 8, 0.05), generator=generator(), plugins=plugins, final=True)
    plugins.reduce(plugins.export(model).sums, len(data))
    state = plugins.state_bytes(max_bytes=MOST)
    broadcast = plugins.broadcast_bytes(max_bytes=MOST)
    following = make_plugins("gpm", options)
    following.load(state=state, broadcast=broadcast, max_bytes=MOST)
    following.setup(model, RoundContext(data.shape, task=1, tasks=tasks))
    return following


def outputs(model: nn.Module, data: LabeledImages) -> Tensor:
    model.eval()
    with torch.no_grad():
        result: Tensor = model(to_float(data.images)).double()
    return result


grams_of = st.builds(
    lambda seed, rows, d: (lambda x: x.T @ x)(torch.randn(rows, d, generator=generator(seed), dtype=torch.float64)),
    st.integers(0, 10_000), st.integers(1, 12), st.just(8),
)  # fmt: skip


@given(grams_of, grams_of, st.floats(0.1, 1.0))
def test_a_memory_holds_its_share_of_both_tasks_and_not_a_vector_more(first: Tensor, second: Tensor, share: float) -> None:  # noqa: E501  # fmt: skip
    basis = torch.zeros(8, 0, dtype=torch.float64)
    for gram in (first, second):
        before, basis = basis, extend_basis(basis, gram, share, max_columns=8)
        k = basis.shape[1]
        assert torch.allclose(basis.T @ basis, torch.eye(k, dtype=torch.float64), atol=1e-9)
        assert torch.allclose(basis[:, : before.shape[1]], before, atol=1e-9)
        assert torch.trace(basis.T @ gram @ basis) >= share * torch.trace(gram) * (1 - 1e-9)
        if k > before.shape[1]:
            fewer = basis[:, :-1]
            assert torch.trace(fewer.T @ gram @ fewer) < share * torch.trace(gram) * (1 + 1e-9)


@given(st.integers(0, 1000), st.floats(0.5, 0.999))
@settings(max_examples=30)
def test_the_memory_is_the_papers_by_singular_values(seed: int, share: float) -> None:
    """Equations 5, 8 and 9 as published, on representation matrices in place of Gram matrices."""
    g = generator(seed)
    r1, r2 = (torch.randn(6, 9, generator=g, dtype=torch.float64) for _ in range(2))
    u, s, _ = torch.linalg.svd(r1)
    k = int(((s**2).cumsum(0) / (s**2).sum() < share).sum()) + 1
    m = u[:, :k]
    residual = r2 - m @ m.T @ r2
    u2, s2, _ = torch.linalg.svd(residual)
    held, added = 1 - (residual**2).sum() / (r2**2).sum(), 0
    while held < share and added < 6 - k:
        held, added = held + s2[added] ** 2 / (r2**2).sum(), added + 1
    m2 = torch.cat([m, u2[:, :added]], dim=1)
    ours = extend_basis(torch.zeros(6, 0, dtype=torch.float64), r1 @ r1.T, share, max_columns=6)
    ours2 = extend_basis(ours, r2 @ r2.T, share, max_columns=6)
    assert torch.allclose(ours @ ours.T, m @ m.T, atol=1e-8)
    assert torch.allclose(ours2 @ ours2.T, m2 @ m2.T, atol=1e-8)


def test_the_codes_rule_leaves_a_vector_out_and_a_limit_is_kept() -> None:
    gram = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    empty = gram.new_zeros(4, 0)
    assert extend_basis(empty, gram, 0.7, max_columns=4).shape[1] == 2
    assert extend_basis(empty, gram, 0.71, max_columns=4).shape[1] == 3
    assert extend_basis(empty, gram, 0.71, max_columns=4, less=1).shape[1] == 2
    assert extend_basis(empty, gram, 1.0, max_columns=1).shape[1] == 1
    assert extend_basis(empty, gram * 0, 0.9, max_columns=4).shape[1] == 0


def test_importances_are_those_of_scaled_gradient_projection() -> None:
    basis, gram = torch.eye(2, dtype=torch.float64), torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    first = importances(basis, gram, gram.new_zeros(0), 1.0)
    assert first.tolist() == pytest.approx([2 * 2 / (2 + 2), 2 * 1 / (1 + 2)])
    again = importances(basis, gram / 100, first * 0.5, 1.0)
    assert again.tolist() == pytest.approx([1.0, 1 / 3 + 2 / 3])
    assert importances(basis, gram, gram.new_zeros(0), 1000.0).tolist() == pytest.approx([1, 1], abs=2e-3)


def test_summed_statistics_of_clients_give_the_pooled_datas_subspace(digits: LabeledImages) -> None:
    model = build_model("cnn", digits.shape)
    parts = [digits.subset(torch.arange(i, i + 20)) for i in (0, 20, 40)]
    totals: dict[str, Tensor] = {}
    for part in [*parts, digits.subset(torch.arange(60))]:
        plugins = make_plugins("gpm", "gpm.threshold=0.9")
        plugins.setup(model, RoundContext(digits.shape, tasks=2))
        plugins.on_task_end(model, part, True)
        sums = plugins.export(model).sums
        if len(part) == 60:
            break
        totals = {name: value + totals.get(name, torch.zeros_like(value)) for name, value in sums.items()}
    for name, pooled in sums.items():
        assert torch.linalg.norm(totals[name] - pooled) < 1e-9 * torch.linalg.norm(pooled)
    memories = []
    for given_sums in (totals, sums):
        server = make_plugins("gpm", "gpm.threshold=0.9")
        server.setup(model, RoundContext(digits.shape, tasks=2))
        server.check_sums(given_sums, model, clients=3)
        server.reduce(given_sums, 60)
        memories.append({n: v.double() for n, v in server[0].broadcast.items() if isinstance(v, Tensor)})
    assert len(memories[0]) == 5
    for name, basis in memories[0].items():
        pooled = memories[1][name]
        assert torch.linalg.norm(basis @ basis.T - pooled @ pooled.T) < 1e-6 * torch.linalg.norm(pooled @ pooled.T)


@pytest.mark.parametrize("optimizer", [(0.0, 0.0), (0.9, 0.01)])
@pytest.mark.parametrize("options", [EXACT, f"{EXACT} gpm.bias=freeze", f"{EXACT} gpm.first-layer=skip",
                                     f"{EXACT} gpm.memory=local"])  # fmt: skip
def test_later_steps_leave_old_images_outputs_as_they_were(
    digits: LabeledImages, options: str, optimizer: tuple[float, float]
) -> None:
    """With all of the inputs remembered: to rounding, through convolutions, norms, attention, momentum and decay."""
    model, old = wide(), digits.subset(torch.arange(4))
    plugins = after_a_task(model, old, options)
    expected, before = outputs(model, old), weights_of(model)
    how = LocalTrainingConfig(3, 16, 0.05, *optimizer)
    train_locally(model, digits.subset(torch.arange(100, 260)), how, generator=generator(1), plugins=plugins)
    assert (outputs(model, old) - expected).abs().max() < 1e-4 * expected.abs().max()
    moved = {name for name, value in weights_of(model).items() if (value - before[name]).abs().max() > 1e-4}
    assert {"grouped.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"} <= moved
    assert not moved & {"norm.weight", "batch.weight", "position", "batch.running_mean", "batch.running_var"}


def test_without_the_memory_they_would_not_stay(digits: LabeledImages) -> None:
    model, old = wide(), digits.subset(torch.arange(4))
    after_a_task(model, old)
    expected = outputs(model, old)
    train_locally(
        model, digits.subset(torch.arange(100, 260)), LocalTrainingConfig(3, 16, 0.05), generator=generator(1)
    )
    assert (outputs(model, old) - expected).abs().max() > 0.3 * expected.abs().max()


def test_the_server_brings_a_lossy_step_back_into_the_free_subspace(digits: LabeledImages) -> None:
    model, old = wide(), digits.subset(torch.arange(4))
    plugins = after_a_task(model, old)
    expected, before = outputs(model, old), plugins.before_step(model)
    assert before is not None
    noise = {name: value + 0.01 * torch.randn(value.shape, generator=generator(2)) for name, value in before.items()}
    load_weights(model, noise)
    assert (outputs(model, old) - expected).abs().max() > 1e-2
    plugins.on_step(model, before)
    assert (outputs(model, old) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_first_task_is_learnt_as_without_the_plugin(digits: LabeledImages) -> None:
    results = []
    for plugins in (make_plugins(""), make_plugins("gpm")):
        model = plugins.setup(wide(), RoundContext(digits.shape, tasks=2))
        data = digits.subset(torch.arange(64))
        train_locally(model, data, LocalTrainingConfig(1, 16, 0.05), generator=generator(), plugins=plugins)
        results.append(weights_of(model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_free_head_may_move_as_it_likes(digits: LabeledImages) -> None:
    model, old = wide(), digits.subset(torch.arange(4))
    plugins = after_a_task(model, old, f"{EXACT} gpm.head=free")
    before = plugins.before_step(model)
    assert before is not None
    assert "basis/head.weight" not in plugins[0].broadcast
    load_weights(model, {"head.weight": before["head.weight"] + 1, "head.bias": before["head.bias"] + 1})
    plugins.on_step(model, before)
    assert torch.equal(model.get_parameter("head.weight"), before["head.weight"] + 1)
    assert torch.equal(model.get_parameter("head.bias"), before["head.bias"] + 1)


def test_full_importance_projects_and_none_does_not(digits: LabeledImages) -> None:
    """The update's part along the memory is kept in proportion to 1 - importance."""
    model = build_model("mlp", digits.shape)
    plugins = after_a_task(model, digits.subset(torch.arange(40)), "gpm.threshold=0.9 gpm.scaling=10")
    memory, before = plugins[0].broadcast, plugins.before_step(model)
    assert before is not None
    basis, importance = memory["basis/fc1.weight"], memory["importance/fc1.weight"]
    assert isinstance(basis, Tensor)
    assert isinstance(importance, Tensor)
    assert importance[0] == 1
    assert 0 < importance[-1] < 1
    step = torch.randn(200, 64, generator=generator())
    load_weights(model, {"fc1.weight": before["fc1.weight"] + step})
    plugins.on_step(model, before)
    moved = torch.cat([model.get_parameter("fc1.weight") - before["fc1.weight"],
                       (model.get_parameter("fc1.bias") - before["fc1.bias"])[:, None]], dim=1)  # fmt: skip
    wanted = (torch.cat([step, torch.zeros(200, 1)], dim=1) @ basis) * (1 - importance)
    assert torch.allclose(moved @ basis, wanted, atol=1e-4)


@pytest.mark.parametrize("options", ["", "gpm.first-layer=noise gpm.noise=3", "gpm.max-norm=0.5", "gpm.samples=5"])
@pytest.mark.parametrize("make", [wide, lambda: build_model("vit_tiny", SHAPE)])
def test_what_is_exported_stays_within_what_was_declared(
    digits: LabeledImages, make: Callable[[], nn.Module], options: str
) -> None:
    model, plugins = make(), make_plugins("gpm", options)
    plugins.setup(model, RoundContext(digits.shape, tasks=2))
    plugins.on_task_end(model, digits.subset(torch.arange(30)), True)
    sums = plugins.export(model).sums  # which checks shapes and bounds
    declared = plugins.declare_sums(model)
    assert all(spec.bound < float("inf") for spec in declared.values())
    if options == "gpm.max-norm=0.5":
        name = "gpm/head.weight" if isinstance(model, Wide) else "gpm/heads.head.weight"
        assert sums[name].abs().max() <= 30 * 0.25
        assert declared[name].bound == pytest.approx(300 * 0.25)


def test_noise_and_skip_keep_the_first_layers_moments_back(digits: LabeledImages) -> None:
    model, data = build_model("mlp", digits.shape), digits.subset(torch.arange(200))
    exports = {}
    for options in ("gram", "noise", "skip"):
        plugins = make_plugins("gpm", f"gpm.first-layer={options} gpm.noise=2")
        plugins.setup(model, RoundContext(digits.shape, tasks=2))
        plugins.on_task_end(model, data, True)
        exports[options] = plugins.export(model).sums
    assert exports["skip"].keys() == exports["gram"].keys() - {"gpm/fc1.weight"}
    noise = exports["noise"]["gpm/fc1.weight"] - exports["gram"]["gpm/fc1.weight"]
    assert noise.std().item() == pytest.approx(2 * 65, rel=0.1)  # an image's row has norm^2 of at most 64 + 1
    assert abs(noise.mean().item()) < 5 * 2 * 65 / len(noise) ** 0.5
    assert torch.equal(exports["noise"]["gpm/fc2.weight"], exports["gram"]["gpm/fc2.weight"])


def test_statistics_travel_only_at_the_ends_of_tasks_and_only_from_shared_memories(digits: LabeledImages) -> None:
    model, data = build_model("mlp", digits.shape), digits.subset(torch.arange(20))
    for options, final, count in (("", False, 0), ("", True, 3), ("gpm.memory=local", True, 0)):
        plugins = make_plugins("gpm", options)
        plugins.setup(model, RoundContext(digits.shape, tasks=2, final=final))
        plugins.on_task_end(model, data, final)
        assert len(plugins.export(model).sums) == count
        assert bool(plugins[0].state) == (options != "")


def test_the_share_that_is_frozen_is_a_metric(digits: LabeledImages) -> None:
    model = build_model("mlp", digits.shape)
    plugins = after_a_task(model, digits.subset(torch.arange(10)))
    plugins.on_task_end(model, digits.subset(torch.arange(10)), True)
    metrics = plugins.export(model).metrics
    assert metrics["gpm/frozen/fc1.weight"] == pytest.approx(10 / 65)
    assert len(metrics) == 3


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 2), torch.zeros(64, 2), torch.zeros(65), torch.zeros(65, 2).double(), 1]
)
def test_a_broadcast_that_does_not_fit_is_refused(digits: LabeledImages, bad: Tensor | int) -> None:
    model = build_model("mlp", digits.shape)
    plugins = after_a_task(model, digits.subset(torch.arange(10)))
    plugins[0].broadcast["basis/fc1.weight"] = bad
    with pytest.raises(PayloadError, match=r"memory of fc1\.weight is not a float32 basis of 65 dimensions"):
        plugins.on_step(model, plugins.before_step(model))


def test_it_says_which_runs_it_is_for() -> None:
    union, local = make_plugins("gpm"), make_plugins("gpm", "gpm.memory=local")
    for plugins in (union, local):
        plugins.check(RunRequirements(clients=5, tasks=2))
        with pytest.raises(SettingError, match="a run of at least 2 tasks: gpm works at the boundaries between tasks"):
            plugins.check(RunRequirements(clients=5))
    assert union[0].averages_exactly
    assert not local[0].averages_exactly


def test_clients_with_tasks_of_their_own_need_the_union_of_their_memories() -> None:
    """Three clients, each with its own permutations: averaging forgets most, own memories help little."""
    data = open_data("digits", clients=3, partition="iid", seed=0)
    streams = [TaskStream("pixels", 4, 10, seed=i) for i in range(3)]
    train = [[s.images_of(data.client(i), task) for task in range(4)] for i, s in enumerate(streams)]
    test = [[s.images_of(data.test(), task) for task in range(4)] for s in streams]
    scores = {}
    for plugin in (("", ""), ("gpm", "gpm.memory=local"), ("gpm", "")):
        matrix, _ = learn(
            lambda: build_model("mlp", data.shape), train, test, LocalTrainingConfig(3, 16, 0.05), plugin, rounds=3
        )
        scores[plugin] = mean_accuracy(matrix), backward_transfer(matrix)
    none, local, union = scores.values()
    assert union[1] > local[1] + 8 > none[1] + 12
    assert union[0] > local[0] > none[0]


SHAPE = open_data("digits", clients=1, partition="iid", seed=0).shape


def test_a_convolutions_bound_counts_its_positions() -> None:
    model = wide()
    plugin = GradientProjectionMemory(samples=7, max_norm=2.0)
    plugin.setup(model, RoundContext(SHAPE, tasks=2))
    rows = rows_per_image(model, 1, 8, 8)
    assert rows["conv.weight"] == 64
    assert rows["grouped.weight#1"] == 4
    specs = plugin.declare_sums(model)
    assert specs["conv.weight"].bound == pytest.approx(64 * 7 * 4)
    assert specs["grouped.weight#1"].shape == (145 * 146 // 2,)
