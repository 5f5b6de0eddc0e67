"""`backtest`: rolling origins. Fit on what was known at an origin, ask about everybody known then, score, move on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from model.artifact import Model
from model.hazards import DAY_MS
from model.targets import Target
from trainer import inputs
from trainer.cutoffs import Probabilities, Questions, ask, figures
from trainer.history import History, from_table
from trainer.offline import fit_model
from trainer.queries import answers
from trainer.settings import TrainerSettings
from trainer.stage import Progress

logger = logging.getLogger(__name__)
MEASURES = ("auc", "log_loss", "brier", "ece")


def backtest(
    source: Path, count: int, every: str | None, until: str | None, settings: TrainerSettings, now: datetime, progress: Progress
) -> list[dict[str, Any]]:
    """One entry an origin, oldest first: when, how much was known, the fit's seconds, and the figures of each target."""
    table = inputs.read_events(source, settings.event_fields)
    first_ms, last_ms = inputs.known_times(table)
    end_ms = inputs.time_ms(until) if until else last_ms + 1
    table = inputs.before(table, end_ms)
    moments = origins(first_ms, end_ms, max(t.horizon_ms for t in settings.targets), count, inputs.duration_ms(every) if every else None)
    history = from_table(table)
    report = []
    for i, origin_ms in enumerate(moments):

        def within(share: float, words: str, i: int = i) -> None:
            progress((i + share) / len(moments), f"origin {i + 1} of {len(moments)}, {words}")

        challenger = fit_model(table, origin_ms, settings, now, within)
        questions = ask(history, settings.targets, [origin_ms], end_ms)
        said = said_by(challenger.model, history, questions, settings.targets)
        window = challenger.model.manifest.window
        report.append(
            {
                "origin": datetime.fromtimestamp(origin_ms / 1000, UTC).isoformat(),
                "weekday": f"{datetime.fromtimestamp(origin_ms / 1000, UTC):%A}",
                "users": window.users,
                "events": window.events,
                "fit_seconds": round(challenger.fitted.seconds, 2),
                "targets": figures(questions, settings.targets, said),
            }
        )
    return report


def origins(first_ms: int, end_ms: int, longest_ms: int, count: int, every_ms: int | None) -> list[int]:
    """The times of the fits, oldest first: the newest is the last whose horizons all close. Raises ValueError where they do not fit.

    By default they share the second half of the data, and never lie whole weeks apart: each falls on a weekday of its own.
    """
    last_ms = end_ms - longest_ms
    room_ms = last_ms - first_ms
    if every_ms is None:
        every_ms = max(room_ms // (2 * count), 1)
        if every_ms >= DAY_MS:
            days = every_ms // DAY_MS
            every_ms = (days - (days % 7 == 0)) * DAY_MS
    elif count > 1 and every_ms % (7 * DAY_MS) == 0:
        logger.warning("origins whole weeks apart all fall on one weekday: a model may be right on that day alone")
    moments = [last_ms - i * every_ms for i in range(count)][::-1]
    if count < 1 or moments[0] <= first_ms:
        raise ValueError(
            f"{count} origins {every_ms / DAY_MS:g} days apart and a horizon of {longest_ms / DAY_MS:g} days do not fit into "
            f"{(end_ms - first_ms) / DAY_MS:.1f} days of events: ask for fewer --origins, or a smaller --every"
        )
    return moments


def said_by(model: Model, history: History, questions: Questions, targets: Sequence[Target]) -> Probabilities:
    """(N, T) what the model says to the questions."""
    n = len(questions)
    kind = np.repeat(np.arange(len(targets)), n)
    event, at_ms = np.tile(questions.event, len(targets)), np.tile(questions.at_ms, len(targets))
    return answers(model, history, event, at_ms, kind, targets, lambda share, words: None).reshape(len(targets), n).T


def tabulated(report: Sequence[dict[str, Any]], targets: Sequence[Target]) -> Table:
    """A row an origin and target, then the mean over the origins."""
    table = Table("origin", "weekday", "users", "target", "questions", "base rate", *MEASURES, "fit seconds")
    for entry in report:
        for name, f in entry["targets"].items():
            cells = [f"{f[m]:.4f}" if m in f else "" for m in MEASURES]
            place = (entry["origin"][:16], entry["weekday"], f"{entry['users']:,}")
            table.add_row(*place, name, f"{f['questions']:,}", f"{f['base_rate']:.4f}", *cells, f"{entry['fit_seconds']:.1f}")
    table.add_section()
    for target in targets:
        found = [entry["targets"][target.name] for entry in report if target.name in entry["targets"]]
        means = [[f[m] for f in found if m in f] for m in MEASURES]
        cells = [f"{np.mean(values):.4f}" if values else "" for values in means]
        table.add_row("mean", "", "", target.name, "", f"{np.mean([f['base_rate'] for f in found]):.4f}", *cells, "")
    return table
