"""The collector on a real Kafka: every event once in the log, whatever happens to the process, the topic or the broker's retention."""

import json
import logging
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition

from trainer import collect as collect_module
from trainer.collect import Collector, Waiting, follow
from trainer.log import EventLog, files_in, read
from trainer.metrics import Metrics
from trainer.settings import TrainerSettings

ROOT = Path(__file__).parent.parent
NOW_MS = 1_760_000_000_000


@pytest.fixture
def producer(bootstrap: str) -> Iterator[KafkaProducer]:
    producer = KafkaProducer(bootstrap_servers=bootstrap, linger_ms=5)
    yield producer
    producer.close()


@pytest.fixture
def settings(bootstrap: str, make_topic: Callable[..., str], unique: str, tmp_path: Path) -> TrainerSettings:
    return TrainerSettings(
        kafka_bootstrap_servers=bootstrap,
        event_topics=make_topic(2),
        group=unique,
        log_directory=tmp_path / "log",
        log_flush_seconds=0.01,
        metrics_port=0,
    )


def event(number: int, **more: Any) -> bytes:
    return json.dumps(
        {"user_id": f"u{number % 50}", "type": "view", "timestamp": NOW_MS + number, "event_id": f"e{number}", **more}
    ).encode()


def send(producer: KafkaProducer, topic: str, values: list[bytes]) -> None:
    for number, value in enumerate(values):
        producer.send(topic, value, partition=number % 2, timestamp_ms=NOW_MS)
    producer.flush()


def collect(settings: TrainerSettings, metrics: Metrics | None = None) -> Metrics:
    """Until everything that is in Kafka now is in the log."""
    metrics = metrics or Metrics()
    log = EventLog(settings.log_directory)
    collector = Collector(settings, log, metrics)
    try:
        while not collector.caught_up:
            collector.poll(0.2)
        collector.close()
    finally:
        log.close()
    return metrics


def places(settings: TrainerSettings) -> list[tuple[int, int]]:
    table = read(settings.log_directory, columns=["partition", "offset"])
    return sorted(zip(table["partition"].to_pylist(), table["offset"].to_pylist(), strict=True))


def test_everything_of_an_event_is_kept_and_bad_records_are_counted(producer: KafkaProducer, settings: TrainerSettings) -> None:
    (topic,) = settings.event_topics
    full = {"item_id": "i1", "category": "c", "value": 9.5, "session_id": "s", "attributes": {"device": "ios", "n": [1, 2]}}
    send(
        producer, topic, [event(0, **full), b"rubbish", event(1, timestamp="2025-10-09T08:53:20.001Z"), b"", event(2, timestamp=NOW_MS * 9)]
    )
    metrics = collect(settings)
    first, second = sorted(read(settings.log_directory).to_pylist(), key=lambda r: r["event_id"])
    assert first == {
        **{"topic": topic, "partition": 0, "offset": 0, "user_id": "u0", "type": "view", "timestamp": NOW_MS},
        **{"item_id": "i1", "category": "c", "value": 9.5, "session_id": "s", "event_id": "e0"},
        "attributes": '{"device": "ios", "n": [1, 2]}',
    }
    assert (second["timestamp"], second["item_id"], second["attributes"]) == (NOW_MS + 1, None, None)
    bad = {r: metrics.registry.get_sample_value("streamscore_trainer_bad_rows_total", {"reason": r}) for r in ("malformed", "empty")}
    assert bad == {"malformed": 1, "empty": 1}
    assert metrics.registry.get_sample_value("streamscore_trainer_bad_rows_total", {"reason": "timestamp_in_future"}) == 1
    assert metrics.registry.get_sample_value("streamscore_trainer_rows_total") == 2


def test_a_restart_goes_on_where_the_log_ends_and_kafka_shows_it(producer: KafkaProducer, settings: TrainerSettings) -> None:
    (topic,) = settings.event_topics
    send(producer, topic, [event(i) for i in range(100)])
    collect(settings)
    send(producer, topic, [event(i) for i in range(100, 150)])
    metrics = collect(settings)
    assert metrics.registry.get_sample_value("streamscore_trainer_rows_total") == 50
    assert places(settings) == sorted((n % 2, n // 2) for n in range(150))
    with KafkaConsumer(bootstrap_servers=settings.kafka_bootstrap_servers, group_id=settings.group) as consumer:
        assert [consumer.committed(TopicPartition(topic, p)) for p in (0, 1)] == [75, 75]


def test_a_missing_topic_is_waited_for(settings: TrainerSettings) -> None:
    lacking = settings.model_copy(update={"event_topics": ("not-there",)})
    log = EventLog(settings.log_directory)
    with pytest.raises(Waiting, match="topic not-there does not exist"):
        Collector(lacking, log, Metrics()).poll(0.1)
    log.close()


def test_records_that_kafka_dropped_are_missed_aloud(
    producer: KafkaProducer, settings: TrainerSettings, caplog: pytest.LogCaptureFixture
) -> None:
    (topic,) = settings.event_topics
    send(producer, topic, [event(i) for i in range(20)])
    collect(settings)
    send(producer, topic, [event(i) for i in range(20, 60)])
    with KafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers) as admin:
        admin.delete_records({TopicPartition(topic, 0): 25})
    with caplog.at_level(logging.ERROR):
        metrics = collect(settings)
    assert f"topic {topic}, partition 0: records 10 to 24 are no longer retained" in caplog.text
    assert metrics.registry.get_sample_value("streamscore_trainer_missing_records_total") == 15
    assert places(settings) == sorted([*((0, o) for o in (*range(10), *range(25, 30))), *((1, o) for o in range(30))])


def test_a_full_disk_is_said_and_waited_for_and_nothing_is_lost(
    producer: KafkaProducer, settings: TrainerSettings, little_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (topic,) = settings.event_topics
    send(producer, topic, [event(i, attributes={"noise": random.Random(i).randbytes(100).hex()}) for i in range(500)])
    settings = settings.model_copy(update={"log_directory": little_disk / "log"})
    log, metrics = EventLog(settings.log_directory), Metrics()
    ballast = little_disk / "ballast"
    ballast.write_bytes(b"x" * 200_000)
    waits = 0

    def wait(_: float) -> None:
        nonlocal waits
        waits += 1
        if waits == 3:  # somebody makes room
            ballast.unlink()

    collector = Collector(settings, log, metrics)
    follow(collector, lambda: collector.caught_up and log.waiting == 0, wait)
    log.close()
    assert waits == 3
    assert f"trying again: cannot write to log_directory {settings.log_directory}: No space left on device" in caplog.text
    assert caplog.text.count("No space left on device") == 1  # said once, not at every try
    assert metrics.registry.get_sample_value("streamscore_trainer_log_failures_total") == 3
    assert places(settings) == sorted((n % 2, n // 2) for n in range(500))


def flushes(settings: TrainerSettings) -> int:
    return max((file.last + 1 for file in files_in(settings.log_directory)), default=0) if settings.log_directory.exists() else 0


def test_a_topic_that_grows_is_followed(producer: KafkaProducer, settings: TrainerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions are assigned by hand, so nobody rebalances; new ones are found while it runs, and read from their start."""
    (topic,) = settings.event_topics
    send(producer, topic, [event(i) for i in range(20)])
    monkeypatch.setattr(collect_module, "METADATA_MS", 200)
    log, now = EventLog(settings.log_directory), 0.0
    collector = Collector(settings, log, Metrics(), clock=lambda: now)
    while not collector.caught_up:
        collector.poll(0.2)
    with KafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers) as admin:
        admin.create_partitions({topic: 3})
    with KafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers) as fresh:
        for i in range(20, 25):
            fresh.send(topic, event(i), partition=2, timestamp_ms=NOW_MS)
    deadline = time.monotonic() + 30
    while len(places(settings)) < 25 and time.monotonic() < deadline:
        now += 100  # as if it had been a while: time to look at the topics again
        collector.poll(0.1)
    collector.close()
    log.close()
    assert places(settings) == sorted([*((n % 2, n // 2) for n in range(20)), *((2, o) for o in range(5))])


def test_kill_9_at_random_moments(producer: KafkaProducer, settings: TrainerSettings) -> None:
    (topic,) = settings.event_topics
    total = 20_000
    send(producer, topic, [event(i) for i in range(total)])
    program = (
        "import sys; import trainer.collect as c; import trainer.log; from trainer.log import EventLog; trainer.log.FAN_IN = 3; "
        "from trainer.metrics import Metrics; from trainer.settings import TrainerSettings; c.MAX_POLL = 200; "
        "s = TrainerSettings.model_validate_json(sys.argv[1]); c.follow(c.Collector(s, EventLog(s.log_directory), Metrics()), bool, print)"
    )
    flushing = settings.model_copy(update={"log_flush_seconds": 0.001})
    chance = random.Random(7)
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", program, flushing.model_dump_json(exclude_none=True)], cwd=ROOT)
        goal = flushes(settings) + chance.randrange(2, 12)
        deadline = time.monotonic() + 20
        while flushes(settings) < goal and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.0005)  # the kill comes in the middle of whatever it does after the n-th flush
        process.kill()
        process.wait()
    before = len(places(settings))
    assert 0 < before < total, "the kills came too late to prove anything"
    collect(settings)
    assert places(settings) == sorted((n % 2, n // 2) for n in range(total))
