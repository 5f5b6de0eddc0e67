"""The report: what a model is worth, on what, and why it was promoted or not; `report.html` for people, `report.json` for programs.

Everything is asked anew of a sample of users, on moments of the newest window: figures therefore differ from the gate's within their
intervals. The threshold of each model is the one of best F1 on the window of the same length just before, and is applied to the newest.
A report names no user.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from model.artifact import ArtifactError, Model
from model.events import stable_hash
from model.hazards import DAY_MS
from model.targets import ANY, Target, event_sets
from trainer import drift, evaluate, measures, pictures, recency
from trainer.challenger import Challenger, Split
from trainer.dataset import NEVER_MS, Landmarks
from trainer.evaluate import Exam
from trainer.groups import Bounds, Kind, faults, standard_errors, standings
from trainer.history import History, sample_users
from trainer.inputs import write_file
from trainer.judges import unseen_from
from trainer.measures import Floats, Interval
from trainer.pictures import CHAMPION, CONSTANT, MODEL, RECENCY
from trainer.settings import TrainerSettings

EVENTS = 150_000
"""Events, of a sample of users, that are looked at. With MOMENTS and RESAMPLES this keeps a report at about two seconds."""
MOMENTS = 8_000
RESAMPLES = 200


@dataclass(slots=True)
class Report:
    """facts: all that report.json holds. by_target, by_group, common: (caption, svg) of the pictures, the first two of each target."""

    facts: dict[str, Any]
    by_target: dict[str, list[tuple[str, str]]]
    by_group: dict[str, list[tuple[str, str]]]
    common: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class _Windows:
    """Training begins; the judged window begins and ends. The threshold is chosen on as long a window before the judged one."""

    train_ms: int
    begin_ms: int
    end_ms: int

    @property
    def threshold_ms(self) -> int:
        return max(self.train_ms, 2 * self.begin_ms - self.end_ms)


def about_round(
    history: History,
    judged: History,
    split: Split,
    challenger: Challenger,
    champion: Model | None,
    settings: TrainerSettings,
    kind: str,
    reason: str,
    events: int = 0,
) -> Report:
    """The report of a round: judged on the test window, beside the champion.

    judged: the users who are asked about. kind, reason: what became of the challenger, and why. events: how many there are, where `history`
    is a sample of the users.
    """
    notes = ["Judged on the test window, of which the fitting saw nothing."]
    if events > len(history):
        notes.append(f"The data below are a sample of the users, with {len(history):,} of about {events:,} events.")
    if any(m.manifest.window.judges_end_ms is not None for m in (challenger.model, champion) if m):
        notes.append("Models are asked about the judges alone, users whose test window none of them has learnt from.")
    if champion and unseen_from(champion.manifest.window) > split.test_ms:
        notes.append("The champion had seen part of it, which favours the champion.")
    windows = _Windows(split.begin_ms, split.test_ms, split.end_ms)
    return _report(history, judged, windows, challenger, champion, settings, f"{kind.capitalize()}: {reason}.", notes)


def about_fit(history: History, split: Split, challenger: Challenger, settings: TrainerSettings) -> Report:
    """The report of a fit, which keeps no test window: judged on the validation window."""
    notes = [
        "Judged on the validation window, the newest there is. The heads have at last learnt from it, too: its figures are favourable, and "
        "those of `backtest` are not."
    ]
    windows = _Windows(split.begin_ms, split.validation_ms, split.test_ms)
    verdict = f"Fitted, and kept for what was best on validation: {challenger.fitted.why}. No gate was asked."
    known = history.before(split.test_ms)
    return _report(known, known, windows, challenger, None, settings, verdict, notes)


def _report(
    history: History,
    judged: History,
    windows: _Windows,
    challenger: Challenger,
    champion: Model | None,
    settings: TrainerSettings,
    verdict: str,
    notes: list[str],
) -> Report:
    model, targets = challenger.model, settings.targets
    rng = np.random.default_rng(settings.seed)
    sample = sample_users(judged.before(windows.end_ms), EVENTS)
    exam = evaluate.set_exam(sample, targets, windows.begin_ms, windows.end_ms, rng, MOMENTS)
    earlier = evaluate.set_exam(sample, exam.asked, windows.threshold_ms, windows.begin_ms, rng, MOMENTS)
    training = evaluate.set_exam(sample, exam.asked, windows.train_ms, windows.begin_ms, rng, MOMENTS)
    both = _joined(earlier, exam)
    said = {MODEL: evaluate.answers(both, model)}
    if champion:
        try:
            said[CHAMPION] = evaluate.answers(both, champion)
        except ArtifactError as error:
            notes.append(f"The champion is left out: {error}.")
    said[CONSTANT] = evaluate.constant_answers(both, challenger.hazard_KB, targets, model.manifest.edges_ms)
    said[RECENCY] = recency.answers(training, both)
    for asked, target in zip(exam.asked, targets, strict=True):
        if asked.horizon_ms < target.horizon_ms:
            notes.append(f"{target.name} is judged over {_days(asked.horizon_ms)}: the window is too short for {_days(target.horizon_ms)}.")

    by_target: dict[str, list[tuple[str, str]]] = {}
    by_group: dict[str, list[tuple[str, str]]] = {}
    bounds = Bounds(standard_errors(len(targets)), settings.gate_min_outcomes, settings.gate_log_loss_tolerance)
    figures = {}
    for i, target in enumerate(exam.asked):
        split_at = len(earlier.rows[i])
        before = {name: p[i][:split_at] for name, p in said.items()}
        now = {name: p[i][split_at:] for name, p in said.items()}
        about, by_target[target.name] = _about_target(target, exam, earlier, i, before, now, rng)
        groups, by_group[target.name] = _about_groups(exam, i, {name: p for name, p in now.items() if name in about["measures"]}, bounds)
        figures[target.name] = about | groups
    of_features = drift.of_features(history, windows.train_ms, windows.begin_ms, windows.end_ms)
    losses = {
        "validation": [*challenger.fitted.losses],
        "training": [float("nan"), *challenger.fitted.train_losses],  # none before the first pass
    }
    users, curves = _survival(sample, model, windows.end_ms)
    facts = {
        "version": model.manifest.version,
        "created_at": model.manifest.created_at.isoformat(),
        "verdict": verdict,
        "notes": notes,
        "data": _data(history, windows),
        "targets": figures,
        "losses": losses,
        "drift": {"features": of_features, "scores": {name: f["score_drift"] for name, f in figures.items()}},
        "survival": {"edges_ms": list(model.manifest.edges_ms), "users": users, "sets": curves},
    }
    passes = {name: [i for i, v in enumerate(values) if np.isfinite(v)] for name, values in losses.items()}
    drawn = {name: (known, [losses[name][i] for i in known]) for name, known in passes.items()}
    who = ", ".join(f"{name} (events: {u['events']:,}, silent for {u['silent_days']:.3g} days)" for name, u in users.items())
    common = [
        ("Losses, each above its lowest; what was kept is where validation was lowest", pictures.losses(drawn)),
        ("Drift of the features, from training to the judged window", pictures.drift(of_features)),
        *(
            (f"No {name} yet: {who}", pictures.survival(model.manifest.edges_ms, by_user))
            for name, by_user in curves.items()
            if all(np.isfinite(alive).all() for alive in by_user.values())
        ),
    ]
    return Report(_plain(facts), by_target, by_group, common)


def _about_target(
    target: Target, exam: Exam, earlier: Exam, i: int, before: dict[str, Floats], now: dict[str, Floats], rng: np.random.Generator
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    y, user = exam.labels[i], exam.users[exam.rows[i]]
    broken = [name for name, p in now.items() if not (np.isfinite(p).all() and np.isfinite(before[name]).all())]
    whole = {name: p for name, p in now.items() if name not in broken}
    thresholds = {name: measures.best_threshold(earlier.labels[i], before[name]) for name in whole}
    own, above = measures.measured(y, user, {name: (p, thresholds[name]) for name, p in whole.items()}, rng, RESAMPLES)
    drifted = drift.psi(now[CHAMPION], now[MODEL]) if {CHAMPION, MODEL} <= whole.keys() and len(y) else float("nan")
    facts = {
        "asks": f"{_set_name(target.types)} {target.outcome} within {_days(target.horizon_ms)}",
        "horizon_ms": target.horizon_ms,
        "moments": len(y),
        "positives": int(y.sum()),
        "users": len(np.unique(user)),
        "thresholds": thresholds,
        "measures": own,
        "above": {"than": next(iter(whole), None), "models": above},
        "no_probabilities": broken,
        "score_drift": drifted,
    }
    shaped = {name: p for name, p in whole.items() if name != CONSTANT}  # a constant is one point there
    drawn: list[tuple[str, str]] = []
    if 0 < y.sum() < len(y):
        drawn = [
            ("ROC", pictures.roc(y, whole)),
            ("Precision and recall; the level line is the base rate, as of the constant hazard", pictures.precision_recall(y, shaped)),
            ("Calibration in tenths, with 95% intervals", pictures.calibration(y, shaped)),
            ("Cumulative gains; the dotted line is the top tenth", pictures.gains(y, whole)),
        ]
    learned = {name: p for name, p in whole.items() if name in (MODEL, CHAMPION)}
    if learned and len(y):
        index = f": population stability index {drifted:.3f}" if np.isfinite(drifted) else ""
        drawn.append((f"Scores{' against the champion' if CHAMPION in learned else ''}{index}", pictures.scores(learned)))
    return facts, drawn


def _about_groups(exam: Exam, i: int, said: dict[str, Floats], bounds: Bounds) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Calibration of model and champion by group, and in which groups the model is off beyond noise, whatever the champion says there."""
    row, y = exam.rows[i], exam.labels[i]
    past, user = exam.past.where(row), exam.users[row]
    learned = {name: p for name, p in said.items() if name in (MODEL, CHAMPION)}
    off = [fault.words for fault in faults(past, user, y, said[MODEL], bounds)] if MODEL in said else []
    by_group = standings(past, user, y, learned)
    facts = {"groups": [standing.facts() for standing in by_group], "groups_off": off}
    if not learned or not by_group:
        return facts, []
    captions: dict[Kind, str] = {
        "events": "the number of events so far",
        "tenure": "the time since the first event",
        "silence": "the time since the last event",
    }
    of_kind = {kind: [s for s in by_group if s.group.kind == kind] for kind in captions}
    return facts, [(f"By {caption}", pictures.by_group(kind, of_kind[kind])) for kind, caption in captions.items()]


def _joined(a: Exam, b: Exam) -> Exam:
    """Both exams as one, so that a model steps over the events once: the rows of `a` come first."""
    columns = (np.concatenate([getattr(e.moments, f.name) for e in (a, b)]) for f in fields(Landmarks))
    rows = tuple(np.concatenate([ra, rb + len(a.moments)]) for ra, rb in zip(a.rows, b.rows, strict=True))
    labels = tuple(np.concatenate(pair) for pair in zip(a.labels, b.labels, strict=True))
    assert a.asked == b.asked
    return Exam(a.history, Landmarks(*columns), a.asked, rows, labels, ())


def _survival(history: History, model: Model, at_ms: int) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Floats]]]:
    """Sample users at `at_ms`; and by event set and user, (B,) the probability that none comes by each edge of the grid."""
    count = np.diff(history.first)
    silent_ms = at_ms - history.time_ms[history.first[1:] - 1]
    chosen = {
        "the most active": int(np.argmax(count)),
        "a typical one": int(np.lexsort((silent_ms, np.abs(count - np.median(count))))[0]),
        "long silent": int(np.argsort(silent_ms, kind="stable")[int(0.9 * (len(count) - 1))]),
    }
    about = {who: {"events": int(count[u]), "silent_days": silent_ms[u] / DAY_MS} for who, u in chosen.items()}
    keep_U = np.isin(np.arange(history.users), list(chosen.values()))
    few = history.of_users(keep_U)
    event = few.first[1:][np.searchsorted(np.flatnonzero(keep_U), list(chosen.values()))] - 1
    sets, edges_ms = event_sets(tuple(model.manifest.targets)), model.manifest.edges_ms
    n = len(event)
    moments = Landmarks(event, np.full(n, at_ms), np.ones(n, np.float32), np.full((n, len(sets)), NEVER_MS), np.zeros(n, np.int64))
    asked = tuple(Target(name=f"by_{b}", types=types, outcome="absent", horizon_ms=e) for types in sets for b, e in enumerate(edges_ms))
    alive_TN = np.array(evaluate.answers(Exam(few, moments, asked, (np.arange(n),) * len(asked), (), ()), model))
    alive_KBN = alive_TN.reshape(len(sets), len(edges_ms), n)
    return about, {_set_name(types): {who: alive_KBN[k, :, i] for i, who in enumerate(chosen)} for k, types in enumerate(sets)}


def _data(history: History, windows: _Windows) -> dict[str, Any]:
    """What was in the data: users, events, window, types."""
    out: dict[str, Any] = {}
    spans = {"trained on, with validation": (windows.train_ms, windows.begin_ms), "judged on": (windows.begin_ms, windows.end_ms)}
    for name, (begin_ms, end_ms) in spans.items():
        inside = (history.time_ms >= begin_ms) & (history.time_ms < end_ms)
        kinds, count = np.unique(history.type_hash[inside], return_counts=True)
        by_hash = dict(zip(kinds.tolist(), count.tolist(), strict=True))
        types = {t: by_hash[stable_hash(t)] for t in history.types if stable_hash(t) in by_hash}
        out[name] = {
            "begin": _time(begin_ms),
            "end": _time(end_ms),
            "days": (end_ms - begin_ms) / DAY_MS,
            "users": len(np.unique(history.user[inside])),
            "events": int(inside.sum()),
            "types": dict(sorted(types.items(), key=lambda item: -item[1])),
        }
    return out


def to_html(report: Report) -> str:
    """One page that needs no other file."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = lambda value, digits=4: "n/a" if value is None else f"{value:,.{digits}f}"
    template = environment.from_string(files("trainer").joinpath("report.jinja").read_text("utf-8"))
    return template.render(
        report.facts,
        pictures=report.by_target,
        by_group=report.by_group,
        common=report.common,
        measure_names=measures.MEASURES,
        higher=measures.HIGHER_IS_BETTER,
        slight=drift.SLIGHT,
        large=drift.LARGE,
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def to_json(report: Report) -> str:
    return json.dumps(report.facts, indent=1, allow_nan=False)


def write(folder: Path, report: Report) -> Path:
    """`report.json` and `report.html` in `folder`, each whole or not at all. Returns the latter's path. Raises OSError."""
    for name, text in (("report.json", to_json(report)), ("report.html", to_html(report))):
        write_file(folder / name, lambda path, text=text: path.write_text(text, "utf-8"))  # type: ignore[misc]
    return folder / "report.html"


def _plain(value: Any) -> Any:
    """The same in JSON's own kinds; what is not finite is null."""
    if isinstance(value, Interval):
        return {"value": _plain(value.value), "low": _plain(value.low), "high": _plain(value.high)}
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray | Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 6) if np.isfinite(value) else None
    return value


def _set_name(types: Sequence[str]) -> str:
    return "event" if ANY in types else "+".join(types)


def _days(ms: int) -> str:
    return f"{ms / DAY_MS:.3g} days"


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
