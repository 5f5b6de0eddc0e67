"""One test's world: topics, group and registry of its own on shared or private servers, the workers in it, and the oracle it is held to."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import redis
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from oracle import Expected, Oracle, User
from support import DAY_MS, HOUR_MS, ROOT, WorkerProcess, events, publish_model, read_all, wait_for

from demo.servers import create_topics
from model.artifact import Model
from worker.record import chunk_slots, history, parse, record_type
from worker.store import Applied

SILENCE_HOURS = "1,3,24"
RETENTION_DAYS = 3
TOLERANCE = 1e-4
HIDDEN_STEPS = 8  # of 3e-5: batches of another shape may round a unit another way, and the next steps carry that on

BAD = (
    b"{",
    b"",
    b'{"user_id": "u1"}',
    b'{"user_id": 7, "type": "purchase", "timestamp": 1760000000000}',
    b'{"user_id": "u1", "type": "purchase", "timestamp": "yesterday"}',
    b"\xff\xfe",
    b'{"user_id": "u1", "type": "purchase", "timestamp": 99999999999999}',
    b'{"user_id": "", "type": "purchase", "timestamp": 1760000000000}',
)


def stream(count: int, users: int = 60, seed: int = 0, bad_share: float = 0.02, **more: Any) -> list[tuple[bytes, bytes]]:
    """`support.events` with records in between that are none."""
    rng = random.Random(f"bad{seed}")
    out = []
    for message in events(count, users, seed, **more):
        if rng.random() < bad_share:
            out.append((f"u{rng.randrange(users)}".encode(), rng.choice(BAD)))
        out.append(message)
    return out


class Zygote:
    """See tests/zygote.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, **order: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        with self._process:
            assert self._process.stdin
            self._process.stdin.close()


class Forked:
    """A worker that the zygote forked; the same interface as `support.WorkerProcess`."""

    def __init__(self, zygote: Zygote, environment: Mapping[str, str], log: Path) -> None:
        self._zygote = zygote
        self.log = log
        self.pid: int = zygote.ask(start=dict(environment), log=str(log))

    def status(self) -> int | None:
        found: int | None = self._zygote.ask(poll=self.pid)
        return found

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait(30)

    def end(self) -> None:
        """After a failed test: have it say in its log where it was."""
        self.signal(signal.SIGCONT)
        size = len(self.text())
        self.signal(signal.SIGUSR1)
        with suppress(AssertionError):
            wait_for(lambda: len(self.text()) > size, 1)
        self.kill()

    def wait(self, seconds: float) -> int:
        wait_for(lambda: self.status() is not None, seconds, f"end of the worker; its log:\n{self.text()[-3000:]}")
        code = self.status()
        assert code is not None
        return code

    def stop(self, seconds: float = 20) -> int:
        if self.status() is None:
            self.signal(signal.SIGTERM)
        return self.wait(seconds)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def port(self) -> int:
        """Of /metrics, /healthz, /readyz."""
        wait_for(lambda: "metrics_port=" in self.text(), 60, "the start of a worker")
        return int(self.text().split("metrics_port=")[1].split()[0])


class Real(Forked):
    """`python -m worker run`."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._process = WorkerProcess(environment, log)
        self.log = log
        self.pid = self._process.process.pid

    def status(self) -> int | None:
        return self._process.process.poll()

    def end(self) -> None:
        self.kill()


@dataclass
class Found:
    """What was published and stored. Each score: (user, {target: probability}, model)."""

    events: dict[tuple[str, int, int], list[tuple[str, dict[str, float], str]]] = field(default_factory=lambda: defaultdict(list))
    silences: dict[tuple[str, int], list[tuple[str, dict[str, float], str]]] = field(default_factory=lambda: defaultdict(list))
    bad: dict[tuple[str, int, int], list[tuple[str, bytes | None, bytes | None]]] = field(default_factory=lambda: defaultdict(list))

    def score(self, value: bytes) -> None:
        score = json.loads(value)
        entry = (score["user_id"], score["scores"], score["model"])
        if score["trigger"] == "event":
            source = score["source"]
            self.events[source["topic"], source["partition"], source["offset"]].append(entry)
        else:
            assert score["source"] is None
            self.silences[score["user_id"], score["timestamp"]].append(entry)

    def dead_letter(self, key: bytes | None, value: bytes | None, headers: Mapping[str, bytes]) -> None:
        place = (
            headers["streamscore-topic"].decode(),
            int(headers["streamscore-partition"]),
            int(headers["streamscore-offset"]),
        )
        self.bad[place].append((headers["streamscore-reason"].decode(), key, value))


def compare_scores(expected: Expected, found: Found, targets: Sequence[str], *, once: bool = True) -> None:
    """Every score and dead letter that ought to be there, and no other: exactly once, or (once=False) at least once."""
    for name, want, got in (
        ("events", expected.events, found.events),
        ("silences", expected.silences, found.silences),
        ("dead letters", expected.bad, found.bad),
    ):
        missing, extra = sorted(set(want) - set(got)), sorted(set(got) - set(want))  # type: ignore[type-var]
        doubled = sorted(k for k, entries in got.items() if len(entries) > 1) if once else []  # type: ignore[attr-defined]
        assert not missing, f"{len(missing)} of {len(want)} {name} lost: {missing[:5]}"
        assert not extra, f"{len(extra)} {name} too many: {extra[:5]}"
        assert not doubled, f"{len(doubled)} of {len(want)} {name} doubled: {doubled[:5]}"
    worst = 0.0
    pairs = [(k, v[0], v[1], found.events[k]) for k, v in expected.events.items()]
    pairs += [(k, k[0], v, found.silences[k]) for k, v in expected.silences.items()]  # type: ignore[misc]
    for place, user, probabilities, entries in pairs:
        for found_user, scores, _ in entries:
            assert found_user == user, place
            for target, probability in zip(targets, probabilities, strict=True):
                difference = abs(float(probability) - scores[target])
                assert difference <= TOLERANCE, f"{place} of {user}: {target} {scores[target]}, the oracle says {probability}"
                worst = max(worst, difference)
    for place, reason in expected.bad.items():
        assert {entry[0] for entry in found.bad[place]} == {reason}, place


class Checked:
    """A partition's states in Redis, and what they ought to be."""

    def __init__(self, client: redis.Redis, group: str, partition: int, oracle: Oracle) -> None:
        self.tag = f"{{{group}:{partition}}}"
        self.client: Any = client
        self.oracle = oracle

    def compare(self, users: Mapping[str, User], clock: int, offsets: Mapping[str, int], encoder: int | None = None) -> None:
        client, oracle = self.client, self.oracle
        applied = Applied.decode(client.get(f"{self.tag}:applied"), "applied")
        assert applied.offsets == dict(offsets)
        assert (applied.fired_ms, applied.stream_ms) == (clock, clock)
        prefix = f"{self.tag}:u:"
        stored = sorted(k.decode()[len(prefix) :] for k in client.scan_iter(match=f"{prefix}*", count=10_000))
        assert stored == sorted(users), f"missing {sorted(set(users) - set(stored))[:5]}, too many {sorted(set(stored) - set(users))[:5]}"
        if not stored:
            return
        due = {user.decode(): int(at) for user, at in client.zrange(f"{self.tag}:due", 0, -1, withscores=True)}
        assert due.keys() == users.keys()
        for name, user in users.items():  # a timer may go off too early, but is never passed, and never too late
            assert clock < due[name] <= oracle.next_due(user, clock), name
        slots = chunk_slots(oracle.history_events)
        records, readable = parse(client.mget([prefix + u for u in stored]), record_type(oracle.model.network.state_size))
        rings = client.mget([f"{self.tag}:c:{slot}:{u}" for u in stored for slot in range(slots)])
        assert readable.all()
        assert len(set(records["prefix"]["encoder"].tolist())) == 1, "states of several encoders"
        for i, name in enumerate(stored):
            user, record = users[name], records[i]
            stats, wanted = record["prefix"]["statistics"], user.stats[0]
            for column in wanted.dtype.names or ():
                np.testing.assert_allclose(stats[column], wanted[column], rtol=1e-4, atol=1e-5, err_msg=f"{column} of {name}")
            assert abs(record["hidden"] - np.rint(user.hidden[0] * 32767)).max() <= HIDDEN_STEPS, name
            tail = record["prefix"]["tail"][: record["prefix"]["tail_length"]]
            kept = history(int(stats["count"]), tail, rings[i * slots : (i + 1) * slots], oracle.history_events)
            wanted_events = [e[:5] for e in user.history[-oracle.history_events :]]
            assert [tuple(e)[:5] for e in kept.tolist()] == wanted_events, f"the last events of {name}"


class World:
    """`start` workers, `feed` events, `finish`: everything read back and compared."""

    def __init__(
        self, bootstrap: str, redis_url: str, name: str, folder: Path, zygote: Zygote, partitions: int = 2, **settings: object
    ) -> None:
        self.bootstrap, self.redis_url, self.name, self.folder, self.zygote = bootstrap, redis_url, name, folder, zygote
        self.partitions = partitions
        self.topic, self.scores, self.dead = f"{name}-events", f"{name}-scores", f"{name}-dead"
        create_topics(bootstrap, {self.topic: (partitions, {}), self.scores: (partitions, {}), self.dead: (1, {})})
        self.registry = folder / "registry"
        self.settings = settings
        self.models: list[Model] = []
        self.workers: list[Forked] = []
        self.sent = self.coming = 0  # records fed, and to be fed by `feeding`
        self._producer: Any = None
        self._watch: Any = None
        self.client = redis.Redis.from_url(redis_url, retry=None)

    def model(self, version: str = "v1", **more: Any) -> Model:
        """Publish and promote one. `finish` takes them to have been used in this order."""
        self.models.append(publish_model(self.registry, version, **more))
        return self.models[-1]

    def environment(self, **settings: object) -> dict[str, str]:
        shared = {
            "kafka_bootstrap_servers": self.bootstrap,
            "event_topics": self.topic,
            "registry": self.registry,
            "metrics_host": "127.0.0.1",
        }
        own = {
            "redis_url": self.redis_url,
            "group": self.name,
            "score_topic": self.scores,
            "dead_letter_topic": self.dead,
            "metrics_port": 0,
            "worker_id": "w0",
            "silence_hours": SILENCE_HOURS,
            "retention_days": RETENTION_DAYS,
            "idle_seconds": 1e6,
            "session_timeout_ms": 3000,
            "heartbeat_interval_ms": 300,
            "transaction_timeout_ms": 3000,
            "model_poll_seconds": 0.1,
        } | (self.settings | settings)
        return {f"STREAMSCORE_{k.upper()}": str(v) for k, v in shared.items()} | {
            f"STREAMSCORE_WORKER_{k.upper()}": str(v) for k, v in own.items()
        }

    def start(self, *, real: bool = False, **settings: object) -> Forked:
        log = self.folder / f"worker-{len(self.workers)}.log"
        environment = self.environment(**settings)
        worker = Real(environment, log) if real else Forked(self.zygote, environment, log)
        self.workers.append(worker)
        return worker

    def feed(self, messages: Sequence[tuple[bytes | None, bytes | None]]) -> None:
        if self._producer is None:
            self._producer = KafkaProducer(bootstrap_servers=self.bootstrap, linger_ms=2, retries=100)
        for key, value in messages:
            self._producer.send(self.topic, key=key, value=value)
        self._producer.flush(60)
        self.sent += len(messages)
        self.coming -= len(messages)

    @contextmanager
    def feeding(self, messages: Sequence[tuple[bytes, bytes]], per_second: float) -> Iterator[None]:
        """Feed beside the test, in bursts, until the end of the block, where the rest is fed at once."""
        done, trouble = threading.Event(), []
        self.coming = len(messages)
        rest = list(messages)

        def run() -> None:
            try:
                while rest and not done.wait(0.05):  # a pace, not a wait for anything
                    now, rest[:] = rest[: max(1, round(per_second / 20))], rest[max(1, round(per_second / 20)) :]
                    self.feed(now)
            except BaseException as error:
                trouble.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        assert not trouble, trouble
        self.feed(rest)

    def ends(self) -> dict[int, int]:
        found = self._consumer().end_offsets(self._partitions())
        return {p.partition: offset for p, offset in found.items()}

    def committed(self) -> dict[int, int]:
        consumer = self._consumer()
        return {p.partition: consumer.committed(p, timeout_ms=30_000) or 0 for p in self._partitions()}

    def applied(self, partition: int) -> int | None:
        value: Any = self.client.get(f"{{{self.name}:{partition}}}:applied")
        return json.loads(value)["offsets"][self.topic] if value else None

    def processed(self) -> int:
        return sum(self.committed().values())

    def caught_up(self) -> bool:
        for worker in self.workers:
            status = worker.status()
            assert status is None or status in (0, -9), f"a worker ended with {status}:\n{worker.text()[-3000:]}"
        return self.committed() == self.ends()

    def progress(self, records: int) -> None:
        """Wait until this many more records are processed, or all that will come."""
        target = self.processed() + records
        wait_for(
            lambda: self.processed() >= target or (self.coming <= 0 and self.caught_up()), 90, f"progress to {target}\n{self.log()[-3000:]}"
        )

    def wait_caught_up(self, seconds: float = 90) -> None:
        wait_for(self.caught_up, seconds, "catching up")

    def expect(self, oracle: Oracle, found: Found) -> Expected:
        """What ought to be there. Where in each partition a worker went over to the next model is read from the scores it published."""
        expected = Expected()
        versions = [m.manifest.version for m in self.models]
        scored_by: dict[int, dict[int, int]] = {p: {} for p in range(self.partitions)}  # offset -> index of the model
        for (_, partition, offset), entries in found.events.items():
            scored_by[partition][offset] = versions.index(entries[0][2])
        for partition, records in self.records().items():
            by, at = scored_by[partition], 0
            assert [by[o] for o in sorted(by)] == sorted(by.values()), "went back to an older model"
            for index, model in enumerate(self.models):
                if index:
                    oracle.swap(model, expected, partition)
                upto = next((i for i, record in enumerate(records) if by.get(record[0], 0) > index), len(records))
                oracle.run(self.topic, partition, records[at:upto], expected)
                at = upto
            oracle.use(self.models[0])
        oracle.use(self.models[-1])
        return expected

    def records(self) -> dict[int, list[tuple[int, int, bytes | None]]]:
        out: dict[int, list[tuple[int, int, bytes | None]]] = {p: [] for p in range(self.partitions)}
        for record in read_all(self.bootstrap, self.topic):
            out[record.partition].append((record.offset, record.timestamp, record.value))
        return out

    def found(self) -> Found:
        """What a reader of committed messages finds, once no transaction of a killed worker is open any more."""
        wait_for(lambda: self._stable(self.scores) and self._stable(self.dead), 60, "the end of open transactions")
        found = Found()
        for record in read_all(self.bootstrap, self.scores):
            found.score(record.value)
        for record in read_all(self.bootstrap, self.dead):
            found.dead_letter(record.key, record.value, dict(record.headers))
        return found

    def finish(self, *, once: bool = True) -> tuple[Expected, Found]:
        """Wait until everything is scored, stop the workers, and compare all that they published and stored."""
        self.wait_caught_up()
        wait_for(lambda: all(self.applied(p) == end for p, end in self.ends().items() if end), 60, "all states in Redis")
        for worker in self.workers:
            if worker.status() is None:
                wait_for(lambda worker=worker: "model taken over" in worker.text(), 60, "a worker that listens to signals")  # type: ignore[misc]
                assert worker.stop() == 0, worker.text()[-3000:]
        found = self.found()
        oracle = Oracle(
            self.models[0],
            [round(float(h) * HOUR_MS) for h in str(self.settings.get("silence_hours", SILENCE_HOURS)).split(",")],
            RETENTION_DAYS * DAY_MS,
            history_events=int(self.settings.get("history_events", 50)),  # type: ignore[call-overload]
        )
        expected = self.expect(oracle, found)
        assert len(expected.events) + len(expected.bad) == self.sent
        compare_scores(expected, found, [t.name for t in oracle.model.manifest.targets], once=once)
        self.compare_states(oracle, expected)
        return expected, found

    def compare_states(self, oracle: Oracle, expected: Expected) -> None:
        for partition, end in self.ends().items():
            if end:
                Checked(self.client, self.name, partition, oracle).compare(
                    expected.users[partition], expected.clocks[partition], {self.topic: end}
                )

    def log(self) -> str:
        return "\n".join(f"--- {w.log.name}\n{w.text()}" for w in self.workers)

    def close(self) -> None:
        for worker in self.workers:
            if worker.status() is None:
                worker.end()
        for client in (self._producer, self._watch, self.client):
            if client is not None:
                client.close()

    def _partitions(self) -> list[TopicPartition]:
        return [TopicPartition(self.topic, n) for n in range(self.partitions)]

    def _stable(self, topic: str) -> bool:
        ends = []
        for isolation in ("read_committed", "read_uncommitted"):
            consumer = KafkaConsumer(bootstrap_servers=self.bootstrap, isolation_level=isolation)
            ends.append(consumer.end_offsets([TopicPartition(topic, n) for n in consumer.partitions_for_topic(topic)]))
            consumer.close()
        return ends[0] == ends[1]

    def _consumer(self) -> Any:
        if self._watch is None:
            self._watch = KafkaConsumer(bootstrap_servers=self.bootstrap, group_id=self.name, enable_auto_commit=False)
        return self._watch


def get(port: int, path: str) -> tuple[int, str]:
    """(status, text) of a worker's HTTP endpoint."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
