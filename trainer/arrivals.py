"""When events arrived, by their own time: what the age of a model is measured from, for replayed and simulated events are older than that.

Holds the newest event time so far and when Kafka had that event, at every step that it took. It begins when the trainer starts.
"""

from __future__ import annotations

from bisect import bisect_left
from threading import Lock

MOST = 16_384
"""Steps that are kept. Where there are more, every second one goes, so the older ones lie further apart."""


class Arrivals:
    """Written by the collector's thread, read by that of the rounds."""

    def __init__(self) -> None:
        self._event_ms: list[int] = []
        self._arrived_ms: list[int] = []
        self._lock = Lock()

    def note(self, event_ms: int, arrived_ms: int) -> None:
        """An event of this time arrived. Only what is newer than everything before counts."""
        with self._lock:
            if self._event_ms and event_ms <= self._event_ms[-1]:
                return
            self._event_ms.append(event_ms)
            self._arrived_ms.append(arrived_ms)
            if len(self._event_ms) > MOST:
                del self._event_ms[1:-1:2], self._arrived_ms[1:-1:2]

    def newest_before(self, until_ms: int) -> int | None:
        """When the newest noted event before a moment of event time arrived, in epoch milliseconds; None where none is noted."""
        with self._lock:
            place = bisect_left(self._event_ms, until_ms)
            return self._arrived_ms[place - 1] if place else None
