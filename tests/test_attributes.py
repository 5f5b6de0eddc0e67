"""A user's attributes: bounded hashes of what an event carries, and the vector that the head sees."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import attributes
from model.attributes import MOST, NONE, WIDTH, AttributeTable, as_rows, hashes_of, vector
from model.hashing import stable_hash
from model.statistics import STATISTICS, readout, update

START_MS = 1_760_000_000_000
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=80)
flat = st.dictionaries(st.text(max_size=80), scalars | st.lists(scalars, max_size=2), max_size=12)


def hashed(**found: Any) -> list[int]:
    return as_rows([hashes_of(json.dumps(found).encode())])[0].tolist()


def test_the_hash_of_an_attribute() -> None:
    assert hashed(gender="f", age=30) == [stable_hash("age=30"), stable_hash("gender=f"), *[0] * (MOST - 2)]


@pytest.mark.parametrize(
    ("one", "other"), [(30, "30"), (30, 30.0), (True, "true"), (0.5, "0.5"), ("x" * 64, "x" * 65), ("é" * 32, "é" * 32 + "z")]
)
def test_values_that_are_the_same(one: object, other: object) -> None:
    assert hashed(a=one) == hashed(a=other)


def test_null_and_nested_values_are_ignored() -> None:
    assert hashed(a=None, b=[1], c={"d": 1}, e="x") == hashed(e="x")
    assert hashes_of(b"null") == hashes_of(b"{}") == NONE


def test_the_first_eight_keys_count() -> None:
    many = {f"k{i:02}": i for i in range(20)}
    assert hashed(**dict(reversed(many.items()))) == [stable_hash(f"k{i:02}={i}") for i in range(MOST)]


@given(flat)
def test_whatever_they_are_they_are_bounded_and_fill_from_the_left(found: dict[str, Any]) -> None:
    row = as_rows([hashes_of(json.dumps(found).encode())])[0]
    kept = sum(value is not None and not isinstance(value, list) for value in found.values())
    assert (row != 0).tolist() == [i < kept for i in range(MOST)]
    assert np.isfinite(vector(row[None])).all()


@given(st.binary(max_size=40))
def test_any_bytes_are_attributes_or_a_value_error(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert len(hashes_of(raw)) == len(NONE)


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributes.AttributeTable, "LIMIT", 3)
    table = AttributeTable()
    raws = [json.dumps({"n": i % 7}).encode() for i in range(50)]
    assert [table[raw] for raw in raws] == [hashes_of(raw) for raw in raws]
    assert len(table) <= 3
    table[b'{"note": "%s"}' % (b"x" * 600)]
    assert max(map(len, table)) < 600


def test_the_vector_is_the_sum_of_its_attributes() -> None:
    rows = as_rows([hashes_of(b'{"a": 1, "b": 2}'), hashes_of(b'{"a": 1}'), hashes_of(b'{"b": 2}'), NONE])
    found = vector(rows)
    assert found.shape == (4, WIDTH)
    np.testing.assert_array_equal(found[0], found[1] + found[2])
    assert np.abs(found[1:3]).sum(1).tolist() == [1, 1]
    assert not found[3].any()


def test_places_and_signs_are_spread_evenly() -> None:
    found = vector(as_rows([hashes_of(b'{"country": "c%d"}' % i) for i in range(6400)]))
    assert np.abs(found).sum(0).min() > 140  # 200 expected in each place, deviation 14
    assert np.abs(found).sum(0).max() < 260
    assert abs(found.sum()) < 320  # deviation 80


def test_the_newest_attributes_replace_the_older_ones_together() -> None:
    stats = np.zeros(2, STATISTICS)
    slot, value = np.ones(2, np.int64), np.full(2, np.nan, np.float32)
    first = as_rows([hashes_of(b'{"a": 1, "b": 2}'), hashes_of(b'{"a": 3}')])
    update(stats, slot, np.full(2, START_MS), value, first)
    update(stats, slot, np.full(2, START_MS + 1), value)
    np.testing.assert_array_equal(stats["attributes"], first)
    second = as_rows([hashes_of(b'{"c": 1}'), NONE])
    update(stats, slot, np.full(2, START_MS + 2), value, second)
    np.testing.assert_array_equal(stats["attributes"], [second[0], first[1]])
    heard = readout(stats, np.full(2, START_MS + 2))[:, -WIDTH:].numpy()
    np.testing.assert_array_equal(heard, vector(stats["attributes"]))
