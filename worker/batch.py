"""Policies of the micro-batch: how large it may be, and how much rubbish is too much. Pure objects."""

from __future__ import annotations

from collections import deque


class BatchLimit:
    """Bounds the micro-batch so that a batch takes about half the latency target: a record waits for the batch before its own, then for
    its own. The batch follows the load (it is whatever has gathered meanwhile); this only caps it.

    A batch costs a fixed part (a transaction, round trips) and a part a record, both learned by a least-squares line through recent
    batches. The cap never falls to where the fixed part is more than half of the cost: smaller batches would be slower for everybody.

    When batch after batch is full, the worker is behind: latency is lost anyway, and the largest batches catch up soonest.
    """

    FLOOR = 16
    BEHIND = 3  # full batches in a row
    FORGET = 0.98

    def __init__(self, target_p99_ms: float, most: int) -> None:
        self._budget_seconds = target_p99_ms / 1000 / 2
        self._most = most
        self._full = 0
        self._weight = self._n = self._t = self._nn = self._nt = 0.0
        for records, seconds in ((0, 0.005), (1000, 0.045)):  # what to expect of a machine nothing is known of
            self._learn(records, seconds)
        self.records = most

    def observe(self, records: int, seconds: float) -> None:
        """A batch of `records` took `seconds`, in all stages."""
        self._full = self._full + 1 if records >= self.records else 0
        self._learn(records, seconds)
        spread = self._weight * self._nn - self._n * self._n
        a_record = max((self._weight * self._nt - self._n * self._t) / spread, 1e-6) if spread > 1e-9 else 1e-6
        fixed = max((self._t - a_record * self._n) / self._weight, 0.0)
        cap = int(max((self._budget_seconds - fixed) / a_record, fixed / a_record, self.FLOOR))
        self.records = self._most if self._full >= self.BEHIND else min(cap, self._most)

    def _learn(self, records: int, seconds: float) -> None:
        keep = self.FORGET
        self._weight = self._weight * keep + 1
        self._n = self._n * keep + records
        self._t = self._t * keep + seconds
        self._nn = self._nn * keep + records * records
        self._nt = self._nt * keep + records * seconds


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
