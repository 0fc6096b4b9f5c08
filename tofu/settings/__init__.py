"""All settings of a run: groups of typed fields, the flat names that users write, TOML files and the JSON schema."""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from tofu.errors import SettingError
from tofu.settings import deprecated
from tofu.settings.deprecated import dashed
from tofu.settings.fields import Group, Value, build, choices_of, expected, kind_of, parse_text
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

if TYPE_CHECKING:
    from tofu.codec.options import ProxySettings
    from tofu.compression.base import Compressor
    from tofu.data import FederatedData, FederatedRows, ImageShape, RowFormat
    from tofu.plugins import Plugins, RoundContext
    from tofu.privacy import Noise
    from tofu.reference_model import ReferenceModel
    from tofu.secagg.graph import Topology
    from tofu.tasks import TaskStream

__all__ = [
    "FIELDS", "MIN_SECURE", "CodecSettings", "DataSettings", "DownlinkSettings", "Group", "LinkSettings",
    "ModelSettings", "PluginSettings", "PrivacySettings", "RoundSettings", "RunSettings", "SecureSettings",
    "ServerSettings", "Settings", "TrainingSettings", "Value", "accepted_values", "choices_of", "dashed",
    "expected", "json_schema", "kind_of", "parse_setting", "read_toml", "section_of", "separator_of",
    "settings_of_section",
]  # fmt: skip

_ROWS_ONLY = {
    "class_names", "feature_columns", "text_column", "label_column", "feature_scaling", "vocabulary", "tokens",
}  # fmt: skip
"""Settings of the data that a dataset of images is opened without."""

MIN_SECURE = 3
"""Minimum number of clients in a secure round. With two, each could compute the other's update from the sum."""

_WEIGHTS = "full-weights"

_COMPLETE_WITH_IDENTITIES = 256
"""Clients up to which the graph is complete if the server may lie: a sparse graph then guarantees less."""


class Settings(BaseModel):
    """The settings of a run, one attribute per group. `Settings.of` builds them from flat names and checks everything.

    >>> Settings.of({"rounds": 5, "local-epochs": 2}).training.rounds
    5

    The attributes of the groups can also be read directly (`settings.rounds`) until all components take their group.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    data: DataSettings = DataSettings()
    network: ModelSettings = ModelSettings()
    plugin: PluginSettings = PluginSettings()
    training: TrainingSettings = TrainingSettings()
    round_plan: RoundSettings = RoundSettings()
    codec: CodecSettings = CodecSettings()
    downstream: DownlinkSettings = DownlinkSettings()
    secure: SecureSettings = SecureSettings()
    privacy: PrivacySettings = PrivacySettings()
    server: ServerSettings = ServerSettings()
    link: LinkSettings = LinkSettings()
    run: RunSettings = RunSettings()

    @staticmethod
    def of(values: Mapping[str, object], *, warn: bool = True) -> "Settings":
        """Settings from flat names (with dashes or underscores); the defaults fill in what is missing.

        Args:
            warn: print a warning for names and values that are deprecated.

        Raises:
            SettingError: a name is unknown, a value has the wrong type or is out of range, or two values conflict.
        """
        groups: dict[str, dict[str, Any]] = {group: {} for group in Settings.model_fields}
        for key, value in deprecated.present_names(values, warn=warn).items():
            name = key.replace("-", "_")
            if name not in FIELDS:
                near = difflib.get_close_matches(key, map(dashed, FIELDS), n=3, cutoff=0.5)
                raise SettingError(key, value, f"a known setting ({', '.join(near) or 'see `tofu run --help`'})")
            groups[_GROUP_OF[name]][name] = value
        given: dict[str, Any] = {name: build(_GROUPS[name], own) for name, own in groups.items() if own}
        settings = Settings(**given)
        settings._check()
        return settings

    def replace(self, **changes: Value) -> "Settings":
        """A checked copy in which the given settings (flat names) have other values. Raises SettingError as `of`."""
        return Settings.of(self.to_config() | {dashed(name): value for name, value in changes.items()})

    def to_config(self) -> dict[str, Value]:
        """Flat name with dashes -> value, as in TOML and in Flower's run config."""
        return {dashed(name): getattr(getattr(self, _GROUP_OF[name]), name) for name in FIELDS}

    def __getattr__(self, name: str) -> Any:
        present = deprecated.NAMES.get(dashed(name), name).replace("-", "_")
        if present in FIELDS:
            return getattr(getattr(self, _GROUP_OF[present]), present)
        raise AttributeError(f"settings have no {name!r}")

    def meaning(self, round_: int) -> tuple[bytes, bytes]:
        """What clients of one secure sum must have alike besides its encoding: a digest of all settings, the round."""
        text = json.dumps(self.to_config(), sort_keys=True)
        return hashlib.sha256(text.encode()).digest(), round_.to_bytes(4, "little")

    def _check(self) -> None:
        """Check settings against each other."""
        data, rounds, plugin, codec = self.data, self.round_plan, self.plugin, self.codec
        total = self.training.rounds
        _check_compressor("compressor", codec.compressor)
        _check_compressor("downlink", self.downstream.downlink)
        self._check_data()
        if rounds.schedule == "switch" and rounds.switch_round > total:
            raise SettingError("switch-round", rounds.switch_round, f"at most rounds, {total}")
        if self.server.min_clients > data.clients:
            raise SettingError("min-clients", self.server.min_clients, f"at most clients, {data.clients}")
        if data.subpopulations:
            from tofu.data.subpopulations import Subpopulations

            Subpopulations.parse(data.subpopulations)
        if not DEVICE_NAME.fullmatch(self.run.device):
            raise SettingError("device", self.run.device, DEVICE_FORMS)
        if codec.proxy_size == 1:
            raise SettingError("proxy-size", 1, "0 (chooses it) or 2 to 1024 pixels")
        if plugin.tasks == "none" and plugin.task_count > 1:
            raise SettingError("task-count", plugin.task_count, "1 with tasks=none")
        if total % plugin.task_count:
            raise SettingError("task-count", plugin.task_count, f"a divisor of rounds, {total}")
        if plugin.plugins or plugin.plugin_options:
            self._check_plugins()
        for name in ("local_layers", "client_test_fraction"):
            value = getattr(self.training, name)
            if value and self.privacy.noise_multiplier and name == "client_test_fraction":
                raise SettingError(name, value, "0 with noise-multiplier: accuracies of single clients are not noised")
            if value and plugin.plugins and name == "local_layers":
                raise SettingError(name, value, "none with plugins, which may change the model")
        if self.privacy.noise_multiplier and plugin.plugins:
            raise SettingError("plugins", plugin.plugins, "none with noise-multiplier: sums of plugins are not noised")
        if self.privacy.max_epsilon and not self.privacy.noise_multiplier:
            raise SettingError("max-epsilon", self.privacy.max_epsilon, "0 without noise-multiplier")
        self._check_aggregator()
        if rounds.has_secure_rounds and data.clients < MIN_SECURE:
            raise SettingError("clients", data.clients, f"at least {MIN_SECURE} for secure rounds")

    def _check_aggregator(self) -> None:
        name, names = self.server.aggregator, accepted_values("aggregator")
        if name not in names and ":" not in name:
            raise SettingError("aggregator", name, f"one of {', '.join(names)}, or package.module:Class")
        if name != "mean" and self.round_plan.has_secure_rounds:
            raise SettingError("aggregator", name, "mean with secure rounds, which show only the sum of the updates")
        if name != "mean" and self.privacy.noise_multiplier:
            raise SettingError("aggregator", name, "mean with noise-multiplier, whose guarantee is for the mean")

    def _check_data(self) -> None:
        data, plugin = self.data, self.plugin
        if data.text_column and data.feature_columns:
            raise SettingError("feature-columns", data.feature_columns, "none with a text-column")
        if data.partition == "natural" and not data.client_column:
            raise SettingError("partition", "natural", "a client-column, which names the client of each row")
        if data.kind != "images":
            for name, value, none in (
                ("plugins", plugin.plugins, ""),
                ("tasks", plugin.tasks, "none"),
                ("subpopulations", data.subpopulations, ""),
                ("record-clients", self.run.record_clients, ""),
            ):
                if value != none:
                    raise SettingError(name, value, f"{none!r} for a {data.kind} dataset: it needs images")

    def _check_plugins(self) -> None:
        from tofu.plugins import Plugin, RunRequirements

        plugins = self.make_plugins()
        if self.codec.step_ahead and any(type(plugin).on_step is not Plugin.on_step for plugin in plugins):
            wanted = f"0 with plugins={self.plugin.plugins}, which restricts the steps from the global weights"
            raise SettingError("step-ahead", self.codec.step_ahead, wanted)
        plugins.check(
            RunRequirements(
                clients=self.data.clients,
                tasks=self.plugin.task_count,
                exact_updates=self.round_plan.schedule == "fedavg",
                secure=self.has_secure_rounds,
                model=self.network.model,
            )
        )

    # The rest builds components from settings. It imports them only when it is called: settings do not need torch.

    @property
    def has_secure_rounds(self) -> bool:
        """Whether a round may be a secure one."""
        return self.round_plan.has_secure_rounds

    @property
    def recorded(self) -> tuple[str, ...]:
        """Names of the clients whose messages are stored."""
        return self.run.recorded

    @property
    def residual_fraction(self) -> float:
        """Fraction of the compression error that clients keep. None under differential privacy: it is not noised."""
        return 0.0 if self.privacy.noise_multiplier else self.codec.error_feedback

    def lr_of(self, round_: int) -> float:
        """The clients' learning rate in a round, counted from 1."""
        return self.training.lr_of(round_)

    def proxy_settings(self) -> "ProxySettings":
        """The settings of the proxy codec."""
        from tofu.codec.options import ProxySettings, paper_settings

        codec = self.codec
        common: dict[str, Any] = {"size": codec.proxy_size, "bits": codec.bits, "device": self.run.device}
        if codec.codec_mode == "paper":
            return paper_settings(**common)
        return ProxySettings(
            smooth=codec.surrogate,
            surrogate_beta=codec.surrogate_beta,
            batch_statistics=codec.surrogate and codec.batch_statistics,
            labels="free" if codec.free_labels else "simplex",
            scale="tensor" if codec.tensor_scales else "one",
            max_evals=codec.max_evals,
            tolerance=codec.tolerance,
            warm_start=codec.warm_start,
            **common,
        )

    def open_data(self) -> "FederatedData":
        """The run's dataset, distributed to the clients. Raises DataError or SettingError if it cannot be opened."""
        from tofu.data import open_data

        return open_data(**self.data.model_dump(exclude=_ROWS_ONLY), seed=self.run.seed)

    def row_format(self) -> "RowFormat":
        """How the columns of the run's table or texts become tensors."""
        from tofu.data import RowFormat

        data = self.data
        return RowFormat(
            features=_names(data.feature_columns), text=data.text_column, label=data.label_column,
            client=data.client_column, scaling=data.feature_scaling, vocabulary=data.vocabulary, tokens=data.tokens,
            class_names=_names(data.class_names),
        )  # fmt: skip

    def open_rows(self) -> "FederatedRows":
        """The run's table or texts, distributed to the clients. Raises DataError or SettingError as `open_data`."""
        from tofu.data import open_rows

        data = self.data
        return open_rows(
            data.dataset, self.row_format(), clients=data.clients, partition=data.partition, alpha=data.alpha,
            shards_per_client=data.shards_per_client, train_images=data.train_images, test_images=data.test_images,
            seed=self.run.seed,
        )  # fmt: skip

    def make_plugins(self) -> "Plugins":
        """The plugins, new and without state."""
        from tofu.plugins import make_plugins

        return make_plugins(self.plugin.plugins, self.plugin.plugin_options)

    def round_context(self, shape: "ImageShape", round_: int, client: str = "", *, group: int = 0) -> "RoundContext":
        """The position of a round in the run, as plugins receive it."""
        from tofu.plugins import RoundContext

        each = self.training.rounds // self.plugin.task_count
        return RoundContext(
            shape,
            round=round_,
            rounds=self.training.rounds,
            task=(round_ - 1) // each,
            tasks=self.plugin.task_count,
            final=round_ % each == 0,
            client=client,
            seed=self.run.seed,
            group=group,
        )

    def task_stream(self, classes: int) -> "TaskStream":
        """The run's tasks over a dataset with this number of classes. Raises SettingError for too many tasks."""
        from tofu.tasks import TaskStream

        plugin = self.plugin
        return TaskStream(plugin.tasks, plugin.task_count, classes, self.run.seed, plugin.task_order)

    def make_compressor(self, kind: str, network: "ReferenceModel") -> "Compressor":
        """The compressor of a round of this kind ("proxy" or "fedavg"; a secure round has none) for this network."""
        name = "none" if kind == "fedavg" else self.codec.compressor
        gain = self.codec.over_relaxation if kind != "fedavg" and self.residual_fraction else 1.0
        return self._make(name, network, ratio=self.codec.ratio, count=self.codec.proxies, gain=gain)

    def make_downlink(self, network: "ReferenceModel") -> "Compressor | None":
        """The compressor of the server's steps, or None if the server sends its weights."""
        if self.downstream.downlink == _WEIGHTS:
            return None
        return self._make(self.downstream.downlink, network, ratio=self.downstream.downlink_ratio, count=0)

    def _make(
        self, name: str, network: "ReferenceModel", *, ratio: float, count: int, gain: float = 1.0
    ) -> "Compressor":
        from tofu.codec.options import CompressorOptions
        from tofu.compression import make_compressor
        from tofu.model_call import NEEDS_CALL

        if name in NEEDS_CALL and not network.call.inputs:
            name = "sparse"
        correction = 0.0 if self.codec.codec_mode == "paper" else self.codec.correction
        options = CompressorOptions(
            gain=gain, proxies=count, correction=correction, correction_gain=gain, encoder=self.proxy_settings()
        )
        return make_compressor(name, network, ratio=ratio, options=options)

    def noise(self, sharers: int = 1) -> "Noise | None":
        """The noise that a client adds to its clipped update in open rounds; None without differential privacy."""
        from tofu.privacy import Noise

        privacy = self.privacy
        return Noise(privacy.clip_norm, privacy.noise_multiplier, sharers) if privacy.noise_multiplier else None

    def noise_in_sum(self, topology: "Topology", clients: int, *, levels: int, values: int) -> "Noise | None":
        """A client's part of the noise in the sum of a secure round with at least threshold many clients.

        Raises:
            SettingError: too few levels for this noise.
        """
        from tofu.privacy import Noise

        privacy, secure = self.privacy, self.secure
        if not privacy.noise_multiplier:
            return None
        honest = topology.honest(clients, secure.secagg_collusion_fraction)
        try:
            return Noise.on_ring(privacy.clip_norm, privacy.noise_multiplier, honest, levels=levels, values=values)
        except SettingError as error:
            wanted = f"less with noise-multiplier {privacy.noise_multiplier:g}, whose noise needs more bits per entry"
            raise SettingError("secure-ratio", secure.secure_ratio, wanted) from error

    def coarse(self, levels: int) -> bool:
        """Whether secure rounds with this number of levels round to the nearest (`tofu.secagg.encoding`)."""
        from tofu.secagg.encoding import FEW_LEVELS

        return levels < FEW_LEVELS and self.codec.error_feedback == 1 and not self.privacy.noise_multiplier

    def topology(self, clients: int) -> "Topology":
        """The graph of neighbors in a secure round. Raises SettingError if no graph is safe."""
        from tofu.secagg.graph import COMPLETE_UP_TO, choose_topology

        complete = _COMPLETE_WITH_IDENTITIES if self.secure.secure_identities else COMPLETE_UP_TO
        dropout, corrupted = self.secure.secagg_dropout_fraction, self.secure.secagg_collusion_fraction
        return choose_topology(clients, dropout=dropout, corrupted=corrupted, complete_up_to=complete)


_GROUPS: dict[str, type[Group]] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Group)
}
_GROUP_OF = {name: group for group, kind in _GROUPS.items() for name in kind.model_fields}
FIELDS: dict[str, FieldInfo] = {name: field for kind in _GROUPS.values() for name, field in kind.model_fields.items()}
"""Every setting by its name with underscores, in the order of the groups."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def section_of(name: str) -> str:
    """The heading of `--help` under which a setting stands."""
    extra = FIELDS[name].json_schema_extra
    own = extra["section"] if isinstance(extra, dict) else ""
    group: Any = _GROUPS[_GROUP_OF[name]]
    return str(own or group.section)


def separator_of(name: str) -> str:
    """What separates the values of a setting that has several; empty for other settings."""
    extra = FIELDS[name].json_schema_extra
    return str(extra["repeated"]) if isinstance(extra, dict) else ""


def settings_of_section(section: str) -> tuple[str, ...]:
    """Names of the settings in a section; only the proxy codec reads those in "Proxies"."""
    return tuple(name for name in FIELDS if section_of(name) == section)


def parse_setting(name: str, text: str) -> Value:
    """A setting's value from text, as on the command line. Raises SettingError for text of another type."""
    return parse_text(name, FIELDS[name], text)


def accepted_values(name: str) -> tuple[str, ...]:
    """The values of a setting with a choice, for help and completion; empty for other settings."""
    from tofu.compression import compressors

    if name == "compressor":
        return compressors.names()
    if name == "aggregator":
        from tofu.rounds import aggregators

        return aggregators.names()
    if name == "downlink":
        return (*(_WEIGHTS if known == "none" else known for known in compressors.names()),)
    return tuple(map(str, choices_of(FIELDS[name])))


def json_schema() -> dict[str, Any]:
    """A JSON schema of the flat settings, as a TOML file or `flwr run --run-config` holds them."""
    properties: dict[str, Any] = {}
    for kind in _GROUPS.values():
        for name, schema in kind.model_json_schema()["properties"].items():
            cleaned = {key: value for key, value in schema.items() if key not in ("title", "section", "repeated")}
            properties[dashed(name)] = cleaned
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of a TOFU run",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def read_toml(path: Path) -> dict[str, object]:
    """Settings from a TOML file: a flat table, or [tool.flwr.app.config] of a pyproject.

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


def _check_compressor(setting: str, name: str) -> None:
    """A registered name or `package.module:Class`, which is imported only when the compressor is made."""
    names = accepted_values(setting)
    if name not in names and ":" not in name:
        raise SettingError(setting, name, f"one of {', '.join(names)}, or package.module:Class")
