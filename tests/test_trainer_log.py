"""The event log: whatever happens between two system calls, rows and offsets are in it together, once."""

import os
from pathlib import Path
from typing import Any

import pytest

from trainer import log as log_module
from trainer.log import FAN_IN, SCHEMA, EventLog, LogError, files_in, read

A, B = ("events", 0), ("events", 1)


def rows(partition: tuple[str, int], begin: int, end: int) -> list[tuple[Any, ...]]:
    return [(*partition, o, f"u{o % 7}", "view", 1000 * o, None, None, 1.5, None, f"e{o}", '{"a":1}') for o in range(begin, end)]


def take(log: EventLog, partition: tuple[str, int], begin: int, end: int) -> None:
    log.append(rows(partition, begin, end), partition, end)
    log.flush()


def offsets(directory: Path, partition: tuple[str, int] = A) -> list[int]:
    table = read(directory)
    mine = [p == partition[1] for p in table["partition"].to_pylist()]
    return [o for o, m in zip(table["offset"].to_pylist(), mine, strict=True) if m]


def test_what_was_flushed_is_there_again_in_order(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    take(log, A, 0, 5)
    take(log, B, 10, 12)
    log.append(rows(A, 5, 9), A, 9)
    log.append([], B, 20)  # only bad records: the offset moves on
    log.flush()
    log.append(rows(A, 9, 12), A, 12)  # never flushed
    log.close()
    again = EventLog(tmp_path)
    assert again.next_offsets == {A: 9, B: 20}
    assert again.rows == 11
    assert offsets(tmp_path) == list(range(9))
    table = read(tmp_path)
    assert table.schema.names == SCHEMA.names
    assert table.to_pylist()[0] == dict(zip(SCHEMA.names, rows(A, 0, 1)[0], strict=True))
    assert [r["offset"] for r in read(tmp_path, since_ms=10_000, columns=["offset", "timestamp"]).to_pylist()] == [10, 11]


def test_nothing_to_flush_writes_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    assert log.flush() == 0
    assert not list(tmp_path.glob("*.parquet"))


@pytest.mark.parametrize("step", ["write_table", "fsync", "replace"])
def test_crash_in_the_middle_of_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    log = EventLog(tmp_path)
    take(log, A, 0, 5)
    log.append(rows(A, 5, 9), A, 9)

    class Crash(BaseException):
        pass

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(*((log_module.pq, step) if step == "write_table" else (os, step)), crash)
        with pytest.raises(Crash):
            log.flush()
    log.close()
    assert list(tmp_path.glob("*.tmp"))  # as a kill would leave it
    again = EventLog(tmp_path)
    assert again.next_offsets == {A: 5}
    assert not list(tmp_path.glob("*.tmp"))
    take(again, A, 5, 9)
    assert offsets(tmp_path) == list(range(9))


def test_a_full_disk_forgets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path)
    log.append(rows(A, 0, 5), A, 5)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(LogError, match="No space left"):
            log.flush()
    assert log.flush() == 5
    assert offsets(tmp_path) == list(range(5))


def test_files_are_merged_and_a_crash_in_it_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path)
    for i in range(FAN_IN):
        take(log, A if i % 2 else B, i * 10, i * 10 + 10)
    expected = offsets(tmp_path, A), offsets(tmp_path, B)

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crash)
        with pytest.raises(KeyboardInterrupt):
            log.merge()
    log.close()
    assert len(list(tmp_path.glob("*.parquet"))) == FAN_IN + 1
    assert (offsets(tmp_path, A), offsets(tmp_path, B)) == expected  # a reader does not see the parts
    again = EventLog(tmp_path)
    assert len(list(tmp_path.glob("*.parquet"))) == len(again.files) == 1
    assert again.next_offsets == {A: 160, B: 150}
    assert (offsets(tmp_path, A), offsets(tmp_path, B)) == expected
    take(again, A, 160, 165)
    assert offsets(tmp_path, A) == [*expected[0], *range(160, 165)]


def test_many_flushes_make_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "FAN_IN", 4)
    log = EventLog(tmp_path)
    for i in range(4 * 4 + 3):
        take(log, A, i, i + 1)
        while log.merge():
            pass
    assert [f.last - f.first + 1 for f in log.files] == [16, 1, 1, 1]
    assert offsets(tmp_path) == list(range(19))


def test_old_files_go_but_their_offsets_stay(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    take(log, B, 0, 3)  # and then silent
    for begin in (10, 20, 30):
        take(log, A, begin, begin + 10)
    assert log.retain(since_ms=25_000) == 2
    assert offsets(tmp_path) == list(range(20, 40))
    log.close()
    assert EventLog(tmp_path).next_offsets == {A: 40, B: 3}


def test_one_writer(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    with pytest.raises(LogError, match="another trainer"):
        EventLog(tmp_path)
    log.close()
    EventLog(tmp_path).close()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    take(log, A, 0, 5)
    log.close()
    (path,) = (f.path for f in files_in(tmp_path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LogError, match=r"0000000000-0000000000\.parquet is damaged .* move it away"):
        EventLog(tmp_path)
