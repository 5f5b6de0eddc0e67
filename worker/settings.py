"""Settings of the worker. See `model.settings` for how they are read."""

from __future__ import annotations

import socket
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode

from model.settings import Settings, split_targets
from model.targets import Target


class WorkerSettings(Settings):
    """Every setting of the worker."""

    program: ClassVar[str] = "worker"

    group: str = Field("streamscore", pattern=r"^[A-Za-z0-9._-]+$", description="consumer group; also the prefix of every Redis key")
    guarantee: Literal["exactly_once", "at_least_once"] = Field(
        "exactly_once", description="exactly_once: scores and offsets in one Kafka transaction; at_least_once: a crash may repeat scores"
    )
    worker_id: str | None = Field(
        None, description="stable name of this worker among its siblings, for its transactional id; default HOST-METRICS_PORT"
    )
    score_topic: str = Field("scores", description="topic for scores; should have as many partitions as the event topics")
    dead_letter_topic: str = Field("dead-letters", description="topic for records that are no events")
    start_from: Literal["earliest", "latest"] = Field("earliest", description="where a group without committed offsets starts")
    targets: Annotated[tuple[Target, ...] | None, NoDecode] = Field(
        None, description="what to score, as NAME=TYPE[+TYPE]:occurs|absent:HORIZON,...; default: the targets of the model"
    )
    redis_url: SecretStr = Field(SecretStr("redis://localhost:6379/0"), description="Redis, rediss:// for TLS; may carry user and password")
    redis_cluster: bool = Field(False, description="redis_url names a node of a Redis Cluster")
    redis_ssl_cafile: str | None = Field(None, description="PEM file of the authority that signed Redis' certificate")
    redis_timeout_seconds: float = Field(5.0, gt=0, description="for a connection or an answer")
    history_events: int = Field(
        50, ge=1, le=10_000, description="last events kept for each user, from which a state is rebuilt after an encoder change"
    )
    retention_days: float = Field(180, gt=0, le=36_500, description="a user silent for longer is deleted")
    silence_hours: Annotated[tuple[float, ...], NoDecode] = Field(
        (24, 72, 168, 336, 720), description="hours of silence after which a user is scored again, comma-separated; empty: never"
    )
    allowed_lateness_seconds: float = Field(
        0, ge=0, le=31_536_000, description="the stream clock, which fires silence scores, stays this far behind the newest event"
    )
    idle_seconds: float = Field(60, gt=0, description="a partition without events for this long has its clock moved on by the wall clock")
    target_p99_ms: float = Field(50, gt=0, description="bounds the micro-batch: it shrinks when a batch takes longer than half of this")
    max_batch_records: int = Field(4000, ge=1, description="most records in a micro-batch")
    cache_users: int = Field(200_000, ge=1000, description="most users whose state is kept in memory")
    flush_interval_ms: float = Field(
        250, ge=0, description="most time between a score and its state in Redis; also bounds the replay after a crash"
    )
    flush_users: int = Field(2000, ge=1, description="users changed that are flushed before flush_interval_ms is over")
    max_bad_share: float = Field(0.5, gt=0, le=1, description="stop when more than this share of recent records is bad")
    bad_window_records: int = Field(1000, ge=10, description="how many recent records max_bad_share looks at")
    model_poll_seconds: float = Field(5.0, gt=0, description="time between looks at the registry")
    device: str = Field("auto", description="where the network runs: auto, cpu, cuda, cuda:1")
    threads: int = Field(1, ge=1, description="CPU threads of the network")
    session_timeout_ms: int = Field(
        10_000, ge=1000, description="Kafka gives a worker's partitions away after this long without a heartbeat"
    )
    heartbeat_interval_ms: int = Field(1000, ge=100, description="time between heartbeats; also how soon a rebalance is noticed")
    transaction_timeout_ms: int = Field(
        10_000, ge=1000, description="Kafka aborts a transaction open for longer; how long a killed worker's blocks"
    )
    metrics_port: int = Field(9464, ge=0, le=65535, description="port of /metrics, /healthz, /readyz; 0: any free one")

    @field_validator("targets", mode="before")
    @classmethod
    def _targets(cls, value: Any) -> Any:
        return split_targets(value) if value else None

    @field_validator("targets")
    @classmethod
    def _distinct_targets(cls, value: tuple[Target, ...] | None) -> tuple[Target, ...] | None:
        if value and len({target.name for target in value}) < len(value):
            raise ValueError("two targets have one name")
        return value

    @field_validator("silence_hours", mode="before")
    @classmethod
    def _hours(cls, value: Any) -> Any:
        return tuple(float(v) for v in value.split(",") if v.strip()) if isinstance(value, str) else value

    @field_validator("silence_hours")
    @classmethod
    def _increasing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(v <= 0 for v in value) or list(value) != sorted(set(value)):
            raise ValueError("must be positive and increasing, as in 24,72,168")
        return value

    @model_validator(mode="after")
    def _possible(self) -> WorkerSettings:
        if self.heartbeat_interval_ms * 3 > self.session_timeout_ms:
            raise ValueError("heartbeat_interval_ms must be at most a third of session_timeout_ms")
        if self.silence_hours and self.silence_hours[-1] >= self.retention_days * 24:
            raise ValueError("silence_hours must all lie before retention_days, after which a user is deleted")
        if self.score_topic in self.event_topics or self.dead_letter_topic in self.event_topics:
            raise ValueError("score_topic and dead_letter_topic must not be event topics: the worker would read its own output")
        if self.redis_ssl_cafile and not self.redis_url.get_secret_value().startswith("rediss://"):
            raise ValueError("redis_ssl_cafile needs a redis_url with rediss://")
        return self

    @property
    def transactional_id(self) -> str:
        """Stable across restarts of one worker, so that a restarted one ends its own transaction; different between workers."""
        import secrets

        default = f"{socket.gethostname()}-{self.metrics_port or secrets.token_hex(4)}"
        return f"{self.group}-{self.worker_id or default}"
