"""The at-rest format of a user's state, which is also its format in memory.

    fixed part   format, ids, statistics, previous event, tail of raw events     PREFIX.itemsize bytes
    hidden part  the encoder's hidden state, int16 fixed point                   2 bytes a unit

The hidden state lies in [-1, 1], so int16 fixed point (steps of 3e-5) is sixteen times finer than float16 at the same size, and two
workers whose batches differ store the same bytes or neighbours.

The last L raw events are kept so that a state can be rebuilt. Appending to them costs the same at any L: the newest up to TAIL events
stand in the record, and each time the tail is full it moves, as a chunk of TAIL events, to a key of its own in a ring of slots.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from model.statistics import STATISTICS

FORMAT = 2
TAIL = 8
HIDDEN_STEP = 32767.0

EVENT = np.dtype(
    [
        ("time_ms", "<i8"),
        ("type_hash", "<u4"),
        ("item_hash", "<u4"),
        ("category_hash", "<u4"),
        ("session_hash", "<u4"),
        ("value", "<f4"),
    ]
)
"""A raw event, independent of any model: hashes rather than vocabulary slots. value is NaN where the event has none. Its attributes are
not here: they are the user's, and stand in the statistics."""

PREFIX = np.dtype(
    [
        ("format", "<u2"),
        ("tail_length", "<u2"),
        ("encoder", "<u4"),  # crc32 of the encoder_id that `hidden` belongs to; 0: rebuild it
        ("lineage", "<u4"),  # crc32 of the lineage that `statistics` belong to
        ("stored_due_seconds", "<u4"),  # since 2000-01-01: when this user's timer stands in Redis; 0: not known
        ("statistics", STATISTICS),
        ("previous", EVENT),
        ("tail", EVENT, (TAIL,)),
    ]
)

CHUNK = np.dtype([("index", "<u4"), ("reserved", "<u4"), ("events", EVENT, (TAIL,))])


def identity(text: str) -> int:
    """32 bits of an encoder_id or a lineage, never 0."""
    return zlib.crc32(text.encode()) or 1


def record_type(hidden: int) -> np.dtype[np.void]:
    """The dtype of a whole record with `hidden` units."""
    return np.dtype([("prefix", PREFIX), ("hidden", "<i2", (hidden,))])


def opaque(structures: NDArray[np.void]) -> NDArray[np.void]:
    """The same memory as plain bytes: numpy copies a structure field by field, ten times slower."""
    return structures.view(np.dtype((np.void, structures.dtype.itemsize)))


def quantise(hidden: NDArray[np.float32]) -> NDArray[np.int16]:
    """float32 in [-1, 1] to fixed point."""
    fixed: NDArray[np.int16] = np.rint(np.clip(hidden, -1, 1) * HIDDEN_STEP).astype(np.int16)
    return fixed


def dequantise(hidden: NDArray[np.int16]) -> NDArray[np.float32]:
    """Fixed point to float32."""
    return hidden.astype(np.float32) * np.float32(1 / HIDDEN_STEP)


def parse(values: list[bytes], dtype: np.dtype[np.void]) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
    """Records of N stored values, as ((N,) of `dtype`, which may be read-only, (N,) readable). What another encoder size wrote keeps its
    fixed part and asks for a rebuild; what is no record at all (another format, cut short) is not readable.
    """
    if all(len(v) == dtype.itemsize for v in values):
        records = np.frombuffer(b"".join(values), dtype)
        readable = records["prefix"]["format"] == FORMAT
        return records, readable
    records = np.zeros(len(values), dtype)
    readable = np.zeros(len(values), bool)
    for i, value in enumerate(values):
        if len(value) < PREFIX.itemsize:
            continue
        prefix = np.frombuffer(value, PREFIX, 1)
        readable[i] = prefix["format"][0] == FORMAT
        records["prefix"][i] = prefix[0]
        if len(value) == dtype.itemsize:
            records["hidden"][i] = np.frombuffer(value, dtype, 1)["hidden"][0]
        else:
            records["prefix"]["encoder"][i] = 0
    return records, readable


def chunk_slots(history_events: int) -> int:
    """Slots in a user's ring of chunks, so that ring and tail together always hold the last `history_events`."""
    return -(-history_events // TAIL)


def encode_chunks(index: NDArray[np.int64], tails: NDArray[np.void]) -> list[bytes]:
    """Full tails (N, TAIL), each as the chunk that holds its user's events [index * TAIL, (index + 1) * TAIL)."""
    chunks = np.zeros(len(index), CHUNK)
    chunks["index"] = index
    opaque(chunks["events"])[:] = opaque(tails)
    packed = chunks.tobytes()
    return [packed[i : i + CHUNK.itemsize] for i in range(0, len(packed), CHUNK.itemsize)]


def history(count: int, tail: NDArray[np.void], chunks: list[bytes | None], history_events: int) -> NDArray[np.void]:
    """The last `history_events` events of a user who has had `count`, oldest first, from the record's tail (its filled part) and the
    ring's slots. A slot that holds another lap's chunk (the ring's size was changed) ends the history there."""
    parts = [tail]
    found = len(tail)
    index = (count - len(tail)) // TAIL - 1
    while found < history_events and index >= 0:
        chunk = chunks[index % len(chunks)]
        if chunk is None or len(chunk) != CHUNK.itemsize or int(np.frombuffer(chunk, CHUNK)["index"][0]) != index:
            break
        parts.append(np.frombuffer(chunk, CHUNK)["events"][0])
        found += TAIL
        index -= 1
    return np.concatenate(parts[::-1])[-history_events:]
