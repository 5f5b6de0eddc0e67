"""The cache of hot users: one arena of records in their at-rest format, a row a user, shared by all partitions.

A changed row is dirty until a flush has written it; only clean rows are evicted, those touched longest ago first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker.record import opaque, record_type

COLUMNS = ("partition", "due_ms", "stored_due_ms", "dirty", "touched")
UNKNOWN = -(1 << 62)
PAGE_BYTES = 4096


class ArenaFull(Exception):
    """Every row is dirty or in use: flush, then try again, then `grow` by as many rows as args[0] says are missing."""


class Arena:
    """`records` (capacity,) of `record_type(hidden)`, with what is kept in memory alone beside it.

    user, partition: whose row it is (partition -1: free). due_ms: when the user is due next. stored_due_ms: when the user's timer stands in
    Redis, to the second below, UNKNOWN until it is written. dirty: changed since the last flush. touched: the tick (batch number) of the
    last use. firing: by partition, up to when its dues are about to be fired: whoever is due until then, or has a timer that goes off,
    is in use, too.
    """

    def __init__(self, capacity: int, hidden: int) -> None:
        self.capacity = capacity
        self.hidden = hidden
        self.records = np.zeros(capacity, record_type(hidden))
        self._opaque = opaque(self.records)
        self.records.view(np.uint8)[::PAGE_BYTES] = 0  # take the memory now, not page by page while events wait
        self.user: list[str] = [""] * capacity
        self.partition = np.full(capacity, -1, np.int32)
        self.due_ms = np.zeros(capacity, np.int64)
        self.stored_due_ms = np.full(capacity, UNKNOWN, np.int64)
        self.dirty = np.zeros(capacity, bool)
        self.touched = np.zeros(capacity, np.int64)
        self.tick = 0
        self.firing: dict[int, int] = {}
        self._free = list(range(capacity - 1, -1, -1))

    def __len__(self) -> int:
        return self.capacity - len(self._free)

    def grow(self, rows: int) -> None:
        """More capacity, where one batch needs more than there is."""
        bigger = Arena(self.capacity + rows, self.hidden)
        for name in ("records", *COLUMNS):
            getattr(bigger, name)[: self.capacity] = getattr(self, name)
            setattr(self, name, getattr(bigger, name))
        self._opaque = bigger._opaque
        self.user += [""] * rows
        self._free += range(self.capacity, self.capacity + rows)
        self.capacity += rows

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.void]:
        """A copy of some records."""
        return self._opaque[rows].view(self.records.dtype)

    def write(self, rows: NDArray[np.int64], records: NDArray[np.void]) -> None:
        """Put records of `read` back."""
        self._opaque[rows] = opaque(records)

    def clear(self, rows: NDArray[np.int64]) -> None:
        """Make some records those of users never seen."""
        self._opaque[rows] = np.zeros((), self._opaque.dtype)

    def take(self, users: list[str], partition: int, rows_of: dict[int, dict[str, int]]) -> NDArray[np.int64]:
        """Rows for users who have none yet, entered into `rows_of[partition]`; their records are for the caller to fill in.
        Evicts where it must. Raises ArenaFull."""
        if len(self._free) < len(users):
            self._evict(max(len(users) - len(self._free), self.capacity // 10), len(users), rows_of)
        rows = self._free[-len(users) :]
        del self._free[-len(users) :]
        table = rows_of[partition]
        for user, row in zip(users, rows, strict=True):
            self.user[row] = user
            table[user] = row
        taken = np.array(rows, np.int64)
        self.partition[taken] = partition
        self.dirty[taken] = False
        self.touched[taken] = self.tick
        return taken

    def release(self, rows: list[int]) -> None:
        """Give rows back. The caller has removed them from its table."""
        self.partition[rows] = -1
        self.dirty[rows] = False
        self._free.extend(rows)

    def rows(self, partition: int) -> NDArray[np.int64]:
        """Rows of a partition."""
        return np.flatnonzero(self.partition == partition)

    def _evict(self, wanted: int, needed: int, rows_of: dict[int, dict[str, int]]) -> None:
        idle = (self.partition >= 0) & ~self.dirty & (self.touched < self.tick)
        for partition, upto_ms in self.firing.items():
            idle &= (self.partition != partition) | (np.minimum(self.due_ms, self.stored_due_ms) > upto_ms)
        clean = np.flatnonzero(idle)
        if (missing := needed - len(clean) - len(self._free)) > 0:
            raise ArenaFull(missing)
        if len(clean) > wanted:
            clean = clean[np.argpartition(self.touched[clean], wanted)[:wanted]]
        for row in clean.tolist():
            del rows_of[int(self.partition[row])][self.user[row]]
        self.release(clean.tolist())
