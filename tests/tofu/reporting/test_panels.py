"""Panels of plugins: stored as data, drawn by the report, refused if they have other types."""

from pathlib import Path

import pytest

from tests.tofu.reporting.test_report import HOSTILE, page_of, run  # noqa: F401 (a fixture)
from tofu.errors import RunError
from tofu.reporting.panels import read_panels, write_panels
from tofu.rounds.panel import Chart, ImageFigure, Panel, Series, TableFigure

PANEL = Panel(
    "Subspaces",
    HOSTILE,
    (
        Chart("Rank by layer", (Series("rank", (4.0, 9.0), labels=("conv1", HOSTILE)),), kind="bars"),
        Chart("By round", (Series("a", (1.0, 2.0, 4.0), x=(1.0, 2.0, 3.0)), Series("b", (3.0, 1.0))), x_label="round"),
        Chart("Scores", (Series("known", (0.1, 0.2, 0.2)), Series("unknown", (0.7,))), kind="histogram", bins=5),
        TableFigure("Layers", ("layer", "rank"), (("conv1", 4), (HOSTILE, 0.123456))),
        ImageFigure("Inputs", (((0.0, 1.0), (1.0, 0.0)), ((0.5, 0.5), (0.5, 0.5)))),
        Chart("Nothing yet", (Series("a", ()),)),
    ),
)


def test_panels_are_read_back_as_written(tmp_path: Path) -> None:
    assert read_panels(tmp_path) == {}
    write_panels(tmp_path, {"gpm": PANEL})
    assert read_panels(tmp_path) == {"gpm": PANEL}


def test_a_panel_is_drawn_and_its_texts_are_escaped(run: Path) -> None:  # noqa: F811
    before = len(page_of(run).named("svg"))
    write_panels(run, {"gpm": PANEL})
    page = page_of(run)
    assert len(page.named("svg")) == before + 4
    assert page.named("script") == []
    assert len(page.named("img")) == 1
    assert "0.1235" in page.text
    curves = [given for given in page.named("polyline") if "c-s1" in given["class"]]
    assert len(curves) == 2
    assert "nan" not in page.source.lower()


def test_a_panel_of_other_types_is_refused(tmp_path: Path) -> None:
    wrong = Panel("Title", "text", (Chart("c", (Series("a", ("x",)),)),))  # type: ignore[arg-type]
    with pytest.raises(RunError, match="panel of plugin gpm"):
        write_panels(tmp_path, {"gpm": wrong})
    assert not (tmp_path / "panels.json").exists()
    (tmp_path / "panels.json").write_text('{"gpm": {"title": 3}}')
    with pytest.raises(RunError, match=r"panels\.json gpm"):
        read_panels(tmp_path)
