"""The event log: everything read from Kafka, as Parquet, with the offsets it was read up to. The truth about what was collected.

    DIRECTORY/FIRST-LAST.parquet                  events as they came, of the flushes FIRST to LAST (numbers; one flush a file)
    DIRECTORY/day=YYYY-MM-DD/FIRST-LAST.parquet   events of that day (UTC) out of those flushes, sorted by a hash of the user
    DIRECTORY/manifest.json                       which days' files count, and which flushes they hold
    DIRECTORY/.lock                               held by the one trainer that writes

What survives a crash, at whatever point:
1. A file is written under a temporary name; fsync; rename; fsync of its folder. So it is there whole, or not at all.
2. A flush is one such file: events, and in its footer the next offset of every partition. No event is lost from the log, none is in it
   twice. On start the next offsets are the manifest's, and then those of the newest flush that names the partition.
3. Now and then flushes are dealt out to days: (a) a new file in each of their days, (b) the manifest, which names these files, the first
   flush that they do not hold, and the offsets up to there, (c) the flushes' own files are deleted. It has happened when (b) has: before it
   the days' new files do not count, after it the flushes do not. What does not count is ignored, and deleted on start.
4. A day's files are joined in the same three steps, and a day that is too old is dropped in the last two.

An event that comes late goes into a new file of its day. Every row of a day's file keeps its place in the log (`sequence`), so the
order in which events were read can always be had again. A log from before there were days is one of flushes, and is dealt out in time.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate, groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.catalogue import (
    DAY_MS,
    MANIFEST,
    NAME,
    SCHEMA,
    LogError,
    LogFile,
    Manifest,
    Partition,
    day_folder,
    extent,
    flushes,
    sync_folder,
    told,
    write_flush,
    write_table,
)
from trainer.reading import events_of, files_in, in_order, read, user_hashes

__all__ = ["SCHEMA", "EventLog", "LogError", "LogFile", "Partition", "files_in", "read"]

FAN_IN = 16
"""Flushes that are dealt out to days together."""
MANY_ROWS = 1_000_000
"""Rows in fewer flushes that are dealt out all the same."""
MAX_MERGED_ROWS = 4_000_000
"""Rows that are held in memory at most to be written anew."""
RATIO = 4
"""A day's file is joined with newer ones as soon as they have a quarter of its rows: a day is a handful of files, a row is written about
ten times."""

logger = logging.getLogger(__name__)


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
        self._manifest = self._found()
        self._flushes = tuple(flushes(directory, self._manifest.next_flush))
        self._sweep()
        self.next_offsets: dict[Partition, int] = dict(self._manifest.next_offsets)
        for file in self._flushes:
            self.next_offsets.update(file.next_offsets)
        self._rows: list[tuple[Any, ...]] = []
        self._news: dict[Partition, int] = {}

    @property
    def files(self) -> tuple[LogFile, ...]:
        return (*self._manifest.files, *self._flushes)

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
        number = self._flushes[-1].last + 1 if self._flushes else self._manifest.next_flush
        with told(self.directory):
            self._flushes += (write_flush(self.directory, number, table, self._news),)
        self._rows, self._news = [], {}
        return count

    def retain(self, since_ms: int) -> int:
        """Drop the days that lie before the day of `since_ms`. Returns how many files. Raises LogError, and has dropped none."""
        old = tuple(f for f in self._manifest.files if f.day is not None and f.day < since_ms // DAY_MS)
        if old:
            self._go_over_to(tuple(f for f in self._manifest.files if f not in old), gone=old)
        return len(old)

    def compact(self) -> int:
        """Deal flushes out to days where there are enough, and join days' files. Returns the rows written anew.

        Raises LogError where the disk does not take it: nothing is lost, and the next call tries again.
        """
        written = 0
        while len(self._flushes) >= FAN_IN or sum(f.rows for f in self._flushes) >= MANY_ROWS:
            written += self._deal_out()
        for _, files in groupby(sorted(self._manifest.files, key=lambda f: (f.day, f.first)), key=lambda f: f.day):
            written += self._join(list(files))
        return written

    def close(self) -> None:
        """Let the log go; what was not flushed is read from Kafka again."""
        self._lock.close()

    def _deal_out(self) -> int:
        """The oldest flushes into their days: as many as fit into memory, one at least."""
        fit = sum(total <= MAX_MERGED_ROWS for total in accumulate(f.rows for f in self._flushes))
        batch = self._flushes[: max(fit, 1)]
        with told(self.directory):
            table = pa.concat_tables([events_of(f, SCHEMA.names, None, (0, 1)) for f in batch])
        table = table.append_column("user_hash", pa.array(user_hashes(table)))
        day = table["timestamp"].to_numpy() // DAY_MS
        order = np.lexsort((table["sequence"].to_numpy(), table["user_hash"].to_numpy(), day))
        days, begins = np.unique(day[order], return_index=True)
        made: list[LogFile] = []
        try:
            for number, rows in zip(days.tolist(), np.split(order, begins[1:]), strict=False):  # no days: one empty piece
                made.append(self._write_day(number, batch[0].first, batch[-1].last, table, rows))
        except LogError:
            _delete(made)
            raise
        offsets = dict(self._manifest.next_offsets)
        for file in batch:
            offsets.update(file.next_offsets)
        self._go_over_to((*self._manifest.files, *made), made, batch, batch[-1].last + 1, offsets)
        return len(table)

    def _join(self, files: list[LogFile]) -> int:
        """One file of a day's newest, as far back as they are not small beside the next older one."""
        rows, count = 0, 0
        for file in reversed(files):
            if (count and file.rows > RATIO * rows) or rows + file.rows > MAX_MERGED_ROWS:
                break
            rows, count = rows + file.rows, count + 1
        if count < 2:
            return 0
        parts = tuple(files[-count:])
        day = parts[0].day
        assert day is not None
        with told(self.directory):
            names = [*SCHEMA.names, "user_hash"]
            table = pa.concat_tables([events_of(f, names, None, (0, 1)) for f in parts])
        order = np.lexsort((table["sequence"].to_numpy(), table["user_hash"].to_numpy()))
        whole = self._write_day(day, parts[0].first, parts[-1].last, table, order)
        self._go_over_to((*(f for f in self._manifest.files if f not in parts), whole), [whole], parts)
        return rows

    def _write_day(self, day: int, first: int, last: int, table: pa.Table, rows: NDArray[np.int64]) -> LogFile:
        folder = self.directory / day_folder(day)
        path = folder / f"{first:010d}-{last:010d}.parquet"
        table = in_order(table, rows)
        with told(self.directory):
            if not folder.exists():
                folder.mkdir()
                sync_folder(self.directory)
            return LogFile(path, first, last, len(table), write_table(path, table), *extent(table), day=day)

    def _go_over_to(
        self,
        files: tuple[LogFile, ...],
        made: Sequence[LogFile] = (),
        gone: Sequence[LogFile] = (),
        next_flush: int | None = None,
        offsets: dict[Partition, int] | None = None,
    ) -> None:
        """The step that counts: a manifest with `files`; then what it made superfluous is deleted."""
        before = self._manifest
        manifest = Manifest(
            before.next_flush if next_flush is None else next_flush, before.next_offsets if offsets is None else offsets, files
        )
        try:
            with told(self.directory):
                manifest.save(self.directory)
        except LogError:
            if Manifest.load(self.directory) == before:
                _delete(made)
                raise
            self._adopt(manifest)  # it is in place, if perhaps not yet for good: so nothing may be deleted
            raise
        self._adopt(manifest)
        _delete(gone)

    def _adopt(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._flushes = tuple(f for f in self._flushes if f.first >= manifest.next_flush)

    def _found(self) -> Manifest:
        """The manifest, without files that somebody moved away. A new log gets one at once, so that where days have none, it was lost."""
        manifest = Manifest.load(self.directory)
        there = tuple(f for f in manifest.files if f.path.exists())
        for file in manifest.files:
            if file in there:
                continue
            logger.error("%s is missing: its %s events are gone from the log", file.path, f"{file.rows:,}")
        if len(there) < len(manifest.files) or not (self.directory / MANIFEST).exists():
            manifest = Manifest(manifest.next_flush, manifest.next_offsets, there)
            with told(self.directory):
                manifest.save(self.directory)
        return manifest

    def _sweep(self) -> None:
        """Delete what a crash left behind: temporary files, and files that do not count."""
        counts = {f.path for f in self.files}
        for folder in (self.directory, *self.directory.glob("day=*")):
            for path in folder.iterdir():
                if path.suffix == ".tmp" or (NAME.fullmatch(path.name) and path not in counts):
                    path.unlink()


def _delete(files: Iterable[LogFile]) -> None:
    """Files that do not count: a trainer that starts would delete them too. A day's folder goes with its last file."""
    for file in files:
        with suppress(OSError):
            file.path.unlink()
        if file.day is not None:
            with suppress(OSError):
                file.path.parent.rmdir()
