"""The history of a window: events as columns, grouped by user, from the log or from a file of the user's own. No Kafka here.

A user's events are in log order, and time does not run backwards for a user: a late event is taken at the time of the one before it
(see `model.statistics`). Where a user's events come from several topics, they are merged by these times.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from model.attributes import MOST, as_rows, hashes_of
from model.events import MAX_VALUE, rfc3339_ms, stable_hash

COLUMNS = ("user_id", "type", "timestamp", "item_id", "category", "value", "session_id", "attributes")
_REQUIRED = COLUMNS[:3]
_ATTRIBUTE = "attributes."


@dataclass(slots=True)
class History:
    """E events of U users, grouped by user, in log order within a user.

    first: (U + 1,) where each user's events begin, and the end. user: (E,) code of the event's user.
    time_ms: (E,) effective time, never falling within a user. types: how often each event type occurs.
    attributes: (E, 8) hashes as in `model.attributes`; None where no event carries any.
    """

    first: NDArray[np.int64]
    user: NDArray[np.int64]
    time_ms: NDArray[np.int64]
    type_hash: NDArray[np.uint32]
    item_hash: NDArray[np.uint32]
    category_hash: NDArray[np.uint32]
    value: NDArray[np.float32]
    types: dict[str, int]
    user_ids: list[str]
    session_hash: NDArray[np.uint32]
    attributes: NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self.time_ms)

    @property
    def users(self) -> int:
        return len(self.first) - 1

    @property
    def first_ms(self) -> int:
        """Time of the first event."""
        return int(self.time_ms.min(initial=self.last_ms + 1))

    @property
    def last_ms(self) -> int:
        """Time of the last event."""
        return int(self.time_ms.max(initial=0))

    @property
    def has_previous(self) -> NDArray[np.bool_]:
        """(E,) False for a user's first event."""
        flags = np.ones(len(self), bool)
        flags[self.first[:-1]] = False
        return flags

    @property
    def rank(self) -> NDArray[np.int64]:
        """(E,) place of the event within its user, from 0."""
        return np.arange(len(self)) - self.first[self.user]

    def before(self, end_ms: int) -> History:
        """The history as it was known at `end_ms`: users without an event before it are unknown, and gone."""
        return self.where(self.time_ms < end_ms)

    def of_users(self, keep_U: NDArray[np.bool_]) -> History:
        return self.where(keep_U[self.user])

    def where(self, keep: NDArray[np.bool_]) -> History:
        if keep.all():
            return self
        codes, user = np.unique(self.user[keep], return_inverse=True)
        kept, counts = np.unique(self.type_hash[keep], return_counts=True)
        count_of = dict(zip(kept.tolist(), counts.tolist(), strict=True))
        return History(
            _firsts(user, len(codes)),
            user,
            self.time_ms[keep],
            self.type_hash[keep],
            self.item_hash[keep],
            self.category_hash[keep],
            self.value[keep],
            {t: count_of[h] for t in self.types if (h := stable_hash(t)) in count_of},
            [self.user_ids[c] for c in codes],
            self.session_hash[keep],
            None if self.attributes is None else self.attributes[keep],
        )


def sample_users(history: History, max_events: int) -> History:
    """At most about `max_events`: a share of the users, the same ones in every round (by a hash of their id)."""
    if len(history) <= max_events:
        return history
    draw_U = np.array([stable_hash(f"sample/{u}") for u in history.user_ids], np.uint32)
    by_draw = np.argsort(draw_U)
    total = np.cumsum(np.diff(history.first)[by_draw])
    keep_U = np.zeros(history.users, bool)
    keep_U[by_draw[: max(1, int(np.searchsorted(total, max_events, side="right")))]] = True
    return history.of_users(keep_U)


def from_table(table: pa.Table) -> History:
    """The history of a table in log order: COLUMNS (the last two may be missing), and `topic` where there are several.

    Raises ValueError for attributes that are no JSON object.
    """
    user, user_ids = _codes(table["user_id"])
    type_code, types = _codes(table["type"])
    time_ms = table["timestamp"].to_numpy().astype(np.int64)
    topic = _codes(table["topic"])[0] if "topic" in table.column_names else np.zeros(len(table), np.int64)
    order = np.lexsort((topic, user))  # stable: log order within each topic
    time_ms = _effective(time_ms, order, user, topic)
    if topic.any():
        order = np.lexsort((time_ms, user))
    value = np.clip(np.nan_to_num(table["value"].to_numpy().astype(np.float64), posinf=np.nan, neginf=np.nan), -MAX_VALUE, MAX_VALUE)
    value[pc.is_null(table["value"]).to_numpy()] = np.nan
    return History(
        _firsts(user, len(user_ids)),
        user[order],
        time_ms[order],
        _hashes(types)[type_code][order],
        _hash_column(table["item_id"])[order],
        _hash_column(table["category"])[order],
        value.astype(np.float32)[order],
        dict(zip(types, np.bincount(type_code, minlength=len(types)).tolist(), strict=True)),
        user_ids,
        _hash_column(table["session_id"])[order] if "session_id" in table.column_names else np.zeros(len(table), np.uint32),
        _attribute_rows(table["attributes"], order) if "attributes" in table.column_names else None,
    )


def read_table(path: Path, what: str, texts: Sequence[str], texts_from: str | None = None) -> pa.Table:
    """A CSV, JSONL or Parquet file of `what`. texts: columns that a CSV file holds as text, whatever they look like, and so are those whose
    names start with `texts_from`. Raises ValueError, OSError."""
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    try:
        match path.suffix.lower():
            case ".csv":
                columns = list(texts)
                if texts_from:
                    with pyarrow.csv.open_csv(path) as reader:
                        columns += [c for c in reader.schema.names if c.startswith(texts_from)]
                options = pyarrow.csv.ConvertOptions(column_types={c: pa.string() for c in columns}, strings_can_be_null=True)
                return pyarrow.csv.read_csv(path, convert_options=options)
            case ".jsonl" | ".ndjson" | ".json":
                return pyarrow.json.read_json(path)
            case ".parquet" | ".pq":
                return pyarrow.parquet.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    raise ValueError(f"{path}: {what} are read from .csv, .jsonl and .parquet files")


def read_file(path: Path, fields: Mapping[str, str] | None = None) -> pa.Table:
    """A CSV, JSONL or Parquet file as a table that `from_table` takes, in order of time. Raises ValueError, or OSError.

    Attributes may be a column of JSON texts, of structures or maps, or columns of their own: `attributes.country`, `attributes.device`.
    """
    names = {own: name for name, own in (fields or {}).items()}
    own_texts = ("user_id", "type", "item_id", "category", "session_id", "attributes", *names)
    texts = [own for own in own_texts if names.get(own, own) not in ("value", "timestamp")]
    table = read_table(path, "events", texts, texts_from=_ATTRIBUTE)  # an attribute "007" is not 7
    table = table.rename_columns([names.get(c, c) for c in table.column_names])
    if missing := [c for c in _REQUIRED if c not in table.column_names]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has: {', '.join(table.column_names)} (see event_fields)")
    columns: dict[str, Any] = {"timestamp": _epoch_ms(table["timestamp"], path)}
    for name, kind in (
        ("user_id", pa.string()),
        ("type", pa.string()),
        ("item_id", pa.string()),
        ("category", pa.string()),
        ("value", pa.float64()),
        ("session_id", pa.string()),
    ):
        try:
            columns[name] = table[name].cast(kind) if name in table.column_names else pa.nulls(len(table), kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"{path}: column {name}: {error}") from None
    columns["attributes"] = _attribute_texts(table)
    clean = pa.table(columns)
    whole = pc.and_(pc.and_(pc.is_valid(clean["user_id"]), pc.is_valid(clean["type"])), pc.is_valid(clean["timestamp"]))
    clean = clean.filter(whole)
    if not len(clean):
        raise ValueError(f"{path} holds no event with user_id, type and timestamp")
    return clean.take(pa.array(np.argsort(clean["timestamp"].to_numpy(), kind="stable")))


def _epoch_ms(column: pa.ChunkedArray, path: Path) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_timestamp(kind):
        return column.cast(pa.timestamp("ms", tz=kind.tz), safe=False).cast(pa.int64())
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        return column.cast(pa.int64())
    if not pa.types.is_string(kind):
        raise ValueError(f"{path}: timestamp is {kind}; it should be epoch milliseconds or RFC 3339")
    times: list[int | None] = []
    for text in column.to_pylist():
        try:
            times.append(None if text is None else rfc3339_ms(text))
        except (ValueError, OverflowError):
            raise ValueError(f"{path}: timestamp {text!r} is neither epoch milliseconds nor RFC 3339") from None
    return pa.chunked_array([pa.array(times, pa.int64())])


def _attribute_texts(table: pa.Table) -> pa.ChunkedArray:
    """(N,) JSON text of each event's attributes, from whatever form a file has them in."""
    if "attributes" in table.column_names:
        column = table["attributes"]
        if pa.types.is_string(column.type) or pa.types.is_null(column.type):
            return column.cast(pa.string())
        found = column.to_pylist()
    else:
        own = [c for c in table.column_names if c.startswith(_ATTRIBUTE)]
        if not own:
            return pa.chunked_array([pa.nulls(len(table), pa.string())])
        keys = [c.removeprefix(_ATTRIBUTE) for c in own]
        found = [dict(zip(keys, row, strict=True)) for row in zip(*(table[c].to_pylist() for c in own), strict=True)]
    texts = [None if each is None else json.dumps(dict(each) if isinstance(each, list) else each, default=str) for each in found]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _attribute_rows(column: pa.ChunkedArray, order: NDArray[np.int64]) -> NDArray[np.uint32] | None:
    """(N, 8) hashes of JSON texts, each text parsed once; None where there is none."""
    if column.null_count == len(column):
        return None
    code, texts = _codes_or_last(column)
    try:
        return np.append(as_rows([hashes_of(t.encode()) for t in texts]), np.zeros((1, MOST), np.uint32), axis=0)[code[order]]
    except ValueError as error:
        raise ValueError(f"the column attributes: {error}") from None


def _codes(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    """(N,) code of each text, and the texts."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _hashes(texts: list[str]) -> NDArray[np.uint32]:
    return np.array([stable_hash(t) for t in texts], np.uint32)


def _hash_column(column: pa.ChunkedArray) -> NDArray[np.uint32]:
    """(N,) stable hash of each text, 0 where it is missing."""
    code, texts = _codes_or_last(column)
    hashes: NDArray[np.uint32] = np.append(_hashes(texts), np.uint32(0))[code]
    return hashes


def _codes_or_last(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    """(N,) code of each text, one past the last where it is missing, and the texts."""
    encoded = column.combine_chunks().dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    return encoded.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False), texts


def _effective(
    time_ms: NDArray[np.int64], order: NDArray[np.int64], user: NDArray[np.int64], topic: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Times that never fall along each user's events of one topic: the running maximum of the group."""
    if not len(time_ms):
        return time_ms
    grouped = time_ms[order]
    begins = np.r_[True, (np.diff(user[order]) != 0) | (np.diff(topic[order]) != 0)]
    span = int(grouped.max() - grouped.min()) + 1
    lift = (np.cumsum(begins) - 1) * span  # every group lies above the one before it, so one running maximum serves them all
    out = np.empty_like(time_ms)
    out[order] = np.maximum.accumulate(grouped - grouped.min() + lift) - lift + grouped.min()
    return out


def _firsts(user: NDArray[np.int64], users: int) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users))])
