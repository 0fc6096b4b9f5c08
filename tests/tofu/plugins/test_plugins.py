import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tofu.data import ImageShape, LabeledImages
from tofu.errors import PayloadError, RunError, SettingError, described
from tofu.models import build_model
from tofu.plugins import (
    NO_PLUGINS,
    Batch,
    Export,
    Plugin,
    Plugins,
    PluginState,
    Prediction,
    RoundContext,
    RunRequirements,
    SumSpec,
    Weights,
    make_plugins,
    option,
    plugin_names,
)
from tofu.training import LocalTrainingConfig, train_locally

HERE = __name__
MOST = 1 << 20
SHAPE = ImageShape(1, 8, 8, 10)


class Picky(Plugin):
    excludes = types.MappingProxyType({"adds": "they disagree"})


@dataclass
class Adds(Plugin):
    """Adds `amount` to images, loss and weights."""

    amount: float = option(1.0, "what is added", ge=0)

    def on_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        return batch.replace(images=batch.images + self.amount)

    def on_loss(self, outputs: Tensor, batch: Batch, loss: Tensor, model: nn.Module) -> Tensor:
        return loss + self.amount

    def on_step(self, model: nn.Module, before: Weights, momenta: Weights) -> None:
        for p in model.parameters():
            p += self.amount


@dataclass
class Doubles(Adds):
    """Doubles them in place of adding, and its hooks sort before those of order 0."""

    order = Plugin.PROJECTION

    def on_batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        return batch.replace(images=batch.images * 2)

    def on_loss(self, outputs: Tensor, batch: Batch, loss: Tensor, model: nn.Module) -> Tensor:
        return loss * 2

    def on_step(self, model: nn.Module, before: Weights, momenta: Weights) -> None:
        for p in model.parameters():
            p *= 2


@dataclass
class Squares(Doubles):
    order = Plugin.MASK

    def on_step(self, model: nn.Module, before: Weights, momenta: Weights) -> None:
        for p in model.parameters():
            p **= 2


@dataclass
class Counts(Plugin):
    """Sums of one name, whatever `given` is."""

    local_only = frozenset({"secret"})

    given: str = option("counts", "name of what is exported")
    value: float = option(3.0, "what is exported")

    def declare_sums(self, model: nn.Module) -> Mapping[str, SumSpec]:
        return {"counts": SumSpec((2,), bound=5.0)}

    def export(self) -> Export:
        return Export({self.given: torch.full((2,), self.value, dtype=torch.float64)}, {"loss": self.value})

    def reduce(self, sums: Weights, examples: int, broadcast: PluginState) -> PluginState:
        return broadcast | {"mean": sums["counts"] / examples}


@dataclass
class Head(Plugin):
    changes_head = True


@dataclass
class OtherHead(Head):
    pass


@dataclass
class Oracle(Plugin):
    def predict(self, model: nn.Module, images: Tensor) -> Prediction:
        return Prediction(model(images), images.flatten(1).mean(1))


@dataclass
class Second(Oracle):
    pass


@dataclass
class Local(Plugin):
    why_inexact = "every client has its own"

    @property
    def averages_exactly(self) -> bool:
        return False


@dataclass
class Tasks(Plugin):
    needs_task_boundaries = True


class NoDecorator(Plugin):
    share: float = option(0.5, "a share")


def of(*names: str, options: str = "") -> Plugins:
    return make_plugins(",".join(f"{HERE}:{name}" for name in names), options)


def test_no_plugins_change_nothing_and_copy_nothing() -> None:
    model, images, labels = nn.Linear(2, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    loss = torch.zeros(())
    assert make_plugins("") == NO_PLUGINS == ()
    assert not NO_PLUGINS
    batch = Batch(images, labels, torch.arange(1))
    assert NO_PLUGINS.on_batch(batch, torch.Generator()) is batch
    assert NO_PLUGINS.on_loss(images, batch, loss, model) is loss
    assert NO_PLUGINS.setup(model, RoundContext(SHAPE)) is model
    assert NO_PLUGINS.before_step(model) is None
    NO_PLUGINS.on_step(model, None)
    assert NO_PLUGINS.export(model) == Export()
    assert NO_PLUGINS.predict(model, images).score is None


def test_hooks_run_in_their_order() -> None:
    plugins = of("Squares", "Doubles", "Adds")
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    batch = plugins.on_batch(Batch(torch.ones(1, 1), torch.zeros(1), torch.arange(1)), torch.Generator())
    assert batch.images.item() == 1 * 2 * 2 + 1
    assert plugins.on_loss(batch.images, batch, torch.ones(()), model).item() == 5
    before = plugins.before_step(model)
    assert before is not None
    plugins.on_step(model, before)
    assert model.weight.item() == ((1 + 1) * 2) ** 2  # Adds, then the projection, then the mask
    assert before["weight"].item() == 1


def test_weights_are_copied_only_where_a_plugin_looks_at_steps() -> None:
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    assert of("Counts", "Oracle").before_step(model) is None
    assert list(of("Adds").before_step(model) or {}) == ["weight"]


def test_a_plugin_of_ones_own_and_its_options() -> None:
    plugins = of("Adds", "Counts", options="adds.amount=2 counts.given=counts")
    adds = plugins.named()["adds"]
    assert isinstance(adds, Adds)
    assert adds.amount == 2.0
    assert list(plugins.named()) == ["adds", "counts"]


def hooks(**members: object) -> str:
    """A plugin with these members, as a user would name it."""
    module = types.ModuleType("own_hooks")
    module.Own = type("Own", (Plugin,), members)  # type: ignore[attr-defined]
    sys.modules["own_hooks"] = module
    return "own_hooks:Own"


@pytest.mark.parametrize(
    ("member", "value", "accepted"),
    [
        ("before_trainning", lambda self, model, data: None, "expected .*on_train_begin.*underscore in front"),
        ("on_update", lambda self, model: None, "expected .*on_.* or a name with an underscore in front"),
        ("on_batches", lambda self, batch, generator: batch, "expected on_batch, or"),
        ("exports", lambda self: Export(), "expected export, or"),
        ("encode_input", True, "expected encodes_input, or"),
        ("on_batch", lambda self, batch: batch, r"expected a method .*\(self, batch, generator\).*too many positional"),
        ("on_step", lambda self, model, before, more, momenta: None, ".*'momenta'"),
        ("export", Export(), r"expected a method \(self\)"),
        ("groups", lambda self: 2, "expected a value or a @property"),
        ("averages_exactly", lambda self: False, "expected a value or a @property"),
    ],
)
def test_a_hook_that_would_not_be_called_is_refused(member: str, value: object, accepted: str) -> None:
    with pytest.raises(SettingError, match=f"plugins='Own.{member}' is not usable: {accepted}"):
        make_plugins(hooks(**{member: value}))


def test_methods_of_ones_own_and_overrides_in_other_forms_are_accepted() -> None:
    made = make_plugins(
        hooks(
            shares=lambda self: 3,
            _on_update=lambda self: None,
            groups=property(lambda self: 1),
            averages_exactly=False,
            on_batch=lambda self, *arguments: arguments[0],
            export=staticmethod(Export),
            on_step=torch.no_grad()(lambda self, model, before, momenta: None),
        )
    )
    assert [plugin.name for plugin in made] == ["own"]


WRONG: dict[str, tuple[object, Callable[[Plugins, Batch], object]]] = {
    "on_batch returned Tensor, expected Batch": (
        lambda self, batch, generator: batch.images,
        lambda plugins, batch: plugins.on_batch(batch, torch.Generator()),
    ),
    "on_loss returned NoneType, expected Tensor": (
        lambda self, outputs, batch, loss, model: None,
        lambda plugins, batch: plugins.on_loss(batch.images, batch, torch.ones(()), nn.Identity()),
    ),
    "setup returned NoneType, expected Module": (
        lambda self, model, context: None,
        lambda plugins, batch: plugins.setup(nn.Identity(), RoundContext(SHAPE)),
    ),
    "export returned dict, expected Export": (
        lambda self: {},
        lambda plugins, batch: plugins.export(nn.Identity()),
    ),
    "predict returned Tensor, expected Prediction": (
        lambda self, model, images: images,
        lambda plugins, batch: plugins.predict(nn.Identity(), batch.images),
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_hook_that_returns_another_type_is_named(message: str) -> None:
    hook, call = WRONG[message]
    plugins = make_plugins(hooks(**{message.partition(" ")[0]: hook}))
    with pytest.raises(RunError, match=f"plugin own: {message}"):
        call(plugins, Batch(torch.ones(1, 1), torch.zeros(1), torch.arange(1)))


@pytest.mark.parametrize("name", ["on_batch", "on_train_begin", "on_step"])
def test_an_exception_in_a_hook_names_plugin_and_hook(name: str) -> None:
    def failing(self: Plugin, *arguments: object) -> None:
        raise KeyError("no such class")

    plugins, model = make_plugins(hooks(**{name: failing})), nn.Linear(1, 1)
    calls: dict[str, Callable[[], object]] = {
        "on_batch": lambda: plugins.on_batch(
            Batch(torch.ones(1, 1), torch.zeros(1), torch.arange(1)), torch.Generator()
        ),
        "on_train_begin": lambda: plugins.on_train_begin(model, None),  # type: ignore[arg-type]
        "on_step": lambda: plugins.on_step(model, plugins.before_step(model)),
    }
    with pytest.raises(KeyError) as raised:
        calls[name]()
    assert f"KeyError: 'no such class', in plugin own, {name}, at test_plugins.py line" in described(raised.value)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("grm", "", "plugins='grm' is not usable: expected one of .*gpm, .*or package.module:Class"),
        ("no.such:Thing", "", "that can be imported .ModuleNotFoundError: No module named 'no'"),
        (f"{HERE}:Nothing", "", "that can be imported .AttributeError"),
        (f"{HERE}:SHAPE", "", "a subclass of tofu.plugins.base.Plugin"),
        (f"{HERE}:NoDecorator", "", r"decorated with @dataclass \(option share\)"),
        (f"{HERE}:Adds,{HERE}:Adds", "", "each plugin once, adds occurs twice"),
        (f"{HERE}:Picky,{HERE}:Adds", "", "picky without adds: they disagree"),
        (f"{HERE}:Adds,{HERE}:Picky", "", "picky without adds: they disagree"),
        (f"{HERE}:Head,{HERE}:OtherHead", "", r"one plugin at most that changes the model's head \(head, otherhead\)"),
        (f"{HERE}:Adds", "adds.amount=-1", "adds.amount='-1' is not usable: expected a number at least 0"),
        (f"{HERE}:Adds", "adds.amuont=1", r"adds.amuont='1' is not usable: expected a known option \(amount\)"),
        (f"{HERE}:Adds", "adds.amount=1 adds.amount=2", "expected each option once"),
        (f"{HERE}:Adds", "gpm.threshold=1", r"an option of a plugin in plugins \(adds\)"),
        ("", "gpm.threshold=1", r"an option of a plugin in plugins \(there is none\)"),
        (f"{HERE}:Adds", "amount=1", "plugin.option=value, separated by spaces"),
        ("gpm", "gpm.threshold=1.5", "gpm.threshold='1.5' is not usable: expected a number above 0, at most 1"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(names: str, options: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as error:
        make_plugins(names, options)
    assert "\n" not in str(error.value)


def test_a_run_that_a_plugin_cannot_serve_is_refused() -> None:
    of("Local").check(RunRequirements(clients=1))
    with pytest.raises(SettingError, match=r"plugins='local' .* expected a run of 1 client: every client has its own"):
        of("Adds", "Local").check(RunRequirements(clients=2))
    of("Tasks").check(RunRequirements(clients=5, tasks=2))
    with pytest.raises(SettingError, match="tasks works at the boundaries between tasks"):
        of("Tasks").check(RunRequirements())


def test_every_built_in_has_a_plain_name() -> None:
    assert "gpm" in plugin_names()
    assert all(re.fullmatch("[a-z]+(-[a-z]+)*", name) for name in plugin_names())


def test_sums_reach_the_plugin_that_exported_them_and_come_back_as_broadcast() -> None:
    model, clients = nn.Linear(1, 1), [of("Counts", "Adds") for _ in range(2)]
    exports = [plugins.export(model) for plugins in clients]
    assert exports[0].metrics == {"counts/loss": 3.0}
    server = of("Counts", "Adds")
    totals = {"counts/counts": exports[0].sums["counts/counts"] + exports[1].sums["counts/counts"]}
    server.check_sums(totals, model, clients=2)
    server.reduce(totals, examples=12)
    clients[0].load(broadcast=server.broadcast_bytes(max_bytes=MOST), max_bytes=MOST)
    received = clients[0].named()["counts"].broadcast["mean"]
    assert isinstance(received, Tensor)
    assert received.tolist() == [0.5, 0.5]
    server.reduce({}, examples=0)
    assert "mean" in server.named()["counts"].broadcast


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("counts.given=more", "sum counts/counts is missing|sum counts/more is not declared"),
        ("counts.given=secret", "exports secret, which is for its client alone"),
        ("counts.value=5.1", "counts/counts reaches 5.1, expected finite values of at most 5"),
    ],
)
def test_exports_other_than_declared_are_errors(options: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        of("Counts", options=options).export(nn.Linear(1, 1))


def test_the_servers_check_refuses_what_no_client_could_send() -> None:
    plugins, model = of("Counts"), nn.Linear(1, 1)
    good = torch.ones(2, dtype=torch.float64)
    for bad in (good.float(), good[:1], good * float("nan"), good * float("inf"), good * 11):
        with pytest.raises(RunError, match="sum counts/counts"):
            plugins.check_sums({"counts/counts": bad}, model, clients=2)
    with pytest.raises(RunError, match="missing"):
        plugins.check_sums({}, model)


def test_sums_without_a_bound_stay_finite_in_total(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients that send 1.7e308 fail one by one, and not the round in which their total is infinite."""
    monkeypatch.setattr(Counts, "declare_sums", lambda self, model: {"counts": SumSpec((2,))})
    sent = {"counts/counts": torch.full((2,), 1.7e308, dtype=torch.float64)}
    with pytest.raises(RunError, match=r"reaches 1\.7e\+308, expected finite values of at most 1e\+300"):
        of("Counts").check_sums(sent, nn.Linear(1, 1))
    of("Counts").check_sums({"counts/counts": sent["counts/counts"] * 1e-10}, nn.Linear(1, 1))


def test_state_and_broadcast_are_each_plugins_own() -> None:
    plugins = of("Adds", "Counts")
    adds, counts = plugins
    adds.state["n"], counts.state["n"], counts.broadcast["m"] = 1, torch.ones(3), b"x"
    again = of("Counts", "Adds")
    kept = {"state": plugins.state_bytes(max_bytes=MOST), "broadcast": plugins.broadcast_bytes(max_bytes=MOST)}
    again.load(state=kept["state"], broadcast=kept["broadcast"], max_bytes=MOST)
    loaded = again.named()
    assert loaded["adds"].state == {"n": 1}
    assert loaded["adds"].broadcast == {}
    assert loaded["counts"].broadcast == {"m": b"x"}
    assert torch.equal(loaded["counts"].state["n"], torch.ones(3))  # type: ignore[arg-type]
    again.load(max_bytes=MOST)
    assert loaded["counts"].state == loaded["counts"].broadcast == {}
    with pytest.raises(PayloadError, match="plugin state holds 'adds/n', expected plugins counts"):
        of("Counts").load(state=plugins.state_bytes(max_bytes=MOST), max_bytes=MOST)
    with pytest.raises(PayloadError, match="at most 10"):
        plugins.state_bytes(max_bytes=10)


def test_one_plugin_predicts() -> None:
    prediction = of("Adds", "Oracle").predict(nn.Flatten(), torch.ones(2, 1, 2, 2))
    assert prediction.score is not None
    assert prediction.score.tolist() == [1.0, 1.0]
    with pytest.raises(SettingError, match=r"one plugin at most that has its own predict \(oracle, second\)"):
        of("Oracle", "Second")


@pytest.fixture
def fair() -> Iterator[None]:
    """The README's plugin as the module `fair_of_readme`."""
    text = (Path(__file__).parents[3] / "client" / "plugins" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.strip().splitlines()) <= 45
    module = types.ModuleType("fair_of_readme")
    sys.modules[module.__name__] = module
    exec(compile(code, "README.md", "exec"), module.__dict__)
    yield
    del sys.modules[module.__name__]


def test_the_readmes_plugin_makes_rare_classes_fair(fair: None, digits: LabeledImages) -> None:
    """Two clients with little of class 0: its logit gains where the loss is adjusted by the counts of both."""
    rare = torch.cat([(digits.labels == 0).nonzero().flatten()[:4], (digits.labels > 0).nonzero().flatten()])
    data = digits.subset(rare[torch.randperm(len(rare), generator=torch.Generator().manual_seed(0))])
    halves = [data.subset(torch.arange(i, len(data), 2)) for i in range(2)]
    server = make_plugins("fair_of_readme:Fair")
    totals: dict[str, Tensor] = {}
    for half in halves:
        plugins = make_plugins("fair_of_readme:Fair")
        model = plugins.setup(build_model("mlp", data.shape), RoundContext(data.shape))
        generator = torch.Generator().manual_seed(0)
        train_locally(model, half, LocalTrainingConfig(1, 32, 0.05), generator=generator, plugins=plugins)
        for name, value in plugins.export(model).sums.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value
    server.reduce(totals, len(data))
    shares = server[0].broadcast["shares"]
    assert isinstance(shares, Tensor)
    assert torch.allclose(shares, torch.bincount(data.labels, minlength=10) / len(data))
    zeros = digits.subset((digits.labels == 0).nonzero().flatten())
    probability = []
    for tau in (0, 1):
        plugins = make_plugins("fair_of_readme:Fair", f"fair.tau={tau}")
        plugins.load(broadcast=server.broadcast_bytes(max_bytes=MOST), max_bytes=MOST)
        model = plugins.setup(build_model("mlp", data.shape), RoundContext(data.shape, round=2))
        generator = torch.Generator().manual_seed(0)
        train_locally(model, data, LocalTrainingConfig(2, 32, 0.05), generator=generator, plugins=plugins)
        with torch.no_grad():
            logits = plugins.predict(model.eval(), zeros.images / 127.5 - 1).logits
        probability.append(F.softmax(logits, 1)[:, 0].mean().item())
    assert probability[1] > 3 * probability[0]
