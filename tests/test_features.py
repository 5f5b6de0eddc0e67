"""What the encoder is told of an event."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.events import stable_hash
from model.features import CATEGORY_BUCKETS, ITEM_BUCKETS, NUMERIC, Previous, Scaling, StepFeatures, Vocabulary, bucket, step_features
from model.statistics import SLOTS

START_MS = 1_760_000_000_000
HOUR_MS = 3_600_000
GAP, FIRST, HAS_VALUE, VALUE, SAME_TYPE, SAME_ITEM, SAME_CATEGORY, SESSION, HOUR, MONTH = 0, 1, 2, 3, 8, 9, 10, 11, 12, 15
hashes = st.integers(0, 2**32 - 1)


def one(previous: tuple[int, ...] | None = None, **event: Any) -> StepFeatures:
    """Features of one event; hashes 0 and value NaN say that a field is missing."""
    time_before_ms, *before = (*(previous or (0, 0, 0, 0)), 0)[:5]
    event = {"time_ms": START_MS, "type": 1, "item": 0, "category": 0, "session": 0, "value": math.nan} | event

    def column(value: int) -> NDArray[np.uint32]:
        return np.array([value], np.uint32)

    last = Previous(np.array([previous is not None]), np.array([time_before_ms]), *map(column, before))
    columns = [column(event[name]) for name in ("type", "item", "category", "session")]
    time_ms, value = np.array([event["time_ms"]]), np.array([event["value"]], np.float32)
    return step_features(Vocabulary(["view", "buy"]), Scaling(2.0, 0.5), last, time_ms, *columns, value)


@given(st.lists(st.text(max_size=5), unique_by=stable_hash, max_size=SLOTS - 1), st.lists(st.text(max_size=5)))
def test_types_have_their_slots_and_others_share_one(types: list[str], others: list[str]) -> None:
    vocabulary = Vocabulary(types)
    known = {stable_hash(t) for t in types}
    asked = [*types, *(t for t in others if stable_hash(t) not in known)]
    slots = vocabulary.slots(np.array([stable_hash(t) for t in asked], np.uint32)).tolist()
    assert slots == [*range(1, len(types) + 1), *[0] * (len(asked) - len(types))]


def test_a_vocabulary_has_room_for_so_many() -> None:
    with pytest.raises(ValueError, match=f"at most {SLOTS - 1} event types, not {SLOTS}"):
        Vocabulary([str(i) for i in range(SLOTS)])


@given(st.lists(hashes, min_size=1))
def test_a_bucket_is_0_where_the_field_is_missing_only(found: list[int]) -> None:
    for buckets in (ITEM_BUCKETS, CATEGORY_BUCKETS):
        got = bucket(np.array(found, np.uint32), buckets)
        assert got.max() <= buckets
        assert [b == 0 for b in got.tolist()] == [h == 0 for h in found]


def test_a_first_event_has_no_step_before_it() -> None:
    numeric = one(type=5, item=6, category=7).numeric[0]
    assert numeric[GAP] == 0
    assert numeric[FIRST] == 1
    assert numeric[[SAME_TYPE, SAME_ITEM, SAME_CATEGORY]].tolist() == [0, 0, 0]


def test_the_step_from_the_one_before() -> None:
    numeric = one((START_MS - HOUR_MS, 5, 6, 7), type=5, item=6, category=8).numeric[0]
    assert numeric[GAP] == pytest.approx(math.log1p(3600) / 8)
    assert numeric[[FIRST, SAME_TYPE, SAME_ITEM, SAME_CATEGORY]].tolist() == [0, 1, 1, 0]


def test_the_gap_is_told_at_several_scales() -> None:
    scales = one((START_MS - 24 * HOUR_MS, 5, 6, 7)).numeric[0, HOUR : MONTH + 1]
    np.testing.assert_allclose(scales, np.exp([-24, -1, -1 / 7, -1 / 30]), rtol=1e-5)
    assert one((START_MS, 5, 6, 7)).numeric[0, HOUR : MONTH + 1].tolist() == [1, 1, 1, 1]
    assert one().numeric[0, HOUR : MONTH + 1].tolist() == [0, 0, 0, 0]  # never is not just now


@pytest.mark.parametrize(
    ("gap_ms", "before", "now", "begins"),
    [
        (0, 0, 0, False),
        (HOUR_MS // 2, 0, 0, False),
        (HOUR_MS // 2 + 1, 0, 0, True),
        (HOUR_MS // 2 + 1, 7, 7, True),
        (0, 7, 8, True),
        (0, 7, 7, False),
        (0, 7, 0, False),
        (0, 0, 7, False),
    ],
)
def test_a_session_begins_after_a_silence_or_where_it_is_said_so(gap_ms: int, before: int, now: int, begins: bool) -> None:
    assert one((START_MS - gap_ms, 5, 6, 7, before), session=now).numeric[0, SESSION] == begins


def test_a_first_event_begins_a_session() -> None:
    assert one(session=7).numeric[0, SESSION] == 1


def test_missing_is_not_the_same_as_missing() -> None:
    assert one((START_MS, 5, 0, 0)).numeric[0, [SAME_ITEM, SAME_CATEGORY]].tolist() == [0, 0]


def test_a_late_event_is_taken_at_the_time_of_the_one_before() -> None:
    late, now = (one((START_MS, 5, 6, 7), time_ms=START_MS - late_ms) for late_ms in (HOUR_MS, 0))
    assert late.numeric.tolist() == now.numeric.tolist()
    assert late.numeric[0, GAP] == 0


VALUES = {
    math.nan: [0, 0],
    0.0: [1, -4],
    math.expm1(2): [1, 0],
    math.expm1(3): [1, 2],
    -math.expm1(0.5): [1, -5],
    1e30: [1, 6],
    -1e30: [1, -6],
}


@pytest.mark.parametrize(("value", "expected"), VALUES.items())
def test_a_value_is_standardised_and_clipped(value: float, expected: list[float]) -> None:
    assert one(value=value).numeric[0, [HAS_VALUE, VALUE]].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_hour_and_the_weekday_go_round() -> None:
    day = [one(time_ms=START_MS + h * HOUR_MS).numeric[0, 4:8] for h in (0, 24, 7 * 24, 12)]
    np.testing.assert_allclose(day[0][:2], day[1][:2], atol=1e-4)
    np.testing.assert_allclose(day[0], day[2], atol=1e-4)
    np.testing.assert_allclose(day[0][:2], -day[3][:2], atol=1e-4)


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(-(2**61), 2**61), st.integers(-(2**61), 2**61), hashes, hashes, st.floats(width=32)),
        min_size=1,
    )
)
def test_features_are_finite_whatever_comes(events: list[tuple[bool, int, int, int, int, float]]) -> None:
    seen, before, now, h, g, amounts = (list(column) for column in zip(*events, strict=True))
    hashed, other = np.array(h, np.uint32), np.array(g, np.uint32)
    value = np.clip(np.array(amounts, np.float32), -1e30, 1e30)  # as the decoder leaves it
    found = step_features(
        Vocabulary(["view"]),
        Scaling(),
        Previous(np.array(seen), np.array(before), hashed, other, hashed, other),
        np.array(now),
        other,
        hashed,
        hashed,
        hashed,
        value,
    )
    assert found.numeric.shape == (len(events), NUMERIC)
    assert np.isfinite(found.numeric).all()
    assert abs(found.numeric).max() < 10
