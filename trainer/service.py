"""The service: collects all the time, and holds a round whenever it is time for one and there is something new to learn from."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from model.artifact import ArtifactError
from model.http import serve
from model.registry import Registry
from trainer.collect import Collector, follow
from trainer.log import EventLog
from trainer.metrics import Metrics
from trainer.rhythms import Rhythm, Rhythms
from trainer.settings import TrainerSettings
from trainer.shards import of_log

LOOK_SECONDS = 1.0
STUCK_SECONDS = 120.0

logger = logging.getLogger(__name__)


class Service:
    """`python -m trainer run`: a thread that collects, and rounds in the main thread."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings = settings
        self._stop = threading.Event()
        self._metrics = Metrics()
        self._registry = Registry(settings.registry)
        self._log = EventLog(settings.log_directory)
        self._collector = Collector(settings, self._log, self._metrics)
        self._failure: BaseException | None = None
        self._collecting = threading.Thread(target=self._collect, name="collector")
        self._state = "starting"

    def stop(self) -> None:
        self._stop.set()

    def run(self) -> None:
        """Until SIGTERM or SIGINT. Raises OSError where the metrics port is taken, and whatever the collector died of."""
        settings = self._settings
        server = serve(settings.metrics_host, settings.metrics_port, self._metrics.registry, self._healthy, self._ready)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        logger.info("metrics on port %d; models go to %s", server.port, settings.registry)
        try:
            self._collecting.start()
            self._prepare()
            self._rounds()
        finally:
            self._stop.set()
            self._collecting.join()
            self._log.close()
            server.close()
        if self._failure:
            raise self._failure
        logger.info("stopped; the log is whole: %s events", f"{self._log.rows:,}")

    def _collect(self) -> None:
        try:
            follow(self._collector, self._stop.is_set, self._stop.wait)
        except BaseException as failure:
            self._failure = failure
            self._stop.set()

    def _prepare(self) -> None:
        """What need not wait for data: stepping back for others, and torch, which takes seconds to come up."""
        import torch

        from model.memory import keep_freed_memory
        from trainer.stage import warm_up

        if self._settings.nice:
            os.nice(self._settings.nice)
        if self._settings.nice == 19 and hasattr(os, "SCHED_IDLE"):
            # A processor that runs nothing else counts as idle: whoever wakes up is put there at once, which niceness alone does not give.
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        if self._settings.threads:
            torch.set_num_threads(self._settings.threads)
        keep_freed_memory()
        warm_up()

    def _rounds(self) -> None:
        settings, said = self._settings, ""
        rhythms = Rhythms(settings.round_interval_seconds, settings.refresh_interval_seconds, time.monotonic())
        while not self._stop.is_set():
            rows, now = self._log.rows, time.monotonic()
            if not self._collector.caught_up:
                self._say(f"waiting: reading what Kafka holds, {self._collector.taken:,} records so far", quiet=True)
            elif rhythm := rhythms.due(now, rows):
                outcome, reason = self._round(rhythm)
                rhythms.held(rhythm, outcome, now, rows)
                if outcome == "waiting" and reason != said:
                    self._say(f"waiting: {reason}", quiet=rhythm == "refresh")
                said = reason if outcome == "waiting" else ""
            self._stop.wait(LOOK_SECONDS)

    def _round(self, rhythm: Rhythm) -> tuple[str, str]:
        """Hold a round or a refresh; (outcome, reason). Storage that is away or a model that is corrupt fails it, not the service."""
        from trainer.rounds import run_round
        from trainer.stage import Stopped

        metrics = self._metrics
        metrics.training.set(1)
        try:
            with metrics.timed("load"):
                shards = of_log(self._settings)
            if shards is None:
                return "waiting", "no event seen"
            metrics.window_events.set(shards.events)
            metrics.window_end.set(shards.last_ms / 1000)
            outcome = run_round(
                shards,
                self._registry,
                self._settings,
                metrics,
                now=datetime.now(UTC),
                rhythm=rhythm,
                progress=told_now_and_then(),
                stopping=self._stop.is_set,
            )
        except Stopped:
            return "stopped", "told to stop"
        except (OSError, ArtifactError, ValueError) as error:
            logger.error("the %s failed: %s", rhythm, error)
            metrics.rounds.labels("failed", rhythm).inc()
            return "failed", str(error)
        finally:
            metrics.training.set(0)
        metrics.rounds.labels(outcome.kind, rhythm).inc()
        if outcome.kind == "promoted":
            assert outcome.learnt_until_ms is not None
            assert outcome.ended_at is not None
            arrived_ms = self._collector.arrivals.newest_before(outcome.learnt_until_ms)
            if arrived_ms is not None:  # else it came before this program did
                metrics.event_to_promotion.labels(rhythm).set(outcome.ended_at - arrived_ms / 1000)
        if outcome.kind != "waiting":
            self._say(f"{outcome.kind} {outcome.version}{' (heads)' if rhythm == 'refresh' else ''}: {outcome.reason}")
        return outcome.kind, outcome.reason

    def _say(self, state: str, quiet: bool = False) -> None:
        self._state = state
        logger.log(logging.DEBUG if quiet else logging.INFO, state)

    def _healthy(self) -> tuple[bool, str]:
        if self._failure is not None:
            return False, f"the collector died: {self._failure}"
        age = time.monotonic() - self._collector.alive_at
        return age < STUCK_SECONDS, self._state if age < STUCK_SECONDS else f"the collector has made no progress for {age:.0f} s"

    def _ready(self) -> tuple[bool, str]:
        return self._collector.caught_up, self._state


def told_now_and_then(
    every_seconds: float = 5.0, clock: Callable[[], float] = time.monotonic, what: str = "fitting"
) -> Callable[[float, str], None]:
    """Progress as log lines, where there is no terminal to draw a bar on."""
    last = clock()

    def progress(share: float, words: str) -> None:
        nonlocal last
        if clock() - last >= every_seconds:
            last = clock()
            logger.info("%s: %.0f%%, %s", what, 100 * share, words)

    return progress
