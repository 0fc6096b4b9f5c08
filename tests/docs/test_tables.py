"""The marked tables of the documentation are those that benchmarks/results gives."""

from pathlib import Path

import pytest

from benchmarks.tables import MARKED, TABLES

ROOT = Path(__file__).parents[2]
MARKED_TABLES = [
    (page.relative_to(ROOT).as_posix(), found["name"], found["table"])
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for found in MARKED.finditer(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "name", "table"), MARKED_TABLES, ids=[name for _, name, _ in MARKED_TABLES])
def test_table_is_current(page: str, name: str, table: str) -> None:
    assert table == TABLES[name](), f"{page}: run python -m benchmarks.tables"


def test_every_table_is_shown() -> None:
    assert {name for _, name, _ in MARKED_TABLES} == set(TABLES)
