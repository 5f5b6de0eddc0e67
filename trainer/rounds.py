"""One round, from top to bottom: window -> dataset -> fit -> evaluate -> gate -> publish -> promote or reject -> prune.

A refresh is a round that fits the champion's heads alone (`trainer.refresh`): the same window, the same gate, the same promotion.
A round fits on what is older than the test window. Where the champion's heads are newer than that, because they were refreshed, the round
ends with a refresh of its own. What a refreshed model has not learnt from is the judges' test window: then that is what the gate looks at.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import numpy as np

from model.artifact import ArtifactError, Model, dump, load
from model.hazards import DAY_MS
from model.registry import Outdated, Pointer, Registry
from trainer import evaluate, gate, tensorboard
from trainer.challenger import Challenger, Split, train
from trainer.distributed import ALONE, Team
from trainer.history import History
from trainer.judges import Role, of_role, refreshed, unseen_from
from trainer.metrics import Metrics
from trainer.refresh import obstacle, refresh
from trainer.rhythms import Rhythm
from trainer.settings import TrainerSettings
from trainer.shards import Shards, in_memory
from trainer.stage import Progress, Stopped, no_progress

Kind = Literal["promoted", "rejected", "published", "outdated", "waiting", "helped"]

JUDGED_EVENTS = 500_000
"""Events, of a sample of users, that the gate looks at: more users than it has questions for."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a round. `reason` is one sentence for people.

    learnt_until_ms: where the events end that it was held to learn from: a round for the encoder, a refresh for the heads.
    ended_at: when the version was promoted, or was not, in epoch seconds.
    """

    kind: Kind
    reason: str
    version: str | None = None
    figures: dict[str, Any] | None = None
    learnt_until_ms: int | None = None
    ended_at: float | None = None


def run_round(
    events: History | Shards,
    registry: Registry,
    settings: TrainerSettings,
    metrics: Metrics,
    *,
    now: datetime,
    by: str = "trainer",
    promote: bool = True,
    rhythm: Rhythm = "round",
    progress: Progress = no_progress,
    stopping: Callable[[], bool] = lambda: False,
    team: Team = ALONE,
    clock: Callable[[], float] = time.time,
) -> Outcome:
    """Train a challenger on `events` and promote it if it deserves it. Raises `fit.Stopped` when told to stop.

    team: the processes that hold a round together; the first one judges and publishes.
    """
    shards = events if isinstance(events, Shards) else in_memory(events, settings.shard_events)
    shards = Shards(shards.part, *team.first_says(shards.extent))  # the log may have grown meanwhile
    split = split_by_time(shards, settings)
    if lacking := team.first_says(shortage(shards, split, settings)):
        return Outcome("waiting", lacking)
    standing = registry.settle()
    champion = load_champion(registry, settings)
    learnt = shards.limited(settings.max_events)
    if rhythm == "refresh" and (reason := obstacle(learnt[0].before(split.end_ms), champion, settings)):
        return Outcome("waiting", reason)
    rng = np.random.default_rng(settings.seed)

    if rhythm == "round":
        challenger = train(learnt, split, champion, settings, metrics, now, rng, progress, stopping, team)
        if not team.first:
            return Outcome("helped", "the first process judges and publishes")
        if champion and refreshed(champion) and not obstacle(sample := learnt[0].before(split.end_ms), challenger.model, settings):
            heads = refresh(sample, split, challenger.model, settings, metrics, now, rng, progress, stopping)
            challenger = Challenger(heads.model, heads.hazard_KB, challenger.fitted)
    else:
        assert champion
        challenger = refresh(learnt[0].before(split.end_ms), split, champion, settings, metrics, now, rng, progress, stopping)
    history = shards.sample(JUDGED_EVENTS).before(split.end_ms)  # the log has grown meanwhile
    metrics.window_users.set(round(history.users * shards.events / max(len(history), 1)))
    with metrics.timed("evaluate"):
        decision = examine(history, split, challenger, champion, settings, metrics, rng)
    if stopping():
        raise Stopped
    outcome = conclude(challenger, decision, standing, registry, settings, metrics, now=now, by=by, promote=promote)
    ended_at = clock()
    if settings.report:
        with metrics.timed("report"):
            report_on(history, split, challenger, champion, registry, settings, outcome.kind, outcome.reason, shards.events)
    registry.prune(settings.keep_versions)
    window = challenger.model.manifest.window
    return replace(outcome, learnt_until_ms=unseen_from(window) if rhythm == "round" else window.end_ms, ended_at=ended_at)


def conclude(
    challenger: Challenger,
    decision: gate.Decision,
    standing: Pointer | None,
    registry: Registry,
    settings: TrainerSettings,
    metrics: Metrics,
    *,
    now: datetime,
    by: str,
    promote: bool = True,
) -> Outcome:
    """Publish, and do as the gate decided: unless `current` is no longer the `standing` champion that it decided on."""
    manifest = challenger.model.manifest
    version, reason = manifest.version, decision.reason
    kind: Kind = "published"
    with metrics.timed("publish"):
        manifest.metrics = {**decision.figures, "validation_loss": round(min(challenger.fitted.losses), 5)}
        registry.publish(manifest, challenger.model.network)
        if promote and decision.promote:
            try:
                registry.promote(version, reason=reason, by=by, figures=decision.figures, expected=standing)
                kind = "promoted"
                metrics.promotions.inc()
                metrics.last_promotion.set(now.timestamp())
            except Outdated as outdated:
                kind, reason = "outdated", f"{outdated} ({reason})"
        elif promote:
            kind = "rejected"
            metrics.rejections.inc()
        if kind != "promoted":
            registry.record(version, kind, reason=reason, by=by, figures=decision.figures)
    return Outcome(kind, reason, version, decision.figures)


def report_on(
    history: History,
    split: Split,
    challenger: Challenger,
    champion: Model | None,
    registry: Registry,
    settings: TrainerSettings,
    kind: str,
    reason: str,
    events: int,
) -> None:
    """Put the report beside the version. The model is judged and published by now: what goes wrong here is said, and costs nothing else."""
    version = challenger.model.manifest.version
    try:
        from trainer import report  # matplotlib takes half a second to load, and nobody else needs it

        judged = unseen(history, split, challenger, champion, settings)
        about = report.about_round(history, judged, split, challenger, champion, settings, kind, reason, events)
        registry.attach(version, "report.json", report.to_json(about).encode())
        where = registry.attach(version, "report.html", report.to_html(about).encode())
        logger.info("report: %s", where)
        if settings.tensorboard_directory:
            tensorboard.write(settings.tensorboard_directory, about.facts)
    except Exception:  # whatever it is: a report is not worth a round
        logger.exception("there is no whole report of %s", version)


def split_by_time(events: History | Shards, settings: TrainerSettings) -> Split:
    """The window ends with the newest event, whatever the wall clock says: replayed and simulated time train alike."""
    end_ms = events.last_ms + 1
    begin_ms = max(events.first_ms, end_ms - int(settings.window_days * DAY_MS))
    span_ms = end_ms - begin_ms
    test_ms = end_ms - int(span_ms * settings.test_share)
    return Split(begin_ms, test_ms - int(span_ms * settings.validation_share), test_ms, end_ms)


def shortage(parts: Iterable[History], split: Split, settings: TrainerSettings) -> str:
    """What a round still waits for, or "" where it can begin. parts: the events, users by users; no more are looked at than it takes."""
    users, events = 0, 0
    for history in parts:
        inside = history.time_ms >= split.begin_ms
        users, events = users + len(np.unique(history.user[inside])), events + int(inside.sum())
        if users >= settings.min_users and events >= settings.min_events:
            break
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


def unseen(history: History, split: Split, challenger: Challenger, champion: Model | None, settings: TrainerSettings) -> History:
    """The users whose test window nobody has learnt from: the judges where a model has learnt from the others', else everybody."""
    windows = [m.manifest.window for m in (challenger.model, champion) if m]
    taught = any(w.judges_end_ms is not None and w.end_ms > split.test_ms for w in windows)
    return of_role(history, settings, Role.judge) if taught else history


def examine(
    history: History,
    split: Split,
    challenger: Challenger,
    champion: Model | None,
    settings: TrainerSettings,
    metrics: Metrics,
    rng: np.random.Generator,
) -> gate.Decision:
    """Challenger and champion on the same moments of the test window, and the gate's word on it.

    The challenger answers as a worker would load it: what is judged is what is published, scaling and vocabulary included.
    """
    try:
        candidate = load(*dump(challenger.model.manifest, challenger.model.network), challenger.model.network.device)
    except ArtifactError as error:
        return gate.Decision(False, f"no worker could load it: {error}", {})
    begin_ms = evaluate.test_begin(split.test_ms, split.end_ms, unseen_from(champion.manifest.window) if champion else None)
    history = unseen(history, split, challenger, champion, settings)
    exam = evaluate.set_exam(history, settings.targets, begin_ms, split.end_ms, rng)
    if exam.shortened:
        days = ", ".join(f"{t.name} over {t.horizon_ms / DAY_MS:.1f} days" for t in exam.asked if t.name in exam.shortened)
        logger.info("the test window is too short for some horizons; judged instead: %s", days)
    try:
        said = evaluate.answers(exam, candidate)
    except ArtifactError as error:
        return gate.Decision(False, f"it cannot answer what is asked: {error}", {})
    before, champion_end_ms = None, None
    if champion:
        if unseen_from(champion.manifest.window) > begin_ms:
            logger.warning("the champion has seen part of the test window, which favours it: only what is better all the same is promoted")
        try:
            before, champion_end_ms = evaluate.answers(exam, champion), champion.manifest.window.end_ms
        except ArtifactError as error:
            logger.warning("the champion cannot be compared, so the challenger is judged as a first model: %s", error)
    first = before is None
    if before is None:
        before = evaluate.constant_answers(exam, challenger.hazard_KB, settings.targets, candidate.manifest.edges_ms)
    judged = [
        gate.Judged(t.name, t.horizon_ms, exam.users[row], exam.past.where(row), label, p, q)
        for t, row, label, p, q in zip(exam.asked, exam.rows, exam.labels, said, before, strict=True)
    ]
    tolerance = gate.Tolerance(
        settings.gate_log_loss_tolerance, settings.gate_auc_tolerance, settings.gate_max_ece, settings.gate_min_outcomes
    )
    window = candidate.manifest.window
    windows = gate.Windows(window.end_ms, champion_end_ms, begin_ms, window.judges_end_ms)
    decision = gate.decide(judged, windows=windows, tolerance=tolerance, rng=rng)
    for target, figures in decision.figures.items():
        for who, name in (("challenger", "challenger"), ("incumbent", "baseline" if first else "champion")):
            for measure, gauge in (("auc", metrics.auc), ("log_loss", metrics.log_loss), ("ece", metrics.ece)):
                if measure in figures.get(who, {}):
                    gauge.labels(target, name).set(figures[who][measure])
                if not first:
                    with suppress(KeyError):  # the baseline has had its day
                        gauge.remove(target, "baseline")
    return decision
