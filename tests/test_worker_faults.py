"""The worker on real Kafka and Redis, with everything going wrong that can, against the oracle (tests/oracle.py).

`World.finish` holds what was published and stored against it: every score and dead letter exactly once, every state equal. A test that
destroys a server has its own.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path

import pytest
from support import publish_model, wait_for
from world import Forked, World, Zygote, get, stream

from demo.servers import kafka, redis


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def world(bootstrap: str, redis_url: str, unique: str, tmp_path: Path, zygote: Zygote) -> Iterator[Callable[..., World]]:
    """``world(partitions=2, redis_url=..., **worker settings)``: with a model, but no worker yet."""
    made: list[World] = []

    def make(
        *, partitions: int = 2, redis_url: str = redis_url, bootstrap: str = bootstrap, model: bool = True, **settings: object
    ) -> World:
        name = f"{unique}-{len(made)}"
        (tmp_path / name).mkdir()
        made.append(World(bootstrap, redis_url, name, tmp_path / name, zygote, partitions, **settings))
        if model:
            made[-1].model("v1")
        return made[-1]

    yield make
    for each in made:
        each.close()
        print(each.log())  # pytest shows it where a test failed


def says(worker: Forked, words: str, seconds: float = 60) -> None:
    wait_for(lambda: words in worker.text() or worker.status() is not None, seconds, f"{words!r} in:\n{worker.text()[-2000:]}")
    assert words in worker.text()


def test_plain_run(world: Callable[..., World]) -> None:
    w = world(partitions=3)
    w.feed(stream(800, bad_share=0.05))
    w.start(real=True)
    expected, _ = w.finish()
    assert len(expected.events) == 800
    assert len(expected.silences) > 100
    assert len(expected.bad) > 20


@pytest.mark.parametrize(("guarantee", "kills"), [("exactly_once", 22), ("at_least_once", 9)])
def test_killed_again_and_again(world: Callable[..., World], guarantee: str, kills: int) -> None:
    """At moments of a worker's life that a seed chooses: starting, replaying, catching up, working."""
    seed = 20
    rng = random.Random(seed)
    w = world(guarantee=guarantee, session_timeout_ms=1000)
    rest = iter(stream(100 * kills, seed=seed))
    real = set(rng.sample(range(1, kills), 2))
    for n in range(kills):
        w.feed(list(islice(rest, 50)))
        batch, flush_ms = rng.choice((1, 7, 40, 2000)), rng.choice((0, 50, 250, 1500))
        worker = w.start(real=n in real, max_batch_records=batch, flush_interval_ms=flush_ms)
        if n % 4 == 0:
            says(worker, rng.choice(("started", "model taken over", "partition acquired", "in step with the log")))
        else:
            w.feed(list(islice(rest, 50)))
            w.progress(rng.randrange(1, 90))
        worker.kill()
    w.feed(list(rest))
    w.start()
    w.finish(once=guarantee == "exactly_once")


def test_rebalances(world: Callable[..., World]) -> None:
    """A second worker joins, the first leaves, a third joins, the second is killed."""
    w = world(partitions=4)
    with w.feeding(stream(1200, seed=1), per_second=150):
        first = w.start()
        w.progress(50)
        second = w.start(worker_id="w1")
        says(second, "in step with the log")
        w.progress(100)
        began = time.monotonic()
        assert first.stop() == 0
        assert time.monotonic() - began < 10
        w.progress(100)
        third = w.start(worker_id="w2")
        says(third, "in step with the log")
        w.progress(100)
        second.kill()
        w.progress(100)
    w.finish()


@pytest.mark.parametrize(("users", "silence_hours"), [(60, "1,3,24"), (20, "48")])
def test_redis_flushed_while_running(world: Callable[..., World], users: int, silence_hours: str) -> None:
    """Noticed in the next read, or, where everybody is in memory and nobody is due, in the next flush."""
    with redis() as r:
        w = world(redis_url=r.url, silence_hours=silence_hours)
        with w.feeding(stream(900, users, seed=2), per_second=200):
            worker = w.start()
            for _ in range(3):
                w.progress(150)
                w.client.flushall()
        w.finish()
        assert "acquiring a partition anew" in worker.text()


def test_redis_flushed_while_down(world: Callable[..., World]) -> None:
    with redis() as r:
        w = world(redis_url=r.url)
        messages = stream(600, seed=3)
        w.feed(messages[:400])
        worker = w.start()
        w.progress(250)
        worker.kill()
        w.client.flushall()
        w.start()
        w.feed(messages[400:])
        w.finish()


def test_redis_restored_from_an_old_snapshot(world: Callable[..., World], tmp_path: Path) -> None:
    with redis() as r:
        w = world(redis_url=r.url, flush_interval_ms=50)
        with w.feeding(stream(900, seed=4), per_second=200):
            worker = w.start()
            w.progress(100)
            wait_for(lambda: w.client.exists(f"{{{w.name}:0}}:applied"), 30, "a first flush")
            w.client.save()
            shutil.copy(r.dump_path, tmp_path / "old.rdb")
            for restored_while_running in (True, False):
                w.progress(200)
                if not restored_while_running:
                    worker.kill()
                r.kill()
                shutil.copy(tmp_path / "old.rdb", r.dump_path)
                r.restart()
            w.start()
        w.finish()


def test_paused_past_its_session_timeout(world: Callable[..., World]) -> None:
    w = world(session_timeout_ms=1000, transaction_timeout_ms=1000)
    with w.feeding(stream(900, seed=5), per_second=150):
        first = w.start()
        for n in range(2):
            w.progress(80)
            first.signal(signal.SIGSTOP)
            second = w.start(worker_id=f"other{n}")
            says(second, "in step with the log")
            w.progress(80)
            first.signal(signal.SIGCONT)
            w.progress(80)
            assert second.stop() == 0
    w.finish()


def test_models_swapped(world: Callable[..., World]) -> None:
    """New heads: states stay. A new encoder of another size: states are rebuilt from their last events, also those of silent users."""
    w = world(history_events=16)
    with w.feeding(stream(1500, users=30, seed=6), per_second=200):
        worker = w.start()
        w.progress(200)
        w.model("v2", seed=2, encoder_of=w.models[0])
        says(worker, "version=v2")
        w.progress(200)
        w.model("v3", seed=3, hidden=24)
        says(worker, "version=v3")
        w.progress(200)
        w.model("v4", seed=4, hidden=24)
        says(worker, "version=v4")
    encoder = w.models[-1].manifest.encoder_id

    def rebuilt() -> bool:
        applied = [w.client.get(f"{{{w.name}:{n}}}:applied") for n in range(w.partitions)]
        return all(a and json.loads(a)["encoder"] == encoder for a in applied)

    wait_for(rebuilt, 60, "all states rebuilt")
    _, found = w.finish()
    assert {entry[0][2] for entry in found.events.values()} == {"v1", "v2", "v3", "v4"}


def test_corrupt_artifact_is_refused(world: Callable[..., World]) -> None:
    w = world()
    messages = stream(300, seed=7)
    worker = w.start()
    w.feed(messages[:150])
    w.wait_caught_up()
    publish_model(w.registry, "bad", seed=9, promote=False)
    weights, manifest = (w.registry / "versions" / "bad" / name for name in ("weights.safetensors", "manifest.json"))
    content = bytearray(weights.read_bytes())
    content[-9] ^= 0x40
    weights.write_bytes(content)
    (w.registry / "current").write_text(json.dumps({"version": "bad", "manifest_sha256": sha256(manifest.read_bytes()).hexdigest()}))
    says(worker, "refused, the running model stays")
    metrics = get(worker.port, "/metrics")[1]
    assert "streamscore_artifacts_rejected_total 1.0" in metrics
    assert 'streamscore_model_info{version="v1"} 1.0' in metrics
    w.feed(messages[150:])
    w.finish()
    assert "Traceback" not in worker.text()


def test_waits_for_the_first_model(world: Callable[..., World]) -> None:
    w = world(model=False)
    w.feed(stream(200, seed=8))
    worker = w.start(real=True)
    says(worker, "waiting for the trainer's first")
    status, sentence = get(worker.port, "/readyz")
    assert (status, "no model" in sentence) == (503, True)
    assert get(worker.port, "/healthz")[0] == 200
    assert w.processed() == 0
    w.model("v1")
    w.wait_caught_up()
    wait_for(lambda: get(worker.port, "/readyz")[0] == 200, 30, "ready")
    assert "v1" in get(worker.port, "/readyz")[1]
    assert 'streamscore_scores_total{trigger="event"} 200.0' in get(worker.port, "/metrics")[1]
    w.finish()


def test_stopped_under_load(world: Callable[..., World]) -> None:
    w = world(max_batch_records=20)
    w.feed(stream(1500, seed=9))
    for number in (signal.SIGTERM, signal.SIGINT):
        worker = w.start(real=True)
        w.progress(100)
        worker.signal(number)
        assert worker.wait(10) == 0
        assert worker.text().rstrip().endswith("stopped")
        assert w.committed() != w.ends()
        for n, offset in w.committed().items():  # nothing is left to be replayed
            assert json.loads(w.client.get(f"{{{w.name}:{n}}}:applied"))["offsets"] == {w.topic: offset}
    w.start()
    w.finish()


def test_kafka_killed_and_restarted(world: Callable[..., World]) -> None:
    with kafka() as k:
        w = world(bootstrap=k.bootstrap, max_batch_records=10)
        messages = stream(900, seed=10)
        w.feed(messages[:600])
        worker = w.start()
        w.progress(100)
        k.kill()
        says(worker, "waiting, and trying again")
        k.restart()
        w.progress(100)
        w.feed(messages[600:])
        w.finish()


def test_redis_killed_and_restarted(world: Callable[..., World]) -> None:
    with redis() as r:
        w = world(redis_url=r.url)
        with w.feeding(stream(600, seed=11), per_second=200):
            worker = w.start()
            w.progress(150)
            r.kill()
            says(worker, "Redis does not answer")
            assert get(worker.port, "/readyz")[0] == 503
            r.restart()
            says(worker, "going on")
            w.progress(50)
        w.finish()


def test_redis_full(world: Callable[..., World]) -> None:
    with redis() as r:
        w = world(redis_url=r.url)
        with w.feeding(stream(600, seed=12), per_second=200):
            worker = w.start()
            w.progress(150)
            w.client.config_set("maxmemory-policy", "noeviction")
            w.client.config_set("maxmemory", 1)
            says(worker, "Redis is full")
            assert "Redis is full" in get(worker.port, "/readyz")[1]
            w.client.config_set("maxmemory", 0)
            says(worker, "going on")
            w.progress(50)
        w.finish()


def test_redis_read_only(world: Callable[..., World]) -> None:
    with redis() as r:
        w = world(redis_url=r.url)
        with w.feeding(stream(600, seed=13), per_second=200):
            worker = w.start()
            w.progress(150)
            w.client.replicaof("127.0.0.1", 1)
            says(worker, "read-only replica")
            w.client.replicaof("NO", "ONE")
            says(worker, "going on")
            w.progress(50)
        w.finish()


@pytest.mark.parametrize("key", ["applied", "due", "u:u0"])
def test_redis_key_of_another_type(world: Callable[..., World], key: str) -> None:
    with redis() as r:
        w = world(redis_url=r.url, partitions=1)
        w.client.rpush(f"{{{w.name}:0}}:{key}", "somebody else's")
        w.feed(stream(200, users=5, seed=14, bad_share=0))
        worker = w.start()
        assert worker.wait(30) == 1
        assert "choose another `group`" in worker.text()
        assert "Traceback" not in worker.text()
        assert w.client.lrange(f"{{{w.name}:0}}:{key}", 0, -1) == [b"somebody else's"]
        w.client.delete(f"{{{w.name}:0}}:{key}")
        w.workers.clear()
        w.start()
        w.finish()
