"""Run all attacks on all messages in all scenarios, and summarize the trials.

A folder keeps a JSON file and the images of each finished trial, so an interrupted evaluation resumes where it stopped;
`attacks.json` holds all trials and the summary.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from scipy.stats import combine_pvalues

from attacks.base import Watch, registry
from attacks.messages import parse_message
from attacks.observation import Observation
from attacks.trials import AttackResult, Scenario, TrialRunner
from tofu.errors import SettingError
from tofu.files import replace_arrays, replace_file
from tofu.formatting import format_count

CONTROL = "exact"
BROKEN = 30.0
"""dB of mean PSNR from which a control counts as broken: images that look like the originals."""

TIME_LIMIT, INTERRUPTED = "time limit", "Ctrl-C"
"""Reasons why an attack was not started."""

Row = dict[str, Any]
"""Record of a trial: the scenario's fields, message, attack, scores, loss, evals, payload_bytes, refused.

The row of an attack that was not started has no scores, and the reason in the field `not_started`.
"""

SCENARIO_FIELDS = ("dataset", "model", "norm", "lr", "pretrain_rounds", "batch_size", "steps", "rounds", "know_labels")


@dataclass(frozen=True)
class AttackEvaluation:
    """The trials to run: all combinations of the elements of the tuples.

    Attributes:
        seconds: time limit of one attack.
        seeds: number of seeds, 0, 1, ...
    """

    dataset: str = "digits"
    model: str = "lenet-smooth"
    norm: str = "group"
    lr: float = 0.1
    messages: tuple[str, ...] = (CONTROL, "proxy:smooth:100", "proxy:paper:100")
    attacks: tuple[str, ...] = ("idlg", "codec-aware", "label-counts")
    batch_sizes: tuple[int, ...] = (1, 4)
    pretrain_rounds: tuple[int, ...] = (0,)
    steps: tuple[int, ...] = (1,)
    seeds: int = 3
    rounds: int = 1
    know_labels: bool = False
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for message in self.messages:
            parse_message(message)
        for attack in self.attacks:
            registry.get(attack)
        for name, minimum in (("batch_sizes", 1), ("pretrain_rounds", 0), ("steps", 1)):
            values: Sequence[int] = getattr(self, name)
            if not values or min(values) < minimum:
                raise SettingError(name, list(values), f"whole numbers of at least {minimum}")
        for name, value in (("seeds", self.seeds), ("rounds", self.rounds)):
            if value < 1:
                raise SettingError(name, value, "at least 1")
        for name, number in (("lr", self.lr), ("seconds", self.seconds)):
            if not 0 < number < math.inf:
                raise SettingError(name, number, "a finite number above 0")
        if CONTROL not in self.messages:
            raise SettingError("messages", ",".join(self.messages), f"{CONTROL} among them: it is the control")

    def trials(self) -> Iterator[tuple[Scenario, str, str]]:
        """Scenario, message and attack of every trial.

        The seeds of a scenario follow each other, so that an interrupted evaluation has complete scenarios, and so do
        the messages of a seed, so that what they share is prepared once.
        """
        for pretrain_rounds, size, steps, seed in product(
            self.pretrain_rounds, self.batch_sizes, self.steps, range(self.seeds)
        ):
            scenario = Scenario(
                self.dataset, self.model, self.norm, self.lr, seed, pretrain_rounds, size, steps, self.rounds,
                self.know_labels,
            )  # fmt: skip
            for message, attack in product(self.messages, self.attacks):
                yield scenario, message, attack


def evaluate(
    evaluation: AttackEvaluation, folder: Path, *, log: Callable[[str], None], seconds: float = math.inf
) -> list[Row]:
    """Run the trials that are not in `folder` yet or were stopped by a shorter time limit, and return all rows,
    those of trials that were not started among them.

    Args:
        log: receives one line of progress.
        seconds: time after which no further trial starts.

    Raises:
        SettingError: the folder cannot be created, or a message cannot be made for this model.
        DataError: the dataset cannot be read.
    """
    trials = made_folder(folder / "trials")
    runner, limit = TrialRunner(), Watch(seconds)
    planned = list(evaluation.trials())
    rows: list[Row] = []
    try:
        for number, (scenario, message, attack) in enumerate(planned, start=1):
            path = trials / f"{_key(scenario, message, attack)}.json"
            row = load_row(path, evaluation.seconds)
            if row is None and not limit.go_on():
                row = load_row(path, 0.0) or unstarted_row(asdict(scenario), message, attack, TIME_LIMIT)
            if row is None:
                result = runner.run(scenario, parse_message(message), attack, Watch(evaluation.seconds))
                row = row_of(asdict(scenario), message, attack, result)
                save_row(path, row, result)
                log(f"{number}/{len(planned)} {format_row(row)}")
            rows.append({**row, "images": str(path.with_suffix(".npz").relative_to(folder))})
    except KeyboardInterrupt:
        rows += [unstarted_row(asdict(of), on, by, INTERRUPTED) for of, on, by in planned[len(rows) :]]
        write_document(folder, asdict(evaluation), rows, planned=len(planned))
        raise
    write_document(folder, asdict(evaluation), rows, planned=len(planned))
    return rows


def made_folder(path: Path) -> Path:
    """Create the folder if it does not exist, and return it.

    Raises:
        SettingError: the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError("folder", str(path), f"a folder that can be created ({error.strerror})") from error
    return path


def save_row(path: Path, row: Row, result: AttackResult) -> None:
    """Write the images of a finished trial, then its row."""
    if result.originals is not None and result.reconstructions is not None:
        images = {"originals": result.originals.numpy(), "reconstructions": result.reconstructions.numpy()}
        replace_arrays(path.with_suffix(".npz"), images)
    replace_file(path, _json(row))


def write_document(folder: Path, settings: Mapping[str, object], rows: Sequence[Row], *, planned: int) -> None:
    """Replace attacks.json, which holds all rows, the summary and the verdicts."""
    document = {"settings": dict(settings), "planned": planned, "finished": len(finished(rows)),
                "summary": summarize(rows), "verdicts": verdicts(rows), "rows": list(rows)}  # fmt: skip
    replace_file(folder / "attacks.json", _json(document))


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Return for each scenario and message the attack with the highest mean PSNR,
    and its measures' means and deviations.

    The best attack is chosen with the true images, which an attacker does not have, so the figures are upper bounds.
    A message on which no attack was started has no entry.
    """
    summary: list[Row] = []
    for scenario in _distinct(rows, SCENARIO_FIELDS):
        mine = [row for row in rows if all(row[k] == scenario[k] for k in SCENARIO_FIELDS)]
        for message in dict.fromkeys(row["message"] for row in mine):
            planned = [row for row in mine if row["message"] == message]
            sent = finished(planned)
            if not sent:
                continue
            by_attack = {
                attack: [row for row in sent if row["attack"] == attack and row["psnr"] is not None]
                for attack in dict.fromkeys(row["attack"] for row in sent)
            }
            seeds = max(map(len, by_attack.values()))  # an attack with fewer seeds is not done yet
            by_attack = {attack: found for attack, found in by_attack.items() if found and len(found) == seeds}
            best = max(by_attack, key=lambda a: statistics.fmean(r["psnr"] for r in by_attack[a]), default=None)
            entry: Row = scenario | {"message": message, "attack": best or "", "seeds": 0}
            entry["payload_bytes"] = max(row["payload_bytes"] for row in sent)
            if best is not None:
                entry["seeds"] = len(by_attack[best])
                for measure in ("psnr", "ssim", "mse", "lpips", "recovered"):
                    entry[measure] = _mean_and_spread([row[measure] for row in by_attack[best]])
                entry["chance"] = _combined_chance(by_attack[best], tried=len(by_attack))
            entry["stopped"] = sum(row.get("stopped_after") is not None for row in sent)
            entry["attacks"] = sum(not row["refused"] for row in sent)
            entry["not_started"] = len(planned) - len(sent)
            entry["labels"] = _best_labels(sent)
            entry["labels_guess"] = _mean_and_spread([row.get("labels_guess") for row in sent])
            summary.append(entry)
    return summary


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """Return for each scenario whether the control broke, that is, its mean PSNR exceeds `BROKEN`. If it did not,
    or if there is none, as in recordings of a Flower app's payloads and sums, low figures prove nothing.
    """
    summary, found = summarize(rows), []
    for scenario in _distinct(summary, SCENARIO_FIELDS):
        mine = [entry for entry in summary if all(entry[k] == scenario[k] for k in SCENARIO_FIELDS)]
        control: Row = next((entry for entry in mine if entry["message"] == CONTROL), {})
        psnr = control["psnr"][0] if control.get("psnr") else None
        broke, missing = psnr is not None and psnr > BROKEN, control.get("not_started", 0)
        if broke:
            text = f"the control broke ({psnr:.1f} dB by {control['attack']}): these attacks work"
        elif missing:
            text = f"the control did not break so far, and {format_count(missing, 'attack')} on it did not run: "
            text += "the figures prove nothing yet"
        elif not control:
            text = "the exact update is not known: low figures prove nothing here"
        else:
            text = "the control did not break: low figures prove nothing here"
            text += f" ({psnr:.1f} dB, {BROKEN:g} needed)" if psnr is not None else ""
        found.append(scenario | {"broke": broke, "psnr": psnr, "not_started": missing, "text": text})
    return found


def _best_labels(sent: Sequence[Row]) -> tuple[float, float] | None:
    """Return the mean and standard deviation of label accuracy, of the attack with the highest mean."""
    best: tuple[float, float] | None = None
    for attack in dict.fromkeys(row["attack"] for row in sent):
        found = _mean_and_spread([row["labels"] for row in sent if row["attack"] == attack])
        if found is not None and (best is None or found[0] > best[0]):
            best = found
    return best


def _combined_chance(rows: Sequence[Row], *, tried: int) -> float | None:
    """Return how likely reconstructions that know nothing recover as many images (Fisher's method over the seeds,
    times the number of attacks tried); None if a row was written by a version without this figure.
    """
    chances = [row.get("chance") for row in rows]
    if None in chances:
        return None
    return min(1.0, tried * float(combine_pvalues(chances).pvalue))


def _distinct(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    return [dict(pairs) for pairs in dict.fromkeys(tuple((n, row[n]) for n in names) for row in rows)]


def _mean_and_spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def row_of(scenario: Mapping[str, object], message: str, attack: str, result: AttackResult) -> Row:
    """Return the row of a trial; `scenario` has the fields of `Scenario`."""
    scores = result.scores
    names = ("psnr", "ssim", "mse", "lpips", "recovered", "threshold", "chance", "labels", "labels_guess")
    measures = {name: getattr(scores, name) if scores else None for name in names}
    loss = result.loss if math.isfinite(result.loss) else None
    return dict(scenario) | {"message": message, "attack": attack, **measures, "loss": loss,
            "evals": result.evals, "payload_bytes": result.payload_bytes,
            "refused": result.refused, "stopped_after": result.stopped_after}  # fmt: skip


def unstarted_row(scenario: Mapping[str, object], message: str, attack: str, reason: str) -> Row:
    """Return the row of a trial that was not started, because of `TIME_LIMIT` or `INTERRUPTED`."""
    nothing = AttackResult(None, "", math.nan, 0, 0, None, None)
    return row_of(scenario, message, attack, nothing) | {"not_started": reason}


def finished(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without those of trials that were not started."""
    return [row for row in rows if not row.get("not_started")]


def recorded_scenario(
    observation: Observation, *, dataset: str | None, model: str | None, norm: str, seed: int, client: str, round_: int
) -> Row:
    """Return the fields of `Scenario` for a recorded message of round `round_`, and the client's name."""
    return {
        "dataset": dataset, "model": model, "norm": norm, "lr": observation.lr, "seed": seed, "client": client,
        "pretrain_rounds": round_ - 1, "batch_size": observation.batch_size, "steps": observation.steps,
        "rounds": len(observation.earlier) + 1, "know_labels": False,
    }  # fmt: skip


def format_row(row: Row) -> str:
    """Format a row of made messages as one line."""
    rounds = format_count(row["pretrain_rounds"], "round")
    where = f"seed {row['seed']} after {rounds} batch {row['batch_size']} steps {row['steps']}"
    return f"{where} {format_outcome(row)}"


def format_outcome(row: Row) -> str:
    """Format the message, the attack and what it reached."""
    if row["refused"]:
        return f"{row['message']} {row['attack']}: not possible, {row['refused'].partition(': ')[2] or row['refused']}"
    measures = [f"{n} {row[n]:.3g}" for n in ("psnr", "ssim", "recovered", "labels") if row[n] is not None]
    stopped = f" (stopped after {row['stopped_after']:g} s)" if row["stopped_after"] is not None else ""
    return f"{row['message']} {row['attack']}: {', '.join(measures)}{stopped}"


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def load_row(path: Path, seconds: float) -> Row | None:
    """Return the row of a finished trial; None if it has not finished, or was stopped by a limit below `seconds`."""
    try:
        row = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(row, dict) or not {"psnr", "message", "attack", *SCENARIO_FIELDS} <= row.keys():
        return None
    stopped_after = row.setdefault("stopped_after", None)
    return row if stopped_after is None or stopped_after >= seconds else None


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()
