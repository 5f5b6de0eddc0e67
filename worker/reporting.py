"""Gauges that are looked up now and then: lag, sizes, clocks."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import redis

from worker.metrics import Metrics
from worker.ownership import Ownership
from worker.states import States
from worker.store import AWAY, StoreError, StoreUnavailable
from worker.transport import Partition, Transport, TransportError

log = logging.getLogger(__name__)

EVERY_SECONDS = 5.0


class Reporting:
    """Fills the gauges, at most every EVERY_SECONDS. What cannot be looked up keeps its last value: the loop's own retries say why."""

    def __init__(
        self,
        metrics: Metrics,
        transport: Transport,
        client: redis.Redis,
        owned: Ownership,
        states: States,
        monotonic: Callable[[], float],
    ) -> None:
        self._metrics = metrics
        self._transport = transport
        self._redis = client
        self._owned = owned
        self._states = states
        self._monotonic = monotonic
        self._next = 0.0

    def report(self) -> None:
        if self._monotonic() < self._next:
            return
        self._next = self._monotonic() + EVERY_SECONDS
        metrics, states = self._metrics, self._states
        metrics.cache_users.set(len(states.arena))
        metrics.rebuilt.inc(states.rebuilt)
        states.rebuilt = 0
        try:
            offsets = {Partition(topic, t.number): offset for t in self._owned.tasks.values() for topic, offset in t.offsets.items()}
            for partition, (_, end) in self._transport.bounds(list(offsets)).items():
                metrics.lag.labels(partition.topic, str(partition.number)).set(max(end - offsets[partition], 0))
            for task in self._owned.tasks.values():
                number = str(task.number)
                metrics.redis_users.labels(number).set(task.store.users())
                due = int(np.count_nonzero((states.arena.partition == task.number) & (states.arena.due_ms <= task.clock.stream_ms)))
                metrics.timers_due.labels(number).set(due)
                metrics.clock_seconds.labels(number).set(task.clock.stream_ms / 1000)
            metrics.redis_bytes.set(self._used_memory())
        except (TransportError, StoreUnavailable, StoreError, redis.RedisError, *AWAY) as error:
            log.debug("a gauge could not be looked up: %s", error)

    def _used_memory(self) -> float:
        info = self._redis.info("memory")
        assert isinstance(info, dict)
        # a cluster client answers by node
        return float(info["used_memory"] if "used_memory" in info else sum(node["used_memory"] for node in info.values()))
