"""python -m bench quality: a battery of laws, so that no recipe of training is chosen on one.

Each law is drawn fresh from a seed, and has an exact filter: the probability of every target given the events before the moment and the
law, which nobody can beat. Ours (`trainer fit` with its defaults, or with --set) and the baselines of `trainer compare` are fitted on the
events before `until` and asked the same questions after it: at scheduled moments, and right after events.

  loss          log-loss in nats, in expectation under the filter's probabilities (by the outcomes where no filter is known)
  excess        loss of ours above that of the best baseline (constant, logistic regression, LightGBM, Pareto/NBD where it applies)
  closed        (loss of LightGBM - loss of ours) / (loss of LightGBM - loss of the filter); smpl: the same by the outcomes as they fell
  worst group   mean prediction minus share that came true, in the worst tenth by number of events, tenure or recency, beyond noise
  a row passes  with an excess of 0.001 at most, and an ECE at most 0.012 above that of a calibrated model with the same predictions, or
                no larger than that of the exact answers

With --keep, what does not depend on the recipe (events, questions, exact answers, baselines) is kept by law, users, seed and a hash of
the code that makes it: another recipe then takes the time of its fits. `journey` is no law but a case from a folder; no filter there.

laws:
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import picture, scores
from bench.laws import LAWS, journey
from bench.laws.case import SCHEDULED
from bench.rivals import Prepared, prepared, questions
from model.hazards import DAY_MS
from model.settings import SettingsError
from trainer.arguments import settings_of
from trainer.backtest import said_by
from trainer.cutoffs import Probabilities, Questions
from trainer.history import History, from_table
from trainer.offline import fit_model
from trainer.settings import TrainerSettings
from trainer.stage import no_progress

JOURNEY = Path(__file__).resolve().parents[2] / "shared" / "evaluation" / "complete_journey"
LONGEST_FIRST = ("phases", "bursts", "rhythm", "season", "marks", "shop", "journey", "lifelong", "rare", "single", "few")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
PATIENT = "round_budget_seconds=36000"
"""A busy machine changes nothing."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run. changes: NAME=VALUE of the trainer's settings."""

    only: tuple[str, ...]
    users: int
    seed: int
    jobs: int
    changes: tuple[str, ...]
    keep: Path | None
    journey: Path


def settings(plan: Plan, targets: Sequence[object] = ()) -> TrainerSettings:
    """Raises SettingsError."""
    changes = [PATIENT, *plan.changes]
    return settings_of(argparse.Namespace(config=None, set=changes, seed=str(plan.seed), target=[str(t) for t in targets]))


def judged(name: str, plan: Plan) -> dict[str, Any]:
    """One law: its rows, and how long the fit took."""
    torch.set_num_threads(1)
    begin = time.monotonic()

    def say(words: str) -> None:
        print(f"{time.monotonic() - begin:6.0f} s  {name}: {words}", file=sys.stderr, flush=True)

    ready = prepared(name, plan.users, plan.seed, plan.journey, plan.keep, say)
    case = ready.case
    before = time.monotonic()
    challenger = fit_model(case.table, case.until_ms, settings(plan, case.targets), NOW, no_progress)
    seconds, passes = time.monotonic() - before, len(challenger.fitted.losses) - 1
    window = challenger.model.manifest.window
    say(f"ours: fitted on {window.events:,} events of {window.users:,} users in {seconds:.0f} s, {passes} passes")
    history = from_table(case.table)
    rows = []
    for kind in case.asked:
        asked = questions(case, history, kind)
        said = said_by(challenger.model, history, asked, case.targets)
        rows += list(of_kind(ready, history, kind, asked, said))
    say(f"{sum(r['passes'] for r in rows)} of {len(rows)} rows pass")
    facts = {"law": name, "events": len(case.table), "users": history.users, "fitted_events": window.events}
    return {**facts, "fit_seconds": round(seconds, 1), "seconds": round(time.monotonic() - begin, 1), "passes_made": passes, "rows": rows}


def of_kind(ready: Prepared, history: History, kind: str, asked: Questions, said: Probabilities) -> Iterator[dict[str, Any]]:
    """A row for each target."""
    case, exact = ready.case, ready.case.asked[kind].exact
    first = history.first[asked.user]
    by = {
        "events": (asked.event + 1 - first).astype(np.float64),
        "tenure": (asked.at_ms - history.time_ms[first]) / DAY_MS,
        "recency": (asked.at_ms - history.time_ms[asked.event]) / DAY_MS,
    }
    for i, target in enumerate(case.targets):
        others = {name: p[:, i] for name, p in ready.said[kind].items()}
        constants = (case.constants or {}).get(target.name, {})
        known = None if exact is None else exact[:, i]
        _, luck = np.unique(np.stack([asked.user, (asked.at_ms - case.until_ms) // target.horizon_ms]), axis=1, return_inverse=True)
        groups = scores.Groups(asked.user, luck.ravel(), by)
        figures = scores.row(asked.label[:, i], known, said[:, i], others, groups, constants)
        yield {"law": case.name, "target": target.name, "kind": kind, **figures}


def run(plan: Plan) -> list[dict[str, Any]]:
    """The laws in the order of LAWS, each in a process of its own where there are several jobs."""
    names = sorted(plan.only, key=LONGEST_FIRST.index)
    found: dict[str, dict[str, Any]] = {}
    if plan.jobs == 1:
        found = {name: judged(name, plan) for name in names}
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with ProcessPoolExecutor(plan.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
            waiting = {pool.submit(judged, name, plan): name for name in names}
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
    return [found[name] for name in plan.only]


HEAD = (
    f"{'  law, target, kind of question':31}{'asked':>6}{'rate':>6} {'best':9}{'loss':>8}{'ours':>8}{'exact':>8}{'excess':>8}"
    f"{'closed':>7}{'smpl':>6}{'AUC':>6}{'exact':>6}{'ECE':>7}{'bound':>7}  worst group"
)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    found, closed, worst = row["measures"], row.get("closed", {}), row["worst_group"]
    exact = found.get("exact", {})

    def number(value: float | None, digits: int, width: int) -> str:
        return f"{value:{width}.{digits}f}" if value is not None else " " * (width - 1) + "-"

    key = "expected" if exact else "log_loss"
    best = found[row["best"]][key] if row["best"] in found else row["constants"][row["best"]]["log_loss"]
    kind = "schedule" if row["kind"] == SCHEDULED else "event"
    return (
        f"{' ' if row['passes'] else '!'} {row['law'] + ' ' + row['target'] + ', ' + kind:29}{row['questions']:6}{row['base_rate']:6.3f}"
        f" {row['best'][:8]:9}{best:8.4f}{found['ours'][key]:8.4f}{number(exact.get(key), 4, 8)}"
        f"{row['excess']:+8.4f}{number(closed.get('expected'), 2, 7)}{number(closed.get('log_loss'), 2, 6)}"
        f"{found['ours']['auc']:6.3f}{number(exact.get('auc'), 3, 6)}{found['ours']['ece']:7.4f}{row['ece_bound']:7.4f}"
        + (f"  {worst['by']} {worst['gap']:+.3f}" if worst else "")
    )


def arguments() -> argparse.ArgumentParser:
    about = "\n".join(f"  {name:10}{law.about}" for name, law in LAWS.items()) + f"\n  {journey.NAME:10}{journey.ABOUT}"
    parser = argparse.ArgumentParser(
        prog="python -m bench quality", formatter_class=argparse.RawDescriptionHelpFormatter, description=f"{__doc__}{about}"
    )
    every = [*LAWS, journey.NAME]
    parser.add_argument("--only", nargs="+", choices=every, metavar="LAW", help=f"these alone: {', '.join(every)}")
    parser.add_argument("--users", type=int, default=20_000, help="of a law, at most; some have fewer (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of laws, questions and fits (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="laws that are run at once, each on one core (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, as `trainer fit` takes it")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep there what does not depend on the recipe, and use what is there")
    parser.add_argument("--journey", type=Path, default=JOURNEY, metavar="DIR", help="Complete Journey (default %(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the excess and the share closed of each row")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on stdout")
    return parser


def main(words: Sequence[str]) -> int:
    """The program. The figures are for reading: the exit status tells of errors alone."""
    parser = arguments()
    options = parser.parse_args(words)
    only = options.only or [*LAWS, journey.NAME]
    if journey.NAME in only and not journey.there(options.journey):
        print(f"{journey.NAME} is left out: {options.journey} does not hold {', '.join(journey.FILES)} (--journey DIR)", file=sys.stderr)
        only = [name for name in only if name != journey.NAME]
    plan = Plan(tuple(only), options.users, options.seed, options.jobs, tuple(options.set), options.keep, options.journey)
    try:
        settings(plan)
    except SettingsError as error:
        parser.error(str(error))
    begin = time.monotonic()
    found = run(plan)
    rows = [row for entry in found for row in entry["rows"]]
    print(HEAD)
    for row in rows:
        print(line(row))
    passed = sum(row["passes"] for row in rows)
    print(f"{passed} of {len(rows)} rows pass (! marks the others); {time.monotonic() - begin:.0f} s")
    if options.picture:
        picture.draw(rows, options.picture)
    if options.json:
        print(json.dumps({"users": plan.users, "seed": plan.seed, "set": list(plan.changes), "passed": passed, "laws": found}))
    return 0
