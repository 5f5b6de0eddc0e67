"""The event log: whatever happens between two system calls, rows and offsets are in it together, once, and in order."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer import catalogue
from trainer import log as log_module
from trainer.log import SCHEMA, EventLog, LogError, files_in, read

ROOT = Path(__file__).parent.parent
A, B = ("events", 0), ("events", 1)
DAY_MS = 86_400_000


def rows(partition: tuple[str, int], begin: int, end: int, step_ms: int = 1000) -> list[tuple[Any, ...]]:
    """Every fifth event is two days late."""
    return [
        (
            *partition,
            o,
            f"u{o % 7}",
            "view",
            10 * DAY_MS + step_ms * o - (o % 5 == 4) * 2 * DAY_MS,
            None,
            None,
            1.5,
            None,
            f"e{o}",
            '{"a":1}',
        )
        for o in range(begin, end)
    ]


def take(log: EventLog, partition: tuple[str, int], begin: int, end: int, step_ms: int = 1000) -> None:
    log.append(rows(partition, begin, end, step_ms), partition, end)
    log.flush()


def offsets(directory: Path, partition: tuple[str, int] = A) -> list[int]:
    table = read(directory)
    mine = [p == partition[1] for p in table["partition"].to_pylist()]
    return [o for o, m in zip(table["offset"].to_pylist(), mine, strict=True) if m]


def days(directory: Path) -> dict[str, int]:
    """Files in each day's folder."""
    return {folder.name: len(list(folder.glob("*.parquet"))) for folder in sorted(directory.glob("day=*"))}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deal flushes out three at a time."""
    monkeypatch.setattr(log_module, "FAN_IN", 3)


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
    late = read(tmp_path, since_ms=10 * DAY_MS + 6000, columns=["offset", "timestamp"]).to_pylist()
    assert [r["offset"] for r in late] == [10, 11, 6, 7, 8]


def test_nothing_to_flush_writes_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    assert log.flush() == 0
    assert not list(tmp_path.glob("*.parquet"))


def test_flushes_are_dealt_out_to_days_and_read_back_in_the_order_of_arrival(tmp_path: Path, small: None) -> None:
    log = EventLog(tmp_path)
    expected = []
    for i in range(7):
        take(log, B if i % 2 else A, i * 10, i * 10 + 10)
        expected += rows(B if i % 2 else A, i * 10, i * 10 + 10)
        log.compact()
    assert days(tmp_path) == {"day=1970-01-09": 1, "day=1970-01-11": 1}  # the second deal was joined with the first
    assert [f.path.name for f in log.files] == [*["0000000000-0000000005.parquet"] * 2, "0000000006-0000000006.parquet"]
    assert [tuple(r.values()) for r in read(tmp_path).to_pylist()] == expected
    assert [tuple(r.values()) for r in read(tmp_path, 10 * DAY_MS + 30_000).to_pylist()] == [
        r for r in expected if r[5] >= 10 * DAY_MS + 30_000
    ]
    log.close()
    again = EventLog(tmp_path)
    assert again.next_offsets == {A: 70, B: 60}
    assert again.rows == 70
    assert files_in(tmp_path) == list(again.files)


def test_a_share_of_the_users_is_read_whole_and_the_shares_make_up_the_log(tmp_path: Path, small: None) -> None:
    log = EventLog(tmp_path)
    for i in range(4):
        take(log, A, i * 50, i * 50 + 50)
        log.compact()
    whole, parts = read(tmp_path).to_pylist(), [read(tmp_path, shard=(i, 3)).to_pylist() for i in range(3)]
    assert sorted((r for part in parts for r in part), key=lambda r: r["offset"]) == whole
    users = [{r["user_id"] for r in part} for part in parts]
    assert not users[0] & users[1]
    assert not users[1] & users[2]
    assert [r["offset"] for r in parts[0]] == sorted(r["offset"] for r in parts[0])
    assert read(tmp_path, columns=["offset"], shard=(0, 3)).to_pylist() == [{"offset": r["offset"]} for r in parts[0]]


def test_many_flushes_make_few_files(tmp_path: Path, small: None) -> None:
    log, written = EventLog(tmp_path), 0
    for i in range(150):
        take(log, A, i * 4, i * 4 + 4)
        written += log.compact()
    assert max(days(tmp_path).values()) <= 5
    assert len(list(tmp_path.glob("*.parquet"))) <= 2
    assert written <= 12 * log.rows
    assert offsets(tmp_path) == list(range(600))


def test_days_go_when_they_are_old_and_offsets_stay(tmp_path: Path, small: None) -> None:
    log = EventLog(tmp_path)
    take(log, B, 0, 3)  # and then silent
    for begin in (0, 5):
        take(log, A, begin, begin + 5, step_ms=DAY_MS)
    log.compact()
    assert list(days(tmp_path)) == [f"day=1970-01-{n}" for n in (11, 12, 13, 14, 16, 17, 18, 19)]
    assert log.retain(since_ms=15 * DAY_MS + 5) == 4
    assert list(days(tmp_path)) == [f"day=1970-01-{n}" for n in (16, 17, 18, 19)]
    assert offsets(tmp_path) == [5, 6, 7, 8, 9]
    assert offsets(tmp_path, B) == []
    take(log, A, 10, 15, step_ms=0)  # so late that its day is gone: it is made anew, and goes again
    take(log, A, 15, 16)
    take(log, A, 16, 17)
    log.compact()
    assert "day=1970-01-09" in days(tmp_path)
    log.retain(since_ms=15 * DAY_MS + 5)
    assert "day=1970-01-09" not in days(tmp_path)
    log.close()
    assert EventLog(tmp_path).next_offsets == {A: 17, B: 3}


def test_a_log_from_before_there_were_days_goes_on(tmp_path: Path, small: None) -> None:
    """As it was left by a crash in the middle of a merge: the parts lie within the whole."""
    log = EventLog(tmp_path)
    for i in range(2):
        take(log, A, i * 10, i * 10 + 10)
    log.close()
    parts = [f.path for f in log.files]
    whole = pa.concat_tables(pq.read_table(p) for p in parts)
    footer = catalogue.LogFile.open(parts[1])
    assert footer.next_offsets == {A: 20}
    metadata = {b"streamscore": pq.read_metadata(parts[1]).metadata[b"streamscore"]}
    pq.write_table(whole.replace_schema_metadata(metadata), tmp_path / "0000000000-0000000001.parquet")
    (tmp_path / catalogue.MANIFEST).unlink()
    assert offsets(tmp_path) == list(range(20))
    again = EventLog(tmp_path)
    assert [f.path.name for f in again.files] == ["0000000000-0000000001.parquet"]
    for i in range(2, 4):
        take(again, A, i * 10, i * 10 + 10)
    again.compact()
    assert not list(tmp_path.glob("*.parquet"))
    assert offsets(tmp_path) == list(range(40))


class Images:
    """Calls `look` between any two steps that the log takes on the disk, as if the process were killed there."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self.steps = 0

    @contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            for place, name in (
                *((os, n) for n in ("fsync", "replace")),
                *((Path, n) for n in ("unlink", "mkdir", "rmdir")),
                (pq, "write_table"),
            ):
                patch.setattr(place, name, self._around(getattr(place, name)))
            yield

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            self.steps += 1
            self._look()
            return function(*arguments, **named)

        return step


def test_a_crash_at_any_step_loses_nothing_and_doubles_nothing(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two partitions, late events, flushes, deals, joins, days that go. After every single step on the disk the directory is copied, as a
    kill would leave it; what is read from the copy, before and after a trainer starts on it, must be whole up to its own offsets."""
    directory, image = tmp_path / "log", tmp_path / "image"
    log = EventLog(directory)
    flushed: dict[tuple[str, int], int] = {A: 0, B: 0}
    dropped_before = 0
    seen = set[tuple[int, int]]()
    looking = False

    def look() -> None:
        nonlocal looking
        if looking:
            return
        looking = True
        shutil.copytree(directory, image)
        (image / "0000000000-0000000000.tmp").write_bytes(b"half of it")
        before = read(image).to_pylist()
        restarted = EventLog(image)
        try:
            assert read(image).to_pylist() == before
            assert not list(image.rglob("*.tmp"))
            ends = {p: restarted.next_offsets.get(p, 0) for p in (A, B)}
            for partition, end in ends.items():
                assert end in (flushed[partition], log.next_offsets.get(partition, 0))
                found = [r["offset"] for r in before if r["partition"] == partition[1]]
                kept = [r[2] for r in rows(partition, 0, end, DAY_MS // 10) if r[5] // DAY_MS >= dropped_before]
                assert [o for o in found if o in set(kept)] == kept
                assert len(found) == len(set(found))
            seen.add((ends[A], ends[B]))
            assert {f.path for f in restarted.files} == set(image.rglob("*.parquet"))
            take(restarted, A, ends[A], ends[A] + 3)  # and it goes on
            assert restarted.next_offsets[A] == ends[A] + 3
            assert [o for o in offsets(image) if o >= ends[A]] == list(range(ends[A], ends[A] + 3))
        finally:
            restarted.close()
            shutil.rmtree(image)
            looking = False

    images = Images(look)
    with images.watching(monkeypatch):
        for i in range(9):
            partition = B if i % 3 == 1 else A
            begin = log.next_offsets.get(partition, 0)
            log.append(rows(partition, begin, begin + 6, DAY_MS // 10), partition, begin + 6)
            log.flush()
            flushed[partition] = begin + 6
            if i == 6:
                dropped_before = 9
                assert log.retain(9 * DAY_MS)
            log.compact()
    look()
    assert images.steps > 60
    assert len(seen) == 10


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    program = """
import sys; sys.path[:0] = ['tests']
from pathlib import Path
from test_trainer_log import A, B, DAY_MS, rows
import trainer.log as log_module
log_module.FAN_IN = 3
log = log_module.EventLog(Path(sys.argv[1]))
for i in range(100_000):
    for partition in (A, B):
        begin = log.next_offsets.get(partition, 0)
        log.append(rows(partition, begin, begin + 5, DAY_MS // 1000), partition, begin + 5)
    log.flush()
    print(flush=True)
    log.compact()
"""
    chance = random.Random(3)
    ends = [0]
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout
        for _ in range(chance.randrange(1, 40)):
            process.stdout.readline()
        process.kill()  # in the middle of whatever it does after the n-th flush
        process.wait()
        log = EventLog(tmp_path)
        end = log.next_offsets.get(A, 0)
        assert end == log.next_offsets.get(B, 0) >= ends[-1]
        assert offsets(tmp_path, A) == offsets(tmp_path, B) == list(range(end))
        log.close()
        ends.append(end)
    assert ends[-1] > ends[1] > 0


def test_a_disk_that_is_really_full_loses_nothing_and_says_so(little_disk: Path, small: None) -> None:
    chance = random.Random(1)

    def bulky(begin: int, end: int) -> list[tuple[Any, ...]]:
        return [(*r[:-1], chance.randbytes(300).hex()) for r in rows(A, begin, end)]

    log = EventLog(little_disk / "log")
    failed_in = set[tuple[str, str]]()
    ballast = little_disk / "ballast"
    at = 0
    for round_ in range(40):
        ballast.write_bytes(b"x" * (200_000 - 4000 * round_) if round_ < 20 else b"")
        log.append(bulky(at, at + 20), A, at + 20)
        at += 20
        for step in (log.flush, log.compact):
            try:
                step()
            except LogError as error:
                failed_in.add((step.__name__, str(error).rpartition(": ")[2]))
                break
        assert not list(little_disk.rglob("*.tmp"))
        assert {f.path for f in log.files} == set((little_disk / "log").rglob("*.parquet"))
        assert offsets(little_disk / "log") == list(range(at - log.waiting))
        if log.rows > 100:  # make room, as an operator would
            shutil.rmtree(little_disk / "log")
            log.close()
            log, at = EventLog(little_disk / "log"), 0
    assert failed_in == {("flush", "No space left on device"), ("compact", "No space left on device")}


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_what_the_disk_did_not_take_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, function: str) -> None:
    """Every call fails once, in a flush, a deal and a join: nothing is forgotten."""
    log = EventLog(tmp_path)
    calls, real = 0, getattr(os, function)
    fail_at = -1

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, function, failing)
    for i in range(14):
        log.append(rows(A, i * 10, i * 10 + 10), A, i * 10 + 10)
        for step in (log.flush, log.compact):
            for failing_call in range(1, 40):
                calls, fail_at = 0, failing_call
                try:
                    step()
                except LogError:
                    assert offsets(tmp_path) == list(range(len(offsets(tmp_path))))
                    continue
                break
            calls, fail_at = 0, -1
        assert offsets(tmp_path) == list(range(i * 10 + 10))
    log.close()
    again = EventLog(tmp_path)
    assert again.next_offsets == {A: 140}
    assert {f.path for f in again.files} == set(tmp_path.rglob("*.parquet"))


def test_a_reader_beside_the_writer_always_sees_a_whole_log(tmp_path: Path) -> None:
    program = """
import sys; sys.path[:0] = ['tests']
from pathlib import Path
from test_trainer_log import A, rows
import trainer.log as log_module
log_module.FAN_IN = 2
log = log_module.EventLog(Path(sys.argv[1]))
for i in range(120):
    log.append(rows(A, i * 5, i * 5 + 5), A, i * 5 + 5)
    log.flush()
    log.compact()
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    looks, seen = 0, 0
    while process.poll() is None:
        found = offsets(tmp_path)
        assert found == list(range(len(found)))
        assert len(found) >= seen
        looks, seen = looks + 1, len(found)
    assert process.returncode == 0
    assert looks > 5
    assert offsets(tmp_path) == list(range(600))


def test_one_writer(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    with pytest.raises(LogError, match="another trainer"):
        EventLog(tmp_path)
    log.close()
    EventLog(tmp_path).close()


def test_a_damaged_file_is_named(tmp_path: Path, small: None, caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(tmp_path)
    for i in range(4):
        take(log, A, i * 5, i * 5 + 5)
        log.compact()
    log.close()
    late, day, flush = (f.path for f in files_in(tmp_path))
    flush.write_bytes(flush.read_bytes()[:-20])
    with pytest.raises(LogError, match=r"0000000003-0000000003\.parquet is damaged .* move it away"):
        EventLog(tmp_path)
    flush.unlink()
    day.write_bytes(day.read_bytes()[:-20])
    with pytest.raises(LogError, match=r"day=1970-01-11/0000000000-0000000002\.parquet is damaged .* move it away"):
        read(tmp_path)
    day.unlink()
    with pytest.raises(LogError, match=r"day=1970-01-11/0000000000-0000000002\.parquet is missing"):
        read(tmp_path)
    again = EventLog(tmp_path)
    assert "is missing: its 12 events are gone from the log" in caplog.text
    assert offsets(tmp_path) == [4, 9, 14]
    assert again.next_offsets == {A: 15}
    again.close()
    assert late.exists()
    (tmp_path / catalogue.MANIFEST).unlink()
    with pytest.raises(LogError, match=r"manifest\.json is missing: restore it, or move the day=\.\.\. folders"):
        EventLog(tmp_path)
    assert late.exists()
