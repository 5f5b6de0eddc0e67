"""Events: from the bytes of a poll to columns, once, at the edge.

A record that cannot be an event is not an exception but a `BadRecord` with its reason: it goes to the dead-letter topic beside
the scores of its neighbours. The verdict depends on the record alone (its bytes and its Kafka timestamp, never the wall clock),
so a replay rejects exactly what the first pass rejected.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.attributes import NONE, AttributeTable, as_rows
from model.hashing import stable_hash as stable_hash  # others look for it here, beside the events that it is for

FIELDS = ("user_id", "type", "timestamp", "event_id", "item_id", "category", "value", "session_id", "attributes")
MAX_TIME_MS = 1 << 62  # leaves room for differences
MAX_VALUE = 1e30  # an event's value is kept in float32
DAY_MS = 86_400_000

_ABSENT = msgspec.Raw()  # one object, so that counting it compares identities
_FIELD_TYPES: list[tuple[str, Any] | tuple[str, Any, Any]] = [
    ("user_id", str),
    ("type", str),
    ("timestamp", int | str),
    ("event_id", str | None, None),
    ("item_id", str | None, None),
    ("category", str | None, None),
    ("value", float | None, None),
    ("session_id", str | None, None),
    ("attributes", msgspec.Raw, _ABSENT),
]
# Columns are taken out of the structs by `map`, so that the loop over the events runs in C.
_USER, _EVENT, _TYPE, _TIME = attrgetter("user_id"), attrgetter("event_id"), attrgetter("type"), attrgetter("timestamp")
_ITEM, _CATEGORY, _VALUE = attrgetter("item_id"), attrgetter("category"), attrgetter("value")
_SESSION, _ATTRIBUTES = attrgetter("session_id"), attrgetter("attributes")


@dataclass(frozen=True, slots=True)
class Limits:
    """What an event may be. Whatever lies outside is a bad record.

    max_event_bytes: size of a record's value.
    max_user_id_bytes: UTF-8 length of a user_id.
    max_future_ms: how far an event's timestamp may lie after its record's Kafka timestamp.
    max_age_ms: how far before.
    """

    max_event_bytes: int = 65_536
    max_user_id_bytes: int = 256
    max_future_ms: int = 10 * 60_000
    max_age_ms: int = 20 * 365 * DAY_MS


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that is no event: its place in the poll, a reason (a metric label) and a sentence for people."""

    index: int
    reason: str
    detail: str


@dataclass(slots=True)
class EventColumns:
    """The good records of a poll, in log order. N events.

    index: (N,) place of each event's record in the poll.
    time_ms: (N,) epoch milliseconds.
    type_hash, item_hash, category_hash, session_hash: (N,) stable 32-bit hashes; 0 says that the field is missing.
    value: (N,) float32; NaN says that the field is missing.
    attributes: (N, 8) hashes as in `model.attributes`; None where no event of the poll carries any.
    """

    index: NDArray[np.int64]
    user: list[str]
    event_id: list[str | None]
    time_ms: NDArray[np.int64]
    type_hash: NDArray[np.uint32]
    item_hash: NDArray[np.uint32]
    category_hash: NDArray[np.uint32]
    value: NDArray[np.float32]
    session_hash: NDArray[np.uint32]
    attributes: NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self.user)


class _HashTable(dict[str | None, int]):
    """`stable_hash`, remembered: an event costs one dict look-up instead of an encode and a CRC."""

    LIMIT = 1_000_000

    def __missing__(self, text: str | None) -> int:
        if len(self) >= self.LIMIT:  # unbounded item ids must not become unbounded memory
            self.clear()
        self[text] = code = 0 if text is None else stable_hash(text)
        return code


class EventDecoder:
    """Decodes record values. `field_names` maps our field names to the user's own ({"user_id": "userId"})."""

    def __init__(self, limits: Limits | None = None, field_names: Mapping[str, str] | None = None) -> None:
        self.limits = limits or Limits()
        self._struct = msgspec.defstruct("Event", _FIELD_TYPES, gc=False, rename=dict(field_names or {}))
        self._decode = msgspec.json.Decoder(self._struct).decode
        self._hashes = _HashTable()
        self._attributes = AttributeTable()

    def columns(self, values: Sequence[bytes | None], record_times_ms: Sequence[int]) -> tuple[EventColumns, list[BadRecord]]:
        """Decode one poll. Every record is in exactly one of the two results, both in log order."""
        bad: dict[int, BadRecord] = {}
        try:
            events, index = self._all(values), list(range(len(values)))
        except Exception:  # at least one is bad: find out which, one by one
            events, index = self._one_by_one(values, bad)
        columns = self._columns(events, np.array(index, np.int64), bad)
        self._judge(columns, np.asarray(record_times_ms, np.int64), bad)
        return (_drop(columns, bad) if bad else columns), [bad[i] for i in sorted(bad)]

    def one(self, value: bytes) -> Any:
        """One event as a struct with FIELDS as attributes, for the trainer's log. Raises msgspec.DecodeError / ValidationError."""
        return self._decode(value)

    def _all(self, values: Sequence[bytes | None]) -> list[Any]:
        """The quick way: every value decoded in C. Raises if a single one is bad."""
        if values and max(map(len, values)) > self.limits.max_event_bytes:  # type: ignore[arg-type]
            raise ValueError("a record is too large to be worth parsing")
        return list(map(self._decode, values))  # type: ignore[arg-type]

    def _one_by_one(self, values: Sequence[bytes | None], bad: dict[int, BadRecord]) -> tuple[list[Any], list[int]]:
        limit = self.limits.max_event_bytes
        events: list[Any] = []
        index: list[int] = []
        for i, value in enumerate(values):
            if not value:
                bad[i] = BadRecord(i, "empty", "the record has no value")
            elif len(value) > limit:
                bad[i] = BadRecord(i, "too_large", f"the record has {len(value):,} bytes, more than max_event_bytes = {limit:,}")
            else:
                try:
                    events.append(self._decode(value))
                    index.append(i)
                except msgspec.ValidationError as error:
                    bad[i] = BadRecord(i, "missing_field" if "missing required" in str(error) else "wrong_type", str(error))
                except RecursionError:
                    bad[i] = BadRecord(i, "malformed", "the JSON is nested too deeply")
                except Exception as error:  # whatever a hostile byte string provokes is a bad record
                    bad[i] = BadRecord(i, "malformed", f"not JSON: {error}")
        return events, index

    def _columns(self, events: list[Any], index: NDArray[np.int64], bad: dict[int, BadRecord]) -> EventColumns:
        hashes = self._hashes.__getitem__
        count = len(events)
        times = list(map(_TIME, events))
        time_ms = np.array(times)  # without a dtype: asked for int64, numpy would take "20261121" for a number
        if time_ms.dtype != np.int64 or not ((time_ms > -MAX_TIME_MS) & (time_ms < MAX_TIME_MS)).all():
            time_ms = np.array([_epoch_ms(t, int(i), bad) for t, i in zip(times, index, strict=True)], np.int64)
        return EventColumns(
            index=index,
            user=list(map(_USER, events)),
            event_id=list(map(_EVENT, events)),
            time_ms=time_ms,
            type_hash=np.fromiter(map(hashes, map(_TYPE, events)), np.uint32, count),
            item_hash=np.fromiter(map(hashes, map(_ITEM, events)), np.uint32, count),
            category_hash=np.fromiter(map(hashes, map(_CATEGORY, events)), np.uint32, count),
            value=np.clip(np.array(list(map(_VALUE, events)), np.float64), -MAX_VALUE, MAX_VALUE).astype(np.float32),
            session_hash=self._session_hashes(events),
            attributes=self._attribute_rows(events, index, bad),
        )

    def _session_hashes(self, events: list[Any]) -> NDArray[np.uint32]:
        sessions = list(map(_SESSION, events))
        if sessions and sessions[0] is None and sessions.count(None) == len(sessions):  # comparing a str with None is slow
            return np.zeros(len(sessions), np.uint32)
        return np.fromiter(map(self._hashes.__getitem__, sessions), np.uint32, len(sessions))

    def _attribute_rows(self, events: list[Any], index: NDArray[np.int64], bad: dict[int, BadRecord]) -> NDArray[np.uint32] | None:
        raws = list(map(_ATTRIBUTES, events))
        if raws.count(_ABSENT) == len(raws):
            return None
        rows: list[bytes] = []
        for raw, i in zip(map(bytes, raws), index.tolist(), strict=True):
            try:
                rows.append(self._attributes[raw] if raw else NONE)
            except ValueError as error:
                rows.append(NONE)
                bad.setdefault(i, BadRecord(i, "wrong_type", str(error)))
        return as_rows(rows)

    def _judge(self, columns: EventColumns, record_times_ms: NDArray[np.int64], bad: dict[int, BadRecord]) -> None:
        """What JSON cannot say: lengths and plausible times. A record is bad once: the first reason stands."""
        limits = self.limits

        def reject(k: np.int64, reason: str, detail: str) -> None:
            i = int(columns.index[k])
            bad.setdefault(i, BadRecord(i, reason, detail))

        lengths = np.fromiter(map(len, columns.user), np.int64, len(columns))
        for k in np.flatnonzero((lengths == 0) | (lengths * 4 > limits.max_user_id_bytes)):
            size = len(columns.user[k].encode())
            if size == 0:
                reject(k, "empty_user_id", "user_id is empty")
            elif size > limits.max_user_id_bytes:
                reject(k, "user_id_too_long", f"user_id has {size:,} bytes, more than max_user_id_bytes = {limits.max_user_id_bytes:,}")
        ahead_ms = columns.time_ms - record_times_ms[columns.index]
        for k in np.flatnonzero(ahead_ms > limits.max_future_ms):
            reject(k, "timestamp_in_future", f"timestamp {columns.time_ms[k]} lies {ahead_ms[k] / 1000:,.0f} s after the record's own")
        for k in np.flatnonzero(ahead_ms < -limits.max_age_ms):
            days = -ahead_ms[k] / DAY_MS
            reject(
                k,
                "timestamp_too_old",
                f"timestamp {columns.time_ms[k]} is {days:,.0f} days older than the record (milliseconds are expected)",
            )


def rfc3339_ms(text: str) -> int:
    """Epoch milliseconds of an RFC 3339 text; one without a zone is UTC. Raises ValueError, OverflowError."""
    moment = datetime.fromisoformat(text)
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def _epoch_ms(timestamp: int | str, index: int, bad: dict[int, BadRecord]) -> int:
    """Epoch milliseconds of a number or an RFC 3339 text; a text without a zone is UTC."""
    if isinstance(timestamp, int):
        if abs(timestamp) < MAX_TIME_MS:
            return timestamp
    else:
        try:
            return rfc3339_ms(timestamp)
        except (ValueError, OverflowError):
            pass
    bad[index] = BadRecord(index, "wrong_type", f"timestamp {str(timestamp)[:40]!r} is neither epoch milliseconds nor RFC 3339")
    return 0


def _drop(columns: EventColumns, indices: Container[int]) -> EventColumns:
    keep = np.array([int(i) not in indices for i in columns.index], bool)
    if keep.all():
        return columns
    where = np.flatnonzero(keep)
    return EventColumns(
        index=columns.index[keep],
        user=[columns.user[k] for k in where],
        event_id=[columns.event_id[k] for k in where],
        time_ms=columns.time_ms[keep],
        type_hash=columns.type_hash[keep],
        item_hash=columns.item_hash[keep],
        category_hash=columns.category_hash[keep],
        value=columns.value[keep],
        session_hash=columns.session_hash[keep],
        attributes=None if columns.attributes is None else columns.attributes[keep],
    )
