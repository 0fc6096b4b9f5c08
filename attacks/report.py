"""The results of an evaluation as Markdown tables in the terminal and as a self-contained page with the images."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from attacks.conclusions import conclusions, headline, missing_attacks, no_accident
from attacks.evaluate import SCENARIO_FIELDS, Row, finished, summarize, verdicts
from tofu.formatting import format_count
from tofu.reporting.report.compare_tables import Table
from tofu.reporting.report.template import PAGE_HEAD, render_template

Images = npt.NDArray[np.float32]
"""[n, channels, height, width] in [-1, 1]."""

TILE, GAP = 56, 4
MAX_IMAGES = 8
"""Maximum number of images in a row."""

FLAT = 0.05
"""Standard deviation of pixels in [-1, 1] below which a reconstruction shows nothing."""

HEADER = ("message", "recovered", "PSNR dB", "labels", "best attack", "SSIM", "bytes", "seeds")

_NONE = "-"

READING = (
    "PSNR and SSIM are of the best of the attacks that were run, chosen with the originals in hand; recovered is the "
    "fraction of images nearer to their reconstruction than any reconstruction is to an image outside the batch. What "
    "these attacks did not recover, others may: a low figure says that this attacker failed, not that the message is "
    "safe. A better encoded update is nearer to the exact one and leaks more."
)

_PAGE = (
    PAGE_HEAD
    + """</header>
<section class="card">
<h2>What this means</h2>
<ul>{% for sentence in meaning %}<li>{{ sentence }}</li>{% endfor %}</ul>
<p class="soft">{{ reading }}</p>
</section>
{% for part in parts %}<section class="card">
<h2>{{ part.title }}</h2>
<p class="{{ 'soft' if part.broke else 'note' }}">{{ part.verdict }}</p>
{{ table("", header, part.rows, ("left", "", "", "", "left"), stacked=true) }}
{% for remark in part.remarks %}<p class="soft">{{ remark }}</p>
{% endfor %}
{% if part.strips %}<div class="sheets">
{% for strip in part.strips %}<figure><img src="{{ strip.address }}" alt="images: {{ strip.title }}">
<figcaption><b>{{ strip.title }}</b>{{ strip.caption }}</figcaption></figure>
{% endfor %}</div>{% endif %}
</section>
{% endfor %}
{% if impossible %}<section class="card">
<h2>Attacks that are not possible here</h2>
<ul class="soft">{% for reason in impossible %}<li>{{ reason }}</li>{% endfor %}</ul>
</section>{% endif %}
<footer>Every trial and number: attacks.json.</footer>
</main>
</body>
</html>
"""
)


def table_rows(entries: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the entries of the summary as rows with the columns of `HEADER`."""
    rows: list[tuple[str, ...]] = []
    for entry in entries:
        several = entry["seeds"] > 1
        psnr, ssim, recovered, labels, guess = (
            _shown(entry.get(name), digits, spread=several)
            for name, digits in {"psnr": 1, "ssim": 2, "recovered": 2, "labels": 2, "labels_guess": 2}.items()
        )
        if entry.get("recovered") and entry["recovered"][0] > 0 and not no_accident(entry, len(entries)):
            recovered += " (as by chance)"
        labels += f" (guess {guess})" * (labels != _NONE and guess != _NONE)
        missing, attack = entry.get("not_started", 0), entry["attack"] or _NONE
        if missing:
            recovered, labels = (text if text == _NONE else f"{text} so far" for text in (recovered, labels))
            attack += f" ({format_count(missing, 'attack')} not run)"
        size, seeds = f"{entry['payload_bytes']:,}", str(entry["seeds"])
        rows.append((entry["message"], recovered, psnr, labels, attack, ssim, size, seeds))
    return rows


def impossible(rows: Sequence[Row]) -> list[str]:
    """Return each attack that was not possible, the messages and the reason, as one line."""
    messages: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["refused"]:
            reason = row["refused"].partition(": ")[2] or row["refused"]
            messages.setdefault((row["attack"], reason), []).append(row["message"])
    return [f"{attack} on {', '.join(dict.fromkeys(on))}: {why}" for (attack, why), on in messages.items()]


def remarks(entries: Sequence[Row]) -> list[str]:
    """Return one sentence per ratio that compares the two modes of the proxy codec in one scenario."""
    complete = [entry for entry in entries if entry.get("psnr") and not entry.get("not_started")]
    psnr = {entry["message"]: entry["psnr"][0] for entry in complete}
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


def scenario_title(entry: Row) -> str:
    """Return a scenario in one line."""
    knowledge = "labels known" if entry["know_labels"] else "labels not known"
    name = Path(str(entry["dataset"])).name
    return (
        f"{name}, {entry['model']}, {format_count(entry['pretrain_rounds'], 'round')} before the attack, "
        f"batch {entry['batch_size']}, {format_count(entry['steps'], 'local step')}, {knowledge}"
    )


def easier_of(rows: Sequence[Row]) -> str:
    """Return the command that the rows of a run have (`attacks.easier_run`), or ""."""
    return str(rows[0].get("easier_run", "")) if rows else ""


def print_tables(rows: Sequence[Row], page: Path | None = None) -> None:
    """Print each scenario's verdict and table, in Markdown.

    Args:
        page: the report, which has the images.
    """
    summary, found = summarize(rows), verdicts(rows)
    for verdict in found:
        entries = [e for e in summary if all(e[k] == verdict[k] for k in SCENARIO_FIELDS)]
        print(f"\n{scenario_title(verdict)}\n{verdict['text']}\n")
        print(Table(HEADER, tuple(table_rows(entries))).markdown())
        for remark in remarks(entries):
            print(remark)
    print(f"\n{READING}\n\nWhat this means:")
    where = f"in {page}" if page else "in the report"
    for sentence in conclusions(summary, found, easier_of(rows), where=where, missing=missing_attacks(rows)):
        print(f"- {sentence}")


def write_report(rows: Sequence[Row], folder: Path) -> Path:
    """Write report.html into the folder."""
    summary, parts, found = summarize(rows), [], verdicts(rows)
    for verdict in found:
        entries = [e for e in summary if all(e[k] == verdict[k] for k in SCENARIO_FIELDS)]
        originals, lines = _images(finished(rows), entries, folder)
        strips = []
        if originals is not None:
            strips = [_strip(*line) for line in (("originals", "", originals), *lines)]
        parts.append(
            {
                "title": scenario_title(verdict),
                "broke": verdict["broke"],
                "verdict": verdict["text"],
                "rows": table_rows(entries),
                "remarks": remarks(entries),
                "strips": strips,
            }
        )
    text = render_template(
        _PAGE, parts=parts, header=HEADER, impossible=impossible(rows), title="What the messages leak", state="",
        meaning=conclusions(summary, found, easier_of(rows), missing=missing_attacks(rows)), reading=READING, aside="",
        lead=headline(summary, tested=any(verdict["broke"] for verdict in found)),
    )  # fmt: skip
    page = folder / "report.html"
    page.write_text(text)
    return page


def _images(
    rows: Sequence[Row], entries: Sequence[Row], folder: Path
) -> tuple[Images | None, list[tuple[str, str, Images]]]:
    """Return the originals of the first seed and, for each message, its name, its best attack and the reconstructions.

    None and an empty list if no attack returned images.
    """
    originals: Images | None = None
    lines: list[tuple[str, str, Images]] = []
    for entry in entries:
        wanted = {k: entry[k] for k in (*SCENARIO_FIELDS, "message", "attack")}
        cell = next((row for row in rows if all(row[k] == v for k, v in wanted.items())), None)
        if cell is None or not (folder / cell["images"]).is_file():
            continue
        with np.load(folder / cell["images"], allow_pickle=False) as arrays:
            seen, found = arrays["originals"], arrays["reconstructions"]
        # A secure sum has the images of several clients; the first are those of the attacked client.
        originals = seen if originals is None or len(seen) < len(originals) else originals
        flat = sum(float(image.std()) < FLAT for image in found[:MAX_IMAGES])
        nothing = f"; {flat} of {min(len(found), MAX_IMAGES)} are flat: nothing was found" if flat else ""
        lines.append((entry["message"], f"{entry['attack']}, {cell['psnr']:.1f} dB{nothing}", found))
    return originals, lines


def _strip(title: str, caption: str, images: Images) -> dict[str, str]:
    """Draw the first `MAX_IMAGES` images in one row, with transparent gaps, as a PNG in a `data:` address."""
    strip = Image.new("RGBA", (min(MAX_IMAGES, len(images)) * (TILE + GAP) - GAP, TILE))
    for column, image in enumerate(images[:MAX_IMAGES]):
        values = (np.nan_to_num(image).clip(-1, 1) * 127.5 + 127.5).round().astype(np.uint8)
        tile = Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0)).convert("RGB")
        strip.paste(tile.resize((TILE, TILE), Image.Resampling.NEAREST), (column * (TILE + GAP), 0))
    encoded = io.BytesIO()
    strip.save(encoded, "PNG", optimize=True)
    address = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    return {"title": title, "caption": caption, "address": address}


def _shown(pair: Sequence[float] | None, digits: int, *, spread: bool) -> str:
    if pair is None:
        return _NONE
    return f"{pair[0]:.{digits}f}" + f" ± {pair[1]:.{digits}f}" * spread
