"""python -m bench drift: a shop changes its behaviour one day; how soon the running service follows, from event to promoted weights.

The demo's cast plays (Kafka, Redis, `worker run`, `trainer run`, and the shop writing its stream day by day), with both rhythms at work.
From one live day on a promotion is on: carts and purchases come several times as often. The table is of the scores that the worker has
published: `excess` is their expected log-loss beyond that of the exact filter, which knows the promotion from its first moment on.

Seconds are counted on the wall clock, from the arrival of the first drifted event in Kafka to the promotion of the first heads, and of the
first encoder, that have learnt from drifted events. A round brings new heads, too, and holds up a refresh for as long as it takes. A day of
the stream takes a second, so the periods of the rhythms are seconds, too. Nothing outlives the bench, whatever ends it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime

import numpy as np
from rich.console import Console

from demo.audit import records
from demo.board import Board, Observer
from demo.cast import Cast, Play, ends, feed, finished, programs
from demo.launch import ProgramEnded
from demo.metrics import Endpoint
from demo.process import StartFailed
from demo.quality import Quality
from demo.run import Scene, Stuck
from demo.servers import kafka, redis
from demo.shop import DAY_MS, Ints
from demo.stream import Shop, Stream
from demo.topics import topics
from demo.watch import Watch
from model.artifact import Manifest
from model.events import EventDecoder
from model.registry import Registry
from model.targets import PURCHASE
from trainer.judges import unseen_from

PROMOTION = 3.0
HISTORY_DAYS, DRIFT_DAY = 85, 35
STRETCH_DAYS = 5
TRAINER = {
    "REFRESH_INTERVAL_SECONDS": 6,
    "ROUND_INTERVAL_SECONDS": 90,
    "WINDOW_DAYS": 90,
    "ROUND_BUDGET_SECONDS": 20,
    "MIN_DAYS": HISTORY_DAYS - 0.5,  # the first round begins when the history is there
    "MIN_EVENTS": 1000,
    "NICE": 5,
    "REPORT": False,
    "KEEP_VERSIONS": 1000,  # all manifests are looked at
}
RECOVERED = 0.25
"""Share of the harm done that may be left where the service counts as recovered."""


@dataclass(frozen=True)
class Stretch:
    """Live days [begin, end). excess: by target, nats. model: the newest that the worker has run by its end."""

    begin: float
    end: float
    excess: dict[str, float]
    model: str

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.excess.values())))


@dataclass(frozen=True)
class Step:
    """A promotion. at: epoch seconds. part: what is new, the encoder and its heads, or the heads alone.

    heads_until_ms, learnt_until_ms: where the events end that the heads, and what the rhythm is for, were fitted on.
    """

    at: float
    version: str
    part: str
    rhythm: str
    heads_until_ms: int
    learnt_until_ms: int
    reason: str


@dataclass
class Course:
    """The table, printed as it grows."""

    stream: Stream
    quality: Quality
    board: Board
    registry: Registry
    out: Console
    stretches: list[Stretch] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    watch: Watch | None = None
    _seen: int = 0

    def look(self) -> None:
        """Print what has come: promotions, and stretches that are over."""
        for decision in self.board.promotions[self._seen :]:
            self._seen += 1
            if decision.action == "promoted":
                step = self._step(decision.version)
                self.steps.append(step)
                days = [f"{(ms - self.stream.live_ms) / DAY_MS:.0f}" for ms in sorted({step.learnt_until_ms, step.heads_until_ms})]
                what = f"{step.part}, learnt until day {', heads '.join(days)}"
            else:
                what = decision.version
            self.out.print(f"{'':11}{decision.action} {what}: {decision.reason}", soft_wrap=True)
        while self.watch and self.watch.now_ms > self._moment((end := self._begin + STRETCH_DAYS) + 1):
            self.over(end)

    @property
    def _begin(self) -> float:
        return self.stretches[-1].end if self.stretches else 0.0

    def over(self, end: float) -> None:
        """A stretch has ended."""
        excess = self.quality.excess(self._moment(self._begin), self._moment(end))
        stretch = Stretch(self._begin, end, {n: round(v, 5) for n, v in excess.items()}, self.board.running or "")
        self.stretches.append(stretch)
        words = "".join(f"  {name} {value:.4f}" for name, value in stretch.excess.items())
        mark = "  the promotion begins" if stretch.begin <= DRIFT_DAY < stretch.end else ""
        self.out.print(f"{stretch.begin:4.0f} to {end:3.0f}  excess {stretch.mean:.4f} {words}{mark}", soft_wrap=True)

    def _moment(self, live_day: float) -> int:
        return self.stream.live_ms + int(live_day * DAY_MS)

    def _step(self, version: str) -> Step:
        manifests = {m.version: m for m in self.registry.versions()}
        manifest = manifests[version]
        before = manifests[self.steps[-1].version] if self.steps else None
        decision = next(d for d in self.registry.decisions() if d["version"] == version and d["action"] == "promoted")
        until_ms, part, rhythm = learnt(manifest, before)
        at = datetime.fromisoformat(decision["at"]).timestamp()
        return Step(at, version, part, rhythm, manifest.window.end_ms, until_ms, decision["reason"])


def learnt(manifest: Manifest, before: Manifest | None) -> tuple[int, str, str]:
    """(until when what is new in a model was fitted, what that is, by which rhythm)."""
    part = "heads" if before and manifest.encoder_id == before.encoder_id else "encoder"
    rhythm = "refresh" if before and unseen_from(manifest.window) == unseen_from(before.window) else "round"
    return unseen_from(manifest.window) if rhythm == "round" else manifest.window.end_ms, part, rhythm


@dataclass(frozen=True)
class Arrivals:
    """Events in the order of their time, and when Kafka had each (E,), both in epoch milliseconds."""

    event_ms: Ints
    arrived_ms: Ints

    @classmethod
    def of(cls, bootstrap: str, topic: str) -> Arrivals:
        decoder = EventDecoder()
        found = [(r.timestamp, r.value) for r in records(bootstrap, topic)]
        columns, _ = decoder.columns([value for _, value in found], [at for at, _ in found])
        order = np.argsort(columns.time_ms, kind="stable")
        return cls(columns.time_ms[order], np.array([at for at, _ in found])[columns.index][order])

    def first_from(self, event_ms: int) -> float:
        """When the first event at or after that time arrived, in epoch seconds."""
        return float(self.arrived_ms[np.searchsorted(self.event_ms, event_ms)]) / 1000

    def last_before(self, event_ms: int) -> float:
        return float(self.arrived_ms[np.searchsorted(self.event_ms, event_ms) - 1]) / 1000


def perform(play: Play, cast: Cast, course: Course, scene: Scene) -> None:
    """The plot: history, a first model, the live part."""
    count, out = play.stream.live_from, course.out
    with feed(play, cast, "history") as shop:
        scene.wait(f"writing {count:,} events of history", lambda: finished(shop), 60 + count / 1000, shop)
    history = ends(cast)
    scene.wait("waiting for the first model", lambda: len(course.steps) > 0, 240, cast.trainer)
    scene.wait("catching up", lambda: scene.board.events + scene.board.dead_letters >= count, 60 + count / 500, cast.worker)
    with closing(Watch(cast.kafka.bootstrap, cast.names, play.stream, course.quality)) as watch:
        scene.observer.watch = course.watch = watch
        scene.wait("reading the history's scores", lambda: watch.answered(history), 120, cast.worker)
        said = f"live, a day a second: excess log-loss of the published scores, nats; the promotion begins on day {DRIFT_DAY}"
        out.print(said, soft_wrap=True)
        with feed(play, cast, "live") as shop:
            scene.wait("live", lambda: finished(shop), play.live_s * 1.5 + 600, shop)
        everything = ends(cast)
        scene.wait("waiting for the last scores", lambda: watch.answered(everything), 120, cast.worker)
        watch.update()
        scene.look()
        course.look()
    scene.observer.watch = None


def figures(course: Course, arrivals: Arrivals, said: dict[str, float]) -> dict[str, object]:
    """What came of it."""
    drift = course.stream.drift
    assert drift
    begin = arrivals.first_from(drift.at_ms)
    before = float(np.mean([s.mean for s in course.stretches if s.end <= DRIFT_DAY]))
    after = [s for s in course.stretches if s.begin >= DRIFT_DAY]
    worst = max(s.mean for s in after)
    enough = before + RECOVERED * (worst - before)
    # It has recovered where no later stretch is above: one lucky stretch is none.
    lasting = [s for i, s in enumerate(after) if all(later.mean <= enough for later in after[i:])]
    heads = next((s for s in course.steps if s.heads_until_ms > drift.at_ms), None)
    encoder = next((s for s in course.steps if s.part == "encoder" and s.learnt_until_ms > drift.at_ms), None)
    took = {step.rhythm: step.at - arrivals.last_before(step.learnt_until_ms) for step in course.steps}
    return {
        "excess_before": round(before, 5),
        "excess_worst": round(worst, 5),
        "excess_last": round(float(np.mean([s.mean for s in after[-4:]])), 5),
        "seconds_to_heads": round(heads.at - begin, 1) if heads else None,
        "seconds_to_encoder": round(encoder.at - begin, 1) if encoder else None,
        "recovered_from_day": lasting[0].begin - DRIFT_DAY if lasting else None,
        "event_to_promotion_measured": {rhythm: round(seconds, 1) for rhythm, seconds in took.items()},
        "event_to_promotion_said": said,
    }


def said_by(trainer: Endpoint) -> dict[str, float]:
    """The trainer's own measure, by rhythm."""
    series = trainer.metrics()
    name = 'streamscore_trainer_event_to_promotion_seconds{rhythm="%s"}'
    return {rhythm: round(series[name % rhythm], 1) for rhythm in ("round", "refresh") if name % rhythm in series}


def run(users: int, seed: int, seconds: int, as_json: bool) -> int:
    """The exit status: 0 where the service has recovered by heads and by an encoder that know of the promotion."""
    out = Console(stderr=as_json, highlight=False)
    source = Shop(users, seed, int(time.time() * 1000), HISTORY_DAYS, DRIFT_DAY + seconds, PROMOTION, DRIFT_DAY)
    stream = source.load()
    play = Play(source, stream, PURCHASE, DAY_MS / 1000, plain=True, keep=False, trainer=TRAINER)
    quality = Quality(stream, {t.name: (t.types, t.outcome, t.horizon_ms) for t in play.targets})
    out.print(
        f"{users:,} users, {len(stream.history.time_ms):,} events; {', '.join(f'{k.lower()} = {v}' for k, v in TRAINER.items())}",
        soft_wrap=True,
    )
    with (
        kafka(say=out.print) as broker,
        redis(say=out.print) as store,
        topics(broker, store) as names,
        programs(play, broker, store, names) as cast,
    ):
        board = Board()
        course = Course(stream, quality, board, Registry(str(cast.registry)), out)
        observer = Observer(board, stream, Endpoint(cast.worker_port), cast.trainer, cast.registry)
        perform(play, cast, course, Scene(board, observer, course.look, cast))
        said = said_by(Endpoint(cast.trainer_port))
        made = figures(course, Arrivals.of(broker.bootstrap, names.events), said)
    for name, value in made.items():
        out.print(f"{name.replace('_', ' '):30} {value}", soft_wrap=True)
    if as_json:
        table = {"stretches": [asdict(s) for s in course.stretches], "promotions": [asdict(s) for s in course.steps]}
        print(json.dumps({**made, **table}), flush=True)
    return 0 if all(made[n] is not None for n in ("seconds_to_heads", "seconds_to_encoder", "recovered_from_day")) else 1


def main(arguments: Sequence[str]) -> int:
    """The program."""
    parser = argparse.ArgumentParser(
        prog="python -m bench drift", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--users", type=int, default=5000, help="who ever come to the shop (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the shop (default %(default)s)")
    parser.add_argument("--seconds", type=int, default=300, help="that the promotion is watched for (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on stdout; all else goes to stderr")
    options = parser.parse_args(arguments)
    try:
        return run(options.users, options.seed, options.seconds, options.json)
    except (ProgramEnded, Stuck, StartFailed) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nended early; nothing is left behind", file=sys.stderr)
        return 130
