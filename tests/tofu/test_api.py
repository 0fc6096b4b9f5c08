import json
import math
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tofu
from tests.conftest import Case
from tests.processes import run
from tofu.codec.options import CompressorOptions, ProxySettings
from tofu.data import ImageShape
from tofu.errors import PayloadError, RunError, SettingError
from tofu.models import build_model
from tofu.weights import Weights, cosine

SHAPE = (1, 8, 8)
NAMES = tuple(name for name, _ in build_model("mlp", ImageShape(1, 8, 8, 10)).named_parameters())
QUICK = CompressorOptions(correction=0.4, encoder=ProxySettings(max_evals=4, bits=4))


def python(code: str, cwd: Path | None = None) -> str:
    result = run([sys.executable, "-c", code], cwd=cwd, check=True)
    return result.stdout.strip()


def test_importing_tofu_loads_neither_torch_nor_flower_nor_the_apps() -> None:
    code = "import sys, tofu; print([m for m in ('torch', 'numpy', 'flwr', 'client', 'server') if m in sys.modules])"
    assert python(code) == "[]"


def test_the_library_never_imports_the_apps() -> None:
    names = "tofu.encode, tofu.decode, tofu.run, tofu.Settings, tofu.Plugin, tofu.Compressor, tofu.codec.compressor"
    found = "[m for m in ('client', 'server') if m in sys.modules]"
    code = f"import sys, tofu, tofu.codec.compressor; {names}; print({found})"
    assert python(code) == "[]"


def test_every_public_name_resolves_and_is_listed() -> None:
    assert {name for name in tofu.__all__ if getattr(tofu, name) is None} == set()
    assert set(tofu.__all__) <= set(dir(tofu))
    with pytest.raises(AttributeError, match="nothing"):
        tofu.nothing  # noqa: B018


@pytest.mark.parametrize("compressor", ["proxy", "stc", "topk", "none"])
def test_a_message_decodes_to_the_update_with_the_model_alone(every_layer_update: Case, compressor: str) -> None:
    network, update = every_layer_update
    model = network.model
    ratio = 1.0 if compressor == "none" else 5.0
    message = tofu.encode(model, update, input_shape=SHAPE, ratio=ratio, compressor=compressor)
    decoded = tofu.decode(model, message)
    assert decoded.keys() == update.keys()
    assert cosine({name: update[name] for name in network.param_spec.parameters}, decoded) > 0.5
    assert len(message) <= network.param_spec.float32_bytes / ratio + 110
    assert tofu.decode(model, message, compressor=compressor, input_shape=SHAPE).keys() == update.keys()


def test_the_old_name_of_no_compression(mlp_update: Case) -> None:
    network, update = mlp_update
    message = tofu.encode(network.model, update, input_shape=SHAPE, ratio=1, compressor="full")
    assert message == tofu.encode(network.model, update, input_shape=SHAPE, ratio=1, compressor="none")
    earlier = message.replace(b"none", b"full", 1)
    for name in (None, "none", "full"):
        decoded = tofu.decode(network.model, earlier, compressor=name)
        assert all(torch.equal(decoded[key], value) for key, value in update.items())


def test_the_model_is_left_alone_in_its_mode(mlp_update: Case) -> None:
    network, update = mlp_update
    model = build_model("mlp", network.shape).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tofu.decode(model, tofu.encode(model, update, input_shape=SHAPE, options=QUICK))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_model_in_another_type_is_encoded_in_32_bits(mlp_update: Case, kind: torch.dtype) -> None:
    network, update = mlp_update
    model = build_model("mlp", network.shape).to(kind)
    decoded = tofu.decode(model, tofu.encode(model, update, input_shape=SHAPE, options=QUICK))
    assert cosine(decoded, update) > 0.3
    assert {value.dtype for value in model.state_dict().values()} == {kind}


def test_initial_weights_that_both_ends_know_improve_the_correction(mlp_update: Case) -> None:
    network, update = mlp_update
    initial = dict(build_model("mlp", network.shape, seed=0).named_parameters())
    options = CompressorOptions(correction=1.0)
    arguments = {"input_shape": SHAPE, "options": options, "initial": initial}
    message = tofu.encode(network.model, update, **arguments)
    assert tofu.decode(network.model, message, initial=initial).keys() == update.keys()
    with pytest.raises(PayloadError, match="strata"):
        tofu.decode(network.model, message)


def test_what_cannot_be_encoded_says_why(mlp_update: Case) -> None:
    network, update = mlp_update
    name = next(iter(update))
    with pytest.raises(SettingError, match=r"update.*nothing"):
        tofu.encode(network.model, {k: v for k, v in update.items() if k != name}, input_shape=SHAPE)
    with pytest.raises(SettingError, match="input_shape"):
        tofu.encode(network.model, update, input_shape=(1, 9, 9))
    with pytest.raises(SettingError, match="compressor="):
        tofu.encode(network.model, update, input_shape=SHAPE, compressor="zip")
    with pytest.raises(RunError, match="not finite"):
        tofu.encode(network.model, {**update, name: update[name] * torch.nan}, input_shape=SHAPE)


def test_a_name_that_the_model_lacks_is_refused(mlp_update: Case) -> None:
    network, update = mlp_update
    with pytest.raises(SettingError, match=r"update='fc9.weight' is not usable: expected names .*fc1.weight"):
        tofu.encode(network.model, update | {"fc9.weight": torch.ones(1)})


def test_weights_in_the_place_of_an_update_are_refused_or_noted(
    mlp_update: Case, caplog: pytest.LogCaptureFixture
) -> None:
    network, update = mlp_update
    weights, arguments = network.model.state_dict(), {"input_shape": SHAPE, "compressor": "stc"}
    with pytest.raises(SettingError, match=r"the model's own weights.* new minus old weights"):
        tofu.encode(network.model, weights, **arguments)
    tofu.encode(network.model, update, **arguments)
    assert not caplog.messages
    tofu.encode(network.model, {name: weights[name] + 0.1 * value for name, value in update.items()}, **arguments)
    assert caplog.messages == [
        "update is nearly the model's weights: it should be new minus old weights, not the new weights"
    ]
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    empty = build_model("mlp", network.shape)
    empty.load_state_dict(zeros)
    assert tofu.encode(empty, zeros, **arguments)  # no difference


def test_correction_and_proxies_below_are_those_of_options(mlp_update: Case) -> None:
    network, update = mlp_update

    def message(**given: Any) -> bytes:
        return tofu.encode(network.model, update, input_shape=SHAPE, compressor="proxy", **given)

    encoder = ProxySettings(bits=4, warm_start=False)
    only, below = message(correction=1.0), message(proxies_below=0.0)
    assert only == message(options=CompressorOptions(correction=1.0, encoder=encoder))
    assert below == message(options=CompressorOptions(correction=0.4, proxies_below=0.0, encoder=encoder))
    assert len({only, below, message()}) == 3
    assert tofu.decode(network.model, below).keys() == update.keys()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"model": "mlp"}, "model='mlp' .* a torch.nn.Module"),
        ({"model": torch.nn.Linear}, "model='Linear' .* a torch.nn.Module"),
        ({"update": [1]}, "update='list' .* a mapping"),
        ({"update": dict.fromkeys(NAMES, 3)}, "update='.*: int' .* a tensor"),
        ({"input_shape": 3}, "input_shape=3 .* such as"),
        ({"ratio": "x"}, "ratio='x' .* such as 50"),
        ({"ratio": math.nan}, "ratio=nan .* such as 50"),
        ({"compressor": 3}, "compressor=3 .* such as 'topk'"),
        ({"options": {"correction": 1}}, "options='dict' .*CompressorOptions"),
        ({"correction": "x"}, "correction='x' .* from 0 to 1"),
        ({"proxies_below": 2}, "proxies_below=2 .* from 0 to 1"),
        ({"correction": 0.5, "options": QUICK}, r"correction=0.5 .*CompressorOptions\(correction=0.5\)"),
        ({"initial": [1]}, "initial='list' .* a mapping"),
        ({"initial": dict.fromkeys(NAMES, 3)}, "initial='.*: int' .* a tensor"),
        ({"seed": 1.5}, "seed=1.5 .* a whole number"),
        ({"forward": "x"}, "forward='x' .*at_embedding"),
        ({"forward": lambda: 3}, "forward='<lambda>' .* positional"),
        ({"loss": "mse", "target_shape": (10,)}, "loss='mse' .* torch.nn.functional"),
        ({"loss": lambda outputs, targets: 3.0, "target_shape": (10,)}, "loss='<lambda>' .* returns float"),
        ({"loss": torch.nn.functional.mse_loss, "target_shape": "ab"}, "target_shape='ab' .* such as"),
    ],
)
def test_every_argument_of_encode_is_checked(mlp_update: Case, arguments: dict[str, Any], reason: str) -> None:
    network, update = mlp_update
    given = {"model": network.model, "update": update, "input_shape": SHAPE} | arguments
    with pytest.raises(SettingError, match=reason):
        tofu.encode(**given)
    shared = {name: value for name, value in arguments.items() if name in ("model", "compressor", "forward")}
    if shared:
        message = tofu.encode(network.model, update, input_shape=SHAPE, compressor="stc")
        with pytest.raises(SettingError, match=reason):
            tofu.decode(**{"model": network.model, "message": message} | shared)


def test_a_message_for_other_weights_or_of_another_compressor_is_refused(mlp_update: Case) -> None:
    network, update = mlp_update
    message = tofu.encode(network.model, update, input_shape=SHAPE, compressor="stc")
    with pytest.raises(PayloadError, match="weights"):
        tofu.decode(build_model("mlp", network.shape, seed=5), message)
    with pytest.raises(PayloadError, match="'stc', expected topk"):
        tofu.decode(network.model, message, compressor="topk")
    with pytest.raises(PayloadError, match="input shape"):
        tofu.decode(network.model, message, input_shape=(3, 8, 8))


def test_a_message_does_not_choose_which_code_is_imported(mlp_update: Case) -> None:
    network, update = mlp_update
    own = "tests.tofu.compression.test_every_compressor:Halves"
    message = tofu.encode(network.model, update, input_shape=SHAPE, compressor=own, ratio=1.8)
    with pytest.raises(PayloadError, match=r"Halves.*expected a registered one"):
        tofu.decode(network.model, message)
    assert cosine(update, tofu.decode(network.model, message, compressor=own)) > 0.999


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 400), changes=st.integers(0, 4))
def test_hostile_messages_decode_or_are_refused(seed: int, cut: int, changes: int) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    model.load_state_dict({"1.weight": torch.ones(10, 64), "1.bias": torch.ones(10)})
    update: Weights = {"1.weight": torch.arange(640.0).view(10, 64), "1.bias": torch.ones(10)}
    options = CompressorOptions(correction=0.5, correction_gain=1.5, encoder=ProxySettings(max_evals=1, bits=4))
    good = bytearray(tofu.encode(model, update, input_shape=SHAPE, ratio=8, options=options))
    draw = Random(seed)
    for _ in range(changes):
        good[draw.randrange(min(len(good), 120))] = draw.randrange(256)
    try:
        decoded = tofu.decode(model, bytes(good[: len(good) - cut]))
    except PayloadError:
        return
    assert {name: value.shape for name, value in decoded.items()} == {k: v.shape for k, v in update.items()}


def test_a_run_from_keywords_writes_its_run_folder(tmp_path: Path) -> None:
    tofu.run(clients=2, rounds=1, local_epochs=1, train_images=60, compressor="stc", run_folder=str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 1


@pytest.mark.parametrize("name", ["client", "server"])
def test_a_folder_with_a_module_of_that_name_can_use_the_codec_and_is_named_by_run(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").write_text("raise SystemExit('not to be imported')\n")
    code = (
        "import tofu, torch\n"
        "from tofu.errors import RunError\n"
        "model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "update = {n: torch.randn_like(p) for n, p in model.named_parameters()}\n"
        "tofu.decode(model, tofu.encode(model, update, input_shape=(1, 8, 8), ratio=8, compressor='stc'))\n"
        "try:\n    tofu.run(rounds=1)\nexcept RunError as error:\n    print(error)\n"
    )
    line = python(code, cwd=tmp_path)
    assert "\n" not in line
    assert f"{tmp_path}/{name}.py" in line
    assert f"{name}/__init__.py" in line
