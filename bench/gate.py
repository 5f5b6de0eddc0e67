"""python -m bench gate: does the trainer's gate let through what is truly better, and nothing that is sabotaged?

Shops are simulated whose law is known. In each, challengers and champions are trained by the trainer's own code, half of them with a
belief cell, and judged by the trainer's own exam and gate (`trainer.rounds.examine`). Four shops give 20 better challengers
(`bench.challengers`), two more some 50 sabotaged ones (`bench.sabotages`), each against a good champion that is two days older.
`gap` is what the exact filter of the law says: by how much the challenger's expected log-loss is worse than the champion's. A sabotage
that does not hurt by it is none: it is void, and does not count.
Exit status 1 where a sabotaged challenger is promoted, or fewer than nine in ten of the better ones are.

--seed moves all shops' seeds. The gate, the bouts and the shops' size were made while looking at 0, 7000, 11000, 21000, 31000, 51000,
81000 and 91000: they prove little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from bench.challengers import Bout, Size, better
from bench.sabotages import sabotaged
from trainer.metrics import Metrics
from trainer.rounds import examine

FULL = Size(users=6000, epochs=6, hidden=24, states=8, steps=200)
QUICK = Size(users=2100, epochs=5, hidden=16, states=6, steps=160)
LEAST_SHARE = 0.9


@dataclass(frozen=True)
class Row:
    """What the gate said of one challenger. gap: expected log-loss beyond the champion's, by the law; None: it answers nothing."""

    kind: str
    name: str
    gap: float | None
    promoted: bool
    reason: str

    @property
    def void(self) -> bool:
        """A sabotage that does not hurt."""
        return self.kind == "sabotaged" and self.gap is not None and self.gap <= 0


def judged(kind: str, bouts: Iterable[Bout]) -> Iterator[Row]:
    """Each bout, before the gate."""
    for bout in bouts:
        shop = bout.shop
        rng = np.random.default_rng(shop.settings.seed)
        gap = bout.gap
        decision = examine(shop.history, shop.split, bout.challenger, bout.champion.model, shop.settings, Metrics(), rng)
        yield Row(kind, bout.name, None if np.isnan(gap) else round(gap, 5), decision.promote, decision.reason)


def campaign(*, quick: bool, offset: int) -> Iterator[Row]:
    """All bouts; quick: one small shop of each sort."""
    size = QUICK if quick else FULL
    for seed in range(1 if quick else 4):
        yield from judged("better", better(offset + seed, size, cell=quick or seed % 2 > 0))
    for seed in (101,) if quick else (100, 101):
        yield from judged("sabotaged", sabotaged(offset + seed, size, cell=seed % 2 > 0))


def tally(rows: Iterable[Row], kind: str) -> list[bool]:
    """Of the challengers of a kind that are what they are called, whether each was promoted."""
    return [r.promoted for r in rows if r.kind == kind and not r.void]


def passes(rows: Iterable[Row]) -> bool:
    """No sabotaged challenger promoted, and nine in ten of the better ones."""
    rows = list(rows)
    good = tally(rows, "better")
    return not any(tally(rows, "sabotaged")) and sum(good) >= LEAST_SHARE * len(good)


def main(arguments: list[str]) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench gate", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small shop of each sort")
    parser.add_argument("--seed", type=int, default=0, help="added to the seeds of all shops (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on stdout")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begin, cpu, rows = time.monotonic(), time.process_time(), []
    for row in campaign(quick=options.quick, offset=options.seed):
        rows.append(row)
        gap = "       -" if row.gap is None else f"{row.gap:+8.4f}"
        word = "void    " if row.void else "promoted" if row.promoted else "rejected"
        print(f"{row.kind:10} {row.name:26} {gap}  {word}  {row.reason}", flush=True)
    for kind in ("better", "sabotaged"):
        print(f"{kind}: {sum(tally(rows, kind))} of {len(tally(rows, kind))} promoted")
    print(f"{time.monotonic() - begin:.0f} s, {time.process_time() - cpu:.0f} s of CPU")
    if options.json:
        print(json.dumps({"passes": passes(rows), "rows": [asdict(r) for r in rows]}))
    return 0 if passes(rows) else 1
