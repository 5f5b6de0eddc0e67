"""Reading the event log, beside a trainer that writes it: whole, from a day on, or the events of a share of the users."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.events import stable_hash
from trainer.catalogue import SCHEMA, LogError, LogFile, Manifest, damaged, flushes

PLACE = pa.schema([("sequence", pa.int64()), ("user_hash", pa.uint32())])
"""What a day's file has beside SCHEMA: the row's place in the log, and the hash of the user that the file is sorted by."""


def files_in(directory: Path) -> list[LogFile]:
    """Every file that counts: the days', and the flushes that were not dealt out yet. Raises LogError where one is damaged."""
    while True:
        manifest = Manifest.load(directory)
        try:
            files = [*manifest.files, *flushes(directory, manifest.next_flush)]
        except FileNotFoundError:
            continue  # dealt out between listing and opening: look again
        if Manifest.load(directory) == manifest:  # else flushes may have gone from the list into days that this manifest does not know
            return files


def read(directory: Path, since_ms: int | None = None, columns: Sequence[str] | None = None, shard: tuple[int, int] = (0, 1)) -> pa.Table:
    """Events from `since_ms` on, in the order in which they were read from Kafka. Another process may be writing meanwhile.

    shard: (i, n) for the users of the i-th of n parts of about the same size; each user is in one part, whole.
    """
    names = list(columns or SCHEMA.names)
    while True:
        files = files_in(directory)
        wanted = [f for f in files if f.rows and (since_ms is None or (f.newest_ms or 0) >= since_ms)]
        try:
            parts = [events_of(f, names, since_ms, shard) for f in wanted]
            break
        except FileNotFoundError as error:
            if files_in(directory) == files:
                raise LogError(f"{error.filename or error} is missing: start the trainer (`run`), which goes on without it") from error
    empty = pa.schema([*(SCHEMA.field(n) for n in names), PLACE.field("sequence")]).empty_table()
    table = pa.concat_tables([empty, *parts])
    sequence = table["sequence"].to_numpy()
    table = table.select(names)
    return table if np.all(sequence[1:] > sequence[:-1]) else in_order(table, np.argsort(sequence))


def events_of(file: LogFile, names: Sequence[str], since_ms: int | None, shard: tuple[int, int]) -> pa.Table:
    """Rows of one file as SCHEMA has them, `names` of them, and their `sequence`."""
    number, of = shard
    low, high = (number << 32) // of, ((number + 1) << 32) // of - 1
    conditions = [pc.field("timestamp") >= since_ms] if since_ms is not None else []
    if of > 1:
        conditions.append((pc.field("user_hash") >= pa.scalar(low, pa.uint32())) & (pc.field("user_hash") <= pa.scalar(high, pa.uint32())))
    condition = None
    for each in conditions:
        condition = each if condition is None else condition & each
    wanted = [*names, "sequence"]
    try:
        if file.day is not None:
            return pq.read_table(file.path, columns=wanted, filters=condition, partitioning=None).select(wanted)
        more = [n for n in ("timestamp", *(["user_id"] if of > 1 else [])) if n not in names]
        table = pq.read_table(file.path, columns=[*names, *more], partitioning=None).cast(
            pa.schema([SCHEMA.field(n) for n in (*names, *more)])
        )
        table = table.append_column("sequence", pa.array((file.first << 32) + np.arange(len(table)), pa.int64()))
        if of > 1:
            table = table.append_column("user_hash", pa.array(user_hashes(table)))
        return (table if condition is None else table.filter(condition)).select(wanted)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise damaged(file.path, error) from error


def user_hashes(table: pa.Table) -> NDArray[np.uint32]:
    """(N,) stable hash of each row's user."""
    encoded = table["user_id"].combine_chunks().dictionary_encode()
    hashes = np.array([stable_hash(u) for u in encoded.dictionary.to_pylist()], np.uint32)
    out: NDArray[np.uint32] = hashes[encoded.indices.to_numpy()]
    return out


def in_order(table: pa.Table, order: NDArray[np.int64], piece: int = 1 << 20) -> pa.Table:
    """Rows in another order; in pieces, because a column of texts in one piece is limited to 2 GB."""
    return pa.concat_tables([table.take(order[i : i + piece]) for i in range(0, len(order), piece)] or [table])
