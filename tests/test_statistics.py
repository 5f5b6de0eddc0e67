"""Recurrent statistics: against a closed form over the whole history, and finite whatever comes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.attributes import WIDTH
from model.statistics import (
    EPOCH_2000_MS,
    PACE_WEIGHT,
    READOUT_SIZE,
    SCALES_MS,
    SLOTS,
    STATISTICS,
    VISIT_GAP_MS,
    VISIT_SCALES_MS,
    readout,
    readout_columns,
    update,
)

START_MS = 1_760_000_000_000
DAY_MS = 86_400_000
LARGEST = float(np.float32(1e30))

Event = tuple[int, int, float]  # time, slot, value (NaN: none)
slots = st.integers(0, SLOTS - 1)
amounts = st.just(math.nan) | st.floats(-LARGEST, LARGEST, width=32)
steps = st.lists(st.tuples(st.integers(-DAY_MS, 40 * DAY_MS), slots, amounts), min_size=1, max_size=12)


def after(events: list[Event]) -> NDArray[np.void]:
    stats = np.zeros(1, STATISTICS)
    for time_ms, slot, value in events:
        update(stats, np.array([slot]), np.array([time_ms]), np.array([value], np.float32))
    return stats


def timeline(gaps: list[tuple[int, int, float]]) -> list[Event]:
    now, events = START_MS, []
    for gap_ms, slot, value in gaps:
        now += gap_ms
        events.append((now, slot, value))
    return events


def assert_same(got: NDArray[np.void], expected: NDArray[np.void]) -> None:
    for name in STATISTICS.names or ():
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@given(st.lists(steps, min_size=1, max_size=5))
def test_a_batch_of_users_is_as_one_at_a_time(users: list[list[tuple[int, int, float]]]) -> None:
    lines = [timeline(gaps) for gaps in users]
    together = np.zeros(len(lines), STATISTICS)
    for k in range(max(map(len, lines))):
        who = np.array([i for i, line in enumerate(lines) if k < len(line)])
        time_ms, slot, value = zip(*(lines[i][k] for i in who), strict=True)
        own = together[who]
        update(own, np.array(slot), np.array(time_ms), np.array(value, np.float32))
        together[who] = own
    assert_same(together, np.concatenate([after(line) for line in lines]))


@given(steps)
def test_the_closed_form(gaps: list[tuple[int, int, float]]) -> None:
    events = timeline(gaps)
    # time does not run backwards for a user: a late event is taken at the user's last one
    times = np.maximum.accumulate([t for t, _, _ in events])
    last_ms = int(times[-1])
    (stats,) = after(events)
    counts = np.zeros((SLOTS, len(SCALES_MS) + 1))
    seconds = np.zeros(SLOTS, np.int64)
    for at_ms, (_, slot, _) in zip(times.tolist(), events, strict=True):
        counts[slot] += [*(math.exp(-(last_ms - at_ms) / scale) for scale in SCALES_MS), 1]
        seconds[slot] = (at_ms - EPOCH_2000_MS) // 1000
    np.testing.assert_allclose(stats["counts"], counts, rtol=1e-4, atol=1e-5)
    assert stats["last_seconds"].tolist() == seconds.tolist()
    assert (stats["first_ms"], stats["last_ms"], stats["count"]) == (times[0], last_ms, len(events))
    logs = [(t, math.copysign(math.log1p(abs(v)), v)) for t, (_, _, v) in zip(times.tolist(), events, strict=True) if not math.isnan(v)]
    decay = [math.exp(-(last_ms - t) / (30 * DAY_MS)) for t, _ in logs]
    assert stats["value_count"] == len(logs)
    assert stats["value_total"] == pytest.approx(sum(v for _, v in logs), rel=1e-4, abs=1e-3)
    assert stats["value_sum"] == pytest.approx(sum(v * d for (_, v), d in zip(logs, decay, strict=True)), rel=1e-4, abs=1e-3)
    assert stats["value_weight"] == pytest.approx(sum(decay), rel=1e-4, abs=1e-5)
    gap_logs = np.log1p(np.diff(times) / 1000)
    mean = square = 0.0
    for i, gap in enumerate(gap_logs.tolist()):
        weight = 1.0 if i == 0 else 0.1
        mean, square = mean + weight * (gap - mean), square + weight * (gap * gap - square)
    assert stats["gap_mean"] == pytest.approx(mean, rel=1e-4, abs=1e-4)
    assert stats["gap_square"] == pytest.approx(square, rel=1e-4, abs=1e-3)


@given(steps)
def test_the_closed_form_of_visits(gaps: list[tuple[int, int, float]]) -> None:
    events = timeline(gaps)
    times = np.maximum.accumulate([t for t, _, _ in events]).tolist()
    (stats,) = after(events)
    visits, weekdays = np.zeros((SLOTS, len(VISIT_SCALES_MS) + 1)), np.zeros(7)
    for wanted in range(SLOTS):
        own = [t for t, (_, slot, _) in zip(times, events, strict=True) if slot == wanted]
        seconds = [(t - EPOCH_2000_MS) // 1000 for t in own]
        begins = [i for i in range(len(own)) if i == 0 or seconds[i] - seconds[i - 1] > VISIT_GAP_MS // 1000]
        for i in begins:
            visits[wanted] += [*(math.exp(-(times[-1] - own[i]) / scale) for scale in VISIT_SCALES_MS), 1]
            weekdays[own[i] // DAY_MS % 7] += math.exp(-(times[-1] - own[i]) / VISIT_SCALES_MS[-1])
        mean = square = 0.0
        for k, i in enumerate(begins[1:]):
            gap, weight = math.log1p(seconds[i] - seconds[i - 1]), PACE_WEIGHT if k else 1.0
            mean, square = mean + weight * (gap - mean), square + weight * (gap * gap - square)
        assert stats["pace_mean"][wanted] == pytest.approx(mean, rel=1e-4, abs=1e-4)
        assert stats["pace_square"][wanted] == pytest.approx(square, rel=1e-4, abs=1e-3)
    np.testing.assert_allclose(stats["visits"], visits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["weekdays"], weekdays, rtol=1e-4, atol=1e-5)


def test_a_burst_is_one_visit() -> None:
    """The lines of a basket, and of one a week later: two visits, a week apart, on one weekday."""
    (stats,) = after([(START_MS + week * 7 * DAY_MS + line * 60_000, 1, 2.0) for week in (0, 1) for line in range(20)])
    assert stats["visits"][1, -1] == 2
    assert stats["pace_mean"][1] == pytest.approx(math.log1p(7 * 86_400 - 19 * 60))
    assert np.count_nonzero(stats["weekdays"]) == 1


@given(steps, st.integers(0, 10**10))
def test_a_late_event_is_taken_at_the_users_last(gaps: list[tuple[int, int, float]], late_ms: int) -> None:
    events = timeline(gaps)
    last_ms = max(t for t, _, _ in events)
    assert_same(after([*events, (last_ms - late_ms, 3, 5.0)]), after([*events, (last_ms, 3, 5.0)]))


@given(
    st.lists(st.tuples(st.integers(0, 2**61), slots, amounts), max_size=8), st.lists(st.integers(-(2**61), 2**61), min_size=1, max_size=4)
)
def test_the_readout_is_finite_whatever_comes(events: list[Event], moments: list[int]) -> None:
    stats = np.repeat(after(events), len(moments))
    found = readout(stats, np.array(moments))
    assert found.shape == (len(moments), READOUT_SIZE)
    assert found.isfinite().all()
    assert found.abs().max() < 100


def test_a_moment_before_the_last_event_is_taken_as_that_events() -> None:
    stats = after([(START_MS, 1, 5.0), (START_MS + DAY_MS, 2, math.nan)])
    early, now, later = (readout(stats, np.array([START_MS + days * DAY_MS])) for days in (0, 1, 2))
    assert early.equal(now)
    assert not now.equal(later)


def test_the_readout_of_many_is_that_of_each() -> None:
    stats = np.concatenate([after([(START_MS + i * 7777, i, float(i)), (START_MS + i * 999_999, 1, math.nan)]) for i in range(9)])
    at_ms = START_MS + DAY_MS * np.arange(1, 10)
    together = readout(stats, at_ms)
    for i in range(9):
        np.testing.assert_allclose(together[i], readout(stats[i : i + 1], at_ms[i : i + 1])[0], rtol=1e-5, atol=1e-6)


@given(st.lists(st.tuples(st.integers(0, 40 * DAY_MS), st.integers(0, 3), amounts), min_size=1, max_size=8), st.integers(0, 90 * DAY_MS))
def test_slots_that_are_not_used_can_be_left_out(gaps: list[tuple[int, int, float]], silent_ms: int) -> None:
    events = timeline(gaps)
    narrow, at_ms = np.zeros(1, STATISTICS), np.array([events[-1][0] + silent_ms])
    for time_ms, slot, value in events:
        update(narrow, np.array([slot]), np.array([time_ms]), np.array([value], np.float32), slots=4)
    stats = after(events)
    assert narrow.tobytes() == stats.tobytes()
    columns, whole = readout_columns(4), readout(stats, at_ms)
    assert readout(stats, at_ms, slots=4).equal(whole[:, columns])
    others = np.setdiff1d(np.arange(READOUT_SIZE), columns)
    assert whole[0, others].equal(readout(np.zeros(1, STATISTICS), np.zeros(1, np.int64))[0, others]), "the same for everybody"


def test_tenure_is_capped_and_counts_become_rates() -> None:
    """A user at a steady rate looks the same after two years as after three: the log's length says nothing."""

    def steady(days: int) -> NDArray[np.void]:
        return after([(START_MS + i * DAY_MS, 1, math.nan) for i in range(days)])

    two, three = (readout(steady(weeks * 7 + 1), np.array([START_MS + weeks * 7 * DAY_MS])) for weeks in (104, 156))
    log_count = READOUT_SIZE - WIDTH - 5  # capped, too, but later
    np.testing.assert_allclose(np.delete(two[0], log_count), np.delete(three[0], log_count), atol=1e-3)
