"""The figures of a run's rounds, each a function from a run to SVG markup (or None where there is nothing to draw)."""

import itertools
import math
from collections.abc import Sequence

from tofu.formatting import format_bytes, format_factor, format_fraction, format_seconds
from tofu.reporting.report.chart import (
    BOTTOM,
    KINDS,
    LEFT,
    RIGHT,
    TOP,
    Axis,
    Bar,
    Drawing,
    bar_chart,
    fraction_axis,
    round_axis,
    thinned,
    tick_bytes,
    value_axis,
)
from tofu.reporting.report.run_data import RunData
from tofu.rounds.record import RoundRecord

# Approximate maximum numbers of points and of marks of a curve; more would overlap.
_POINTS, _MARKS = 240, 60
_CLASSES, _NAME = 20, 60
"""Maximum number of classes in a figure, and of characters of a class's name."""
_KIND_TEXT = {
    "start": "before training",
    "compressed": "compressed round",
    "fedavg": "FedAvg round",
    "secure": "secure round",
}


def accuracy_by_round(run: RunData) -> str | None:
    """Draw test accuracy against rounds, each round marked with its kind, and that of FedAvg if it was run."""
    ours = _measured(run.rounds)
    theirs = _measured(run.baseline.metrics) if run.baseline else []
    if not ours:
        return None
    last = ours[-1][0]
    alt = f"Test accuracy against rounds: {format_fraction(ours[0][1])} at round {ours[0][0].round}, "
    alt += f"{format_fraction(last_accuracy := ours[-1][1])} at round {last.round}."
    if theirs:
        alt += f" FedAvg: {format_fraction(theirs[-1][1])} at round {theirs[-1][0].round}."
    drawing = Drawing(alt)
    x = round_axis(max(row.round for row, _ in ours + theirs))
    y = fraction_axis([accuracy for _, accuracy in ours + theirs])
    drawing.frame(x, y, ("round", "test accuracy"), x_text=_whole)
    drawing.legend(_keys([row for row, _ in ours], "FedAvg" if theirs else ""))
    drawing.curve([(x.at(row.round), y.at(accuracy)) for row, accuracy in theirs], "c-baseline")
    _marked_curve(drawing, [(x.at(row.round), y.at(value), row, format_fraction(value, 2)) for row, value in ours])
    ends = [(x.at(last.round), y.at(last_accuracy), format_fraction(last_accuracy), "strong")]
    if theirs:
        ends.append((x.at(theirs[-1][0].round), y.at(theirs[-1][1]), format_fraction(theirs[-1][1]), "muted"))
    _end_labels(drawing, ends)
    return drawing.markup()


def accuracy_by_bytes(run: RunData) -> str | None:
    """Draw test accuracy against all uplink bytes so far, on a log axis, with FedAvg's curve or at least its bytes."""
    ours = _spent(run.rounds)
    theirs = _spent(run.baseline.metrics) if run.baseline else []
    fedavg = theirs[-1][0] if theirs else run.fedavg_uplink_bytes
    if not ours:
        return None
    sent, _, accuracy = ours[-1]
    alt = f"Test accuracy against uplink bytes: {format_fraction(accuracy)} after {format_bytes(sent)}."
    alt += f" FedAvg sends {format_bytes(fedavg)} for the same rounds." if fedavg else ""
    drawing = Drawing(alt)
    sizes = [size for size, _, _ in ours + theirs] + ([fedavg] if fedavg else [])
    # Padding on both sides, so that no mark lies on the edge and a single point still has an axis.
    x = Axis(min(sizes) / 1.35, max(sizes) * 1.35, LEFT, RIGHT, log=True)
    y = fraction_axis([accuracy for _, _, accuracy in ours + theirs])
    drawing.frame(x, y, ("uplink bytes so far (log scale)", "test accuracy"), x_text=tick_bytes)
    drawing.legend(_keys([row for _, row, _ in ours], "FedAvg" if fedavg else ""))
    if theirs:
        drawing.curve([(x.at(size), y.at(value)) for size, _, value in theirs], "c-baseline")
    elif fedavg:
        drawing.add("line", "curve c-baseline", x1=x.at(fedavg), x2=x.at(fedavg), y1=TOP, y2=BOTTOM)
    points = [
        (x.at(size), y.at(value), row, f"{format_fraction(value, 2)} after {format_bytes(size)}")
        for size, row, value in ours
    ]
    _marked_curve(drawing, points)
    if run.saving and fedavg:
        _span(drawing, x.at(sent), x.at(fedavg), (y.at(accuracy), y.at(theirs[-1][2]) if theirs else TOP), run.saving)
    return drawing.markup()


def loss_by_round(run: RunData) -> str | None:
    """Draw the loss against rounds in a run without accuracy."""
    return _loss(run, [row.round for row in run.rounds], "round")


def loss_by_bytes(run: RunData) -> str | None:
    """Draw the loss against all uplink bytes so far in a run without accuracy."""
    return _loss(run, list(itertools.accumulate(row.uplink_bytes for row in run.rounds)), "uplink bytes so far")


def _loss(run: RunData, spent: Sequence[int], unit: str) -> str | None:
    """Draw the test loss, or else the training loss, of rounds at which `spent` of a unit were spent."""
    found = [(at, row, row.shown_loss) for at, row in zip(spent, run.rounds, strict=True)]
    losses = [(at, row, *loss) for at, row, loss in found if loss is not None]
    if not losses or any(row.accuracy is not None for row in run.rounds):
        return None
    chosen = "test loss" if any(name == "test loss" for _, _, name, _ in losses) else "training loss"
    rows = [(at, row, loss) for at, row, name, loss in losses if name == chosen]
    rows = [rows[index] for index in thinned([row.kind for _, row, _ in rows], _POINTS)]
    title, last = chosen.capitalize(), rows[-1]
    drawing = Drawing(f"{title} against {unit}: {rows[0][2]:.4g} at first, {last[2]:.4g} at last.")
    x = round_axis(last[0]) if unit == "round" else Axis(0, max(last[0], 1), LEFT, RIGHT)
    y = value_axis([loss for _, _, loss in rows])
    drawing.frame(x, y, (unit, chosen), x_text=_whole if unit == "round" else tick_bytes, y_text="{:.4g}".format)
    drawing.legend(_keys([row for _, row, _ in rows], ""))
    _marked_curve(drawing, [(x.at(at), y.at(loss), row, f"{loss:.4g}") for at, row, loss in rows])
    _end_labels(drawing, [(x.at(last[0]), y.at(last[2]), f"{last[2]:.4g}", "strong")])
    return drawing.markup()


def explained_variance(run: RunData) -> str | None:
    """Explained variance of the decoded updates in each round, and their cosine to the true ones."""
    series = [
        (
            "explained variance",
            "c-run",
            [(r, r.explained_variance) for r in run.rounds if r.explained_variance is not None],
        ),
        ("cosine", "c-cosine", [(r, r.cosine) for r in run.rounds if r.cosine is not None]),
    ]
    series = [entry for entry in series if entry[2]]
    if not series:
        return None
    alt = "Decoded against true update by round: " + "; ".join(
        f"{name} {format_fraction(points[0][1])} at first, {format_fraction(points[-1][1])} at last"
        for name, _, points in series
    )
    drawing = Drawing(alt + ".")
    x = round_axis(run.rounds[-1].round)
    y = fraction_axis([value for _, _, points in series for _, value in points] + [1.0])
    drawing.frame(x, y, ("round", "decoded against true update"), x_text=_whole)
    drawing.legend([(css, name) for name, css, _ in series])
    for name, css, every in reversed(series):
        points = [every[index] for index in thinned([css] * len(every), _POINTS)]
        drawing.curve([(x.at(row.round), y.at(value)) for row, value in points], css)
        for row, value in (points[index] for index in thinned([css] * len(points), _MARKS)):
            tip = f"round {row.round}: {name} {format_fraction(value)}"
            drawing.add("circle", f"dot {css}", tip=tip, cx=x.at(row.round), cy=y.at(value), r=3)
    return drawing.markup()


def epsilon_by_round(run: RunData) -> str | None:
    """Draw epsilon spent by each round, and max-epsilon as a line if it is set."""
    rows = [(row, row.epsilon) for row in run.rounds if row.epsilon is not None and math.isfinite(row.epsilon)]
    if not rows:
        return None
    budget = run.setting("max-epsilon")
    last, spent = rows[-1]
    alt = f"Epsilon spent by round: {epsilon_text(rows[0][1])} at round {rows[0][0].round}, "
    alt += f"{epsilon_text(spent)} at round {last.round}."
    drawing = Drawing(alt + (f" The budget is {budget:g}." if budget else ""))
    x, y = round_axis(run.rounds[-1].round), value_axis([0.0, budget, *(value for _, value in rows)])
    drawing.frame(x, y, ("round", "epsilon spent"), x_text=_whole, y_text="{:.4g}".format)
    drawing.legend(_keys([row for row, _ in rows], f"max-epsilon {budget:g}" if budget else ""))
    if budget:
        drawing.add("line", "curve c-baseline", x1=LEFT, x2=RIGHT, y1=y.at(budget), y2=y.at(budget))
    kept = [rows[index] for index in thinned([row.kind for row, _ in rows], _POINTS)]
    _marked_curve(
        drawing, [(x.at(row.round), y.at(value), row, f"epsilon {epsilon_text(value)}") for row, value in kept]
    )
    below = y.at(spent) + 20 if budget or y.at(spent) < TOP + 12 else y.at(spent) - 11
    drawing.add("text", "value end strong", epsilon_text(spent), x=x.at(last.round) + 4, y=below)
    return drawing.markup()


def epsilon_text(epsilon: float) -> str:
    """Return epsilon with four significant digits."""
    return f"{epsilon:.4g}" if math.isfinite(epsilon) else "beyond any bound"


def accuracy_by_class(run: RunData) -> str | None:
    """Draw bars of the final accuracy on each class of the test data, the lowest first, at most `_CLASSES` of them."""
    known = [entry for entry in run.summary.by_class if entry.samples]
    if len(known) < 2:
        return None
    lowest = sorted(known, key=lambda entry: entry.right / entry.samples)[:_CLASSES]
    bars = [
        Bar(
            _class_name(entry.name), f"{format_fraction(entry.right / entry.samples)} of {entry.samples:,}",
            entry.right / entry.samples, "k-start",
        )
        for entry in lowest
    ]  # fmt: skip
    alt = "Final test accuracy by class: " + "; ".join(f"{bar.name}: {bar.note}" for bar in bars) + "."
    return bar_chart(alt, bars, widest=1.0).markup()


def classes_shown(run: RunData) -> str:
    """Return which classes `accuracy_by_class` draws, if not all."""
    known = sum(entry.samples > 0 for entry in run.summary.by_class)
    return f" The {_CLASSES} lowest of {known:,} classes; summary.json has all." if known > _CLASSES else ""


def _class_name(text: str) -> str:
    text = f"class {text}" if text.isdecimal() else text
    return text if len(text) <= _NAME else f"{text[: _NAME - 1]}…"


def bytes_by_kind(run: RunData) -> str | None:
    """Draw bars of all bytes by direction and kind of round, on one linear scale together with FedAvg's uplink."""
    if not run.traffic:
        return None
    bars = []
    for entry in run.traffic:
        note = f"{format_bytes(entry.bytes)}"
        if entry.messages is not None and entry.payload_bytes is not None:
            plural = "" if entry.messages == 1 else "s"
            fraction = format_fraction(min(entry.payload_bytes / entry.bytes, 1))
            note += f" in {entry.messages:,} message{plural}, {fraction} payload"
        css = f"k-{entry.kind}" if entry.kind in KINDS else "k-other"
        kind = "introductions of clients" if entry.kind == "hello" else f"{entry.kind[:60]} rounds"
        name = f"{entry.direction.capitalize()}, {kind}"
        bars.append(Bar(name, note, entry.bytes, css, entry.payload_bytes))
    if size := run.fedavg_uplink_bytes:
        uplinks = sum(entry.direction == "uplink" for entry in run.traffic)
        bars.insert(uplinks, Bar("Uplink, had it been FedAvg", format_bytes(size), size, "k-baseline"))
    return bar_chart("Bytes sent: " + "; ".join(f"{bar.name}: {bar.note}" for bar in bars) + ".", bars).markup()


def time_split(run: RunData) -> str | None:
    """Draw bars of the run's time: training and encoding of the slowest client of each round, the rest of the rounds,
    and what is outside of rounds."""
    training = encoding = rest = 0.0
    for row in run.trained:
        clients = [(client.train_seconds or 0.0, client.encode_seconds or 0.0) for client in row.by_client]
        train, encode = max(clients, key=sum, default=(row.train_seconds or 0.0, row.encode_seconds or 0.0))
        training, encoding = training + train, encoding + encode
        rest += max((row.seconds or 0.0) - train - encode, 0.0)
    if not training + encoding:
        return None
    parts = (
        ("Training", training, "k-compressed"),
        ("Encoding", encoding, "k-fedavg"),
        ("Others and server", rest, "k-other"),
        ("Before and after", max((run.seconds or 0.0) - training - encoding - rest, 0.0), "k-secure"),
    )
    bars = [Bar(name, format_seconds(seconds), seconds, css) for name, seconds, css in parts]
    return bar_chart("Time: " + ", ".join(f"{bar.name} {bar.note}" for bar in bars) + ".", bars).markup()


def time_of_clients(run: RunData) -> str:
    """Return a sentence with the training and encoding time of all clients together, or ""."""
    clients = [client for row in run.trained for client in row.by_client]
    training = sum(client.train_seconds or 0.0 for client in clients)
    encoding = sum(client.encode_seconds or 0.0 for client in clients)
    if not training + encoding:
        return ""
    return f"All clients together trained for {format_seconds(training)} and encoded for {format_seconds(encoding)}."


def _measured(rounds: Sequence[RoundRecord]) -> list[tuple[RoundRecord, float]]:
    rows = [(row, row.accuracy) for row in rounds if row.accuracy is not None]
    return [rows[index] for index in thinned([row.kind for row, _ in rows], _POINTS)]


def _spent(rounds: Sequence[RoundRecord]) -> list[tuple[int, RoundRecord, float]]:
    """(uplink bytes so far, round, accuracy) of all rounds with an accuracy and a positive number of bytes."""
    totals = itertools.accumulate(row.uplink_bytes for row in rounds)
    rows = [(t, row, row.accuracy) for t, row in zip(totals, rounds, strict=True) if t and row.accuracy is not None]
    return [rows[index] for index in thinned([row.kind for _, row, _ in rows], _POINTS)]


def _keys(rows: Sequence[RoundRecord], fedavg: str) -> list[tuple[str, str]]:
    kinds = {row.kind: None for row in rows}
    return [(kind, _KIND_TEXT.get(kind, kind[:20])) for kind in kinds] + ([("c-baseline", fedavg)] if fedavg else [])


def _marked_curve(drawing: Drawing, points: Sequence[tuple[float, float, RoundRecord, str]]) -> None:
    """Draw a curve through (x, y, round, text of the value),
    with the mark of the round's kind at some of the points.
    """
    drawing.curve([(x, y) for x, y, _, _ in points], "c-run")
    for x, y, row, text in (points[index] for index in thinned([row.kind for _, _, row, _ in points], _MARKS)):
        tip = f"round {row.round}, {row.label}{', abandoned' if row.abandoned else ''}: {text}"
        drawing.mark(x, y, row.kind, tip, hollow=bool(row.abandoned))


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _end_labels(drawing: Drawing, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each curve's last value under or over its last mark: the higher one above, the lower one below."""
    top = min(y for _, y, _, _ in ends)
    for index, (x, y, text, css) in enumerate(ends):
        above = y == top and not (index and ends[0][1] == top) and y - 12 > TOP - 8
        drawing.add("text", f"value end {css}", text, x=x + 4, y=y - 11 if above else y + 20)


def _span(drawing: Drawing, start: float, end: float, heights: tuple[float, float], saving: float) -> None:
    """Draw an arrow along the bottom from this run's bytes to FedAvg's, with the factor between them."""
    if abs(end - start) < 24:
        return
    y = BOTTOM - 22
    for x, height in zip((start, end), heights, strict=True):
        drawing.add("line", "drop", x1=x, x2=x, y1=height, y2=y + 6)
    drawing.add("line", "span", x1=start, x2=end, y1=y, y2=y)
    text = f"{format_factor(saving)} fewer bytes" if saving >= 1 else f"{format_factor(1 / saving)} more bytes"
    wide = 9 * len(text)
    middle = min(max((start + end) / 2, LEFT + wide / 2), RIGHT - wide / 2)
    drawing.add("text", "value middle strong", text, x=middle, y=y - 7)
