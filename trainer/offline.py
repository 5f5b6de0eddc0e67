"""`fit` and `predict`: a model from a file, and its answers in a file. No Kafka, no registry, no gate."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from model.artifact import ArtifactError, Model, dump, load
from model.hazards import DAY_MS
from trainer import inputs
from trainer.challenger import Challenger, Split, train
from trainer.history import History, from_table, sample_users
from trainer.metrics import Metrics
from trainer.queries import predict, read_queries, write_predictions
from trainer.settings import TrainerSettings
from trainer.stage import Progress

logger = logging.getLogger(__name__)


def fit_model(table: pa.Table, until_ms: int, settings: TrainerSettings, now: datetime, progress: Progress) -> Challenger:
    """A model fitted on the events before `until`, the newest share of which stops the fitting. Raises ValueError on too little data."""
    return fit_window(*window(table, until_ms, settings), settings, now, progress)


def fit_window(history: History, split: Split, settings: TrainerSettings, now: datetime, progress: Progress) -> Challenger:
    """A model of a window."""
    metrics, rng = Metrics(), np.random.default_rng(settings.seed)
    challenger = train(history, split, None, settings, metrics, now, rng, progress, lambda: False)
    challenger.model.manifest.metrics = {"validation_loss": round(min(challenger.fitted.losses), 5)}
    return challenger


def window(table: pa.Table, until_ms: int, settings: TrainerSettings) -> tuple[History, Split]:
    """What `fit` learns from: all events before `until`, unless window_days or max_events are set: those are for the service."""
    known = inputs.before(table, until_ms)
    if not len(known):
        raise ValueError(f"there is no event before --until; the first is at {inputs.known_times(table)[0]} ms")
    history = from_table(known)
    for target in settings.targets:
        if target.types != ("*",) and not set(target.types) & set(history.types):
            types = ", ".join(sorted(history.types, key=lambda t: -history.types[t])[:20])
            raise ValueError(f"target {target}: before --until no event is of type {'+'.join(target.types)}; the types are {types}")
    if "max_events" in settings.model_fields_set:
        history = sample_users(history, settings.max_events)
    begin_ms = int(history.time_ms.min())
    if "window_days" in settings.model_fields_set:
        begin_ms = max(begin_ms, until_ms - int(settings.window_days * DAY_MS))
    end_ms = min(until_ms, int(history.time_ms.max()) + DAY_MS)  # beyond it nobody looked: silence there says nothing
    validation_ms = end_ms - int((end_ms - begin_ms) * settings.validation_share)
    trained = int(((history.time_ms >= begin_ms) & (history.time_ms < validation_ms)).sum())
    if trained < 2 or len(history) - trained < 1:
        raise ValueError(
            f"too little data to fit on: {len(history):,} events before --until, {trained:,} of them before the validation window"
        )
    return history, Split(begin_ms, validation_ms, end_ms, end_ms)


def save_model(folder: Path, challenger: Challenger, write_report: Callable[[Path], object], *, replace: bool) -> None:
    """manifest.json, weights.safetensors and the report in a folder that appears whole. Raises ValueError where it exists, unless
    `replace`."""
    manifest_json, weights = dump(challenger.model.manifest, challenger.model.network)

    def fill(path: Path) -> None:
        (path / "manifest.json").write_bytes(manifest_json)
        (path / "weights.safetensors").write_bytes(weights)
        try:
            write_report(path)
        except Exception:  # the model is what was asked for
            logger.exception("there is no whole report of %s", folder)

    inputs.write_folder(folder, fill, replace=replace)


def load_model(folder: Path, device: str) -> Model:
    """The model of a folder that `fit`, or a registry, wrote. Raises ArtifactError."""
    try:
        return load((folder / "manifest.json").read_bytes(), (folder / "weights.safetensors").read_bytes(), device)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{folder} is no model: it has no {Path(error.filename).name}; `python -m trainer fit` makes one") from None


def fit(source: Path, until: str | None, out: Path, replace: bool, settings: TrainerSettings, now: datetime, progress: Progress) -> str:
    """`python -m trainer fit`. Returns a sentence on what was done."""
    inputs.refuse_existing(out, replace=replace)
    table = inputs.read_events(source, settings.event_fields)
    until_ms = inputs.time_ms(until) if until else inputs.known_times(table)[1] + 1
    history, split = window(table, until_ms, settings)
    del table  # larger than the history
    challenger = fit_window(history, split, settings, now, progress)

    def write_report(folder: Path) -> None:
        if settings.report:
            from trainer import report  # matplotlib takes half a second to load, and nobody else needs it

            report.write(folder, report.about_fit(history, split, challenger, settings))

    save_model(out, challenger, write_report, replace=replace)
    manifest, fitted = challenger.model.manifest, challenger.fitted
    digest = hashlib.sha256((out / "weights.safetensors").read_bytes()).hexdigest()[:12]
    return (
        f"{out}: {', '.join(map(str, manifest.targets))}; fitted on {manifest.window.events:,} events of {manifest.window.users:,} users "
        f"in {fitted.seconds:.1f} s, {len(fitted.losses) - 1} passes: {fitted.why}; weights {digest}"
    )


def answer(folder: Path, source: Path, queries_path: Path, out: Path, settings: TrainerSettings, progress: Progress) -> str:
    """`python -m trainer predict`. Returns a sentence on what was done."""
    model = load_model(folder, settings.resolved_device)
    queries = read_queries(queries_path)
    history = from_table(inputs.read_events(source, settings.event_fields))
    strangers = len(set(queries.user_id) - set(history.user_ids))
    probability = predict(model, history, queries, progress, where=str(queries_path))
    inputs.write_file(out, lambda path: write_predictions(path, queries.query, probability))
    unknown = f"; {strangers:,} users have no event at all, and get the base rate" if strangers else ""
    return f"{out}: {len(queries):,} queries answered, mean probability {probability.mean():.4f}{unknown}"
