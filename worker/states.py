"""The users' states of all tasks this worker owns: cached rows over Redis, brought up to the model that runs.

Whatever `rows` returns is complete: loaded, of this model's encoder and lineage, with its next due time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model import statistics
from model.artifact import Model
from model.features import Previous, step_features
from model.statistics import BY_SLOT
from worker.arena import UNKNOWN, Arena
from worker.record import chunk_slots, dequantise, history, identity, parse, quantise
from worker.schedule import Schedule
from worker.store import Flush, StoreError
from worker.task import Task

NOT_DUE = 1 << 62  # of a user without events


class States:
    """Rows of users by task. `model` may be exchanged between two batches (`use`)."""

    def __init__(self, model: Model, schedule: Schedule, cache_users: int, history_events: int) -> None:
        self.schedule = schedule
        self.history_events = history_events
        self.arena = Arena(cache_users, model.network.state_size)
        self.tasks: dict[int, Task] = {}
        self.tables: dict[int, dict[str, int]] = {}
        self.hits = self.misses = self.rebuilt = 0
        self.model = model
        self.use(model)

    def use(self, model: Model) -> None:
        """Score with `model` from now on. Every task must have been flushed if the states are outdated by it."""
        if self.outdated_by(model):  # a row that is in memory is complete: see `rows`
            if model.network.state_size == self.arena.hidden:
                for table in self.tables.values():
                    self.arena.release(list(table.values()))
            else:
                self.arena = Arena(self.arena.capacity, model.network.state_size)
            self.tables = {number: {} for number in self.tables}
        self.model = model
        self.encoder = identity(model.manifest.encoder_id)
        self.lineage = identity(model.manifest.lineage)

    def outdated_by(self, model: Model) -> bool:
        """Whether states must be rebuilt for `model`."""
        now, then = model.manifest, self.model.manifest
        return (now.encoder_id, now.lineage) != (then.encoder_id, then.lineage)

    def own(self, task: Task) -> None:
        """Take a task over, with no rows yet."""
        self.tasks[task.number] = task
        self.tables[task.number] = {}

    def drop(self, task: Task) -> None:
        """Forget a task's rows, flushed or not."""
        self.tasks.pop(task.number, None)
        self.arena.release(list(self.tables.pop(task.number, {}).values()))

    def rows(self, task: Task, users: Sequence[str]) -> NDArray[np.int64]:
        """(N,) the row of each user, who may occur several times.

        Raises Moved, StoreUnavailable, StoreError, and ArenaFull (nothing has changed then: flush and call again).
        """
        table = self.tables[task.number]
        found = [table.get(u, -1) for u in users]
        misses = found.count(-1)
        if misses:
            missing = list(dict.fromkeys(u for u, row in zip(users, found, strict=True) if row < 0))
            self.arena.touched[[row for row in found if row >= 0]] = self.arena.tick  # or making room would evict them
            self._load(task, missing)
            found = [table[u] for u in users]
        self.misses += misses
        self.hits += len(users) - misses
        rows = np.array(found, np.int64)
        self.arena.touched[rows] = self.arena.tick
        self._renew(task, rows)
        return rows

    def flush(self, task: Task) -> int:
        """Write what changed in a task, and up to where it is exact, in one atomic step. Only between batches. Returns the users written.

        Raises Moved, StoreUnavailable, StoreError; nothing is forgotten then.
        """
        arena = self.arena
        rows = np.flatnonzero((arena.partition == task.number) & arena.dirty)
        if not len(rows) and not task.gone and task.applied == task.progress():
            task.store.settle()
            return 0
        users = [arena.user[row] for row in rows.tolist()]
        moved = np.flatnonzero(self._moved(task, rows))
        due_ms = arena.due_ms[rows[moved]]
        timers = timer_seconds(due_ms)
        arena.records["prefix"]["stored_due_seconds"][rows[moved]] = timers
        size = arena.records.dtype.itemsize
        packed = memoryview(arena.read(rows).view(np.uint8))  # type: ignore[arg-type]
        changes = Flush(
            records={u: packed[i * size : (i + 1) * size] for i, u in enumerate(users)},  # type: ignore[misc]
            chunks=task.chunks,
            due=dict(zip([users[i] for i in moved.tolist()], due_ms.tolist(), strict=True)),
            gone=list(task.gone),
        )
        progress = task.progress()
        task.store.flush(changes, progress)
        task.applied = progress
        task.note_stored_dues(due_ms)
        arena.stored_due_ms[rows[moved]] = timer_ms(timers)
        arena.dirty[rows] = False
        task.chunks = {}
        task.gone = set()
        return len(users)

    def nth_due(self, task: Task, n: int) -> int:
        """When so many of a task's users in memory are due, NOT_DUE if there are not so many."""
        due_ms = self.arena.due_ms[self.arena.partition == task.number]
        return int(np.partition(due_ms, n - 1)[n - 1]) if len(due_ms) >= n else NOT_DUE

    def delete(self, task: Task, rows: NDArray[np.int64]) -> None:
        """Users silent beyond retention: forget them, here at once and in Redis with the next flush."""
        table = self.tables[task.number]
        for row in rows.tolist():
            user = self.arena.user[row]
            del table[user]
            task.gone.add(user)
            for slot in range(chunk_slots(self.history_events)):
                task.chunks.pop((user, slot), None)
        self.arena.release(rows.tolist())

    def _load(self, task: Task, users: list[str]) -> None:
        values = task.store.load(users)
        arena = self.arena
        rows = arena.take(users, task.number, self.tables)
        arena.due_ms[rows] = NOT_DUE
        arena.stored_due_ms[rows] = UNKNOWN
        stored = [i for i, (u, v) in enumerate(zip(users, values, strict=True)) if v is not None and u not in task.gone]
        if len(stored) < len(users):
            arena.clear(np.delete(rows, stored))
        if stored:
            records, readable = parse([values[i] for i in stored], arena.records.dtype)  # type: ignore[misc]
            if not readable.all():
                user = users[stored[int(np.flatnonzero(~readable)[0])]]
                raise StoreError(f"the state of user {user!r} in Redis is not readable by this version: choose another `group` to rebuild")
            rows_stored = rows[stored]
            arena.write(rows_stored, records)
            prefix = records["prefix"]
            arena.due_ms[rows_stored] = self.schedule.next_due(prefix["statistics"]["last_ms"], task.clock.fired_ms)
            arena.stored_due_ms[rows_stored] = timer_ms(prefix["stored_due_seconds"])
        task.gone.difference_update(users)

    def _moved(self, task: Task, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(N,) whose timer in Redis must be written anew: it has been passed, or would come too late. One that comes too early stays."""
        stored_ms = self.arena.stored_due_ms[rows]
        moved: NDArray[np.bool_] = (stored_ms <= task.clock.fired_ms) | (stored_ms + 999 > self.arena.due_ms[rows])
        return moved

    def _renew(self, task: Task, rows: NDArray[np.int64]) -> None:
        """Rebuild what another encoder or another lineage left behind."""
        prefix = self.arena.records["prefix"]
        stale = ((prefix["encoder"][rows] != self.encoder) | (prefix["lineage"][rows] != self.lineage)) & (
            prefix["statistics"]["count"][rows] > 0
        )
        if stale.any():
            self._rebuild(task, np.unique(rows[stale]))

    def _rebuild(self, task: Task, rows: NDArray[np.int64]) -> None:
        arena = self.arena
        slots = chunk_slots(self.history_events)
        users = [arena.user[row] for row in rows.tolist()]
        rings = task.store.chunks(users)
        records = arena.read(rows)
        prefix = records["prefix"]
        histories = []
        for i, (user, ring) in enumerate(zip(users, rings, strict=True)):
            chunks = [task.chunks.get((user, slot), ring[slot]) for slot in range(slots)]
            tail = prefix["tail"][i, : prefix["tail_length"][i]]
            histories.append(history(int(prefix["statistics"]["count"][i]), tail, chunks, self.history_events))
        again = Histories(self.model, histories)
        records["hidden"] = again.hidden()
        alien = prefix["lineage"] != self.lineage
        if alien.any():
            stats = again.statistics()
            for name in BY_SLOT:  # what depends on the vocabulary; the rest is as good as ever
                prefix["statistics"][name][alien] = stats[name][alien]
        prefix["encoder"] = self.encoder
        prefix["lineage"] = self.lineage
        arena.write(rows, records)
        arena.dirty[rows] = True
        self.rebuilt += len(rows)


def timer_seconds(due_ms: NDArray[np.int64]) -> NDArray[np.uint32]:
    """(N,) as a record keeps them: seconds since 2000, 0 for what does not fit."""
    seconds = (due_ms - statistics.EPOCH_2000_MS) // 1000
    return np.where((seconds > 0) & (seconds < 1 << 32), seconds, 0).astype(np.uint32)


def timer_ms(seconds: NDArray[np.uint32]) -> NDArray[np.int64]:
    """(N,) epoch milliseconds, UNKNOWN for 0."""
    return np.where(seconds > 0, seconds.astype(np.int64) * 1000 + statistics.EPOCH_2000_MS, UNKNOWN)


class Histories:
    """Users' last events, to be stepped again from an empty state: all users' first events together, then their second, and so on."""

    def __init__(self, model: Model, histories: Sequence[NDArray[np.void]]) -> None:
        """histories: one array of dtype EVENT a user, oldest first, in which time does not run backwards."""
        self._model = model
        lengths = np.array([len(h) for h in histories])
        first = np.cumsum(lengths) - lengths
        self._events = events = np.concatenate(histories)
        self._rounds = [(np.flatnonzero(lengths > k), first[lengths > k] + k) for k in range(int(lengths.max(initial=0)))]
        self._users = len(lengths)
        before = events[np.maximum(np.arange(len(events)) - 1, 0)]
        seen = np.ones(len(events), bool)
        seen[first[lengths > 0]] = False
        hashes = ("type_hash", "item_hash", "category_hash", "session_hash")
        previous = Previous(seen, before["time_ms"], *(before[name] for name in hashes))
        columns = (events["time_ms"], *(events[name] for name in hashes), events["value"])
        self._features = step_features(model.vocabulary, model.scaling, previous, *columns)

    @torch.inference_mode()
    def hidden(self) -> NDArray[np.int16]:
        """(N, Z) states, at rest."""
        network = self._model.network
        columns = network.inputs(self._features, network.visits.gaps(self._statistics()[0], self._features.slot, self._features.time_ms))
        state = torch.zeros(self._users, network.state_size, device=network.device)
        for who, event in self._rounds:
            users = torch.from_numpy(who).to(state.device)
            stepped = network.encoder.step(state[users], *(c[torch.from_numpy(event).to(state.device)] for c in columns))
            state[users] = torch.from_numpy(dequantise(quantise(stepped.cpu().numpy()))).to(state.device)
        return quantise(state.cpu().numpy())

    def statistics(self) -> NDArray[np.void]:
        """(N,) statistics."""
        return self._statistics()[1]

    def _statistics(self) -> tuple[NDArray[np.void], NDArray[np.void]]:
        """(E,) before each event, and (N,) after the last."""
        before = np.zeros(len(self._events), statistics.STATISTICS)
        stats = np.zeros(self._users, statistics.STATISTICS)
        for who, event in self._rounds:
            before[event] = own = stats[who]
            statistics.update(own, self._features.slot[event], self._events["time_ms"][event], self._events["value"][event])
            stats[who] = own
        return before, stats
