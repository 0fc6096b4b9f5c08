"""Simulated links: how long a client's messages would take over a slow network."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tofu.rng import derive_generator
from tofu.settings.groups import LinkSettings


@dataclass(frozen=True)
class LinkSimulator:
    """Computes the transfer times of a run from its ledger; the run itself is not slowed down.

    A client's rates are the settings' times exp(spread * z) with z standard normal, fixed for the client in a run: a
    log-normal distribution, whose median is the setting.

    Attributes:
        link: the median rates and their spread, and the latency.
        seed: of the run.
    """

    link: LinkSettings
    seed: int

    def factor(self, client: str) -> float:
        """Return a client's rates over the median rates."""
        z = torch.randn((), generator=derive_generator(self.seed, client, "link"), dtype=torch.float64)
        return math.exp(self.link.link_spread * float(z))

    def seconds(self, messages: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Return a mapping: client -> seconds that its messages (rows of the ledger) take,
        one after the other; empty without links.
        """
        found: dict[str, float] = {}
        rates, latency = {"uplink": self.link.uplink_mbps, "downlink": self.link.downlink_mbps}, self.link.link_latency
        for row in messages if any(rates.values()) or latency else ():
            client, rate = str(row["client"]), rates[row["direction"]]
            transfer = row["bytes"] * 8 / (rate * 1e6 * self.factor(client)) if rate else 0.0
            found[client] = found.get(client, 0.0) + latency + transfer
        return found
