"""`compare`: the named alternatives and this model, fitted on one split, asked the same questions, in one table."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from model.hazards import DAY_MS
from model.targets import Target
from trainer import baselines, inputs
from trainer.backtest import MEASURES, said_by
from trainer.baselines import Case
from trainer.cutoffs import Probabilities, ask, figures, training_moments
from trainer.history import History, from_table
from trainer.offline import fit_model
from trainer.pareto import pareto_nbd
from trainer.sequences import sequence_model
from trainer.settings import TrainerSettings
from trainer.stage import Progress

OURS = "ours"
ALTERNATIVES: dict[str, tuple[Callable[[Case], Probabilities], tuple[str, ...]]] = {
    "constant": (baselines.constant, ()),
    "recency": (baselines.recency, ("sklearn",)),
    "logistic": (baselines.logistic, ("sklearn",)),
    "lightgbm": (baselines.lightgbm, ("lightgbm",)),
    "pareto": (pareto_nbd, ("scipy",)),
    "mlp": (baselines.mlp, ("sklearn",)),
    **{kind: (sequence_model(kind), ()) for kind in ("cnn", "conv_lstm", "rnn", "lstm", "gru")},
}
"""Each with the modules that it needs."""
LANDMARKS = 150_000
MOST_MOMENTS = 8
"""Moments from `until` on at which everybody is asked."""


def compare(
    source: Path, until: str | None, only: str | None, settings: TrainerSettings, now: datetime, progress: Progress
) -> dict[str, dict[str, Any]]:
    """For each alternative its fit's seconds, and the figures of each target. Raises ValueError for a name or a split that cannot be."""
    names = chosen(only)
    table = inputs.read_events(source, settings.event_fields)
    first_ms, last_ms = inputs.known_times(table)
    longest_ms = max(t.horizon_ms for t in settings.targets)
    until_ms = inputs.time_ms(until) if until else last_ms + 1 - longest_ms
    if not first_ms < until_ms or until_ms + min(t.horizon_ms for t in settings.targets) > last_ms + 1:
        raise ValueError(
            f"nothing can be compared at --until {until}: the events must go on for a horizon beyond it "
            f"(they end {(last_ms - until_ms) / DAY_MS:.1f} days after it)"
        )
    history = from_table(table)
    case = split(history, settings.targets, first_ms, until_ms, last_ms + 1, settings.seed)
    found: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(names):
        progress(i / len(names), name)
        began = time.monotonic()
        said = _ours(table, history, case, settings, now) if name == OURS else ALTERNATIVES[name][0](case)
        seconds = round(time.monotonic() - began, 2)
        found[name] = {"seconds": seconds, "targets": figures(case.asked, settings.targets, said)}
    progress(1.0, "done")
    return found


def chosen(only: str | None) -> list[str]:
    """The alternatives asked for, in the table's order. Raises ValueError for a name there is none of, or a library that is missing."""
    every = [*ALTERNATIVES, OURS]
    names = [n.strip() for n in only.split(",") if n.strip()] if only else every
    if unknown := [n for n in names if n not in every]:
        raise ValueError(f"there is no alternative {', '.join(unknown)}; there are: {', '.join(every)}")
    needed = sorted({module for n in names if n != OURS for module in ALTERNATIVES[n][1]})
    if missing := [module for module in needed if importlib.util.find_spec(module) is None]:
        raise ValueError(f"compare needs {', '.join(missing)}: pip install 'streamscore[compare]', or leave alternatives out with --only")
    return [n for n in every if n in names]


def split(history: History, targets: tuple[Target, ...], first_ms: int, until_ms: int, end_ms: int, seed: int) -> Case:
    """What is learnt from before `until`, and what is asked from then on: at `until` and every few days after it, on other weekdays too."""
    longest_ms = max(t.horizon_ms for t in targets)
    learn = ask(history, targets, training_moments(first_ms, until_ms, longest_ms), until_ms)
    if len(learn) > LANDMARKS:
        learn = learn.where(np.sort(np.random.default_rng(seed).permutation(len(learn))[:LANDMARKS]))
    room_ms = max(end_ms - longest_ms - until_ms, 0)
    step_ms = max(3 * DAY_MS, -(-room_ms // (MOST_MOMENTS * DAY_MS)) * DAY_MS)
    step_ms += DAY_MS * (step_ms % (7 * DAY_MS) == 0)
    asked = ask(history, targets, [until_ms + i * step_ms for i in range(room_ms // step_ms + 1)], end_ms)
    return Case(history, targets, learn, asked, until_ms, seed)


def _ours(table: pa.Table, history: History, case: Case, settings: TrainerSettings, now: datetime) -> Probabilities:
    challenger = fit_model(table, case.until_ms, settings, now, lambda share, words: None)
    return said_by(challenger.model, history, case.asked, settings.targets)


def tabulated(found: dict[str, dict[str, Any]], targets: tuple[Target, ...]) -> Table:
    """A section a target, a row an alternative; seconds: to fit it, features and answers included."""
    table = Table("target", "alternative", *MEASURES, "questions", "base rate", "seconds")
    for target in targets:
        for name, entry in found.items():
            if f := entry["targets"].get(target.name):
                cells = [f"{f[m]:.4f}" if m in f else "" for m in MEASURES]
                table.add_row(target.name, name, *cells, f"{f['questions']:,}", f"{f['base_rate']:.4f}", f"{entry['seconds']:.1f}")
        table.add_section()
    return table
