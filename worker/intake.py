"""From polled records to the columns of one micro-batch, with each task's clock laid along its events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.events import BadRecord, EventColumns, EventDecoder
from worker.schedule import clock_along
from worker.task import Task
from worker.transport import Partition, Records


@dataclass(slots=True)
class Intake:
    """One micro-batch: the good events of all its sources, in the order of the sources, and the bad records.

    first: (S + 1,) where each source's records begin in the batch. events.index counts records over all sources.
    slices: each task's events, as a slice of the columns. before_ms, reached_ms: (N,) the task's clock before and after each event.
    """

    sources: list[Records]
    first: NDArray[np.int64]
    events: EventColumns
    bad: list[BadRecord]
    slices: dict[int, slice]
    before_ms: NDArray[np.int64]
    reached_ms: NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.first[-1])

    def place(self, record: int) -> tuple[Records, int]:
        """The source of a record of the batch, and its place there."""
        source = int(np.searchsorted(self.first, record, side="right")) - 1
        return self.sources[source], record - int(self.first[source])

    def clock_before(self, number: int) -> int:
        """The clock of a task, which has an event here, before its first event."""
        return int(self.before_ms[self.slices[number].start])

    def clock_after(self, number: int, otherwise: int) -> int:
        """The clock of a task after its last event, `otherwise` if it has none here."""
        span = self.slices[number]
        return int(self.reached_ms[span.stop - 1]) if span.start < span.stop else otherwise

    def events_before(self, number: int, clock_ms: int) -> int:
        """How many of a task's events come before its clock gets to `clock_ms`."""
        return int(np.searchsorted(self.reached_ms[self.slices[number]], clock_ms))

    def offsets(self) -> dict[int, dict[str, int]]:
        """The offsets after this batch, by task and topic."""
        after: dict[int, dict[str, int]] = {}
        for source in self.sources:
            after.setdefault(source.partition.number, {})[source.partition.topic] = source.offsets[-1] + 1
        return after


def take_in(sources: Iterable[Records], tasks: Mapping[int, Task], decoder: EventDecoder, lateness_ms: int) -> Intake:
    """Decode a poll. Sources of one task follow each other in the batch: together they are its log order."""
    ordered = sorted((s for s in sources if len(s)), key=lambda s: s.partition.number)
    first = np.cumsum([0, *(len(s) for s in ordered)])
    values = [v for s in ordered for v in s.values]
    times = [t for s in ordered for t in s.times_ms]
    events, bad = decoder.columns(values, times)
    before_ms = np.empty(len(events), np.int64)
    reached_ms = np.empty(len(events), np.int64)
    slices: dict[int, slice] = {}
    numbers = [s.partition.number for s in ordered]
    for number in dict.fromkeys(numbers):
        begin = first[numbers.index(number)]
        end = first[len(numbers) - numbers[::-1].index(number)]
        span = slice(*np.searchsorted(events.index, [begin, end]).tolist())
        slices[number] = span
        if span.start < span.stop:
            before_ms[span], reached_ms[span] = clock_along(events.time_ms[span], tasks[number].clock.stream_ms, lateness_ms)
    return Intake(ordered, first, events, bad, slices, before_ms, reached_ms)


def cut(intake: Intake, number: int, count: int) -> tuple[list[Records], dict[Partition, int]]:
    """(The sources with no more than the first `count` events of a task, {partition: offset of its first record that was left out})."""
    span = intake.slices[number]
    if span.start + count >= span.stop:
        return intake.sources, {}
    end = int(intake.events.index[span.start + count])
    kept, left_out = [], {}
    for source, first in zip(intake.sources, intake.first.tolist(), strict=False):
        keep = max(end - first, 0)
        if source.partition.number == number and keep < len(source):
            left_out[source.partition] = source.offsets[keep]
            source = source.first(keep)
        kept.append(source)
    return kept, left_out
