"""The stream's own clock: a week takes a week, quiet hours take little of it, and the belief cell measures silences by it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.artifact import encoder_id
from model.clock import EVEN, HOUR_MS, HOURS, WEEK_MS, Clock, pace_of
from model.features import Scaling
from model.network import Network, Shape

START_MS = 1_760_000_000_000
PACE = np.tile(np.r_[np.full(8, 0.1), np.full(16, 1.45)], 7)
"""Quiet from midnight to eight."""


@given(st.lists(st.integers(0, 10 * WEEK_MS), min_size=3, max_size=3))
def test_time_passes_forwards_and_adds_up(ages_ms: list[int]) -> None:
    a, b, c = (np.array([START_MS + age]) for age in sorted(ages_ms))
    clock = Clock(PACE)
    assert 0 <= clock.elapsed_ms(a, b)[0] <= clock.elapsed_ms(a, c)[0]
    assert abs(clock.elapsed_ms(a, b) + clock.elapsed_ms(b, c) - clock.elapsed_ms(a, c))[0] <= 1
    assert abs(clock.elapsed_ms(a, a + WEEK_MS)[0] - WEEK_MS) <= 1
    assert EVEN.elapsed_ms(a, c)[0] == (c - a)[0]


def test_a_night_is_shorter_than_a_day() -> None:
    midnight = np.array([START_MS // (24 * HOUR_MS) * 24 * HOUR_MS])
    clock = Clock(PACE)
    assert clock.elapsed_ms(midnight, midnight + 8 * HOUR_MS)[0] == pytest.approx(0.8 * HOUR_MS, rel=0.01)
    assert clock.elapsed_ms(midnight + 8 * HOUR_MS, midnight + 16 * HOUR_MS)[0] == pytest.approx(8 * 1.45 * HOUR_MS, rel=0.01)


def test_the_pace_is_found_in_the_stream_and_a_burst_is_one_visit() -> None:
    rng = np.random.default_rng(0)
    hour = rng.choice(HOURS, 40_000, p=PACE / PACE.sum()) + HOURS * rng.integers(0, 60, 40_000)
    user = np.sort(rng.integers(0, 4000, 40_000))
    time_ms = hour * HOUR_MS + rng.integers(0, HOUR_MS, 40_000)
    order = np.lexsort((time_ms, user))
    found = pace_of(user, time_ms[order])
    assert found.mean() == pytest.approx(1)
    assert found == pytest.approx(PACE / PACE.mean(), abs=0.25)
    repeated = pace_of(np.repeat(user, 5), np.repeat(time_ms[order], 5))
    assert np.array_equal(repeated, found)
    assert np.array_equal(pace_of(np.zeros(0, np.int64), np.zeros(0, np.int64)), np.ones(HOURS))


def test_a_few_events_hardly_bend_it() -> None:
    pace = pace_of(np.arange(20), np.arange(20) * HOUR_MS)
    assert np.ptp(pace) < 3


def test_an_encoder_of_before_there_was_another_clock_keeps_its_name() -> None:
    network = Network(Shape(hidden=8, belief=4))
    before = encoder_id(network, ["view"], Scaling())
    tensors = {n: t for n, t in network.state_dict().items() if not n.endswith("pace_W")}
    again = Network(Shape(hidden=8, belief=4))
    again.load_state_dict(tensors)
    assert encoder_id(again, ["view"], Scaling()) == before
    belief = again.encoder.belief
    assert belief is not None
    belief.set_pace(torch.from_numpy(PACE / PACE.mean()))
    assert encoder_id(again, ["view"], Scaling()) != before
    other = Network(Shape(hidden=8, belief=4))
    other.load_state_dict(again.state_dict())
    night = np.array([START_MS // WEEK_MS * WEEK_MS])
    assert other.clock.elapsed_ms(night, night + 8 * HOUR_MS)[0] < HOUR_MS
