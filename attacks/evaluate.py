"""All attacks on all messages in all situations: which cells there are, which are done, and what they add up to.

A folder keeps one small JSON file for each finished cell and its images, so a run that was interrupted goes on where it
stopped; `attacks.json` holds all of them with the summary.
"""

import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from attacks.base import Watch
from attacks.messages import parse_message
from attacks.registry import registry
from attacks.trials import AttackResult, Scenario, TrialRunner
from tofu.errors import SettingError

CONTROL = "exact"
BROKEN = 30.0
"""dB of mean PSNR from which a control counts as broken: images that look like the originals."""

Row = dict[str, Any]
"""A cell: the scenario's fields, message, attack, the scores, loss, max_evals, payload_bytes, refused."""

SITUATION = ("dataset", "model", "norm", "lr", "moment", "batch_size", "steps", "rounds", "know_labels")


@dataclass(frozen=True)
class AttackEvaluation:
    """What to run; every combination is a cell.

    Attributes:
        seconds: time limit of one attack.
        seeds: 0, 1, ... of so many.
    """

    dataset: str = "digits"
    model: str = "lenet-smooth"
    norm: str = "group"
    lr: float = 0.1
    messages: tuple[str, ...] = (CONTROL, "proxy:smooth:100", "proxy:paper:100")
    attacks: tuple[str, ...] = ("idlg", "codec-aware", "label-counts")
    batch_sizes: tuple[int, ...] = (1, 4)
    moments: tuple[int, ...] = (0,)
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
        for name, least in (("batch_sizes", 1), ("moments", 0), ("steps", 1)):
            values: Sequence[int] = getattr(self, name)
            if not values or min(values) < least:
                raise SettingError(name, list(values), f"whole numbers of at least {least}")
        for name, value in (("seeds", self.seeds), ("rounds", self.rounds)):
            if value < 1:
                raise SettingError(name, value, "at least 1")
        for name, number in (("lr", self.lr), ("seconds", self.seconds)):
            if not 0 < number < math.inf:
                raise SettingError(name, number, "a finite number above 0")
        if CONTROL not in self.messages:
            raise SettingError("messages", ",".join(self.messages), f"{CONTROL} among them: it is the control")

    def cells(self) -> Iterator[tuple[Scenario, str, str]]:
        """Scenario, message and attack of every cell. A scenario's seeds are together, so that who stops early has
        some situations whole; and each seed's messages, so that what they share is prepared once."""
        for moment, size, steps, seed in product(self.moments, self.batch_sizes, self.steps, range(self.seeds)):
            scenario = Scenario(
                self.dataset, self.model, self.norm, self.lr, seed, moment, size, steps, self.rounds, self.know_labels
            )
            for message, attack in product(self.messages, self.attacks):
                yield scenario, message, attack


def evaluate(
    evaluation: AttackEvaluation, folder: Path, *, say: Callable[[str], None], seconds: float = math.inf
) -> list[Row]:
    """Run the cells that `folder` does not have yet, and hand back all rows that are there at the end.

    Args:
        say: takes one line of progress.
        seconds: after which no further cell begins.

    Raises:
        SettingError: the folder cannot be made, or a message cannot be made for this model.
        DataError: the dataset cannot be read.
    """
    cells = made_folder(folder / "cells")
    runner, limit = TrialRunner(), Watch(seconds)
    planned = list(evaluation.cells())
    rows: list[Row] = []
    for number, (scenario, message, attack) in enumerate(planned, start=1):
        path = cells / f"{_key(scenario, message, attack, evaluation.seconds)}.json"
        row = load_row(path)
        if row is None:
            if not limit.go_on():
                continue
            result = runner.run(scenario, parse_message(message), attack, Watch(evaluation.seconds))
            row = row_of(asdict(scenario), message, attack, result)
            save_row(path, row, result)
            say(f"{number}/{len(planned)} {format_row(row)}")
        rows.append({**row, "images": str(path.with_suffix(".npz").relative_to(folder))})
    write_document(folder, asdict(evaluation), rows, planned=len(planned))
    return rows


def made_folder(path: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        SettingError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError("folder", str(path), f"a folder that can be made ({error.strerror})") from error
    return path


def save_row(path: Path, row: Row, result: AttackResult) -> None:
    """Write one finished cell: its images beside its row, the row last."""
    if result.originals is not None and result.reconstructions is not None:
        images = {"originals": result.originals.numpy(), "reconstructions": result.reconstructions.numpy()}
        _replace(path.with_suffix(".npz"), _npz(images))
    _replace(path, _json(row))


def write_document(folder: Path, settings: Mapping[str, object], rows: Sequence[Row], *, planned: int) -> None:
    """Replace attacks.json: everything in one file."""
    document = {"settings": dict(settings), "planned": planned, "finished": len(rows),
                "summary": summarize(rows), "verdicts": verdicts(rows), "rows": list(rows)}  # fmt: skip
    _replace(folder / "attacks.json", _json(document))


def summarize(rows: Sequence[Row]) -> list[Row]:
    """For each scenario and message, the attack of the highest mean PSNR, its measures' means and deviations by seed.

    The best attack is chosen with the truth in hand, which an attacker has not: an upper bound on these attacks.
    """
    summary: list[Row] = []
    for scenario in _distinct(rows, SITUATION):
        mine = [row for row in rows if all(row[k] == scenario[k] for k in SITUATION)]
        for message in dict.fromkeys(row["message"] for row in mine):
            sent = [row for row in mine if row["message"] == message]
            by_attack = {
                attack: [row for row in sent if row["attack"] == attack and row["psnr"] is not None]
                for attack in dict.fromkeys(row["attack"] for row in sent)
            }
            most = max(map(len, by_attack.values()))  # an attack with fewer seeds is not done yet
            by_attack = {attack: found for attack, found in by_attack.items() if found and len(found) == most}
            best = max(by_attack, key=lambda a: statistics.fmean(r["psnr"] for r in by_attack[a]), default=None)
            entry: Row = scenario | {"message": message, "attack": best or "", "seeds": 0}
            entry["payload_bytes"] = max(row["payload_bytes"] for row in sent)
            if best is not None:
                entry["seeds"] = len(by_attack[best])
                for measure in ("psnr", "ssim", "mse", "lpips", "recovered"):
                    entry[measure] = _mean_and_spread([row[measure] for row in by_attack[best]])
            entry["labels"] = _best_labels(sent)
            summary.append(entry)
    return summary


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """For each scenario, whether the control broke: mean PSNR above `BROKEN`, or the rest of it proves nothing."""
    found = []
    for entry in summarize(rows):
        if entry["message"] == CONTROL:
            psnr = entry["psnr"][0] if entry.get("psnr") else None
            broke = psnr is not None and psnr > BROKEN
            text = (
                f"the control broke ({psnr:.1f} dB by {entry['attack']}): the other messages were attacked by means "
                "that work"
                if broke
                else "the control did not break: the other messages' figures prove nothing here"
                + (f" ({psnr:.1f} dB, {BROKEN:g} needed)" if psnr is not None else "")
            )
            found.append({k: entry[k] for k in SITUATION} | {"broke": broke, "psnr": psnr, "text": text})
    return found


def _best_labels(sent: Sequence[Row]) -> tuple[float, float] | None:
    """Mean and deviation of the attack that gets most labels right."""
    best: tuple[float, float] | None = None
    for attack in dict.fromkeys(row["attack"] for row in sent):
        found = _mean_and_spread([row["labels"] for row in sent if row["attack"] == attack])
        if found is not None and (best is None or found[0] > best[0]):
            best = found
    return best


def _distinct(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    return [dict(pairs) for pairs in dict.fromkeys(tuple((n, row[n]) for n in names) for row in rows)]


def _mean_and_spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def row_of(scenario: Mapping[str, object], message: str, attack: str, result: AttackResult) -> Row:
    """A cell's row, from the fields of `Scenario`."""
    scores = result.scores
    names = ("psnr", "ssim", "mse", "lpips", "recovered", "threshold", "labels")
    measures = {name: getattr(scores, name) if scores else None for name in names}
    loss = result.loss if math.isfinite(result.loss) else None
    return dict(scenario) | {"message": message, "attack": attack, **measures, "loss": loss,
            "max_evals": result.max_evals, "payload_bytes": result.payload_bytes,
            "refused": result.refused}  # fmt: skip


def format_row(row: Row) -> str:
    """Format a row as one line."""
    where = f"seed {row['seed']} moment {row['moment']} batch {row['batch_size']} steps {row['steps']}"
    if row["refused"]:
        return f"{where} {row['refused']}"
    measures = [f"{n} {row[n]:.3g}" for n in ("psnr", "ssim", "recovered", "labels") if row[n] is not None]
    return f"{where} {row['message']} {row['attack']}: {', '.join(measures)}"


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def load_row(path: Path) -> Row | None:
    """The row of a cell that is done; None where it has to be run."""
    try:
        row = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) and {"psnr", "message", "attack", *SITUATION} <= row.keys() else None


def _json(value: object) -> Callable[[BinaryIO], object]:
    return lambda file: file.write(json.dumps(value, indent=1, allow_nan=False).encode())


def _npz(images: dict[str, npt.NDArray[np.float32]]) -> Callable[[BinaryIO], object]:
    return lambda file: np.savez_compressed(file, allow_pickle=False, **images)


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        write(file)
    os.replace(temporary, path)
