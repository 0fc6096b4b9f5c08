"""The parts of a round: schedule, client steps, aggregation, server optimizer and records.

A new schedule, aggregator or server optimizer is a class or function decorated with `@schedules.register("name")`,
`@aggregators.register("name")` or `@server_optimizers.register("name")`, or one anywhere that a user selects as
`package.module:Name`. This module does not import torch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tofu.registry import Registry
from tofu.settings.groups import KINDS as KINDS

if TYPE_CHECKING:
    from tofu.rounds.aggregation import Aggregator
    from tofu.rounds.schedule import Schedule


schedules: "Registry[type[Schedule]]" = Registry("schedule", "tofu.rounds.schedule:Schedule", "tofu.rounds.schedule")

server_optimizers: Registry[Callable[..., Any]] = Registry("server-optimizer", None, "tofu.rounds.optimizers")
"""Functions of (parameters, `ServerSettings`) that make a `torch.optim.Optimizer`."""

aggregators: "Registry[type[Aggregator]]" = Registry(
    "aggregator", "tofu.rounds.aggregation:Aggregator", "tofu.rounds.aggregation"
)
"""Rules that combine the updates of an open round."""
