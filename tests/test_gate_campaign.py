"""The gate's campaign in a small form: models with a belief cell, better and sabotaged, trained by the real code. See `bench.gate`."""

import pytest
import torch

from bench.challengers import Size, better
from bench.gate import Row, judged, passes
from bench.sabotages import OF_THE_CELL, OF_VALUES, OF_VALUES_WITHOUT_A_CELL, SABOTAGES, WITHOUT_A_CELL, sabotaged

SIZE = Size(users=3000, epochs=2, hidden=8, states=6, steps=160)
SPOILT = ("NaN weights", "too high", "refresh: a level too high", "cell: hours for days", "cell: shuffled types", "millis after units")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_better_ones_pass() -> None:
    rows = list(judged("better", better(2, SIZE, cell=True)))
    assert all(row.gap is not None and row.gap < 0 for row in rows), rows  # the law says so, too
    assert all(row.promoted for row in rows), rows


def test_sabotaged_ones_do_not() -> None:
    rows = list(judged("sabotaged", sabotaged(2, SIZE, cell=True, names=SPOILT)))
    assert [row.name for row in rows] == list(SPOILT)
    assert all(row.gap is None or row.gap > 0 for row in rows), rows  # the law says that it hurts
    assert not any(row.promoted for row in rows), rows


def test_every_sabotage_has_a_name_of_its_own() -> None:
    kinds = (SABOTAGES, WITHOUT_A_CELL, OF_THE_CELL, OF_VALUES, OF_VALUES_WITHOUT_A_CELL)
    assert len(set().union(*kinds)) == sum(map(len, kinds))


def test_one_sabotaged_challenger_fails_the_campaign() -> None:
    good = [Row("better", "", -0.1, n > 1, "") for n in range(20)]
    assert passes(good)
    assert not passes([*good, Row("better", "", -0.1, False, ""), Row("better", "", -0.1, False, "")])
    assert not passes([*good, Row("sabotaged", "", 0.1, True, "")])


def test_a_sabotage_that_does_not_hurt_is_none() -> None:
    good = [Row("better", "", -0.1, True, "") for _ in range(20)]
    assert passes([*good, Row("sabotaged", "", -0.001, True, "")])
    assert not passes([*good, Row("sabotaged", "", None, True, "")])  # it answers nothing, and was promoted all the same
