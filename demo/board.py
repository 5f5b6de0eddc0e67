"""What there is to see while the demo runs, as plain values: the view draws it, on a terminal or as lines."""

from __future__ import annotations

import json
import re
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from demo.launch import Program
from demo.metrics import Endpoint
from demo.quality import Measure, Quality
from demo.shop import DAY_MS
from demo.stream import Stream
from demo.watch import Watch

LOOK_S = 0.5  # between two looks at the counters
RATE_S = 3.0  # what a rate is averaged over
QUALITY_S = 4.0  # between two measures of the AUC, which take tens of milliseconds
POINTS = 60  # of a sparkline
USERS = 20  # rows of a table, at most
RECENTLY_MS = 4 * DAY_MS
MODEL = re.compile(r'streamscore_model_info\{version="(.+)"\}')


@dataclass(frozen=True)
class Keen:
    user: str
    score: float
    ago_ms: int


@dataclass(frozen=True)
class Silent:
    user: str
    days: float
    before: float
    now: float


@dataclass(frozen=True)
class Promotion:
    """A decision of the trainer."""

    at_s: float
    """seconds since the demo began"""
    version: str
    action: str
    reason: str


@dataclass
class Board:
    """Everything on show. `scenes`: what has been going on, since how many seconds after the start; the last one still is."""

    scenes: list[tuple[float, str]] = field(default_factory=list)
    live: float | None = None
    """share of the live part that has passed"""
    today: str = ""
    worker: str = ""
    trainer: str = ""
    events_per_s: float = 0
    scores_per_s: float = 0
    lag: int | None = None
    events: int = 0
    scores: int = 0
    silence_scores: int = 0
    dead_letters: int = 0
    visible: tuple[float, float] | None = None
    event_rates: deque[float] = field(default_factory=lambda: deque(maxlen=POINTS))
    waits: deque[float] = field(default_factory=lambda: deque(maxlen=POINTS))
    quality: dict[str, Measure] = field(default_factory=dict)
    days_to_go: dict[str, float] = field(default_factory=dict)
    """simulated days until the first scores of a target can be judged"""
    versions: list[str] = field(default_factory=list)
    """models that the worker has run, in order"""
    promotions: list[Promotion] = field(default_factory=list)
    swaps: int = 0
    keen: list[Keen] = field(default_factory=list)
    silent: list[Silent] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    last_dead_letter: str = ""
    started: float = field(default_factory=time.time)

    @property
    def elapsed_s(self) -> float:
        return time.time() - self.started

    @property
    def running(self) -> str | None:
        return self.versions[-1] if self.versions else None

    @property
    def sentence(self) -> str:
        return self.scenes[-1][1] if self.scenes else ""

    def say(self, sentence: str) -> None:
        self.scenes.append((self.elapsed_s, sentence))


class Observer:
    """Keeps a board up to date: looks at each source as often as is worth it."""

    def __init__(self, board: Board, stream: Stream, worker: Endpoint, trainer: Program, registry: Path) -> None:
        self.board = board
        self.watch: Watch | None = None
        self._stream = stream
        self._worker, self._trainer = worker, trainer
        self._registry = registry
        self._counted: deque[tuple[float, float, float]] = deque()
        self._looked_at = self._measured_at = 0.0

    def look(self) -> bool:
        """Whether there was something new to see."""
        if self.watch:
            self.watch.update()
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return False
        self._looked_at = now
        self._ask_programs(now)
        self._read_registry()
        if self.watch:
            self._see(self.watch)
            if now - self._measured_at > QUALITY_S:
                self._measured_at = now
                self.measure(self.watch.quality, self.watch.now_ms)
        return True

    def measure(self, quality: Quality, now_ms: int) -> None:
        now_ms = min(now_ms, self._stream.end_ms)
        self.board.quality = quality.measure(now_ms)
        first_ms = {name: self._stream.live_ms + horizon_ms for name, (_, _, horizon_ms) in quality.targets.items()}
        self.board.days_to_go = {name: max(0.0, (ms - now_ms) / DAY_MS) for name, ms in first_ms.items()}

    def _ask_programs(self, now: float) -> None:
        board = self.board
        _, board.worker = self._worker.ready()
        board.trainer = self._trainer.last_said()
        if not (said := self._worker.metrics()):
            return
        board.events = int(said.get("streamscore_events_total", 0))
        board.scores = int(said.get("streamscore_scores_total", 0))
        board.silence_scores = board.scores - board.events
        board.dead_letters = int(said.get("streamscore_dead_letters_total", 0))
        board.lag = int(said.get("streamscore_consumer_lag_records", 0))
        board.swaps = int(said.get("streamscore_model_swaps_total", 0))
        running = [match[1] for series in said if (match := MODEL.fullmatch(series))]
        board.versions += [version for version in running if version not in board.versions]
        self._counted.append((now, board.events, board.scores))
        while self._counted[0][0] < now - RATE_S:
            self._counted.popleft()
        since, events, scores = self._counted[0]
        if now > since:
            board.events_per_s = (board.events - events) / (now - since)
            board.scores_per_s = (board.scores - scores) / (now - since)
            board.event_rates.append(board.events_per_s)

    def _read_registry(self) -> None:
        """Its format is public: model/registry.py. Read as files, because torch, which the package loads, is large."""
        names = sorted((self._registry / "decisions").glob("*.json"))
        for path in names[len(self.board.promotions) :]:
            decision = json.loads(path.read_text())
            at_s = datetime.fromisoformat(decision["at"]).timestamp() - self.board.started
            self.board.promotions.append(Promotion(at_s, decision["version"], decision["action"], decision["reason"]))

    def _see(self, watch: Watch) -> None:
        board, stream, people = self.board, self._stream, watch.people
        users = stream.history.users
        board.live = min(1.0, (watch.now_ms - stream.live_ms) / (stream.end_ms - stream.live_ms))
        board.today = f"{datetime.fromtimestamp(watch.now_ms / 1000, UTC):%Y-%m-%d}"
        board.visible = watch.visible.recent()
        if board.visible:
            board.waits.append(board.visible[1])
        board.reasons, board.last_dead_letter = watch.reasons, watch.last_dead_letter
        scored = [i for i in people.keenest(USERS) if people.first[i] >= 0]
        board.keen = [Keen(users[i], float(people.first[i]), watch.now_ms - int(people.active_ms[i])) for i in scored]
        board.silent = [
            Silent(users[i], (watch.now_ms - int(people.active_ms[i])) / DAY_MS, float(people.before[i]), float(people.second[i]))
            for i in people.falling_silent(USERS, watch.now_ms - RECENTLY_MS)
        ]
