"""What goes out for a batch: score messages and dead letters, as the transport takes them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from numpy.typing import NDArray

from model.events import BadRecord
from worker.transport import Headers, Outgoing, Records

try:
    VERSION = version("streamscore")
except PackageNotFoundError:  # run from a folder that was never installed
    VERSION = "unknown"


def score_messages(topic: str, partition: int | None, users: Sequence[str], values: list[bytes]) -> Outgoing:
    """Scores of one partition, keyed by user."""
    return Outgoing(topic, partition, [u.encode() for u in users], list(values))


def merged(
    users: list[str], scores: list[bytes], silent: list[str], silences: list[bytes], place: NDArray[np.int64]
) -> tuple[list[str], list[bytes]]:
    """Events' scores in log order, with each silence score before the event at its `place` (-1: at the end)."""
    if not silences:
        return users, scores
    count = len(scores)
    order = np.argsort(np.concatenate([np.arange(count) * 2 + 1, np.where(place < 0, count, place) * 2]), kind="stable").tolist()
    every_user, every = [*users, *silent], [*scores, *silences]
    return [every_user[i] for i in order], [every[i] for i in order]


def dead_letters(topic: str, sources: Sequence[tuple[Records, int, BadRecord]], most_bytes: int) -> Outgoing:
    """The original key and bytes, untouched, with the reason in the headers. Only a record that the dead-letter topic itself cannot take
    (`most_bytes`) is cut short, and says so."""
    keys: list[bytes | None] = []
    values: list[bytes | None] = []
    headers: list[Headers] = []
    for records, i, bad in sources:
        key, value = records.keys[i], records.values[i]
        about = [
            ("streamscore-reason", bad.reason.encode()),
            ("streamscore-detail", bad.detail[:500].encode("utf-8", "replace")),
            ("streamscore-topic", records.partition.topic.encode()),
            ("streamscore-partition", str(records.partition.number).encode()),
            ("streamscore-offset", str(records.offsets[i]).encode()),
            ("streamscore-version", VERSION.encode()),
        ]
        room = most_bytes - len(key or b"") - sum(len(k) + len(v or b"") for k, v in (*records.headers[i], *about)) - 1024
        if value is not None and len(value) > room:
            about.append(("streamscore-truncated-from-bytes", str(len(value)).encode()))
            value = value[: max(room, 0)]
        keys.append(key)
        # Kafka takes no message with neither key nor value, but a record without both must still be seen by somebody.
        values.append(b"" if key is None and value is None else value)
        headers.append([*records.headers[i], *about])
    return Outgoing(topic, None, keys, values, headers)
