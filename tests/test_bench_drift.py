"""The drift bench's reading of what happened: what a promotion renewed, when it knew of the drift, and when scores were well again."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
import pytest

from bench.drift import DRIFT_DAY, Arrivals, Course, Step, Stretch, figures, learnt
from demo.shop import DAY_MS
from demo.stream import Shop
from model.artifact import Manifest, Window

DRIFT_MS = DRIFT_DAY * DAY_MS


def manifest(encoder_id: str, end_ms: int, judges_end_ms: int | None = None) -> Manifest:
    whatever: dict[str, Any] = {
        "shape": {},
        "vocabulary": [],
        "scaling": {},
        "edges_ms": [],
        "targets": [],
        "lineage": "",
        "weights_sha256": "",
    }
    window = Window(start_ms=0, end_ms=end_ms, users=1, events=1, judges_end_ms=judges_end_ms)
    return Manifest(version=f"v{end_ms}", created_at=datetime(2026, 1, 1, tzinfo=UTC), encoder_id=encoder_id, window=window, **whatever)


def test_what_a_promotion_has_renewed_and_until_when_it_has_learnt() -> None:
    first, fresh, later = manifest("a", 50), manifest("a", 90, 50), manifest("b", 120, 80)
    assert learnt(first, None) == (50, "encoder", "round")
    assert learnt(fresh, first) == (90, "heads", "refresh")
    assert learnt(later, fresh) == (80, "encoder", "round")
    assert learnt(manifest("b", 120, 80), manifest("b", 110, 50)) == (80, "heads", "round")  # a round that found no better encoder


def step(at: float, part: str, learnt_until_day: float, heads_until_day: float) -> Step:
    rhythm = "refresh" if part == "heads" else "round"
    return Step(at, "v", part, rhythm, int(heads_until_day * DAY_MS), int(learnt_until_day * DAY_MS), "")


def test_seconds_count_from_the_first_drifted_event() -> None:
    stream = Shop(50, 0, 100 * DAY_MS, 40, 60, 3.0, DRIFT_DAY).load()
    assert stream.drift
    stream = replace(stream, live_ms=0, drift=replace(stream.drift, at_ms=DRIFT_MS))
    course = Course(stream, *cast(Any, [None] * 4))
    harm = [0.01, 0.01, 0.05, 0.03, 0.015, 0.04, 0.015, 0.012]
    course.stretches = [Stretch(DRIFT_DAY + 5 * i, DRIFT_DAY + 5 * i + 5, {"p": v}, "") for i, v in enumerate(harm, -2)]
    course.steps = [
        step(60, "heads", DRIFT_DAY - 1, DRIFT_DAY - 1),
        step(75, "encoder", 20, DRIFT_DAY + 3),
        step(80, "heads", 45, 45),
        step(99, "encoder", 36, 50),
    ]
    days = np.arange(0, 100) * DAY_MS
    made = figures(course, Arrivals(days, np.arange(0, 100) * 1000 + 20_000), {"round": 1.0})
    first_drifted_at = DRIFT_DAY + 20
    assert made["seconds_to_heads"] == 75 - first_drifted_at
    assert made["seconds_to_encoder"] == 99 - first_drifted_at
    assert made["excess_before"] == pytest.approx(0.01)
    assert made["excess_worst"] == pytest.approx(0.05)
    assert made["recovered_from_day"] == 20  # the stretch before the relapse does not count
    assert made["event_to_promotion_measured"] == {"refresh": 80 - (44 + 20), "round": 99 - (35 + 20)}
