"""The whole worker over a broker in memory and a real Redis, driven turn by turn through schedules of faults that a seed chooses.

No threads, no sleeping, no chance: a seed that fails once fails again (STREAMSCORE_SEED=N runs that one alone). Held to the oracle.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import redis
import torch
from oracle import Expected, Oracle
from support import DAY_MS, HOUR_MS, START_MS, publish_model
from world import Checked, Found, compare_scores, stream

from model.artifact import Model
from worker import acquire, processing
from worker.loop import Worker
from worker.metrics import Metrics
from worker.models import Loaded
from worker.patience import Patience
from worker.record import parse, record_type
from worker.schedule import NEVER_MS
from worker.settings import WorkerSettings
from worker.task import Task
from worker.transport import Partition
from worker.transport_memory import MemoryBroker, MemoryTransport

AGES_H = (1.0, 3.0, 24.0)
SCORES, DEAD = "scores", "dead"
LEAP_USERS = 4


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


class SoonerOrLater(Executor):
    """Does its work at once or when the outcome is waited for, as chance has it: the two ends of what a thread may do."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def submit(self, call: Any, /, *arguments: Any, **options: Any) -> Any:
        future: Any = Future()

        def run() -> Any:
            if not future.done():
                try:
                    future.set_result(call(*arguments, **options))
                except BaseException as error:
                    future.set_exception(error)
            return Future.result(future)

        if self._rng.random() < 0.5:
            with suppress(BaseException):
                run()
        future.result = run
        return future


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
    topics: tuple[str, ...] = ("events",)
    retention_days: float = 3.0
    idle_seconds: float = 1e9
    cache_users: int = 1_000
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
        for topic in self.topics:
            self.broker.create_topic(topic, self.partitions)
        self.broker.create_topic(SCORES, self.partitions)
        self.broker.create_topic(DEAD, 1)
        self.broker.time_ms = START_MS + 1000 * DAY_MS
        self.records: dict[Partition, list[tuple[int, int, bytes | None]]] = {
            Partition(topic, number): [] for topic in self.topics for number in range(self.partitions)
        }

    def say(self, what: str) -> None:
        self.done.append(what)

    # workers

    def start(self, slot: int, batch: int = 100, flush_ms: float = 100) -> Member:
        self.say(f"start {slot} batch={batch} flush={flush_ms}")
        settings = WorkerSettings(
            event_topics=self.topics,
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

        chance = random.Random(f"{self.seed}/{slot}/{self.now}")

        def connect() -> MemoryTransport:
            name = f"{self.group}-{slot}"
            later = lambda: chance.random() < 0.5  # noqa: E731
            member.transport = MemoryTransport(self.broker, self.group, self.topics, self.guarantee, name, later)  # type: ignore[arg-type]
            return member.transport

        member.worker = Worker(
            settings,
            connect,
            self.client,
            models,
            Metrics(),
            monotonic=lambda: self.now,
            wall=lambda: self.now,  # type: ignore[arg-type]
            beside=SoonerOrLater(chance),
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
        self.members[slot].worker.close()
        del self.members[slot]

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
                    self.leaps.append((task.number, task.offsets[self.topics[0]], task.clock.stream_ms))

        return moved

    # the world

    def feed(self, messages: list[tuple[bytes, bytes]]) -> None:
        for key, value in messages:
            partition = Partition(self.topics[sum(value) % len(self.topics)], sum(key) % self.partitions)
            offset = self.broker.append(partition, value, key, time_ms=self.broker.time_ms)
            self.records[partition].append((offset, self.broker.time_ms, value))

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
        return all(not records or (p in positions and positions[p].offset > records[-1][0]) for p, records in self.records.items())

    def settle(self) -> None:
        """No more faults: one worker reads everything and ends in good order."""
        self.say("settle")
        self.broker.away = False
        self.broker._faults.clear()
        for slot in list(self.members):
            self.close(slot)
        self.start(0, min(100, self.cache_users // 2))
        owned = self.members[0].worker.owned
        for _ in range(2000):
            self.turn(0)
            if self.caught_up() and len(owned.tasks) == self.partitions and not any(t.replaying for t in owned.tasks.values()):
                break
        else:
            raise AssertionError("does not catch up")
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
        for (topic, number), records in self.records.items():
            at = 0
            for _, offset, clock in sorted(leap for leap in self.leaps if leap[0] == number):
                upto = next((i for i, r in enumerate(records) if r[0] >= offset), len(records))
                oracle.run(topic, number, records[at:upto], expected)
                at = upto
                expected.clocks[number] = max(expected.clocks[number], clock)
                oracle.run(topic, number, [], expected)
            oracle.run(topic, number, records[at:], expected)
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
        assert len(expected.events) > len(expected.bad)
        compare_scores(expected, self.found(), [t.name for t in self.model.manifest.targets], once=self.guarantee == "exactly_once")
        for number, users in expected.users.items():
            if expected.clocks[number] > NEVER_MS:
                offsets = {topic: self.records[Partition(topic, number)][-1][0] + 1 for topic in self.topics}
                Checked(self.client, self.group, number, oracle).compare(users, expected.clocks[number], offsets)
        self.flush_redis()

    def compare_several_topics(self) -> None:
        """The order between topics is not given: so no values, but everything once, and every event in its user's state."""
        _, expected = self.oracle()
        found = self.found()
        assert dict.fromkeys(expected.events, 1) == {k: len(v) for k, v in found.events.items()}
        assert dict.fromkeys(expected.bad, 1) == {k: len(v) for k, v in found.bad.items()}
        assert {len(v) for v in found.silences.values()} <= {1}
        for number, users in expected.users.items():
            prefix = f"{{{self.group}:{number}}}:u:"
            for name, user in users.items():
                record = parse([self.client.get(prefix + name)], record_type(self.model.network.state_size))[0][0]
                stats = record["prefix"]["statistics"]
                assert (stats["count"], stats["last_ms"]) == (len(user.history), user.stats[0]["last_ms"]), name
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
    monkeypatch.setattr(processing, "LEAP_USERS", LEAP_USERS)
    monkeypatch.setattr(processing.Processing._due_users, "__defaults__", (LEAP_USERS,))
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
            sim.start(rng.choice(free), min(rng.choice((1, 2, 5, 17, 100)), sim.cache_users // 2), rng.choice((0, 50, 300, 2000)))

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

    def rest() -> None:
        if sim.members and not zombies:
            for slot in [*sim.members] * 10:
                sim.turn(slot)
        sim.now += rng.choice((0.1, 1, 3600.0, 4 * 3600.0))

    rare: list[tuple[Callable[[], object], float]] = [
        (start, 4),
        (crash, 1.5),
        (close, 0.5),
        (sleep, 1),
        (expire, 1),
        (rest, 1.5),
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


@pytest.mark.parametrize("seed", seeds(30))
def test_random_faults(model: Model, client: Any, seed: int) -> None:
    rng = random.Random(f"settings{seed}")
    sim = Simulation(
        seed,
        model,
        client,
        guarantee=rng.choice(("exactly_once", "exactly_once", "at_least_once")),
        idle_seconds=rng.choice((1e9, 1800.0)),
        cache_users=rng.choice((100_000, 34)),
        retention_days=rng.choice((1.25, 3)),
    )
    if sim.guarantee == "at_least_once":
        sim.idle_seconds = 1e9  # what it publishes as the wall clock moves on, and then forgets, nothing in the log calls for
    if sim.idle_seconds < 1e9:
        sim.retention_days = 1000  # the wall clock is not in the log, so neither is whom it deleted
    try:
        random_schedule(sim, 200, stream(400, users=60, seed=seed, step_ms=rng.choice((60_000, 600_000))))
        sim.settle()
        sim.compare()
    except BaseException:
        print(f"seed {seed}, {sim.guarantee}, idle {sim.idle_seconds}, cache {sim.cache_users}:", *sim.done, sep="\n  ")
        raise


@pytest.mark.parametrize("seed", seeds(8))
def test_random_faults_with_two_topics(model: Model, client: Any, seed: int) -> None:
    sim = Simulation(seed, model, client, topics=("events", "orders"), retention_days=1000)
    try:
        random_schedule(sim, 150, stream(300, users=20, seed=seed))
        sim.settle()
        sim.compare_several_topics()
    except BaseException:
        print(f"seed {seed}:", *sim.done, sep="\n  ")
        raise


class Crash(BaseException):
    """The process is gone."""


class Fuse:
    """Blows at the nth call to Kafka or Redis, before or after it has had its effect."""

    def __init__(self, at: int, after: bool) -> None:
        self.at, self.after, self.calls = at, after, 0

    def __call__(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.at and not self.after:
            raise Crash
        answer = call(*arguments, **options)
        if self.calls == self.at:
            raise Crash
        return answer


class FusedRedis(redis.Redis):
    fuse: Fuse | None = None

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        return self.fuse(super().execute_command, *arguments, **options) if self.fuse else super().execute_command(*arguments, **options)


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_crash_at_every_step(model: Model, client: Any, redis_url: str, guarantee: str) -> None:
    """A run with several batches, flushes, silence scores and a leap of the clock; the process dies at each call it makes."""
    fused = FusedRedis.from_url(redis_url)
    messages = stream(24, users=8, seed=1)
    late = stream(3, users=8, seed=2, start_ms=START_MS + 2 * DAY_MS)

    def run(fuse: Fuse) -> None:
        sim = Simulation(0, model, fused, guarantee, partitions=1, retention_days=1.5)
        fused.fuse = None
        member = sim.start(0, batch=8, flush_ms=0 if guarantee == "exactly_once" else 100)
        transport: Any = member.transport
        for name in ("poll", "committed", "publish", "commit"):
            setattr(transport, name, partial(fuse, getattr(transport, name)))
        fused.fuse = fuse
        sim.feed(messages[:16])
        try:
            for n in range(8):
                sim.turn(0)
                if n == 3:
                    sim.feed(messages[16:] + late)
            sim.close(0)
        except Crash:
            sim.crash(0)
        finally:
            fused.fuse = None
        if len(sim.records[Partition("events", 0)]) < 20:
            sim.feed(messages[16:] + late)
        sim.settle()
        sim.compare()

    counting = Fuse(-1, after=False)
    run(counting)
    assert counting.calls > 25
    for at in range(1, counting.calls + 1):
        for after in (False, True):
            try:
                run(Fuse(at, after))
            except Exception as error:
                raise AssertionError(f"died {'after' if after else 'before'} call {at} of {counting.calls}") from error


def test_batch_size_changes_nothing(model: Model, client: Any) -> None:
    messages = stream(300, users=40, seed=3, step_ms=600_000)
    found = []
    for batch in (1, 13, 1000):
        sim = Simulation(0, model, client, retention_days=1.25)
        sim.start(0, batch=batch)
        sim.feed(messages)
        sim.settle()
        found.append(sim.found())
        sim.compare()
    for other in found[1:]:
        for one, two in ((found[0].events, other.events), (found[0].silences, other.silences)):
            assert one.keys() == two.keys()  # type: ignore[attr-defined]
            for place, ((_, scores, _),) in one.items():  # type: ignore[attr-defined]
                assert scores == pytest.approx(two[place][0][1], abs=2e-5)  # type: ignore[index]


def test_leap_of_the_clock_is_worked_off_in_steps(model: Model, client: Any) -> None:
    """Sixty users, silent for days, are due at once: no transaction holds more of them than it should, and none is lost if one fails."""
    for failing in range(0, 40, 3):
        sim = Simulation(0, model, client, partitions=1, retention_days=2)
        member = sim.start(0, batch=50)
        sim.feed([(b"u%d" % n, b'{"user_id": "u%d", "type": "search", "timestamp": %d}' % (n, START_MS + n)) for n in range(60)])
        transport: Any = member.transport
        publish, sizes = transport.publish, []

        def counted(
            outgoing: Any, positions: Any, publish: Any = publish, sizes: Any = sizes, failing: int = failing, sim: Any = sim
        ) -> None:
            sizes.append(sum(b'"silence"' in value for o in outgoing for value in o.values))
            if len(sizes) == failing:
                sim.broker.fail_next("after_commit" if failing % 2 else "before_commit")
            publish(outgoing, positions)

        transport.publish = counted
        for _ in range(5):
            sim.turn(0)
        sim.now += 1
        sim.turn(0)
        sim.feed([(b"u7", b'{"user_id": "u7", "type": "search", "timestamp": %d}' % (START_MS + 3 * DAY_MS))])
        for _ in range(60):
            sim.turn(0)
        assert sum(sizes) >= 3 * 59
        assert max(sizes) <= 3 * (LEAP_USERS + 1)
        sim.settle()
        sim.compare()


def test_redis_emptied_under_a_worker_that_reads_nothing(model: Model, client: Any) -> None:
    """Everybody is in memory, nobody is due: so the flush must notice, or it would leave behind those few who changed since."""
    sim = Simulation(0, model, client, partitions=1)
    sim.start(0, batch=20, flush_ms=10)
    messages = stream(200, users=10, seed=6, step_ms=500, bad_share=0)
    for n in range(20):
        if n == 12:
            sim.flush_redis()
        sim.feed(messages[n * 10 : n * 10 + 10])
        sim.turn(0)
    sim.settle()
    sim.compare()


def test_topic_no_longer_retains_what_a_replay_needs(model: Model, client: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Said loudly; what is there is kept; scores go on, each once."""
    sim = Simulation(0, model, client, partitions=1, retention_days=1000)
    sim.start(0, batch=10, flush_ms=0)
    messages = stream(120, users=10, seed=4, bad_share=0)
    sim.feed(messages[:40])
    for _ in range(8):
        sim.turn(0)
    sim.take_snapshot()
    sim.feed(messages[40:80])
    for _ in range(8):
        sim.turn(0)
    sim.crash(0)
    sim.restore_snapshot()
    sim.broker.truncate(Partition("events", 0), 60)
    member = sim.start(0, batch=10)
    sim.feed(messages[80:])
    sim.turn(0)
    assert member.worker.metrics.lost._value.get() == 20
    assert "no longer retained" in caplog.text
    sim.settle()
    found = sim.found()
    assert {k: len(v) for k, v in found.events.items()} == {("events", 0, n): 1 for n in range(120)}
    assert {len(v) for v in found.silences.values()} == {1}


def test_topic_no_longer_retains_what_was_to_be_read(model: Model, client: Any) -> None:
    sim = Simulation(0, model, client, partitions=1, retention_days=1000)
    member = sim.start(0, batch=10)
    messages = stream(100, users=10, seed=5, bad_share=0)
    sim.feed(messages[:50])
    for _ in range(3):
        sim.turn(0)
    read = member.worker.owned.tasks[0].offsets["events"]
    assert 0 < read < 45
    sim.feed(messages[50:])
    sim.broker.truncate(Partition("events", 0), 45)
    for _ in range(4):
        sim.turn(0)
    assert member.worker.metrics.lost._value.get() == 45 - read
    sim.settle()
    assert {k: len(v) for k, v in sim.found().events.items()} == {("events", 0, n): 1 for n in range(100) if not read <= n < 45}
