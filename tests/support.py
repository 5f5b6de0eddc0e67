"""What the tests of the worker share: artifacts, streams of events, and the real worker as a process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from model.artifact import Manifest, Model, Window
from model.features import Vocabulary
from model.hazards import DEFAULT_EDGES_MS
from model.network import Network, Shape
from model.registry import Registry
from model.rhythm import Rhythm
from model.targets import DEFAULT_TARGETS, Target, event_sets

ROOT = Path(__file__).parent.parent
TYPES = ("page_view", "search", "product_view", "add_to_cart", "purchase")
START_MS = 1_760_000_000_000
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


def publish_model(
    registry: Path | str,
    version: str,
    seed: int = 0,
    hidden: int = 16,
    targets: tuple[Target, ...] = DEFAULT_TARGETS,
    encoder_of: Model | None = None,
    promote: bool = True,
    rhythm: int = 4,
) -> Model:
    """A model with random weights, lively enough that scores differ between users, published and promoted."""
    torch.manual_seed(seed)
    shape = Shape(hidden=hidden, head=16, sets=len(event_sets(targets)), bins=len(DEFAULT_EDGES_MS), dropout=0.0, belief=6, rhythm=rhythm)
    network = Network(shape)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("encoder.belief."):
                parameter.add_(torch.randn(parameter.shape))
            else:
                parameter.mul_(2.0)
        network.head[-1].weight.normal_(0, 0.2)
        if rhythm:
            fill(network.encoder.rhythm)
        network.trust_JK.copy_(torch.tensor([[0.6], [0.4]])[: shape.cells])
    if encoder_of:
        network.encoder.load_state_dict(encoder_of.network.encoder.state_dict())
    network.ask(event_sets(targets), DEFAULT_EDGES_MS, Vocabulary(TYPES))
    network.eval()
    manifest = Manifest(
        version=version,
        created_at=datetime.now(UTC),
        shape=asdict(shape),
        vocabulary=list(TYPES),
        scaling={"value_centre": 3.0, "value_spread": 1.5},
        edges_ms=list(DEFAULT_EDGES_MS),
        targets=list(targets),
        encoder_id="",
        lineage="test",
        weights_sha256="",
        window=Window(start_ms=0, end_ms=1, users=1, events=1),
    )
    place = Registry(str(registry))
    place.publish(manifest, network)
    if promote:
        place.promote(version, reason="test", by="test")
    return place.load(version)


def fill(rhythm: Rhythm) -> None:
    """Tables of classes that come back at very different paces."""
    rate_KIC1 = torch.exp(torch.empty(*rhythm.survival_KICG.shape[:3], 1).uniform_(-7, -2))
    rhythm.survival_KICG.copy_(torch.exp(-rate_KIC1 * torch.rand(rhythm.survival_KICG.shape).mul(2).cumsum(3)))
    rhythm.prior_KC.copy_(torch.randn(rhythm.prior_KC.shape).softmax(1))
    rhythm.switch_K.copy_(torch.linspace(0.01, 0.2, rhythm.sets))
    rhythm.refresh()


def events(count: int, users: int, seed: int = 0, step_ms: int = 60_000, start_ms: int = START_MS) -> list[tuple[bytes, bytes]]:
    """(key, value) of a seeded stream: time moves on by about `step_ms`, some events are late, some have no item, category or value;
    some name a session, and a few carry attributes."""
    rng, more = random.Random(seed), random.Random(f"more{seed}")
    now, out = start_ms, []
    for i in range(count):
        now += int(rng.expovariate(1) * step_ms)
        user = f"u{min(int(rng.expovariate(1) * users / 4), users - 1)}"
        event: dict[str, object] = {
            "user_id": user,
            "type": rng.choice(TYPES),
            "timestamp": now - (rng.randrange(HOUR_MS) if rng.random() < 0.05 else 0),
        }
        if rng.random() < 0.8:
            event |= {"event_id": f"e{i}", "item_id": f"i{rng.randrange(200)}", "category": f"c{rng.randrange(10)}"}
        if rng.random() < 0.4:
            event["value"] = round(rng.lognormvariate(3, 1), 2)
        if more.random() < 0.5:
            event["session_id"] = f"s{more.randrange(3)}"
        if more.random() < 0.2:
            event["attributes"] = {"country": more.choice(("NL", "DE")), "age": more.randrange(20, 80), "vip": more.random() < 0.1}
        out.append((user.encode(), json.dumps(event).encode()))
    return out


def produce(bootstrap: str, topic: str, messages: Iterable[tuple[bytes | None, bytes | None]], partition: int | None = None) -> None:
    producer = KafkaProducer(bootstrap_servers=bootstrap, linger_ms=5, max_request_size=16_000_000)
    futures = [producer.send(topic, key=k, value=v, partition=partition) for k, v in messages]
    producer.flush()
    for future in futures:
        future.get(1)
    producer.close()


def read_all(bootstrap: str, topic: str, isolation: str = "read_committed") -> list:  # type: ignore[type-arg]
    """Every record of a topic, as a consumer that joins now sees it."""
    consumer = KafkaConsumer(
        bootstrap_servers=bootstrap,
        isolation_level=isolation,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_poll_records=10_000,
    )
    partitions = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic))]
    consumer.assign(partitions)
    ends = consumer.end_offsets(partitions)
    consumer.seek_to_beginning(*partitions)
    found = []
    while any(consumer.position(p) < ends[p] for p in partitions):
        for records in consumer.poll(1000).values():
            found += records
    consumer.close()
    return found


def wait_for(what: Callable[[], bool], seconds: float = 60, about: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"did not happen within {seconds} s: {about}"
        time.sleep(0.05)  # between looks, not instead of one


def committed(bootstrap: str, group: str, topic: str) -> dict[int, int]:
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, group_id=group, enable_auto_commit=False)
    try:
        found = {p: consumer.committed(TopicPartition(topic, p), timeout_ms=5000) for p in consumer.partitions_for_topic(topic)}
        return {p: offset or 0 for p, offset in found.items()}
    finally:
        consumer.close()


class WorkerProcess:
    """`python -m worker run` as users run it."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._file = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worker", "run"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=self._file,
            stderr=self._file,
        )

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self, seconds: float = 20) -> int:
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def text(self) -> str:
        return self.log.read_text()
