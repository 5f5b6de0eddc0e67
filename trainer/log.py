"""The event log: everything read from Kafka, as Parquet, with the offsets it was read up to. The truth about what was collected.

    DIRECTORY/FIRST-LAST.parquet   events of the flushes FIRST to LAST (numbers), in the order in which they were read
    DIRECTORY/.lock                held by the one trainer that writes

What survives a crash, at whatever point:
1. A flush writes events and, in the same file's footer, the next offset of every partition, under a temporary name; fsync; rename.
   So a file is there whole, with its offsets, or not at all: no event is lost from the log, none is in it twice.
2. On start the next offsets are those of the newest file that names the partition. Kafka's committed offsets are for people to look at.
3. Every 16 files of a size become one (so a year of flushes is some dozens of files): first the whole is renamed into place, then its
   parts are deleted. A part that lies within another file's numbers is ignored, and deleted on start.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("user_id", pa.string()),
        ("type", pa.string()),
        ("timestamp", pa.int64()),
        ("item_id", pa.string()),
        ("category", pa.string()),
        ("value", pa.float64()),
        ("session_id", pa.string()),
        ("event_id", pa.string()),
        ("attributes", pa.string()),  # JSON
    ]
)
FAN_IN = 16
MAX_MERGED_ROWS = 4_000_000
_FOOTER = b"streamscore"
_NAME = re.compile(r"(\d{10})-(\d{10})\.parquet")

Partition = tuple[str, int]


class LogError(OSError):
    """The log directory cannot be used. The message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class LogFile:
    """One file of the log. next_offsets: where each partition that it has news of stood when it was written."""

    path: Path
    first: int
    last: int
    rows: int
    size: int
    oldest_ms: int | None
    newest_ms: int | None
    next_offsets: Mapping[Partition, int]

    @classmethod
    def open(cls, path: Path) -> LogFile:
        match = _NAME.fullmatch(path.name)
        assert match
        try:
            metadata = pq.read_metadata(path)
            footer = json.loads(metadata.metadata[_FOOTER])
            offsets = {(str(t), int(p)): int(o) for t, p, o in footer["next_offsets"]}
            size = path.stat().st_size
            return cls(path, int(match[1]), int(match[2]), metadata.num_rows, size, footer["oldest_ms"], footer["newest_ms"], offsets)
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise LogError(f"{path} is damaged ({error}): move it away to go on without its events") from error


def files_in(directory: Path) -> list[LogFile]:
    """The log's files, oldest first, without the parts of a merge that are still lying about."""
    while True:
        try:
            found = [LogFile.open(path) for path in directory.glob("*.parquet") if _NAME.fullmatch(path.name)]
            break
        except FileNotFoundError:
            continue  # merged or expired between listing and opening: list again
    found.sort(key=lambda f: (f.first, -f.last))
    whole: list[LogFile] = []
    for file in found:
        if not whole or file.last > whole[-1].last:
            whole.append(file)
    return whole


def read(directory: Path, since_ms: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Events from `since_ms` on, in the order in which they were read from Kafka. Another process may be writing meanwhile."""
    names = list(columns or SCHEMA.names)
    condition = None if since_ms is None else pc.field("timestamp") >= since_ms
    while True:
        parts = [SCHEMA.empty_table().select(names)]
        try:
            for file in files_in(directory):
                if file.rows and (since_ms is None or (file.newest_ms or 0) >= since_ms):
                    parts.append(pq.read_table(file.path, columns=names, filters=condition).cast(parts[0].schema))
            return pa.concat_tables(parts)
        except FileNotFoundError:
            continue


class EventLog:
    """The log, opened for writing. One at a time: raises LogError where another trainer has it open."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = open(directory / ".lock", "w")  # noqa: SIM115
        except OSError as error:
            raise LogError(f"cannot write to log_directory {directory}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise LogError(f"another trainer is writing to {directory}: give this one a log_directory (and a group) of its own") from None
        self.files = files_in(directory)
        known = {f.path for f in self.files}
        for path in [*directory.glob("*.tmp"), *(p for p in directory.glob("*.parquet") if _NAME.fullmatch(p.name) and p not in known)]:
            path.unlink()
        self.next_offsets: dict[Partition, int] = {}
        for file in self.files:
            self.next_offsets.update(file.next_offsets)
        self._rows: list[tuple[Any, ...]] = []
        self._news: dict[Partition, int] = {}

    @property
    def waiting(self) -> int:
        """Rows that are not on disk yet."""
        return len(self._rows)

    @property
    def rows(self) -> int:
        """Rows on disk."""
        return sum(f.rows for f in self.files)

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.files)

    @property
    def newest_ms(self) -> int | None:
        return max((f.newest_ms for f in self.files if f.newest_ms is not None), default=None)

    @property
    def dirty(self) -> bool:
        return bool(self._news)

    def append(self, rows: Iterable[tuple[Any, ...]], partition: Partition, next_offset: int) -> None:
        """Take rows (as SCHEMA) of one partition, and the offset that comes after them and after the bad records among them."""
        self._rows.extend(rows)
        self._news[partition] = self.next_offsets[partition] = next_offset

    def flush(self) -> int:
        """Make what was appended durable. Returns the number of rows. Where it raises LogError, nothing is forgotten: call again."""
        if not self._news:
            return 0
        count = len(self._rows)
        columns = zip(*self._rows, strict=True) if count else ([] for _ in SCHEMA)
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
        number = self.files[-1].last + 1 if self.files else 0
        self.files.append(self._write(table, number, number, self._news))
        self._rows, self._news = [], {}
        return count

    def retain(self, since_ms: int) -> int:
        """Delete files whose newest event is older than `since_ms`, but the newest file. Returns how many."""
        old = [f for f in self.files[:-1] if (f.newest_ms or 0) < since_ms]
        if not old:
            return 0
        # Offsets of a partition that fell silent must outlive the file that named them.
        for file in old:
            self._news = {p: o for p, o in file.next_offsets.items() if self.next_offsets[p] == o} | self._news
        self.flush()
        self.files = [f for f in self.files if f not in old]
        for file in old:
            file.path.unlink(missing_ok=True)
        return len(old)

    def merge(self) -> int:
        """Make one file of the last FAN_IN where they are of a size. Returns the rows rewritten."""
        last = self.files[-FAN_IN:]
        flushes = {f.last - f.first + 1 for f in last}
        rows = sum(f.rows for f in last)
        if len(last) < FAN_IN or len(flushes) > 1 or rows > MAX_MERGED_ROWS:
            return 0
        table = pa.concat_tables(pq.read_table(f.path, schema=SCHEMA) for f in last)
        offsets = {p: o for f in last for p, o in f.next_offsets.items()}
        whole = self._write(table, last[0].first, last[-1].last, offsets)
        self.files[-FAN_IN:] = [whole]
        for file in last:
            file.path.unlink(missing_ok=True)
        return rows

    def close(self) -> None:
        """Let the log go; what was not flushed is read from Kafka again."""
        self._lock.close()

    def _write(self, table: pa.Table, first: int, last: int, offsets: Mapping[Partition, int]) -> LogFile:
        path = self.directory / f"{first:010d}-{last:010d}.parquet"
        extent = pc.min_max(table["timestamp"]).as_py()
        footer = {"oldest_ms": extent["min"], "newest_ms": extent["max"], "next_offsets": [[t, p, o] for (t, p), o in offsets.items()]}
        table = table.replace_schema_metadata({_FOOTER: json.dumps(footer).encode()})
        temporary = path.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                pq.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise LogError(f"cannot write to log_directory {self.directory}: {error.strerror or error}") from error
        folder = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return LogFile.open(path)
