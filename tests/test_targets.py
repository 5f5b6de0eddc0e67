"""Targets: how they are written, and which heads they need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.targets import DEFAULT_TARGETS, Target, event_sets

words = st.from_regex(r"[A-Za-z0-9_]+", fullmatch=True)
types = st.lists(
    st.text(st.characters(exclude_characters=":+,*", exclude_categories=["Cs", "Zs", "Cc", "Zl", "Zp"]), min_size=1), min_size=1
)


@given(words, types, st.sampled_from(["occurs", "absent"]), st.integers(1, 10**6), st.sampled_from("mhd"))
def test_what_is_written_is_what_is_meant(name: str, types: list[str], outcome: str, number: int, unit: str) -> None:
    target = Target.parse(f" {name}={'+'.join(types)}:{outcome}:{number}{unit} ")
    assert (target.name, target.outcome) == (name, outcome)
    assert target.types == tuple(sorted(set(types)))
    assert target.horizon_ms == number * {"m": 60_000, "h": 3_600_000, "d": 86_400_000}[unit]
    assert Target.model_validate_json(target.model_dump_json()) == target
    assert Target.parse(str(target)) == target


def test_the_defaults() -> None:
    purchase, churn = DEFAULT_TARGETS
    assert purchase == Target(name="purchase", types=("purchase",), outcome="occurs", horizon_ms=7 * 86_400_000)
    assert churn == Target(name="churn", types=("*",), outcome="absent", horizon_ms=30 * 86_400_000)


IMPOSSIBLE = (
    *("", "purchase", "x=a:occurs", "x=a:happens:7d", "x=a:occurs:7", "x=a:occurs:7w", "x=a:occurs:0d", "x=a:occurs:-1d"),
    *("x=:occurs:7d", "x=+:occurs:7d", "a b=c:occurs:7d", "²=c:occurs:7d", "x=a:occurs:7d:"),
)


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no target: write NAME=TYPE\[\+TYPE\]:occurs\|absent:HORIZON"):
        Target.parse(text)


def test_any_type_stands_for_all() -> None:
    assert Target.parse("x=a+*:absent:1d").types == ("*",)


def test_targets_share_the_head_of_an_event_set() -> None:
    texts = ["a=buy:occurs:1d", "b=*:absent:30d", "c=buy:absent:7d", "d=view+buy:occurs:1h", "e=buy+view+buy:occurs:2h"]
    assert event_sets(tuple(map(Target.parse, texts))) == (("buy",), ("*",), ("buy", "view"))
