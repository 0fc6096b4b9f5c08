"""The results of an evaluation as Markdown tables in the terminal and as a self-contained page with the images."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from attacks.evaluate import BROKEN, CONTROL, SCENARIO_FIELDS, Row, summarize, verdicts
from tofu.formatting import format_count, format_fraction
from tofu.reporting.report.compare_tables import Table
from tofu.reporting.report.template import PAGE_HEAD, render_template

Images = npt.NDArray[np.float32]
"""[n, channels, height, width] in [-1, 1]."""

TILE, GAP = 56, 4
MAX_IMAGES = 8
"""Maximum number of images in a row."""

ACCIDENT = 0.05
"""Probability below which images counted as recovered are not put down to chance."""

HEADER = ("message", "bytes", "best attack", "PSNR dB", "SSIM", "recovered", "labels", "seeds")

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
{{ table("", header, part.rows, ("left", "", "left")) }}
{% for remark in part.remarks %}<p class="soft">{{ remark }}</p>
{% endfor %}
{% if part.strips %}<div class="sheets">
{% for strip in part.strips %}<figure><img src="{{ strip.address }}" alt="images: {{ strip.title }}">
<figcaption><b>{{ strip.title }}</b>{{ strip.caption }}</figcaption></figure>
{% endfor %}</div>{% endif %}
</section>
{% endfor %}
{% if refused %}<section class="card">
<h2>Refused</h2>
<ul class="soft">{% for reason in refused %}<li>{{ reason }}</li>{% endfor %}</ul>
</section>{% endif %}
<footer>Every trial and number: attacks.json.</footer>
</main>
</body>
</html>
"""
)


def table_rows(entries: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the entries of the summary as rows with the columns of `HEADER`."""
    measures = {"psnr": 1, "ssim": 2, "recovered": 2, "labels": 2}
    return [
        (
            entry["message"],
            f"{entry['payload_bytes']:,}",
            entry["attack"] or "refused",
            *(_shown(entry.get(name), digits, spread=entry["seeds"] > 1) for name, digits in measures.items()),
            str(entry["seeds"]),
        )
        for entry in entries
    ]


def remarks(entries: Sequence[Row]) -> list[str]:
    """Return one sentence per ratio that compares the two modes of the proxy codec in one scenario."""
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


def scenario_title(entry: Row) -> str:
    """Return a scenario in one line."""
    knowledge = "labels known" if entry["know_labels"] else "labels not known"
    name = Path(str(entry["dataset"])).name
    return (
        f"{name}, {entry['model']}, {format_count(entry['pretrain_rounds'], 'round')} before the attack, "
        f"batch {entry['batch_size']}, {format_count(entry['steps'], 'local step')}, {knowledge}"
    )


def conclusions(summary: Sequence[Row], found: Sequence[Row]) -> list[str]:
    """Return what follows for someone who must decide whether the messages may be sent, one sentence or two each.

    Args:
        summary: of `summarize`.
        found: of `verdicts`.
    """
    sent = [entry for entry in summary if entry["message"] != CONTROL]
    counted = [entry for entry in sent if entry.get("recovered") and entry["recovered"][0] > 0]
    sure = [entry for entry in counted if _no_accident(entry, len(sent))]
    leaking = list(dict.fromkeys(entry["message"] for entry in sure))
    unsure = [name for name in dict.fromkeys(entry["message"] for entry in counted) if name not in leaking]
    tested = [verdict for verdict in found if verdict["broke"]]
    texts = []
    if leaking:
        texts.append(
            f"Images came back from {', '.join(leaking)}: who may not see the images must not get these messages."
        )
    if unsure:
        texts.append(
            f"Whether images came back from {', '.join(unsure)} is open: reconstructions that know nothing would be "
            "counted as often. Compare the images below yourself."
        )
    if len(tested) < len(found):
        where = "" if not tested else f" in {len(found) - len(tested)} of {len(found)} tables"
        texts.append(
            f"No exact update was inverted{where}: figures there do not tell whether images are hidden. Assume that "
            "they are not. Fewer local steps and smaller batches make an update easier to invert."
        )
    if tested and not counted:
        texts.append(
            "The exact update was inverted, and no image came back from another message. That is no proof: a better "
            "attack may not fail."
        )
    labeled = [entry for entry in sent if entry["labels"]]
    if labeled:
        most = max(labeled, key=lambda entry: float(entry["labels"][0]))
        guess = format_fraction(most["labels_guess"][0], 0) if most.get("labels_guess") else "an unknown fraction"
        texts.append(
            f"Up to {format_fraction(most['labels'][0], 0)} of the labels were read from {most['message']}; guessing "
            f"equally many of each class gets {guess}."
        )
    texts.append(
        "Only noise (noise-multiplier) bounds what a message reveals to any attacker; secure rounds hide whose images "
        "a sum has."
    )
    return texts


def _no_accident(entry: Row, tests: int) -> bool:
    """Return whether chance does not explain the images counted as recovered, if so many messages were tested."""
    chance = entry.get("chance")
    return float(entry["psnr"][0]) > BROKEN or (chance is not None and tests * float(chance) < ACCIDENT)


def print_tables(rows: Sequence[Row]) -> None:
    """Print each scenario's verdict and table, in Markdown."""
    summary, found = summarize(rows), verdicts(rows)
    for verdict in found:
        entries = [e for e in summary if all(e[k] == verdict[k] for k in SCENARIO_FIELDS)]
        print(f"\n{scenario_title(verdict)}\n{verdict['text']}\n")
        print(Table(HEADER, tuple(table_rows(entries))).markdown())
        for remark in remarks(entries):
            print(remark)
    print(f"\n{READING}\n\nWhat this means:")
    for sentence in conclusions(summary, found):
        print(f"- {sentence}")


def write_report(rows: Sequence[Row], folder: Path) -> Path:
    """Write report.html into the folder."""
    summary, parts, found = summarize(rows), [], verdicts(rows)
    for verdict in found:
        entries = [e for e in summary if all(e[k] == verdict[k] for k in SCENARIO_FIELDS)]
        originals, lines = _images(rows, entries, folder)
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
    refused = list(dict.fromkeys(row["refused"] for row in rows if row["refused"]))
    text = render_template(
        _PAGE, parts=parts, header=HEADER, refused=refused, title="What the messages leak", state="",
        meaning=conclusions(summary, found), reading=READING, aside="",
        lead=_lead(summary, tested=any(verdict["broke"] for verdict in found)),
    )  # fmt: skip
    page = folder / "report.html"
    page.write_text(text)
    return page


def _lead(summary: Sequence[Row], *, tested: bool) -> str:
    """Return the highest mean PSNR on the exact update and on the other messages.

    Args:
        tested: whether an attack inverted an exact update.
    """
    measured = [entry for entry in summary if entry.get("psnr")]
    sentences = []
    for begin, exact in (("On the exact update", True), ("On the other messages", False)):
        entries = [entry for entry in measured if (entry["message"] == "exact") == exact]
        if entries:
            worst = max(entries, key=lambda entry: float(entry["psnr"][0]))
            where = worst["attack"] if exact else f"{worst['message']}, {worst['attack']}"
            sentences.append(f"{begin} the best attack reached {worst['psnr'][0]:.1f} dB ({where}).")
    if sentences and not tested:
        sentences.insert(0, "No attack inverted an exact update, so that low figures prove nothing.")
    return " ".join(sentences) or "No attack could be made on these messages."


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
        lines.append((entry["message"], f"{entry['attack']}, {cell['psnr']:.1f} dB", found))
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
        return "-"
    return f"{pair[0]:.{digits}f}" + f" ± {pair[1]:.{digits}f}" * spread
