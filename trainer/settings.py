"""Settings of the trainer, beyond those it shares with the worker. `python -m trainer --help` lists them all."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from model.settings import Settings, TargetList, split_targets
from model.targets import DEFAULT_TARGETS


class TrainerSettings(Settings):
    """Settings of `python -m trainer`."""

    program: ClassVar[str] = "trainer"

    targets: TargetList = Field(
        DEFAULT_TARGETS, description="what the model answers, as NAME=TYPE[+TYPE]:occurs|absent:HORIZON, separated by commas"
    )

    group: str = Field("streamscore-trainer", min_length=1, description="consumer group, in which Kafka's tools show the trainer's lag")
    log_directory: Path = Field(Path("trainer-log"), description="where events are kept as Parquet, with their offsets; one trainer each")
    log_flush_seconds: float = Field(30, gt=0, description="seconds that events wait in memory at most before they are written to the log")
    log_flush_rows: int = Field(200_000, gt=0, description="events that wait in memory at most before they are written to the log")
    log_margin_days: float = Field(
        30, ge=0, description="days of events kept beyond the window, from which users' state at its start is built"
    )

    window_days: float = Field(90, gt=0, description="days of events that a round looks at: training, validation and test")
    min_users: int = Field(1000, gt=0, description="users with an event in the window that a round waits for")
    min_events: int = Field(10_000, gt=0, description="events in the window that a round waits for")
    min_days: float = Field(14, gt=0, description="days between the first and the last event that a round waits for")
    max_events: int = Field(
        2_000_000,
        gt=0,
        description="events that a round trains on at most, a limit of its time and not of its memory; more: a sample of users",
    )
    shard_events: int = Field(
        250_000,
        gt=0,
        description="events that are in memory at once while training (7 kB each); more are prepared and kept on disk by shards",
    )
    validation_share: float = Field(0.1, gt=0, lt=0.5, description="share of the window's days, after training, that stops the fitting")
    test_share: float = Field(0.2, gt=0, lt=0.5, description="share of the window's days, the newest, on which the gate decides")

    judge_share: float = Field(
        0.3,
        gt=0,
        lt=0.5,
        description="share of the users, by a hash of their id, from whom no refresh learns: the gate judges on them",
    )

    round_interval_seconds: float = Field(3600, gt=0, description="seconds from the start of one round to the start of the next")
    refresh_interval_seconds: float = Field(
        600, ge=0, description="seconds from a round or refresh to the next refresh, which fits the heads alone; 0 switches refreshes off"
    )
    refresh_budget_seconds: float = Field(60, gt=0, description="seconds that the fitting of a refresh may take, about")
    round_budget_seconds: float = Field(600, gt=0, description="seconds that the fitting of one round may take")
    epochs: int = Field(15, gt=0, description="passes over the training data at most; validation usually stops the fitting earlier")
    patience: int = Field(4, gt=0, description="passes without a better validation loss after which the fitting stops")
    batch_events: int = Field(2048, gt=0, description="events in a batch at most, about; a short history gets smaller ones")
    chunk_events: int = Field(50, gt=1, description="events of a user that are trained on in one piece")
    learning_rate: float = Field(4e-3, gt=0, description="peak step size of AdamW; a warm start begins at half of it")
    weight_decay: float = Field(0.05, ge=0, description="of AdamW")
    gradient_norm: float = Field(1.0, gt=0, description="norm to which a batch's gradient is clipped")
    encoder: Literal["gru", "lstm", "rnn"] = Field("gru", description="recurrent units: gru, lstm or rnn")
    hidden: int = Field(64, gt=0, description="recurrent units")
    belief_states: int = Field(
        16, ge=0, le=64, description="latent states of the belief cell, a learned Markov model of the stream beside the units; 0: none"
    )
    rhythm_classes: int = Field(
        16, ge=0, le=64, description="classes of the rhythm cell, a learned mixture of when users come back, for each event set; 0: none"
    )
    belief_steps: int = Field(1600, gt=0, description="steps of the belief cell's fitting by likelihood; a warm start takes a quarter")
    head: int = Field(96, gt=0, description="units of the heads' shared layer, dealt out to the members of a committee")
    dropout: float = Field(0.2, ge=0, lt=1, description="share of units dropped in training")
    seed: int = Field(0, description="of every random choice in a round")
    device: str = Field("auto", description="where to fit: cpu, cuda, cuda:1; auto takes a GPU if there is one")
    mixed_precision: Literal["auto", "on", "off"] = Field(
        "auto",
        description="multiply in bfloat16 in the heads while fitting; auto: on a GPU, where it has not been measured, and not on a CPU",
    )
    threads: int = Field(1, ge=0, description="CPU threads of the fitting; 0 takes all cores")
    nice: int = Field(5, ge=0, le=19, description="how far the trainer steps back from other processes for the CPU (os.nice)")

    gate_log_loss_tolerance: float = Field(
        0.005, ge=0, description="nats by which a target's log-loss may be worse at most, noise included (confidence 0.95)"
    )
    gate_auc_tolerance: float = Field(0.002, ge=0, description="by how much a target's AUC may be worse, beyond noise")
    gate_max_ece: float = Field(
        0.05, gt=0, description="expected calibration error, beyond noise, that a new model may have, unless the champion's is larger"
    )
    gate_min_outcomes: int = Field(30, gt=0, description="users with, and users without, an outcome that a target needs to be judged")
    report: bool = Field(True, description="write report.html and report.json beside each model; a second or two of CPU a round")
    tensorboard_directory: Path | None = Field(
        None, description="where losses and figures go as TensorBoard event files (needs the extra tensorboard); default: nowhere"
    )
    keep_versions: int = Field(5, gt=1, description="models kept in the registry; older ones are deleted")

    metrics_port: int = Field(9465, ge=0, le=65535, description="port of /metrics, /healthz and /readyz; 0 takes a free one")

    _split_targets = field_validator("targets", mode="before")(split_targets)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [t.name for t in self.targets]
        if len(set(names)) < len(names):
            raise ValueError(f"two targets have one name: {', '.join(names)}")
        if self.validation_share + self.test_share > 0.6:
            raise ValueError("validation_share and test_share together leave less than 0.4 of the window to train on")
        if self.min_days > self.window_days:
            raise ValueError("min_days is larger than window_days: a round would wait for ever")
        return self

    @property
    def resolved_device(self) -> str:
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def mixed(self) -> bool:
        """Whether to fit in mixed precision."""
        return self.mixed_precision == "on" or (self.mixed_precision == "auto" and self.resolved_device.startswith("cuda"))
