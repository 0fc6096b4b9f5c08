"""The code blocks of the pages run: Python, and the `tofu` commands of shell blocks, in the order of a page.

A page has an empty folder and one namespace. A block with a title is a file of that name. Runs of minutes are
made short by tiny settings, which are appended to the commands. A comment `not run: REASON` leaves a block out.
"""

import importlib
import logging
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tofu.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [
    path
    for path in (
        ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "client" / "plugins" / "README.md"
    )
    if "```" in path.read_text(encoding="utf-8")
]  # fmt: skip
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n\n?)?"
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
LANGUAGES = {"python", "shell", "text", "toml", "ini", "yaml"}
TINY = {
    "run": "--rounds=2 --local-epochs=1 --train-images=240 --max-evals=2",
    "demo": "--rounds=1 --local-epochs=1 --train-images=240 --max-evals=2",
    "compare": "--rounds=1 --local-epochs=1 --train-images=240 --max-evals=2 --seeds=1 --clients=2",
    "attack": "--seconds=2",
}
"""Command -> what makes it short."""

REFUSED_BY_WINDOWS = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)
"""Names of files and folders that Windows does not have."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page, with the line where its code begins."""

    language: str
    title: str
    reason: str
    code: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["language"], found["title"] or "", found["reason"] or "", found["code"],
            text[: found.start("code")].count("\n"),
        )
        for found in FENCE.finditer(text)
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; what a page imports from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "path", list(sys.path))
    level, known, threads = logging.getLogger("flwr").level, set(sys.modules), torch.get_num_threads()
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    logging.getLogger("flwr").setLevel(level)
    torch.set_num_threads(threads)


SLOW = {"attacks.md", "crossbar.md", "deployment.md", "hierarchy.md", "trend.md"}
"""Pages that start processes, or take more than five seconds."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=(pytest.mark.slow, pytest.mark.timeout(900)) if page.name in SLOW else ())
        for page in PAGES
    ],
    ids=[page.relative_to(ROOT).as_posix() for page in PAGES],
)
def test_blocks_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {"__name__": "page"}
    torch.manual_seed(0)
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}: a block without a language"
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.code, encoding="utf-8")
            importlib.invalidate_caches()
        elif block.language == "python" and not block.reason:
            # Lines are those of the page, so that a traceback leads there.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        elif block.language == "shell" and not block.reason:
            run_commands(block, monkeypatch)
    assert not [str(path) for path in folder.rglob("*") if REFUSED_BY_WINDOWS.search(path.name)]


def run_commands(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the `tofu` commands of a block; others must be in a block that says why it is not run."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "tofu", f"{line!r}: say why this is not run"
        tiny = TINY.get(words[1], "").split() if "--help" not in words else []
        monkeypatch.setattr(sys, "argv", [*words, *tiny])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None), line


def test_broken_blocks_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n\n<!-- not run: why -->\n```shell\nfalse\n```\n\n```shell\ntofu nothing\n```\n"
    )
    first, second, third = blocks_of(page)
    assert (first.line, first.code, second.reason) == (1, "x = 1\n", "why")
    with pytest.raises(AssertionError):
        run_commands(third, monkeypatch)
