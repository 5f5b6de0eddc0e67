"""What the event log is made of: its columns, its files, and the manifest that says which files count. `trainer.log` has the layout."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DAY_MS = 86_400_000
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
MANIFEST = "manifest.json"
NAME = re.compile(r"(\d{10})-(\d{10})\.parquet")
_FOOTER = b"streamscore"

Partition = tuple[str, int]


class LogError(OSError):
    """The log directory cannot be used. The message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class LogFile:
    """One file of the log, with events of the flushes `first` to `last`.

    A flush's own file knows next_offsets: where each partition that it has news of stood when it was written. A day's file has `day`, days
    since 1970, and no offsets.
    """

    path: Path
    first: int
    last: int
    rows: int
    size: int
    oldest_ms: int | None
    newest_ms: int | None
    next_offsets: Mapping[Partition, int] = field(default_factory=dict)
    day: int | None = None

    @classmethod
    def open(cls, path: Path) -> LogFile:
        """A flush's file, by its name and footer. Raises LogError where it is damaged."""
        match = NAME.fullmatch(path.name)
        assert match
        try:
            metadata = pq.read_metadata(path)
            footer = json.loads(metadata.metadata[_FOOTER])
            offsets = _offsets(footer["next_offsets"])
            size = path.stat().st_size
            return cls(path, int(match[1]), int(match[2]), metadata.num_rows, size, footer["oldest_ms"], footer["newest_ms"], offsets)
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise damaged(path, error) from error


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json: the days' files, and how far they go: flushes below `next_flush`, with the offsets at which those left off."""

    next_flush: int = 0
    next_offsets: Mapping[Partition, int] = field(default_factory=dict)
    files: tuple[LogFile, ...] = ()

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """The manifest of a log; an empty one where there is none. Raises LogError."""
        path = directory / MANIFEST
        try:
            said = json.loads(path.read_bytes())
            files = [
                LogFile(directory / f["path"], *_numbers(f["path"]), f["rows"], f["size"], f["oldest_ms"], f["newest_ms"], day=f["day"])
                for f in said["files"]
            ]
            return cls(int(said["next_flush"]), _offsets(said["next_offsets"]), tuple(files))
        except FileNotFoundError:
            if next(directory.glob("day=*/*.parquet"), None):
                raise LogError(f"{path} is missing: restore it, or move the day=... folders beside it away to go on without them") from None
            return cls()
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise damaged(path, error) from error

    def save(self, directory: Path) -> None:
        """Put this manifest in the place of the one before it, in one step."""
        files = [
            {
                "path": f.path.relative_to(directory).as_posix(),
                "day": f.day,
                "rows": f.rows,
                "size": f.size,
                "oldest_ms": f.oldest_ms,
                "newest_ms": f.newest_ms,
            }
            for f in self.files
        ]
        said = {"next_flush": self.next_flush, "next_offsets": _listed(self.next_offsets), "files": files}
        write_whole(directory / MANIFEST, lambda file: file.write(json.dumps(said, indent=1).encode()))


def flushes(directory: Path, from_flush: int) -> list[LogFile]:
    """Files of the flushes from `from_flush` on, oldest first; without the parts of a merge that an earlier version may have left lying."""
    names = sorted(path for path in directory.glob("*.parquet") if (match := NAME.fullmatch(path.name)) and int(match[1]) >= from_flush)
    found = sorted(map(LogFile.open, names), key=lambda f: (f.first, -f.last))
    whole: list[LogFile] = []
    for file in found:
        if not whole or file.last > whole[-1].last:
            whole.append(file)
    return whole


def write_flush(directory: Path, number: int, table: pa.Table, offsets: Mapping[Partition, int]) -> LogFile:
    """Events and offsets as one file, there whole or not at all."""
    oldest_ms, newest_ms = extent(table)
    footer = {"oldest_ms": oldest_ms, "newest_ms": newest_ms, "next_offsets": _listed(offsets)}
    path = directory / f"{number:010d}-{number:010d}.parquet"
    size = write_table(path, table.replace_schema_metadata({_FOOTER: json.dumps(footer).encode()}))
    return LogFile(path, number, number, len(table), size, oldest_ms, newest_ms, dict(offsets))


def write_table(path: Path, table: pa.Table) -> int:
    """A Parquet file, there whole or not at all. Returns its size."""
    return write_whole(path, lambda file: pq.write_table(table, file, compression="zstd", row_group_size=ROW_GROUP))


ROW_GROUP = 65_536
"""Rows whose extent is kept beside them: a reader of some users skips the others' (days' files are sorted by a hash of the user)."""


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> int:
    """Write a file under another name, make it durable, rename it into place. Returns its size. What a failure leaves is deleted."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return size


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def told(directory: Path) -> Iterator[None]:
    """Whatever the disk does not take becomes a LogError that says so."""
    try:
        yield
    except LogError:
        raise
    except OSError as error:
        raise LogError(f"cannot write to log_directory {directory}: {error.strerror or error}") from error


def extent(table: pa.Table) -> tuple[int | None, int | None]:
    """The oldest and the newest timestamp, None where there is no row."""
    times = table["timestamp"].to_numpy()
    return (int(times.min()), int(times.max())) if len(times) else (None, None)


def day_of(time_ms: Any) -> Any:
    """Days since 1970 (UTC) of a time or an array of them."""
    return time_ms // DAY_MS


def day_folder(day: int) -> str:
    return f"day={np.datetime64(day, 'D')}"


def damaged(path: Path, error: Exception) -> LogError:
    return LogError(f"{path} is damaged ({error}): move it away to go on without its events")


def _numbers(path: str) -> tuple[int, int]:
    match = NAME.fullmatch(path.rpartition("/")[2])
    if not match:
        raise ValueError(f"{path} is no file of a log")
    return int(match[1]), int(match[2])


def _offsets(listed: Any) -> dict[Partition, int]:
    return {(str(t), int(p)): int(o) for t, p, o in listed}


def _listed(offsets: Mapping[Partition, int]) -> list[list[Any]]:
    return [[t, p, o] for (t, p), o in offsets.items()]
