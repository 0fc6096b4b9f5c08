"""All settings of a run: groups of typed fields, the flat names that users write, TOML files and the JSON schema."""

import difflib
import hashlib
import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from tofu.errors import SettingError, python_names
from tofu.imports import code_digest, import_object
from tofu.settings import deprecated
from tofu.settings.deprecated import dashed
from tofu.settings.fields import (
    AUTO,
    Group,
    Value,
    build,
    choices_of,
    comma_list,
    expected,
    has_auto,
    kind_of,
    parse_text,
    shown_default,
)
from tofu.settings.groups import (
    DEVICE_FORMS,
    DEVICE_NAME,
    CodecSettings,
    DataSettings,
    DownlinkSettings,
    LinkSettings,
    ModelSettings,
    PluginSettings,
    PrivacySettings,
    RoundSettings,
    RunSettings,
    SecureSettings,
    ServerSettings,
    TrainingSettings,
)

__all__ = [
    "EXTENSIBLE", "FIELDS", "FULL_WEIGHTS", "MIN_SECURE", "CodecSettings", "DataSettings", "DownlinkSettings", "Group",
    "LinkSettings", "ModelSettings", "PluginSettings", "PrivacySettings", "RoundSettings", "RunSettings",
    "SecureSettings", "ServerSettings", "Settings", "TrainingSettings", "Value", "accepted_values", "choices_of",
    "dashed", "expected", "has_auto", "is_extensible", "json_schema", "kind_of", "parse_setting", "python_call",
    "read_toml", "section_of", "separator_of", "settings_of_section", "shown_default",
]  # fmt: skip

_REGISTRIES = {
    "schedule": "tofu.rounds:schedules",
    "compressor": "tofu.compression:compressors",
    "downlink": "tofu.compression:compressors",
    "aggregator": "tofu.rounds:aggregators",
    "server_optimizer": "tofu.rounds:server_optimizers",
}
"""Settings whose values users can extend -> their registry, which is imported when it is needed."""

EXTENSIBLE = tuple(_REGISTRIES)
"""Names of the settings that a registry extends, with underscores."""

MIN_SECURE = 3
"""Minimum number of clients in a secure round. With two, each could compute the other's update from the sum."""

ELSEWHERE = {
    "learning-rate": "lr", "epochs": "local-epochs", "num-epochs": "local-epochs", "num-rounds": "rounds",
    "num-server-rounds": "rounds", "num-clients": "clients", "num-supernodes": "clients", "num-partitions": "clients",
    "fraction-fit": "client-fraction", "fraction-train": "client-fraction", "min-fit-clients": "min-clients",
    "num-workers": "workers", "data": "dataset", "dirichlet-alpha": "alpha",
    "proximal-mu": "proximal", "output-dir": "run-folder", "gpu": "device",
}  # fmt: skip
"""Names of settings in other frameworks -> ours. Errors suggest them."""

_OF_IMAGES = ("resize", "center_crop", "gray_bits", "normalization", "augmentation")

FULL_WEIGHTS = "full-weights"
"""The value of `downlink` with which the server sends its weights."""


class Settings(BaseModel):
    """The settings of a run, one attribute per group. `Settings.of` builds them from flat names and checks everything.

    >>> Settings.of({"rounds": 5, "local-epochs": 2}).training.rounds
    5
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    plugins: PluginSettings = PluginSettings()
    training: TrainingSettings = TrainingSettings()
    rounds: RoundSettings = RoundSettings()
    codec: CodecSettings = CodecSettings()
    downlink: DownlinkSettings = DownlinkSettings()
    secure: SecureSettings = SecureSettings()
    privacy: PrivacySettings = PrivacySettings()
    server: ServerSettings = ServerSettings()
    link: LinkSettings = LinkSettings()
    run: RunSettings = RunSettings()

    @staticmethod
    def of(values: Mapping[str, object], *, warn: bool = True) -> "Settings":
        """Return the settings from flat names (with dashes or underscores); the defaults fill in what is missing.

        Args:
            warn: print a warning for names and values that are deprecated.

        Raises:
            SettingError: a name is unknown, a value has the wrong type or is out of range, or two values conflict. It
                has names with underscores if `values` has.
        """
        try:
            return Settings._of(values, warn=warn)
        except SettingError as error:
            if any("_" in name for name in values):
                error.show_python_names(FIELDS)
            raise

    @staticmethod
    def _of(values: Mapping[str, object], *, warn: bool) -> "Settings":
        groups: dict[str, dict[str, Any]] = {group: {} for group in Settings.model_fields}
        for key, value in deprecated.present_names(values, warn=warn).items():
            name = key.replace("-", "_")
            if name not in FIELDS:
                raise SettingError(name, value, f"a known setting ({', '.join(_near(key)) or 'see `tofu run --help`'})")
            groups[_GROUP_OF[name]][name] = value
        given: dict[str, Any] = {name: build(_GROUPS[name], own) for name, own in groups.items() if own}
        settings = Settings(**given)
        settings._check()
        return settings

    def replace(self, **changes: Value) -> "Settings":
        """Return a checked copy in which the given settings (flat names) have other values.

        Raises SettingError as `of`.
        """
        return Settings.of(self.to_config() | {dashed(name): value for name, value in changes.items()})

    def to_config(self) -> dict[str, Value]:
        """Flat name with dashes -> value, as in TOML and in Flower's run config."""
        return {dashed(name): self._value(name) for name in FIELDS}

    def meaning(self, round_: int) -> tuple[bytes, ...]:
        """Return the inputs, besides the encoding, that all clients of a secure sum must share:
        settings, round and code.

        The setting `device` is left out, because clients may choose it, and so is `class-names`, to which the server
        adds the classes of the clients that registered; the number of classes is part of the encoding.
        """
        text = json.dumps(self.to_config() | {"device": "", "class-names": ""}, sort_keys=True)
        return hashlib.sha256(text.encode()).digest(), round_.to_bytes(4, "little"), code_digest("tofu", "client")

    def _check(self) -> None:
        """Check settings against each other."""
        from tofu.rounds.schedule import make_schedule

        data, plugin, codec, total = self.data, self.plugins, self.codec, self.training.rounds
        for name in _REGISTRIES:
            _check_registered(name, str(self._value(name)))
        kinds = make_schedule(self.rounds, total).kinds
        for holds, why, *names in self._defaults_needed(kinds):
            for name in names if holds else ():
                self._check_default(name, why)
        if self.server.min_clients > data.clients:
            raise SettingError("min-clients", self.server.min_clients, f"at most clients, {data.clients}")
        if data.partition == "natural" and not data.client_column:
            raise SettingError("partition", "natural", "a client-column, which names the client of each row")
        if any(getattr(data, name) != FIELDS[name].default for name in _OF_IMAGES):
            from tofu.data.preprocessing import Preprocessing, parse_normalization, split_augmentations

            Preprocessing(data.resize, data.center_crop, data.gray_bits)
            parse_normalization(data.normalization)
            split_augmentations(data.augmentation)
        if data.subpopulations:
            from tofu.data.subpopulations import Subpopulations

            Subpopulations.parse(data.subpopulations)
        if not DEVICE_NAME.fullmatch(self.run.device):
            raise SettingError("device", self.run.device, DEVICE_FORMS)
        used = (codec.compressor, self.downlink.downlink)
        if codec.codec_mode == "paper" and "proxy" not in used and ":" not in "".join(used):
            raise SettingError(
                "codec-mode", "paper", f"smooth with compressor={codec.compressor}, which has no proxies"
            )
        if self.run.tracker:
            from tofu.observers.trackers import split_trackers

            split_trackers(self.run.tracker)
        if 0 < codec.over_relaxation < 1:
            raise SettingError("over-relaxation", codec.over_relaxation, "auto, or from 1 up to 2")
        if codec.proxy_size == 1:
            raise SettingError("proxy-size", 1, "auto, or 2 to 1024 pixels")
        if total % plugin.task_count:
            raise SettingError("task-count", plugin.task_count, f"a divisor of rounds, {total}")
        if plugin.plugins or plugin.plugin_options:
            self._check_plugins(kinds)
        if self.privacy.server_noise != "none":
            self._check_server_noise(kinds)
        if "secure" in kinds and data.clients < MIN_SECURE:
            raise SettingError("clients", data.clients, f"at least {MIN_SECURE} for secure rounds")

    def _defaults_needed(self, kinds: tuple[str, ...]) -> tuple[tuple[Any, ...], ...]:
        """Whether a condition holds, the condition in words, and the settings that must then have their defaults."""
        data, noised, server_noise = self.data, self.privacy.noise_multiplier, self.privacy.server_noise
        changed_images = data.augmentation or data.normalization != FIELDS["normalization"].default
        return (
            (data.kind != "images", f"for a {data.kind} dataset: it needs images",
             "plugins", "tasks", "subpopulations", "record_clients", *_OF_IMAGES),
            (data.text_column, "with a text-column", "feature_columns"),
            (changed_images, "with augmentation or normalization, which attacks do not make again", "record_clients"),
            (self.plugins.tasks == "pixels", "with tasks=pixels, which permutes the pixels", "augmentation"),
            (self.plugins.tasks == "none", "with tasks=none", "task_count"),
            (self.plugins.plugins, "with plugins, which may change the model", "local_layers"),
            (noised, "with noise-multiplier: accuracies of single clients are not noised", "client_test_fraction"),
            (noised, "with noise-multiplier: sums of plugins are not noised", "plugins"),
            (noised, "with noise-multiplier, whose guarantee is for the mean", "aggregator"),
            (not noised, "without noise-multiplier", "max_epsilon", "secret_sampling", "clip_quantile"),
            (server_noise == "none", "without server-noise", "min_separation"),
            (server_noise != "none", f"with server-noise={server_noise}",
             "clip_quantile", "secret_sampling", "record_clients", "over_sampling"),
            ("secure" in kinds, "with secure rounds, which show only the sum of the updates",
             "aggregator", "max_update_norm"),
            (self.server.server_optimizer == "ef21",
             "with server-optimizer=ef21, whose clients keep the sum of all that they sent",
             "noise_multiplier", "error_feedback", "residual_half_life"),
        )  # fmt: skip

    def _check_default(self, name: str, why: str) -> None:
        value, default = self._value(name), FIELDS[name].default
        if value != default:
            accepted = f"{default:g}" if isinstance(default, float) else f"{default}".lower() or "none"
            raise SettingError(name, value, f"{accepted} {why}")

    def _value(self, name: str) -> Value:
        value: Value = getattr(getattr(self, _GROUP_OF[name]), name)
        return value

    def _check_server_noise(self, kinds: tuple[str, ...]) -> None:
        privacy, server, separation = self.privacy, self.server, self.privacy.min_separation
        wanted = f"with server-noise={privacy.server_noise}"
        if not privacy.noise_multiplier >= 0.01:
            raise SettingError("noise-multiplier", privacy.noise_multiplier, f"at least 0.01 {wanted}")
        if kinds != ("fedavg",):
            raise SettingError("schedule", self.rounds.schedule, f"fedavg {wanted}, which is added to exact sums")
        asked = max(round(server.client_fraction * self.data.clients), server.min_clients)
        if asked * separation > self.data.clients:
            limit = f"at most {1 / separation:.3g}, so that each client takes part once in min-separation={separation}"
            raise SettingError("client-fraction", server.client_fraction, f"{limit} rounds")

    def _check_plugins(self, kinds: tuple[str, ...]) -> None:
        if "tofu.plugins" not in sys.modules:  # nobody has registered one
            from tofu.registry import Registry

            named: Registry[Any] = Registry("plugins", None, "client.plugins")
            for name in comma_list(self.plugins.plugins):
                if ":" not in name and name not in named.names():  # before torch is imported, which takes seconds
                    named.get(name)
        from tofu.plugins import RunRequirements, make_plugins

        make_plugins(self.plugins.plugins, self.plugins.plugin_options).check(
            RunRequirements(
                clients=self.data.clients,
                tasks=self.plugins.task_count,
                exact_updates=kinds == ("fedavg",),
                secure="secure" in kinds,
                model=self.model.model,
            )
        )

    def check_recorded(self) -> None:
        """Raise SettingError for record-clients that a run in one process does not have: its names are numbers."""
        names = set(map(str, range(self.data.clients)))
        if unknown := [name for name in self.run.recorded if name not in names]:
            raise SettingError("record-clients", unknown[0], f"clients of this run, 0 to {len(names) - 1}")

    def step_ahead_of(self, round_: int) -> float:
        """Step-ahead of a round, counted from 1: linear between the first and the last round.

        It is 0 in paper mode, which has none, and with server-optimizer=ef21, whose clients have no residual.
        """
        if self.codec.codec_mode == "paper" or self.server.server_optimizer == "ef21":
            return 0.0
        progress = (round_ - 1) / max(1, self.training.rounds - 1)
        return self.codec.step_ahead * (1 - (1 - self.codec.step_ahead_final_factor) * progress)

    @property
    def residual_fraction(self) -> float:
        """Fraction of the compression error that clients keep. None under differential privacy: it is not noised."""
        return 0.0 if self.privacy.noise_multiplier else self.codec.error_feedback


_GROUPS: dict[str, type[Group]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Group)
}
_GROUP_OF = {name: group for group, kind in _GROUPS.items() for name in kind.model_fields}
FIELDS: dict[str, FieldInfo] = {name: field for kind in _GROUPS.values() for name, field in kind.model_fields.items()}
"""Every setting by its name with underscores, in the order of the groups."""

python_call = python_names(FIELDS)
"""Decorator of functions that users call in Python: their errors have names with underscores."""


def section_of(name: str) -> str:
    """Return the heading of a setting in `--help`."""
    extra = FIELDS[name].json_schema_extra
    own = extra["section"] if isinstance(extra, dict) else ""
    group: Any = _GROUPS[_GROUP_OF[name]]
    return str(own or group.section)


def separator_of(name: str) -> str:
    """Return the separator of a setting with several values; empty for other settings."""
    extra = FIELDS[name].json_schema_extra
    return str(extra["repeated"]) if isinstance(extra, dict) else ""


def settings_of_section(section: str) -> tuple[str, ...]:
    """Return the names of the settings in a section; only the proxy codec reads those in "Proxies"."""
    return tuple(name for name in FIELDS if section_of(name) == section)


def parse_setting(name: str, text: str) -> Value:
    """Return a setting's value from text, as on the command line. Raises SettingError for text of another type."""
    return parse_text(name, FIELDS[name], text)


def accepted_values(name: str) -> tuple[str, ...]:
    """Return the values of a setting with a choice, for help and completion; empty for other settings."""
    if name in _REGISTRIES:
        registered: tuple[str, ...] = import_object(_REGISTRIES[name]).names()
        return tuple(FULL_WEIGHTS if name == "downlink" and known == "none" else known for known in registered)
    return tuple(map(str, choices_of(FIELDS[name])))


def is_extensible(name: str) -> bool:
    """Return whether a setting also accepts `package.module:Class`."""
    return name in _REGISTRIES


def json_schema() -> dict[str, Any]:
    """Return a JSON schema of the flat settings, as a TOML file or `flwr run --run-config` holds them."""
    properties: dict[str, Any] = {}
    for kind in _GROUPS.values():
        for name, schema in kind.model_json_schema()["properties"].items():
            cleaned = {
                key: value for key, value in schema.items() if key not in ("title", "section", "repeated", "auto")
            }
            if has_auto(FIELDS[name]):
                bounds = {key: cleaned.pop(key) for key in list(cleaned) if key not in ("description", "default")}
                cleaned["anyOf"] = [bounds, {"const": AUTO}]
            if name in _REGISTRIES:
                cleaned["anyOf"] = [{"enum": list(accepted_values(name))}, {"pattern": ":"}]
            properties[dashed(name)] = cleaned
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of a TOFU run",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def read_toml(path: Path) -> dict[str, object]:
    """Return the settings from a TOML file: a flat table, or [tool.flwr.app.config] of a pyproject.

    Raises:
        SettingError: the file is missing or is not TOML.
    """
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingError("config", str(path), f"a readable TOML file ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError("config", str(path), f"a TOML file ({error})") from error
    if "tool" in table:
        for name in ("tool", "flwr", "app", "config"):
            table = table.get(name, {})
            if not isinstance(table, dict):
                raise SettingError("config", str(path), f"a TOML file whose {name} is a table")
    return table


def _check_registered(name: str, value: str) -> None:
    """Check that a value is a registered name or `package.module:Class`; no class is imported."""
    names = accepted_values(name)
    if value not in names and ":" not in value:
        raise SettingError(name, value, f"one of {', '.join(names)}, or package.module:Class")


def _near(name: str) -> list[str]:
    """Return the settings that an unknown name, with dashes, may have meant."""
    if (known := ELSEWHERE.get(name.replace("_", "-"))) is not None:
        return [known]
    return difflib.get_close_matches(name, map(dashed, FIELDS), n=3, cutoff=0.5)
