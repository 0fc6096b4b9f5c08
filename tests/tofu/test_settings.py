"""Settings: one list of names and defaults, and one line about every value that cannot be used."""

import itertools
import math
import re
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.processes import run
from tofu.codec.compressor import ProxyCompressor
from tofu.codec.options import ProxySettings
from tofu.compression import uplink_compressor
from tofu.compression.uncompressed import Uncompressed
from tofu.data import ImageShape
from tofu.data.preprocessing import AUGMENTATIONS
from tofu.errors import SettingError
from tofu.models import build_model, model_names
from tofu.observers.trackers import trackers
from tofu.plugins import make_plugins, plugin_names
from tofu.reference_model import ReferenceModel
from tofu.settings import (
    ELSEWHERE,
    FIELDS,
    CodecSettings,
    Settings,
    Value,
    accepted_values,
    choices_of,
    dashed,
    deprecated,
    has_auto,
    json_schema,
    kind_of,
    parse_setting,
    read_toml,
    section_of,
    shown_default,
)
from tofu.settings.fields import bounds_of
from tofu.settings.groups import DEVICE_NAME, MODELS
from tofu.settings.unused import unused_notes

ROOT = Path(__file__).parents[2]


def another(name: str) -> Value:
    """A value that a setting may have, not its default."""
    default, choices = FIELDS[name].default, accepted_values(name)
    assert isinstance(default, Value)
    if isinstance(default, bool):
        return not default
    if choices:
        return type(default)(next(choice for choice in choices if choice != str(default)))
    if name == "subpopulations":
        return "0/1 2/3"
    if isinstance(default, str):
        return "something else"
    most = bounds_of(FIELDS[name]).get("le")
    return type(default)(default / 2 if most is not None and default + 2 > most else default + 2)


OTHERS = {dashed(name): another(name) for name in FIELDS}
OTHERS |= dict.fromkeys(
    (
        "momentum",
        "clip-quantile",
        "server-momentum",
        "malicious-fraction",
        "ema-decay",
        "error-feedback",
        "step-ahead",
        "step-ahead-final-factor",
        "tolerance",
    ),
    0.25,
)
OTHERS |= {
    "compressor": "package.module:Class",  # the one choice that goes with every codec-mode
    "plugins": "",
    "plugin-options": "",
    "feature-columns": "",
    "client-test-fraction": 0.0,
    "aggregator": "mean",
    "server-noise": "none",
    "min-separation": 1,
    "max-update-norm": 0.0,
    "text-column": "",
    "task-count": 2,
    "over-relaxation": 1.5,
    "device": "auto",
    "tracker": "wandb,tensorboard",
    "resize": "32x24",
    "center-crop": "16",
    "gray-bits": 12,
    "normalization": "-1to1",
    "augmentation": "",
}  # plugins do not go with noise-multiplier, and many settings not with tables and texts
"""A value for every setting that is not its default."""

# One list of names


def test_pyproject_has_the_names_and_defaults_of_settings() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        config = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
    defaults = Settings().to_config()
    assert config == defaults
    assert {name: type(value) for name, value in config.items()} == {
        name: type(value) for name, value in defaults.items()
    }


def test_read_toml_finds_the_table_in_a_pyproject() -> None:
    assert Settings.of(read_toml(ROOT / "pyproject.toml")) == Settings()


def test_help_names_everything_that_is_built_in() -> None:
    built_in = {"plugins": plugin_names(), "model": model_names(), "tracker": trackers.names()}
    assert model_names() == MODELS
    for name, known in built_in.items():
        words = re.findall(r"[\w-]+", str(FIELDS[name].description))
        assert set(known) <= set(words), name


SECTIONS = (
    "Data",
    "Model",
    "Plugins",
    "Training",
    "Rounds",
    "Codec",
    "Proxies",
    "Secure rounds",
    "Privacy",
    "Server",
    "Links",
    "Run",
)


def test_every_setting_has_a_help_and_a_section() -> None:
    for name, field in FIELDS.items():
        assert field.description, name
        assert section_of(name) in SECTIONS


# Round trip


def test_others_differ_from_every_default() -> None:
    same = OTHERS.items() & Settings().to_config().items()
    assert same == {(name, "") for name in ("plugins", "plugin-options", "feature-columns", "text-column")} | {
        ("client-test-fraction", 0.0),
        ("aggregator", "mean"),
        ("server-noise", "none"),
        ("min-separation", 1),
        ("max-update-norm", 0.0),
        ("normalization", "-1to1"),
        ("augmentation", ""),
    }


@pytest.mark.parametrize("dashed", [True, False])
def test_what_of_reads_to_config_gives(dashed: bool) -> None:
    settings = Settings.of({name if dashed else name.replace("-", "_"): value for name, value in OTHERS.items()})
    assert settings.to_config() == OTHERS
    assert Settings.of(settings.to_config()) == settings


def test_of_nothing_is_the_defaults() -> None:
    assert Settings.of({}) == Settings()


def test_a_whole_number_may_stand_for_a_float() -> None:
    lr = Settings.of({"lr": 1}).training.lr
    assert (lr, type(lr)) == (1.0, float)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().training.rounds = 5  # type: ignore[misc]


# What is refused


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rounds", "3", "a whole number"), ("rounds", 3.0, "a whole number"), ("rounds", True, "a whole number"),
        ("rounds", None, "a whole number"), ("rounds", [3], "a whole number"), ("lr", "0.1", "a number"),
        ("lr", True, "a number"), ("lr", 10**400, "a number"), ("surrogate", 1, "true or false"),
        ("surrogate", "yes", "true or false"), ("model", 5, "text"), ("dataset", None, "text"),
        ("run-folder", Path("x"), "text"),
    ],
)  # fmt: skip
def test_wrong_types_are_refused(name: str, value: object, expected: str) -> None:
    with pytest.raises(SettingError) as caught:
        Settings.of({name: value})
    assert str(caught.value).startswith(f"{name}={value!r} is not usable: expected {expected}")


@pytest.mark.parametrize(
    ("name", "refused", "accepted"),
    [
        ("alpha", [0.0, -1.0, math.inf, math.nan], [1e-9, 1e9]),
        ("shards-per-client", [0, -1], [1]),
        ("train-images", [-1], [0, 10]),
        ("test-images", [-1], [0, 10]),
        ("clients", [0, -3, 100_001], [1, 100_000]),
        ("rounds", [0, -1, 100_001], [1, 100_000]),
        ("local-epochs", [0], [1]),
        ("batch-size", [0, -8], [1]),
        ("lr", [0.0, -0.1, math.inf, -math.inf, math.nan], [1e-12, 10.0]),
        ("lr-final-factor", [0.0, 1.01], [0.001, 1.0]),
        ("momentum", [-0.1, 1.0, math.nan], [0.0, 0.99]),
        ("weight-decay", [-1e-9, math.inf], [0.0, 1.0]),
        ("switch-round", [-1], [0, 10]),
        ("plateau-patience", [0], [1]),
        ("plateau-gain", [-0.1], [0.0]),
        ("ratio", [0.99, 0.0, -5.0, math.inf], [1.0, 1e6]),
        ("proxies", [-1, 65536], [0, 65535]),
        ("proxy-size", [-1, 1, 1025], [0, 2, 1024]),
        ("bits", [0, 1, 7, 64], [2, 8, 32]),
        ("surrogate-beta", [-0.1, 1001.0], [0.5, 1000.0]),
        ("max-evals", [0], [1]),
        ("tolerance", [-0.1], [0.0]),
        ("error-feedback", [-0.1, 1.1], [0.0, 1.0]),
        ("over-relaxation", [0.99, 2.0], [1.0, 1.99]),
        ("step-ahead", [-0.1, 1.1], [0.0, 1.0]),
        ("step-ahead-final-factor", [-0.1, 1.1], [0.0, 1.0]),
        ("residual-half-life", [-0.1, math.inf], [0.0, 0.5, 100.0]),
        ("ef21-momentum", [0.0, 1.1], [0.1, 1.0]),
        ("client-fraction", [0.0, 1.01], [0.01, 1.0]),
        ("min-clients", [0], [1, 10]),
        ("round-timeout", [0.0, math.inf], [0.1]),
        ("server-lr", [-0.1], [0.0, 0.1]),
        ("server-momentum", [-0.1, 1.0], [0.0, 0.99]),
        ("ema-decay", [-0.1, 1.0], [0.0, 0.999]),
        ("seed", [-1, 2**31], [0, 2**31 - 1]),
        ("threads", [0, 1025], [1]),
        ("workers", [0, 1025], [1]),
        ("partition", ["", "IID", "random"], ["iid", "dirichlet", "shards"]),
        ("norm", ["layer"], ["group", "batch", "none"]),
        ("schedule", ["proxies"], ["compressed", "fedavg", "switch", "plateau"]),
        ("compressor", ["zip"], ["proxy", "none"]),
        ("codec-mode", ["rough"], ["smooth", "paper"]),
        ("server-optimizer", ["plane"], ["sgd", "momentum", "adam"]),
    ],
)
def test_ranges(name: str, refused: list[object], accepted: list[object]) -> None:
    for value in accepted:
        assert Settings.of({name: value}).to_config()[name] == value
    for value in refused:
        with pytest.raises(SettingError) as caught:
            Settings.of({name: value})
        assert caught.value.field == name
        assert str(caught.value).startswith(f"{name}={value!r} is not usable: expected ")
        assert "\n" not in str(caught.value)


AUTOMATIC = ("switch-round", "over-relaxation", "proxies", "proxy-size", "surrogate-beta", "gray-bits", "server-lr")


def test_auto_is_the_zero_with_which_the_program_chooses() -> None:
    assert Settings.of(dict.fromkeys(AUTOMATIC, "auto")) == Settings()
    assert {name for name, field in FIELDS.items() if has_auto(field)} == {name.replace("-", "_") for name in AUTOMATIC}
    for name in AUTOMATIC:
        field = FIELDS[name.replace("-", "_")]
        assert shown_default(field) == "auto"
        value = parse_setting(name.replace("-", "_"), "auto")
        assert (value, type(value)) == (0, kind_of(field))
        jsonschema.validate({name: "auto"}, json_schema())
    for name in ("clients", "ratio", "train-images"):
        with pytest.raises(SettingError, match=f"^{name}='auto' is not usable"):
            Settings.of({name: "auto"})


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("round", "rounds"), ("local-epoch", "local-epochs"), ("max-eval", "max-evals"), ("sede", "seed"),
     ("proxy-count", "proxy-size"), ("learning-rate", "(lr)"), ("qqq", "see `tofu run --help`")],
)  # fmt: skip
def test_an_unknown_name_gets_a_suggestion(name: str, suggestion: str) -> None:
    with pytest.raises(SettingError, match=f"^{name}=3 is not usable: expected a known setting") as caught:
        Settings.of({name: 3})
    assert suggestion in str(caught.value)


def test_names_of_other_frameworks_are_none_of_ours() -> None:
    assert not {name.replace("-", "_") for name in ELSEWHERE} & set(FIELDS)
    assert {name.replace("-", "_") for name in ELSEWHERE.values()} <= set(FIELDS)


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(SettingError, match="switch-round=11 is not usable: expected at most rounds, 10"):
        Settings.of({"rounds": 10, "schedule": "switch", "switch-round": 11})
    assert Settings.of({"schedule": "compressed", "switch-round": 11}).rounds.switch_round == 11  # it is not used
    with pytest.raises(SettingError, match="min-clients=11 is not usable: expected at most clients, 10"):
        Settings.of({"min-clients": 11})


# TOML files


def toml(folder: Path, text: str | bytes) -> Path:
    path = folder / "settings.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_read_toml_reads_a_flat_table(tmp_path: Path) -> None:
    path = toml(tmp_path, 'rounds = 3\nlocal_epochs = 2\nmodel = "mlp"\nwarm-start = false\n')
    settings = Settings.of(read_toml(path))
    assert settings == Settings.of({"rounds": 3, "local_epochs": 2, "model": "mlp", "warm_start": False})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rounds = ", "a TOML file"),
        ("rounds = 3\nrounds = 4", "a TOML file"),
        (b"model = '\xff\xfe'", "a TOML file"),
        ("tool = 1", "a TOML file whose tool is a table"),
        ("[tool]\nflwr = 'x'", "a TOML file whose flwr is a table"),
        ("[tool.flwr.app]\nconfig = []", "a TOML file whose config is a table"),
    ],
)
def test_read_toml_refuses_what_is_no_table_of_settings(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(SettingError) as caught:
        read_toml(path)
    assert str(caught.value).startswith(f"config='{path}' is not usable: expected {words}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_read_toml_says_which_file_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingError, match="a readable TOML file"):
        read_toml(tmp_path / name)


def test_a_pyproject_without_our_table_holds_no_settings(tmp_path: Path) -> None:
    assert read_toml(toml(tmp_path, "[tool.ruff]\nline-length = 120")) == {}


# What follows from settings


def test_lr_falls_along_half_a_cosine() -> None:
    settings = Settings.of({"lr": 0.4, "lr-final-factor": 0.1, "rounds": 5})
    rates = [settings.training.lr_of(round_) for round_ in range(1, 6)]
    assert rates[0] == pytest.approx(0.4)
    assert rates[2] == pytest.approx((0.4 + 0.04) / 2)
    assert rates[4] == pytest.approx(0.04)
    assert rates == sorted(rates, reverse=True)
    steps = [a - b for a, b in itertools.pairwise(rates)]
    assert steps[0] < steps[1]  # flat at both ends, steep between
    assert steps[0] == pytest.approx(steps[3])
    assert steps[1] == pytest.approx(steps[2])


def test_lr_stays_by_default_and_in_a_single_round() -> None:
    assert {Settings.of({"rounds": 7}).training.lr_of(round_) for round_ in range(1, 8)} == {0.1}
    assert Settings.of({"rounds": 1, "lr-final-factor": 0.1}).training.lr_of(1) == 0.1


def test_step_ahead_falls_linearly_to_its_final_factor() -> None:
    def of(rounds: int, **changes: float | str) -> list[float]:
        given = {"step_ahead": 0.8, "step_ahead_final_factor": 0.0, "rounds": rounds} | changes
        return [Settings.of(given).step_ahead_of(round_) for round_ in range(1, rounds + 1)]

    assert of(5) == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert of(3, step_ahead_final_factor=0.5) == pytest.approx([0.8, 0.6, 0.4])
    assert of(4, step_ahead_final_factor=1.0) == [0.8] * 4
    assert of(1) == [0.8]
    assert of(2, codec_mode="paper") == of(2, server_optimizer="ef21") == [0.0, 0.0]


def test_paper_mode_is_the_published_method_whatever_refines_smooth() -> None:
    paper = CodecSettings(codec_mode="paper", bits=4, proxy_size=6)
    plain = ProxySettings.of(paper, "cpu")
    refined = ProxySettings.of(paper.replace(free_labels=True, surrogate_beta=9.0), "cpu")
    assert plain == refined
    assert (plain.smooth, plain.labels, plain.scale, plain.warm_start) == (False, "simplex", "one", False)
    assert (plain.bits, plain.size) == (4, 6)


def test_smooth_mode_follows_its_settings() -> None:
    settings = Settings.of({"free-labels": False, "tensor-scales": False, "max-evals": 7, "tolerance": 0})
    codec = ProxySettings.of(settings.codec, settings.run.device)
    assert (codec.labels, codec.scale, codec.max_evals, codec.tolerance) == ("simplex", "one", 7, 0.0)
    assert ProxySettings.of(CodecSettings(), "cpu").batch_statistics
    assert not ProxySettings.of(CodecSettings(surrogate=False), "cpu").batch_statistics  # they are the surrogate's


def test_the_compressor_follows_from_the_kind_of_the_round() -> None:
    shape = ImageShape(1, 8, 8, 10)
    network = ReferenceModel(build_model("mlp", shape).eval(), shape)
    settings = Settings.of({"proxies": 5, "model": "mlp"})
    proxy = uplink_compressor(settings, "compressed", network)
    assert isinstance(proxy, ProxyCompressor)
    assert proxy.count == 5
    assert isinstance(uplink_compressor(settings, "fedavg", network), Uncompressed)
    assert isinstance(uplink_compressor(Settings.of({"compressor": "none"}), "compressed", network), Uncompressed)


# Old names and values


@pytest.mark.parametrize(("old", "name"), deprecated.NAMES.items())
def test_an_old_name_is_accepted_with_one_warning(
    old: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deprecated, "_warned", set())
    value = 0.5 if name == "max-epsilon" else OTHERS[name]
    more = {"noise-multiplier": 1.0} if name == "max-epsilon" else {}
    for _ in range(2):
        assert Settings.of({old: value, **more}).to_config()[name] == value
    assert capsys.readouterr().err == f"warning: setting {old} is deprecated: use {name}\n"
    assert Settings.of({old: value, **more}, warn=False).to_config()[name] == value
    with pytest.raises(SettingError, match="two names"):
        Settings.of({old: value, name: value, **more})


@pytest.mark.parametrize(
    ("name", "old", "present"), [(name, *pair) for name, pairs in deprecated.VALUES.items() for pair in pairs.items()]
)
def test_an_old_value_is_accepted_with_one_warning(
    name: str, old: str, present: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Settings.of({name: old}, warn=False).to_config()[name] == present
    monkeypatch.setattr(deprecated, "_warned", set())
    assert Settings.of({name: old}).to_config()[name] == present
    assert capsys.readouterr().err == f"warning: {name}={old} is deprecated: use {name}={present}\n"
    assert old not in accepted_values(name.replace("-", "_"))


@pytest.mark.parametrize(("old", "name"), deprecated.PLUGIN_OPTIONS.items())
def test_an_old_option_of_a_plugin_is_accepted_with_one_warning(
    old: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deprecated, "_warned", set())
    plugin, option = name.split(".")
    assert getattr(make_plugins(plugin, f"{old}=0.25")[0], option.replace("-", "_")) == 0.25
    assert capsys.readouterr().err == f"warning: plugin option {old} is deprecated: use {name}\n"
    with pytest.raises(SettingError, match="each option once"):
        make_plugins(plugin, f"{old}=0.25 {name}=0.5")


def test_old_names_are_no_settings() -> None:
    assert not {name.replace("-", "_") for name in deprecated.NAMES} & set(FIELDS)
    assert {name.replace("-", "_") for name in deprecated.NAMES.values()} <= set(FIELDS)


# Any valid value


def values_of(name: str) -> st.SearchStrategy[object]:
    field = FIELDS[name]
    if choices := choices_of(field):
        return st.sampled_from(choices)
    if accepted := accepted_values(name):
        return st.sampled_from(accepted)
    bounds = bounds_of(field)
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if kind_of(field) is bool:
        return st.booleans()
    if name == "gray_bits":
        return st.sampled_from([0, *range(8, 17)])
    if kind_of(field) is int:
        return st.integers(int(low or 0), int(high or 10**9))
    if kind_of(field) is float:
        top = high if high is not None else 1e300
        return st.floats(low, top, exclude_min="gt" in bounds, exclude_max="lt" in bounds)
    if name == "subpopulations":
        return st.permutations(range(6)).map(lambda k: f"{k[0]},{k[1]}/{k[2]} {k[3]}/{k[4]}")
    if name in ("tracker", "augmentation"):
        known = trackers.names() if name == "tracker" else tuple(AUGMENTATIONS)
        return st.lists(st.sampled_from(known), unique=True).map(",".join)
    if name == "normalization":
        return st.sampled_from(["-1to1", "imagenet", "dataset", "0.5/0.25"])
    if name in ("resize", "center_crop"):
        return st.from_regex(r"([1-9]\d{0,3}(x[1-9]\d{0,3})?)?", fullmatch=True)
    return st.from_regex(DEVICE_NAME, fullmatch=True) if name == "device" else st.text(max_size=20)


CONFLICTING = {
    "plugins", "plugin_options", "task_count", "switch_round", "max_epsilon", "min_clients", "clients", "partition",
    "feature_columns", "text_column", "client_test_fraction", "aggregator", "codec_mode",
    "server_optimizer", "record_clients", "tasks", "secret_sampling", "clip_quantile", "max_update_norm",
    "server_noise", "min_separation",
}  # fmt: skip


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries({}, optional={n: values_of(n) for n in FIELDS if n not in CONFLICTING}))
def test_any_valid_configuration_survives_a_round_trip(values: dict[str, object]) -> None:
    if values.get("proxy_size") == 1:
        values["proxy_size"] = 0
    if 0 < float(str(values.get("over_relaxation", 0))) < 1:
        values["over_relaxation"] = 0.0
    settings = Settings.of(values)
    config = settings.to_config()
    assert {name: config[dashed(name)] for name in values} == values
    assert Settings.of(config) == settings
    assert all(type(config[dashed(name)]) is kind_of(field) for name, field in FIELDS.items())


def test_the_json_schema_accepts_the_defaults_and_refuses_the_rest() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    config = Settings().to_config()
    validator.validate(config)
    assert set(json_schema()["properties"]) == set(config)
    validator.validate(config | {"schedule": "fedavg", "compressor": "my.module:Mine", "downlink": "full-weights"})
    for bad in (
        {"rounds": 0},
        {"bits": 7},
        {"schedule": "never"},
        {"server-optimizer": "plane"},
        {"nosuch": 1},
        {"lr": "0.1"},
    ):
        assert not validator.is_valid(config | bad), bad


def test_settings_do_not_import_torch() -> None:
    code = "import sys, tofu.settings; tofu.settings.Settings.of({'rounds': 3}); assert 'torch' not in sys.modules"
    run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("other", [{"noise-multiplier": 1.0}, {"error-feedback": 0.5}, {"residual-half-life": 3.0}])
def test_ef21_is_refused_with_what_its_clients_sums_do_not_allow(other: dict[str, float]) -> None:
    assert Settings.of({"server-optimizer": "ef21"}).server.ef21_momentum == 1
    with pytest.raises(SettingError, match="server-optimizer=ef21") as caught:
        Settings.of({"server-optimizer": "ef21"} | other)
    assert caught.value.field == next(iter(other))


def test_over_relaxation_applies_to_the_correction_or_to_the_whole_and_needs_error_feedback() -> None:
    network = ReferenceModel(build_model("mlp", ImageShape(1, 8, 8, 10)), ImageShape(1, 8, 8, 10))

    def gain(**changes: object) -> tuple[str, float]:  # 0: automatic
        made = uplink_compressor(
            Settings.of({"over-relaxation": 1.8, "compressor": "stc"} | changes), "compressed", network
        )
        return made.name, getattr(made, "_gain", 1.0)

    assert gain() == ("stc", 1.8)
    assert gain(**{"over-relaxation": 0.0}) == gain(**{"over-relaxation": 0.0, "ratio": 10.0}) == ("stc", 0.0)
    assert gain(**{"error-feedback": 0.0}) == ("stc", 1.0)
    assert gain(**{"noise-multiplier": 1.0}) == ("stc", 1.0)


@pytest.mark.parametrize(
    ("given", "notes"),
    [
        ({"downlink-ratio": 30.0}, ["downlink-ratio=30.0 has no effect: it needs a compressed downlink"]),
        ({"downlink-ratio": 30.0, "downlink": "topk"}, []),
        ({"switch-round": 5}, ["switch-round=5 has no effect: it needs schedule=switch"]),
        ({"switch-round": 5, "schedule": "switch"}, []),
        ({"partition": "iid", "alpha": 0.5}, ["alpha=0.5 has no effect: it needs partition=dirichlet"]),
        ({"partition": "iid"}, []),
        ({"compressor": "topk", "bits": 8}, ["bits=8 has no effect: it needs compressor=proxy"]),
        ({"schedule": "fedavg", "ratio": 9.0}, ["ratio=9.0 has no effect: it needs a schedule with compressed rounds"]),
        ({"secure-identities": "known.json"}, []),  # nodes prove their names in all rounds
        ({"model": "nets:small", "norm": "batch"}, ["norm=batch has no effect: it needs a built-in model"]),
        ({"model": "cnn", "norm": "batch"}, []),
        ({"clip-norm": 2.0}, ["clip-norm=2.0 has no effect: it needs noise-multiplier above 0"]),
        ({"clip-norm": 2.0, "noise-multiplier": 1.0}, []),
    ],
)
def test_a_given_setting_without_effect_has_one_note(given: dict[str, Value], notes: list[str]) -> None:
    assert list(unused_notes(Settings.of(given), [name.replace("-", "_") for name in given])) == notes
    assert not list(unused_notes(Settings.of({})))
