"""Write the report of a run: one page that needs nothing but itself.

The page can be written at any time, also between two rounds of a run that still goes on.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tofu.errors import RunError
from tofu.formatting import format_bytes, format_factor, format_fraction, format_seconds
from tofu.reporting.report import figures, images, plugin_metrics
from tofu.reporting.report.chart import KINDS
from tofu.reporting.report.rounds_table import Column, columns_of
from tofu.reporting.report.run_data import Round, RunFolder, Samples, read_run
from tofu.reporting.report.sections import failures_note, privacy_caption, secure_text, stopped_text
from tofu.reporting.report.task_matrix import matrix_caption, task_matrix
from tofu.reporting.report.template import PAGE, STYLE

_MAX_ROWS = 500
_MAX_CHARACTERS = 300
_TITLE = {
    "dataset": "{}",
    "model": "{}",
    "clients": "{} clients",
    "schedule": "schedule {}",
    "compressor": "compressor {}",
    "seed": "seed {}",
}


def write_report(run: Path) -> Path:
    """Write `report.html` into the run folder `run` and return its path.

    Reads `config.json` and `metrics.jsonl`, and if they are there `ledger.jsonl`, `summary.json` and `samples.npz`. The
    file is replaced in one step: who opens it sees the old page or the new one, never half of one.

    Raises `RunError`, in one line that names the file and line, if a file is missing or does not read, or if the page
    cannot be written.
    """
    page = render(read_run(run), run.resolve().name)
    target = run / "report.html"
    try:
        handle, temporary = tempfile.mkstemp(dir=run, prefix=".report-", suffix=".html")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as stream:
                stream.write(page)
            # mkstemp makes files that only their owner reads; a report is to be shown around.
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error.strerror}") from error
    return target


def render(run: RunFolder, name: str) -> str:
    """The page of a run called `name` as HTML; every text from the run's files is escaped."""
    rows, columns = run.rounds[-_MAX_ROWS:], columns_of(run)
    abandoned = [row for row in run.secure if row.abandoned][-_MAX_ROWS:]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(PAGE).render(
        style=Markup(STYLE),
        title=_title(run, name),
        state=_state(run),
        lead=_lead(run),
        aside=_aside(run),
        stopped=_short(stopped_text(run)),
        facts=_facts(run),
        figures=_figures(run),
        sheets=_sheets(run.samples) if run.samples else [],
        received=bool(run.samples and run.samples.proxies),
        sheets_text=_sheets_text(run.samples) if run.samples else "",
        columns=[column.name for column in columns],
        rows=[_row(row, columns) for row in rows],
        hidden_rounds=len(run.rounds) - len(rows),
        totals=[column.total(run) for column in columns],
        secure_text=secure_text(run),
        abandoned=[{"round": row.round, "reason": _short(row.abandoned)} for row in abandoned],
        plugins=_plugins(run),
        plugins_text=_plugins_text(run),
        failures=[
            {"round": failure.round, "client": _short(failure.client), "reason": _short(failure.reason)}
            for failure in run.failures[-_MAX_ROWS:]
        ],
        failures_text=_failures_text(run),
        config=[
            (key, _short(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
            for key, value in run.config.items()
        ],
        footer=_footer(run),
    )


@dataclass(frozen=True)
class _Figure:
    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class _Sheet:
    title: str
    caption: str
    alt: str
    address: str


def _short(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 1]}…"


def _title(run: RunFolder, name: str) -> str:
    words = [text.format(run.config[key]) for key, text in _TITLE.items() if run.config.get(key) not in (None, "")]
    return _short(" · ".join([f"Run {name}", *words]))


def _planned(run: RunFolder) -> int | None:
    planned = run.config.get("rounds")
    return planned if isinstance(planned, int) and not isinstance(planned, bool) else None


def _state(run: RunFolder) -> str:
    done = run.rounds[-1].round if run.rounds else 0
    planned = _planned(run)
    if run.finished:
        return f"stopped early: {done} of {planned} rounds" if run.stopped and planned else ""
    return f"not finished: {done} of {planned} rounds" if planned else f"not finished: {done} rounds so far"


def _lead(run: RunFolder) -> Markup:
    """The run in one sentence."""
    if run.final_accuracy is None or not run.trained:
        return Markup("No round has ended yet.")
    count = run.trained[-1].round
    text = Markup("<b>{}</b> test accuracy after {:,} {}, for <b>{}</b> of uplink").format(
        format_fraction(run.final_accuracy), count, "round" if count == 1 else "rounds", format_bytes(run.uplink_bytes)
    )
    if run.saving is None:
        return text + "."
    fedavg = format_bytes(run.fedavg_uplink_bytes)
    if run.saving >= 1:
        return text + Markup(": <b>{} less</b> than the {} FedAvg sends.").format(format_factor(run.saving), fedavg)
    return text + Markup(": {} more than the {} FedAvg sends.").format(format_factor(1 / run.saving), fedavg)


def _aside(run: RunFolder) -> str:
    """What the comparison rests on."""
    if run.baseline is not None and run.baseline.final_accuracy is not None and run.final_accuracy is not None:
        theirs = run.baseline.final_accuracy
        points = 100 * (run.final_accuracy - theirs)
        relation = (
            f"{abs(points):.1f} points {'above' if points > 0 else 'below'} it"
            if abs(points) >= 0.05
            else "level with it"
        )
        return f"FedAvg, run beside it for the same rounds, reached {format_fraction(theirs)}: this run is {relation}."
    if run.saving is not None:
        return "FedAvg was not run beside it: its bytes are those of the same replies as full updates."
    return ""


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    facts = [("uplink", format_bytes(run.uplink_bytes)), ("downlink", format_bytes(run.downlink_bytes))]
    if run.both_ratio is not None and run.both_ratio > 2:  # below, the downlink is that of FedAvg
        facts.append(("both directions", f"{format_factor(max(run.both_ratio, 0.0))} less than FedAvg"))
    if run.payload_ratio is not None:
        facts.append(("payload ratio", format_factor(max(run.payload_ratio, 0.0))))
    if run.epsilon is not None and run.delta is not None:
        facts.append(("client-level (epsilon, delta)", f"({figures.epsilon_text(run.epsilon)}, {run.delta:g})"))
    if run.mean_accuracy is not None:
        facts.append(("mean accuracy (ACC)", format_fraction(run.mean_accuracy / 100)))
    if run.backward_transfer is not None:
        facts.append(("backward transfer (BWT)", f"{run.backward_transfer:+.1f} points"))
    explained = [row.explained_variance for row in run.rounds if row.explained_variance is not None]
    if explained:
        facts.append(("mean explained variance", format_fraction(sum(explained) / len(explained))))
    kinds = {row.kind: 0 for row in run.trained}
    for row in run.trained:
        kinds[row.kind] += 1
    if kinds:
        facts.append(("rounds", ", ".join(f"{count:,} {_short(kind)}" for kind, count in kinds.items())))
    facts.append(("failed replies", f"{len(run.failures):,}"))
    if abandoned := sum(bool(row.abandoned) for row in run.rounds):
        facts.append(("abandoned rounds", f"{abandoned:,}"))
    if run.seconds is not None:
        facts.append(("time", format_seconds(run.seconds)))
    return facts


def _figures(run: RunFolder) -> list[_Figure]:
    fedavg = (
        "the dashed curve is FedAvg" if run.baseline else "the dashed line is what FedAvg sends for the same rounds"
    )
    counted = any(entry.payload_bytes is not None for entry in run.traffic)
    pale = " The pale end of a bar is not payload." if counted else ""
    drawn = [
        (
            "Accuracy against rounds",
            "Test accuracy of the global model after each round.",
            figures.accuracy_by_round(run),
        ),
        (
            "Accuracy against uplink bytes",
            f"The same rounds, placed by all bytes that clients had sent by then; {fedavg}.",
            figures.accuracy_by_bytes(run),
        ),
        (
            "Bytes by direction and kind",
            "Whole messages, headers included, on one linear scale." + pale,
            figures.bytes_by_kind(run),
        ),
        (
            "How much of the update arrives",
            "The decoded update against the true one, mean over clients. Rounds that send it whole have no mark.",
            figures.explained_variance(run),
        ),
        ("What privacy has cost", privacy_caption(run), figures.epsilon_by_round(run)),
        ("What was learnt and what was kept", matrix_caption(run), task_matrix(run)),
    ]
    # Safe as markup: built as an XML tree, which escapes what it holds.
    return [_Figure(title, caption, Markup(svg)) for title, caption, svg in drawn if svg]


def _sheets(samples: Samples) -> list[_Sheet]:
    sheets = []
    if samples.real is not None:
        caption = _short(samples.real_caption)
        size = "x".join(str(side) for side in samples.real.shape[2:])
        shown = _shown(len(samples.real))
        sheets.append(
            _Sheet(
                "Real images",
                f"{caption}. {shown} of {size}.",
                f"Real images: {caption}",
                images.sheet(samples.real),
            )
        )
    recorded = sorted(samples.proxies)
    for number in sorted({recorded[0], recorded[-1]}) if recorded else []:
        proxies = samples.proxies[number]
        size = "x".join(str(side) for side in proxies.shape[2:])
        alt = f"{len(proxies)} proxies of {size} that one client sent in round {number}"
        caption = (
            f"As decoded. {_shown(len(proxies))} of {size}, values from {proxies.min():.2g} to {proxies.max():.2g}."
        )
        sheets.append(_Sheet(f"Proxies sent in round {number}", caption, alt, images.sheet(proxies)))
    return sheets


def _sheets_text(samples: Samples) -> str:
    text = "Every image is stretched to its own full range, so that any structure in it is as visible as it can be."
    if samples.real is not None:
        text = f"First real images, then what the server received from one client. {text}" if samples.proxies else text
    return text


def _shown(count: int) -> str:
    if count > images.MOST:
        return f"{images.MOST} of {count} images"
    return "One image" if count == 1 else f"{count} images"


def _row(row: Round, columns: Sequence[Column]) -> dict[str, Any]:
    css = row.kind if row.kind in KINDS else "other"
    return {
        "round": row.round,
        "kind": _short(row.kind) + (", abandoned" if row.abandoned else ""),
        "css": f"{css} hollow" if row.abandoned else css,
        "cells": [column.cell(row) for column in columns],
    }


def _plugins(run: RunFolder) -> list[dict[str, Any]]:
    last = run.rounds[-1].round if run.rounds else 0
    return [
        # Safe as markup: built as an XML tree, as every figure is.
        {
            "name": _short(metric.name),
            "cells": metric.cells(),
            "svg": Markup(plugin_metrics.sparkline(metric, last)),
        }
        for metric in plugin_metrics.metrics_of(run)[: plugin_metrics.MOST]
    ]


def _plugins_text(run: RunFolder) -> str:
    text = (
        "Mean over the clients, weighted by their examples, of what each plugin measured; each line has its own scale."
    )
    if run.secure:
        text += " Secure rounds have none."
    hidden = len(plugin_metrics.metrics_of(run)) - plugin_metrics.MOST
    return f"{text} {hidden:,} more are in metrics.jsonl." if hidden > 0 else text


def _failures_text(run: RunFolder) -> str:
    count = len(run.failures)
    text = "One reply was" if count == 1 else f"{count:,} replies were"
    text += f" left out of a round. {failures_note(run)}"
    return text if count <= _MAX_ROWS else f"{text} The last {_MAX_ROWS} are listed; all are in metrics.jsonl."


def _footer(run: RunFolder) -> str:
    text = "Bytes count whole messages, headers included; kB and MB are decimal."
    return f"{text} SHA-256 of the final weights: {_short(run.weights_sha256)}." if run.weights_sha256 else text
