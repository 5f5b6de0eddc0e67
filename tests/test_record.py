"""The at-rest format: fixed point, records of other sizes, and the ring of chunks that keeps the last events."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import publish_model

from model.artifact import Model
from model.events import EventColumns
from worker.record import (
    CHUNK,
    EVENT,
    FORMAT,
    HIDDEN_STEP,
    PREFIX,
    TAIL,
    chunk_slots,
    dequantise,
    encode_chunks,
    history,
    identity,
    parse,
    quantise,
    record_type,
)
from worker.schedule import Schedule
from worker.states import States
from worker.step import step
from worker.task import Task

START_MS = 1_760_000_000_000


@given(st.lists(st.floats(-1, 1, width=32), min_size=1))
def test_fixed_point_is_exact_to_half_a_step(hidden: list[float]) -> None:
    values = np.array(hidden, np.float32)
    assert abs(dequantise(quantise(values)) - values).max() <= 0.5 / HIDDEN_STEP + 1e-7


def test_what_was_stored_once_is_stored_again_the_same() -> None:
    every = np.arange(-32767, 32768).astype(np.int16)
    assert (quantise(dequantise(every)) == every).all()
    assert quantise(np.array([-1.5, 1.5, -1, 1], np.float32)).tolist() == [-32767, 32767, -32767, 32767]


def stored(hidden: int, count: int = 3, form: int = FORMAT) -> bytes:
    record = np.zeros(1, record_type(hidden))
    record["prefix"]["format"] = form
    record["prefix"]["encoder"] = 77
    record["prefix"]["statistics"]["count"] = count
    record["hidden"] = np.arange(hidden)
    return record.tobytes()


def test_records_come_back() -> None:
    records, readable = parse([stored(16), stored(16, count=5)], record_type(16))
    assert readable.all()
    assert records["prefix"]["statistics"]["count"].tolist() == [3, 5]
    assert records["prefix"]["encoder"].tolist() == [77, 77]
    assert (records["hidden"] == np.arange(16)).all()


@pytest.mark.parametrize("other", [8, 32])
def test_another_encoders_size_keeps_the_fixed_part_and_asks_for_a_rebuild(other: int) -> None:
    records, readable = parse([stored(16), stored(other, count=5)], record_type(16))
    assert readable.all()
    assert records["prefix"]["statistics"]["count"].tolist() == [3, 5]
    assert records["prefix"]["encoder"].tolist() == [77, 0]
    assert not records["hidden"][1].any()


@pytest.mark.parametrize("value", [b"", b"x", b"x" * (PREFIX.itemsize - 1), stored(16, form=FORMAT + 1), stored(8, form=FORMAT + 1)])
def test_what_is_no_record_is_not_readable(value: bytes) -> None:
    assert parse([stored(16), value], record_type(16))[1].tolist() == [True, False]
    assert parse([value], record_type(16))[1].tolist() == [False]


def test_identities_tell_encoders_apart_and_are_never_zero() -> None:
    assert identity("a") != identity("b")
    assert identity("") != 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return publish_model(tmp_path_factory.mktemp("registry"), "v1", hidden=4)


class Writer:
    """A user's record and ring, as the worker keeps them: `append` events, `flush` now and then."""

    def __init__(self, model: Model, history_events: int) -> None:
        self.states = States(model, Schedule((), 1 << 60), 1000, history_events)
        self.task = cast("Task", SimpleNamespace(number=0, chunks={}))
        self.states.own(self.task)
        self.row = self.states.arena.take(["u"], 0, self.states.tables)
        self.ring: list[bytes | None] = [None] * chunk_slots(history_events)

    def append(self, items: list[int]) -> None:
        count = len(items)
        hashes = np.array(items, np.uint32)
        events = EventColumns(
            np.arange(count),
            ["u"] * count,
            [None] * count,
            START_MS + hashes.astype(np.int64),
            hashes,
            hashes,
            hashes,
            hashes.astype(np.float32),
            hashes,
        )
        step(self.states, events, np.repeat(self.row, count), np.full(count, -(1 << 62)), np.full(count, -(1 << 62)))

    def flush(self) -> None:
        for (_, slot), chunk in self.task.chunks.items():
            assert len(chunk) == CHUNK.itemsize
            self.ring[slot] = chunk
        self.task.chunks = {}

    def kept(self, history_events: int) -> list[int]:
        prefix = self.states.arena.records["prefix"][self.row[0]]
        tail = prefix["tail"][: prefix["tail_length"]]
        found = history(int(prefix["statistics"]["count"]), tail, self.ring, history_events)
        assert found.dtype == EVENT
        assert (found["time_ms"] - START_MS == found["item_hash"]).all()
        return cast("list[int]", found["item_hash"].tolist())


@settings(max_examples=30)
@given(
    st.sampled_from([1, 5, TAIL - 1, TAIL, TAIL + 1, 2 * TAIL, 20, 50]),
    st.lists(st.tuples(st.integers(1, 3 * TAIL), st.booleans()), min_size=1, max_size=12),
)
def test_the_ring_is_as_a_plain_list(model: Model, history_events: int, batches: list[tuple[int, bool]]) -> None:
    writer, plain = Writer(model, history_events), list[int]()
    for count, flush in [*batches, (1, True)]:
        new = list(range(len(plain) + 1, len(plain) + 1 + count))
        writer.append(new)
        plain += new
        if flush:
            writer.flush()
            assert writer.kept(history_events) == plain[-history_events:]


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(0, 30))
def test_a_ring_whose_size_was_changed_never_gives_what_is_not_the_last(
    model: Model, before: int, after: int, first: int, more: int
) -> None:
    writer = Writer(model, before)
    writer.append(list(range(1, first + 1)))
    writer.flush()
    writer.states.history_events = after
    writer.ring = (writer.ring + [None] * chunk_slots(after))[: chunk_slots(after)]
    if more:
        writer.append(list(range(first + 1, first + more + 1)))
    writer.flush()
    kept = writer.kept(after)
    assert kept == list(range(1, first + more + 1))[first + more - len(kept) :]
    if more >= after + TAIL:
        assert len(kept) == after


def test_a_damaged_chunk_ends_the_history() -> None:
    events = np.zeros(TAIL, EVENT)
    events["item_hash"] = np.arange(TAIL)
    tail = events[:2]
    other, good = encode_chunks(np.array([0, 1]), np.stack([events, events]))
    assert len(history(2 * TAIL + 2, tail, [None, good], 50)) == TAIL + 2
    assert len(history(2 * TAIL + 2, tail, [other, good], 50)) == 2 * TAIL + 2
    assert len(history(2 * TAIL + 2, tail, [good, good[:-1]], 50)) == 2
    assert len(history(2 * TAIL + 2, tail, [good, other], 50)) == 2
