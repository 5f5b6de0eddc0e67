"""Complete Journey, no law but a file: baskets, coupon redemptions and campaign mailings of 2,469 households, with queries and baselines.

The folder holds events.csv and queries.csv as `trainer predict` takes them, and case.toml: `fit_until_ms`, and for each task its events,
outcome and horizon, and the figures of baselines that were fitted once. No exact answer is known.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np

from bench.laws.case import SCHEDULED, Asked, Case
from model.hazards import DAY_MS
from model.targets import Target
from trainer.inputs import read_events
from trainer.queries import read_queries

NAME = "journey"
FILES = ("events.csv", "queries.csv", "case.toml")
ABOUT = "Complete Journey: baskets and coupons of 2,469 households, from a folder; its origin is disputed, and no law is known."


def there(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def read(folder: Path) -> Case:
    """Raises ValueError, OSError."""
    described = tomllib.loads((folder / "case.toml").read_text())
    queries = read_queries(folder / "queries.csv")
    task, user_id = np.array(queries.task), np.array(queries.user_id)
    targets, constants, pairs = [], {}, []
    for name, of in described["task"].items():
        horizon_ms = round(of["horizon_days"] * DAY_MS)
        targets.append(Target(name=name, types=tuple(of["events"]), outcome=of["outcome"], horizon_ms=horizon_ms))
        constants[name] = of.get("baselines", {})
        own = np.flatnonzero(task == name)
        own = own[np.lexsort((user_id[own], queries.at_ms[own]))]
        if (queries.horizon_ms[own] != horizon_ms).any():
            raise ValueError(f"{folder}: queries of {name} have another horizon than case.toml says")
        pairs.append((user_id[own].tolist(), queries.at_ms[own]))
    users, at_ms = pairs[0]
    if any(other != users or not np.array_equal(moments, at_ms) for other, moments in pairs[1:]):
        raise ValueError(f"{folder}: the tasks ask about different users or moments")
    asked = {SCHEDULED: Asked(users, at_ms, None)}
    table = read_events(folder / "events.csv", {})
    return Case(NAME, table, described["fit_until_ms"], tuple(targets), asked, constants=constants)
