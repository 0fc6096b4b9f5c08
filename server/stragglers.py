"""Clients that do not reply: how long a round waits for them, and for how many rounds they are suspended.

A round ends without the missing replies once it has lasted `straggler-factor` times the median duration of the last
rounds of its kind and half of the clients have replied. A client that did not reply in `suspend-after` rounds in a row
is suspended for 4 rounds and then asked again. If it still does not reply, the next suspension is twice as long, up to
32 rounds.
"""

import statistics
from collections import defaultdict, deque

from server.client_registry import Client
from tofu.formatting import format_count
from tofu.settings import FIELDS
from tofu.settings.groups import ServerSettings

MIN_SECONDS = 30.0
"""A round lasts at least so long before it ends early, so that a restarted SuperLink or node can reconnect."""

_KNOWN_ROUNDS = 2
"""Minimum number of past rounds of a kind from which a timeout is derived."""

_RECENT_ROUNDS = 9
_FIRST_PAUSE, _MAX_PAUSE = 4, 32


class Stragglers:
    """Tracks which clients did not reply and how long rounds took.

    Args:
        settings: straggler_factor, suspend_after and round_timeout are used.
        one_machine: the clients share this machine's processors, as in one process and in simulations. If these are
            busy, a client is late that is not silent, so the default of straggler_factor does not apply there: the
            same settings and seed give the same weights.
    """

    def __init__(self, settings: ServerSettings, *, one_machine: bool = False) -> None:
        self._settings = settings
        default = settings.straggler_factor == FIELDS["straggler_factor"].default
        self._factor = 0.0 if one_machine and default else settings.straggler_factor
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT_ROUNDS))
        self._missed: dict[str, int] = {}
        self._pause: dict[str, int] = {}
        self._due: dict[str, int] = {}

    def patience(self, kind: str) -> float:
        """Return the seconds after which a round of this kind may end without the missing replies."""
        known, limit = self._seconds[kind], self._settings.round_timeout
        if not self._factor or len(known) < _KNOWN_ROUNDS:
            return limit
        return min(limit, max(MIN_SECONDS, self._factor * statistics.median(known)))

    def active(self, clients: list[Client], round_: int, *, min_clients: int) -> list[Client]:
        """Return the clients that are not suspended in this round;
        all of them if fewer than `min_clients` would remain.
        """
        found = [client for client in clients if self._due.get(client.name, 0) <= round_]
        return found if len(found) >= min_clients else clients

    def finished(self, kind: str, round_: int, *, asked: set[str], silent: set[str], seconds: float) -> list[str]:
        """Record a round.

        Args:
            asked: names of the clients that were asked.
            silent: those of them that did not reply.
            seconds: until the last reply that arrived.

        Returns:
            One line for each client that is now suspended.
        """
        if asked - silent:
            self._seconds[kind].append(seconds)
        for name in asked - silent:
            for table in (self._missed, self._pause, self._due):
                table.pop(name, None)
        notes = []
        for name in sorted(silent):
            self._missed[name] = self._missed.get(name, 0) + 1
            if not self._settings.suspend_after or self._missed[name] < self._settings.suspend_after:
                continue
            pause = self._pause[name] = min(2 * self._pause.get(name, _FIRST_PAUSE // 2), _MAX_PAUSE)
            self._due[name] = round_ + 1 + pause
            missed, due = self._missed[name], self._due[name]
            notes.append(
                f"client {name} did not reply in {format_count(missed, 'round')}: it is asked again in round {due}"
            )
        return notes
