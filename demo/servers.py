"""Real Apache Kafka and Redis for the demo, the tests and the benchmarks: running ones, or embedded ones that Python alone can start.

    with kafka(say=print) as broker, redis() as store:
        create_topics(broker.bootstrap, {"events": (4, {})})

An embedded server binds to loopback on a free port, keeps its data in its own temporary folder, and is gone, folder and all, when this
process is, whatever ends it. KAFKA_BOOTSTRAP_SERVERS and REDIS_URL name running servers to use instead; those are never stopped.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from demo.broker import cluster_of, create_topics, record_startup, start_broker
from demo.process import Process, free_port, start_on_free_ports
from demo.programs import find_kafka, find_redis

__all__ = ["KafkaServer", "RedisServer", "create_topics", "kafka", "redis"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Server:
    process: Process | None  # None: it was running before us

    @property
    def embedded(self) -> bool:
        return self.process is not None

    @property
    def _ours(self) -> Process:
        if self.process is None:
            raise RuntimeError(f"{self} was running before this program, which therefore does not stop, kill or restart it.")
        return self.process

    @property
    def pid(self) -> int:
        return self._ours.pid

    @property
    def directory(self) -> Path:
        return self._ours.directory

    @property
    def log(self) -> Path:
        return self._ours.log

    def stop(self) -> None:
        self._ours.stop()

    def kill(self) -> None:
        self._ours.kill()

    def restart(self) -> None:
        """Same port, same data. Stops it first if it is running."""
        self._ours.stop()
        self._ours.start()


@dataclass(frozen=True)
class KafkaServer(Server):
    bootstrap: str


@dataclass(frozen=True)
class RedisServer(Server):
    url: str

    @property
    def dump_path(self) -> Path:
        """Written by SAVE and BGSAVE only, and loaded by restart(); without it a restart finds an empty database."""
        return self.directory / "dump.rdb"


def silent(_: str) -> None:
    pass


@contextmanager
def kafka(directory: Path | None = None, *, say: Say = silent) -> Iterator[KafkaServer]:
    """``directory``, if given, keeps the data after the end. ``say`` is told what takes long."""
    if running := os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        if cluster_of(running) is None:
            raise RuntimeError(f"KAFKA_BOOTSTRAP_SERVERS={running} does not answer: start it, or unset the variable for an embedded Kafka.")
        yield KafkaServer(None, running)
        return
    program = find_kafka(say)
    if not program.startup.exists():
        say("recording how Kafka starts, for quicker starts (10 s, once)")
        with suppress(OSError):  # a full or read-only disk: no more than a slower start
            record_startup(program)
    process, bootstrap = start_broker(program, directory)
    with in_care(process, keep=directory is not None):
        yield KafkaServer(process, bootstrap)


@contextmanager
def redis(directory: Path | None = None, *, say: Say = silent) -> Iterator[RedisServer]:
    """``directory``, if given, keeps its dump.rdb after the end."""
    if running := os.environ.get("REDIS_URL"):
        if redis_pid(running) is None:
            raise RuntimeError(f"REDIS_URL={running} does not answer: start it, or unset the variable for an embedded Redis.")
        yield RedisServer(None, running)
        return
    program = find_redis()

    url = ""

    def launch() -> Process:
        nonlocal url
        port = free_port()
        url = f"redis://127.0.0.1:{port}/0"
        options = {"port": port, "bind": "127.0.0.1", "protected-mode": "no", "save": "", "appendonly": "no", "dir": "."}
        command = [program, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
        # LC_ALL: Redis refuses to start in a locale that the machine does not have
        return Process("Redis", ["env", "LC_ALL=C", *command], lambda pid: redis_pid(url) == pid, directory)

    process = start_on_free_ports(launch)
    with in_care(process, keep=directory is not None):
        yield RedisServer(process, url)


@contextmanager
def in_care(process: Process, *, keep: bool) -> Iterator[None]:
    try:
        yield
    finally:
        if keep:
            process.stop()
        process.close()


def redis_pid(url: str) -> int | None:
    try:
        with Redis.from_url(url, socket_timeout=5, retry=None) as client:
            return int(client.info("server")["process_id"])
    except RedisError:
        return None
