"""Simulated links: how long a client's messages would take over a slow network."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tofu.rng import derive_generator
from tofu.settings import Settings


@dataclass(frozen=True)
class LinkSimulator:
    """Computes the transfer times of a run from its ledger; the run itself is not slowed down.

    A client's rates are the settings' times exp(spread * z) with z standard normal, fixed for the client in a run: a
    log-normal distribution, whose median is the setting.

    Attributes:
        uplink, downlink: median rates in Mbit/s; 0 is infinitely fast.
        spread: standard deviation of the logarithm of a client's rates.
        latency: seconds per message.
    """

    uplink: float
    downlink: float
    spread: float
    latency: float
    seed: int

    @staticmethod
    def of(settings: Settings) -> "LinkSimulator":
        link = settings.link
        return LinkSimulator(
            link.uplink_mbps, link.downlink_mbps, link.link_spread, link.link_latency, settings.run.seed
        )

    def __bool__(self) -> bool:
        return bool(self.uplink or self.downlink or self.latency)

    def factor(self, client: str) -> float:
        """Return a client's rates over the median rates."""
        z = torch.randn((), generator=derive_generator(self.seed, client, "link"), dtype=torch.float64)
        return math.exp(self.spread * float(z))

    def seconds(self, messages: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Return a mapping: client -> seconds that its messages (rows of the ledger) take,
        one after the other; empty without links.
        """
        found: dict[str, float] = {}
        if not self:
            return found
        for row in messages:
            client, rate = str(row["client"]), self.uplink if row["direction"] == "uplink" else self.downlink
            transfer = row["bytes"] * 8 / (rate * 1e6 * self.factor(client)) if rate else 0.0
            found[client] = found.get(client, 0.0) + self.latency + transfer
        return found
