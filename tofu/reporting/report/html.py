"""Writes the report of a run: one self-contained page, at any time, also while the run is going on."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
from markupsafe import Markup

from tofu.errors import RunError
from tofu.files import replace_file
from tofu.formatting import compared, format_bytes, format_count, format_factor, format_fraction, format_seconds
from tofu.reporting.report import figures, images, plugin_metrics
from tofu.reporting.report.chart import KINDS
from tofu.reporting.report.client_table import client_columns, client_table
from tofu.reporting.report.panel_figures import panel_context
from tofu.reporting.report.rounds_table import Column, columns_of
from tofu.reporting.report.run_data import ReportImages, RunData, read_run
from tofu.reporting.report.sections import failures_note, privacy_caption, privacy_rows, secure_text, stopped_text
from tofu.reporting.report.task_matrix import matrix_caption, task_matrix
from tofu.reporting.report.template import PAGE, page_figures, render_template
from tofu.rounds.record import RoundRecord

_MAX_ROWS = 500
_MAX_LEFT_OUT = 50
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

    Raises:
        RunError: a file is missing or cannot be read, or the page cannot be written.
    """
    page = render(read_run(run), run.resolve().name)
    target = run / "report.html"
    try:
        replace_file(target, page.encode(errors="replace"))
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error.strerror}") from error
    return target


def render(run: RunData, name: str) -> str:
    """Render the page of a run called `name` as HTML; every text from the run's files is escaped."""
    rows, columns = run.rounds[-_MAX_ROWS:], columns_of(run)
    abandoned = [row for row in run.secure if row.abandoned][-_MAX_ROWS:]
    return render_template(
        PAGE,
        title=_title(run, name),
        state=_state(run),
        lead=_lead(run),
        aside=_aside(run),
        stopped=_short(stopped_text(run)),
        notes=[f"{_short(note)}." for note in run.rounds[0].notes] if run.rounds else [],
        facts=_facts(run),
        figures=_figures(run),
        sheets=_sheets(run.samples) if run.samples else [],
        received=bool(run.samples and run.samples.proxies),
        sheets_title=_sheets_title(run.samples) if run.samples else "",
        sheets_text=_sheets_text(run.samples) if run.samples else "",
        columns=["round", "kind", *(column.name for column in columns)],
        rows=[_row(row, columns) for row in rows],
        hidden_rounds=len(run.rounds) - len(rows),
        totals=["all", "", *(column.total(run) for column in columns)],
        privacy=privacy_rows(run),
        secure_text=secure_text(run),
        abandoned=[(row.round, _short(row.abandoned)) for row in abandoned],
        plugins=_plugins(run),
        plugins_text=_plugins_text(run),
        panels=[panel_context(panel) for panel in run.panels.values()],
        clients=client_table(run),
        client_columns=client_columns(run),
        failures=[
            (row.round, _short(failure.client), _short(failure.reason))
            for row in run.rounds
            for failure in row.failures
        ][-_MAX_ROWS:],
        failures_text=_failures_text(run),
        left_out=[(who, _short(text)) for who, text in run.left_out[:_MAX_LEFT_OUT]],
        left_out_text=_left_out_text(run),
        config=[
            (key, _short(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
            for key, value in run.config.items()
        ],
        footer=_footer(run),
    )


def _short(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 1]}…"


def _title(run: RunData, name: str) -> str:
    named = {key: run.config.get(key) for key in _TITLE if key != "compressor" or run.compresses}
    words = [_TITLE[key].format(value) for key, value in named.items() if value not in (None, "")]
    return _short(" · ".join([f"Run {name}", *words]))


def _planned(run: RunData) -> int | None:
    planned = run.config.get("rounds")
    return planned if isinstance(planned, int) and not isinstance(planned, bool) else None


def _state(run: RunData) -> str:
    done = run.rounds[-1].round if run.rounds else 0
    planned = _planned(run)
    if run.finished:
        return f"stopped early: {done} of {format_count(planned, 'round')}" if run.summary.stopped and planned else ""
    return (
        f"not finished: {done} of {format_count(planned, 'round')}"
        if planned
        else f"not finished: {format_count(done, 'round')} so far"
    )


def _lead(run: RunData) -> Markup:
    """Return the run in one sentence."""
    if not run.trained:
        return Markup("No round has ended yet.")
    count, loss = format_count(run.trained[-1].round, "round"), run.trained[-1].shown_loss
    if run.final_accuracy is not None:
        reached = Markup("<b>{}</b> test accuracy after {}").format(format_fraction(run.final_accuracy), count)
    elif loss is not None:
        reached = Markup("<b>{:.4g}</b> {} after {}").format(loss[1], loss[0], count)
    else:
        reached = Markup("{} without accuracy or loss").format(count)
    text = reached + _spent(run) + Markup(", for <b>{}</b> of uplink").format(format_bytes(run.uplink_bytes))
    if run.saving is None:
        return text + "."
    fedavg = format_bytes(run.fedavg_uplink_bytes)
    much, than = compared(run.saving)
    text += Markup(": <b>{}</b> {} the {} FedAvg sends.").format(much, than, fedavg)
    return text + " " + _both(run)


def _spent(run: RunData) -> Markup:
    """Return what a run with noise spent, for the headline; "" for other runs."""
    if run.epsilon is None or run.delta is None:
        return Markup()
    bounds = [(run.epsilon, ""), (run.model_epsilon, " against readers of the models")]
    for epsilon, whom in bounds:
        if epsilon is not None and math.isfinite(epsilon):
            text = Markup(", with <b>epsilon {}</b> at delta {:g}{}")
            return text.format(figures.epsilon_text(epsilon), run.delta, whom)
    return Markup(", with <b>no bound on epsilon</b>")


def _aside(run: RunData) -> str:
    """Return how FedAvg's numbers were obtained."""
    theirs = run.baseline_accuracy
    if theirs is not None and run.final_accuracy is not None:
        points = 100 * (run.final_accuracy - theirs)
        relation = (
            f"{abs(points):.1f} points {'above' if points > 0 else 'below'} it"
            if abs(points) >= 0.05
            else "level with it"
        )
        return f"A FedAvg run over the same rounds reached {format_fraction(theirs)}: this run is {relation}."
    if run.saving is not None:
        return "FedAvg was not run: its bytes are those of the same replies with float32 updates."
    return ""


def _both(run: RunData) -> Markup:
    """Return the bytes of both directions, for the headline."""
    text = Markup("Both directions: <b>{}</b>").format(format_bytes(run.uplink_bytes + run.downlink_bytes))
    ratio = run.summary.both_ratio
    if ratio is None or ratio <= 0:
        return text + "."
    return text + Markup(", {} {} FedAvg.").format(*compared(ratio))


def _facts(run: RunData) -> list[tuple[str, str]]:
    facts = [("uplink", format_bytes(run.uplink_bytes)), ("downlink", format_bytes(run.downlink_bytes))]
    if run.summary.payload_ratio is not None:
        facts.append(("payload ratio", format_factor(max(run.summary.payload_ratio, 0.0))))
    if run.epsilon is not None and run.delta is not None:
        facts.append(("client-level (epsilon, delta)", f"({figures.epsilon_text(run.epsilon)}, {run.delta:g})"))
    if run.model_epsilon is not None and run.model_epsilon != run.epsilon:
        facts.append(("epsilon against who sees the models", figures.epsilon_text(run.model_epsilon)))
    if run.summary.mean_accuracy is not None:
        facts.append(("mean accuracy (ACC)", format_fraction(run.summary.mean_accuracy / 100)))
    if run.summary.backward_transfer is not None:
        facts.append(("backward transfer (BWT)", f"{run.summary.backward_transfer:+.1f} points"))
    explained = [row.explained_variance for row in run.rounds if row.explained_variance is not None]
    if explained:
        facts.append(("mean explained variance", format_fraction(sum(explained) / len(explained))))
    kinds = Counter(row.label for row in run.trained)
    if kinds:
        facts.append(("rounds", ", ".join(f"{count:,} {_short(kind)}" for kind, count in kinds.items())))
    facts.append(("failed replies", f"{run.failures:,}"))
    if late := sum(row.late or 0 for row in run.rounds):
        facts.append(("replies not waited for", f"{late:,}"))
    if tested := [row.accuracy_quantiles for row in run.rounds if row.accuracy_quantiles]:
        low, middle = (tested[-1].get(percent) or 0.0 for percent in ("10", "50"))
        facts.append(
            ("clients' own accuracy", f"median {format_fraction(middle)}, lowest tenth {format_fraction(low)}")
        )
    if linked := [max(value or 0.0 for value in row.link_seconds.values()) for row in run.rounds if row.link_seconds]:
        facts.append(("transfers on simulated links", f"{format_seconds(sum(linked))} (slowest client of each round)"))
    if abandoned := sum(bool(row.abandoned) for row in run.rounds):
        facts.append(("abandoned rounds", f"{abandoned:,}"))
    if run.seconds is not None:
        facts.append(("time", format_seconds(run.seconds)))
    return facts


def _figures(run: RunData) -> list[dict[str, str]]:
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
            f"The same rounds against all bytes that clients had sent by then; {fedavg}.",
            figures.accuracy_by_bytes(run),
        ),
        ("Loss against rounds", "Loss of the global model, on test data if there are any.", figures.loss_by_round(run)),
        (
            "Accuracy by class",
            "The final model on the server's test images of each class, the lowest accuracy first."
            + figures.classes_shown(run),
            figures.accuracy_by_class(run),
        ),
        (
            "Bytes by direction and kind",
            "Whole messages, headers included, on one linear scale." + pale,
            figures.bytes_by_kind(run),
        ),
        (
            "Quality of the decoded updates",
            "The decoded update against the true one, mean over clients. Uncompressed rounds have no mark.",
            figures.explained_variance(run),
        ),
        (
            "Where the time went",
            "In each round, training and encoding of the client that took longest. Others and server is the rest of "
            "the rounds: clients that share a processor with that one or with the server, messages and the server. "
            + figures.time_of_clients(run),
            figures.time_split(run),
        ),
        ("Privacy loss", privacy_caption(run), figures.epsilon_by_round(run)),
        ("Accuracy by task", matrix_caption(run), task_matrix(run)),
    ]
    return page_figures(drawn)


def _sheets(samples: ReportImages) -> list[dict[str, str]]:
    sheets = []
    if samples.real is not None:
        name = _short(samples.real_caption)
        caption = f"{name}. {_shown(len(samples.real))} of {_size(samples.real)}."
        sheets.append(_sheet("Real images", caption, f"Real images: {name}", samples.real))
    recorded = sorted(samples.proxies)
    for number in sorted({recorded[0], recorded[-1]}) if recorded else []:
        proxies = samples.proxies[number]
        alt = f"{len(proxies)} proxies of {_size(proxies)} that one client sent in round {number}"
        values = f"values from {proxies.min():.2g} to {proxies.max():.2g}"
        caption = f"As decoded. {_shown(len(proxies))} of {_size(proxies)}, {values}."
        sheets.append(_sheet(f"Proxies sent in round {number}", caption, alt, proxies))
    return sheets


def _sheet(title: str, caption: str, alt: str, pixels: npt.NDArray[Any]) -> dict[str, str]:
    return {"title": title, "caption": caption, "alt": alt, "address": images.sheet(pixels)}


def _size(pixels: npt.NDArray[Any]) -> str:
    return f"{pixels.shape[2]}x{pixels.shape[3]}"


def _sheets_text(samples: ReportImages) -> str:
    text = "Every image is stretched to its own full range, which makes structure visible."
    if samples.proxies:
        begin = "The" if samples.real is None else "Real images, and the"
        text = f"{begin} proxies that the server decoded from one client. {text}"
    return text


def _sheets_title(samples: ReportImages) -> str:
    if samples.real is None:
        return "Decoded proxies"
    return "Real images and decoded proxies" if samples.proxies else "Real images"


def _shown(count: int) -> str:
    if count > images.MAX:
        return f"{images.MAX} of {count} images"
    return "One image" if count == 1 else f"{count} images"


def _row(row: RoundRecord, columns: Sequence[Column]) -> tuple[object, ...]:
    css = (row.kind if row.kind in KINDS else "other") + (" hollow" if row.abandoned else "")
    kind = _short(row.label) + (", abandoned" if row.abandoned else "")
    mark = Markup('<span class="kind t-{}">{}</span>').format(css, kind)
    return row.round, mark, *(column.cell(row) for column in columns)


def _plugins(run: RunData) -> list[tuple[str, ...]]:
    last = run.rounds[-1].round if run.rounds else 0
    return [
        # Safe as markup: built as an XML tree, as every figure is.
        (_short(metric.name), *metric.cells(), Markup(plugin_metrics.sparkline(metric, last)))
        for metric in plugin_metrics.metrics_of(run)[: plugin_metrics.MAX]
    ]


def _plugins_text(run: RunData) -> str:
    text = "Means over the clients, weighted by examples; each line has its own scale."
    if run.secure:
        text += " Secure rounds have none."
    hidden = len(plugin_metrics.metrics_of(run)) - plugin_metrics.MAX
    return f"{text} {hidden:,} more are in metrics.jsonl." if hidden > 0 else text


def _failures_text(run: RunData) -> str:
    count = run.failures
    text = "One reply was" if count == 1 else f"{count:,} replies were"
    text += f" left out of a round. {failures_note(run)}"
    return text if count <= _MAX_ROWS else f"{text} The last {_MAX_ROWS} are listed; all are in metrics.jsonl."


def _left_out_text(run: RunData) -> str:
    count = max(run.summary.unreadable, len(run.left_out))
    if not count:
        return ""
    text = f"{count:,} {'image or row was' if count == 1 else 'images or rows were'} not used in this run."
    hidden = count - min(len(run.left_out), _MAX_LEFT_OUT)
    return text + (f" {hidden:,} of them are not listed: see data.json and the clients' logs." if hidden > 0 else "")


def _footer(run: RunData) -> str:
    text = "Bytes count whole messages, headers included; kB and MB are decimal."
    digest = run.summary.weights_sha256
    return f"{text} SHA-256 of the final weights: {_short(digest)}." if digest else text
