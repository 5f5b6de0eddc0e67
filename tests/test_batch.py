"""Policies of the micro-batch, without a clock: how large it may be, and how much rubbish is too much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.batch import BadShare, BatchLimit, TooManyBadRecords


def observe(limit: BatchLimit, fixed: float, a_record: float, sizes: tuple[int, ...] = (30, 100, 250, 60), times: int = 80) -> None:
    for _ in range(times):
        for records in sizes:
            limit.observe(records, fixed + a_record * records)


def test_a_batch_takes_half_the_latency_target() -> None:
    limit = BatchLimit(50, 2000)
    assert limit.records == 2000  # until something is known
    observe(limit, 0.005, 0.0001)  # 25 ms are 5 ms and 200 records
    assert limit.records == pytest.approx(200, abs=2)
    observe(limit, 0.001, 0.00001)
    assert limit.records == 2000


def test_fixed_costs_do_not_make_batches_small() -> None:
    limit = BatchLimit(50, 2000)
    observe(limit, 0.040, 0.0001)  # slower than the target whatever it does: at least half of the cost is for records
    assert limit.records == pytest.approx(400, abs=4)


def test_a_batch_never_gets_too_small_to_go_on() -> None:
    limit = BatchLimit(1, 2000)
    observe(limit, 0.0, 0.1, sizes=(5, 9, 13), times=300)
    assert limit.records == BatchLimit.FLOOR


def test_batches_of_one_size_say_something_too() -> None:
    limit = BatchLimit(50, 2000)
    observe(limit, 0.002, 0.0001, sizes=(50,))
    assert BatchLimit.FLOOR <= limit.records <= 2000


def test_behind_the_largest_batches_catch_up() -> None:
    limit = BatchLimit(50, 2000)
    observe(limit, 0.005, 0.0001)
    for _ in range(BatchLimit.BEHIND):
        assert limit.records < 2000
        limit.observe(limit.records, 0.005 + limit.records * 0.0001)
    assert limit.records == 2000
    limit.observe(30, 0.008)  # the queue is empty
    assert limit.records == pytest.approx(200, abs=2)


@given(st.lists(st.tuples(st.integers(0, 60), st.floats(0, 1)), max_size=30), st.floats(0.05, 1), st.integers(10, 100))
def test_the_share_of_bad_records_in_the_window(batches: list[tuple[int, float]], most: float, window: int) -> None:
    share = BadShare(most, window)
    seen: list[tuple[int, int]] = []
    for records, part in batches:
        bad = round(records * part)
        seen.append((records, bad))
        # by hand: the fewest of the newest batches that make a full window
        newest: list[tuple[int, int]] = []
        for batch in reversed(seen):
            newest.append(batch)
            if sum(r for r, _ in newest) >= window:
                break
        total, wrong = (sum(column) for column in zip(*newest, strict=True))
        if total >= window and wrong > most * total:
            with pytest.raises(TooManyBadRecords, match=f"^{wrong:,} of the last {total:,} records are no events"):
                share.observe(records, bad, "why")
            return
        share.observe(records, bad, "why")


def test_a_few_bad_records_at_the_start_are_no_reason_to_stop() -> None:
    share = BadShare(0.5, 100)
    share.observe(99, 99, "x")
    share.observe(200, 0, "")
    with pytest.raises(TooManyBadRecords, match=r"the last one: not JSON.*map its field names with event_fields, or raise max_bad_share"):
        share.observe(1000, 700, "not JSON")
