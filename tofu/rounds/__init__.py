"""The rounds of a run: schedules, the client's steps, aggregation, and the record of what happened."""

from typing import TYPE_CHECKING

from tofu.registry import Registry

if TYPE_CHECKING:
    from tofu.rounds.robust import Aggregator

aggregators: "Registry[type[Aggregator]]" = Registry(
    "aggregator", "tofu.rounds.robust:Aggregator", "tofu.rounds.robust"
)
"""Rules that combine the updates of an open round. They are here because settings list them without importing torch."""
