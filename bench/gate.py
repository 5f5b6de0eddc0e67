"""python -m bench gate: does the trainer's gate let through what is truly better, and nothing that is sabotaged?

Shops are simulated whose law is known. In each, challengers and champions are trained by the trainer's own code and judged by the
trainer's own exam and gate (`trainer.rounds.examine`). Five shops give 20 better challengers (more users, longer training, a longer
window, a drift followed); two give 20 sabotaged ones, against a good champion that is two days older. `gap` is what the exact filter
of the law says: by how much the challenger's expected log-loss is worse than the champion's, so better ones have it below zero.
Exit status 1 where a sabotaged challenger is promoted, or fewer than nine in ten of the better ones are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from bench.challengers import SABOTAGES, Bout, Size, better, sabotaged
from trainer.metrics import Metrics
from trainer.rounds import examine

FULL, QUICK = Size(users=1500, epochs=6, hidden=24), Size(users=700, epochs=5, hidden=16)
AS_SABOTAGED = 20
LEAST_SHARE = 0.9


@dataclass(frozen=True)
class Row:
    """What the gate said of one challenger. gap: expected log-loss beyond the champion's, by the law; None: it answers nothing."""

    kind: str
    name: str
    gap: float | None
    promoted: bool
    reason: str


def judged(kind: str, bouts: Iterable[Bout]) -> Iterator[Row]:
    """Each bout, before the gate."""
    for bout in bouts:
        shop = bout.shop
        rng = np.random.default_rng(shop.settings.seed)
        gap = bout.gap
        decision = examine(shop.history, shop.split, bout.challenger, bout.champion.model, shop.settings, Metrics(), rng)
        yield Row(kind, bout.name, None if np.isnan(gap) else round(gap, 5), decision.promote, decision.reason)


def campaign(*, quick: bool) -> Iterator[Row]:
    """All bouts; quick: one shop of each sort."""
    size = QUICK if quick else FULL
    for seed in range(1 if quick else 5):
        yield from judged("better", better(seed, size))
    spoilt = itertools.chain(sabotaged(100, size), [] if quick else sabotaged(101, size, tuple(SABOTAGES)[: AS_SABOTAGED - len(SABOTAGES)]))
    yield from judged("sabotaged", spoilt)


def passes(rows: Iterable[Row]) -> bool:
    """No sabotaged challenger promoted, and nine in ten of the better ones."""
    rows = list(rows)
    good = [r.promoted for r in rows if r.kind == "better"]
    return not any(r.promoted for r in rows if r.kind == "sabotaged") and sum(good) >= LEAST_SHARE * len(good)


def main(arguments: list[str]) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench gate", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shop of each sort")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on stdout")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begin, rows = time.monotonic(), []
    for row in campaign(quick=options.quick):
        rows.append(row)
        gap = "       -" if row.gap is None else f"{row.gap:+8.4f}"
        print(f"{row.kind:10} {row.name:22} {gap}  {'promoted' if row.promoted else 'rejected'}  {row.reason}", flush=True)
    for kind in ("better", "sabotaged"):
        of_kind = [r.promoted for r in rows if r.kind == kind]
        print(f"{kind}: {sum(of_kind)} of {len(of_kind)} promoted")
    print(f"{time.monotonic() - begin:.0f} s")
    if options.json:
        print(json.dumps({"passes": passes(rows), "rows": [asdict(r) for r in rows]}))
    return 0 if passes(rows) else 1
