"""What the offline commands read and write: events from a file or the trainer's log, times, durations, and files that appear whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from model.events import rfc3339_ms
from trainer.history import COLUMNS, read_file
from trainer.reading import read

_UNITS_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION = re.compile(r"([1-9][0-9]*)\s*(ms|s|m|h|d)?", re.ASCII)


def read_events(source: Path, fields: Mapping[str, str]) -> pa.Table:
    """The events of a CSV, JSONL or Parquet file, or of a log directory, as `history.from_table` takes them. Raises ValueError, OSError."""
    if not source.is_dir():
        return read_file(source, fields)
    table = read(source, columns=[*COLUMNS, "topic"])
    if not len(table):
        raise ValueError(f"{source} holds no events: a directory must be the log of a trainer (log_directory)")
    return table


def before(table: pa.Table, until_ms: int) -> pa.Table:
    """The events before a moment. Whatever is made of them cannot have seen later ones."""
    return table.filter(pa.array(table["timestamp"].to_numpy() < until_ms))


def time_ms(text: str) -> int:
    """Epoch milliseconds of a number, or of RFC 3339; without a zone it is UTC. Raises ValueError."""
    if re.fullmatch(r"-?[0-9]{1,17}", text.strip()):
        return int(text)
    try:
        return rfc3339_ms(text.strip())
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is neither epoch milliseconds nor RFC 3339, as in 2017-09-28T09:00:00Z") from None


def duration_ms(text: str) -> int:
    """Milliseconds of 7d, 12h, 30m, 10s, or of a plain number of milliseconds. Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is no duration: write 7d, 12h, 30m, 10s, or a number of milliseconds")
    return int(match[1]) * _UNITS_MS[match[2] or "ms"]


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then rename it: `path` is there whole, or not at all. Raises OSError."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # the ending says the format
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, fill: Callable[[Path], None], *, replace: bool) -> None:
    """Let `fill` fill a folder beside `path`, then rename it. What stood at `path` is replaced, or refused as `refuse_existing` does."""
    refuse_existing(path, replace=replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        temporary.mkdir()
        fill(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def refuse_existing(path: Path, *, replace: bool) -> None:
    """Raises ValueError where `path` may not be replaced: without --force, or if it is no model's folder at all."""
    if path.exists() and not replace:
        raise ValueError(f"{path} exists: give another --out, or --force to replace it")
    if path.exists() and not (path / "manifest.json").is_file():
        raise ValueError(f"{path} holds no model, so it is not replaced: give another --out")


def known_times(table: pa.Table) -> tuple[int, int]:
    """(first, last) time of the events, in ms."""
    times = table["timestamp"].to_numpy()
    return int(np.min(times)), int(np.max(times))
