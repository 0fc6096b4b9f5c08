"""Jinja templates and the style sheet of all pages, kept in Python because a Flower app bundle has no `.j2` or `.css`.

A page loads nothing: no scripts, no fonts, no addresses but `data:`. Its content security policy forbids it as well.
"""

from collections.abc import Iterable
from functools import cache

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

COLORS = """
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --card: #ffffff; --ink: #1d1c1a; --soft: #63605a; --line: #e4e1db; --grid: #eeebe6;
  --run: #2f5d9b; --cosine: #9a6b1f; --baseline: #8b8781; --start: #ffffff;
  --compressed: #2a78d6; --fedavg: #d9602b; --secure: #12875a; --other: #7b57b8;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #161615; --card: #1e1e1c; --ink: #ecebe8; --soft: #a7a49d; --line: #34332f; --grid: #2a2926;
    --run: #7fb0ee; --cosine: #d3a75a; --baseline: #96928b; --start: #1e1e1c;
    --compressed: #5b9df0; --fedavg: #ec8152; --secure: #3dbd8a; --other: #a98ae0;
  }
}
@media print {
  :root {
    color-scheme: light;
    --page: #fff; --ink: #000; --soft: #444; --line: #ccc; --grid: #e6e6e6; --baseline: #77736d;
  }
}
"""

_PAGE_STYLE = """
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere;
}
.panel h3 + svg { margin-top: 10px; }
main { max-width: 1220px; margin: 0 auto; padding: 44px 28px 56px; }
a { color: var(--run); }
nav { max-width: 1220px; margin: 0 auto; padding: 14px 28px 0; font-size: 14px; }
nav + main { padding-top: 20px; }
h1 { font-size: 14px; font-weight: 600; margin: 0; color: var(--soft); }
h3 { font-size: 14px; font-weight: 600; margin: 0; }
.panel td:first-child, .panel th:first-child { text-align: left; }
img.pixels { display: block; max-width: 100%; height: auto; image-rendering: pixelated; margin-top: 10px; }
h2 { font-size: 16px; font-weight: 650; margin: 0 0 4px; line-height: 1.35; }
p { margin: 0; }
.lead {
  font-size: 29px; line-height: 1.28; font-weight: 600; letter-spacing: -.012em;
  max-width: 36em; margin: 10px 0 8px; text-wrap: balance;
}
.lead b { color: var(--run); font-weight: 700; }
.soft, figcaption { color: var(--soft); font-size: 14px; }
.state { margin-left: 8px; padding: 0 8px; border: 1px solid var(--line); border-radius: 9px; font-weight: 500; }
dl.facts {
  display: flex; flex-wrap: wrap; gap: 14px 40px; margin: 24px 0 0; padding: 16px 0;
  border: solid var(--line); border-width: 1px 0;
}
dl.facts dt { color: var(--soft); font-size: 13px; }
dl.facts dd { margin: 0; font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; }
.grid2 { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px; margin-top: 24px; }
.grid2 > :last-child:nth-child(odd) { grid-column: 1 / -1; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 0; }
section.card { margin-top: 20px; }
figure { margin: 0; }
figure svg { display: block; overflow: visible; width: 100%; max-width: 540px; height: auto; margin: 14px auto 0; }
.sheets { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 24px; margin-top: 18px; }
.sheets img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; margin-bottom: 10px; }
.sheets b { display: block; color: var(--ink); font-weight: 600; }
.note {
  margin-top: 20px; padding: 10px 16px; max-width: 66em; font-size: 14px;
  border-left: 3px solid var(--fedavg); background: var(--grid); border-radius: 0 6px 6px 0;
}
.scroll { overflow-x: auto; margin-top: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 7px; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; border-bottom-color: var(--line); vertical-align: bottom; }
thead th { white-space: normal; overflow-wrap: normal; line-height: 1.3; }
tbody th { color: inherit; vertical-align: inherit; font-weight: 600; border-bottom-color: var(--grid); }
tfoot td, tfoot th { border-top: 1px solid var(--line); border-bottom: 0; color: inherit; font-weight: 600; }
.left { text-align: left; }
.wrap, .panel tbody th { white-space: normal; min-width: 9em; vertical-align: top; }
.kind::before {
  content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 7px;
  border-radius: 50%; background: var(--other);
}
.kind.t-compressed::before { background: var(--compressed); }
.kind.t-fedavg::before { background: var(--fedavg); border-radius: 1px; }
.kind.t-secure::before { background: var(--secure); border-radius: 0; transform: rotate(45deg); }
.kind.hollow { display: inline-block; max-width: 7em; white-space: normal; overflow-wrap: normal; }
.kind.hollow::before { background: none; box-shadow: inset 0 0 0 2px var(--secure); }
.kind.t-start::before { background: none; box-shadow: inset 0 0 0 1.5px var(--soft); }
.spark { width: 180px; } .spark svg { display: block; width: 180px; height: 28px; }
.several p { margin-top: 6px; max-width: 66em; }
summary { cursor: pointer; font-size: 16px; font-weight: 650; }
.code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
footer { margin-top: 26px; color: var(--soft); font-size: 13px; }
"""

FIGURE_STYLE = """
svg text { font-size: 11px; fill: var(--ink); font-family: inherit; font-variant-numeric: tabular-nums; }
svg .tick, svg .label { fill: var(--soft); }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .value {
  font-size: 12px; font-weight: 600;
  paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round;
}
svg .muted { fill: var(--soft); } svg .strong { fill: var(--run); } svg .bar-name { font-size: 12px; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--line); }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .c-run { stroke: var(--run); } svg .c-cosine { stroke: var(--cosine); stroke-dasharray: 2 4; }
svg .c-baseline { stroke: var(--baseline); stroke-dasharray: 6 4; }
svg .dot { stroke: none; } svg .dot.c-run { fill: var(--run); } svg .dot.c-cosine { fill: var(--cosine); }
svg .mark { stroke: var(--card); stroke-width: 1.2; }
svg .k-compressed { fill: var(--compressed); }
svg .k-fedavg { fill: var(--fedavg); } svg .k-secure { fill: var(--secure); }
svg .k-other { fill: var(--other); } svg .k-baseline { fill: var(--baseline); }
svg .mark.hollow { fill: var(--card); stroke: var(--secure); stroke-width: 2; }
svg .cell { fill: var(--run); } svg .learnt { fill: none; stroke: var(--ink); stroke-width: 1.5; }
svg .number { fill: var(--ink); }
svg .k-start { fill: var(--start); } svg .mark.k-start { stroke: var(--soft); stroke-width: 1.6; }
svg .bar.k-start { fill: var(--soft); }
svg .rail { fill: var(--grid); } svg .overhead { fill: var(--card); fill-opacity: .5; }
svg .drop { stroke: var(--soft); stroke-dasharray: 1 3; } svg .span { stroke: var(--soft); }
"""

_MEDIA_STYLE = """
@media screen and (max-width: 1000px) {
  .grid2 { grid-template-columns: minmax(0, 1fr); }
}
@media screen and (max-width: 820px) {
  main { padding: 24px 14px; }
  nav { padding: 12px 14px 0; }
  .lead { font-size: 23px; }
}
@media screen and (max-width: 520px) {
  .card { padding: 16px 14px; }
  svg text, svg .value, svg .bar-name { font-size: 14px; }
  th, td { padding: 5px; }
  .scroll th:first-child { position: sticky; left: 0; background: var(--card); }
  .wrap, .panel tbody th { min-width: 7em; }
  .scroll tbody .left, .scroll .narrow { white-space: normal; }
  .scroll tbody .kind:not(.hollow) { white-space: nowrap; }
  .kind::before { margin-right: 4px; }
  .scroll .narrow { min-width: 7em; }
  .scroll tbody th.left { min-width: 4em; }
  .stacked thead { display: none; }
  .stacked tr, .stacked th, .stacked td { display: block; border: 0; padding: 2px 0; text-align: left; }
  .stacked tr { border-bottom: 1px solid var(--line); padding: 8px 0; }
  .stacked td::before { content: attr(data-label) ": "; color: var(--soft); }
}
@media print {
  body { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  main { padding: 0; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  body { font-size: 12px; }
  table { font-size: 10.5px; }
  th, td { padding: 3px 5px; }
  .lead { font-size: 22px; }
  .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; }
  .sheets { grid-template-columns: repeat(3, minmax(0, 1fr)); }
}
"""

_SERIES = ("run", "fedavg", "secure", "other", "cosine", "baseline", "soft", "ink")
_SERIES_STYLE = "\n".join(
    f"svg .curve.c-s{n} {{ stroke: var(--{name}); }} svg .dot.c-s{n}, svg .k-s{n} {{ fill: var(--{name}); }}"
    for n, name in enumerate(_SERIES)
)

STYLE = COLORS + _PAGE_STYLE + FIGURE_STYLE + _SERIES_STYLE + _MEDIA_STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_TABLE = """
{%- macro table(id, header, rows, css=(), total=(), stacked=false) -%}
<div class="scroll" tabindex="0"><table{% if id %} id="{{ id }}"{% endif %}{% if stacked %} class="stacked"{% endif %}>
{% if header %}<thead><tr>{% for name in header -%}
<th scope="col"{{ (css[loop.index0] | default("")) | css_class }}>{{ name }}</th>{%- endfor %}</tr></thead>{% endif %}
<tbody>
{% for row in rows %}<tr>{% for cell in row -%}
{% if loop.first %}<th scope="row"{{ (css[0] | default("")) | css_class }}>{{ cell }}</th>
{%- else %}<td{{ (css[loop.index0] | default("")) | css_class }}
{%- if stacked %} data-label="{{ header[loop.index0] }}"{% endif %}>{{ cell }}</td>{% endif -%}
{%- endfor %}</tr>
{% endfor %}</tbody>
{% if total %}<tfoot><tr><th scope="row">{{ total[0] }}</th>{% for cell in total[1:] %}<td>{{ cell }}</td>{% endfor %}
</tr></tfoot>{% endif %}
</table></div>
{%- endmacro -%}
"""
"""A table whose first cells are the headers of their rows; `css` are the classes of its columns.

On a phone the cells of a `stacked` one stand below each other, with the names of their columns.
"""


def render_template(source: str, **values: object) -> str:
    """Render a page; all texts are escaped. The template can call the macro `table` and has the style sheet as `style`.

    Args:
        source: the template, which begins with `PAGE_HEAD`.
    """
    return _compiled(source).render({"style": Markup(STYLE), **values})


@cache
def _compiled(source: str) -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["css_class"] = lambda name: Markup(' class="{}"').format(name) if name else ""
    return environment.from_string(_TABLE + source)


def page_figures(drawn: Iterable[tuple[str, str, str | None]]) -> list[dict[str, str]]:
    """Return the figures of `FIGURES` from (title, caption, SVG); those without an SVG are left out."""
    # Safe as markup: every SVG is built as an XML tree, which escapes its texts.
    return [{"title": title, "caption": caption, "svg": Markup(svg)} for title, caption, svg in drawn if svg]


PAGE_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="%POLICY%">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>{{ title }}{% if state %}<span class="state">{{ state }}</span>{% endif %}</h1>
<p class="lead">{{ lead }}</p>
{% if aside %}<p class="soft">{{ aside }}</p>{% endif %}
""".replace("%POLICY%", POLICY)
"""The beginning of every page, up to what follows the lead in its header."""

FIGURES = """</header>
<div class="grid2">
{% for figure in figures %}<figure class="card">
<h2>{{ figure.title }}</h2>
<figcaption>{{ figure.caption }}</figcaption>
{{ figure.svg }}
</figure>
{% endfor %}</div>
"""
"""The end of a page's header and its figures, each with title, caption and svg."""

PAGE = (
    PAGE_HEAD
    + """{% if stopped %}<p class="note">{{ stopped }}</p>{% endif %}
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}
<dl class="facts">
{% for name, value in facts %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
"""
    + FIGURES
    + """{% if privacy %}<section class="card several">
<h2>Privacy of this run</h2>
{{ table("privacy", ("who", "saw", "what bounds it"), privacy, ("left wrap", "left wrap", "left wrap"), stacked=true) }}
{% for text in secure_text %}<p class="soft">{{ text }}</p>
{% endfor %}
{% if abandoned %}{{ table("abandoned", ("abandoned round", "reason"), abandoned, ("", "left wrap")) }}{% endif %}
</section>{% endif %}
{% if sheets %}<section class="card">
<h2>{{ sheets_title }}</h2>
<p class="soft">{{ sheets_text }}</p>
<div class="sheets">
{% for sheet in sheets %}<figure><img src="{{ sheet.address }}" alt="{{ sheet.alt }}">
<figcaption><b>{{ sheet.title }}</b>{{ sheet.caption }}</figcaption></figure>
{% endfor %}</div>
{% if received %}
<p class="note">Proxies that do not resemble the data are no guarantee of privacy. A proxy encodes the client's update:
with the proxies and the shared weights, that update can be computed and attacked. How much an attack recovers has to be
measured (tofu attack).</p>
{% endif %}
</section>{% endif %}
<section class="card">
<h2>Rounds</h2>
{% if hidden_rounds %}
<p class="soft">The last {{ rows | length }} rounds; {{ hidden_rounds }} earlier ones are in metrics.jsonl.</p>
{% endif %}
{% if rows %}{{ table("rounds", columns, rows, ("", "left"), totals) }}{% else %}
<p class="soft">No round has ended yet.</p>{% endif %}
</section>
{% if clients %}<section class="card"><details{% if clients | length <= 20 %} open{% endif %}>
<summary>Clients ({{ clients | length }})</summary>
{{ table("clients", client_columns, clients, ("left wrap",)) }}
</details></section>{% endif %}
{% for panel in panels %}<section class="card panel">
<h2>{{ panel.title }}</h2>
<p class="soft">{{ panel.text }}</p>
<div class="grid2">
{% for figure in panel.figures %}<figure>
<h3>{{ figure.title }}</h3>
{% if figure.svg %}{{ figure.svg }}{% endif %}
{% if figure.image %}<img class="pixels" src="{{ figure.image }}" alt="{{ figure.title }}">{% endif %}
{% if figure.table %}{{ table("", figure.table.header, figure.table.rows) }}{% endif %}
</figure>
{% endfor %}</div>
</section>{% endfor %}
{% if plugins %}<section class="card">
<h2>Plugin metrics</h2>
<p class="soft">{{ plugins_text }}</p>
{{ table("plugins", ("metric", "rounds", "first", "last", "lowest", "highest", "by round"), plugins,
         ("left wrap", "", "", "", "", "", "left spark")) }}
</section>{% endif %}
{% if failures %}<section class="card">
<h2>Failed replies</h2>
<p class="soft">{{ failures_text }}</p>
{{ table("failures", ("round", "client", "reason"), failures, ("", "left wrap", "left wrap")) }}
</section>{% endif %}
{% if left_out_text %}<section class="card">
<h2>Data left out</h2>
<p class="soft">{{ left_out_text }}</p>
{% if left_out -%}
{{ table("left-out", ("data of", "what was left out, and why"), left_out, ("left", "left wrap")) }}
{%- endif %}
</section>{% endif %}
<section class="card"><details>
<summary>Settings ({{ config | length }})</summary>
{{ table("config", (), config, ("left wrap", "left wrap code")) }}
</details></section>
<footer>{{ footer }}</footer>
</main>
</body>
</html>
"""
)
