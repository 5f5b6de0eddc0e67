"""The demo from beginning to end: who takes part, and the plot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kafka import KafkaConsumer
from rich.console import Console

from demo.audit import bounds, read_back
from demo.board import Board, Observer
from demo.launch import Program, ProgramEnded, program
from demo.metrics import Endpoint
from demo.process import free_port
from demo.quality import Quality
from demo.replay import File
from demo.servers import KafkaServer, RedisServer, kafka, redis
from demo.shop import DAY_MS
from demo.stream import Shop, Stream
from demo.summary import Summary
from demo.topics import Topics, topics
from demo.view import Refresh, shown
from demo.watch import Watch
from model.targets import CHURN, Target

TURN_S = 0.05
BAD_RECORDS = 24
ROUND_EVERY_S, ROUND_BUDGET_S = 25, 14
ROUND_SHARE = 0.4
"""Of the live part: where that is short, rounds follow each other more quickly, so that there is a model to swap to."""
SWAP_PATIENCE_S = 60
"""How long a model that is still being fitted when the live part ends is waited for, if it would be the first to be swapped to."""
TRAINER_NICE = 5
"""While events are live: there are two cores for everything, and whoever waits for a score comes first."""
YEARS_DAYS = 36_500


class Stuck(RuntimeError):
    """Something took too long. The message says what, and quotes who is to blame."""


@dataclass(frozen=True)
class Play:
    """What to play. `speed`: simulated seconds a second."""

    source: Shop | File
    stream: Stream
    purchase: Target
    speed: float
    plain: bool
    keep: bool

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


def run(play: Play, console: Console, tell: Callable[[Summary], None]) -> None:
    """Raises what ended it early: StartFailed, ProgramEnded, Stuck, KeyboardInterrupt. Whatever it was, nothing is left behind."""
    board = Board()
    console.print("starting Apache Kafka and Redis", style="dim")
    with (
        kafka(say=console.print) as broker,
        redis(say=console.print) as store,
        topics(broker, store) as names,
        programs(play, broker, store, names) as cast,
    ):
        with shown(board, console, plain=play.plain) as refresh:
            summary = perform(play, cast, board, refresh)
        tell(summary)
        if play.keep:
            keep(cast, console)


def perform(play: Play, cast: Cast, board: Board, refresh: Refresh) -> Summary:
    """The plot."""
    stream, bootstrap, names = play.stream, cast.kafka.bootstrap, cast.names
    observer = Observer(board, stream, Endpoint(cast.worker_port), cast.trainer, cast.registry)
    scene = Scene(board, observer, refresh, (cast.worker, cast.trainer))

    with feed(play, cast, "history") as shop:
        scene.wait(f"writing {stream.live_from:,} events of history", lambda: finished(shop), 120, shop)
    history = ends(cast)
    scene.wait("waiting for the first model", lambda: bool(board.promotions), 180, cast.trainer)
    cast.trainer.step_back(TRAINER_NICE)
    scene.wait("catching up at full speed", lambda: board.events >= stream.live_from, 300, cast.worker)

    quality = Quality(stream, {target.name: (target.types, target.outcome, target.horizon_ms) for target in play.targets})
    with closing(Watch(bootstrap, names, stream, quality)) as observer.watch:
        watch = observer.watch
        scene.wait("reading the history's scores", lambda: watch.answered(history), 120, cast.worker)
        with feed(play, cast, "live") as shop:
            scene.wait(f"live, {pace(play.speed)}", lambda: finished(shop), play.live_s * 1.5 + 600, shop)
        everything = ends(cast)
        scene.wait("waiting for the last scores", lambda: watch.answered(everything), 120, cast.worker)
        cast.trainer.step_back(0)
        with suppress(Stuck):  # no swap: the summary says so
            scene.wait("waiting for a model to swap to", lambda: board.swaps > 0, SWAP_PATIENCE_S, cast.trainer)
        scene.look()
        observer.measure(quality, stream.end_ms)
        visible = watch.visible.overall()
    observer.watch = None

    if not play.keep:
        scene.say("stopping the worker and the trainer")
        cast.worker.stop()
        cast.trainer.stop()
    scene.say("reading everything back from Kafka")
    return Summary.of(board, read_back(bootstrap, names, history), visible)


@dataclass(frozen=True)
class Scene:
    """Lets time pass until something has come about, with an eye on the programs and the board."""

    board: Board
    observer: Observer
    refresh: Refresh
    programs: Sequence[Program]

    def say(self, sentence: str) -> None:
        self.board.say(sentence)
        self.refresh()

    def look(self) -> None:
        for each in self.programs:
            each.check()
        if self.observer.look():
            self.refresh()

    def wait(self, sentence: str, condition: Callable[[], bool], limit_s: float, culprit: Program) -> None:
        self.say(sentence)
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                raise Stuck(f"Still {sentence} after {limit_s:.0f} s. {culprit.last_words()}")
            time.sleep(TURN_S)
            self.look()


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
    history_users = len(set(stream.history.user[: stream.live_from].tolist()))
    trainer_settings = {
        "GROUP": names.trainer_group,
        "METRICS_PORT": trainer_port,
        "TARGETS": targets,
        "WINDOW_DAYS": round((stream.end_ms - int(stream.history.time_ms[0])) / DAY_MS) + 1,
        # The first round begins when the whole history is there, and not before.
        "MIN_EVENTS": stream.live_from,
        "MIN_USERS": history_users,
        "MIN_DAYS": 1,
        "LOG_FLUSH_SECONDS": 1,
        "ROUND_INTERVAL_SECONDS": min(ROUND_EVERY_S, ROUND_SHARE * play.live_s + 1),
        "ROUND_BUDGET_SECONDS": ROUND_BUDGET_S,
        "THREADS": 1,
        "NICE": TRAINER_NICE,
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
    with program("trainer", ["trainer", "run"], {**shared, **prefixed("TRAINER", trainer_settings)}) as trainer:
        registry = {"STREAMSCORE_REGISTRY": trainer.directory / "registry"}
        settings = {**shared, **registry, **prefixed("WORKER", worker_settings)}
        with program("worker", ["worker", "run"], settings, patience_s=15) as worker:
            yield Cast(kafka, redis, names, trainer, worker, trainer_port, worker_port)


@contextmanager
def feed(play: Play, cast: Cast, part: str) -> Iterator[Program]:
    """The shop, writing one part of the stream."""
    arguments = [
        *("--bootstrap", cast.kafka.bootstrap, "--topic", cast.names.events, "--part", part),
        *("--speed", str(play.speed), "--bad", str(BAD_RECORDS if play.stream.law else 0)),  # a file of one's own is as bad as it is
        *play.source.arguments(),
    ]
    with program("shop", ["demo.feed", *arguments], {}, nice=5) as shop:
        yield shop


def finished(shop: Program) -> bool:
    """Whether it has written its part. Raises ProgramEnded if it ended without."""
    if shop.alive:
        return False
    if not any("written" in line for line in shop.log[-1:]):
        raise ProgramEnded(f"The {shop.name} ended before its part was written. {shop.last_words()}")
    return True


def keep(cast: Cast, console: Console) -> None:
    """Until Ctrl-C."""
    addresses = {
        "Kafka": f"{cast.kafka.bootstrap}   topics {cast.names.events}, {cast.names.scores}, {cast.names.dead_letters}",
        "Redis": cast.redis.url,
        "worker": f"http://127.0.0.1:{cast.worker_port}/metrics   log {cast.worker.process.log}",
        "trainer": f"http://127.0.0.1:{cast.trainer_port}/metrics   log {cast.trainer.process.log}",
        "models": str(cast.registry),
    }
    console.print("\nStill running, until Ctrl-C:")
    for name, address in addresses.items():
        console.print(f"  {name:8} {address}", markup=False, highlight=False, soft_wrap=True)
    with suppress(KeyboardInterrupt):
        while True:
            cast.worker.check()
            cast.trainer.check()
            time.sleep(0.5)


def ends(cast: Cast) -> dict[int, int]:
    """End offset of every event partition."""
    with KafkaConsumer(bootstrap_servers=cast.kafka.bootstrap) as consumer:
        return {number: end for number, (_, end) in bounds(consumer, cast.names.events).items()}


def pace(speed: float) -> str:
    days = speed * 1000 / DAY_MS
    return "as fast as it goes" if days == float("inf") else "a day a second" if round(days, 2) == 1 else f"{days:.3g} days a second"


def prefixed(program: str, settings: dict[str, object]) -> dict[str, object]:
    return {f"STREAMSCORE_{program}_{name}": value for name, value in settings.items()}


def written(target: Target) -> str:
    """As in the settings: `purchase=purchase:occurs:7d`."""
    return f"{target.name}={'+'.join(target.types)}:{target.outcome}:{target.horizon_ms // DAY_MS}d"
