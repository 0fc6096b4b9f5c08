"""Clients that stay silent: how long a round waits for them, and for how many rounds they are not asked.

A round ends without the silent clients once it has lasted `straggler-factor` times the median of the last rounds of its
kind and half of the clients have replied. A client that was silent in `suspend-after` rounds in a row is left out for a
few rounds, then asked again, and left out for twice as long where it is still silent.
"""

import statistics
from collections import defaultdict, deque

from server.client_registry import Client
from tofu.settings.groups import ServerSettings

MIN_SECONDS = 30.0
"""No round ends early before that: a restarted SuperLink or node needs it to come back."""

_KNOWN_ROUNDS = 2
"""Rounds of a kind from which the timeout of the next one is derived, at least."""

_RECENT_ROUNDS = 9
_FIRST_PAUSE, _MAX_PAUSE = 4, 32


class Stragglers:
    """Learns from each round who was silent and how long the others took.

    Args:
        settings: their fields straggler_factor, suspend_after, round_timeout and min_clients.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT_ROUNDS))
        self._missed: dict[str, int] = {}
        self._pause: dict[str, int] = {}
        self._due: dict[str, int] = {}

    def patience(self, kind: str) -> float:
        """Seconds after which a round of this kind may end without its silent clients."""
        known, limit = self._seconds[kind], self._settings.round_timeout
        if not self._settings.straggler_factor or len(known) < _KNOWN_ROUNDS:
            return limit
        return min(limit, max(MIN_SECONDS, self._settings.straggler_factor * statistics.median(known)))

    def active(self, clients: list[Client], round_: int, *, min_clients: int) -> list[Client]:
        """The clients that are asked in this round; all of them where too few would be left."""
        found = [client for client in clients if self._due.get(client.name, 0) <= round_]
        return found if len(found) >= min_clients else clients

    def finished(self, kind: str, round_: int, *, asked: set[str], silent: set[str], seconds: float) -> list[str]:
        """Take note of a round.

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
            notes.append(f"client {name} did not reply in {missed} rounds: it is asked again in round {due}")
        return notes
