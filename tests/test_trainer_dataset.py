"""The dataset against naive computations: statistics, moments and what came after them, and that nothing knows its future."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer_support import START_MS, events_table, shop_history, shop_table

from model.attributes import as_rows, hashes_of
from model.events import stable_hash
from model.features import Scaling, Vocabulary
from model.hazards import DAY_MS, HOUR_MS
from model.statistics import STATISTICS, update
from trainer.dataset import (
    AFTER_MS,
    ASKS,
    OLDEST_MS,
    YOUNGEST_MS,
    Landmarks,
    choose_vocabulary,
    features,
    fit_scaling,
    landmarks,
    scheduled,
    statistics_after,
    thinned,
    together,
)
from trainer.history import History, from_table, read_file, sample_users

SETS = (("purchase",), ("*",))
VOCABULARY = Vocabulary(["view", "purchase"])

log_rows = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]), st.sampled_from(["view", "purchase", "other"]), st.integers(START_MS, START_MS + 50 * DAY_MS)
    ),
    min_size=1,
    max_size=40,
)


def naive(rows: list[tuple[str, str, int]]) -> dict[str, list[tuple[str, int]]]:
    """user -> (type, effective time) in log order."""
    users: dict[str, list[tuple[str, int]]] = {}
    for user, kind, time_ms in rows:
        events = users.setdefault(user, [])
        events.append((kind, max(time_ms, events[-1][1]) if events else time_ms))
    return users


@given(log_rows)
def test_log_order_and_effective_time(rows: list[tuple[str, str, int]]) -> None:
    history = from_table(events_table(rows))
    expected = naive(rows)
    assert history.user_ids == list(expected)
    for code, user in enumerate(history.user_ids):
        mine = slice(history.first[code], history.first[code + 1])
        assert history.time_ms[mine].tolist() == [t for _, t in expected[user]]
        assert history.type_hash[mine].tolist() == [stable_hash(k) for k, _ in expected[user]]
        assert (history.user[mine] == code).all()
        assert history.rank[mine].tolist() == list(range(len(expected[user])))


@settings(deadline=None)
@given(log_rows, st.data())
def test_statistics_are_those_of_one_event_after_the_other(rows: list[tuple[str, str, int]], data: st.DataObject) -> None:
    values = data.draw(st.lists(st.one_of(st.none(), st.floats(-1e4, 1e4, width=32)), min_size=len(rows), max_size=len(rows)))
    history = from_table(events_table(rows, values))
    after = statistics_after(history, VOCABULARY.slots(history.type_hash))
    slot = VOCABULARY.slots(history.type_hash)
    for user in range(history.users):
        state = np.zeros(1, STATISTICS)
        for e in range(history.first[user], history.first[user + 1]):
            update(state, slot[e : e + 1], history.time_ms[e : e + 1], history.value[e : e + 1])
            assert state[0] == after[e]


def expected_wait(history: History, moments: Landmarks, i: int, types: tuple[str, ...], end_ms: int) -> int | None:
    """Looked for by hand: the next event of the set, in log order, after the moment's event."""
    event = moments.event[i]
    hashes = {stable_hash(t) for t in types}
    for e in range(event + 1, history.first[history.user[event] + 1]):
        if history.time_ms[e] < end_ms and (types == ("*",) or int(history.type_hash[e]) in hashes):
            return int(history.time_ms[e] - moments.at_ms[i])
    return None


@settings(deadline=None)
@given(log_rows, st.integers(0, 40), st.integers(1, 20), st.integers(0, 10))
def test_moments_and_what_came_after_them(rows: list[tuple[str, str, int]], begin_day: int, days: int, seed: int) -> None:
    history = from_table(events_table(rows))
    begin_ms, end_ms = START_MS + begin_day * DAY_MS, START_MS + (begin_day + days) * DAY_MS
    moments = landmarks(history, SETS, begin_ms, end_ms, np.random.default_rng(seed))
    assert (np.diff(moments.event) >= 0).all()
    assert (moments.at_ms >= begin_ms).all()
    assert (moments.at_ms < end_ms).all()
    assert np.array_equal(moments.observed_ms, end_ms - moments.at_ms)
    assert (moments.weight > 0).all()
    right_after = np.flatnonzero(moments.at_ms == history.time_ms[moments.event] + AFTER_MS)
    over = np.append((np.diff(history.time_ms) > 0) | (np.diff(history.user) > 0), True)  # the last of a user's events at one time
    inside = np.flatnonzero((history.time_ms >= begin_ms) & (history.time_ms < end_ms) & over)
    assert moments.event[right_after].tolist() == inside.tolist()
    for i in range(len(moments)):
        for k, types in enumerate(SETS):
            wait = expected_wait(history, moments, i, types, end_ms)
            if wait is None:
                assert moments.wait_ms[i, k] >= moments.observed_ms[i]
            else:
                assert moments.wait_ms[i, k] == wait
        assert moments.wait_ms[i, 1] >= 0  # the user still was silent at the moment asked


@settings(deadline=None)
@given(log_rows, st.integers(0, 40), st.integers(1, 20), st.integers(0, 10))
def test_a_schedule_asks_of_what_came_strictly_before(rows: list[tuple[str, str, int]], begin_day: int, days: int, seed: int) -> None:
    history = from_table(events_table(rows))
    begin_ms, end_ms = START_MS + begin_day * DAY_MS, START_MS + (begin_day + days) * DAY_MS
    moments = scheduled(history, SETS, begin_ms, end_ms, np.random.default_rng(seed))
    assert (moments.at_ms >= begin_ms).all()
    assert (moments.at_ms < end_ms).all()
    known = [u for u in range(history.users) if history.time_ms[history.first[u]] + 1 < end_ms]
    assert np.unique(history.user[moments.event]).tolist() == known
    for i in range(len(moments)):
        user = history.user[moments.event[i]]
        mine = np.arange(history.first[user], history.first[user + 1])
        assert moments.event[i] == mine[history.time_ms[mine] < moments.at_ms[i]][-1]
        for k, types in enumerate(SETS):
            wait = expected_wait(history, moments, i, types, end_ms)
            assert moments.wait_ms[i, k] >= moments.observed_ms[i] if wait is None else moments.wait_ms[i, k] == wait


def test_both_kinds_of_moments_weigh_the_same() -> None:
    history, rng = shop_history(50, 20), np.random.default_rng(0)
    asked, on_schedule = (ask(history, SETS, START_MS, START_MS + 20 * DAY_MS, rng) for ask in (landmarks, scheduled))
    both = together(asked, on_schedule)
    assert both.weight.sum() == pytest.approx(2 * asked.weight.sum(), rel=1e-4)
    assert len(both) == len(asked) + len(on_schedule)
    assert (np.diff(both.event) >= 0).all()


@settings(deadline=None)
@given(log_rows, st.integers(1, 49), st.integers(0, 10))
def test_nothing_knows_its_future(rows: list[tuple[str, str, int]], day: int, seed: int) -> None:
    """Other events from a time on change nothing of what was known, asked or seen before it."""
    end_ms = START_MS + day * DAY_MS
    past = [r for r in rows if _effective_before(rows, r, end_ms)]
    if not past:
        return
    mixed = from_table(events_table([*rows, *((u, "purchase", end_ms + i) for i, (u, _, _) in enumerate(rows))])).before(end_ms)
    alone = from_table(events_table(past))
    assert mixed.time_ms.tolist() == alone.time_ms.tolist()
    assert np.array_equal(*(statistics_after(h, VOCABULARY.slots(h.type_hash)) for h in (mixed, alone)))
    for ask in (landmarks, scheduled):
        one, other = (ask(h, SETS, START_MS, end_ms, np.random.default_rng(seed)) for h in (mixed, alone))
        for name in ("event", "at_ms", "weight", "observed_ms", "wait_ms"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def _effective_before(rows: list[tuple[str, str, int]], row: tuple[str, str, int], end_ms: int) -> bool:
    place = next(i for i, r in enumerate(rows) if r is row)
    return all(r[2] < end_ms for r in rows[: place + 1] if r[0] == row[0])


def test_silent_ages_are_asked_about_as_a_worker_does() -> None:
    """Weighted draws inside a silence count, at any age, what free draws would have counted."""
    history = from_table(events_table([("a", "view", START_MS), ("a", "view", START_MS + 5 * DAY_MS), ("b", "view", START_MS)]))
    end_ms = START_MS + 100 * DAY_MS
    asked: dict[tuple[int, int], float] = {}
    rounds = 300
    for seed in range(rounds):
        moments = landmarks(history, SETS, START_MS, end_ms, np.random.default_rng(seed))
        for event, at_ms, weight in zip(moments.event, moments.at_ms, moments.weight, strict=True):
            age_ms = at_ms - history.time_ms[event]
            if age_ms > AFTER_MS:
                bin_ = int(3 * np.log(age_ms / YOUNGEST_MS) / np.log(OLDEST_MS / YOUNGEST_MS))
                asked[(event, bin_)] = asked.get((event, bin_), 0) + weight / rounds
    for (event, bin_), count in asked.items():
        if event > 0 or bin_ < 2:  # the first silence ends within the last third
            assert count == pytest.approx(ASKS / 3, rel=0.1)
    # five days lie within the last third: only part of it was a silence
    share = (np.log(5 * DAY_MS / YOUNGEST_MS) / np.log(OLDEST_MS / YOUNGEST_MS) - 2 / 3) * ASKS
    assert asked[(0, 2)] == pytest.approx(share, rel=0.25)


def test_thinned_moments_weigh_one() -> None:
    history = shop_history(200, 40)
    moments = landmarks(history, SETS, START_MS, START_MS + 40 * DAY_MS, np.random.default_rng(0), draws=ASKS)
    assert moments.weight.max() <= 1
    thin = thinned(moments, np.random.default_rng(1), at_most=10**9)
    assert (thin.weight == 1).all()
    assert len(thin) == pytest.approx(moments.weight.sum(), rel=0.05)
    assert len(thinned(moments, np.random.default_rng(1), at_most=50)) == 50


def test_features_look_one_event_back() -> None:
    history = from_table(events_table([("a", "view", START_MS), ("b", "view", START_MS), ("a", "view", START_MS + HOUR_MS)]))
    steps = features(history, VOCABULARY, Scaling())
    assert steps.slot.tolist() == [1, 1, 1]
    assert steps.numeric[:, 1].tolist() == [1, 0, 1]  # a first event
    assert steps.numeric[:, 8].tolist() == [0, 1, 0]  # the same type as before
    assert steps.numeric[1, 0] == pytest.approx(np.log1p(3600) / 8)


def test_vocabulary_only_grows() -> None:
    types = {"view": 100, "purchase": 3, "cart": 20} | {f"t{i:02d}": i for i in range(20)}
    fresh = choose_vocabulary(types, SETS)
    assert fresh[0] == "purchase"
    assert len(fresh) == 11
    grown = choose_vocabulary(types | {"new": 1000}, SETS, ["cart", "view"])
    assert grown[:4] == ["cart", "view", "purchase", "new"]
    with pytest.raises(ValueError, match="a model has room for 11"):
        choose_vocabulary(types, (("purchase", *(f"x{i}" for i in range(11))),))


def test_scaling_of_no_values() -> None:
    assert fit_scaling(np.array([np.nan, np.nan], np.float32)) == Scaling()


def test_sampled_users_stay_the_same() -> None:
    history = shop_history(300, 30)
    half = sample_users(history, len(history) // 2)
    assert 0.3 * len(history) < len(half) <= 0.5 * len(history)
    assert set(sample_users(history, len(history) // 3).user_ids) < set(half.user_ids)


def test_several_topics_are_merged_by_time() -> None:
    rows = [("a", "view", START_MS + 5), ("a", "view", START_MS + 1), ("a", "purchase", START_MS + 2), ("a", "purchase", START_MS + 9)]
    table = events_table(rows).append_column("topic", pa.array(["one", "one", "two", "two"]))
    history = from_table(table)
    assert (history.time_ms - START_MS).tolist() == [2, 5, 5, 9]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_files_of_all_kinds_say_the_same(tmp_path: Path, kind: str) -> None:
    table = shop_table(50, 30)
    path = tmp_path / f"events.{kind}"
    if kind == "csv":
        pyarrow.csv.write_csv(table, path)
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        import json

        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    ours, theirs = from_table(read_file(path)), from_table(table)
    for name in ("user", "time_ms", "type_hash", "item_hash", "category_hash", "value"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name), equal_nan=name == "value")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("user_id,type\na,view\n", "has no column timestamp"),
        ("user_id,type,timestamp\na,view,yesterday\n", "'yesterday' is neither epoch milliseconds nor RFC 3339"),
        ("user_id,type,timestamp\n,,\n", "holds no event"),
        ("user_id,type,timestamp,value\na,view,1760000000000,cheap\n", "column value"),
    ],
)
def test_a_file_that_cannot_be_is_refused_in_a_sentence(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "events.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_file(path)


def test_own_names_and_rfc_3339(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_text("uid,type,at,value\n007,view,2025-10-09T08:53:20Z,1\n007,view,2025-10-09T10:53:21+02:00,\n")
    fields: dict[str, Any] = {"user_id": "uid", "timestamp": "at"}
    history = from_table(read_file(path, fields))
    assert history.user_ids == ["007"]
    assert history.time_ms.tolist() == [1760000000000, 1760000001000]
    assert np.isnan(history.value[1])


ATTRIBUTE_ROWS = [{"country": "NL", "age": "007"}, None, {"country": "DE"}]
EVENT_ROWS = [{"user_id": "a", "type": "view", "timestamp": START_MS + i, "session_id": f"s{i // 2}"} for i in range(3)]


def as_csv(path: Path) -> None:
    cells = ["" if not each else f"{each['country']},{each.get('age', '')}" for each in ATTRIBUTE_ROWS]
    rows = [f"a,view,{START_MS + i},s{i // 2},{cell or ','}" for i, cell in enumerate(cells)]
    path.write_text("\n".join(["user_id,type,timestamp,session_id,attributes.country,attributes.age", *rows]))


def as_texts(path: Path) -> None:
    texts = [None if each is None else json.dumps(each) for each in ATTRIBUTE_ROWS]
    pyarrow.parquet.write_table(pa.Table.from_pylist(EVENT_ROWS).append_column("attributes", pa.array(texts)), path)


def as_maps(path: Path) -> None:
    maps = pa.array([None if each is None else list(each.items()) for each in ATTRIBUTE_ROWS], pa.map_(pa.string(), pa.string()))
    pyarrow.parquet.write_table(pa.Table.from_pylist(EVENT_ROWS).append_column("attributes", maps), path)


def as_objects(path: Path) -> None:
    path.write_text("\n".join(json.dumps({**event, "attributes": each}) for event, each in zip(EVENT_ROWS, ATTRIBUTE_ROWS, strict=True)))


@pytest.mark.parametrize(("name", "write"), [("e.csv", as_csv), ("e.parquet", as_texts), ("m.parquet", as_maps), ("e.jsonl", as_objects)])
def test_attributes_in_files_of_every_kind(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    history = from_table(read_file(tmp_path / name))
    assert history.session_hash.tolist() == [stable_hash(f"s{i // 2}") for i in range(3)]
    expected = as_rows([hashes_of(json.dumps(each).encode()) for each in ATTRIBUTE_ROWS])
    np.testing.assert_array_equal(history.attributes, expected)
    stats = statistics_after(history, VOCABULARY.slots(history.type_hash))
    np.testing.assert_array_equal(stats["attributes"], expected[[0, 0, 2]])  # the newest that were carried


def test_no_attributes_and_wrong_ones() -> None:
    table = events_table([("a", "view", START_MS), ("a", "view", START_MS + 1)])
    assert from_table(table).attributes is None
    with pytest.raises(ValueError, match="the column attributes: attributes are no JSON object"):
        from_table(table.append_column("attributes", pa.array(["{}", "[1]"])))


def test_scaling_is_robust() -> None:
    logs = np.random.default_rng(0).normal(3, 0.5, 10_000)
    value = np.expm1(np.append(logs, [60.0] * 100)).astype(np.float32)
    scaling = fit_scaling(value)
    assert scaling.value_centre == pytest.approx(3, abs=0.03)
    assert scaling.value_spread == pytest.approx(0.5, abs=0.03)
    assert fit_scaling(np.array([5] * 9 + [500], np.float32)).value_spread > 0.5  # no range between the quartiles


def test_types_are_counted_in_what_was_known() -> None:
    history = from_table(events_table([("a", "view", START_MS), ("b", "view", START_MS + 1), ("a", "new", START_MS + 5)]))
    assert history.types == {"view": 2, "new": 1}
    assert history.before(START_MS + 5).types == {"view": 2}
