"""What the trainer shows on a terminal: tables of models, and a bar for the fitting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from model.artifact import ArtifactError, Manifest
from model.registry import Registry
from trainer.service import told_now_and_then
from trainer.stage import Progress as FitProgress


def versions(registry: Registry) -> None:
    """Every complete model, oldest first."""
    current = registry.current()
    manifests = registry.versions()
    if not manifests:
        print(f"{registry.location} has no models yet")
        return
    last = {d["version"]: d["action"] for d in registry.decisions()}
    targets = list(dict.fromkeys(t.name for m in manifests for t in m.targets))
    table = Table(
        "version", "state", "trained up to", "users", "events", *(f"{t} AUC" for t in targets), *(f"{t} log-loss" for t in targets)
    )
    for m in manifests:
        state = "current" if current and m.version == current.version else last.get(m.version, "published")
        figures = [_figure(m, t, measure) for measure in ("auc", "log_loss") for t in targets]
        table.add_row(m.version, state, _time(m.window.end_ms), f"{m.window.users:,}", f"{m.window.events:,}", *figures)
    _console().print(table)


def version(registry: Registry, name: str) -> None:
    """One model. Raises ArtifactError where there is none of that name."""
    manifest = next((m for m in registry.versions() if m.version == name), None)
    if manifest is None:
        raise ArtifactError(f"{registry.location} has no model {name}; see `python -m trainer list`")
    current = registry.current()
    console = _console()
    facts = Table("fact", "value", title=f"{name}{' (current)' if current and current.version == name else ''}")
    for fact, value in (
        ("created", f"{manifest.created_at:%Y-%m-%d %H:%M:%S}"),
        ("trained on", f"{_time(manifest.window.start_ms)} to {_time(manifest.window.end_ms)}"),
        ("users, events", f"{manifest.window.users:,}, {manifest.window.events:,}"),
        ("event types", ", ".join(manifest.vocabulary)),
        ("encoder", f"{manifest.encoder} {manifest.shape}, id {manifest.encoder_id}"),
        ("lineage", manifest.lineage),
        ("weights sha256", manifest.weights_sha256),
    ):
        facts.add_row(fact, value)
    console.print(facts)
    table = Table("target", "judged over", "moments", "positives", "who", "AUC", "log-loss", "Brier", "ECE", title="on the test window")
    for target in manifest.targets:
        figures = manifest.metrics.get(target.name)
        if isinstance(figures, dict):
            for who in ("challenger", "incumbent"):
                s: dict[str, Any] = figures.get(who, {})
                measures = [f"{s[m]:.4f}" if isinstance(s.get(m), float) else "" for m in ("auc", "log_loss", "brier", "ece")]
                head = [target.name, f"{figures['horizon_days']:g} d", f"{figures['moments']:,}", f"{figures['positives']:,}"]
                table.add_row(*(head if who == "challenger" else [""] * 4), who, *measures)
    console.print(table)
    if report := registry.attached(name, "report.html"):
        console.print(f"report: {report}", highlight=False, soft_wrap=True)
    for decision in registry.decisions():
        if decision["version"] == name:
            console.print(f"{decision['at'][:19]} {decision['action']} by {decision['by']}: {decision['reason']}", highlight=False)


@contextmanager
def fitting(what: str = "fitting") -> Iterator[FitProgress]:
    """A progress bar on a terminal, log lines now and then elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield told_now_and_then(what=what)
        return
    with Progress(TextColumn(what), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, words: bar.update(task, completed=share, description=words)


def as_text(table: Table) -> str:
    """A table as lines of text, as wide as the terminal."""
    console = _console()
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=200)  # a pipe has no width to fit into


def _figure(manifest: Manifest, target: str, measure: str) -> str:
    figures = manifest.metrics.get(target)
    value = figures.get("challenger", {}).get(measure) if isinstance(figures, dict) else None
    return f"{value:.4f}" if isinstance(value, float) else ""


def _time(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M}"
