"""One micro-batch through the network: events in log order in, a state and a question to the head for each out. No I/O.

The batch is sorted by (rank of an event within its user, user), so that the events of one rank are a slice with distinct users and can
be stepped together; several events of one user are stepped in order, and each gets its own score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model import statistics
from model.events import EventColumns
from model.features import Previous, step_features
from model.statistics import STATISTICS
from worker.record import FORMAT, TAIL, chunk_slots, dequantise, encode_chunks, opaque, quantise
from worker.states import States
from worker.task import Task

COLUMNS = ("type_hash", "item_hash", "category_hash", "session_hash", "value")
"""What `step_features` is told of an event beside its time; all but the value of the one before it, too."""


@dataclass(slots=True)
class Questions:
    """Moments at which the head is asked, N of them. place: (N,) index of the event it belongs to or comes before; -1 for the end."""

    place: NDArray[np.int64]
    user: list[str]
    at_ms: NDArray[np.int64]
    hidden: NDArray[np.float32]
    stats: NDArray[np.void]

    def where(self, which: slice | NDArray[np.bool_]) -> Questions:
        """Some of them."""
        users = self.user[which] if isinstance(which, slice) else [self.user[i] for i in np.flatnonzero(which).tolist()]
        return Questions(self.place[which], users, self.at_ms[which], self.hidden[which], self.stats[which])


def step(
    states: States, events: EventColumns, rows: NDArray[np.int64], before_ms: NDArray[np.int64], reached_ms: NDArray[np.int64]
) -> tuple[Questions, Questions]:
    """Take events into their users' states. rows: (N,) of `States.rows`; before_ms, reached_ms: (N,) the clock before and after each event.

    Returns the questions after the events (in log order) and those of silences that had to be fired before one of them.
    """
    arena, model, schedule = states.arena, states.model, states.schedule
    count = len(events)
    hidden = np.empty((count, arena.hidden), np.float32)
    stats = np.empty(count, STATISTICS)
    silences: list[Questions] = []
    for index in _rounds(rows):
        row = rows[index]
        time_ms, before = events.time_ms[index], before_ms[index]
        record = arena.read(row)
        prefix = record["prefix"]
        overdue = arena.due_ms[row] <= before
        if overdue.any():
            late = np.flatnonzero(overdue)
            asked, deleted = _fire(states, record[late], row[late], before[late])
            asked.place = index[late[asked.place]]
            silences.append(asked)
            record[late[deleted]] = np.zeros((), record.dtype)  # silent beyond retention before this event: a new user
        prior = prefix["previous"]
        seen = prefix["statistics"]["count"] > 0
        previous = Previous(seen, prefix["statistics"]["last_ms"], *(prior[name] for name in COLUMNS[:-1]))
        columns = tuple(getattr(events, name)[index] for name in COLUMNS)
        features = step_features(model.vocabulary, model.scaling, previous, time_ms, *columns)
        own = prefix["statistics"]
        quantised = quantise(model.network.step(dequantise(record["hidden"]), features, own).cpu().numpy())
        record["hidden"] = quantised
        attributes = None if events.attributes is None else events.attributes[index]
        statistics.update(own, features.slot, time_ms, events.value[index], attributes, model.vocabulary.used)
        for name, column in zip(COLUMNS, columns, strict=True):
            prior[name] = column
        prior["time_ms"] = own["last_ms"]
        prefix["format"], prefix["encoder"], prefix["lineage"] = FORMAT, states.encoder, states.lineage
        _remember(states, prefix, row)
        arena.write(row, record)
        arena.due_ms[row] = schedule.next_due(own["last_ms"], reached_ms[index])
        hidden[index] = dequantise(quantised)
        opaque(stats)[index] = opaque(own)
    arena.dirty[rows] = True
    after = Questions(np.arange(count), events.user, stats["last_ms"].copy(), hidden, stats)
    return after, joined(silences, arena.hidden)


def fire_due(states: States, task: Task, upto_ms: int) -> Questions:
    """Fire everything due in a task's cached rows up to `upto_ms`, and delete who is silent beyond retention. Moves the dues on."""
    arena = states.arena
    mine = arena.partition == task.number
    arena.dirty[mine & (arena.stored_due_ms <= upto_ms)] = True  # a timer that the clock passes would never be looked at again
    rows = np.flatnonzero(mine & (arena.due_ms <= upto_ms))
    if not len(rows):
        return joined([], arena.hidden)
    record = arena.read(rows)
    asked, deleted = _fire(states, record, rows, np.full(len(rows), upto_ms, np.int64))
    asked.place = np.full(len(asked.user), -1, np.int64)
    kept = rows[~deleted]
    arena.due_ms[kept] = states.schedule.next_due(record["prefix"]["statistics"]["last_ms"][~deleted], upto_ms)
    arena.dirty[kept] = True
    states.delete(task, rows[deleted])
    return asked


def _fire(
    states: States, record: NDArray[np.void], rows: NDArray[np.int64], upto_ms: NDArray[np.int64]
) -> tuple[Questions, NDArray[np.bool_]]:
    """Questions of `record`s (N,) of `rows` with dues passed by `upto_ms`; their place is the index into `record`. And who is deleted."""
    stats = record["prefix"]["statistics"]
    who, due_ms, deleted = states.schedule.passed(stats["last_ms"], states.arena.due_ms[rows], upto_ms)
    users = [states.arena.user[row] for row in rows[who].tolist()]
    return Questions(who, users, due_ms, dequantise(record["hidden"][who]), stats[who]), deleted


def _remember(states: States, prefix: NDArray[np.void], row: NDArray[np.int64]) -> None:
    """Append each user's newest event (already in `previous`) to the tail; a full tail becomes a chunk."""
    n = np.arange(len(row))
    length = prefix["tail_length"].astype(np.int64)
    opaque(prefix["tail"])[n, length] = opaque(prefix["previous"])
    length += 1
    full = np.flatnonzero(length == TAIL)
    index = prefix["statistics"]["count"][full].astype(np.int64) // TAIL - 1
    slots = (index % chunk_slots(states.history_events)).tolist()
    user, number = states.arena.user, states.arena.partition[row[full]].tolist()
    for n, at, slot, chunk in zip(number, row[full].tolist(), slots, encode_chunks(index, prefix["tail"][full]), strict=True):
        states.tasks[n].chunks[user[at], slot] = chunk
    length[full] = 0
    prefix["tail_length"] = length


def _rounds(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Indices of a batch, by rank of the event within its row: each round has distinct rows."""
    count = len(rows)
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if count else np.zeros(0, np.int64)
    if len(starts) == count:
        return [np.arange(count)] if count else []
    sizes = np.diff(np.append(starts, count))
    rank = np.arange(count) - np.repeat(starts, sizes)
    by_rank = np.argsort(rank, kind="stable")
    return np.split(order[by_rank], np.cumsum(np.bincount(rank))[:-1])


def joined(parts: list[Questions], hidden: int) -> Questions:
    """Questions one after the other, of `hidden` units."""
    parts = [p for p in parts if p.user]
    if not parts:
        return Questions(np.zeros(0, np.int64), [], np.zeros(0, np.int64), np.zeros((0, hidden), np.float32), np.zeros(0, STATISTICS))
    if len(parts) == 1:
        return parts[0]
    return Questions(
        np.concatenate([p.place for p in parts]),
        [u for p in parts for u in p.user],
        np.concatenate([p.at_ms for p in parts]),
        np.concatenate([p.hidden for p in parts]),
        np.concatenate([opaque(p.stats) for p in parts]).view(STATISTICS),
    )
