"""The report's texts on secure rounds and differential privacy: the guarantees and their limits."""

import math

from tofu.formatting import format_fraction
from tofu.reporting.report.figures import epsilon_text
from tofu.reporting.report.run_data import RunData
from tofu.rounds.record import round_label


def privacy_rows(run: RunData) -> list[tuple[str, str, str]]:
    """Return the rows of the privacy table: who saw what, and what bounds the privacy loss;
    [] before the first round.
    """
    if not run.trained:
        return []
    summed = sum(not row.abandoned for row in run.secure)
    single = len(run.trained) - len(run.secure)
    saw = [f"the update of each client in {_rounds(single, 'open')}"] if single else []
    saw += [f"only the sum of the updates in {_rounds(summed, 'secure')}"] if summed else []
    sums = f"Secure aggregation: no single update.{_rests_on(run)}" if summed else ""
    bound = _bound(run, run.epsilon)
    server = [sums, bound or ("Nothing bounds what the sums reveal." if not single else "")]
    if single and not bound:
        server.append(f"Nothing in the {_rounds(single, 'open')}: tofu attack measures what an update reveals.")
    model = _bound(run, run.model_epsilon) or "Nothing. A model can reveal some of what it was trained on."
    return [
        ("The server", (" and ".join(saw) or "no update").capitalize(), " ".join(filter(None, server))),
        ("The clients", "The global weights of the rounds that they took part in", model),
        ("Who receives the model", "The final weights", model),
        ("Who reads this page", _on_page(run), "Nothing: it is what the server knows."),
    ]


def _bound(run: RunData, epsilon: float | None) -> str:
    if epsilon is None or run.delta is None or not math.isfinite(epsilon):
        return ""
    often = "in all rounds" if run.config.get("server-noise", "none") == "none" else "as often as clients may"
    return (
        f"Differential privacy of whole clients: epsilon {epsilon_text(epsilon)} at delta {run.delta:g}, for a client "
        f"that took part {often}."
    )


def _on_page(run: RunData) -> str:
    shown = ["accuracies, losses and bytes"]
    if any(row.by_client for row in run.rounds):
        shown.append("times and quality of each client" + ("" if run.delta else ", and its number of images"))
    if run.samples and run.samples.real is not None:
        shown.append(f"{len(run.samples.real)} images of one client (report-images)")
    if run.samples and run.samples.proxies:
        shown.append("decoded proxies of one client")
    return "; ".join(shown).capitalize()


def secure_text(run: RunData) -> list[str]:
    """Return paragraphs that state what the server learned in secure and other rounds;
    [] for a run without secure rounds.
    """
    if not run.secure:
        return []
    abandoned = sum(bool(row.abandoned) for row in run.secure)
    summed = len(run.secure) - abandoned
    paragraphs = []
    if summed:
        learned = (
            f"In {_rounds(summed, 'secure')} the server learned the weighted sum of the clients' updates"
            f"{'' if run.delta is None else ', noise included,'} and which clients were in it, not a single client's "
            "update."
        )
        if run.delta is None:
            sums = ["the number of examples", "the training loss", "what was clipped"]
            sums += ["what plugins add up"] if run.config.get("plugins") else []
            learned += f" As sums, too, it learned {', '.join(sums[:-1])} and {sums[-1]}."
        learned += _rests_on(run)
        if summed > 1:
            learned += " Sums of several rounds with changing clients reveal more than each of them."
        paragraphs.append(learned)
    paragraphs += _others(run)
    if abandoned:
        paragraphs.append(
            f"{_rounds(abandoned, 'secure').capitalize()} {'was' if abandoned == 1 else 'were'} abandoned: the server "
            "learned no sum, and the global weights stayed as they were."
        )
    if run.delta is not None and summed:
        paragraphs.append("Under differential privacy, clients do not report what they clipped.")
    else:
        paragraphs += _clipped(run)
    return paragraphs


def privacy_caption(run: RunData) -> str:
    """Return the caption of the privacy figure: what epsilon bounds, and what it does not."""
    text = (
        "(epsilon, delta)-differential privacy at the level of clients: epsilon spent by the end of each round, for a "
        f"client that took part in all of them; delta is {run.delta or 0:g}. It covers the updates, not what else "
        "clients reveal: an error, or how long they took."
    )
    if run.setting("max-epsilon"):
        text += " The dashed line is the budget: no round that would exceed it starts."
    return text


def stopped_text(run: RunData) -> str:
    """Return why the run ended before its last round, or ""."""
    return f"Stopped early: {run.summary.stopped}." if run.summary.stopped else ""


def failures_note(run: RunData) -> str:
    """Return how rounds with failures ended."""
    text = "The round went on with the others"
    if any(row.failures and row.abandoned for row in run.secure):
        text += ", unless it was abandoned"
    if any(row.failures for row in run.secure):
        text += ". A client of a secure round that failed after its masked vector had come is in the sum all the same"
    return f"{text}."


def _others(run: RunData) -> list[str]:
    """Return paragraphs about the rounds that are not secure."""
    kinds = {kind: sum(row.kind == kind for row in run.trained) for kind in ("compressed", "fedavg")}
    paragraphs = []
    why = "proxies of different clients do not add up, so " if run.config.get("compressor", "proxy") == "proxy" else ""
    label = round_label("compressed", str(run.config.get("compressor", "")))
    if kinds["compressed"]:
        paragraphs.append(
            f"Secure aggregation does not cover the {_rounds(kinds['compressed'], label)}: {why}the server decoded "
            "each client's update."
        )
    if kinds["fedavg"]:
        paragraphs.append(
            f"Nor does it cover the {_rounds(kinds['fedavg'], 'FedAvg')}: the server saw each client's update."
        )
    return paragraphs


def _rests_on(run: RunData) -> str:
    rests = []
    if colluding := run.setting("secagg-collusion-fraction"):
        rests.append(f"at most {format_fraction(min(colluding, 1.0), 0)} of the clients colluding with the server")
    if run.config.get("secure-identities") == "":
        rests.append("a server that follows the protocol (secure-identities is not set)")
    return f" This assumes {' and '.join(rests)}." if rests else ""


def _clipped(run: RunData) -> list[str]:
    cut = [row for row in run.secure if row.clipped]
    if not cut:
        return []
    text = f"{sum(row.clipped or 0 for row in cut):,} values of all clients were clipped in {_rounds(len(cut))}"
    distances = [(row.largest_clipped, row.round) for row in cut if row.largest_clipped is not None]
    if distances:
        largest, round_ = max(distances)
        text += f", the largest at most {largest:.3g} times its range (round {round_})"
    return [f"{text}."]


def _rounds(count: int, kind: str = "") -> str:
    number = "one" if count == 1 else f"{count:,}"
    return f"{number} {kind + ' ' if kind else ''}round{'' if count == 1 else 's'}"
