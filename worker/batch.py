"""Policies of the micro-batch: how large it may be, and how much rubbish is too much. Pure objects."""

from __future__ import annotations

from collections import deque


class BatchLimit:
    """Bounds the micro-batch so that a batch takes about half the latency target: a record waits for the batch before its own, then for
    its own. The batch follows the load (it is whatever has gathered meanwhile); this only caps it.

    When batch after batch is full, the worker is behind: latency is lost anyway, and the largest batches catch up soonest.
    """

    FLOOR = 16
    BEHIND = 3  # full batches in a row

    def __init__(self, target_p99_ms: float, most: int) -> None:
        self._budget_seconds = target_p99_ms / 1000 / 2
        self._most = most
        self._seconds_per_record = 0.0
        self._full = 0
        self.records = most

    def observe(self, records: int, seconds: float) -> None:
        """A batch of `records` took `seconds`, in all stages."""
        self._full = self._full + 1 if records >= self.records else 0
        if records >= self.FLOOR:  # fewer are all fixed costs, which say nothing of the cost of a record
            cost = seconds / records
            self._seconds_per_record = cost if not self._seconds_per_record else 0.9 * self._seconds_per_record + 0.1 * cost
        if self._full >= self.BEHIND or not self._seconds_per_record:
            self.records = self._most
        else:
            self.records = max(self.FLOOR, min(self._most, int(self._budget_seconds / self._seconds_per_record)))


class TooManyBadRecords(Exception):
    """The topic is not what the worker was told it is."""


class BadShare:
    """Watches the share of bad records among the last `window`: a wrong topic must stop the worker, not drain into dead letters."""

    def __init__(self, most: float, window: int) -> None:
        self._most = most
        self._window = window
        self._batches: deque[tuple[int, int]] = deque()
        self._records = self._bad = 0

    def observe(self, records: int, bad: int, example: str) -> None:
        """Raises TooManyBadRecords once a full window holds more than the share."""
        self._batches.append((records, bad))
        self._records += records
        self._bad += bad
        while self._records - self._batches[0][0] >= self._window:
            old_records, old_bad = self._batches.popleft()
            self._records -= old_records
            self._bad -= old_bad
        if self._records >= self._window and self._bad > self._most * self._records:
            raise TooManyBadRecords(
                f"{self._bad:,} of the last {self._records:,} records are no events (the last one: {example}). Nothing of this batch was "
                f"committed. If the topic is right, map its field names with event_fields, or raise max_bad_share"
            )
