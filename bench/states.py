"""States at rest, as if every user had a full history: what a worker finds in Redis that has run for long.

Writing 50 events each for 200,000 users through Kafka would take minutes. So a few template users are taken through the worker's own
`Histories`, and every user gets the state of one of them, written by the worker's own `Store`.
"""

from __future__ import annotations

import random

import numpy as np
import redis
from numpy.typing import NDArray

from bench.stream import PARTITIONS, TYPES, partition_of, user_name
from model.artifact import Model
from model.events import stable_hash
from worker.record import EVENT, FORMAT, TAIL, chunk_slots, encode_chunks, identity, record_type
from worker.schedule import NEVER_MS
from worker.states import Histories, timer_seconds
from worker.store import Applied, Flush, Store

TEMPLATES = 32
DUE_MS = 180 * 86_400_000  # after the last event, when the worker's default retention deletes a user
SESSION_MS = 1_800_000
FLUSH_USERS = 20_000
RINGS_UPTO = 10_000  # users. Nothing reads the rings in these runs, and for 200,000 users they would take half a gigabyte of Redis


def template_histories(history_events: int, end_ms: int) -> list[np.ndarray]:
    """Histories that are full, of somewhat different lengths, each oldest first and ending before `end_ms`."""
    rng = random.Random(0)
    out = []
    for k in range(TEMPLATES):
        length = history_events + TAIL + k % TAIL
        times = sorted(end_ms - rng.randrange(30 * 86_400_000) for _ in range(length))
        rows = []
        for t in times:
            names = (rng.choice(TYPES), f"i{rng.randrange(2000):04}", f"c{rng.randrange(40):02}", f"s{t // SESSION_MS}")
            rows.append((t, *map(stable_hash, names), 9.5))
        out.append(np.array(rows, EVENT))
    return out


def template_records(model: Model, histories: list[np.ndarray]) -> np.ndarray:
    """(TEMPLATES,) records of the worker's at-rest format."""
    taken = Histories(model, histories)
    records = np.zeros(len(histories), record_type(model.network.state_size))
    prefix = records["prefix"]
    prefix["format"] = FORMAT
    prefix["encoder"] = identity(model.manifest.encoder_id)
    prefix["lineage"] = identity(model.manifest.lineage)
    prefix["statistics"] = taken.statistics()
    prefix["stored_due_seconds"] = timer_seconds(prefix["statistics"]["last_ms"] + DUE_MS)
    records["hidden"] = taken.hidden()
    for i, history in enumerate(histories):
        prefix["previous"][i] = history[-1]
        tail = history[len(history) // TAIL * TAIL :]
        prefix["tail_length"][i] = len(tail)
        prefix["tail"][i, : len(tail)] = tail
    return records


def fill(url: str, group: str, topic: str, users: int, model: Model, history_events: int, end_ms: int) -> None:
    """Empty Redis, and give every user a state in it; `group` has read nothing of `topic` yet."""
    client = redis.Redis.from_url(url)
    client.flushdb()
    histories = template_histories(history_events, end_ms)
    records = template_records(model, histories)
    values = [r.tobytes() for r in records]
    dues = (records["prefix"]["statistics"]["last_ms"] + DUE_MS).tolist()
    slots = chunk_slots(history_events)
    rings = [_ring(h, slots) if users <= RINGS_UPTO else [] for h in histories]
    stores = [Store(client, group, number, slots) for number in range(PARTITIONS)]
    for begin in reversed(range(0, users, FLUSH_USERS)):
        # a flush that changes nothing of `applied` is taken for a repeated one; the last is the one that stays
        applied = Applied({topic: 0}, NEVER_MS, NEVER_MS + begin, PARTITIONS, model.manifest.encoder_id)
        flushes = [Flush() for _ in stores]
        for n in range(begin, min(begin + FLUSH_USERS, users)):
            user = user_name(n)
            flush, k = flushes[partition_of(user)], n % TEMPLATES
            flush.records[user] = values[k]
            flush.due[user] = dues[k]
            flush.chunks.update({(user, slot): chunk for slot, chunk in rings[k]})
        for store, flush in zip(stores, flushes, strict=True):
            store.flush(flush, applied)
    client.close()


def _ring(events: NDArray[np.void], slots: int) -> list[tuple[int, bytes]]:
    """(slot, chunk) of each full tail that a history has left behind."""
    full = len(events) // TAIL
    chunks = encode_chunks(np.arange(full), events[: full * TAIL].reshape(full, TAIL))
    return [(c % slots, chunk) for c, chunk in enumerate(chunks)][-slots:]
