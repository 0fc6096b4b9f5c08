"""The accuracy matrix of a run of tasks: the accuracy on each task after each task."""

from typing import Any

from tofu.formatting import format_fraction
from tofu.reporting.report.chart import WIDTH, Drawing, fraction_axis, thinned
from tofu.reporting.report.run_data import RunData
from tofu.rounds.record import RoundRecord

_MAX = 20
_LEFT, _TOP = 44, 46
_PALEST, _DARKEST = 0.06, 0.5
"""Opacity of the one hue over the card, so that the ink of either mode stays legible on the darkest cell."""
_KEYS = 8
_NUMBER = 28
"""Units that a number takes; narrower cells show theirs as a tip only."""


def task_matrix(run: RunData) -> str | None:
    """Draw a heat map: row i, column j is the accuracy on task j after task i; None for a run without tasks.

    Of more than `_MAX` tasks, an even selection is drawn. If all clients learn the tasks in one order, the cell of the
    task that was just learned is outlined.
    """
    rows = after_tasks(run)
    count = max((len(row.task_accuracies) for _, row in rows), default=0)
    values = [value for _, row in rows for value in row.task_accuracies if value is not None]
    if count < 2 or not values:
        return None
    drawn = [rows[index] for index in thinned([""] * len(rows), _MAX)]
    columns = thinned([""] * count, _MAX)
    wide = (WIDTH - _LEFT) / len(columns)
    tall = min(max(0.6 * wide, 24.0), 44.0)
    scale = fraction_axis(values)
    bottom = _TOP + tall * len(drawn)
    task, row = rows[-1]
    ends = ", ".join(
        f"{format_fraction(accuracy)} on task {number}"
        for number, accuracy in enumerate(row.task_accuracies[:_MAX])
        if accuracy is not None
    )
    drawing = Drawing(f"Test accuracy of each task after each task. After task {task}: {ends}.", round(bottom) + 36)
    drawing.add("text", "label", "after task", x=0, y=12)
    drawing.add("text", "label middle", "test accuracy (%) on task", x=_LEFT + (WIDTH - _LEFT) / 2, y=12)
    for place, column in enumerate(columns):
        if wide >= _NUMBER or place % 5 == 0:
            drawing.add("text", "tick middle", f"{column}", x=round(_LEFT + (place + 0.5) * wide, 2), y=_TOP - 10)
    for line, (task, row) in enumerate(drawn):
        top = round(_TOP + line * tall, 2)
        drawing.add("text", "tick end", f"{task}", x=_LEFT - 12, y=round(top + tall / 2 + 4, 2))
        for place, column in enumerate(columns):
            if column < len(row.task_accuracies) and (accuracy := row.task_accuracies[column]) is not None:
                left = round(_LEFT + place * wide, 2)
                box: dict[str, Any] = {
                    "x": round(left + 1, 2),
                    "y": round(top + 1, 2),
                    "width": round(wide - 2, 2),
                    "height": round(tall - 2, 2),
                }
                tip = f"after task {task} (round {row.round}), on task {column}: {format_fraction(accuracy, 2)}"
                darkness = (accuracy - scale.low) / (scale.high - scale.low)
                drawing.add("rect", "cell", tip=tip, fill_opacity=_opacity(darkness), rx=2, **box)
                if task == column and one_order(run):
                    drawing.add("rect", "learnt", rx=2, **box)
                if wide < _NUMBER:
                    continue
                text = f"{100 * accuracy:.{1 if wide >= 44 else 0}f}"
                drawing.add("text", "middle number", text, x=round(left + wide / 2, 2), y=round(top + tall / 2 + 4, 2))
    _key(drawing, bottom + 14, (format_fraction(scale.low, 0), format_fraction(scale.high, 0)))
    return drawing.markup()


def after_tasks(run: RunData) -> list[tuple[int, RoundRecord]]:
    """(position of a task, the last round that trained it so far), in order."""
    last = {row.task: row for row in run.rounds if row.task is not None and row.task_accuracies}
    return sorted(last.items(), key=lambda entry: entry[0])


def one_order(run: RunData) -> bool:
    """Return whether all clients learn the tasks in the same order."""
    return bool(run.config.get("task-order", "same") == "same")


def matrix_caption(run: RunData) -> str:
    """Return the caption of `task_matrix`, with what was not measured or not drawn."""
    rows = after_tasks(run)
    text = "Accuracy of the global model on the test images of each task, after the last round of each task."
    if one_order(run):
        text += (
            " Outlined: the task just learned. ACC is the mean of the last row, BWT its mean change from the outlined."
        )
    else:
        text += " Each client learns the tasks in its own order: row 0 comes after each client's first task."
    planned, count = run.setting("rounds"), run.setting("task-count")
    if rows and planned and count and rows[-1][1].round * count < (rows[-1][0] + 1) * planned:
        text += f" Task {rows[-1][0]} has not been trained to its end."
    count = max((len(row.task_accuracies) for _, row in rows), default=0)
    return text + (f" Of {count:,} tasks, {_MAX} are drawn." if count > _MAX else "")


def _key(drawing: Drawing, top: float, ends: tuple[str, str]) -> None:
    """Draw a strip from the palest to the darkest cell, with what they stand for."""
    left, step = WIDTH - 176, 16
    drawing.add("text", "tick end", ends[0], x=left - 8, y=round(top + 14, 2))
    for index in range(_KEYS):
        x = left + index * step
        opacity = _opacity(index / (_KEYS - 1))
        drawing.add("rect", "cell", fill_opacity=opacity, x=x, y=round(top + 3, 2), width=step - 1, height=14)
    drawing.add("text", "tick", ends[1], x=left + _KEYS * step + 8, y=round(top + 14, 2))


def _opacity(darkness: float) -> float:
    return round(_PALEST + (_DARKEST - _PALEST) * min(max(darkness, 0.0), 1.0), 3)
