"""The programs that are measured, and what they are given: the worker as users run it, the bare loop, a model with random weights."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.stream import TYPES
from demo.launch import Program, program
from demo.metrics import Endpoint
from demo.process import free_port
from model.artifact import Manifest, Model, Window
from model.hazards import DEFAULT_EDGES_MS
from model.network import Network
from model.registry import Registry
from model.targets import DEFAULT_TARGETS, event_sets
from trainer.challenger import shape_of
from trainer.settings import TrainerSettings

VERSION = "bench"
START_S = 60
GUARANTEES = ("exactly_once", "at_least_once")


def publish_model(registry: Path) -> Model:
    """A model of the default size (purchase and churn) with random weights: what it says does not change what it costs."""
    torch.manual_seed(0)
    shape = shape_of(TrainerSettings(), len(event_sets(DEFAULT_TARGETS)), len(DEFAULT_EDGES_MS))
    manifest = Manifest(
        version=VERSION,
        created_at=datetime.now(UTC),
        shape=asdict(shape),
        vocabulary=list(TYPES),
        scaling={"value_centre": 3.0, "value_spread": 1.0},
        edges_ms=list(DEFAULT_EDGES_MS),
        targets=list(DEFAULT_TARGETS),
        encoder_id="",
        lineage="bench",
        weights_sha256="",
        window=Window(start_ms=0, end_ms=1, users=1, events=1),
    )
    place = Registry(str(registry))
    place.publish(manifest, Network(shape))
    place.promote(VERSION, reason="benchmark", by="bench")
    return place.load(VERSION)


@dataclass(frozen=True)
class Job:
    """One client's work: everything in `source`, as a group that has read nothing yet, into `target`."""

    bootstrap: str
    redis_url: str
    registry: Path
    source: str
    target: str
    dead_letters: str
    group: str
    guarantee: str


def limit(job: Job) -> AbstractContextManager[Program]:
    """The bare loop (bench.limit)."""
    options = {"bootstrap": job.bootstrap, "source": job.source, "target": job.target, "group": job.group, "guarantee": job.guarantee}
    return program("limit", ["bench.limit", *(f"--{name}={value}" for name, value in options.items())], {})


@dataclass(frozen=True)
class Worker:
    """The worker, and where it says how it is."""

    endpoint: Endpoint
    running: AbstractContextManager[Program]

    def series(self) -> dict[str, float]:
        """Every series of its metrics, by name and labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.endpoint.port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def worker(job: Job, extra: Mapping[str, object]) -> Worker:
    """`python -m worker run`. Silence scores are off: their number follows from the schedule, not from the events."""
    port = free_port()
    own = {
        "group": job.group,
        "guarantee": job.guarantee,
        "score_topic": job.target,
        "dead_letter_topic": job.dead_letters,
        "redis_url": job.redis_url,
        "metrics_port": port,
        "silence_hours": "",
        **extra,
    }
    settings = {
        "STREAMSCORE_KAFKA_BOOTSTRAP_SERVERS": job.bootstrap,
        "STREAMSCORE_EVENT_TOPICS": job.source,
        "STREAMSCORE_REGISTRY": job.registry,
        "STREAMSCORE_METRICS_HOST": "127.0.0.1",
        **{f"STREAMSCORE_WORKER_{name.upper()}": value for name, value in own.items()},
    }
    return Worker(Endpoint(port), program("worker", ["worker", "run"], settings))


def wait_ready(running: Program, endpoint: Endpoint) -> None:
    """Until the worker has a model and its partitions."""
    deadline = time.monotonic() + START_S
    while not endpoint.ready()[0]:
        running.check()
        if time.monotonic() > deadline:
            raise RuntimeError(f"The worker was not ready after {START_S} s. {running.last_words()}")
        time.sleep(0.05)
