"""The partitions that this worker owns: taking over, letting go, flushing, and starting anew when something went wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

import numpy as np
import redis
from numpy.typing import NDArray

from worker.acquire import acquire, replayed, settle
from worker.arena import ArenaFull
from worker.metrics import Metrics
from worker.patience import Patience
from worker.record import chunk_slots
from worker.settings import WorkerSettings
from worker.states import States
from worker.store import Moved, Store, StoreUnavailable
from worker.task import Task
from worker.transport import Fenced, Partition, Transport, TransportError

log = logging.getLogger(__name__)
T = TypeVar("T")


class Ownership:
    """tasks: by partition number. forgotten: those to be acquired anew. flushed_at: monotonic seconds of the last flush that was due.

    A task whose states in memory may be ahead of what is committed is never flushed: it is `forget`ed, and acquired anew before anything
    else happens to it."""

    def __init__(
        self,
        settings: WorkerSettings,
        transport: Transport,
        client: redis.Redis,
        states: States,
        partitions: int,
        patience: Patience,
        metrics: Metrics,
        monotonic: Callable[[], float],
        beside: Executor,
    ) -> None:
        self.tasks: dict[int, Task] = {}
        self._settings = settings
        self._transport = transport
        self._redis = client
        self._states = states
        self._partitions = partitions
        self._patience = patience
        self._metrics = metrics
        self._monotonic = monotonic
        self.forgotten: set[int] = set()
        self._at_risk: set[int] = set()
        self._beside = beside
        self.flushed_at = monotonic()

    def revoke(self, partitions: Iterable[Partition]) -> None:
        """Let go. What is flushed now, the next owner need not replay; should it be quicker, the compare-and-set protects it."""
        for number in {p.number for p in partitions} & self.tasks.keys():
            task = self.tasks[number]
            try:
                if number not in self.forgotten:
                    self._flush(task)
                    task.store.settle()
            except (Moved, StoreUnavailable, TransportError) as error:
                log.info("revoked without a flush, the next owner replays", extra={"fields": {"partition": number, "why": error}})
            self._drop(task)
            self._metrics.revoked(number, self._settings.event_topics)
            log.info("partition revoked", extra={"fields": {"partition": number}})

    def assign(self, partitions: Iterable[Partition]) -> None:
        """Take over. Raises Refused, StoreError, FatalTransportError."""
        for number in sorted({p.number for p in partitions} - self.tasks.keys()):
            self._acquire(number)

    def forget(self, numbers: Iterable[int], error: Exception) -> None:
        """States in memory may be ahead of what is committed: acquire these partitions anew."""
        for number in numbers:
            if number in self.tasks and number not in self.forgotten:
                self.forgotten.add(number)
                self._metrics.reacquired.labels(type(error).__name__).inc()
                log.warning("acquiring a partition anew", extra={"fields": {"partition": number, "why": error}})

    def acquire_forgotten(self) -> None:
        for number in sorted(self.forgotten):
            self._drop(self.tasks[number])
            self._acquire(number)

    def sound(self, number: int) -> bool:
        """Whether a partition is owned, and its states in memory are good."""
        return number in self.tasks and number not in self.forgotten

    def each(self, do: Callable[[Task], object]) -> None:
        """Do something to every sound task; one that fails to hold on to its partition is forgotten."""
        for task in list(self.tasks.values()):
            if self.sound(task.number):
                try:
                    do(task)
                except (Moved, TransportError) as error:
                    self.forget([task.number], error)

    def risk(self, numbers: Iterable[int]) -> None:
        """States of these tasks are about to be changed by a batch that is not committed: none is flushed unless it `happened`."""
        self._at_risk.update(numbers)

    def happened(self, numbers: Iterable[int]) -> None:
        """The batch is committed, or nothing of it was to be published."""
        self._at_risk.difference_update(numbers)

    def rows(self, task: Task, users: Sequence[str]) -> NDArray[np.int64]:
        """`States.rows`, which waits for Redis and for room. Raises Moved, StoreError."""
        return self._with_room(lambda: self._states.rows(task, users))

    def settle(self, task: Task) -> None:
        """End a task's replay if it has arrived."""
        if task.replaying and replayed(task):
            self._with_room(lambda: settle(self._states, task))
            log.info("in step with the log", extra={"fields": {"partition": task.number, "offsets": task.offsets}})

    def flush_if_due(self) -> None:
        """Between batches: now and then, and when enough has changed."""
        waited_ms = (self._monotonic() - self.flushed_at) * 1000
        if waited_ms >= self._settings.flush_interval_ms or np.count_nonzero(self._states.arena.dirty) >= self._settings.flush_users:
            self.each(self.flush)
            self.flushed_at = self._monotonic()

    def flush(self, task: Task) -> None:
        """`_flush`, waiting for Redis and Kafka. Raises Moved, StoreError, Fenced."""
        self._patience("redis", lambda: self._flush(task))

    def close(self) -> None:
        """A last flush of what is sound. Redis or Kafka away now costs a replay at the next start, nothing else."""
        for task in self.tasks.values():
            if self.sound(task.number):
                try:
                    self._flush(task)
                    task.store.settle()
                except (Moved, StoreUnavailable, TransportError) as error:
                    log.warning("no last flush, the next owner replays", extra={"fields": {"partition": task.number, "why": error}})

    def _with_room(self, call: Callable[[], T]) -> T:
        """The result of `call`, which waits for Redis. Makes room in the cache by flushing; what does not fit even then makes it larger."""
        try:
            return self._patience("redis", call)
        except ArenaFull:
            for task in self.tasks.values():
                if self.sound(task.number):
                    self.flush(task)
        try:
            return self._patience("redis", call)
        except ArenaFull as full:
            self._states.arena.grow(full.args[0])
        return self._patience("redis", call)

    def _flush(self, task: Task) -> None:
        """Step 2 of the order of durability (worker.loop), and step 3 in at_least_once."""
        if task.number in self._at_risk:
            return
        with self._metrics.stage("flush"):
            self._metrics.flushed_users.inc(self._states.flush(task))
        if self._settings.guarantee == "at_least_once" and not task.replaying and task.committed != task.offsets:
            with self._metrics.stage("flush"):
                task.store.settle()
            with self._metrics.stage("commit"):
                self._transport.commit(task.positions())
            task.committed = dict(task.offsets)

    def _acquire(self, number: int) -> None:
        store = Store(self._redis, self._settings.group, number, chunk_slots(self._settings.history_events), self._beside)
        try:
            task = self._patience(
                "kafka",
                lambda: acquire(self._transport, store, number, self._partitions, self._settings, self._monotonic(), self._metrics),
            )
        except Fenced:  # given away again meanwhile: the next poll says so
            return
        self.tasks[number] = task
        self._states.own(task)
        task.renew_for(self._states.model.manifest.encoder_id)
        try:
            self.settle(task)
        except Moved as error:
            self.forget([number], error)

    def _drop(self, task: Task) -> None:
        task.store.abandon()
        self._states.drop(task)
        self.tasks.pop(task.number, None)
        self.forgotten.discard(task.number)
        self._at_risk.discard(task.number)
