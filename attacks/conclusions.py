"""What follows from an evaluation, in sentences for someone who decides whether the messages may be sent."""

from collections.abc import Sequence

from attacks.evaluate import BROKEN, CONTROL, Row
from tofu.formatting import format_count, format_fraction

ACCIDENT = 0.05
"""Probability below which images counted as recovered are not put down to chance."""

NOISE_BOUNDS = (
    "Only noise (noise-multiplier) bounds what a message reveals to any attacker; secure rounds hide whose images a "
    "sum has."
)


def conclusions(
    summary: Sequence[Row], found: Sequence[Row], easier: str = "", *, where: str = "below", missing: str = ""
) -> list[str]:
    """Return what follows for someone who must decide whether the messages may be sent, one sentence or two each.

    Args:
        summary: of `summarize`.
        found: of `verdicts`.
        easier: the command of `easier_run`, if a run was attacked.
        where: where the reader finds the images.
        missing: of `missing_attacks`.
    """
    sent = [entry for entry in summary if entry["message"] != CONTROL]
    counted = [entry for entry in sent if entry.get("recovered") and entry["recovered"][0] > 0]
    leaking, unsure = _leaking(sent)
    tested = [verdict for verdict in found if verdict["broke"]]
    texts = [missing] * bool(missing)
    untested = sum(not verdict["broke"] and not verdict.get("not_started") for verdict in found)
    nothing = found and not tested and not leaking
    if nothing and any(verdict.get("not_started") for verdict in found):
        texts.append(
            "Nothing can be concluded yet: attacks on the exact update, the control, did not run. Assume that images "
            "are not hidden."
        )
    elif nothing:
        texts.append(
            f"Nothing can be concluded: {_why_nothing(found)}. Assume that images are not hidden. {_next_step(easier)}"
        )
    if leaking:
        texts.append(f"{_came_back(leaking)}: who may not see the images must not get these messages.")
    if unsure:
        texts.append(
            f"Whether images came back from {', '.join(unsure)} is open: reconstructions that know nothing would be "
            f"counted as often. Compare the images {where} yourself."
        )
    if untested and not nothing:
        texts.append(
            f"No exact update was inverted in {untested} of {len(found)} tables: figures there do not tell whether "
            "images are hidden. Assume that they are not."
        )
    if tested and not counted and missing:
        texts.append("The exact update was inverted. Whether images come back from other messages is not known yet.")
    elif tested and sent and not counted:
        texts.append(
            "The exact update was inverted, and no image came back from another message. That is no proof: a better "
            "attack may not fail."
        )
    return [*texts, *_labels(sent, tables=len(found)), *_stopped(summary), NOISE_BOUNDS]


def missing_attacks(rows: Sequence[Row]) -> str:
    """Return how many attacks were not started and how to go on, in one sentence; "" if all were."""
    missing = [row for row in rows if row.get("not_started")]
    if not missing:
        return ""
    total, verb = sum(not row["refused"] for row in rows), "was" if len(missing) == 1 else "were"
    return (
        f"{len(missing):,} of {format_count(total, 'attack')} {verb} not started ({missing[0]['not_started']}): the "
        "same command continues. Their messages' figures are what was found so far."
    )


def _leaking(sent: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Return the messages from which images came back, and those from which as many came back as by chance."""
    counted = [entry for entry in sent if entry.get("recovered") and entry["recovered"][0] > 0]
    sure = dict.fromkeys(entry["message"] for entry in counted if no_accident(entry, len(sent)))
    return list(sure), list(dict.fromkeys(entry["message"] for entry in counted if entry["message"] not in sure))


def _came_back(leaking: Sequence[str]) -> str:
    return f"Images came back from {', '.join(leaking)}"


def _labels(sent: Sequence[Row], *, tables: int) -> list[str]:
    labeled = [entry for entry in sent if entry["labels"]]
    if not labeled:
        return []
    most = max(labeled, key=lambda entry: float(entry["labels"][0]))
    guess = format_fraction(most["labels_guess"][0], 0) if most.get("labels_guess") else "an unknown fraction"
    when = f" in round {most['pretrain_rounds'] + 1}" if tables > 1 else ""
    so_far = " so far" * any(entry.get("not_started") for entry in sent)
    return [
        f"Up to {format_fraction(most['labels'][0], 0)} of the labels were read{so_far}, from {most['message']}{when}; "
        f"guessing equally many of each class gets {guess}."
    ]


def _stopped(summary: Sequence[Row]) -> list[str]:
    stopped, attempts = (sum(entry.get(name, 0) for entry in summary) for name in ("stopped", "attacks"))
    sentence = (
        f"The time limit stopped {stopped} of {format_count(attempts, 'attack')}, which may recover more on a faster "
        "machine or with a longer limit: repeat the command with a larger --seconds."
    )
    return [sentence] * bool(stopped)


def _why_nothing(found: Sequence[Row]) -> str:
    """Return why the attacks prove nothing: without a control, or with one that did not break."""
    if all(verdict["psnr"] is None for verdict in found):
        return "no exact update was attacked, so nothing tells whether these attacks work here"
    return "not even the exact update was inverted, as is usual after many local steps"


def _next_step(easier: str) -> str:
    """Return what makes an update easier to invert: the commands, if a run was attacked."""
    if not easier:
        return (
            "To see more, attack a message of a client with few images in few local steps, which is easier to invert."
        )
    return f"To see more (few images in few local steps make an update easier to invert): {easier}"


def no_accident(entry: Row, tests: int) -> bool:
    """Return whether chance does not explain the images counted as recovered, if so many messages were tested."""
    chance = entry.get("chance")
    return float(entry["psnr"][0]) > BROKEN or (chance is not None and tests * float(chance) < ACCIDENT)


def headline(summary: Sequence[Row], *, tested: bool) -> str:
    """Return from which messages images came back, and the highest mean PSNR on the exact update and on the others.

    Args:
        tested: whether an attack inverted an exact update.
    """
    measured = [entry for entry in summary if entry.get("psnr")]
    most = max((entry["psnr"][0] for entry in measured), default=0.0)
    if measured and not tested and most <= BROKEN:
        return (
            f"Nothing can be concluded: no attack inverted an exact update (at most {most:.1f} dB, {BROKEN:g} needed)."
        )
    sent = [entry for entry in summary if entry["message"] != CONTROL]
    leaking, _ = _leaking(sent)
    sentences = [f"{_came_back(leaking)}."] * bool(leaking)
    for begin, exact in (("On the exact update", True), ("On the other messages", False)):
        entries = [entry for entry in measured if (entry["message"] == CONTROL) == exact]
        if entries:
            worst = max(entries, key=lambda entry: float(entry["psnr"][0]))
            where = worst["attack"] if exact else f"{worst['message']}, {worst['attack']}"
            sentences.append(f"{begin} the best attack reached {worst['psnr'][0]:.1f} dB ({where}).")
    return " ".join(sentences) or "No attack could be made on these messages."
