"""One round, from top to bottom: window -> dataset -> fit -> evaluate -> gate -> publish -> promote or reject -> prune."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np

from model.artifact import ArtifactError, Model
from model.hazards import DAY_MS
from model.registry import Registry
from trainer import evaluate, gate, tensorboard
from trainer.challenger import Challenger, Split, train
from trainer.fit import Progress, Stopped, no_progress
from trainer.history import History, sample_users
from trainer.metrics import Metrics
from trainer.settings import TrainerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a round. `reason` is one sentence for people."""

    kind: Literal["promoted", "rejected", "published", "waiting"]
    reason: str
    version: str | None = None
    figures: dict[str, Any] | None = None


def run_round(
    history: History,
    registry: Registry,
    settings: TrainerSettings,
    metrics: Metrics,
    *,
    now: datetime,
    by: str = "trainer",
    promote: bool = True,
    progress: Progress = no_progress,
    stopping: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train a challenger on `history` and promote it if it deserves it. Raises `fit.Stopped` when told to stop."""
    split = split_by_time(history, settings)
    history = history.before(split.end_ms)
    if lacking := shortage(history, split, settings):
        return Outcome("waiting", lacking)
    champion = load_champion(registry, settings)
    rng = np.random.default_rng(settings.seed)

    challenger = train(sample_users(history, settings.max_events), split, champion, settings, metrics, now, rng, progress, stopping)
    with metrics.timed("evaluate"):
        decision = examine(history, split, challenger, champion, settings, metrics, rng)
    if stopping():
        raise Stopped
    with metrics.timed("publish"):
        manifest = challenger.model.manifest
        version = manifest.version
        manifest.metrics = {**decision.figures, "validation_loss": round(min(challenger.fitted.losses), 5)}
        registry.publish(manifest, challenger.model.network)
        if not promote:
            registry.record(version, "published", reason=decision.reason, by=by, figures=decision.figures)
        elif decision.promote:
            registry.promote(version, reason=decision.reason, by=by, figures=decision.figures)
            metrics.promotions.inc()
            metrics.last_promotion.set(now.timestamp())
        else:
            registry.record(version, "rejected", reason=decision.reason, by=by, figures=decision.figures)
            metrics.rejections.inc()
    kind: Literal["promoted", "rejected", "published"] = "published" if not promote else "promoted" if decision.promote else "rejected"
    if settings.report:
        with metrics.timed("report"):
            report_on(history, split, challenger, champion, registry, settings, kind, decision.reason)
    registry.prune(settings.keep_versions)
    return Outcome(kind, decision.reason, version, decision.figures)


def report_on(
    history: History,
    split: Split,
    challenger: Challenger,
    champion: Model | None,
    registry: Registry,
    settings: TrainerSettings,
    kind: str,
    reason: str,
) -> None:
    """Put the report beside the version. The model is judged and published by now: what goes wrong here is said, and costs nothing else."""
    version = challenger.model.manifest.version
    try:
        from trainer import report  # matplotlib takes half a second to load, and nobody else needs it

        about = report.about_round(history, split, challenger, champion, settings, kind, reason)
        registry.attach(version, "report.json", report.to_json(about).encode())
        where = registry.attach(version, "report.html", report.to_html(about).encode())
        logger.info("report: %s", where)
        if settings.tensorboard_directory:
            tensorboard.write(settings.tensorboard_directory, about.facts)
    except Exception:  # whatever it is: a report is not worth a round
        logger.exception("there is no whole report of %s", version)


def split_by_time(history: History, settings: TrainerSettings) -> Split:
    """The window ends with the newest event, whatever the wall clock says: replayed and simulated time train alike."""
    end_ms = int(history.time_ms.max(initial=0)) + 1
    begin_ms = max(int(history.time_ms.min(initial=end_ms)), end_ms - int(settings.window_days * DAY_MS))
    span_ms = end_ms - begin_ms
    test_ms = end_ms - int(span_ms * settings.test_share)
    return Split(begin_ms, test_ms - int(span_ms * settings.validation_share), test_ms, end_ms)


def shortage(history: History, split: Split, settings: TrainerSettings) -> str:
    """What a round still waits for, or "" where it can begin."""
    inside = history.time_ms >= split.begin_ms
    users, events = len(np.unique(history.user[inside])), int(inside.sum())
    days = (split.end_ms - split.begin_ms) / DAY_MS
    lacking = [
        text
        for have, need, text in (
            (users, settings.min_users, f"{users:,} of {settings.min_users:,} users seen"),
            (events, settings.min_events, f"{events:,} of {settings.min_events:,} events seen"),
            (days, settings.min_days, f"{days:.1f} of {settings.min_days:g} days seen"),
        )
        if have < need
    ]
    return ", ".join(lacking)


def load_champion(registry: Registry, settings: TrainerSettings) -> Model | None:
    """The promoted model; None where there is none, or none that can be read (then the round begins afresh, and says so)."""
    try:
        pointer = registry.current()
        return registry.load(pointer, settings.resolved_device) if pointer else None
    except ArtifactError as error:
        logger.error("the champion cannot be loaded, so this round begins afresh: %s", error)
        return None


def examine(
    history: History,
    split: Split,
    challenger: Challenger,
    champion: Model | None,
    settings: TrainerSettings,
    metrics: Metrics,
    rng: np.random.Generator,
) -> gate.Decision:
    """Challenger and champion on the same moments of the test window, and the gate's word on it."""
    exam = evaluate.set_exam(history, settings.targets, split.test_ms, split.end_ms, rng)
    if exam.shortened:
        days = ", ".join(f"{t.name} over {t.horizon_ms / DAY_MS:.1f} days" for t in exam.asked if t.name in exam.shortened)
        logger.info("the test window is too short for some horizons; judged instead: %s", days)
    said = evaluate.answers(exam, challenger.model)
    before, first = None, True
    if champion:
        if champion.manifest.window.end_ms > split.test_ms:
            logger.warning("the champion has seen part of the test window, which favours it")
        try:
            before, first = evaluate.answers(exam, champion), False
        except ArtifactError as error:
            logger.warning("the champion cannot be compared, so the challenger is judged as a first model: %s", error)
    if before is None:
        before = evaluate.constant_answers(exam, challenger.hazard_KB, settings.targets, challenger.model.manifest.edges_ms)
    judged = [
        gate.Judged(t.name, t.horizon_ms, exam.users[row], label, p, q)
        for t, row, label, p, q in zip(exam.asked, exam.rows, exam.labels, said, before, strict=True)
    ]
    tolerance = gate.Tolerance(
        settings.gate_log_loss_tolerance, settings.gate_auc_tolerance, settings.gate_max_ece, settings.gate_min_outcomes
    )
    decision = gate.decide(judged, first=first, tolerance=tolerance, rng=rng)
    for target, figures in decision.figures.items():
        for who, name in (("challenger", "challenger"), ("incumbent", "baseline" if first else "champion")):
            for measure, gauge in (("auc", metrics.auc), ("log_loss", metrics.log_loss), ("ece", metrics.ece)):
                if measure in figures.get(who, {}):
                    gauge.labels(target, name).set(figures[who][measure])
                if not first:
                    with suppress(KeyError):  # the baseline has had its day
                        gauge.remove(target, "baseline")
    return decision
