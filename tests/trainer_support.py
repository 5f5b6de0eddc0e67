"""Histories for the trainer's tests: the simulated shop as the trainer would read it from its log."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from demo.shop import shop_law, simulate
from trainer.history import History, from_table
from trainer.settings import TrainerSettings

START_MS = 1_760_000_000_000
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NO_CELLS = {"belief_states": 0, "rhythm_classes": 0}
"""Half the time of a fit, where any model will do."""


def shop_table(users: int = 600, days: float = 60, seed: int = 3) -> pa.Table:
    shop = simulate(shop_law(), users=users, start_ms=START_MS, days=days, seed=seed)

    def texts(codes: Any, names: Any) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(list(names))).cast(pa.string())

    def marks(codes: Any, letter: str) -> pa.Array:
        return pa.array([None if c < 0 else f"{letter}{c}" for c in codes], pa.string())

    return pa.table(
        {
            "user_id": texts(shop.user, shop.users),
            "type": texts(shop.type, shop.types),
            "timestamp": shop.time_ms,
            "item_id": marks(shop.item, "i"),
            "category": marks(shop.category, "c"),
            "value": pa.array(shop.value, from_pandas=True),
        }
    )


def shop_history(users: int = 600, days: float = 60, seed: int = 3) -> History:
    return from_table(shop_table(users, days, seed))


def events_table(rows: list[tuple[str, str, int]], values: list[float | None] | None = None) -> pa.Table:
    """(user, type, time) in log order."""
    user, kind, time_ms = zip(*rows, strict=True)
    none = pa.nulls(len(rows), pa.string())
    value = pa.array(values or [None] * len(rows), pa.float64())
    columns = {"user_id": pa.array(user), "type": pa.array(kind), "timestamp": np.array(time_ms, np.int64)}
    return pa.table({**columns, "item_id": none, "category": none, "value": value})


def quick_settings(folder: Path, **changes: Any) -> TrainerSettings:
    """A trainer small enough for a test: seconds a round."""
    small = {
        "hidden": 16,
        "head": 16,
        "epochs": 4,
        "min_users": 100,
        "min_events": 1000,
        "metrics_port": 0,
        "metrics_host": "127.0.0.1",
        "belief_steps": 20,
        "rhythm_classes": 4,
        "report": False,  # its pictures take longer than the fitting
    }
    places = {"log_directory": folder / "log", "registry": str(folder / "registry")}
    return TrainerSettings(**{**small, **places, **changes})
