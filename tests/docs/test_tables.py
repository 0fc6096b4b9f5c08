"""The marked tables of the documentation are those that benchmarks/results gives."""

import re
from pathlib import Path

import pytest

from benchmarks.error_feedback.__main__ import AUTO, METHODS
from benchmarks.tables import MARKED, TABLES
from tofu.settings import FIELDS

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
MARKED_TABLES = [
    (page.relative_to(ROOT).as_posix(), found["name"], found["table"])
    for page in PAGES
    for found in MARKED.finditer(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "name", "table"), MARKED_TABLES, ids=[name for _, name, _ in MARKED_TABLES])
def test_table_is_current(page: str, name: str, table: str) -> None:
    assert table == TABLES[name](), f"{page}: run python -m benchmarks.tables"


def test_every_table_is_shown() -> None:
    assert {name for _, name, _ in MARKED_TABLES} == set(TABLES)


@pytest.mark.parametrize(("page", "name", "table"), MARKED_TABLES, ids=[name for _, name, _ in MARKED_TABLES])
def test_no_two_rows_have_the_same_labels(page: str, name: str, table: str) -> None:
    """Figures, which have a deviation or were not run, are no labels."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    labels = [tuple(cell for cell in row if cell and "±" not in cell and cell != "not run") for row in rows]
    assert len(set(labels)) == len(labels), page


def test_only_measurements_of_the_default_are_called_default() -> None:
    """`default` is a method of `benchmarks.error_feedback`, whose settings are those that a run has by default."""
    own = METHODS["default"]
    assert own == {name: FIELDS[name].default for name in own}
    assert (FIELDS["over_relaxation"].default, FIELDS["step_ahead"].default) == (AUTO, 0.5)
    for page in PAGES:
        for line in re.findall(r"(?m)^\|.*\(default\).*$", page.read_text(encoding="utf-8")):
            raise AssertionError(f"{page.name}: {line}")
