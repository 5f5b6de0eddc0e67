"""python -m bench drift: a shop changes its behaviour one day; how the promoted model's live log-loss recovers, round by round.

A simulated shop has a promotion from one day on: more carts and purchases, and a law that is known before and after. The trainer's own
rounds (`trainer.rounds.run_round`, gate and registry included) are held every few days of stream time on what had come by then. Between
two rounds, the promoted model answers the moments of those days; `excess` is its expected log-loss beyond that of the exact filter, which
knows the drift. A promotion that keeps the encoder_id changes the heads at most; a warm start that found nothing better not even those.
What is not in it: Kafka, Redis and the worker. Seconds are those of a round, from its data to promoted weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from bench.challengers import NOW, PROMOTION, START_MS, known_shop
from demo.attainable import Filter
from demo.shop import DAY_MS, Drift, shop_law
from model.artifact import Model
from model.registry import Registry
from trainer import evaluate
from trainer.history import History
from trainer.metrics import Metrics
from trainer.rounds import run_round
from trainer.settings import TrainerSettings

DAYS, DRIFT_DAY, FIRST_ROUND, EVERY = 84, 42, 36, 4
HORIZON_DAYS = 12
"""Days after the last live moment that exist, so that an exam can be set; the law needs no outcomes."""


@dataclass(frozen=True)
class Row:
    """One round, and the days after it. excess: nats beyond the exact filter, the mean over targets, on the moments until the next."""

    day: float
    outcome: str
    seconds: float
    rhythm: str
    trained_until: float
    excess: float


def course(users: int, epochs: int) -> Iterator[Row]:
    """Rounds until the stream ends."""
    drift = Drift(START_MS + DRIFT_DAY * DAY_MS, shop_law(PROMOTION))
    shop, history = known_shop(seed=0, users=users, days=DAYS, drift=drift)
    truth = Filter(shop_law(), shop, drift)
    code = {name: i for i, name in enumerate(shop.users)}
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainerSettings(
            window_days=40,
            hidden=24,
            head=32,
            epochs=epochs,
            min_users=100,
            min_events=1000,
            registry=str(Path(folder) / "registry"),
            log_directory=Path(folder) / "log",
            device="cpu",
        )
        registry, encoder = Registry(settings.registry), ""
        for n, day in enumerate(range(FIRST_ROUND, DAYS - HORIZON_DAYS, EVERY)):
            begin = time.monotonic()
            now_ms = START_MS + day * DAY_MS
            outcome = run_round(history.before(now_ms), registry, settings, Metrics(), now=NOW + timedelta(days=n))
            seconds = time.monotonic() - begin
            pointer = registry.current()
            assert pointer, outcome.reason
            model = registry.load(pointer)
            rhythm = "heads" if model.manifest.encoder_id == encoder else "encoder"
            encoder = model.manifest.encoder_id
            until = (model.manifest.window.end_ms - START_MS) / DAY_MS
            yield Row(day, outcome.kind, round(seconds, 1), rhythm, round(until, 1), _excess(history, model, truth, code, now_ms))


def _excess(history: History, model: Model, truth: Filter, code: dict[str, int], now_ms: int) -> float:
    exam = evaluate.set_exam(
        history, model.manifest.targets, now_ms, now_ms + (EVERY + HORIZON_DAYS) * DAY_MS, np.random.default_rng(0), 20_000
    )
    user = np.array([code[history.user_ids[u]] for u in exam.users])
    asked = {t.name: ("*" if t.types == ("*",) else t.types, t.outcome, t.horizon_ms) for t in exam.asked}
    best = truth.probabilities(user, exam.moments.at_ms, asked)
    losses = []
    for target, rows, said in zip(exam.asked, exam.rows, evaluate.answers(exam, model), strict=True):
        soon = exam.moments.at_ms[rows] < now_ms + EVERY * DAY_MS
        t, p = best[target.name][rows][soon], np.clip(said[soon], 1e-7, 1 - 1e-7)
        t = np.clip(t, 1e-9, 1 - 1e-9)
        losses.append((t * np.log(t / p) + (1 - t) * np.log((1 - t) / (1 - p))).mean())
    return round(float(np.mean(losses)), 5)


def main(arguments: list[str]) -> int:
    """The program. Status 1 where the last excess is above twice what it was before the drift."""
    parser = argparse.ArgumentParser(
        prog="python -m bench drift", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--users", type=int, default=2000, help="of the shop (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="of a round at most (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on stdout")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"the drift comes on day {DRIFT_DAY}\n day  round      seconds  changed   champion trained until day   excess (nats)")
    rows = []
    for row in course(options.users, options.epochs):
        rows.append(row)
        changed = row.rhythm if row.outcome == "promoted" else "-"
        print(f"{row.day:4}  {row.outcome:9}  {row.seconds:7.1f}  {changed:8}  {row.trained_until:26.1f}  {row.excess:14.5f}", flush=True)
    before = float(np.mean([r.excess for r in rows if r.day + EVERY <= DRIFT_DAY]))
    recovered = rows[-1].excess <= 2 * before
    print(f"excess before the drift {before:.5f}, at worst {max(r.excess for r in rows):.5f}, at the end {rows[-1].excess:.5f}")
    if options.json:
        print(json.dumps({"recovered": recovered, "rows": [asdict(r) for r in rows]}))
    return 0 if recovered else 1
