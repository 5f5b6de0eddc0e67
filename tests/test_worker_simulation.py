"""The whole worker over a broker in memory and a real Redis, driven turn by turn through schedules of faults that a seed chooses.

No threads, no sleeping, no chance: a seed that fails once fails again (STREAMSCORE_SEED=N runs that one alone). Held to the oracle.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from oracle import Expected, Oracle
from support import DAY_MS, HOUR_MS, publish_model
from world import Checked, Found, compare_scores, stream

from model.artifact import Model
from worker import acquire, processing
from worker.loop import Worker
from worker.metrics import Metrics
from worker.models import Loaded
from worker.patience import Patience
from worker.schedule import NEVER_MS
from worker.settings import WorkerSettings
from worker.task import Task
from worker.transport import Partition
from worker.transport_memory import MemoryBroker, MemoryTransport

AGES_H = (1.0, 3.0, 24.0)
TOPIC, SCORES, DEAD = "events", "scores", "dead"


class Models:
    """The part of `worker.models.Models` that the loop uses."""

    def __init__(self, model: Model) -> None:
        self.offer(model)

    def offer(self, model: Model) -> None:
        self._next: Loaded | None = Loaded(model, model.scorer())

    def check(self) -> None: ...

    def take(self) -> Loaded | None:
        taken, self._next = self._next, None
        return taken

    def watch(self, every_seconds: float) -> None: ...

    def close(self) -> None: ...


@dataclass
class Member:
    """A worker and its connection."""

    worker: Worker
    models: Models
    transport: MemoryTransport | None = None


@dataclass
class Simulation:
    """leaps: where the wall clock moved a partition's clock on, (partition, offset, clock)."""

    seed: int
    model: Model
    client: Any
    guarantee: str = "exactly_once"
    partitions: int = 2
    retention_days: float = 3.0
    idle_seconds: float = 1e9
    cache_users: int = 100_000
    history_events: int = 20
    now: float = 1000.0
    members: dict[int, Member] = field(default_factory=dict)
    leaps: list[tuple[int, int, int]] = field(default_factory=list)
    snapshot: dict[bytes, bytes] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.group = f"sim{self.seed}-{os.urandom(3).hex()}"
        self.broker = MemoryBroker()
        self.broker.create_topic(TOPIC, self.partitions)
        self.broker.create_topic(SCORES, self.partitions)
        self.broker.create_topic(DEAD, 1)
        self.broker.time_ms = 10**13
        self.records: dict[int, list[tuple[int, int, bytes | None]]] = {p: [] for p in range(self.partitions)}

    def say(self, what: str) -> None:
        self.done.append(what)

    # workers

    def start(self, slot: int, batch: int = 100, flush_ms: float = 100) -> Member:
        self.say(f"start {slot} batch={batch} flush={flush_ms}")
        settings = WorkerSettings(
            event_topics=(TOPIC,),
            score_topic=SCORES,
            dead_letter_topic=DEAD,
            group=self.group,
            guarantee=self.guarantee,  # type: ignore[arg-type]
            silence_hours=AGES_H,
            retention_days=self.retention_days,
            idle_seconds=self.idle_seconds,
            max_batch_records=batch,
            flush_interval_ms=flush_ms,
            history_events=self.history_events,
            bad_window_records=1_000_000,
        ).model_copy(update={"cache_users": self.cache_users})  # less than a setting may be
        models = Models(self.model)
        member = Member(None, models)  # type: ignore[arg-type]

        def connect() -> MemoryTransport:
            member.transport = MemoryTransport(self.broker, self.group, [TOPIC], self.guarantee, f"{self.group}-{slot}")  # type: ignore[arg-type]
            return member.transport

        member.worker = Worker(
            settings, connect, self.client, models, Metrics(), monotonic=lambda: self.now, wall=lambda: self.now  # type: ignore[arg-type]
        )
        member.worker.start()
        member.worker.processing.move_clock = self._watched(member)  # type: ignore[method-assign]
        self.members[slot] = member
        return member

    def turn(self, slot: int) -> None:
        self.now += 0.02
        self.members[slot].worker.run_once()

    def crash(self, slot: int) -> None:
        self.say(f"crash {slot}")
        member = self.members.pop(slot)
        if member.transport:
            self.broker.expire(member.transport)

    def close(self, slot: int) -> None:
        self.say(f"close {slot}")
        self.members.pop(slot).worker.close()

    def _watched(self, member: Member) -> Callable[[Task], None]:
        """`move_clock`, noting where the wall clock moved a partition's clock on: nothing in the log says so."""
        move = member.worker.processing.move_clock

        def moved(task: Task) -> None:
            self.leaps = [at for at in self.leaps if at[0] != task.number or at[2] <= task.clock.stream_ms or task.replaying]  # undone
            before = task.clock.stream_ms
            try:
                move(task)
            finally:
                if task.clock.stream_ms != before:
                    self.leaps.append((task.number, task.offsets[TOPIC], task.clock.stream_ms))

        return moved

    # the world

    def feed(self, messages: list[tuple[bytes, bytes]]) -> None:
        for key, value in messages:
            number = sum(key) % self.partitions
            offset = self.broker.append(Partition(TOPIC, number), value, key, time_ms=self.broker.time_ms)
            self.records[number].append((offset, self.broker.time_ms, value))

    def keys(self) -> list[bytes]:
        return list(self.client.scan_iter(match=f"{{{self.group}:*", count=10_000))

    def flush_redis(self) -> None:
        self.say("flush redis")
        if keys := self.keys():
            self.client.delete(*keys)

    def take_snapshot(self) -> None:
        self.say("snapshot")
        self.snapshot = {key: self.client.dump(key) for key in self.keys()}

    def restore_snapshot(self) -> None:
        self.say("restore")
        self.flush_redis()
        for key, value in self.snapshot.items():
            self.client.restore(key, 0, value)

    def caught_up(self) -> bool:
        positions = self.broker.groups[self.group].positions
        return all(
            positions.get(Partition(TOPIC, p), (0,))[0] >= self.broker.log(Partition(TOPIC, p)).end or not self.records[p]
            for p in range(self.partitions)
        )

    def settle(self) -> None:
        """No more faults: one worker reads everything and ends in good order."""
        self.say("settle")
        self.broker.away = False
        self.broker._faults.clear()
        for slot in list(self.members):
            self.close(slot)
        self.start(0)
        for _ in range(2000):
            self.turn(0)
            if self.caught_up():
                break
        assert self.caught_up(), "does not catch up"
        self.close(0)

    # the oracle

    def oracle(self) -> tuple[Oracle, Expected]:
        oracle = Oracle(
            self.model,
            [round(h * HOUR_MS) for h in AGES_H],
            round(self.retention_days * DAY_MS),
            history_events=self.history_events,
        )
        expected = Expected()
        for partition, records in self.records.items():
            at = 0
            oracle.run(TOPIC, partition, [], expected)
            for _, offset, clock in sorted(leap for leap in self.leaps if leap[0] == partition):
                upto = next((i for i, r in enumerate(records) if r[0] >= offset), len(records))
                oracle.run(TOPIC, partition, records[at:upto], expected)
                at = upto
                expected.clocks[partition] = max(expected.clocks[partition], clock)
                oracle.run(TOPIC, partition, [], expected)
            oracle.run(TOPIC, partition, records[at:], expected)
        return oracle, expected

    def found(self) -> Found:
        found = Found()
        for records in self.broker.read(SCORES):
            for value in records.values:
                assert value
                found.score(value)
        for records in self.broker.read(DEAD):
            for key, value, headers in zip(records.keys, records.values, records.headers, strict=True):
                found.dead_letter(key, value, dict(headers))
        return found

    def compare(self) -> None:
        oracle, expected = self.oracle()
        compare_scores(expected, self.found(), [t.name for t in self.model.manifest.targets], once=self.guarantee == "exactly_once")
        for partition, users in expected.users.items():
            if expected.clocks[partition] > NEVER_MS:
                end = self.broker.log(Partition(TOPIC, partition)).end
                Checked(self.client, self.group, partition, oracle).compare(users, expected.clocks[partition], {TOPIC: end})
        self.flush_redis()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.set_num_threads(1)
    return publish_model(tmp_path_factory.mktemp("registry"), "v1")


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    made = redis.Redis.from_url(redis_url)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dozen users are many; and waiting takes no time."""
    monkeypatch.setattr(processing, "LEAP_USERS", 4)
    monkeypatch.setattr(acquire, "SETTLE_USERS", 3)
    monkeypatch.setattr(Patience, "wait", lambda self, seconds: self.progress())


def seeds(count: int) -> list[int]:
    chosen = os.environ.get("STREAMSCORE_SEED")
    return [int(chosen)] if chosen else list(range(count))


def random_schedule(sim: Simulation, turns: int, messages: list[tuple[bytes, bytes]]) -> None:
    rng = sim.rng
    broker = sim.broker
    zombies: dict[int, int] = {}  # slot -> turns that it still sleeps, its partitions given away

    def runnable() -> list[int]:
        return [slot for slot in sim.members if slot not in zombies]

    def start() -> None:
        free = [slot for slot in (0, 1) if slot not in sim.members]
        if free:
            sim.start(rng.choice(free), rng.choice((1, 2, 5, 17, 100)), rng.choice((0, 50, 300, 2000)))

    def fail(kind: str) -> None:
        sim.say(kind)
        broker.fail_next(kind)  # type: ignore[arg-type]

    def crash() -> None:
        if sim.members:
            slot = rng.choice(list(sim.members))
            zombies.pop(slot, None)
            sim.crash(slot)

    def close() -> None:
        if slots := runnable():
            sim.close(rng.choice(slots))

    def sleep() -> None:
        if slots := runnable():
            slot = rng.choice(slots)
            zombies[slot] = rng.randrange(1, 30)
            transport = sim.members[slot].transport
            sim.say(f"sleep {slot}")
            if transport:
                broker.expire(transport)

    def expire() -> None:
        if slots := runnable():
            slot = rng.choice(slots)
            sim.say(f"expire {slot}")
            transport = sim.members[slot].transport
            assert transport
            broker.expire(transport)

    def wait() -> None:
        sim.now += rng.choice((0.1, 1, 3600.0, 4 * 3600.0))

    rare: list[tuple[Callable[[], object], float]] = [
        (start, 4),
        (crash, 1.5),
        (close, 0.5),
        (sleep, 1),
        (expire, 1),
        (wait, 1.5),
        (lambda: fail("before_commit"), 1),
        (lambda: fail("after_commit"), 1),
        (lambda: fail("away"), 1),
        (sim.flush_redis, 0.4),
        (sim.take_snapshot, 0.7),
        (sim.restore_snapshot, 0.4),
    ]
    actions, weights = zip(*rare, strict=True)
    per_turn = len(messages) / turns
    fed = 0
    for n in range(turns):
        for slot in list(zombies):
            zombies[slot] -= 1
            if zombies[slot] <= 0:
                sim.say(f"wake {slot}")
                del zombies[slot]
        if rng.random() < 0.3:
            upto = min(len(messages), round((n + 1) * per_turn))
            sim.feed(messages[fed:upto])
            fed = upto
        if rng.random() < 0.15:
            rng.choices(actions, weights)[0]()
        for slot in runnable():
            if rng.random() < 0.7:
                sim.turn(slot)
    sim.feed(messages[fed:])


@pytest.mark.parametrize("seed", seeds(40))
def test_random_faults(model: Model, client: Any, seed: int) -> None:
    rng = random.Random(f"settings{seed}")
    sim = Simulation(
        seed,
        model,
        client,
        guarantee=rng.choice(("exactly_once", "exactly_once", "at_least_once")),
        idle_seconds=rng.choice((1e9, 1800.0)),
        cache_users=rng.choice((100_000, 150)),
    )
    if sim.idle_seconds < 1e9:
        sim.retention_days = 1000
    try:
        random_schedule(sim, 200, stream(400, users=30, seed=seed, step_ms=rng.choice((60_000, 600_000))))
        sim.settle()
        sim.compare()
    except BaseException:
        print(f"seed {seed}, {sim.guarantee}, idle {sim.idle_seconds}, cache {sim.cache_users}:", *sim.done, sep="\n  ")
        raise
