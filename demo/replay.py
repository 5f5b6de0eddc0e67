"""The user's own events, from a CSV, JSONL or Parquet file, as a stream to feed. What is wrong with a file is said in one sentence."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from demo.arguments import epoch_ms
from demo.shop import History
from demo.stream import Stream
from model.events import FIELDS

REQUIRED = ("user_id", "type", "timestamp")
TEXTS = ("user_id", "type", "event_id", "item_id", "category", "session_id")
HISTORY_SHARE = 0.6
"""Of the time that the file spans: what comes before is written first, as history; the rest is replayed live."""
SMALLEST_MS = 100_000_000_000  # in 1973: a smaller timestamp is one in seconds
MAX_FUTURE_MS = 600_000  # the worker's own default


class InputError(ValueError):
    """A file that cannot be replayed, and why."""


@dataclass(frozen=True)
class File:
    """Events of a file, up to `until_ms`."""

    path: Path
    until_ms: int | None = None

    def load(self) -> Stream:
        table = read(self.path)
        if self.until_ms is not None:
            table = table.filter(pc.less(table["timestamp"], self.until_ms))
            if not len(table):
                raise InputError(f"{self.path} has no event before --until {_date(self.until_ms)}")
        users, types = (table[name].combine_chunks().dictionary_encode() for name in ("user_id", "type"))
        time_ms = table["timestamp"].to_numpy()
        none = np.full(len(table), -1)
        history = History(
            user=users.indices.to_numpy().astype(np.int32),
            time_ms=time_ms,
            type=types.indices.to_numpy().astype(np.int16),
            item=none.astype(np.int32),
            category=none.astype(np.int16),
            value=np.full(len(table), np.nan),
            users=users.dictionary.to_pylist(),
            types=tuple(types.dictionary.to_pylist()),
        )
        start_ms, end_ms = int(time_ms[0]), int(time_ms[-1]) + 1
        live_ms = start_ms + round(HISTORY_SHARE * (end_ms - start_ms))
        return Stream(history, live_ms, end_ms, lambda begin, end: encode(table, begin, end), law=None)

    def arguments(self) -> list[str]:
        """Command-line arguments of `python -m demo.feed` that make it load the same."""
        return ["--input", str(self.path.absolute()), *(["--until", str(self.until_ms)] if self.until_ms is not None else [])]


def encode(table: pa.Table, begin: int, end: int) -> list[bytes]:
    rows = table.slice(begin, end - begin).to_pylist()
    encoder = msgspec.json.Encoder()
    return [encoder.encode({name: value for name, value in row.items() if value is not None}) for row in rows]


def read(path: Path) -> pa.Table:
    """The events of a file, sorted by time: the fields that we know, ids as text, `timestamp` in epoch ms. Raises InputError."""
    table = _parse(path)
    if missing := [name for name in REQUIRED if name not in table.column_names]:
        raise InputError(
            f"{path} has no column {' and no column '.join(missing)}; it has {', '.join(table.column_names) or 'none'}. "
            f"Needed are {', '.join(REQUIRED)}; known beside them are {', '.join(FIELDS[len(REQUIRED) :])}"
        )
    if not len(table):
        raise InputError(f"{path} has no events")
    table = table.select([name for name in FIELDS if name in table.column_names])
    for name in REQUIRED:
        if table[name].null_count:
            raise InputError(f"{path}: event {_first(pc.is_null(table[name]))} has no {name}")
    for name in TEXTS:
        if name in table.column_names:
            table = _with(table, name, _cast(path, table[name], name, pa.string()))
    if "value" in table.column_names:
        table = _with(table, "value", _cast(path, table["value"], "value", pa.float64()))
    table = _with(table, "timestamp", _epoch_ms(path, table["timestamp"]))
    newest, oldest = (reduce(table["timestamp"]).as_py() for reduce in (pc.max, pc.min))
    if oldest < SMALLEST_MS:
        raise InputError(f"{path} has the timestamp {oldest}, which is {_date(oldest)} if in milliseconds; were seconds meant?")
    if newest > time.time() * 1000 + MAX_FUTURE_MS:
        raise InputError(f"{path} has an event in the future, at {_date(newest)}, which the worker would refuse; --until leaves it out")
    if newest == oldest:
        raise InputError(f"all events of {path} have one timestamp, {_date(newest)}: there is nothing to replay in time")
    order = np.argsort(table["timestamp"].to_numpy(), kind="stable")
    return table.take(pa.array(order)).combine_chunks()


def _parse(path: Path) -> pa.Table:
    reader = {".csv": _csv, ".jsonl": pyarrow.json.read_json, ".ndjson": pyarrow.json.read_json, ".parquet": pyarrow.parquet.read_table}
    parse = reader.get(path.suffix.lower())
    if parse is None:
        raise InputError(f"{path} does not end in .csv, .jsonl or .parquet, so its format is not known")
    try:
        if path.is_file() and not path.stat().st_size:
            raise InputError(f"{path} is empty")
        return parse(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not what its name says: {error}") from None


def _csv(path: Path) -> pa.Table:
    as_they_are = {name: pa.string() for name in (*TEXTS, "attributes")}  # a user "007" is not 7
    options = pyarrow.csv.ConvertOptions(column_types=as_they_are, strings_can_be_null=True)
    return pyarrow.csv.read_csv(path, convert_options=options)


def _epoch_ms(path: Path, column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return pc.cast(pc.cast(column, pa.timestamp("ms", "UTC"), safe=False), pa.int64())
    if not pa.types.is_string(column.type):
        return _cast(path, column, "timestamp", pa.int64())
    found = []
    for number, text in enumerate(column.to_pylist(), 1):
        try:
            found.append(epoch_ms(text))
        except ValueError:
            raise InputError(f"{path}: event {number} has the timestamp {text!r}, neither epoch milliseconds nor RFC 3339") from None
    return pa.array(found, pa.int64())


def _cast(path: Path, column: pa.ChunkedArray, name: str, kind: Any) -> Any:
    try:
        return pc.cast(column, kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{path}: column {name} cannot be read as {kind}: {error}") from None


def _with(table: pa.Table, name: str, column: Iterable[Any]) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def _first(mask: pa.ChunkedArray) -> int:
    return int(np.flatnonzero(mask.to_numpy())[0]) + 1


def _date(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M}"
