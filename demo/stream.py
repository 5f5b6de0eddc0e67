"""What the demo feeds to Kafka: events in the order of their time, of the simulated shop (or of the user's own file: replay.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from demo.shop import DAY_MS, Drift, History, Law, shop_law, simulate


@dataclass(frozen=True)
class Stream:
    """Events as columns, and as the bytes that go to Kafka."""

    history: History
    live_ms: int
    """events before this moment are written first, as history; those from it on are live"""
    end_ms: int
    encode: Callable[[int, int], list[bytes]]
    """the record values of events [begin, end)"""
    law: Law | None
    """what the events were drawn from, where that is known"""
    drift: Drift | None = None

    @property
    def live_from(self) -> int:
        """How many events are history."""
        return int(np.searchsorted(self.history.time_ms, self.live_ms))

    @property
    def live_days(self) -> float:
        return (self.end_ms - self.live_ms) / DAY_MS


@dataclass(frozen=True)
class Shop:
    """One sample of the shop. The same values give the same events, in whichever process. `users` counts all who ever come."""

    users: int
    seed: int
    end_ms: int
    history_days: float
    live_days: float
    promotion: float = 1.0
    """from some live day on, as in `shop.shop_law`; 1: never"""
    promotion_day: float = 0.0

    def load(self) -> Stream:
        law = shop_law()
        days = self.history_days + self.live_days
        start_ms = self.end_ms - round(days * DAY_MS)
        live_ms = start_ms + round(self.history_days * DAY_MS)
        drift = Drift(live_ms + round(self.promotion_day * DAY_MS), shop_law(self.promotion)) if self.promotion != 1 else None
        history = simulate(law, users=self.users, start_ms=start_ms, days=days, seed=self.seed, drift=drift)
        return Stream(history, live_ms, self.end_ms, lambda begin, end: encode(history, begin, end), law, drift)

    def arguments(self) -> list[str]:
        """Command-line arguments of `python -m demo.feed` that make it load the same."""
        return [
            *("--users", str(self.users), "--seed", str(self.seed), "--end-ms", str(self.end_ms)),
            *("--history-days", str(self.history_days), "--live-days", str(self.live_days)),
            *("--promotion", str(self.promotion), "--promotion-day", str(self.promotion_day)),
        ]


def encode(history: History, begin: int, end: int) -> list[bytes]:
    """Events as JSON. Ids and type names of the shop need no escaping."""
    h, span = history, slice(begin, end)
    columns = (column[span].tolist() for column in (h.user, h.type, h.time_ms, h.item, h.category, h.value))
    return [
        f'{{"user_id": "{h.users[u]}", "type": "{h.types[k]}", "timestamp": {t}, "event_id": "e{n}"'.encode()
        + (b"}" if i < 0 else f', "item_id": "i{i}", "category": "c{c}", "value": {v}}}'.encode())
        for n, (u, k, t, i, c, v) in enumerate(zip(*columns, strict=True), begin)
    ]
