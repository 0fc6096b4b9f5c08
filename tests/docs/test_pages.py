"""The Markdown pages: relative links resolve, and commands exist."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from tofu.rounds.record import RunSummary
from tofu.settings import FIELDS, shown_default

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


def test_the_page_on_settings_has_every_setting_with_a_default_and_a_meaning() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert set(config) - set(re.findall(r"`([a-z0-9-]+)`", text)) == set()
    rows = re.findall(r"(?m)^\| (`.+)", text)
    assert len(rows) > 20
    for row in rows:
        names, default, meaning = (cell.strip() for cell in row.rstrip(" |").split(" | "))
        named = re.findall(r"`([a-z0-9-]+)`", names)
        assert default, row
        assert len(re.sub(r"[^a-z]", "", meaning)) > 10, row
        for name, shown in zip(named, default.split(", "), strict=len(named) == len(default.split(", "))):
            own = shown_default(FIELDS[name.replace("-", "_")]) or "none"
            assert own == shown or float(own) == float(shown), row


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_block_of_code_is_of_one_file(page: Path) -> None:
    for block in re.findall(r"(?ms)^```python\n(.*?)^```$", page.read_text(encoding="utf-8")):
        assert len(re.findall(r"(?m)^# \w+\.py$", block)) <= 1, block
