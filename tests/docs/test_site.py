"""The site's own style sheet, with that of its theme, in a browser of a phone's width."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OWN = ROOT / "docs" / "stylesheets" / "extra.css"
ROW = re.compile(r"(?m)^\| (`.+?) \| (.+) \|$")


def page_of(rows: list[tuple[str, str]], picture: str) -> str:
    theme = importlib.util.find_spec("material")
    assert theme
    assert theme.origin
    sheets = [*sorted((Path(theme.origin).parent / "templates/assets/stylesheets").glob("main.*.css")), OWN]
    assert len(sheets) == 2
    code = [(re.sub("`(.+?)`", r"<code>\1</code>", first), rest) for first, rest in rows]
    cells = "".join(f"<tr><td>{first}</td><td>0.5</td><td>{rest}</td></tr>" for first, rest in code)
    table = f"<thead><tr><th>name</th><th>default</th><th>meaning</th></tr></thead><tbody>{cells}</tbody>"
    styles = "".join(f"<style>{sheet.read_text(encoding='utf-8')}</style>" for sheet in sheets)
    return (
        f"<!doctype html><html><head>{styles}</head><body><article class='md-typeset' style='width: 358px'>"
        f"<table>{table}</table><p><img src='data:image/svg+xml,{picture}#.svg'></p></article></body></html>"
    )


@pytest.fixture
def phone(browser: Any) -> Iterator[Any]:
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    page = browser.new_page(viewport={"width": 390, "height": 844})
    settings = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = [(first, rest) for first, rest in ROW.findall(settings)]
    assert len(rows) > 20
    page.set_content(page_of(rows, "<svg xmlns='' viewBox='0 0 820 340'></svg>".replace("'", "%22")))
    yield page
    page.close()


def test_names_in_a_table_are_in_one_line(phone: Any) -> None:
    broken = (
        "() => [...document.querySelectorAll('td:first-child code')].filter(c => c.getClientRects().length > 1).length"
    )
    assert phone.evaluate(broken) == 0
    assert (
        phone.evaluate("() => Math.min(...[...document.querySelectorAll('td:last-child')].map(c => c.clientWidth))")
        > 140
    )
    assert phone.evaluate("() => document.documentElement.scrollWidth") <= 390


def test_a_picture_scrolls_where_it_would_be_too_small(phone: Any) -> None:
    assert phone.evaluate("() => document.querySelector('img').getBoundingClientRect().width") >= 640
    assert phone.evaluate("() => getComputedStyle(document.querySelector('p')).overflowX") == "auto"
