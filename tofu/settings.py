"""Every setting of a run, in one place: name, default, what is accepted, and what it means.

The names in pyproject.toml, in a TOML file and on the command line are those of the fields with dashes for underscores.
"""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tofu.codec.options import BITS, CompressorOptions, ProxySettings, paper_settings
from tofu.compression import compressors, make_compressor
from tofu.compression.base import Compressor
from tofu.data import FederatedData, ImageShape, open_data
from tofu.device import DEVICES, NAMES
from tofu.errors import SettingError
from tofu.log import STYLES
from tofu.plugins import Plugins, RoundContext, RunRequirements, make_plugins, plugin_names
from tofu.privacy import Noise
from tofu.reference_model import ReferenceModel
from tofu.secagg.encoding import FEW_LEVELS
from tofu.secagg.graph import COMPLETE_UP_TO, Topology, choose_topology
from tofu.tasks import ORDERS, STREAMS, TaskStream

Value = bool | int | float | str

MIN_SECURE = 3
"""Clients of a secure round: of two, each would know the other's update from the sum."""

_COMPLETE_WITH_IDENTITIES = 256
"""Against a server that lies a sparse graph guarantees less (`tofu.secagg.graph`), so it is left to larger rounds."""


def _setting(default: Value, help_: str, *, section: str, choices: tuple[str, ...] = (), least: float | None = None,
             above: float | None = None, most: float | None = None) -> Any:  # fmt: skip
    metadata = {"help": help_, "section": section, "choices": choices, "least": least, "above": above, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run. Build one with `Settings.of`, which checks everything.

    See the fields' metadata (or `tofu run --help`) for what each means.
    """

    # fmt: off
    dataset: str = _setting("digits", "digits (embedded), a Hugging Face hub id, or a local folder (parquet or images)", section="Data")
    partition: str = _setting("dirichlet", "how images are dealt to clients", section="Data", choices=("iid", "dirichlet", "shards"))
    alpha: float = _setting(0.5, "Dirichlet concentration; smaller is more skewed", section="Data", above=0)
    shards_per_client: int = _setting(2, "classes a client sees with partition=shards", section="Data", least=1)
    train_images: int = _setting(0, "use only so many training images; 0 is all", section="Data", least=0)
    test_images: int = _setting(0, "test on only so many of the test images, the same in every run; 0 is all", section="Data", least=0)
    class_names: str = _setting("", "names of all classes in order, separated by commas, for real clients whose folders lack some", section="Data")
    clients: int = _setting(10, "number of simulated clients", section="Data", least=1, most=100_000)

    model: str = _setting("mlp", "lenet5, mlp, cnn, resnet18, vgg11, vgg13, vgg16, vit_b_16, vit_tiny, or package.module:factory", section="Model")
    norm: str = _setting("group", "normalization layers, where the model has a choice", section="Model", choices=("group", "batch", "none"))

    plugins: str = _setting("", f"techniques that bend local training: {', '.join(plugin_names())}, or package.module:Class, separated by commas", section="Plugins")
    plugin_options: str = _setting("", "plugin.option=value, separated by spaces", section="Plugins")
    tasks: str = _setting("none", "a stream of tasks: classes: each has some of the classes; pixels: each permutes the pixels in its own way", section="Plugins", choices=STREAMS)
    task_count: int = _setting(1, "how many tasks, of equally many rounds each", section="Plugins", least=1, most=10_000)
    task_order: str = _setting("same", "same: all clients learn the tasks in the same order; own: each in its own", section="Plugins", choices=ORDERS)
    task_heads: str = _setting("single", "multi: a task's images are told apart among that task's classes only", section="Plugins", choices=("single", "multi"))

    rounds: int = _setting(20, "number of rounds", section="Training", least=1, most=100_000)
    local_epochs: int = _setting(5, "epochs over a client's own images in each round", section="Training", least=1)
    batch_size: int = _setting(16, "images in a local step", section="Training", least=1)
    lr: float = _setting(0.1, "step size of the clients' SGD", section="Training", above=0)
    lr_final_factor: float = _setting(1.0, "step size of the last round as a share of the first; it falls along half a cosine", section="Training", above=0, most=1)
    momentum: float = _setting(0.0, "momentum of the clients' SGD", section="Training", least=0, most=0.9999)
    weight_decay: float = _setting(0.0, "weight decay of the clients' SGD", section="Training", least=0)

    schedule: str = _setting("proxy", "proxy: compressed rounds; full: float32 rounds (FedAvg); secure: encrypted rounds; switch: recovery from switch-round on; plateau: recovery once accuracy stalls", section="Rounds", choices=("proxy", "full", "secure", "switch", "plateau"))
    recovery: str = _setting("secure", "rounds that recover what compression lost: secure: the server learns the sum alone; full: float32", section="Rounds", choices=("secure", "full"))
    switch_round: int = _setting(0, "first recovery round with schedule=switch; 0 is the last tenth of the rounds", section="Rounds", least=0)
    plateau_patience: int = _setting(3, "rounds without gain before schedule=plateau switches", section="Rounds", least=1)
    plateau_gain: float = _setting(0.002, "the accuracy gain that counts for schedule=plateau", section="Rounds", least=0)

    compressor: str = _setting("proxy", "what compressed rounds send", section="Codec", choices=compressors.names())
    ratio: float = _setting(100.0, "float32 bytes of an update over bytes of its payload", section="Codec", least=1)
    codec_mode: str = _setting("smooth", "smooth: our codec; paper: as published; the settings below refine smooth", section="Proxies", choices=("smooth", "paper"))
    proxies: int = _setting(0, "number of proxies; 0 is what the ratio affords", section="Proxies", least=0, most=65535)
    proxy_size: int = _setting(0, "side of a proxy in pixels; 0 chooses", section="Proxies", least=0, most=1024)
    correction: float = _setting(0.4, "least share of a payload for the largest entries that its proxies missed; 0 sends proxies alone, 1 sends none", section="Proxies", least=0, most=1)
    bits: int = _setting(4, "bits of a pixel and of a label", section="Proxies", choices=tuple(map(str, BITS)))
    surrogate: bool = _setting(True, "differentiate the smooth twin in place of the network", section="Proxies")
    surrogate_beta: float = _setting(0.0, "of the twin's activations; 0 tries a few, every fourth time", section="Proxies", least=0, most=1000)
    batch_statistics: bool = _setting(True, "the twin's BatchNorm uses the proxies' statistics", section="Proxies")
    free_labels: bool = _setting(True, "unconstrained labels, solved for, in place of probabilities", section="Proxies")
    tensor_scales: bool = _setting(True, "a scale per tensor in place of one", section="Proxies")
    warm_start: bool = _setting(False, "begin from the client's last proxies", section="Proxies")
    max_evals: int = _setting(100, "most max_evals that one encode may take, beside those of a trial of the surrogate_beta", section="Proxies", least=1, most=100_000)
    tolerance: float = _setting(0.002, "stop an encode that gains less explained variance in 10 max_evals; 0 never", section="Proxies", least=0)
    error_feedback: float = _setting(1.0, "share of what compression lost that is added to the client's next update; 0 keeps nothing", section="Codec", least=0, most=1)

    downlink: str = _setting("full", "what the server sends: full: the weights; else: its step by this compressor, and the weights only to clients that missed too many", section="Codec", choices=compressors.names())
    downlink_ratio: float = _setting(25.0, "float32 bytes of the weights over bytes of a step's payload", section="Codec", least=1)

    secure_ratio: float = _setting(4.0, "float32 bytes of an update over bytes of its masked vector; where too few bits an entry are left, some of the entries are sent, and the others later", section="Secure rounds", least=1, most=1000)
    secagg_dropout_fraction: float = _setting(0.2, "share of the clients that may drop out of a secure round", section="Secure rounds", least=0, most=0.9)
    secagg_collusion_fraction: float = _setting(0.1, "share of the clients that may be in league with the server", section="Secure rounds", least=0, most=0.9)
    secure_timeout: float = _setting(120.0, "seconds for each exchange of a secure round but the training", section="Secure rounds", above=0)
    secure_identities: str = _setting("", "file of the clients' public keys, as `python -m deploy.identities` writes; empty trusts the server not to lie", section="Secure rounds")

    noise_multiplier: float = _setting(0.0, "differential privacy: deviation of the noise over clip-norm; 0 is off", section="Privacy", least=0, most=1e6)
    clip_norm: float = _setting(1.0, "differential privacy: L2 norm that a client's update is cut to", section="Privacy", above=0, most=1e9)
    privacy_delta: float = _setting(1e-5, "chance that the bound fails; well below one over the clients", section="Privacy", above=0, most=0.1)
    max_epsilon: float = _setting(0.0, "epsilon at which the run stops; 0 is no limit", section="Privacy", least=0)

    fraction: float = _setting(1.0, "share of the available clients asked in each round", section="Server", above=0, most=1)
    min_clients: int = _setting(1, "wait for, and ask, at least so many clients", section="Server", least=1)
    round_timeout: float = _setting(3600.0, "seconds until a round goes on without the clients that have not replied", section="Server", above=0)
    server_optimizer: str = _setting("plain", "what the server does with the average update", section="Server", choices=("plain", "momentum", "adam"))
    server_lr: float = _setting(1.0, "step size of the server's optimizer", section="Server", above=0)
    server_momentum: float = _setting(0.9, "of server-optimizer=momentum", section="Server", least=0, most=0.9999)

    ema_decay: float = _setting(0.5, "share of the past in a running average of the global weights, which is then what is evaluated and saved; 0 is off", section="Server", least=0, most=0.999)

    seed: int = _setting(0, "everything random follows from it", section="Run", least=0, most=2**31 - 1)
    device: str = _setting("cpu", "where local steps, encodes and evaluation run: cpu, cuda, cuda:N, or auto, the GPU where there is one; a client's node config may say another", section="Run")
    threads: int = _setting(1, "threads of one client; results are bit-identical only for equal values", section="Run", least=1, most=1024)
    workers: int = _setting(2, "clients that `tofu run` trains at a time", section="Run", least=1, most=1024)
    record: str = _setting("", "names of clients, separated by commas, whose messages are kept as the server sees them, for `tofu attack`: as sensitive as their data", section="Run")
    checkpoint: bool = _setting(True, "keep all that the run needs to go on, after every round, until it ends", section="Run")
    resume: str = _setting("", "folder of a run that did not end, to go on with", section="Run")
    run_folder: str = _setting("", "folder for the results; empty makes one under runs/", section="Run")
    log: str = _setting("text", "what the apps write to standard error: text: progress, for people; json: one JSON object a line, for machines", section="Run", choices=STYLES)
    metrics_port: int = _setting(0, "port of 127.0.0.1 at which Prometheus finds the run's metrics while it goes on, beside the file metrics.prom; 0 is none", section="Run", least=0, most=65535)
    # fmt: on

    @staticmethod
    def of(values: Mapping[str, object]) -> "Settings":
        """Settings from names (dashes or underscores) and values; the defaults fill in what is missing.

        Raises:
            SettingError: an unknown name, a value of the wrong type or out of range, or two that contradict.
        """
        fields = {field.name: field for field in dataclasses.fields(Settings)}
        clean: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in fields:
                raise SettingError(key, value, f"a known setting ({', '.join(_near(key, fields))})")
            clean[name] = _checked(fields[name], value)
        settings = Settings(**clean)
        if settings.schedule == "switch" and settings.switch_round > settings.rounds:
            raise SettingError("switch-round", settings.switch_round, f"at most rounds, {settings.rounds}")
        if settings.min_clients > settings.clients:
            raise SettingError("min-clients", settings.min_clients, f"at most clients, {settings.clients}")
        if settings.proxy_size == 1:
            raise SettingError("proxy-size", 1, "0 (chooses) or 2 to 1024 pixels")
        if settings.tasks == "none" and settings.task_count > 1:
            raise SettingError("task-count", settings.task_count, "1 with tasks=none")
        if settings.rounds % settings.task_count:
            raise SettingError("task-count", settings.task_count, f"a divisor of rounds, {settings.rounds}")
        settings.make_plugins().check(
            RunRequirements(
                clients=settings.clients,
                tasks=settings.task_count,
                exact_updates=settings.schedule == "full",
                secure=settings.has_secure_rounds,
            )
        )
        if settings.noise_multiplier and settings.plugins:
            raise SettingError("plugins", settings.plugins, "none with noise-multiplier: what they sum has no noise")
        if settings.max_epsilon and not settings.noise_multiplier:
            raise SettingError("max-epsilon", settings.max_epsilon, "0 without noise-multiplier")
        if settings.has_secure_rounds and settings.clients < MIN_SECURE:
            raise SettingError("clients", settings.clients, f"at least {MIN_SECURE} for secure rounds")
        if not NAMES.fullmatch(settings.device):
            raise SettingError("device", settings.device, DEVICES)
        settings.proxy_settings()
        return settings

    @property
    def has_secure_rounds(self) -> bool:
        """Whether a round may be a secure one."""
        return self.schedule == "secure" or (self.schedule in ("switch", "plateau") and self.recovery == "secure")

    def to_config(self) -> dict[str, Value]:
        """Name with dashes -> value, as Flower's run config holds it."""
        return {field.name.replace("_", "-"): getattr(self, field.name) for field in dataclasses.fields(self)}

    def proxy_settings(self) -> ProxySettings:
        """The codec's part of the settings."""
        common: dict[str, Any] = {"size": self.proxy_size, "bits": self.bits, "device": self.device}
        if self.codec_mode == "paper":
            return paper_settings(**common)
        return ProxySettings(
            smooth=self.surrogate,
            surrogate_beta=self.surrogate_beta,
            batch_statistics=self.surrogate and self.batch_statistics,
            labels="free" if self.free_labels else "simplex",
            scale="tensor" if self.tensor_scales else "one",
            max_evals=self.max_evals,
            tolerance=self.tolerance,
            warm_start=self.warm_start,
            **common,
        )

    def lr_of(self, round_: int) -> float:
        """The clients' step size in a round, counted from 1."""
        progress = (round_ - 1) / max(1, self.rounds - 1)
        share = self.lr_final_factor + (1 - self.lr_final_factor) * (1 + math.cos(math.pi * progress)) / 2
        return self.lr * share

    def open_data(self) -> FederatedData:
        """The run's dataset, dealt to the clients. Raises DataError or SettingError where it cannot be."""
        return open_data(
            self.dataset,
            clients=self.clients,
            partition=self.partition,
            alpha=self.alpha,
            shards_per_client=self.shards_per_client,
            train_images=self.train_images,
            test_images=self.test_images,
            seed=self.seed,
        )

    @property
    def recorded(self) -> tuple[str, ...]:
        """Names of the clients whose messages are kept."""
        return tuple(filter(None, (name.strip() for name in self.record.split(","))))

    def make_plugins(self) -> Plugins:
        """The plugins, new and without state."""
        return make_plugins(self.plugins, self.plugin_options)

    def round_context(self, shape: ImageShape, round_: int, client: str = "") -> RoundContext:
        """Where in the run a round is, as plugins are told."""
        each = self.rounds // self.task_count
        return RoundContext(
            shape,
            round=round_,
            rounds=self.rounds,
            task=(round_ - 1) // each,
            tasks=self.task_count,
            final=round_ % each == 0,
            client=client,
            seed=self.seed,
        )

    def task_stream(self, classes: int) -> TaskStream:
        """The run's tasks over a dataset of so many classes. Raises SettingError where there are more than these."""
        return TaskStream(self.tasks, self.task_count, classes, self.seed, self.task_order)

    def make_compressor(self, kind: str, network: ReferenceModel) -> Compressor:
        """The compressor of a round of this kind ("proxy" or "full"; a secure round has none) for this network."""
        name = "full" if kind == "full" else self.compressor
        return self._make(name, network, ratio=self.ratio, count=self.proxies)

    def noise(self, sharers: int = 1) -> Noise | None:
        """What a client adds to its clipped update where the server sees it; None without differential privacy."""
        return Noise(self.clip_norm, self.noise_multiplier, sharers) if self.noise_multiplier else None

    def noise_in_sum(self, topology: Topology, clients: int, *, levels: int, values: int) -> Noise | None:
        """A client's part of the noise in a secure round's sum, which may be of no more clients than the threshold.

        Raises:
            SettingError: too few levels for so much noise.
        """
        if not self.noise_multiplier:
            return None
        honest = max(1, topology.threshold - math.floor(self.secagg_collusion_fraction * clients))
        try:
            return Noise.on_ring(self.clip_norm, self.noise_multiplier, honest, levels=levels, values=values)
        except SettingError as error:
            wanted = f"less with noise-multiplier {self.noise_multiplier:g}, whose noise needs more bits an entry"
            raise SettingError("secure-ratio", self.secure_ratio, wanted) from error

    def coarse(self, levels: int) -> bool:
        """Whether secure rounds of so many levels are coarse (`tofu.secagg.encoding`)."""
        return levels < FEW_LEVELS and self.error_feedback == 1 and not self.noise_multiplier

    def topology(self, clients: int) -> Topology:
        """Who is whose neighbor in a secure round of so many clients. Raises SettingError where no graph is safe."""
        complete = _COMPLETE_WITH_IDENTITIES if self.secure_identities else COMPLETE_UP_TO
        dropout, corrupted = self.secagg_dropout_fraction, self.secagg_collusion_fraction
        return choose_topology(clients, dropout=dropout, corrupted=corrupted, complete_up_to=complete)

    def make_downlink(self, network: ReferenceModel) -> Compressor | None:
        """The compressor of the server's steps, or None where it sends its weights whole."""
        if self.downlink == "full":
            return None
        return self._make(self.downlink, network, ratio=self.downlink_ratio, count=0)

    def _make(self, name: str, network: ReferenceModel, *, ratio: float, count: int) -> Compressor:
        correction = 0.0 if self.codec_mode == "paper" else self.correction
        options = CompressorOptions(proxies=count, correction=correction, encoder=self.proxy_settings())
        return make_compressor(name, network, ratio=ratio, options=options)


def settings_of_section(section: str) -> tuple[str, ...]:
    """Names of the fields of a section; "Proxies" are those that nothing but the proxy codec looks at."""
    return tuple(field.name for field in dataclasses.fields(Settings) if field.metadata["section"] == section)


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


def _checked(field: "dataclasses.Field[Any]", value: object) -> Value:
    name, meta = field.name.replace("_", "-"), field.metadata
    kind = field.type
    assert isinstance(kind, type)
    if kind is float and type(value) is int and abs(value) < 2**63:  # what does not fit a float is no number to us
        value = float(value)
    if type(value) is not kind:
        raise SettingError(
            name, value, {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")
        )
    assert isinstance(value, Value)
    if isinstance(value, str | int) and meta["choices"] and str(value) not in meta["choices"]:
        raise SettingError(name, value, f"one of {', '.join(meta['choices'])}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        least, above, most = meta["least"], meta["above"], meta["most"]
        low = (least is None or value >= least) and (above is None or value > above)
        if not (low and (most is None or value <= most) and abs(value) < float("inf")):
            bounds = [f"at least {least:g}" if least is not None else "", f"above {above:g}" if above is not None else "",
                      f"at most {most:g}" if most is not None else ""]  # fmt: skip
            raise SettingError(name, value, "a finite number " + ", ".join(b for b in bounds if b))
    return value


def _near(key: str, fields: Mapping[str, object]) -> list[str]:
    import difflib

    names = [name.replace("_", "-") for name in fields]
    return difflib.get_close_matches(key.replace("_", "-"), names, n=3, cutoff=0.5) or ["see `tofu run --help`"]
