"""The runs of a comparison, determined and checked before any of them starts.

A cell is one compressor at one byte budget; FedAvg is a cell of its own. Every cell is run once for each seed, with the
same settings but for the budget and what `--for` changes. Equal seeds give equal data, initial weights and batches,
because all of these derive from the run's seed alone.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tofu.compression import compressors as registry
from tofu.compression import downlink_compressor, uplink_compressor
from tofu.data import FederatedData
from tofu.errors import SettingError
from tofu.models import initial_model
from tofu.reference_model import ReferenceModel
from tofu.settings import FIELDS, Settings, Value, dashed, parse_setting, section_of
from tofu.settings.deprecated import present_value
from tofu.wire import HEADER_BYTES

FEDAVG = "none"
"""Name of the reference's compressor: no compression."""
TUNING_SEED = 1000
"""The seed of tuning runs is the first seed plus this, so no run that is reported was itself chosen."""
MAX_SEEDS = 1000

# Settings that all runs of a comparison share, or that the cell itself sets.
_SHARED_SECTIONS = ("Data", "Model", "Rounds", "Run")
_SHARED = ("compressor", "ratio", "rounds", "client_fraction", "min_clients", "round_timeout")


@dataclass(frozen=True)
class Tune:
    """A setting that is tuned separately for every cell.

    Attributes:
        name: the field of `Settings`.
        values: to try, in the order given; the first of equally good ones is taken.
        seed: the tuning runs' seed.
    """

    name: str
    values: tuple[Value, ...]
    seed: int

    @property
    def setting(self) -> str:
        """The setting as a user writes it."""
        return self.name.replace("_", "-")


@dataclass(frozen=True)
class Cell:
    """One compressor at one budget.

    Attributes:
        ratios: the ratios asked that this cell answers, ascending; it runs at the first. A method whose payload has the
            same size for several of them is one cell, because it would only be run twice.
        payloads: value of the tuned setting (None without tuning) -> bytes of a payload, header included. Values with
            which the ratio is out of reach are missing.
        float32_bytes: of the update that a payload stands for.
        unreachable: what ratio would be accepted, where no value reaches this one ("" otherwise).
    """

    compressor: str
    ratios: tuple[float, ...]
    payloads: Mapping[Value | None, int] = field(hash=False)
    float32_bytes: int
    unreachable: str = ""

    @property
    def name(self) -> str:
        """As run folders begin."""
        return f"{self.compressor.replace(':', '.')}-{self.ratios[0]:.12g}x"


@dataclass(frozen=True)
class Run:
    """One run of a cell. `value` is that of the tuned setting; `tuning` runs serve only to choose it."""

    cell: Cell
    seed: int
    value: Value | None
    tuning: bool
    settings: Settings

    @property
    def folder(self) -> Path:
        return Path(self.settings.run.run_folder)


@dataclass(frozen=True)
class Comparison:
    """A whole comparison. Build one with `Comparison.of`, which checks everything.

    Attributes:
        shared: settings of all runs; compressor, ratio, seed and run folder are set for each.
        overrides: compressor -> field of `Settings` -> value.
        cells: FedAvg first, then by ratio and in the order of `compressors`, those out of reach included.
    """

    shared: Settings
    compressors: tuple[str, ...]
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    folder: Path
    overrides: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    tune: Tune | None = None
    cells: tuple[Cell, ...] = ()

    @staticmethod
    def of(
        shared: Settings,
        *,
        compressors: str,
        ratios: str,
        seeds: int,
        folder: Path,
        overrides: Sequence[str] = (),
        tune: str = "",
    ) -> "Comparison":
        """Return a comparison from the text of the command line.

        Args:
            compressors, ratios: entries separated by commas.
            seeds: how many, counted up from the seed of `shared`.
            overrides: texts "NAME:setting=value".
            tune: "setting=value,value,..." or "".

        Raises:
            SettingError: anything that would stop a run later, except a ratio out of reach.
            DataError: the data cannot be used.
        """
        if shared.rounds.schedule == "fedavg":
            raise SettingError("schedule", "fedavg", "compressed, switch or plateau (FedAvg is always run as well)")
        if not 1 <= seeds <= MAX_SEEDS:
            raise SettingError("seeds", seeds, f"a whole number from 1 to {MAX_SEEDS}")
        names = _entries("compressors", compressors)
        for name in names:
            if name == FEDAVG or (name not in registry.names() and ":" not in name):
                known = ", ".join(other for other in registry.names() if other != FEDAVG)
                accepted = f"some of {known}, or package.module:Class ({FEDAVG} is always run, as FedAvg)"
                raise SettingError("compressors", name, accepted)
        made = Comparison(
            shared=shared,
            compressors=names,
            ratios=_ratios(ratios),
            seeds=tuple(range(shared.run.seed, shared.run.seed + seeds)),
            folder=folder,
            overrides=_overrides(overrides, names),
            tune=_tune(tune, shared.run.seed),
        )
        for name, changes in made.overrides.items():
            if made.tune and made.tune.name in changes:
                raise SettingError("for", f"{name}:{made.tune.setting}", "a setting that is not tuned")
        return dataclasses.replace(made, cells=made._cells())

    @property
    def reference(self) -> Cell:
        """FedAvg."""
        return self.cells[0]

    @property
    def reachable(self) -> tuple[Cell, ...]:
        """The cells that are run, FedAvg first."""
        return tuple(cell for cell in self.cells if not cell.unreachable)

    def tuning_runs(self, cell: Cell) -> tuple[Run, ...]:
        """Return the runs that choose a cell's value of the tuned setting; none without one."""
        if not self.tune:
            return ()
        return tuple(self._run(cell, self.tune.seed, value, tuning=True) for value in cell.payloads)

    def run(self, cell: Cell, seed: int, value: Value | None = None) -> Run:
        """Return a run whose result is reported, with the value that tuning chose."""
        return self._run(cell, seed, value, tuning=False)

    def _run(self, cell: Cell, seed: int, value: Value | None, *, tuning: bool) -> Run:
        name = f"{cell.name}-seed{seed}"
        if tuning and self.tune:
            name += f"-tune-{self.tune.setting}={_text(value)}"
        settings = self._settings(cell.compressor, cell.ratios[0], seed, value)
        folder = self.folder / name
        former = self.folder / f"full{name.removeprefix(FEDAVG)}"  # FedAvg's folder in earlier versions
        if cell.compressor == FEDAVG and former.is_dir():
            folder = former
        return Run(cell, seed, value, tuning, settings.replace(run_folder=str(folder), checkpoint=False))

    def _settings(self, compressor: str, ratio: float, seed: int, value: Value | None) -> Settings:
        values: dict[str, object] = dict(self.shared.to_config())
        if compressor == FEDAVG:
            values["downlink"] = "full-weights"  # FedAvg compresses neither way, unless it is asked to
        if compressor != "proxy":
            values["codec-mode"] = "smooth"  # of the proxies in the same comparison
        values |= {name.replace("_", "-"): given for name, given in self.overrides.get(compressor, {}).items()}
        if self.tune and value is not None:
            values[self.tune.setting] = value
        if compressor == FEDAVG:
            values["schedule"] = "compressed"  # without compression, and with the server's step of the others
        return Settings.of(values | {"compressor": compressor, "ratio": ratio, "seed": seed})

    def _cells(self) -> tuple[Cell, ...]:
        for seed in (*self.seeds, *((self.tune.seed,) if self.tune else ())):
            self._settings(FEDAVG, 1.0, seed, None)  # the last seeds may be past what a seed can be
        shared = self.shared
        shape = FederatedData.of(shared.data, shared.run.seed).shape
        network = ReferenceModel(initial_model(shared.model, shape, shared.run.seed).eval(), shape)
        cells = [self._cell(FEDAVG, 1.0, network)]
        for ratio in sorted(self.ratios):
            for name in self.compressors:
                cell = self._cell(name, ratio, network)
                same = [i for i, old in enumerate(cells) if old.compressor == name and old.payloads == cell.payloads]
                if same and not cell.unreachable:
                    old = cells[same[0]]
                    cells[same[0]] = dataclasses.replace(old, ratios=(*old.ratios, ratio))
                else:
                    cells.append(cell)
        return tuple(cells)

    def _cell(self, name: str, ratio: float, network: ReferenceModel) -> Cell:
        values: tuple[Value | None, ...] = self.tune.values if self.tune else (None,)
        payloads: dict[Value | None, int] = {}
        unreachable = ""
        for value in values:
            settings = self._settings(name, ratio, self.shared.run.seed, value)
            downlink_compressor(settings, network)  # no cell is worth running if this cannot be made
            try:
                compressor = uplink_compressor(settings, "fedavg" if name == FEDAVG else "compressed", network)
            except SettingError as error:
                if error.field != "ratio":
                    raise
                unreachable = error.accepted
                continue
            payloads[value] = HEADER_BYTES + compressor.body_bytes(network.param_spec)
        return Cell(name, (ratio,), payloads, network.param_spec.float32_bytes, "" if payloads else unreachable)


def _entries(field_: str, text: str) -> tuple[str, ...]:
    entries = tuple(entry.strip() for entry in text.split(","))
    if not all(entries):
        raise SettingError(field_, text, "entries separated by commas")
    for entry in entries:
        if entries.count(entry) > 1:
            raise SettingError(field_, text, f"every entry once ({entry} is there twice)")
    return entries


def _ratios(text: str) -> tuple[float, ...]:
    ratios = []
    for entry in _entries("ratios", text):
        try:
            ratio = float(entry)
        except ValueError:
            raise SettingError("ratios", entry, "numbers of at least 1, separated by commas") from None
        if not (math.isfinite(ratio) and ratio >= 1):
            raise SettingError("ratios", entry, "finite numbers of at least 1, separated by commas")
        ratios.append(ratio)
    if len(set(ratios)) < len(ratios):  # 50 and 50.0
        raise SettingError("ratios", text, "every ratio once")
    return tuple(ratios)


def _overrides(texts: Sequence[str], compressors: Sequence[str]) -> dict[str, dict[str, Value]]:
    overrides: dict[str, dict[str, Value]] = {}
    for text in texts:
        target, equals, raw = text.partition("=")
        compressor, colon, setting = target.rpartition(":")  # a compressor may be package.module:Class
        compressor = present_value("compressor", compressor)
        if not (compressor and colon and setting and equals):
            raise SettingError("for", text, "NAME:setting=value")
        if compressor not in (FEDAVG, *compressors):
            raise SettingError("for", text, f"NAME to be one of {', '.join((FEDAVG, *compressors))}")
        name = _own_setting("for", text, setting)
        changes = overrides.setdefault(compressor, {})
        if name in changes:
            raise SettingError("for", text, "every setting of a compressor once")
        changes[name] = _value("for", text, name, raw)
    return overrides


def _tune(text: str, first_seed: int) -> Tune | None:
    if not text:
        return None
    setting, equals, raw = text.partition("=")
    if not (setting and equals):
        raise SettingError("tune", text, "setting=value,value,...")
    name = _own_setting("tune", text, setting)
    values = tuple(_value("tune", text, name, entry) for entry in _entries("tune", raw))
    if len(set(values)) < max(2, len(values)):
        raise SettingError("tune", text, "at least two values, each once")
    return Tune(name, values, first_seed + TUNING_SEED)


def _own_setting(field_: str, text: str, setting: str) -> str:
    """Return the field of a setting that may differ between the cells of a comparison."""
    name = setting.replace("-", "_")
    if name not in FIELDS:
        try:
            Settings.of({setting: ""})
        except SettingError as error:
            raise SettingError(field_, text, error.accepted) from None
    if name in _SHARED or section_of(name) in _SHARED_SECTIONS:
        raise SettingError(field_, text, f"a setting that may differ between compressors ({setting} may not)")
    return name


def _value(field_: str, text: str, name: str, raw: str) -> Value:
    """Return a setting's value from text, checked as the command line would."""
    try:
        checked = Settings.of({name: parse_setting(name, raw)}).to_config()[dashed(name)]
    except SettingError as error:
        raise SettingError(field_, text, f"{name.replace('_', '-')} to be {error.accepted}") from None
    return checked


def _text(value: object) -> str:
    return f"{value}".lower() if isinstance(value, bool) else f"{value}"
