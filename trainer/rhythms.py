"""When to do what: a round of everything now and then, a refresh of the heads in between. Pure: time is handed in.

A period runs from the start of one to the start of the next. A round refreshes the heads as well, so it begins the refresh's period
anew. Neither is held on data that it has seen already.
"""

from __future__ import annotations

from typing import Literal

Rhythm = Literal["round", "refresh"]

RETRY_SECONDS = 30.0


class Rhythms:
    """Which of the two is due. refresh_seconds: 0 means never."""

    def __init__(self, round_seconds: float, refresh_seconds: float, now: float) -> None:
        self._period: dict[Rhythm, float] = {"round": round_seconds}
        self._due: dict[Rhythm, float] = {"round": now}
        if refresh_seconds:
            self._period["refresh"], self._due["refresh"] = refresh_seconds, now + refresh_seconds
        self._seen: dict[Rhythm, int] = {}

    def due(self, now: float, rows: int) -> Rhythm | None:
        """What to hold now that the log has so many rows; the round first."""
        for rhythm, due in self._due.items():
            if now >= due and rows != self._seen.get(rhythm):
                return rhythm
        return None

    def held(self, rhythm: Rhythm, outcome: str, began: float, rows: int) -> None:
        """Take note of what came of it (`rounds.Outcome.kind`, or "failed")."""
        self._seen[rhythm] = rows
        if outcome == "failed":
            self._due[rhythm] = began + RETRY_SECONDS
            del self._seen[rhythm]
        elif outcome == "outdated":  # to be judged again at once, against the champion of now
            self._due[rhythm] = began
            del self._seen[rhythm]
        elif outcome == "waiting" and rhythm == "round":
            self._due[rhythm] = began  # as soon as there is more
        else:
            self._due[rhythm] = began + self._period[rhythm]
            if rhythm == "round" and "refresh" in self._period:
                self._due["refresh"], self._seen["refresh"] = began + self._period["refresh"], rows
