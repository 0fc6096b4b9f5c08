"""A lower bound of epsilon, measured with canaries, against the epsilon that a run would report.

Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023: every client is a canary, whose
update in all rounds is the clip norm in an entry of its own, or zero if a fair coin says so. From what the server sees,
an attacker guesses the coins of the clients with the highest and the lowest totals. Theorem 5.2 bounds how many guesses
are right under (epsilon, delta)-differential privacy. The updates pass clipping, rounding, noise and ring as in a run;
in a secure round as many clients collude as the settings tolerate, and these add no noise. Masks, which cancel,
training and messages are left out. The command fails if a bound exceeds the epsilon that is reported.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from scipy import stats

from benchmarks.common import markdown_table, run_command, spread, write_results
from tofu.privacy import Accountant, Noise
from tofu.rounds.steps import AddNoise, Clip, Outgoing
from tofu.secagg.encoding import EncodingConfig, RingEncoder
from tofu.secagg.graph import Topology
from tofu.secagg.masks import SignedVector, add
from tofu.settings import PrivacySettings
from tofu.settings.deprecated import present_kind
from tofu.settings.groups import SecureSettings
from tofu.weights import ParamSpec, Weights

Reals = npt.NDArray[np.float64]

CONFIDENCE, DELTA, BITS, OPEN_VALUES = 0.95, 1e-5, 24, 16
CLIENTS = 30
"""Of one secure sum; further canaries are in sums of their own."""

KINDS = ("secure", "compressed")
NOISE = {1.0: "as accounted", 0.25: "a quarter", 0.0: "none"}
"""The noise that is drawn, over the noise that is accounted for -> its name."""


def lower_bound(right: int, guesses: int, canaries: int, delta: float) -> float:
    """The largest epsilon that so many right guesses refute, with a confidence of `CONFIDENCE`; 0 if they refute none.

    Args:
        right: number of right guesses.
        guesses: of all canaries, the others' coins are not guessed.
    """

    def plausible(epsilon: float) -> bool:
        chance = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
        fewer = np.cumsum(chance.pmf(np.arange(right - 1, -1, -1))) / np.arange(1, right + 1)
        return bool(chance.sf(right - 1) + 2 * canaries * delta * fewer.max(initial=0.0) > 1 - CONFIDENCE)

    low, high = 0.0, 40.0
    if plausible(low):
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if plausible(middle) else (middle, high)
    return low


def secure_round(sent: npt.NDArray[np.bool_], privacy: PrivacySettings, drawn: float) -> Reals:
    """What a server learns of each client from sums over `CLIENTS` [canaries]; some help it and add no noise."""
    return np.concatenate([_secure_sum(part, privacy, drawn) for part in np.split(sent, sent.size // CLIENTS)])


def _secure_sum(sent: npt.NDArray[np.bool_], privacy: PrivacySettings, drawn: float) -> Reals:
    clients, secure = sent.size, SecureSettings()
    spec = ParamSpec({"weight": torch.Size([clients])}, {})
    draft = RingEncoder(spec, EncodingConfig(clients, BITS, 1.0, (1.0,)))
    topology = Topology.of(secure, clients)
    noise = Noise.in_sum(
        privacy, privacy.clip_norm, secure, topology, clients, levels=draft.levels, values=draft.values
    )
    assert noise is not None
    encoder = RingEncoder(spec, EncodingConfig(clients, BITS, 1.0, (noise.grid * draft.levels,)))
    total = np.zeros(encoder.length, np.uint64)
    for client, is_sent in enumerate(sent):
        honest = _steps(noise, drawn if client < noise.sharers else 0.0)
        update = _clipped(clients, client, is_sent, privacy, spec)
        total = add(total, encoder.encode_noised(update, {}, honest).vector, BITS)
    return encoder.decode(total, clients).update["weight"].double().numpy() * clients


def _steps(noise: Noise, drawn: float) -> Callable[[Reals], SignedVector]:
    if not drawn:
        return lambda values: np.rint(values / noise.grid).astype(np.int64)
    return replace(noise, multiplier=noise.multiplier * drawn).steps


def open_round(sent: npt.NDArray[np.bool_], privacy: PrivacySettings, drawn: float) -> Reals:
    """What a server learns of each client from its own update [clients]."""
    spec = ParamSpec({"weight": torch.Size([OPEN_VALUES])}, {})
    found = np.zeros(sent.size)
    for client, is_sent in enumerate(sent):
        update = _clipped(OPEN_VALUES, client % OPEN_VALUES, is_sent, privacy, spec)
        if drawn:
            whole = Noise.alone(privacy, privacy.clip_norm)
            update = AddNoise(replace(whole, multiplier=whole.multiplier * drawn)).apply(Outgoing(update)).update
        found[client] = float(update["weight"][client % OPEN_VALUES])
    return found


def _clipped(values: int, entry: int, is_sent: bool, privacy: PrivacySettings, spec: ParamSpec) -> Weights:
    update = torch.zeros(values)
    update[entry] = 3 * privacy.clip_norm * is_sent  # longer than the norm, so that clipping is part of it
    return Clip(privacy.clip_norm, spec).apply(Outgoing({"weight": update})).update


def audit(kind: str, multiplier: float, rounds: int, canaries: int, drawn: float, seed: int) -> dict[str, Any]:
    """One run with canaries -> its row of results; `drawn` is the noise that is drawn over the accounted one."""
    privacy = PrivacySettings(noise_multiplier=multiplier)
    account, guesses = Accountant(DELTA), canaries // 10 * 2
    sent = np.random.default_rng(seed).random(canaries) < 0.5
    totals = np.zeros(canaries)
    for _ in range(rounds):
        account.spend(multiplier, kind)
        totals += {"secure": secure_round, "compressed": open_round}[kind](sent, privacy, drawn)
    found = score(totals, sent, guesses, account.epsilon)
    return {"kind": kind, "noise_multiplier": multiplier, "rounds": rounds, "drawn": drawn, "seed": seed} | found


def score(totals: Reals, sent: npt.NDArray[np.bool_], guesses: int, epsilon: float) -> dict[str, Any]:
    """Guess the coins of the canaries with the smallest and the largest totals, and bound epsilon by what is right.

    Args:
        totals: what the attacker sees of each canary [canaries].
        sent: whether each canary was sent [canaries].
        guesses: number of guesses, even.
        epsilon: that is reported.
    """
    order = np.argsort(totals, kind="stable")
    right = int((~sent[order[: guesses // 2]]).sum() + sent[order[-(guesses // 2) :]].sum())
    return {
        "right": right, "guesses": guesses, "bound": lower_bound(right, guesses, len(sent), DELTA), "epsilon": epsilon
    }  # fmt: skip


def main(
    multiplier: Annotated[float, typer.Option(help="noise multiplier of each round")] = 4.0,
    rounds: Annotated[int, typer.Option(min=1)] = 4,
    canaries: Annotated[int, typer.Option(min=CLIENTS, help=f"clients, a multiple of {CLIENTS}")] = 600,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Audit both kinds of rounds, with the noise that is accounted for, a quarter of it, and none."""
    rows = [
        audit(kind, multiplier, rounds, canaries, drawn, seed)
        for kind in KINDS for drawn in NOISE for seed in range(seeds)
    ]  # fmt: skip
    print(table(rows))
    settings = {"canaries": canaries, "confidence": CONFIDENCE, "delta": DELTA, "seeds": seeds}
    write_results("audit", settings=settings, rows=rows)
    fail_if_refuted(rows)


def fail_if_refuted(rows: list[dict[str, Any]]) -> None:
    """End the command with an error if a bound exceeds the epsilon of noise that was accounted for."""
    if any(row["drawn"] == 1 and row["bound"] > row["epsilon"] for row in rows):
        raise SystemExit("error: a lower bound exceeds the epsilon that is reported")


def table(rows: list[dict[str, Any]], noise: Mapping[float, str] = NOISE) -> str:
    """The lower bounds by kind of round and noise, and how many of them exceed the epsilon that is reported."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for drawn, name in noise.items():
            found = [row for row in rows if (row["kind"], row["drawn"]) == (kind, drawn)]
            refuted = sum(row["bound"] > row["epsilon"] for row in found)
            bounds = spread([row["bound"] for row in found], 2)
            lines.append(
                [f"`{present_kind(kind)}`", name, f"{found[0]['epsilon']:.2f}", bounds, f"{refuted} of {len(found)}"]
            )
    return markdown_table(("rounds", "noise", "epsilon", "lower bound", "refuted"), lines)


if __name__ == "__main__":
    run_command(main)
