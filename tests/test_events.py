"""Decoding: every record is an event or a bad record, whatever its bytes are, and whatever stands beside it."""

from __future__ import annotations

import json
import zlib
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import events
from model.attributes import MOST, hashes_of
from model.events import FIELDS, BadRecord, EventColumns, EventDecoder, Limits, stable_hash

NOW_MS = 1_760_000_000_000
DAY_MS = 86_400_000
REASONS = {
    *("malformed", "wrong_type", "missing_field", "empty", "too_large"),
    *("empty_user_id", "user_id_too_long", "timestamp_in_future", "timestamp_too_old"),
}

decoder = EventDecoder(Limits(max_event_bytes=1000, max_user_id_bytes=20))


def event(**fields: object) -> bytes:
    return json.dumps({"user_id": "u1", "type": "page_view", "timestamp": NOW_MS, **fields}).encode()


def one(value: bytes | None, at_ms: int = NOW_MS, by: EventDecoder = decoder) -> tuple[EventColumns, str]:
    columns, bad = by.columns([value], [at_ms])
    return columns, bad[0].reason if bad else ""


times = st.one_of(
    st.integers(NOW_MS - DAY_MS, NOW_MS + DAY_MS),
    st.integers(),
    st.sampled_from([2**62, -(2**62), 2**63, -(2**63), 2**63 - 1]),
    st.integers(0, 10**14).map(str),
    st.datetimes(timezones=st.none() | st.timezones()).map(lambda at: at.isoformat()),
    st.dates().map(lambda day: day.strftime("%Y%m%d")),
    st.floats(),
    st.text(max_size=30),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
plausible = st.fixed_dictionaries(
    {"user_id": st.text(max_size=30), "type": st.text(max_size=5), "timestamp": times},
    optional={
        "event_id": st.none() | st.text(),
        "item_id": st.text(),
        "category": st.none() | st.text(),
        "value": st.floats() | st.integers(),
    },
).map(lambda fields: json.dumps(fields).encode())
damaged = st.tuples(st.sampled_from([*FIELDS, "unknown"]), anything).map(lambda pair: event(**{pair[0]: pair[1]}))
cut = st.tuples(plausible, st.integers(0, 200)).map(lambda pair: pair[0][: pair[1]])
values = st.one_of(st.none(), st.binary(max_size=50), plausible, damaged, cut, st.just(event()), st.just(b"x" * 1001))
records = st.lists(st.tuples(values, st.integers(NOW_MS - DAY_MS, NOW_MS + DAY_MS)), max_size=8)


@given(records)
def test_every_record_is_in_exactly_one_of_the_results(batch: list[tuple[bytes | None, int]]) -> None:
    columns, bad = decoder.columns([v for v, _ in batch], [t for _, t in batch])
    good = columns.index.tolist()
    assert good == sorted(good)
    assert [b.index for b in bad] == sorted(b.index for b in bad)
    assert sorted([*good, *(b.index for b in bad)]) == list(range(len(batch)))
    assert {b.reason for b in bad} <= REASONS
    assert all(b.detail for b in bad)
    for column in (columns.user, columns.event_id, columns.time_ms, columns.type_hash, columns.item_hash, columns.value):
        assert len(column) == len(columns)
    assert np.isfinite(columns.value[~np.isnan(columns.value)]).all()


@given(records)
def test_the_verdict_on_a_record_depends_on_that_record_alone(batch: list[tuple[bytes | None, int]]) -> None:
    columns, bad = decoder.columns([v for v, _ in batch], [t for _, t in batch])
    verdicts: dict[int, Any] = {b.index: (b.reason, b.detail) for b in bad}
    for k, i in enumerate(columns.index.tolist()):
        verdicts[i] = row(columns, k)
    for i, (value, at_ms) in enumerate(batch):
        alone, refused = decoder.columns([value], [at_ms])
        assert verdicts[i] == ((refused[0].reason, refused[0].detail) if refused else row(alone, 0))


def row(columns: EventColumns, k: int) -> tuple[object, ...]:
    hashes = columns.type_hash[k], columns.item_hash[k], columns.category_hash[k]
    attributes = [0] * MOST if columns.attributes is None else columns.attributes[k].tolist()
    return (columns.user[k], columns.event_id[k], columns.time_ms[k], *hashes, columns.session_hash[k], repr(columns.value[k]), attributes)


def test_an_empty_poll_is_no_events() -> None:
    columns, bad = decoder.columns([], [])
    assert (len(columns), len(bad)) == (0, 0)
    assert columns.time_ms.dtype == np.int64


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (event(note="").replace(b'""', b'"%s"' % (b"x" * (1000 - len(event(note=""))))), ""),
        (event(note="").replace(b'""', b'"%s"' % (b"x" * (1001 - len(event(note=""))))), "too_large"),
        (event(user_id="ü" * 10), ""),
        (event(user_id="ü" * 10 + "u"), "user_id_too_long"),
        (event(user_id="u" * 21), "user_id_too_long"),
        (event(timestamp=NOW_MS + 600_000), ""),
        (event(timestamp=NOW_MS + 600_001), "timestamp_in_future"),
        (event(timestamp=NOW_MS - 7300 * DAY_MS), ""),
        (event(timestamp=NOW_MS - 7300 * DAY_MS - 1), "timestamp_too_old"),
        (event(timestamp=2**62 - 1), "timestamp_in_future"),
        (event(timestamp=-(2**62) + 1), "timestamp_too_old"),
        (event(timestamp=2**62), "wrong_type"),
    ],
)
def test_limits_are_exact(value: bytes, reason: str) -> None:
    assert one(value)[1] == reason


def test_a_bad_record_says_what_is_wrong() -> None:
    _, bad = decoder.columns([event(timestamp=NOW_MS // 1000), b"{", event(user_id="u" * 3000)[:900]], [NOW_MS] * 3)
    assert bad[0] == BadRecord(
        0, "timestamp_too_old", f"timestamp {NOW_MS // 1000} is 20,350 days older than the record (milliseconds are expected)"
    )
    assert bad[1].detail.startswith("not JSON: ")


@given(st.datetimes(datetime(1990, 1, 1), datetime(2090, 1, 1)), st.integers(-14 * 60, 14 * 60))
def test_a_timestamp_may_be_rfc_3339(at: datetime, offset_minutes: int) -> None:
    at = at.replace(microsecond=at.microsecond // 1000 * 1000)
    utc_ms = (at.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    zone = timezone(timedelta(minutes=offset_minutes))
    by = EventDecoder(Limits(max_age_ms=1 << 60, max_future_ms=1 << 60))
    texts = (
        (at.isoformat() + "Z", utc_ms),
        (at.isoformat(), utc_ms),
        (at.isoformat(" ") + "+00:00", utc_ms),
        (at.replace(tzinfo=zone).isoformat(), utc_ms - offset_minutes * 60_000),
    )
    for text, expected_ms in texts:
        assert one(event(timestamp=text), by=by)[0].time_ms.tolist() == [expected_ms], text


def test_fields_of_ones_own_names() -> None:
    by = EventDecoder(field_names={"user_id": "userId", "timestamp": "sentAt", "value": "properties_revenue"})
    theirs = {"userId": "u9", "type": "purchase", "sentAt": NOW_MS, "properties_revenue": 5, "user_id": "not this", "value": 7}
    columns, _ = one(json.dumps(theirs).encode(), by=by)
    assert (columns.user, columns.value.tolist()) == (["u9"], [5.0])
    assert one(event(), by=by)[1] == "missing_field"


def test_what_is_missing_is_told_from_what_is_empty() -> None:
    columns, _ = decoder.columns([event(), event(item_id="", category="", event_id="", type="", value=0)], [NOW_MS] * 2)
    assert columns.event_id == [None, ""]
    assert columns.item_hash.tolist()[0] == columns.category_hash.tolist()[0] == 0
    assert columns.item_hash.tolist()[1] == columns.category_hash.tolist()[1] == columns.type_hash.tolist()[1] != 0
    assert np.isnan(columns.value[0])
    assert columns.value[1] == 0


def test_values_beyond_float32_are_clipped() -> None:
    columns, _ = decoder.columns([event(value=1e300), event(value=-1e300), event(value=12345678901234567890)], [NOW_MS] * 3)
    assert columns.value.tolist() == [np.float32(1e30), np.float32(-1e30), np.float32(12345678901234567890)]


@given(st.text())
def test_a_hash_is_stable_and_never_zero(text: str) -> None:
    assert stable_hash(text) == (zlib.crc32(text.encode()) or 1)


def test_hashes_survive_a_full_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events._HashTable, "LIMIT", 3)
    by = EventDecoder()
    items = [f"i{i % 7}" for i in range(50)]
    columns, _ = by.columns([event(item_id=item) for item in items], [NOW_MS] * 50)
    assert columns.item_hash.tolist() == [stable_hash(item) for item in items]


def test_attributes_are_hashed_where_they_are_carried() -> None:
    columns, bad = decoder.columns([event(), event(attributes={"a": 1}), event(attributes=None), event(attributes={})], [NOW_MS] * 4)
    assert not bad
    assert columns.attributes is not None
    assert columns.attributes[1].tobytes() == hashes_of(b'{"a":1}')
    assert not columns.attributes[[0, 2, 3]].any()
    assert decoder.columns([event(), event()], [NOW_MS] * 2)[0].attributes is None


@pytest.mark.parametrize("attributes", [[1], "text", 5, True, [{"a": 1}]])
def test_attributes_that_are_no_object_make_a_bad_record(attributes: object) -> None:
    columns, bad = decoder.columns([event(), event(attributes=attributes), event(attributes={"a": 1})], [NOW_MS] * 3)
    assert [(b.index, b.reason) for b in bad] == [(1, "wrong_type")]
    assert "attributes are no JSON object" in bad[0].detail
    assert columns.attributes is not None
    assert [bool(row.any()) for row in columns.attributes] == [False, True]


def test_sessions_are_hashed() -> None:
    columns, _ = decoder.columns([event(), event(session_id="s1")], [NOW_MS] * 2)
    assert columns.session_hash.tolist() == [0, stable_hash("s1")]
