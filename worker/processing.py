"""One micro-batch from end to end, and the clock of a partition: what a turn of the loop does with what it polled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.events import DAY_MS, EventDecoder, Limits
from worker.batch import BadShare
from worker.intake import Intake, cut, take_in
from worker.metrics import Metrics
from worker.ownership import Ownership
from worker.patience import Patience
from worker.publish import dead_letters
from worker.schedule import NEVER_MS
from worker.scoring import Scored, Scoring
from worker.settings import WorkerSettings
from worker.states import States
from worker.step import Questions, fire_due, joined, step
from worker.store import Moved
from worker.task import Task
from worker.transport import Outgoing, Partition, Records, Transport, TransportError

LEAP_USERS = 10_000  # most users fired in one transaction
RENEW_USERS = 32  # states rebuilt between two batches, in the background
RENEW_SHARE = 0.1  # of the time that may go into it
NOBODY_DUE_MS = 1 << 62


@dataclass(slots=True)
class Begun:
    """A batch that is stepped and is being published. tasks: whose states it changed. letters: reasons of its dead letters.
    arrived_ms: when its records arrived in Kafka."""

    tasks: list[int]
    scored: Scored
    letters: list[str] = field(default_factory=list)
    arrived_ms: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


class Processing:
    """Decode, load, step, publish. While Kafka commits a batch, the next one may be polled, decoded and loaded, but not stepped."""

    def __init__(
        self,
        settings: WorkerSettings,
        transport: Transport,
        owned: Ownership,
        states: States,
        scoring: Scoring,
        patience: Patience,
        metrics: Metrics,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.scoring = scoring
        self._settings = settings
        self._transport = transport
        self._owned = owned
        self._states = states
        self._patience = patience
        self._metrics = metrics
        self._monotonic = monotonic
        self._wall = wall
        self._decoder = EventDecoder(
            Limits(
                max_event_bytes=settings.max_event_bytes,
                max_user_id_bytes=settings.max_user_id_bytes,
                max_future_ms=round(settings.max_future_seconds * 1000),
                max_age_ms=round(settings.max_age_days * DAY_MS),
            ),
            settings.event_fields,
        )
        self._lateness_ms = round(settings.allowed_lateness_seconds * 1000)
        self._renew_at = monotonic()
        self._begun: Begun | None = None
        self._bad = BadShare(settings.max_bad_share, settings.bad_window_records)
        self._dead_letter_bytes = patience("kafka", lambda: transport.message_bytes(settings.dead_letter_topic))

    def process(self, polled: Sequence[Records]) -> None:
        """What a poll brought. Raises TooManyBadRecords (nothing of the batch is committed then), StoreError, FatalTransportError."""
        sources = [source for source in polled if self._owned.sound(source.partition.number)]
        try:
            sources = self._replay_apart(sources)
            for number in {source.partition.number for source in sources}:
                self._work_off(self._owned.tasks[number])
            if sources:
                self._score(sources)
        except (Moved, TransportError) as error:
            self._owned.forget({source.partition.number for source in polled}, error)

    def settle(self) -> None:
        """Wait until the batch that is being published is committed. Raises TransportError, and its tasks are forgotten then;
        FatalTransportError."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        metrics = self._metrics
        try:
            with metrics.stage("publish"):
                self._transport.settle()
        except TransportError as error:
            self._owned.forget(begun.tasks, error)
            raise
        self._owned.happened(begun.tasks)
        metrics.events.inc(begun.scored.events)
        metrics.scores.labels("event").inc(begun.scored.events)
        metrics.scores.labels("silence").inc(begun.scored.silences)
        for i, target in enumerate(self.scoring.loaded.scorer.targets):
            metrics.score.observe(target.name, begun.scored.probability[:, i])
        for reason in begun.letters:
            metrics.dead_letters.labels(reason).inc()
        metrics.arrival_seconds.observe("event", self._wall() - begun.arrived_ms / 1000)

    def move_clock(self, task: Task) -> None:
        """Move the clock of an idle partition on by the wall clock, and fire, in steps, whatever the stream clock has passed."""
        if task.replaying:
            return
        idle_seconds = self._monotonic() - task.active_at
        if idle_seconds >= self._settings.idle_seconds:
            task.active_at = self._monotonic()
            if task.clock.stream_ms > NEVER_MS and self._caught_up(task):
                task.clock.stream_ms += round(idle_seconds * 1000)
        self._work_off(task)

    def renew(self, task: Task) -> None:
        """Rebuild some states for the current encoder, in the background, until every stored one has it."""
        started = self._monotonic()
        if task.renewal_cursor is None or task.replaying or started < self._renew_at:
            return
        self.settle()
        cursor = task.renewal_cursor
        following, users = self._patience("redis", lambda: task.store.scan(cursor, RENEW_USERS))
        if users:
            self._states.arena.tick += 1
            self._owned.rows(task, users)
        task.renewal_cursor = following or None
        if task.renewal_cursor is None:
            task.encoder = self._states.model.manifest.encoder_id
        self._renew_at = self._monotonic() + (self._monotonic() - started) / RENEW_SHARE

    def _score(self, sources: Sequence[Records], holding: frozenset[int] = frozenset()) -> None:
        """One micro-batch. holding: tasks whose clock is about to leap, see `_cut_at_leap`."""
        metrics, states = self._metrics, self._states
        with metrics.stage("decode"):
            intake = take_in(sources, self._owned.tasks, self._decoder, self._lateness_ms)
        tasks = {number: self._owned.tasks[number] for number in intake.slices}
        live = {number: task for number, task in tasks.items() if not task.replaying}
        fire_upto = {n: intake.clock_before(n) if n in holding else intake.clock_after(n, t.clock.stream_ms) for n, t in tasks.items()}
        for number, task in tasks.items():
            if task.replaying and task.committed_clock.fired_ms > NEVER_MS:  # a leap may have been worked off in part only
                fire_upto[number] = min(fire_upto[number], task.committed_clock.fired_ms)
        with metrics.stage("load"):
            due: dict[int, list[str]] = {}
            states.arena.firing = {number: fire_upto[number] for number in live}
            for number, task in live.items():
                due[number], leap_ms = self._due_users(task, fire_upto[number])
                if leap_ms is not None:
                    self._cut_at_leap(intake, sources, number, leap_ms, holding)
                    return
            rows = self._load(intake, tasks, due)
        self.settle()
        self._owned.flush_if_due()
        self._bad.observe(len(intake), len(intake.bad), intake.bad[-1].detail if intake.bad else "")
        self._owned.risk(tasks)
        with metrics.stage("step"):
            after, silences = step(states, intake.events, rows, intake.before_ms, intake.reached_ms)
            ends = {number: fire_due(states, task, fire_upto[number]) for number, task in tasks.items()}
        for number, offsets in intake.offsets().items():
            task = tasks[number]
            task.offsets.update(offsets)
            task.clock.stream_ms = intake.clock_after(number, task.clock.stream_ms)
            task.fired(fire_upto[number])
            task.active_at = self._monotonic()
            if task.replaying:
                metrics.replayed.inc(intake.slices[number].stop - intake.slices[number].start)
        self._owned.happened(tasks.keys() - live.keys())
        if live:
            self._publish_batch(intake, live, after, silences, {number: ends[number] for number in live})
        for task in tasks.values():
            self._owned.settle(task)

    def _load(self, intake: Intake, tasks: dict[int, Task], due: dict[int, list[str]]) -> NDArray[np.int64]:
        """(N,) the row of each event. Whoever is due is loaded too, so that everything after is without I/O."""
        self._states.arena.tick += 1
        rows = np.empty(len(intake.events), np.int64)
        for number, span in intake.slices.items():
            users = intake.events.user[span]
            rows[span] = self._owned.rows(tasks[number], [*users, *due.get(number, ())])[: len(users)]
        self._metrics.cache_lookups.labels("miss").inc(self._states.misses)
        self._metrics.cache_lookups.labels("hit").inc(self._states.hits)
        self._states.misses = self._states.hits = 0
        return rows

    def _publish_batch(
        self, intake: Intake, live: dict[int, Task], after: Questions, silences: Questions, ends: dict[int, Questions]
    ) -> None:
        with self._metrics.stage("step"):
            scored = self.scoring.score(intake, after, silences, ends)
        bad = [(*intake.place(b.index), b) for b in intake.bad]
        bad = [b for b in bad if b[0].partition.number in live]
        letters = [dead_letters(self._settings.dead_letter_topic, bad, self._dead_letter_bytes)] if bad else []
        arrived_ms = np.fromiter((t for s in intake.sources if s.partition.number in live for t in s.times_ms), np.float64)
        begun = Begun(list(live), scored, [letter.reason for _, _, letter in bad], arrived_ms)
        self._publish([*scored.outgoing, *letters], begun)
        self._metrics.batch_records.observe("live", np.array([float(len(intake))]))

    def _publish(self, outgoing: Sequence[Outgoing], begun: Begun) -> None:
        """Step 1 of the order of durability (worker.loop), up to `settle`."""
        positions = {p: position for number in begun.tasks for p, position in self._owned.tasks[number].positions().items()}
        with self._metrics.stage("publish"):
            self._transport.publish(outgoing, positions)
        self._begun = begun

    def _replay_apart(self, sources: Sequence[Records]) -> list[Records]:
        """A batch never holds both what a partition replays and what it publishes: cut at the committed offset, read the rest again."""
        kept = []
        for source in sources:
            task = self._owned.tasks[source.partition.number]
            if task.replaying:
                end = task.publish_from[source.partition.topic]
                count = int(np.searchsorted(source.offsets, end))
                if count < len(source):
                    self._transport.seek(source.partition, source.offsets[count])
                    if count == 0:  # everything up to `end` has been read, or is no longer in the log (compaction, aborted transactions)
                        task.offsets[source.partition.topic] = max(task.offsets[source.partition.topic], end)
                        self._owned.settle(task)
                source = source.first(count)
            if len(source):
                kept.append(source)
        return kept

    def _due_users(self, task: Task, upto_ms: int, limit: int = LEAP_USERS) -> tuple[list[str], int | None]:
        """Users due up to a moment whom only Redis knows, to be loaded. If more than `limit` are stored as due: nobody, and the due time of
        the first one too many, up to which the clock must not get in one step."""
        if upto_ms < task.next_stored_ms:
            return [], None
        stored = self._patience("redis", lambda: task.store.due(task.indexed_ms, upto_ms, limit + 1))
        if len(stored) > limit:
            return [], stored[-1][1]
        if not stored:
            following = self._patience("redis", lambda: task.store.next_due(upto_ms))
            task.next_stored_ms = NOBODY_DUE_MS if following is None else following
        table = self._states.tables[task.number]
        return [user for user, _ in stored if user not in table], None

    def _cut_at_leap(self, intake: Intake, sources: Sequence[Records], number: int, leap_ms: int, holding: frozenset[int]) -> None:
        """The clock of a task leaps over more dues than one transaction should hold. Process the events before the leap; if it is at the
        first one, that event alone, holding the clock before it: `move_clock` then works the leap off in steps."""
        count = intake.events_before(number, leap_ms)
        kept, left_out = cut(intake, number, max(count, 1))
        for partition, offset in left_out.items():
            self._transport.seek(partition, offset)
        self._score(kept, holding | {number} if count == 0 else holding)

    def _work_off(self, task: Task) -> None:
        """Fire, in steps, whatever the stream clock has passed: before the next event, which is scored with all before it fired."""
        while not task.replaying and task.clock.fired_ms < task.clock.stream_ms:
            self._fire(task)

    def _fire(self, task: Task) -> None:
        """Fire dues up to the stream clock, or as many as one transaction should hold."""
        self.settle()
        upto_ms = min(task.clock.stream_ms, self._states.nth_due(task, LEAP_USERS))
        users, leap_ms = self._due_users(task, upto_ms)
        if leap_ms is not None:
            upto_ms = leap_ms
            users, _ = self._due_users(task, upto_ms, limit=1 << 31)  # with everybody who is due at that very moment
        self._states.arena.firing = {task.number: upto_ms}
        self._states.arena.tick += 1
        self._owned.rows(task, users)
        self._owned.risk([task.number])
        ends = fire_due(self._states, task, upto_ms)
        task.fired(upto_ms)
        if ends.user:
            nothing = joined([], self._states.arena.hidden)
            scored = self.scoring.score(None, nothing, nothing, {task.number: ends})
            self._publish(scored.outgoing, Begun([task.number], scored))
        else:
            self._owned.happened([task.number])

    def _caught_up(self, task: Task) -> bool:
        bounds = self._transport.bounds([Partition(topic, task.number) for topic in task.offsets])
        return all(end <= task.offsets[p.topic] for p, (_, end) in bounds.items())
