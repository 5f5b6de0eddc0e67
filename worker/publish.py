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

FRAME_BYTES = 1024  # a batch of one message, without what is in it, and the headers that say what was cut
HEADER_BYTES = 10  # a header, without its name and content


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
    """The original key, bytes and headers, untouched, with the reason in further headers. Only what the dead-letter topic itself cannot
    take (`most_bytes`) is cut short, and says so: first the value, then the key, at last the original headers."""
    keys: list[bytes | None] = []
    values: list[bytes | None] = []
    headers: list[Headers] = []
    for records, i, bad in sources:
        original, about = list(records.headers[i]), _about(records, i, bad)
        room = most_bytes - FRAME_BYTES - _size(about)
        if _size(original) > room:
            about.append(("streamscore-headers-left-out", str(len(original)).encode()))
            original = []
        room -= _size(original)
        key = _cut(records.keys[i], room, about, "streamscore-key-truncated-from-bytes")
        value = _cut(records.values[i], room - len(key or b""), about, "streamscore-truncated-from-bytes")
        keys.append(key)
        # Kafka takes no message with neither key nor value, but a record without both must still be seen by somebody.
        values.append(b"" if key is None and value is None else value)
        headers.append([*original, *about])
    return Outgoing(topic, None, keys, values, headers)


def _about(records: Records, i: int, bad: BadRecord) -> list[tuple[str, bytes]]:
    return [
        ("streamscore-reason", bad.reason.encode()),
        ("streamscore-detail", bad.detail[:500].encode("utf-8", "replace")),
        ("streamscore-topic", records.partition.topic.encode()),
        ("streamscore-partition", str(records.partition.number).encode()),
        ("streamscore-offset", str(records.offsets[i]).encode()),
        ("streamscore-version", VERSION.encode()),
    ]


def _cut(content: bytes | None, room: int, about: list[tuple[str, bytes]], name: str) -> bytes | None:
    if content is None or len(content) <= room:
        return content
    about.append((name, str(len(content)).encode()))
    return content[: max(room, 0)]


def _size(headers: Headers) -> int:
    return sum(len(name.encode()) + len(content) + HEADER_BYTES for name, content in headers)
