"""The demo from beginning to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass

from rich.console import Console

from demo.audit import read_back
from demo.board import Board, Observer
from demo.cast import TRAINER_NICE, Cast, Play, ends, feed, finished, programs
from demo.launch import Program
from demo.metrics import Endpoint
from demo.quality import Quality
from demo.servers import kafka, redis
from demo.shop import DAY_MS
from demo.summary import Summary
from demo.topics import topics
from demo.view import Refresh, shown
from demo.watch import Watch

TURN_S = 0.05
SWAP_PATIENCE_S = 60
"""How long a model that is still being fitted when the live part ends is waited for, if it would be the first to be swapped to."""


class Stuck(RuntimeError):
    """Something took too long. The message says what, and quotes who is to blame."""


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


@dataclass(frozen=True)
class Scene:
    """Lets time pass until something has come about, with an eye on the programs and the board."""

    board: Board
    observer: Observer
    refresh: Refresh
    cast: Cast

    def say(self, sentence: str) -> None:
        self.board.say(sentence)
        self.refresh()

    def look(self) -> None:
        self.cast.check()
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


def perform(play: Play, cast: Cast, board: Board, refresh: Refresh) -> Summary:
    """The plot."""
    stream, bootstrap, names = play.stream, cast.kafka.bootstrap, cast.names
    observer = Observer(board, stream, Endpoint(cast.worker_port), cast.trainer, cast.registry)
    scene = Scene(board, observer, refresh, cast)

    count = stream.live_from
    with feed(play, cast, "history") as shop:
        scene.wait(f"writing {count:,} events of history", lambda: finished(shop), 60 + count / 1000, shop)
    history = ends(cast)
    scene.wait("waiting for the first model", lambda: any(p.action == "promoted" for p in board.promotions), 180, cast.trainer)
    cast.trainer.step_back(TRAINER_NICE)
    scene.wait("catching up at full speed", lambda: board.events + board.dead_letters >= count, 60 + count / 500, cast.worker)

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
            cast.check()
            time.sleep(0.5)


def pace(speed: float) -> str:
    days = speed * 1000 / DAY_MS
    return "as fast as it goes" if days == float("inf") else "a day a second" if round(days, 2) == 1 else f"{days:.3g} days a second"
