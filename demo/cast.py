"""Who takes part: the trainer, the worker and the shop, with the settings that make a demo of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kafka import KafkaConsumer

from demo.audit import bounds
from demo.launch import Program, ProgramEnded, program
from demo.process import free_port
from demo.replay import File
from demo.servers import KafkaServer, RedisServer
from demo.shop import DAY_MS
from demo.stream import Shop, Stream
from demo.topics import Topics
from model.targets import CHURN, Target

BAD_RECORDS = 24
ROUND_EVERY_S, ROUND_BUDGET_S = 40, 14
ROUND_SHARE = 0.4
"""Of the live part: where that is short, rounds follow each other more quickly, so that there is a model to swap to."""
TRAINER_NICE = 19
"""While events are live: there are two cores for everything, and whoever waits for a score comes first."""
YEARS_DAYS = 36_500


@dataclass(frozen=True)
class Play:
    """What to play. `speed`: simulated seconds a second. `trainer`: settings of the trainer that differ from the demo's."""

    source: Shop | File
    stream: Stream
    purchase: Target
    speed: float
    plain: bool
    keep: bool
    trainer: Mapping[str, object] = field(default_factory=dict)

    @property
    def live_s(self) -> float:
        return self.stream.live_days * DAY_MS / 1000 / self.speed

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.purchase, CHURN


@dataclass(frozen=True)
class Cast:
    """Who takes part, and where to find them."""

    kafka: KafkaServer
    redis: RedisServer
    names: Topics
    trainer: Program
    worker: Program
    trainer_port: int
    worker_port: int

    @property
    def registry(self) -> Path:
        return self.trainer.directory / "registry"

    def check(self) -> None:
        """Raises ProgramEnded for whoever is no longer there."""
        servers = [Program(p.name, p) for p in (self.kafka.process, self.redis.process) if p]
        for each in (*servers, self.trainer, self.worker):
            each.check()


@contextmanager
def programs(play: Play, kafka: KafkaServer, redis: RedisServer, names: Topics) -> Iterator[Cast]:
    """The trainer and the worker, on their way up. They end in the order in which scores stop being needed: worker, trainer."""
    trainer_port, worker_port = free_port(), free_port()
    shared = {
        "STREAMSCORE_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
        "STREAMSCORE_EVENT_TOPICS": names.events,
        "STREAMSCORE_METRICS_HOST": "127.0.0.1",
        "STREAMSCORE_MAX_AGE_DAYS": YEARS_DAYS,  # a file may be of any age
    }
    stream, targets = play.stream, ",".join(map(written, play.targets))
    trainer_settings = {
        "GROUP": names.trainer_group,
        "METRICS_PORT": trainer_port,
        "TARGETS": targets,
        "WINDOW_DAYS": round((stream.end_ms - int(stream.history.time_ms[0])) / DAY_MS) + 1,
        # The first round begins when the whole history is there, and not before.
        "MIN_EVENTS": stream.live_from if stream.law else int(stream.live_from * 0.9),  # some of a file's may be no good
        "MIN_USERS": 1,
        "MIN_DAYS": 1,
        "LOG_FLUSH_SECONDS": 1,
        "ROUND_INTERVAL_SECONDS": min(ROUND_EVERY_S, ROUND_SHARE * play.live_s + 1),
        "ROUND_BUDGET_SECONDS": ROUND_BUDGET_S,
        "THREADS": 1,
        "NICE": TRAINER_NICE,
        **play.trainer,
    }
    worker_settings = {
        "GROUP": names.worker_group,
        "METRICS_PORT": worker_port,
        "WORKER_ID": "demo",
        "SCORE_TOPIC": names.scores,
        "DEAD_LETTER_TOPIC": names.dead_letters,
        "REDIS_URL": redis.url,
        "MODEL_POLL_SECONDS": 1,
    }
    with program("The trainer", ["trainer", "run"], {**shared, **prefixed("TRAINER", trainer_settings)}) as trainer:
        registry = {"STREAMSCORE_REGISTRY": trainer.directory / "registry"}
        settings = {**shared, **registry, **prefixed("WORKER", worker_settings)}
        with program("The worker", ["worker", "run"], settings, patience_s=15) as worker:
            yield Cast(kafka, redis, names, trainer, worker, trainer_port, worker_port)


@contextmanager
def feed(play: Play, cast: Cast, part: str) -> Iterator[Program]:
    """The shop, writing one part of the stream."""
    arguments = [
        *("--bootstrap", cast.kafka.bootstrap, "--topic", cast.names.events, "--part", part),
        *("--speed", str(play.speed), "--bad", str(BAD_RECORDS if play.stream.law else 0)),  # a file of one's own is as bad as it is
        *play.source.arguments(),
    ]
    with program("The shop", ["demo.feed", *arguments], {}, nice=5) as shop:
        yield shop


def finished(shop: Program) -> bool:
    """Whether it has written its part. Raises ProgramEnded if it ended without."""
    if shop.alive:
        return False
    if not any("written" in line for line in shop.log[-1:]):
        raise ProgramEnded(f"{shop.name} ended before its part was written. {shop.last_words()}")
    return True


def ends(cast: Cast) -> dict[int, int]:
    """End offset of every event partition."""
    with KafkaConsumer(bootstrap_servers=cast.kafka.bootstrap) as consumer:
        return {number: end for number, (_, end) in bounds(consumer, cast.names.events).items()}


def prefixed(program: str, settings: dict[str, object]) -> dict[str, object]:
    return {f"STREAMSCORE_{program}_{name}": value for name, value in settings.items()}


def written(target: Target) -> str:
    """As in the settings: `purchase=purchase:occurs:7d`."""
    return f"{target.name}={'+'.join(target.types)}:{target.outcome}:{target.horizon_ms // DAY_MS}d"
