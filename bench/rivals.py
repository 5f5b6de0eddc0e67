"""What a recipe is judged by: a law's case, its questions with what came to pass, and what baselines answer. None depends on the recipe.

Baselines are those of `trainer compare` on hand-made features, one fit for each kind of question: scheduled ones learn from scheduled
moments before `until`, the others from moments right after events, each where the horizon closed before `until`.
"""

from __future__ import annotations

import hashlib
import inspect
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench import laws
from bench.laws import journey
from bench.laws.case import AFTER, SCHEDULED, Asked, Case, Ints
from demo import attainable, shop
from model.hazards import DAY_MS
from trainer import baselines, cutoffs, pareto
from trainer.cutoffs import Probabilities, Questions, ask, ask_about, training_moments
from trainer.history import History, from_table

LEARNT = 120_000
"""Moments of a kind that a baseline learns from, at most."""
CONSTANT, LOGISTIC, LIGHTGBM, PARETO = "constant", "logistic", "lightgbm", "pareto"
NEVER_MS = 1 << 60
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A case with all that is known of it before a recipe is tried. said: by kind and baseline, (Q, T) answers."""

    case: Case
    said: dict[str, dict[str, Probabilities]]


def prepared(name: str, users: int, seed: int, folder: Path, keep: Path | None, say: Say) -> Prepared:
    """A law's case with its baselines: made, or read from `keep` if it was made by the same code. folder: of `journey`."""
    path = keep / f"{name}-{users}-{seed}-{_digest(name, folder)}.pickle" if keep else None
    if path and path.is_file():
        with path.open("rb") as file:
            kept: Prepared = pickle.load(file)
        return kept
    begin = time.monotonic()
    case = journey.read(folder) if name == journey.NAME else laws.LAWS[name].draw(users, seed)
    say(f"{len(case.table):,} events, {sum(len(a) for a in case.asked.values()):,} questions in {time.monotonic() - begin:.0f} s")
    history = from_table(case.table)
    found = Prepared(case, answers(case, history, seed, say))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        with temporary.open("wb") as file:
            pickle.dump(found, file, protocol=5)
        temporary.replace(path)
    return found


def _digest(name: str, folder: Path) -> str:
    """Of the source files, and for `journey` the data, that make a case and its baselines."""
    shared = [Path(m.__file__ or "") for m in (laws.case, laws.markov, laws.renewal, baselines, cutoffs, pareto, attainable, shop)]
    if name == journey.NAME:
        own = [Path(journey.__file__), *(folder / n for n in journey.FILES)]
    else:
        own = [Path(inspect.getfile(laws.LAWS[name].simulate))]
    digest = hashlib.sha256()
    for path in (Path(__file__), *shared, *own):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def questions(case: Case, history: History, kind: str) -> Questions:
    """What is asked, and what came to pass."""
    asked: Asked = case.asked[kind]
    code = {name: i for i, name in enumerate(history.user_ids)}
    user = np.fromiter((code[name] for name in asked.user_id), np.int64, len(asked))
    found = ask_about(history, case.targets, user, asked.at_ms, NEVER_MS)
    assert len(found) == len(asked), "a user is asked about before the first event"
    return found


def to_learn_from(case: Case, history: History, kind: str, seed: int) -> Questions:
    """Moments before `until`, of which at least the shortest horizon had closed by then."""
    shortest_ms = min(t.horizon_ms for t in case.targets)
    if kind == SCHEDULED:
        learn = ask(history, case.targets, training_moments(history.first_ms, case.until_ms, shortest_ms), case.until_ms)
        if case.active_days is not None:
            learn = learn.where(learn.at_ms - history.time_ms[learn.event] <= case.active_days * DAY_MS)
        return learn.where(_some(len(learn), seed))
    assert kind == AFTER
    event = np.flatnonzero(history.time_ms + 1 + shortest_ms <= case.until_ms)
    event = event[_some(len(event), seed)]
    return ask_about(history, case.targets, history.user[event], history.time_ms[event] + 1, case.until_ms)


def _some(count: int, seed: int) -> Ints:
    return np.sort(np.random.default_rng(seed).permutation(count)[:LEARNT])


def to_compare(case: Case, history: History, kind: str, seed: int) -> baselines.Case:
    """What a baseline learns from and is asked."""
    learn, asked = to_learn_from(case, history, kind, seed), questions(case, history, kind)
    return baselines.Case(history, case.targets, learn, asked, case.until_ms, seed)


def answers(case: Case, history: History, seed: int, say: Say) -> dict[str, dict[str, Probabilities]]:
    """By kind and baseline, (Q, T)."""
    compared = {kind: to_compare(case, history, kind, seed) for kind in case.asked}
    found: dict[str, dict[str, Probabilities]] = {kind: {CONSTANT: baselines.constant(of)} for kind, of in compared.items()}
    for kind, of in compared.items():
        for name, alternative in ((LOGISTIC, baselines.logistic), (LIGHTGBM, baselines.lightgbm)):
            begin = time.monotonic()
            found[kind][name] = alternative(of)
            say(f"{kind}: {name} fitted on {len(of.learn):,} moments in {time.monotonic() - begin:.0f} s")
    if case.pareto:
        begin = time.monotonic()
        first = next(iter(compared.values()))
        said = pareto.pareto_nbd(replace(first, asked=_together([of.asked for of in compared.values()])))
        cuts = np.cumsum([len(of.asked) for of in compared.values()])[:-1]
        for kind, part in zip(compared, np.split(said, cuts), strict=True):
            found[kind][PARETO] = part
        say(f"{PARETO} fitted in {time.monotonic() - begin:.0f} s")
    return found


def _together(parts: list[Questions]) -> Questions:
    columns = ("user", "at_ms", "event", "label", "closed")
    return Questions(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))
