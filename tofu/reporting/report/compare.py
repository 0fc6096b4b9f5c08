"""The page and the figure of a comparison, made from the document that compare.json holds and from nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tofu.formatting import format_count, format_fraction
from tofu.reporting.report import compare_figures as figures
from tofu.reporting.report.chart import Drawing, standalone
from tofu.reporting.report.compare_tables import Table, cell_name, cell_table, notes, ratio_text, target_table
from tofu.reporting.report.template import (
    COLORS,
    FIGURE_STYLE,
    FIGURES,
    PAGE_HEAD,
    STYLE,
    page_figures,
    render_template,
)

_NOTHING = "No compressor has finished a run yet."
_STYLE = (
    STYLE
    + figures.SERIES_COLORS
    + figures.SERIES_STYLE
    + """
.lead { font-size: 22px; max-width: 48em; }
ul { margin: 12px 0 0; padding-left: 20px; font-size: 14px; }
"""
)

_PAGE = (
    PAGE_HEAD
    + FIGURES
    + """{% for part in tables %}<section class="card">
<h2>{{ part.title }}</h2>
<p class="soft">{{ part.caption }}</p>
{{ table(part.id, part.table.header, part.table.rows, part.css) }}
{% if part.notes %}<ul>{% for note in part.notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
</section>
{% endfor %}
<section class="card"><details>
<summary>Settings of every run ({{ config | length }})</summary>
{{ table("config", (), config, ("left wrap", "left wrap code")) }}
</details></section>
<footer>Bytes count whole messages of all clients in the whole run, headers included; kB and MB are decimal. The payload
ratio is of float32 updates over payloads alone. Every run and number: compare.json.</footer>
</main>
</body>
</html>
"""
)


def render_figure(document: Mapping[str, Any]) -> str:
    """compare.svg: accuracy against bytes as a separate file, with an enlarged part below if it helps."""
    style = "\n".join((COLORS, figures.SERIES_COLORS, FIGURE_STYLE, figures.SERIES_STYLE))
    drawn = [figures.accuracy_by_uplink(document), figures.accuracy_by_uplink(document, zoom=True)]
    drawings = [drawing for drawing in drawn if drawing]
    if not drawings:
        drawings = [Drawing(_NOTHING, 40)]
        drawings[0].add("text", "label", _NOTHING, x=0, y=24)
    return standalone([drawing.svg for drawing in drawings], style)


def render_page(document: Mapping[str, Any], name: str) -> str:
    """compare.html of a comparison in a folder called `name`; every text from the document is escaped."""
    settings = document["settings"]
    left, clients = document["runs_left"], format_count(settings["clients"], "client")
    return render_template(
        _PAGE,
        style=Markup(_STYLE),
        title=f"Comparison {name} · {settings['model']} on {settings['dataset']} · {clients}",
        state=f"not finished: {format_count(left, 'run')} left" if left else "",
        lead=_lead(document),
        aside=_aside(document),
        figures=_figures(document),
        tables=_tables(document),
        config=[(key, f"{value}".lower() if isinstance(value, bool) else value) for key, value in settings.items()],
    )


def _lead(document: Mapping[str, Any]) -> Markup:
    """Return the leading compressor at each ratio, if its lead exceeds the spread over seeds."""
    parts = []
    for ratio in sorted(document["ratios"]):
        cells = [c for c in document["cells"][1:] if ratio in c["ratios"] and c["final_accuracy"]]
        if cells:
            cells.sort(key=lambda cell: -float(cell["final_accuracy"]["mean"]))
            parts.append(_leader(cells, ratio))
    if not parts:
        return Markup(_NOTHING)
    fedavg = document["cells"][0]["final_accuracy"]
    if fedavg:
        parts.append(Markup("FedAvg: {}.").format(format_fraction(fedavg["mean"])))
    return Markup(" ").join(parts)


def _leader(cells: Sequence[Mapping[str, Any]], ratio: float) -> Markup:
    """Return the best of the cells at a ratio, which are sorted, if it is ahead by more than one standard deviation."""
    best, *others = cells
    values = {"ratio": ratio_text(ratio), "name": best["compressor"]}
    values["mean"] = format_fraction(best["final_accuracy"]["mean"])
    if not others:
        return Markup("At {ratio}: <b>{name}</b> {mean}.").format(**values)
    if any(cell["final_accuracy"]["sd"] is None for cell in cells):
        return Markup("At {ratio}, {name} has the highest accuracy, {mean}, in one run: no winner.").format(**values)
    texts = [f"{c['compressor']} ({format_fraction(c['final_accuracy']['mean'])})" for c in cells]
    behind = [text for text, cell in zip(texts, cells, strict=True) if ahead(best, cell)]
    level = [text for text in texts if text not in behind]
    if len(level) == 1:
        return Markup("At {ratio}, <b>{name}</b> is the most accurate: {mean}.").format(**values)
    values["level"] = f"{', '.join(level[:-1])} and {level[-1]}"
    values["behind"] = f"; behind them: {', '.join(behind)}" if behind else ""
    text = "At {ratio}, no winner: {level} differ by no more than the spread over seeds{behind}."
    return Markup(text).format(**values)


def ahead(best: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether the difference of two means is more than the larger of the standard deviations over seeds."""
    ours, theirs = best["final_accuracy"], other["final_accuracy"]
    if ours["sd"] is None or theirs["sd"] is None:
        return False
    return bool(ours["mean"] - theirs["mean"] > max(ours["sd"], theirs["sd"]))


def _aside(document: Mapping[str, Any]) -> str:
    seeds = document["seeds"]
    rounds = format_count(document["settings"]["rounds"], "round")
    text = f"{rounds}; seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"{rounds}; seed {seeds[0]}"
    return (
        f"{text}. Runs with the same seed have the same data, initial weights and batches; they differ in what "
        "clients send." + (" ± is the standard deviation over seeds." if len(seeds) > 1 else "")
    )


def _figures(document: Mapping[str, Any]) -> list[dict[str, str]]:
    seeds = "one standard deviation over seeds" if len(document["seeds"]) > 1 else "not known from one seed"
    cut = _cut_text(document)
    several = ", the gray band its standard deviation" if len(document["seeds"]) > 1 else ""
    band = f"The dashed line is FedAvg{several}.{cut}"
    left_out = [
        cell_name(cell)
        for cell in document["cells"][1:]
        if cell["final_accuracy"] and cell not in figures.near_fedavg(document)
    ]
    drawn = [
        (
            "Accuracy against uplink bytes",
            f"Where each compressor ends at each budget; the spread is {seeds}. Marks have a small offset, so that "
            f"equal ones can be distinguished. {band}",
            figures.accuracy_by_uplink(document),
        ),
        (
            "The same, near FedAvg",
            f"Without what ends more than {figures.ZOOM_POINTS} points below FedAvg: {', '.join(left_out)}. {band}",
            figures.accuracy_by_uplink(document, zoom=True),
        ),
    ]
    for ratio in sorted(document["ratios"]):
        text = ratio_text(ratio)
        drawn += [
            (
                f"Every seed at {text}",
                f"A dot is a run; the spread is {seeds}.{cut}",
                figures.accuracy_by_seed(document, ratio),
            ),
            (f"By round at {text}", "Mean over seeds after each round.", figures.accuracy_by_round(document, ratio)),
        ]
    return page_figures((title, caption, drawing.markup() if drawing else None) for title, caption, drawing in drawn)


def _cut_text(document: Mapping[str, Any]) -> str:
    """Return the sentence on spreads that are cut at 100%, if there are any."""
    spreads = [cell["final_accuracy"] for cell in document["cells"] if cell["final_accuracy"]]
    cut = any(spread["mean"] + (spread["sd"] or 0.0) > 1.0 for spread in spreads)
    return " A spread that would go beyond 100% is cut there." if cut else ""


def _tables(document: Mapping[str, Any]) -> list[dict[str, object]]:
    caption = (
        "Points lost are against FedAvg with the same seed. A method whose payload is the same for several ratios is "
        "run once and listed once. Encoding is the time in which one client makes its messages of the whole run."
    )
    tables = [_table("cells", "Every compressor at every budget", caption, cell_table(document), notes(document))]
    if targets := target_table(document):
        caption = "The smallest mean uplink of the budgets that were run with which each reached it."
        tables.append(_table("targets", "Bytes to reach an accuracy", caption, targets))
    return tables


def _table(name: str, title: str, caption: str, table: Table, remarks: Sequence[str] = ()) -> dict[str, object]:
    css = [*["left"] * table.left, *(["narrow"] if name == "cells" else [])]
    return {"id": name, "title": title, "caption": caption, "table": table, "css": css, "notes": remarks}
