"""The Markdown pages: relative links resolve, and commands exist."""

import dataclasses
import re
from pathlib import Path

import pytest

from tofu.rounds.record import RunSummary

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, formed as GitHub forms them."""
    titles = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)^([a-z][a-z-]*)(?=[ :])", (ROOT / "Makefile").read_text(encoding="utf-8")))
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        benchmark = ROOT / "benchmarks" / target.removeprefix("bench-")
        assert target in targets or (target.startswith("bench-") and benchmark.is_dir()), target
    for module in re.findall(r"python -m ((?:attacks|benchmarks|deploy|tofu)(?:\.[a-z]\w*)*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), module


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_lines_are_at_most_120_characters_long(page: Path) -> None:
    """All but those of tables."""
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    assert [number for number, line in lines if len(line) > 120 and not line.lstrip().startswith("|")] == []


def test_the_page_on_python_has_all_fields_of_a_summary() -> None:
    text = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    rows = re.search(r"(?ms)^\| `result.summary` has .*?\n\n", text)
    assert rows
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^(\|[^|]*\|)", rows[0])))
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(RunSummary))
