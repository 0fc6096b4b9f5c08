"""The groups of settings. Each setting is declared here, once: type, choices, bounds, default and help.

A component takes the group that it reads, for example `ServerOptimizer(model, settings.server)`. What users type
(TOML, `flwr run --run-config`, command line) is the flat name of a field with dashes: `local-epochs`.
"""

import math
import re
from typing import ClassVar, Literal

from tofu.settings.fields import Group, comma_list, setting

KINDS = ("compressed", "fedavg", "secure")
"""Kinds of round, in the order of their numbers in messages."""

EMBEDDED_TABLES = ("breast-cancer", "wine")
"""Tables that come with scikit-learn."""
DEVICE_NAME = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
DEVICE_FORMS = "auto, cpu, cuda or cuda:N"
"""Accepted devices; "auto" is cuda if the machine has such a device, and cpu otherwise."""


class DataSettings(Group):
    """Which data there are, and how they are distributed to the clients."""

    section: ClassVar[str] = "Data"

    dataset: str = setting(
        "digits",
        "digits, breast-cancer or wine (embedded), a Hugging Face hub id, or a local folder or file (images, parquet, CSV)",
    )
    partition: Literal["iid", "dirichlet", "shards", "natural"] = setting(
        "dirichlet", "how images or rows are distributed to clients; natural: by client-column"
    )
    alpha: float = setting(0.5, "Dirichlet concentration; smaller is more skewed", gt=0)
    shards_per_client: int = setting(2, "classes per client with partition=shards", ge=1)
    train_images: int = setting(0, "number of training images to use; 0 uses all", ge=0)
    test_images: int = setting(0, "number of test images to use, the same in every run; 0 uses all", ge=0)
    subpopulations: str = setting(
        "", "broader classes as SEEN/UNSEEN labels, for example '0,8/9 3/5'; unseen ones are not trained on"
    )
    test_subpopulations: Literal["unseen", "seen", "all"] = setting(
        "unseen", "with subpopulations: the labels that the server tests on"
    )
    class_names: str = setting(
        "",
        "names of all classes in order, separated by commas (a name with commas in double quotes), if real clients lack some",
    )
    strict: bool = setting(False, "refuse data with an image or row that cannot be read, instead of leaving it out")
    clients: int = setting(10, "number of simulated clients", ge=1, le=100_000)
    resize: str = setting(
        "", "size to which images are resized: HEIGHTxWIDTH, or one number for the shorter side; empty keeps them"
    )
    center_crop: str = setting(
        "", "size that is cut out of the middle after the resize: HEIGHTxWIDTH or one number; empty does not crop"
    )
    gray_bits: int = setting(
        0,
        "significant bits of 16-bit gray images, 8 to 16; auto: 12 if no image of the dataset exceeds 4095, else 16",
        ge=0,
        le=16,
        auto=True,
    )
    normalization: str = setting(
        "-1to1",
        "range of the pixels: -1to1, imagenet, dataset (statistics of the training images), or MEAN/STD of pixels from 0 to 1",
    )
    augmentation: str = setting("", "random changes of training images, separated by commas: flip, crop", repeated=",")
    feature_columns: str = setting(
        "", "columns of a table that are features, separated by commas; * is all columns of numbers"
    )
    text_column: str = setting("", "column of texts to classify, if the dataset holds texts")
    label_column: str = setting(
        "", "column of the classes; empty takes the only one named label, labels, fine_label, target, class or y"
    )
    image_column: str = setting("", "column of the images in parquet files; empty takes the only one")
    client_column: str = setting("", "column that names the client of a row, for partition=natural")
    feature_scaling: Literal["none", "client"] = setting(
        "none", "client: each client scales its features to mean 0 and variance 1"
    )
    vocabulary: int = setting(4096, "number of token ids that the words of a text are hashed to", ge=2, le=1_000_000)
    tokens: int = setting(64, "number of tokens to which a text is cut or padded", ge=1, le=65_535)

    @property
    def kind(self) -> str:
        """What the dataset holds: "images", "table" or "text"."""
        if self.text_column:
            return "text"
        table = self.feature_columns or self.dataset in EMBEDDED_TABLES or self.dataset.endswith(".csv")
        return "table" if table else "images"


MODELS = (
    "lenet5", "mlp", "cnn", "resnet18", "vgg11", "vgg13", "vgg16", "vit_b_16", "vit_tiny", "snn-small", "vgg5-snn",
    "vgg9-snn", "dct-snn-small", "dct-snn-vgg5", "dct-snn-vgg9",
)  # fmt: skip
"""Names of the built-in models, which can be checked before torch is imported."""


class ModelSettings(Group):
    """The network that is trained."""

    section: ClassVar[str] = "Model"

    model: str = setting(
        "mlp",
        f"{', '.join(MODELS)}, or package.module:factory",
    )
    initial_weights: str = setting(
        "",
        "file of initial weights (.safetensors, or a state dict of torch.save), or the folder of a run; all nodes need it",
    )
    norm: Literal["group", "batch", "none"] = setting("group", "normalization layers, if the model has a choice")


class PluginSettings(Group):
    """Plugins of local training, and the stream of tasks for continual learning."""

    section: ClassVar[str] = "Plugins"

    plugins: str = setting(
        "",
        "plugins of local training, separated by commas: crossbar, curvature, dct-snn, gpm, hierarchy, ood, rank, spatio-temporal, trend, or package.module:Class",
        repeated=",",
    )
    plugin_options: str = setting(
        "", "plugin.option=value, separated by spaces; a value may be JSON or @FILE (JSON or TOML)", repeated=" "
    )
    tasks: Literal["none", "classes", "pixels"] = setting(
        "none", "stream of tasks: classes (disjoint sets of classes) or pixels (permutations of the pixels)"
    )
    task_count: int = setting(1, "number of tasks, each with the same number of rounds", ge=1, le=10_000)
    task_order: Literal["same", "own"] = setting(
        "same", "same: all clients learn the tasks in the same order; own: each client in its own order"
    )
    task_heads: Literal["single", "multi"] = setting(
        "single", "multi: predictions are restricted to the classes of the image's task"
    )


class TrainingSettings(Group):
    """Local training."""

    section: ClassVar[str] = "Training"

    rounds: int = setting(20, "number of rounds", ge=1, le=100_000)
    local_epochs: int = setting(5, "epochs over a client's images per round", ge=1)
    batch_size: int = setting(16, "batch size of local training", ge=1)
    lr: float = setting(0.1, "learning rate of the clients' SGD", gt=0, le=1e30)
    lr_final_factor: float = setting(
        1.0, "learning rate of the last round as a fraction of the first (half a cosine)", gt=0, le=1
    )
    lr_schedule: Literal["cosine", "constant", "step"] = setting(
        "cosine",
        "learning rate over the rounds: cosine (half a period, to lr-final-factor), constant, or step (times lr-step-factor every lr-step-rounds)",
    )
    lr_step_rounds: int = setting(10, "rounds between two steps of lr-schedule=step", ge=1)
    lr_step_factor: float = setting(0.5, "factor of each step of lr-schedule=step", gt=0, le=1)
    proximal: float = setting(
        0.0, "coefficient of the proximal term proximal/2 * |w - global w|^2 of local training (FedProx)", ge=0, le=1e6
    )
    local_layers: str = setting(
        "",
        "state-dict names that stay on the client, patterns separated by commas: '*.bn*' (FedBN), 'fc3.*' (a personal head)",
    )
    client_test_fraction: float = setting(
        0.0,
        "fraction of its data on which each client tests the weights it receives, and does not train on; 0 is none",
        ge=0,
        le=0.9,
    )
    momentum: float = setting(0.0, "momentum of the clients' SGD", ge=0, le=0.9999)
    weight_decay: float = setting(0.0, "weight decay of the clients' SGD", ge=0)

    def lr_of(self, round_: int) -> float:
        """Return the learning rate of a round, counted from 1."""
        if self.lr_schedule == "constant":
            return self.lr
        if self.lr_schedule == "step":
            return self.lr * self.lr_step_factor ** ((round_ - 1) // self.lr_step_rounds)
        progress = (round_ - 1) / max(1, self.rounds - 1)
        factor = self.lr_final_factor + (1 - self.lr_final_factor) * (1 + math.cos(math.pi * progress)) / 2
        return self.lr * factor


class RoundSettings(Group):
    """Which round is of which kind."""

    section: ClassVar[str] = "Rounds"

    schedule: str = setting(
        "compressed",
        "compressed: compressed rounds; fedavg: float32 rounds; secure: rounds with secure aggregation; switch: recovery rounds from switch-round on; plateau: recovery rounds once the accuracy stalls",
    )
    recovery: Literal["secure", "fedavg"] = setting(
        "secure",
        "kind of the rounds that recover what compression lost: secure (the server learns only the sum) or fedavg (float32)",
    )
    switch_round: int = setting(
        0, "first recovery round with schedule=switch; auto: the last tenth of the rounds", ge=0, auto=True
    )
    plateau_patience: int = setting(3, "rounds without gain before schedule=plateau switches", ge=1)
    plateau_gain: float = setting(0.002, "accuracy gain that counts for schedule=plateau", ge=0)


class CodecSettings(Group):
    """How clients compress their updates. The settings under "Proxies" concern the proxy codec only."""

    section: ClassVar[str] = "Codec"

    compressor: str = setting("proxy", "compressor of compressed rounds")
    ratio: float = setting(100.0, "compression ratio: bytes of the update as float32 over bytes of the payload", ge=1)
    error_feedback: float = setting(
        1.0,
        "fraction of the compression error that is added to the client's next update; 0 disables error feedback",
        ge=0,
        le=1,
    )
    residual_half_life: float = setting(
        0.0, "missed rounds after which a client's compression error counts half; 0: it does not age", ge=0
    )
    over_relaxation: float = setting(
        0.0,
        "factor of decoded updates that error feedback accounts for, 1 to 2; with compressor=proxy it applies to the correction; auto: 1 + 0.8 times the fraction of variance that a message misses",
        ge=0,
        lt=2,
        auto=True,
    )
    step_ahead: float = setting(
        0.5,
        "fraction of a client's compression error that is added to the weights local training starts from; none with differential privacy, codec-mode=paper, server-optimizer=ef21 or a plugin that restricts steps",
        ge=0,
        le=1,
    )
    step_ahead_final_factor: float = setting(
        1.0, "step-ahead of the last round as a fraction of the first; linear in between", ge=0, le=1
    )
    codec_mode: Literal["smooth", "paper"] = setting(
        "smooth", "smooth: our codec; paper: as published, for which the settings below are fixed", section="Proxies"
    )
    proxies: int = setting(
        0, "number of proxies; auto derives it from the ratio", ge=0, le=65535, section="Proxies", auto=True
    )
    proxy_size: int = setting(0, "side of a proxy in pixels", ge=0, le=1024, section="Proxies", auto=True)
    correction: float = setting(
        0.4,
        "minimum fraction of the payload for a sparse correction of the largest errors; 0 sends proxies only, 1 no proxies",
        ge=0,
        le=1,
        section="Proxies",
    )
    proxies_below: float = setting(
        0.33,
        "with error feedback, search for proxies only where the correction alone explains less than this fraction of an update, and send the correction otherwise; 1 always searches",
        ge=0,
        le=1,
        section="Proxies",
    )
    bits: Literal[2, 3, 4, 5, 6, 8, 16, 32] = setting(4, "bits per pixel and per label", section="Proxies")
    surrogate: bool = setting(True, "differentiate a smooth surrogate of the network", section="Proxies")
    surrogate_beta: float = setting(
        0.0,
        "sharpness of the surrogate's activations; auto tries several in every fourth round",
        ge=0,
        le=1000,
        section="Proxies",
        auto=True,
    )
    batch_statistics: bool = setting(
        True, "BatchNorm of the surrogate uses the statistics of the proxies", section="Proxies"
    )
    free_labels: bool = setting(
        True, "unconstrained labels, found by least squares; otherwise probabilities", section="Proxies"
    )
    tensor_scales: bool = setting(True, "one scale per tensor; otherwise one for all", section="Proxies")
    warm_start: bool = setting(False, "start the search from the client's last proxies", section="Proxies")
    max_evals: int = setting(
        45,
        "maximum number of gradient evaluations per encode, without the trials for surrogate-beta=auto",
        ge=1,
        le=100_000,
        section="Proxies",
    )
    tolerance: float = setting(
        0.002,
        "stop an encode that gains less explained variance in 10 evaluations; 0 never stops",
        ge=0,
        section="Proxies",
    )


class DownlinkSettings(Group):
    """How the server sends the global model."""

    section: ClassVar[str] = "Codec"

    downlink: str = setting(
        "full-weights",
        "full-weights, or the compressor of the server's steps; clients that missed too many steps receive the full weights",
    )
    downlink_ratio: float = setting(25.0, "compression ratio of the server's steps", ge=1)


class SecureSettings(Group):
    """Rounds with secure aggregation."""

    section: ClassVar[str] = "Secure rounds"

    secure_ratio: float = setting(
        4.0,
        "bytes of the update as float32 over bytes of the masked vector; high ratios send a part of the coordinates per round",
        ge=1,
        le=1000,
    )
    secagg_dropout_fraction: float = setting(
        0.2, "maximum fraction of clients that may drop out of a secure round", ge=0, le=0.9
    )
    secagg_collusion_fraction: float = setting(
        0.1, "maximum fraction of clients that may collude with the server", ge=0, le=0.9
    )
    secure_timeout: float = setting(120.0, "seconds for each exchange of a secure round, except training", gt=0)
    secure_identities: str = setting(
        "",
        "file of the clients' public keys (`tofu deploy identities`); without it the server is trusted to follow the protocol",
    )


class PrivacySettings(Group):
    """Differential privacy on the client level."""

    section: ClassVar[str] = "Privacy"

    noise_multiplier: float = setting(
        0.0, "standard deviation of the noise over clip-norm; 0 disables differential privacy", ge=0, le=1e6
    )
    clip_norm: float = setting(1.0, "L2 norm to which a client's update is clipped", gt=0, le=1e9)
    clip_quantile: float = setting(
        0.0,
        "with noise-multiplier, clip-norm is that of the first round and then follows this quantile of the updates' norms; 0: it is fixed",
        ge=0,
        lt=1,
    )
    clip_lr: float = setting(0.2, "step of the clip norm's logarithm towards clip-quantile", gt=0, le=10)
    clip_budget: float = setting(
        0.01, "fraction of the privacy budget for the noised count of clipped clients, with clip-quantile", gt=0, le=0.5
    )
    server_noise: Literal["none", "independent", "correlated"] = setting(
        "none",
        "noise that the server adds to the sum of updates, instead of the clients: epsilon then holds against those who see the models, not against the server",
    )
    min_separation: int = setting(
        1,
        "with server-noise, a client takes part at most once in so many rounds in succession; correlated noise has as many bands",
        ge=1,
        le=1000,
    )
    privacy_delta: float = setting(
        1e-5, "delta of the (epsilon, delta) guarantee; well below one over the number of clients", gt=0, le=0.1
    )
    max_epsilon: float = setting(0.0, "epsilon at which the run stops; 0 is no limit", ge=0)
    secret_sampling: bool = setting(
        False,
        "draw each round's clients from the operating system's generator and record model-epsilon, which holds against those who see the models only",
    )

    @property
    def client_multiplier(self) -> float:
        """The noise multiplier of the noise that clients add; 0 if the server adds it."""
        return self.noise_multiplier if self.server_noise == "none" else 0.0

    @property
    def count_fraction(self) -> float:
        """Fraction of the budget for the count of clipped clients; 0 with a fixed clip norm."""
        return self.clip_budget if self.clip_quantile else 0.0

    def joint_norm(self, norm: float) -> float:
        """Return the norm of an update, clipped to `norm`, together
        with the report for the count of clipped clients.
        """
        return norm / math.sqrt(1 - self.count_fraction)


class ServerSettings(Group):
    """Sampling of clients, and the server's optimizer."""

    section: ClassVar[str] = "Server"

    client_fraction: float = setting(1.0, "fraction of the available clients sampled in each round", gt=0, le=1)
    over_sampling: float = setting(
        1.0,
        "clients asked in a round over the number of replies after which it ends; late ones are left out",
        ge=1,
        le=100,
    )
    min_clients: int = setting(1, "minimum number of clients to wait for and to sample", ge=1)
    round_timeout: float = setting(
        3600.0, "seconds until a round continues without the clients that have not replied", gt=0
    )
    straggler_factor: float = setting(
        5.0,
        "a round ends without silent clients after so many times the median round, at least 30 s; 0: round-timeout alone",
        ge=0,
    )
    suspend_after: int = setting(
        2,
        "rounds in a row without a reply after which a client is not asked for some rounds; 0: it is always asked",
        ge=0,
    )
    aggregator: str = setting(
        "mean",
        "how open rounds combine updates: mean, norm-clip, median, trimmed-mean, multi-krum, centered-clip, "
        "or package.module:Class",
    )
    malicious_fraction: float = setting(
        0.2, "fraction of malicious clients that trimmed-mean and multi-krum tolerate", ge=0, lt=0.5
    )
    max_update_norm: float = setting(
        0.0, "in open rounds the server scales longer updates down to this L2 norm; 0: no limit", ge=0, le=1e9
    )
    max_example_ratio: float = setting(
        10.0,
        "a client's weight in open rounds is at most so many times the median number of examples; 0 disables it",
        ge=0,
    )
    server_optimizer: str = setting("sgd", "optimizer that applies the average update")
    server_lr: float = setting(
        0.0,
        "learning rate of the server's optimizer; auto: 1, and from 1 to 3 by the diversity of the updates in compressed rounds with server-optimizer=sgd",
        ge=0,
        auto=True,
    )
    ef21_momentum: float = setting(
        1.0, "weight of a round's progress in a client's direction, with server-optimizer=ef21", gt=0, le=1
    )
    server_momentum: float = setting(0.9, "momentum with server-optimizer=momentum", ge=0, le=0.9999)
    ema_decay: float = setting(
        0.5,
        "decay of an exponential moving average of the global weights, which is evaluated and saved; 0 disables it",
        ge=0,
        le=0.999,
    )


class LinkSettings(Group):
    """Simulated links of the clients: bytes become seconds in the records and the report; nothing waits."""

    section: ClassVar[str] = "Links"

    uplink_mbps: float = setting(
        0.0, "median rate of the clients' simulated uplinks in Mbit/s; 0 is not simulated", ge=0
    )
    downlink_mbps: float = setting(
        0.0, "median rate of the clients' simulated downlinks in Mbit/s; 0 is not simulated", ge=0
    )
    link_spread: float = setting(
        0.0, "standard deviation of the logarithm of a client's rates; 0 gives all clients the median", ge=0, le=5
    )
    link_latency: float = setting(0.0, "seconds that a message takes in addition", ge=0, le=3600)


class RunSettings(Group):
    """How and where a run is executed, and what it writes."""

    section: ClassVar[str] = "Run"

    seed: int = setting(0, "seed of all random numbers", ge=0, le=2**31 - 1)
    device: str = setting(
        "cpu",
        "device of training, encoding and evaluation: cpu, cuda, cuda:N or auto; a client's node config overrides it",
    )
    threads: int = setting(1, "threads per client; results are bit-identical only for equal values", ge=1, le=1024)
    workers: int = setting(2, "number of clients that `tofu run` trains in parallel", ge=1, le=1024)
    record_clients: str = setting(
        "",
        "clients, separated by commas, whose messages are stored for `tofu attack`; the files are as sensitive as their data",
    )
    checkpoint: bool = setting(
        True, "write a checkpoint after every round; the last one of a finished run serves --resume with more --rounds"
    )
    resume: str = setting(
        "", "folder of an interrupted run to resume, or of a finished one to continue with more rounds"
    )
    run_folder: str = setting("", "folder for the results; empty creates one under runs/")
    report_images: bool = setting(
        False, "show real images next to the proxies in the report: test images, in a simulation also a client's own"
    )
    log: Literal["text", "json"] = setting(
        "text", "format of standard error: text (progress) or json (one JSON object per line)"
    )
    metrics_port: int = setting(
        0, "port on 127.0.0.1 that serves the metrics to Prometheus during the run; 0 is none", ge=0, le=65535
    )
    tracker: str = setting(
        "",
        "experiment trackers, separated by commas: tensorboard, mlflow, wandb, trackio, or package.module:Class",
        repeated=",",
    )

    @property
    def recorded(self) -> tuple[str, ...]:
        """Names of the clients whose messages are stored."""
        return comma_list(self.record_clients)
