"""The worker's loop: poll -> decode -> load -> step -> publish -> persist.

THE ORDER OF DURABILITY. Whoever wants to know what survives a crash reads this.

exactly_once
    1. One Kafka transaction holds a batch's scores, dead letters, consumed offsets and, in their metadata, the clock up to which silence
       scores are out. Its commit is the moment at which the batch has happened. Under load it is waited for while the next batch is polled,
       decoded and loaded, but no state is stepped further, and none flushed, before it is known.
    2. Later, between batches, the changed states are sent to Redis with `applied`, in one atomic compare-and-set a partition
       (worker.store). Its answer is waited for before anything else is asked of Redis about that partition.
    A crash before 1: nothing happened; the batch is read again. Between 1 and 2: `applied` is behind the committed offset; the records in
    between are replayed into the states and nothing is published (worker.acquire). After 2: nothing to repair.
at_least_once
    1. Scores and dead letters are acknowledged by Kafka. 2. States and `applied` go to Redis. 3. Offsets are committed.
    A crash before 2 reads the batch again and publishes its scores again; between 2 and 3, `applied` says that they are out.

Whatever goes wrong with a partition (a fenced or failed transaction, a compare-and-set that another writer won), there is one answer:
forget its states in memory and acquire it anew from what Kafka and Redis say (worker.ownership).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress

import redis

from model.events import DAY_MS
from worker.acquire import Refused
from worker.batch import BatchLimit
from worker.metrics import Metrics
from worker.models import Loaded, Models
from worker.ownership import Ownership
from worker.patience import Patience, Stopping
from worker.processing import Processing
from worker.reporting import Reporting
from worker.schedule import Schedule
from worker.scoring import Scoring
from worker.settings import WorkerSettings
from worker.states import States
from worker.transport import Transport, TransportError

log = logging.getLogger(__name__)

POLL_MS = 100


class Worker:
    """One worker. `run_once` is one turn of the loop; everything happens in the thread that calls it, but for two waits in threads of their
    own: for Redis' answer to a flush, while a batch is stepped, and for Kafka's to a commit. `patience.stop` ends it."""

    def __init__(
        self,
        settings: WorkerSettings,
        connect: Callable[[], Transport],
        client: redis.Redis,
        models: Models,
        metrics: Metrics,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        beside: Executor | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.patience = Patience(metrics, monotonic)
        self._connect = connect
        self._redis = client
        self._models = models
        self._monotonic = monotonic
        self._wall = wall
        self._beside = beside or ThreadPoolExecutor(1, "flush")
        self._limit = BatchLimit(settings.target_p99_ms, settings.max_batch_records)
        self._transport: Transport | None = None

    @property
    def ready(self) -> tuple[bool, str]:
        """Whether events are being scored, and if not, what is missing."""
        if self.patience.trouble:
            return False, self.patience.trouble
        if self._transport is None:
            return False, "starting"
        if not self.owned.tasks:
            return False, "no partitions assigned yet"
        return True, f"model {self.states.model.manifest.version}, partitions {sorted(self.owned.tasks)}"

    def seconds_since_progress(self) -> float:
        return self._monotonic() - self.patience.progress_at

    def run(self) -> None:
        """Until a stop. Raises what trying again cannot help with: FatalTransportError, StoreError, Refused, TooManyBadRecords."""
        try:
            self.start()
            while not self.patience.stop.is_set():
                self.run_once()
        except Stopping:
            log.info("stopped while waiting", extra={"fields": {"for": self.patience.trouble}})
        finally:
            self.close()

    def start(self) -> None:
        """Wait for a model, then join the group. Raises Stopping, Refused, FatalTransportError."""
        settings, patience = self.settings, self.patience
        loaded = self._first_model()
        transport = patience("kafka", self._connect)
        counts = {topic: patience("kafka", lambda t=topic: transport.partition_count(t)) for topic in settings.event_topics}  # type: ignore[misc]
        if len(set(counts.values())) > 1:
            raise Refused(f"the event topics are not co-partitioned ({counts}): give them the same number of partitions and the same keys")
        partitions = counts[settings.event_topics[0]]
        self._same_partition = partitions == patience("kafka", lambda: transport.partition_count(settings.score_topic))
        schedule = Schedule(tuple(round(h * 3_600_000) for h in settings.silence_hours), round(settings.retention_days * DAY_MS))
        self.states = States(loaded.model, schedule, settings.cache_users, settings.history_events)
        scoring = Scoring(loaded, settings.score_topic, self._same_partition)
        self.owned = Ownership(
            settings, transport, self._redis, self.states, partitions, patience, self.metrics, self._monotonic, self._beside
        )
        self.processing = Processing(
            settings, transport, self.owned, self.states, scoring, patience, self.metrics, self._monotonic, self._wall
        )
        self._reporting = Reporting(self.metrics, transport, self._redis, self.owned, self.states, self._monotonic)
        self._transport = transport

    def run_once(self) -> None:
        """One turn: take over a new model, poll, follow the assignment, process what came, then do what is due."""
        transport, owned, processing = self._transport, self.owned, self.processing
        assert transport is not None
        self._swap()
        with self.metrics.stage("poll"):
            polled = self.patience("kafka", lambda: transport.poll(self._poll_ms(), self._limit.records))
        if polled.revoked or polled.assigned:
            self._settle()
        owned.revoke(polled.revoked)
        owned.assign(polled.assigned)
        records = sum(map(len, polled.records))
        behind = records >= self._limit.records
        if records:
            started = self._monotonic()
            processing.process(polled.records)
            if not behind:
                self._settle()
            self._limit.observe(records, self._monotonic() - started)
        owned.each(processing.move_clock)
        owned.each(processing.renew)
        if not behind or owned.forgotten:  # otherwise the next batch is there already, and settles this one on its way
            self._settle()
            owned.flush_if_due()
            owned.acquire_forgotten()
        self._reporting.report()
        self.patience.progress()

    def close(self) -> None:
        """Flush, commit, leave the group."""
        self._models.close()
        if self._transport:
            self._settle()
            self.owned.close()
            self._transport.close()
        self._beside.shutdown()

    def _first_model(self) -> Loaded:
        self._models.check()
        while (loaded := self._models.take()) is None:
            if not self.patience.trouble:
                self.patience.trouble = f"no model in {self.settings.registry} yet: waiting for the trainer's first, consuming nothing"
                log.warning(self.patience.trouble)
            self.patience.wait(min(1.0, self.settings.model_poll_seconds))
            self._models.check()
        self.patience.trouble = ""
        self._models.watch(self.settings.model_poll_seconds)
        self._announce(loaded)
        return loaded

    def _swap(self) -> None:
        """Go over to a new model, if there is one. States of the same encoder stay; others are rebuilt, on touch and in the background."""
        loaded = self._models.take()
        if loaded is None:
            return
        self._settle()
        if self.states.outdated_by(loaded.model):
            self.owned.each(self.owned.flush)
        self.states.use(loaded.model)
        self.processing.scoring = Scoring(loaded, self.settings.score_topic, self._same_partition)
        for task in self.owned.tasks.values():
            task.renew_for(loaded.model.manifest.encoder_id)
        self._announce(loaded)

    def _announce(self, loaded: Loaded) -> None:
        manifest = loaded.model.manifest
        self.metrics.running(manifest.version, manifest.created_at.timestamp())
        log.info("model taken over", extra={"fields": {"version": manifest.version, "encoder": manifest.encoder_id}})

    def _settle(self) -> None:
        """What could not be committed is forgotten, and that is all there is to do about it."""
        with suppress(TransportError):
            self.processing.settle()

    def _poll_ms(self) -> int:
        """Long enough to rest, short enough for the next flush."""
        left_ms = self.settings.flush_interval_ms - (self._monotonic() - self.owned.flushed_at) * 1000
        return POLL_MS if left_ms <= 0 else min(POLL_MS, round(left_ms) + 1)
