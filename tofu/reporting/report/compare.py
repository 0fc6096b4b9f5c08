"""The page and the figure of a comparison, made from the document that compare.json holds and from nothing else."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tofu.formatting import format_fraction
from tofu.reporting.report import compare_figures as figures
from tofu.reporting.report.chart import Drawing, standalone
from tofu.reporting.report.compare_tables import Table, cell_table, notes, ratio_text, target_table
from tofu.reporting.report.template import COLORS, FIGURE_STYLE, PAGE_HEAD, STYLE

_NOTHING = "No compressor has finished a run yet."
_FONT = (
    'svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }'
)
_STYLE = (
    STYLE
    + figures.SERIES_COLORS
    + figures.SERIES_STYLE
    + """
.wide { overflow-x: auto; }
.wide svg { display: block; width: 100%; min-width: 640px; max-width: 1000px; height: auto; margin-top: 14px; }
.wide + .wide, section.card, figure.card { margin-top: 20px; } .grid2 figure.card { margin-top: 0; }
.grid2 figcaption { min-height: 0; }
ul { margin: 12px 0 0; padding-left: 20px; font-size: 14px; }
"""
)

_PAGE = (
    PAGE_HEAD
    + """</header>
{% for figure in wide %}<figure class="card wide">
<h2>{{ figure.title }}</h2>
<figcaption>{{ figure.caption }}</figcaption>
{{ figure.svg }}
</figure>
{% endfor %}
{% for table in tables %}<section class="card">
<h2>{{ table.title }}</h2>
<p class="soft">{{ table.caption }}</p>
<div class="scroll"><table id="{{ table.id }}">
<thead><tr>{% for name in table.table.header -%}
<th scope="col"{% if loop.index0 < table.table.left %} class="left"{% endif %}>{{ name }}</th>
{%- endfor %}</tr></thead>
<tbody>
{% for row in table.table.rows %}<tr>{% for cell in row -%}
<td{% if loop.index0 < table.table.left %} class="left"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if table.notes %}<ul>{% for note in table.notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
</section>
{% endfor %}
<div class="grid2">
{% for figure in small %}<figure class="card">
<h2>{{ figure.title }}</h2>
{{ figure.svg }}
</figure>
{% endfor %}</div>
<section class="card"><details>
<summary>Settings of every run ({{ config | length }})</summary>
<div class="scroll"><table id="config"><tbody>
{% for name, value in config %}<tr><th scope="row" class="left">{{ name }}</th>
<td class="left wrap"><code>{{ value }}</code></td></tr>
{% endfor %}</tbody></table></div>
</details></section>
<footer>Bytes count whole messages of all clients in the whole run, headers included; kB and MB are decimal. The payload
ratio is of float32 updates over payloads alone. Every run and number: compare.json.</footer>
</main>
</body>
</html>
"""
)


def render_figure(document: Mapping[str, Any]) -> str:
    """compare.svg: accuracy against bytes as a file of its own, in light and dark, enlarged below where that helps."""
    style = "\n".join((COLORS, figures.SERIES_COLORS, FIGURE_STYLE, figures.SERIES_STYLE, _FONT))
    drawn = [figures.accuracy_by_uplink(document), figures.accuracy_by_uplink(document, zoom=True)]
    drawings = [drawing for drawing in drawn if drawing]
    if not drawings:
        drawings = [Drawing(_NOTHING, 40, figures.WIDE)]
        drawings[0].add("text", "label", _NOTHING, x=0, y=24)
    return standalone(drawings, style)


def render_page(document: Mapping[str, Any], name: str) -> str:
    """compare.html of a comparison in a folder called `name`; every text from the document is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    settings = document["settings"]
    left = document["runs_left"]
    return environment.from_string(_PAGE).render(
        style=Markup(_STYLE),
        title=f"Comparison {name} · {settings['model']} on {settings['dataset']} · {settings['clients']} clients",
        state=f"not finished: {left} run{'' if left == 1 else 's'} left" if left else "",
        lead=_lead(document),
        aside=_aside(document),
        wide=_wide(document),
        small=_small(document),
        tables=_tables(document),
        config=[(key, f"{value}".lower() if isinstance(value, bool) else value) for key, value in settings.items()],
    )


def _lead(document: Mapping[str, Any]) -> Markup:
    """Who has the highest mean at each ratio."""
    parts = []
    for ratio in sorted(document["ratios"]):
        cells = [c for c in document["cells"][1:] if ratio in c["ratios"] and c["final_accuracy"]]
        if cells:
            best = max(cells, key=lambda cell: float(cell["final_accuracy"]["mean"]))
            parts.append(
                Markup("at {}: <b>{}</b> {}").format(
                    ratio_text(ratio), best["compressor"], format_fraction(best["final_accuracy"]["mean"])
                )
            )
    if not parts:
        return Markup(_NOTHING)
    fedavg = document["cells"][0]["final_accuracy"]
    text = Markup("Most accurate ") + Markup(", ").join(parts) + "."
    return text + (Markup(" FedAvg: {}.").format(format_fraction(fedavg["mean"])) if fedavg else "")


def _aside(document: Mapping[str, Any]) -> str:
    seeds = document["seeds"]
    rounds = document["settings"]["rounds"]
    text = (
        f"{rounds} rounds; seeds {', '.join(map(str, seeds))}"
        if len(seeds) > 1
        else f"{rounds} rounds; seed {seeds[0]}"
    )
    return (
        f"{text}. Runs with the same seed have the same data, initial weights and batches; they differ in what "
        "clients send." + (" ± is the standard deviation over seeds." if len(seeds) > 1 else "")
    )


def _wide(document: Mapping[str, Any]) -> list[dict[str, object]]:
    drawn = [
        (
            "Accuracy against uplink bytes",
            "Where each compressor ends at each budget; bars and band are one standard deviation over seeds. Marks of "
            "different compressors are drawn with a small offset so that equal ones can be distinguished.",
            figures.accuracy_by_uplink(document),
        ),
        (
            "The same, enlarged near FedAvg",
            f"What ends more than {figures.ZOOM_POINTS} points below it may be cut off here.",
            figures.accuracy_by_uplink(document, zoom=True),
        ),
    ]
    # Safe as markup: built as an XML tree, which escapes what it holds.
    return [
        {"title": title, "caption": caption, "svg": Markup(drawing.markup())}
        for title, caption, drawing in drawn
        if drawing
    ]


def _small(document: Mapping[str, Any]) -> list[dict[str, object]]:
    drawn = [(ratio, figures.accuracy_by_round(document, ratio)) for ratio in sorted(document["ratios"])]
    return [
        {"title": f"By round at {ratio_text(ratio)}", "svg": Markup(drawing.markup())}
        for ratio, drawing in drawn
        if drawing
    ]


def _tables(document: Mapping[str, Any]) -> list[dict[str, object]]:
    targets: Table | None = target_table(document)
    tables: list[dict[str, object]] = [
        {
            "id": "cells",
            "title": "Every compressor at every budget",
            "caption": "Points lost are against FedAvg with the same seed. A method whose payload is the same for "
            "several ratios asked is run once and listed once.",
            "table": cell_table(document),
            "notes": notes(document),
        }
    ]
    if targets:
        tables.append(
            {
                "id": "targets",
                "title": "Bytes to reach an accuracy",
                "caption": "The smallest mean uplink of the budgets that were run with which each reached it.",
                "table": targets,
                "notes": [],
            }
        )
    return tables
