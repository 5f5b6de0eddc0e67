"""The cache: whoever is dirty, in use or about to be fired stays, and nothing is lost of whoever has to go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import DAY_MS, START_MS, publish_model

from model.registry import Registry
from worker.arena import Arena, ArenaFull
from worker.loop import Worker
from worker.metrics import Metrics
from worker.models import Models
from worker.settings import WorkerSettings
from worker.store import connect
from worker.transport import Partition
from worker.transport_memory import MemoryBroker, MemoryTransport

CAPACITY = 12
batches = st.lists(
    st.tuples(
        st.integers(0, 1),  # partition
        st.lists(st.integers(0, 25), min_size=1, max_size=8, unique=True),  # users
        st.sets(st.integers(0, 7)),  # which of them change
        st.booleans(),  # a flush afterwards
        st.integers(0, 30),  # dues about to be fired
    ),
    max_size=30,
)


@given(batches)
def test_what_is_needed_stays(found: list[tuple[int, list[int], set[int], bool, int]]) -> None:
    arena, tables = Arena(CAPACITY, 2), {0: dict[str, int](), 1: dict[str, int]()}
    records: dict[tuple[int, str], int] = {}  # what was last written in a row
    for tick, (partition, users, changed, flush, upto_ms) in enumerate(found):
        table, names = tables[partition], [f"u{u}" for u in users]
        arena.tick += 1
        arena.firing = {partition: upto_ms}
        arena.touched[[table[n] for n in names if n in table]] = arena.tick
        missing = [n for n in names if n not in table]
        before = {(p, user): row for p, rows in tables.items() for user, row in rows.items()}
        keep = {
            (p, user)
            for (p, user), row in before.items()
            if arena.dirty[row]
            or arena.touched[row] == arena.tick
            or (p == partition and min(arena.due_ms[row], arena.stored_due_ms[row]) <= upto_ms)
        }
        if (over := len(keep) + len(missing) - CAPACITY) > 0 and missing:
            with pytest.raises(ArenaFull) as full:
                arena.take(missing, partition, tables)
            assert full.value.args == (over,)
            assert {(p, user): row for p, rows in tables.items() for user, row in rows.items()} == before, "nothing has changed"
            arena.dirty[:] = False
            continue
        if missing:
            rows = arena.take(missing, partition, tables)
            assert [arena.user[row] for row in rows] == missing
            arena.due_ms[rows] = np.array(users[: len(rows)])
            arena.stored_due_ms[rows] = arena.due_ms[rows] - tick % 3
            arena.records["hidden"][rows, 0] = tick
            records |= {(partition, user): tick for user in missing}
        now = {(p, user): row for p, rows in tables.items() for user, row in rows.items()}
        assert len(set(now.values())) == len(now) == len(arena), "a row each"
        for (p, user), row in now.items():
            assert (arena.user[row], arena.partition[row]) == (user, p)
            assert arena.records["hidden"][row, 0] == records[p, user]
        for key in keep:
            assert now[key] == before[key], "who is dirty, in use or about to be fired stays where it is"
        arena.dirty[[table[names[i]] for i in changed if i < len(names)]] = True
        if flush:
            arena.dirty[:] = False


def test_whoever_was_used_longest_ago_goes_first() -> None:
    arena, tables = Arena(20, 2), {0: dict[str, int]()}
    for i in range(20):
        arena.tick += 1
        arena.take([f"u{i}"], 0, tables)
    arena.tick += 1
    arena.touched[tables[0]["u0"]] = arena.tick
    arena.tick += 1
    arena.take(["new"], 0, tables)
    assert [u for u in (f"u{i}" for i in range(20)) if u not in tables[0]] == ["u1", "u2"]  # a tenth of the capacity at a time


def test_rows_given_back_are_taken_again() -> None:
    arena, tables = Arena(3, 2), {0: dict[str, int]()}
    rows = arena.take(["a", "b", "c"], 0, tables)
    arena.dirty[rows] = True
    arena.release([tables[0].pop("b")])
    assert len(arena) == 2
    assert arena.rows(0).tolist() == sorted(tables[0].values())
    assert arena.take(["d"], 0, tables).tolist() == [rows[1]]
    assert not arena.dirty[rows[1]]


def test_growing_keeps_everything_where_it_is() -> None:
    arena, tables = Arena(3, 2), {0: dict[str, int]()}
    arena.tick = 1
    rows = arena.take(["a", "b", "c"], 0, tables)
    arena.records["hidden"][rows] = [[1, 2], [3, 4], [5, 6]]
    with pytest.raises(ArenaFull) as full:
        arena.take(["d", "e"], 0, tables)
    arena.grow(full.value.args[0])
    more = arena.take(["d", "e"], 0, tables)
    arena.write(more, arena.read(rows[:2]))
    assert arena.records["hidden"][[*rows, *more]].tolist() == [[1, 2], [3, 4], [5, 6], [1, 2], [3, 4]]
    assert len(arena) == arena.capacity == 5


@pytest.fixture
def scores(redis_url: str, unique: str, tmp_path: Path) -> Callable[..., list[tuple[str, int]]]:
    """(user, time) of every score that a worker with a small cache makes of events, one partition, in memory but for Redis."""

    def run(events: list[tuple[str, int]], turns: int, **more: object) -> list[tuple[str, int]]:
        publish_model(tmp_path, "v1", hidden=4)
        broker, metrics = MemoryBroker(), Metrics()
        for topic in ("events", "scores", "dead-letters"):
            broker.create_topic(topic, 1)
        for user, at_ms in events:
            value = json.dumps({"user_id": user, "type": "view", "timestamp": at_ms}).encode()
            broker.append(Partition("events", 0), value, time_ms=at_ms)
        settings = WorkerSettings.model_validate({"group": unique, "cache_users": 1000, "silence_hours": (24, 72), **more})
        client = connect(redis_url, cluster=False, timeout_seconds=5, ssl_cafile=None)
        models = Models(Registry(str(tmp_path)), None, "cpu", metrics)
        worker = Worker(settings, lambda: MemoryTransport(broker, unique, ["events"]), client, models, metrics)
        worker.start()
        for _ in range(turns):
            worker.run_once()
        worker.close()
        found = [json.loads(value or b"") for records in broker.read("scores") for value in records.values]
        return [(score["user_id"], score["timestamp"]) for score in found]

    return run


def test_a_small_cache_loses_no_silence(scores: Callable[..., list[tuple[str, int]]]) -> None:
    """More users than rows, all of them due at one moment: those who are in memory must not be evicted for those who are not."""
    users = [f"u{i}" for i in range(2500)]
    events = [(user, START_MS) for user in users]
    silences = [(user, START_MS + days * DAY_MS) for user in users for days in (1, 3)]
    last = ("last", START_MS + 3 * DAY_MS)
    assert sorted(scores([*events, last], 20)) == sorted([*events, last, *silences])


def test_a_batch_of_more_users_than_the_cache_holds(scores: Callable[..., list[tuple[str, int]]]) -> None:
    events = [(f"u{i % 1900}", START_MS + i) for i in range(4000)]
    assert sorted(scores(events, 20)) == sorted(events)


def test_room_is_not_made_of_users_of_the_same_batch(scores: Callable[..., list[tuple[str, int]]]) -> None:
    """Those used longest ago come back in a batch with strangers, for whom somebody has to go."""
    users = [*(f"u{i}" for i in range(1000)), *(f"u{i}" for i in range(50)), *(f"new{i}" for i in range(300))]
    events = [(user, START_MS + i) for i, user in enumerate(users)]
    assert sorted(scores(events, 20, max_batch_records=1000)) == sorted(events)
