"""The gate's campaign in a small form: three better challengers, three sabotaged ones, all trained by the real code. See `bench.gate`."""

from itertools import islice

import pytest
import torch

from bench.challengers import Size, better, sabotaged
from bench.gate import Row, judged, passes

SIZE = Size(users=900, epochs=4, hidden=8)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_better_ones_pass() -> None:
    rows = list(judged("better", islice(better(0, SIZE), 3)))
    assert all(row.gap is not None and row.gap < 0 for row in rows), rows  # the law says so, too
    assert all(row.promoted for row in rows), rows


def test_sabotaged_ones_do_not() -> None:
    rows = list(judged("sabotaged", sabotaged(0, SIZE, ("NaN weights", "too high", "heads swapped"))))
    assert [row.gap is None for row in rows] == [True, False, False]
    assert not any(row.promoted for row in rows), rows


def test_one_sabotaged_challenger_fails_the_campaign() -> None:
    good = [Row("better", "", -0.1, n > 1, "") for n in range(20)]
    assert passes(good)
    assert not passes([*good, Row("better", "", -0.1, False, ""), Row("better", "", -0.1, False, "")])
    assert not passes([*good, Row("sabotaged", "", 0.1, True, "")])
