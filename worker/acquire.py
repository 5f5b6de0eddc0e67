"""Taking a partition over: from what Kafka says is committed and what Redis says it is exact for, to where reading starts.

Kafka is the truth, Redis a view of it. `applied` never runs ahead of the committed offset in exactly_once, because states are flushed
after the transaction. If it is behind (a crash between the two, or Redis was lost, restored from an old snapshot, failed over with lost
writes), the records in between are read again, stepped, and nothing of them published. There is no other recovery.
"""

from __future__ import annotations

import logging

from worker.metrics import Metrics
from worker.schedule import Clock
from worker.settings import WorkerSettings
from worker.states import States
from worker.step import fire_due
from worker.store import Store
from worker.task import Task
from worker.transport import Partition, Transport

log = logging.getLogger(__name__)

SETTLE_USERS = 5000


class Refused(Exception):
    """A partition cannot be taken over without doing damage. The message says why, and how to rebuild."""


def rebuild_by(group: str) -> str:
    """What to do where states and log no longer belong together."""
    return f"stop the workers and delete the keys {{{group}:*}}* in Redis to rebuild the states from the log, or choose another group"


def acquire(
    transport: Transport, store: Store, number: int, partitions: int, settings: WorkerSettings, now: float, metrics: Metrics
) -> Task:
    """The task of partition `number`, with its transport positioned. Raises Refused, TransportError, StoreUnavailable, StoreError."""
    topics = [Partition(topic, number) for topic in settings.event_topics]
    committed = transport.committed(topics)
    bounds = transport.bounds(topics)
    applied = store.acquire()
    rebuild = rebuild_by(settings.group)
    if applied and applied.partitions != partitions:
        raise Refused(
            f"the event topics have {partitions} partitions, but states were built with {applied.partitions}: users have moved between "
            f"partitions, so their states are in the wrong places: {rebuild}"
        )
    if applied is None and store.users():
        log.warning("states without `applied` in Redis: deleting them, to rebuild from the log", extra={"fields": {"partition": number}})
        store.clear()
    offsets, publish_from = {}, {}
    for topic in topics:
        first, end = bounds[topic]
        position = committed.get(topic)
        publish = position.offset if position else (first if settings.start_from == "earliest" else end)
        done = applied.offsets.get(topic.topic) if applied else None
        if done is not None and done > publish:
            if settings.guarantee == "exactly_once":
                raise Refused(
                    f"states of {topic.topic}/{number} are exact up to offset {done}, but the group committed only {publish}: "
                    f"its offsets were moved back, or Kafka lost data: {rebuild}"
                )
            publish = done  # at_least_once flushes before it commits, and publishes before it flushes: these scores are out
        start = done if done is not None else (first if position else publish)
        if start < first:
            metrics.lost.inc(first - start)
            log.error(
                "records that the states need are no longer retained: the states go on without them",
                extra={"fields": {"topic": topic.topic, "partition": number, "from": start, "to": first}},
            )
            start = first
        offsets[topic.topic] = start
        publish_from[topic.topic] = max(publish, start)
        transport.seek(topic, start)
    out = Clock()
    for position in committed.values():
        out = out.latest(Clock.decode(position.metadata))
    clock = Clock(applied.fired_ms, applied.stream_ms) if applied else Clock()
    replaying = offsets != publish_from
    task = Task(
        number=number,
        store=store,
        partitions=partitions,
        offsets=offsets,
        publish_from=publish_from,
        clock=clock,
        committed_clock=out,
        applied=applied,
        active_at=now,
        encoder=applied.encoder if applied else "",
        replaying=True,
        indexed_ms=clock.fired_ms,
    )
    span = sum(publish_from[t] - offsets[t] for t in offsets)
    log.info("partition acquired", extra={"fields": {"partition": number, "offsets": offsets, "replay": span if replaying else 0}})
    return task


def replayed(task: Task) -> bool:
    """Whether the states have reached what the group had committed."""
    return all(task.offsets[topic] >= offset for topic, offset in task.publish_from.items())


def settle(states: States, task: Task) -> None:
    """End a replay: take over the clock that was committed, and deal with users who are due before it, whose silence scores are out.

    Raises Moved, StoreUnavailable, StoreError; may be called again then.
    """
    task.clock = task.clock.latest(task.committed_clock)
    fired_ms = task.clock.fired_ms
    fire_due(states, task, fired_ms)
    states.flush(task)
    while users := [user for user, _ in task.store.due(-(1 << 62), fired_ms, SETTLE_USERS)]:
        rows = states.rows(task, users)
        last_ms = states.arena.records["prefix"]["statistics"]["last_ms"][rows]
        states.arena.dirty[rows] = True  # so that the flush stores the next due
        states.delete(task, rows[last_ms + states.schedule.retention_ms <= fired_ms])
        states.flush(task)
        states.arena.tick += 1
    task.indexed_ms = fired_ms
    task.next_stored_ms = fired_ms
    task.replaying = False
