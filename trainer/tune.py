"""`tune`: a search for better settings, by Optuna, on inner splits of what lies before `until` alone."""

from __future__ import annotations

import importlib.util
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from trainer import inputs
from trainer.backtest import origins, said_by
from trainer.cutoffs import ask, figures
from trainer.history import from_table
from trainer.offline import fit_model
from trainer.settings import TrainerSettings
from trainer.stage import Progress

INNER = 2
"""Inner origins at which every trial is fitted and scored."""


def tune(
    source: Path, until: str | None, trials: int, minutes: float | None, out: Path, settings: TrainerSettings, progress: Progress
) -> str:
    """Writes the best settings found as TOML. Returns a sentence. Raises ValueError where Optuna or enough data is missing."""
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("tune needs optuna: pip install 'streamscore[tune]'")
    if trials < 1:
        raise ValueError("--trials must be at least 1")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    table = inputs.read_events(source, settings.event_fields)
    first_ms, last_ms = inputs.known_times(table)
    until_ms = min(inputs.time_ms(until), last_ms + 1) if until else last_ms + 1
    table = inputs.before(table, until_ms)
    longest_ms = max(t.horizon_ms for t in settings.targets)
    moments = origins(first_ms, until_ms, longest_ms, INNER, None)
    history = from_table(table)
    asked = [ask(history, settings.targets, [m], until_ms) for m in moments]
    now = datetime.now(UTC)

    def loss(changes: dict[str, Any]) -> float:
        """Mean log-loss over inner origins and targets."""
        changed = settings.model_copy(update=changes)
        losses = []
        for moment_ms, questions in zip(moments, asked, strict=True):
            model = fit_model(table, moment_ms, changed, now, lambda share, words: None).model
            found = figures(questions, settings.targets, said_by(model, history, questions, settings.targets))
            losses += [f["log_loss"] for f in found.values()]
        return float(np.mean(losses))

    def trial_loss(trial: optuna.Trial) -> float:
        value = loss(suggested(trial))
        progress((trial.number + 1) / trials, f"trial {trial.number + 1}: log-loss {value:.4f}")
        return value

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=settings.seed))
    study.enqueue_trial({name: getattr(settings, name) for name in SPACE})  # where the search starts: it can only get better
    study.optimize(trial_loss, n_trials=trials, timeout=minutes * 60 if minutes else None)
    best = study.best_trial
    first = study.trials[0].value
    inputs.write_file(out, lambda path: _write(path, suggested(best), best.value, first))
    return f"{out}: log-loss {best.value:.4f} in trial {best.number + 1} of {len(study.trials)}, {first:.4f} with the settings as they were"


SPACE = ("hidden", "head", "dropout", "weight_decay", "learning_rate", "chunk_events", "batch_events")


def suggested(trial: Any) -> dict[str, Any]:
    """The settings of a trial; a finished one gives them back."""
    return {
        "hidden": trial.suggest_int("hidden", 8, 128, log=True),
        "head": trial.suggest_int("head", 8, 128, log=True),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 1.0, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 5e-4, 2e-2, log=True),
        "chunk_events": trial.suggest_int("chunk_events", 20, 200, log=True),
        "batch_events": trial.suggest_int("batch_events", 512, 8192, log=True),
    }


def _write(path: Path, changes: dict[str, Any], best: float | None, first: float | None) -> None:
    lines = [f"# inner log-loss {best:.5f}; {first:.5f} with the settings as they were", "[trainer]"]
    path.write_text("\n".join([*lines, *(f"{name} = {value!r}" for name, value in changes.items()), ""]))
