"""What a person looks at after an evaluation: a table in the terminal, a page and a picture."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np

from attacks.evaluate import SCENARIO_FIELDS, Row, summarize, verdicts
from attacks.picture import Images, contact_sheet

HEADER = ("message", "bytes", "best attack", "PSNR dB", "SSIM", "recovered", "labels", "seeds")

READING = (
    "PSNR and SSIM are of the best of the attacks that were run, chosen with the originals in hand; recovered is the "
    "fraction of images nearer to their reconstruction than any reconstruction is to an image outside the batch. What "
    "these attacks did not recover, others may: a low figure says that this attacker failed, not that the message is "
    "safe. A better encoded update is nearer to the exact one and leaks more."
)

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>What the messages leak</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;width:100%;margin:.5rem 0 1rem}th,td{padding:.25rem .6rem;text-align:right;
border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums}th:first-child,td:first-child,th:nth-child(3),
td:nth-child(3){text-align:left}img{max-width:100%}.no{color:#a00;font-weight:600}ul{margin:0}
</style>
<h1>What the messages leak</h1>
<p>{{ reading }}</p>
{% for part in parts %}
<h2>{{ part.title }}</h2>
<p{% if not part.broke %} class="no"{% endif %}>{{ part.verdict }}</p>
<table><tr>{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in part.rows %}<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}</table>
{% for remark in part.remarks %}<p>{{ remark }}</p>{% endfor %}
{% if part.picture %}<p><img alt="originals and reconstructions" src="data:image/png;base64,{{ part.picture }}"></p>{% endif %}
{% endfor %}
{% if refused %}<h2>Refused</h2><ul>{% for reason in refused %}<li>{{ reason }}</li>{% endfor %}</ul>{% endif %}
</html>
"""  # noqa: E501


def table_rows(entries: Sequence[Row]) -> list[tuple[str, ...]]:
    """The summary's entries as `HEADER` names them."""
    return [
        (
            entry["message"],
            f"{entry['payload_bytes']:,}",
            entry["attack"] or "refused",
            _shown(entry.get("psnr"), 1),
            _shown(entry.get("ssim"), 2),
            _shown(entry.get("recovered"), 2),
            _shown(entry.get("labels"), 2),
            str(entry["seeds"]),
        )
        for entry in entries
    ]


def remarks(entries: Sequence[Row]) -> list[str]:
    """How the codec's two modes compare at the same ratio in one scenario, one sentence each."""
    psnr = {entry["message"]: entry["psnr"][0] for entry in entries if entry.get("psnr")}
    sentences = []
    for message, smooth in psnr.items():
        paper = psnr.get(message.replace("proxy:smooth:", "proxy:paper:"), smooth)
        if message.startswith("proxy:smooth:") and smooth != paper:
            ratio = message.rpartition(":")[2]
            more = (
                "more than paper mode: it encodes the update better, and what is nearer to the exact update says more"
                if smooth > paper
                else "no more than paper mode"
            )
            sentences.append(f"At ratio {ratio} smooth mode leaks {more} ({smooth:.1f} against {paper:.1f} dB).")
    return sentences


def scenario_title(entry: Mapping[str, object]) -> str:
    """A scenario in one line."""
    plural = "" if entry["steps"] == 1 else "s"
    knowledge = "labels known" if entry["know_labels"] else "labels not known"
    name = Path(str(entry["dataset"])).name
    return (
        f"{name}, {entry['model']}, {entry['pretrain_rounds']} rounds before the attack, batch {entry['batch_size']}, "
        f"{entry['steps']} local step{plural}, {knowledge}"
    )


def print_tables(rows: Sequence[Row]) -> None:
    """Each scenario's verdict and table, in Markdown."""
    summary = summarize(rows)
    for verdict in verdicts(rows):
        entries = [e for e in summary if all(e[k] == verdict[k] for k in SCENARIO_FIELDS)]
        print(f"\n{scenario_title(verdict)}\n{verdict['text']}\n")
        lines = [HEADER, *table_rows(entries)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
        for line in [lines[0], tuple("-" * width for width in widths), *lines[1:]]:
            print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        for remark in remarks(entries):
            print(remark)
    print(f"\n{READING}")


def write_report(rows: Sequence[Row], folder: Path) -> Path:
    """Write report.html and one PNG for each scenario into the folder."""
    summary, parts = summarize(rows), []
    for number, verdict in enumerate(verdicts(rows), start=1):
        entries = [e for e in summary if all(e[k] == verdict[k] for k in SCENARIO_FIELDS)]
        picture = _picture(rows, entries, folder)
        if picture:
            (folder / f"scenario-{number}.png").write_bytes(picture)
        parts.append(
            {
                "title": scenario_title(verdict),
                "broke": verdict["broke"],
                "verdict": verdict["text"],
                "rows": table_rows(entries),
                "remarks": remarks(entries),
                "picture": base64.b64encode(picture).decode() if picture else "",
            }
        )
    refused = list(dict.fromkeys(row["refused"] for row in rows if row["refused"]))
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    page = folder / "report.html"
    page.write_text(template.render(parts=parts, header=HEADER, refused=refused, reading=READING))
    return page


def _picture(rows: Sequence[Row], entries: Sequence[Row], folder: Path) -> bytes:
    """Of the first seed, every message by its best attack; b"" where no attack gave images."""
    originals: Images | None = None
    lines: list[tuple[str, Images]] = []
    for entry in entries:
        wanted = {k: entry[k] for k in (*SCENARIO_FIELDS, "message", "attack")}
        cell = next((row for row in rows if all(row[k] == v for k, v in wanted.items())), None)
        if cell is None or not (folder / cell["images"]).is_file():
            continue
        with np.load(folder / cell["images"], allow_pickle=False) as arrays:
            seen, found = arrays["originals"], arrays["reconstructions"]
        # A secure sum shows more images than one client has; its first ones are those of the client under attack.
        originals = seen if originals is None or len(seen) < len(originals) else originals
        lines.append((f"{entry['message']}\n{entry['attack']}, {cell['psnr']:.1f} dB", found))
    return contact_sheet(originals, lines) if originals is not None else b""


def _shown(pair: Sequence[float] | None, digits: int) -> str:
    if pair is None:
        return "-"
    return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"
