"""Every pair of built-in plugins trains together or is refused at the start, as the table in docs/plugins.md says."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from client import app as honest
from server.app import serve_in_process
from tofu.errors import SettingError
from tofu.plugins import plugin_names
from tofu.settings import Settings

PAGE = Path(__file__).parents[3] / "docs" / "plugins.md"
OPTIONS = {
    "crossbar": "crossbar.percentile=0.5",
    "curvature": "curvature.probes=1 curvature.action=drop curvature.warm-up=1",
    "hierarchy": "hierarchy.tree=digits",
    "rank": "rank.energy=0.95",
    "spatio-temporal": "spatio-temporal.steps=2",
    "trend": "trend.members=fp,1 trend.images=10 trend.steps=1",
}
STUDIED = {"crossbar", "curvature", "hierarchy", "trend"}
SPIKING = {"dct-snn": "dct-snn-small", "spatio-temporal": "snn-small"}


def table() -> dict[tuple[str, str], bool]:
    """Pair of plugins -> whether the page says that they combine."""
    section = PAGE.read_text(encoding="utf-8").split("## Which plugins combine\n")[1]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    return {(row[0], other): cell == "yes" for row in cells[1:] for other, cell in zip(cells[0], row, strict=True)
            if cell in ("yes", "no") and row[0] != other}  # fmt: skip


def settings(pair: tuple[str, str], folder: Path) -> dict[str, Any]:
    tasks: dict[str, Any] = {"tasks": "pixels", "task_count": 2} if "gpm" in pair else {}
    return tasks | {
        "model": next((model for name, model in SPIKING.items() if name in pair), "mlp"), "clients": 2, "rounds": 2,
        "schedule": "fedavg", "partition": "iid", "train_images": 60, "local_epochs": 1, "batch_size": 16, "lr": 0.05,
        "ema_decay": 0.0, "max_evals": 3, "run_folder": str(folder), "plugins": ",".join(pair),
        "plugin_options": " ".join(OPTIONS[name] for name in pair if name in OPTIONS),
    }  # fmt: skip


def trained_pairs() -> list[Any]:
    """Pairs that combine, also in reverse order where both change the model; only those with STUDIED ones are quick."""
    found = []
    for pair, together in table().items():
        ordered = pair == tuple(sorted(pair)) or set(pair) <= {"crossbar", "hierarchy", "rank", "ood"}
        if together and ordered:
            quick = STUDIED & set(pair) and "dct-snn" not in pair
            marks = [] if quick else [pytest.mark.slow]
            found.append(pytest.param(pair, marks=marks, id=",".join(pair)))
    return found


def test_the_table_has_every_pair_and_is_symmetric() -> None:
    found = table()
    assert set(found) == set(itertools.permutations(plugin_names(), 2))
    assert all(found[a, b] == found[b, a] for a, b in found)


@pytest.mark.parametrize("pair", [p for p, yes in table().items() if not yes], ids=",".join)
def test_other_pairs_are_refused_in_one_line(tmp_path: Path, pair: tuple[str, str]) -> None:
    with pytest.raises(SettingError) as error:
        Settings.of(settings(pair, tmp_path / "run"))
    text = str(error.value)
    assert text.startswith("plugins=")
    assert "expected" in text
    assert "\n" not in text


@pytest.mark.parametrize("pair", trained_pairs())
def test_pairs_train_together(tmp_path: Path, pair: tuple[str, str]) -> None:
    serve_in_process(honest.app, Settings.of(settings(pair, tmp_path / "run")))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["failures"] for record in records] == [[], [], []]
