"""A task: what a worker knows of one input partition (the partition of that number of every event topic)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from worker.schedule import NEVER_MS, Clock
from worker.store import Applied, Store
from worker.transport import Partition, Position


@dataclass(slots=True)
class Task:
    """partitions: how many the event topics have.
    offsets: next offset of each topic; the states in memory are exact up to here.
    publish_from: what the group had committed when the partition was acquired: records before are replayed, and nothing of them published.
    clock: up to where dues have been fired. committed_clock: up to where silence scores were out when the partition was acquired.
    applied: what Redis is exact for. chunks, gone: what the next flush writes and deletes besides changed rows.
    indexed_ms: users that Redis knows to be due up to here have been dealt with. next_stored_ms: nobody stored is due in between.
    """

    number: int
    store: Store
    partitions: int
    offsets: dict[str, int]
    publish_from: dict[str, int]
    clock: Clock
    committed_clock: Clock
    applied: Applied | None
    active_at: float  # monotonic seconds of the last record, or of the last move of the clock by the wall clock
    encoder: str = ""  # see Applied
    committed: dict[str, int] = field(default_factory=dict)  # offsets, in at_least_once
    replaying: bool = False
    chunks: dict[tuple[str, int], bytes] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    indexed_ms: int = NEVER_MS
    next_stored_ms: int = NEVER_MS
    renewal_cursor: int | None = None  # of the background rebuild, None while there is none

    def progress(self) -> Applied:
        """What Redis will be exact for after a flush now."""
        return Applied(dict(self.offsets), self.clock.fired_ms, self.clock.stream_ms, self.partitions, self.encoder)

    def positions(self) -> dict[Partition, Position]:
        """What to commit after a batch: the clock travels with the offsets."""
        metadata = self.clock.encode()
        return {Partition(topic, self.number): Position(offset, metadata) for topic, offset in self.offsets.items()}

    def fired(self, upto_ms: int) -> None:
        """Everything due up to a moment has been fired."""
        self.clock.fired_ms = max(self.clock.fired_ms, upto_ms)
        self.indexed_ms = max(self.indexed_ms, upto_ms)

    def renew_for(self, encoder_id: str) -> None:
        """Rebuild states in the background unless all of them are known to be of this encoder."""
        if self.encoder != encoder_id:
            self.encoder = ""
            self.renewal_cursor = 0

    def note_stored_dues(self, due_ms: NDArray[np.int64]) -> None:
        """A flush has stored these dues."""
        if len(due_ms):
            self.next_stored_ms = min(self.next_stored_ms, int(due_ms.min()))
