"""Waiting for what is away: Kafka, Redis, a first model. Says so, tries again with backoff, and gives way to a stop."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Literal, TypeVar

from worker.metrics import Metrics
from worker.store import StoreUnavailable
from worker.transport import Fenced, TransportError

log = logging.getLogger(__name__)
T = TypeVar("T")


class Stopping(Exception):
    """A stop was asked for while something was being waited for."""


class Patience:
    """stop: set it to end every wait. trouble: what is being waited for, "" if nothing. progress_at: of the last turn or attempt."""

    FIRST_SECONDS, LONGEST_SECONDS = 0.1, 5.0

    def __init__(self, metrics: Metrics, monotonic: Callable[[], float]) -> None:
        self.stop = threading.Event()
        self.trouble = ""
        self.progress_at = monotonic()
        self._metrics = metrics
        self._monotonic = monotonic

    def __call__(self, what: Literal["kafka", "redis"], call: Callable[[], T]) -> T:
        """The result of `call`, tried again for as long as what it needs is away. Raises Stopping, and what waiting cannot cure."""
        delay = self.FIRST_SECONDS
        while True:
            try:
                result = call()
            except Fenced:
                raise
            except (StoreUnavailable, TransportError) as error:
                self._metrics.retries.labels(what).inc()
                if str(error) != self.trouble:
                    log.warning("waiting, and trying again", extra={"fields": {"why": error}})
                self.trouble = str(error)
                self.wait(delay)
                delay = min(delay * 2, self.LONGEST_SECONDS)
            else:
                if self.trouble:
                    log.info("going on", extra={"fields": {"after": self.trouble}})
                    self.trouble = ""
                return result

    def wait(self, seconds: float) -> None:
        """Raises Stopping as soon as a stop is asked for."""
        self.progress()
        if self.stop.wait(seconds):
            raise Stopping

    def progress(self) -> None:
        """The loop is alive."""
        self.progress_at = self._monotonic()
