"""Records that are no events, of every kind that a shop's own bugs could produce. Each must end in the dead-letter topic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

HUGE_BYTES = 200_000
YEAR_MS = 365 * 86_400_000


def bad_records(at_ms: int, wall_ms: int) -> list[bytes | None]:
    """One of each kind, as a shop at `at_ms` might write it, at `wall_ms` by the wall clock."""
    good: Mapping[str, Any] = {"user_id": "bad-day", "type": "page_view", "timestamp": at_ms}

    def event(**fields: Any) -> bytes:
        return json.dumps({**good, **fields}).encode()

    return [
        event()[:-9],  # cut off in the middle
        json.dumps({k: v for k, v in good.items() if k != "user_id"}).encode(),
        event(timestamp="yesterday"),
        event(timestamp=wall_ms + YEAR_MS),
        event(type=["page_view"]),
        event(value=float("nan")),
        b'{"user_id": "\xff\xfe", "type": "page_view", "timestamp": %d}' % at_ms,  # not UTF-8
        event(user_id="u" * 1000),
        event(attributes={"note": "x" * HUGE_BYTES}),
        b"<event/>",
        None,
        event(user_id=""),
    ]
