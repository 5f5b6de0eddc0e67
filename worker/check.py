"""`python -m worker check`: the settings held against the live servers. Nothing that a running worker depends on is changed.

One line a check: `ok`, `note` (it works; know this), or `WRONG` with what to do. A part is given up after PART_SECONDS.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
import torch
from kafka import KafkaAdminClient
from kafka import errors as E
from kafka.admin import ConfigResource, ConfigResourceType

from model.artifact import ArtifactError
from model.events import DAY_MS
from model.registry import Registry
from worker.acquire import rebuild_by
from worker.reach import PROBE_SECONDS, why_not
from worker.record import chunk_slots
from worker.settings import WorkerSettings
from worker.store import Applied, Store, StoreError, StoreUnavailable, connect
from worker.transaction import ANSWER_MS, bounded
from worker.transaction import connect as connect_kafka
from worker.transport import Bounds, FatalTransportError, Partition, Position, TransportError
from worker.transport_kafka import KafkaTransport

T = TypeVar("T")
PART_SECONDS = 15.0
OLDEST_REDIS = (6, 2)
HEADER_BYTES = 1024  # about what the reason of a dead letter takes


class Report:
    """Prints findings as they come, and counts what is wrong."""

    def __init__(self) -> None:
        self.wrongs = 0

    def ok(self, about: str, sentence: str) -> None:
        print(f"ok     {about}: {sentence}", flush=True)

    def note(self, about: str, sentence: str) -> None:
        print(f"note   {about}: {sentence}", flush=True)

    def wrong(self, about: str, sentence: str) -> None:
        self.wrongs += 1
        print(f"WRONG  {about}: {sentence}", flush=True)

    def part(self, about: str, find: Callable[[], T]) -> T | None:
        """A part of the check. What it raises ends that part alone; None then."""
        try:
            return bounded(find, PART_SECONDS)
        except E.KafkaTimeoutError:
            self.wrong(about, f"no answer in {PART_SECONDS:.0f} s")
        except (TransportError, FatalTransportError, StoreUnavailable, StoreError) as error:
            self.wrong(about, str(error))
        return None


def check(settings: WorkerSettings) -> int:
    """Exit status: 0 if everything is as it must be, 1 if something is wrong."""
    logging.getLogger("kafka").setLevel(logging.CRITICAL)  # what it would say is said here, once and in words
    report = Report()
    transport = report.part("Kafka", lambda: _kafka(settings, report))
    partitions = transport and report.part("topics", lambda: _topics(settings, transport, report))
    client = report.part("Redis", lambda: _redis(settings, report))
    if transport and partitions and client:
        report.part("states", lambda: _states(settings, transport, client, partitions, report))
    report.part("model", lambda: _model(settings, report))
    if transport:
        transport.close()
    print(f"{report.wrongs} WRONG" if report.wrongs else "nothing is wrong")
    return 1 if report.wrongs else 0


def _kafka(settings: WorkerSettings, report: Report) -> KafkaTransport | None:
    """A transport of the check's own: with the worker's transactional id it would end the transaction of a worker that runs."""
    own_id = settings.transactional_id.removeprefix(f"{settings.group}-") + "-check"
    try:
        transport = KafkaTransport(settings.model_copy(update={"worker_id": own_id}))
    except (TransportError, FatalTransportError) as error:
        reasons = [sentence for server in settings.kafka_bootstrap_servers.split(",") if (sentence := why_not(server.strip(), settings))]
        report.wrong("Kafka", "; ".join(reasons) or str(error))
        return None
    report.ok("Kafka", f"{settings.kafka_bootstrap_servers} answers")
    return transport


@dataclass(frozen=True)
class Topic:
    """partitions: how many. config: what the broker says of it, empty where it does not let this user know."""

    partitions: int
    config: dict[str, str]

    def number(self, name: str) -> int | None:
        return int(self.config[name]) if name in self.config else None


def _topics(settings: WorkerSettings, transport: KafkaTransport, report: Report) -> int | None:
    """The partitions of the event topics, None where they do not agree or are not all there."""
    found = {name: topic for name in settings.event_topics if (topic := _topic("event topic", name, settings, transport, report))}
    scores = _topic("score topic", settings.score_topic, settings, transport, report)
    letters = _topic("dead-letter topic", settings.dead_letter_topic, settings, transport, report)
    counts = {name: topic.partitions for name, topic in found.items()}
    for name, topic in found.items():
        _event_topic(name, topic, report)
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name}: {count}" for name, count in counts.items())
        report.wrong("event topics", f"not co-partitioned ({shown}): give them the same number of partitions and the same keys")
    partitions = next(iter(counts.values())) if len(found) == len(settings.event_topics) and len(set(counts.values())) == 1 else None
    if scores:
        same = scores.partitions == partitions
        (report.ok if same or not partitions else report.note)(
            "score topic",
            f"{settings.score_topic}, partitions: {scores.partitions}"
            + ("" if same or not partitions else f", unlike the event topics ({partitions}): scores go by the hash of the user id"),
        )
    if letters:
        _dead_letter_topic(settings.dead_letter_topic, letters, found, report)
    if settings.guarantee == "exactly_once":
        transport.publish([], {})
        transport.settle()
        report.ok("transactions", "one was begun and committed")
    return partitions


def _topic(about: str, name: str, settings: WorkerSettings, transport: KafkaTransport, report: Report) -> Topic | None:
    try:
        partitions = transport.partition_count(name)
    except FatalTransportError as error:
        report.wrong(about, str(error))
        return None
    admin: Any = connect_kafka(KafkaAdminClient, settings, client_id=settings.transactional_id, request_timeout_ms=ANSWER_MS)
    try:
        asked = ConfigResource(ConfigResourceType.TOPIC, name)
        config = admin.describe_configs([asked], config_filter="all")["topic"][name]
    except E.KafkaError as error:
        report.note(about, f"what {name} is configured to take and keep cannot be looked up: {error}")
        config = {}
    finally:
        admin.close()
    return Topic(partitions, {key: entry["value"] for key, entry in config.items()})


def _event_topic(name: str, topic: Topic, report: Report) -> None:
    if "compact" in topic.config.get("cleanup.policy", ""):
        report.wrong("event topic", f"{name} is compacted: events that a replay needs go missing; set its cleanup.policy to delete")
        return
    kept = []
    if (retention_ms := topic.number("retention.ms")) is not None and retention_ms >= 0:
        kept.append(f"{retention_ms / DAY_MS:g} days")
    if (retention_bytes := topic.number("retention.bytes")) is not None and retention_bytes >= 0:
        kept.append(f"{retention_bytes:,} bytes a partition")
    text = f"{name}, partitions: {topic.partitions}"
    if topic.config:
        reach = f"states can be rebuilt from the last {' or '.join(kept)}" if kept else "nothing expires, states can be rebuilt in full"
        text += f"; {reach}"
    report.ok("event topic", text)


def _dead_letter_topic(name: str, topic: Topic, event_topics: dict[str, Topic], report: Report) -> None:
    if "compact" in topic.config.get("cleanup.policy", ""):
        report.wrong("dead-letter topic", f"{name} is compacted: it refuses records without a key; set its cleanup.policy to delete")
        return
    takes = topic.number("max.message.bytes")
    brought = max((t.number("max.message.bytes") or 0 for t in event_topics.values()), default=0)
    if takes is not None and takes < brought:
        report.wrong(
            "dead-letter topic",
            f"{name} takes messages of {takes:,} bytes, the event topics of {brought:,}: larger dead letters would be cut short; "
            f"set its max.message.bytes to {brought + HEADER_BYTES:,}",
        )
        return
    report.ok("dead-letter topic", name + (f", messages of up to {takes:,} bytes" if takes is not None else ""))


def _redis(settings: WorkerSettings, report: Report) -> redis.Redis | None:
    timeout_seconds = min(settings.redis_timeout_seconds, PROBE_SECONDS)
    try:
        client = connect(
            settings.redis_url.get_secret_value(),
            cluster=settings.redis_cluster,
            timeout_seconds=timeout_seconds,
            ssl_cafile=settings.redis_ssl_cafile,
        )
        info = _info(client)
    except ValueError as error:
        report.wrong("Redis", str(error))
        return None
    except redis.AuthenticationError:
        report.wrong("Redis", "refuses this login: write its user and password into redis_url, as in redis://USER:PASSWORD@HOST:PORT/0")
        return None
    except (redis.RedisError, OSError) as error:
        report.wrong("Redis", f"does not answer: {error}; check redis_url, and that it is up")
        return None
    if not settings.redis_cluster and info.get("redis_mode") == "cluster":
        report.wrong("Redis", "is a node of a Redis Cluster: set redis_cluster to true")
        return None
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_REDIS:
        report.wrong("Redis", f"version {version} is too old: install 6.2 or later")
    elif info.get("role") != "master":
        report.wrong("Redis", "is a read-only replica: point redis_url at the primary")
    elif refusal := _refusal(client, settings.group):
        report.wrong("Redis", f"refuses a write: {refusal}")
    else:
        report.ok("Redis", f"version {version}, takes writes")
    _eviction(info, report)
    return client


def _info(client: redis.Redis) -> dict[str, Any]:
    if isinstance(client, redis.RedisCluster):
        return dict(client.info(target_nodes=client.get_primaries()[0]))
    return dict(client.info())


def _refusal(client: redis.Redis, group: str) -> str:
    """Why Redis does not take a write, "" if it does."""
    try:
        client.set(f"{{{group}:check}}:{secrets.token_hex(4)}", b"", px=1000)
    except redis.RedisError as error:
        return f"{error}: free memory or disk, or let this user write the keys {{{group}:*}}*"
    return ""


def _eviction(info: dict[str, Any], report: Report) -> None:
    policy = str(info.get("maxmemory_policy", "noeviction"))
    limit = int(info.get("maxmemory", 0))
    about = "Redis memory"
    if policy.startswith("allkeys") and limit:
        report.wrong(
            about,
            f"maxmemory-policy {policy} silently drops users' states when {limit:,} bytes are full: set it to noeviction; the worker then "
            f"waits, and says so",
        )
    elif policy.startswith("allkeys"):
        report.note(about, f"maxmemory-policy {policy} would silently drop users' states as soon as a maxmemory is set: set noeviction")
    elif policy != "noeviction":
        report.note(
            about,
            f"maxmemory-policy {policy} drops keys of other programs only, as the worker's have no expiry; noeviction says what is meant",
        )
    else:
        report.ok(about, "nothing is evicted" + (f", up to {limit:,} bytes" if limit else "; no maxmemory, so the machine's is the limit"))


def _states(settings: WorkerSettings, transport: KafkaTransport, client: redis.Redis, partitions: int, report: Report) -> None:
    """Whether the states in Redis and the offsets in Kafka belong together. Redis first: a worker that runs commits to Kafka first."""
    slots = chunk_slots(settings.history_events)
    applied = {n: found for n in range(partitions) if (found := Store(client, settings.group, n, slots).acquire())}
    numbers = [Partition(topic, n) for topic in settings.event_topics for n in range(partitions)]
    committed = transport.committed(numbers)
    bounds = transport.bounds(numbers)
    rebuild = rebuild_by(settings.group)
    if moved := {a.partitions for a in applied.values()} - {partitions}:
        report.wrong(
            "states",
            f"were built with {moved.pop()} partitions, the event topics have {partitions}: users are in the wrong places; {rebuild}",
        )
    elif settings.guarantee == "exactly_once" and (ahead := _ahead(applied, committed)):
        report.wrong("states", f"are ahead of the group's offsets in {ahead}: offsets were moved back, or Kafka lost data; {rebuild}")
    else:
        _replay(applied, committed, bounds, partitions, report)


def _ahead(applied: dict[int, Applied], committed: dict[Partition, Position]) -> str:
    found = [
        f"{topic}/{n}"
        for n, a in applied.items()
        for topic, offset in a.offsets.items()
        if (position := committed.get(Partition(topic, n))) and offset > position.offset
    ]
    return ", ".join(found)


def _replay(
    applied: dict[int, Applied],
    committed: dict[Partition, Position],
    bounds: dict[Partition, Bounds],
    partitions: int,
    report: Report,
) -> None:
    replay = lost = 0
    for partition, position in committed.items():
        known = applied.get(partition.number)
        start = known.offsets.get(partition.topic) if known else None
        first = bounds[partition].first
        lost += max(first - start, 0) if start is not None else 0
        replay += max(position.offset - max(first if start is None else start, first), 0)
    if not committed:
        report.ok("states", "none yet: this group has not begun")
    elif lost:
        report.note("states", f"{lost:,} records that they still need have expired in Kafka: they go on without them")
    elif len(applied) < partitions:
        report.note(
            "states",
            f"in Redis for {len(applied)} of {partitions} partitions: the worker first replays {replay:,} records",
        )
    else:
        report.ok("states", f"in Redis for all {partitions} partitions" + (f"; {replay:,} records to be replayed" if replay else ""))


def _model(settings: WorkerSettings, report: Report) -> None:
    try:
        device = torch.device("cpu" if settings.device == "auto" else settings.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        report.wrong("device", f"{settings.device!r} is not there: set device to auto, cpu, cuda or cuda:1")
        device = torch.device("cpu")
    try:
        registry = Registry(settings.registry)
        pointer = registry.current()
        if pointer is None:
            report.wrong("model", f"none in {settings.registry} yet: start the trainer, or correct registry; the worker would wait")
            return
        model = registry.load(pointer, device)
        scorer = model.scorer(settings.targets)
    except ArtifactError as error:
        report.wrong("model", f"{error}; promote another version, or correct targets")
    except Exception as error:  # the storage: whatever an fsspec backend raises
        report.wrong("model", f"the registry {settings.registry} cannot be read: {error}")
    else:
        names = ", ".join(target.name for target in scorer.targets)
        report.ok("model", f"{pointer.version} of {model.manifest.created_at:%Y-%m-%d %H:%M}, answers {names}")
