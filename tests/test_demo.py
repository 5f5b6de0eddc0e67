"""The demo's parts, without the whole: what it feeds, what it counts, what it says. CI runs the whole demo by itself."""

import io
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kafka import KafkaProducer
from rich.console import Console

from demo import feed
from demo.__main__ import main
from demo.arguments import epoch_ms
from demo.attainable import Filter, Target, auc, labels
from demo.audit import Audit, CatchUp, Score, Source, decode_score, read_back, records
from demo.board import Board, Keen, Promotion, Silent
from demo.launch import ProgramEnded, program
from demo.malformed import bad_records
from demo.metrics import samples
from demo.play import purchase_target
from demo.quality import Measure, Quality
from demo.replay import File, InputError
from demo.shop import DAY_MS, TYPES
from demo.stream import Shop, Stream
from demo.summary import Summary
from demo.topics import Topics
from demo.view import bar, line, screen, sparkline
from demo.watch import People, Visible
from model.events import EventDecoder

END_MS = 1_760_000_000_000
TARGETS: dict[str, Target] = {"purchase": (("purchase",), "occurs", 7 * DAY_MS), "churn": (("*",), "absent", 30 * DAY_MS)}


@pytest.fixture(scope="module")
def stream() -> Stream:
    return Shop(users=1500, seed=3, end_ms=END_MS, history_days=40, live_days=60).load()


# -- what is fed


def test_a_stream_is_the_same_in_every_process(stream: Stream) -> None:
    again = Shop(users=1500, seed=3, end_ms=END_MS, history_days=40, live_days=60).load()
    assert stream.encode(0, 2000) == again.encode(0, 2000)
    assert stream.live_days == 60
    assert stream.history.time_ms[stream.live_from - 1] < stream.live_ms <= stream.history.time_ms[stream.live_from]
    assert stream.history.time_ms[-1] < END_MS


def test_a_promotion_multiplies_purchases_from_its_day_on_and_reaches_the_feed(stream: Stream) -> None:
    shop = Shop(users=1500, seed=3, end_ms=END_MS, history_days=40, live_days=60, promotion=3.0, promotion_day=20.0)
    drifted = shop.load()
    assert drifted.drift
    assert drifted.drift.at_ms == stream.live_ms + 20 * DAY_MS
    purchase, since_ms = TYPES.index("purchase"), drifted.drift.at_ms
    steady, more = (np.count_nonzero((h.type == purchase) & (h.time_ms >= since_ms)) for h in (stream.history, drifted.history))
    assert more > 1.8 * steady
    said = dict(itertools.pairwise(shop.arguments()))
    assert (said["--promotion"], said["--promotion-day"]) == ("3.0", "20.0")


def test_the_worker_takes_every_event_of_the_shop(stream: Stream) -> None:
    count = len(stream.history.user)
    columns, bad = EventDecoder().columns(stream.encode(0, count), [END_MS] * count)
    assert not bad
    assert columns.user == [stream.history.users[u] for u in stream.history.user]
    assert np.array_equal(columns.time_ms, stream.history.time_ms)
    assert len(set(columns.event_id)) == count


def test_the_worker_takes_none_of_the_malformed_records() -> None:
    kinds = bad_records(END_MS - 30 * DAY_MS, END_MS)
    columns, bad = EventDecoder().columns(kinds, [END_MS] * len(kinds))
    assert not len(columns)
    assert {b.reason for b in bad} >= {"malformed", "missing_field", "wrong_type", "timestamp_in_future", "too_large", "empty"}


def test_events_are_due_when_their_time_has_come(stream: Stream) -> None:
    speed = DAY_MS / 1000  # a day a second
    assert feed.simulated_ms(stream, speed, 0) == stream.live_ms
    assert feed.simulated_ms(stream, speed, 60) == stream.end_ms
    assert feed.simulated_ms(stream, float("inf"), 0) == stream.end_ms
    times = stream.history.time_ms
    assert feed.due(times, stream.live_ms - 1) == stream.live_from
    assert feed.due(times, int(times[7])) == 8
    assert feed.due(times, stream.end_ms) == len(times)


def test_malformed_records_are_spread_over_the_live_part(stream: Stream) -> None:
    times = feed.bad_times(stream, 24)
    assert len(times) == 24
    assert stream.live_ms < times.min() < times.max() < stream.end_ms
    key, value = feed.malformed(int(times[0]), 0)
    assert key is None
    assert value
    assert all(key or value for key, value in (feed.malformed(END_MS, n) for n in range(24))), "Kafka takes no record without both"


def test_a_users_events_have_one_key(stream: Stream) -> None:
    for (key, value), user in zip(feed.events(stream, 10, 20), stream.history.user[10:20], strict=True):
        assert key == stream.history.users[user].encode()
        assert value
        assert json.loads(value)["user_id"] == stream.history.users[user]


# -- files of one's own

ROWS = [
    {"user_id": "007", "type": "view", "timestamp": 1_700_000_000_000, "item_id": "i1"},
    {"user_id": "b", "type": "order", "timestamp": 1_700_500_000_000, "value": 2.5},
    {"user_id": "007", "type": "order", "timestamp": 1_700_900_000_000, "value": 3.0},
]
CSV = """user_id,type,timestamp,item_id,value,colour
007,view,1700000000000,i1,,red
b,order,1700500000000,,2.5,red
007,order,1700900000000,,3.0,
"""
SCHEMA = pa.schema(
    {"user_id": pa.string(), "type": pa.string(), "item_id": pa.string(), "timestamp": pa.timestamp("ms"), "value": pa.float64()}
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def to(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return to


def test_files_of_all_formats_are_one_stream(tmp_path: Path, write: Callable[[str, str], Path]) -> None:
    unsorted = [ROWS[2], ROWS[0], ROWS[1]]
    pq.write_table(pa.Table.from_pylist(unsorted, SCHEMA), tmp_path / "a.parquet")
    iso = [{**row, "timestamp": f"2023-11-{day}T00:00:00Z"} for row, day in zip(unsorted, (20, 10, 15), strict=True)]
    paths = [write("a.csv", CSV), write("a.jsonl", "\n".join(map(json.dumps, unsorted))), tmp_path / "a.parquet"]
    for path in paths:
        loaded = File(path).load()
        assert [json.loads(value) for value in loaded.encode(0, 3)] == ROWS, path
        assert loaded.history.users == ["007", "b"]
        assert loaded.history.types == ("view", "order")
        assert loaded.live_from == 2
        assert loaded.law is None
    dated = File(write("iso.jsonl", "\n".join(map(json.dumps, iso)))).load()
    assert np.diff(dated.history.time_ms).tolist() == [5 * DAY_MS, 5 * DAY_MS]


def test_until_leaves_out_what_comes_later(write: Callable[[str, str], Path]) -> None:
    path = write("a.csv", CSV)
    assert len(File(path, until_ms=1_700_600_000_000).load().history.user) == 2
    with pytest.raises(InputError, match="no event before --until 2023-01-01 00:00"):
        File(path, until_ms=epoch_ms("2023-01-01")).load()


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.txt", "x", "does not end in .csv, .jsonl or .parquet"),
        ("a.csv", "", "is empty"),
        ("a.csv", "user_id,type,timestamp\n", "has no events"),
        ("a.csv", "user,type\nu,view\n", "no column user_id and no column timestamp; it has user, type"),
        ("a.csv", "user_id,type,timestamp\nu,view,1700000000000\n,view,1700000000001\n", "event 2 has no user_id"),
        ("a.csv", "user_id,type,timestamp\nu,view,1700000000\nu,view,1700000009\n", "were seconds meant"),
        ("a.csv", "user_id,type,timestamp\nu,view,1700000000000\nu,view,9900000000000\n", "in the future, at 2283-"),
        ("a.csv", "user_id,type,timestamp\nu,view,1700000000000\n", "have one timestamp"),
        ("a.csv", "user_id,type,timestamp\nu,view,1700000000000\nu,view,soon\n", "event 2 has the timestamp 'soon'"),
        ("a.csv", "user_id,type,timestamp,value\nu,view,1700000000000,cheap\n", "column value cannot be read as double"),
        ("a.csv", "user_id,type,timestamp\nu,view\n", "is not what its name says"),
        ("a.jsonl", '{"user_id": "u", "type"\n', "is not what its name says"),
        ("a.parquet", "no parquet", "is not what its name says"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(write: Callable[[str, str], Path], name: str, text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        File(write(name, text)).load()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv cannot be read"):
        File(tmp_path / "none.csv").load()


def test_the_purchase_must_occur(write: Callable[[str, str], Path]) -> None:
    loaded = File(path := write("a.csv", CSV)).load()
    assert purchase_target(loaded, "order", path).types == ("order",)
    with pytest.raises(InputError, match="no event of type purchase; it has view, order"):
        purchase_target(loaded, None, path)


@pytest.mark.parametrize("arguments", [["--speed", "9"], ["--input", "x.csv", "--speed", "0"], ["--users", "3"], ["--until", "2026-01-01"]])
def test_impossible_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_bad_file_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--input", "nowhere.csv"]) == 2
    assert capsys.readouterr().out.startswith("nowhere.csv cannot be read")


# -- what is counted


def event_score(partition: int, offset: int, model: str = "a") -> Score:
    return Score("u", "event", {"purchase": 0.5}, 1, Source("events", partition, offset), model)


def silence_score(user: str, timestamp: int) -> Score:
    return Score(user, "silence", {"purchase": 0.5}, timestamp, None, "a")


def test_an_audit_of_everything_in_order() -> None:
    audit = Audit({0: (0, 3), 1: (10, 12)})
    for partition, offset in ((0, 0), (0, 2), (1, 10), (1, 11)):
        audit.score(event_score(partition, offset), 5)
    audit.dead_letter(0, 1, "malformed")
    audit.score(silence_score("u", 7), 5)
    audit.score(silence_score("u", 8), 5)
    audit.score(silence_score("v", 7), 5)
    assert (audit.events, audit.event_scores, audit.silence_scores, audit.dead_letters) == (5, 4, 3, 1)
    assert (audit.lost, audit.doubled, audit.foreign) == (0, 0, 0)


def test_an_audit_counts_what_is_lost_and_doubled() -> None:
    audit = Audit({0: (0, 6)})
    for offset in (0, 1, 1, 1, 3):
        audit.score(event_score(0, offset), 5)
    audit.dead_letter(0, 3, "malformed")  # scored, too
    for _ in range(2):
        audit.dead_letter(0, 4, "empty")
        audit.score(silence_score("u", 7), 5)
    assert audit.lost == 2  # 2 and 5
    assert audit.doubled == 2 + 1 + 1 + 1
    audit.score(event_score(0, 6), 5)
    audit.score(event_score(9, 0), 5)
    assert audit.foreign == 2


def test_models_are_listed_in_the_order_of_their_first_score() -> None:
    audit = Audit({0: (0, 2), 1: (0, 2)})
    for partition, offset, model, at in ((0, 0, "a", 10), (0, 1, "c", 30), (1, 0, "b", 20), (1, 1, "c", 40)):
        audit.score(event_score(partition, offset, model), at)
    assert audit.models == ["a", "b", "c"]


def test_catching_up_is_the_history_by_the_topics_own_clock() -> None:
    caught_up = CatchUp({0: 3})
    for offset, written_ms in ((0, 1000), (1, 1500), (2, 2000), (3, 60_000)):
        caught_up.score(event_score(0, offset), written_ms)
    caught_up.score(silence_score("u", 1), 90_000)
    assert caught_up.events_per_second == 3
    assert CatchUp({}).events_per_second == 0


def test_visible_time_waits_for_the_events_arrival() -> None:
    visible = Visible({0: 100})
    visible.score(0, 99, seen_ms=5)  # of the history
    visible.score(0, 101, seen_ms=1070)
    visible.event(0, 1000)
    visible.settle(now_ms=1100)
    assert visible.overall() is None
    visible.event(0, 1020)
    visible.settle(now_ms=1100)
    assert visible.overall() == visible.recent() == (50, 50)
    visible.settle(now_ms=60_000)
    assert visible.recent() is None
    assert visible.overall() == (50, 50)


def test_users_are_ranked_by_intent_and_by_what_silence_did() -> None:
    people = People.of(4)
    people.first[:] = [0.2, 0.9, -1, 0.5]
    people.before[:] = [0.1, 0.3, -1, 0.1]
    people.second[:] = [0.3, 0.4, -1, 0.9]
    people.active_ms[:] = [10, 10, 0, 50]
    people.at_ms[:] = [60, 60, 0, 50]  # the last has just been active
    assert people.keenest(2).tolist() == [1, 3]
    assert people.falling_silent(3, since_ms=50).tolist() == [0, 1]
    assert people.falling_silent(3, since_ms=61).tolist() == []


def test_quality_judges_live_scores_whose_horizon_has_passed(stream: Stream) -> None:
    assert stream.law
    history, quality = stream.history, Quality(stream, TARGETS)
    best = Filter(stream.law, history).probabilities(history.user, history.time_ms, TARGETS)
    noise = np.random.default_rng(0).random(len(history.user))
    for i, (user, at_ms) in enumerate(zip(history.user.tolist(), history.time_ms.tolist(), strict=True)):
        quality.add(user, at_ms, {"purchase": float(best["purchase"][i]), "churn": noise[i]})
        if i % 5000 == 0:
            quality.measure(at_ms)  # what was measured before does not change what comes after
    end = quality.measure(stream.end_ms)
    for name, target in TARGETS.items():
        live = (history.time_ms >= stream.live_ms) & (history.time_ms + target[2] <= stream.end_ms)
        truth = labels(history, history.user[live], history.time_ms[live], target)
        assert end[name].count == live.sum()
        assert end[name].attainable == pytest.approx(auc(truth, best[name][live]))
    assert end["purchase"].published == pytest.approx(end["purchase"].attainable, abs=1e-4)
    assert end["churn"].published == pytest.approx(0.5, abs=0.05)
    early = quality.measure(stream.live_ms + 10 * DAY_MS)
    assert early["churn"] == Measure(0, None, None)
    assert early["purchase"].published


def test_the_excess_is_what_the_law_expects_beyond_the_best(stream: Stream) -> None:
    assert stream.law
    quality, at_ms = Quality(stream, TARGETS), stream.live_ms + DAY_MS
    known = np.unique(stream.history.user[stream.history.time_ms < at_ms])[:200]
    best = Filter(stream.law, stream.history).probabilities(known, np.full(len(known), at_ms), TARGETS)
    for i, user in enumerate(known.tolist()):
        quality.add(user, at_ms, {"purchase": float(best["purchase"][i]), "churn": 0.5})
    excess = quality.excess(at_ms, at_ms + 1)
    t = np.clip(best["churn"], 1e-9, 1 - 1e-9)
    assert excess["purchase"] == pytest.approx(0, abs=1e-6)
    assert excess["churn"] == pytest.approx((np.log(2) + t * np.log(t) + (1 - t) * np.log(1 - t)).mean(), rel=1e-4)
    assert np.isnan(quality.excess(at_ms + 1, at_ms + 2)["churn"])


def test_metrics_are_summed_over_labels() -> None:
    text = '# HELP a b\na{x="1"} 2.0\na{x="} {"} 3\nb 1e3\nc{le="+Inf"} NaN\n'
    found = samples(text)
    assert (found["a"], found['a{x="1"}'], found["b"]) == (5, 2, 1000)


# -- what is said


def full_board() -> Board:
    return Board(
        scenes=[(0, "writing history"), (5, "live, a day a second")],
        live=0.4,
        today="2026-01-01",
        trainer="fitting: 40%, pass 7",
        worker="ready",
        events=1000,
        lag=3,
        visible=(12, 38),
        quality={"purchase": Measure(40_000, 0.8, 0.82), "churn": Measure(0, None, None)},
        days_to_go={"purchase": 0, "churn": 12.5},
        versions=["v1", "v2"],
        promotions=[Promotion(9, "v1", "promoted", "first"), Promotion(40, "v2", "promoted", "better")],
        keen=[Keen("u1", 0.9, 3_600_000)],
        silent=[Silent("u2", 7, 0.1, 0.6)],
    )


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (40, 10)])
@pytest.mark.parametrize("board", [Board(), full_board()], ids=["empty", "full"])
def test_every_board_can_be_shown(board: Board, size: tuple[int, int]) -> None:
    width, height = size
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, record=True)
    console.print(screen(board), height=height)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    if board.events and width >= 80:
        assert all(word in text for word in ("0.800", "0.820", "in 12d", "u1", "u2", "fitting", "38 ms"))
    assert "\n" not in line(board)


def test_bars_and_sparklines_have_their_width() -> None:
    assert bar(0.5, 10) == "━━━━━"
    assert bar(0.05, 10) == "╸"
    assert bar(7, 10) == "━" * 10
    assert sparkline([0, 4, 8], 10) == " ▄█"
    assert sparkline([], 10) == ""


def summary(**changed: object) -> Summary:
    values = {
        "seconds": 100.04,
        "events": 10,
        "scores": 12,
        "silence_scores": 3,
        "dead_letters": {"malformed": 1},
        "events_per_second": 9999.6,
        "visible": (12.34, 45.67),
        "models": ["a", "b"],
        "swaps": 1,
        "quality": {"purchase": Measure(9, 0.81234, 0.83), "churn": Measure(9, 0.7, None)},
        "lost": 0,
        "doubled": 0,
    }
    return Summary(**{**values, **changed})  # type: ignore[arg-type]


def test_the_summary_as_json() -> None:
    said = json.loads(summary().json())
    assert (said["events"], said["scores"], said["silence_scores"], said["dead_letters"], said["events_per_second"]) == (
        10,
        12,
        3,
        1,
        10_000,
    )
    assert said["visible_ms"] == {"p50": 12.3, "p99": 45.7}
    assert said["auc"] == {"purchase": 0.8123, "churn": 0.7}
    assert said["attainable_auc"] == {"purchase": 0.83, "churn": None}
    assert (said["models"], said["swaps"], said["lost"], said["doubled"]) == (["a", "b"], 1, 0, 0)
    assert json.loads(summary(visible=None).json())["visible_ms"] == {"p50": None, "p99": None}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"lost": 2}, "2 events got no answer"),
        ({"doubled": 1}, "1 answers came twice"),
        ({"swaps": 0}, "never swapped"),
        ({"quality": {"churn": Measure(3, None, None)}}, "too few scores of churn"),
    ],
)
def test_the_summary_knows_what_went_wrong(changed: dict[str, object], problem: str) -> None:
    assert summary().problems(quality_needed=True) == []
    (found,) = summary(**changed).problems(quality_needed=True)
    assert problem in found
    assert bool(summary(**changed).problems(quality_needed=False)) == ("quality" not in changed)


# -- programs and topics


def test_a_program_has_its_settings_and_no_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STREAMSCORE_FOREIGN", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "shown.py").write_text("import os, time\nprint(*sorted(k for k in os.environ if k.startswith('STREAM')))\ntime.sleep(60)\n")
    with program("helper", ["shown"], {"STREAMSCORE_OWN": 1}, nice=3) as helper:
        deadline = time.monotonic() + 20
        while not helper.log and time.monotonic() < deadline:
            time.sleep(0.01)
        assert helper.log == ["STREAMSCORE_OWN"]
        helper.check()
        assert helper.alive
    assert not helper.alive
    assert not helper.directory.exists()


def test_a_program_that_ends_is_quoted() -> None:
    with program("helper", ["no_such_module"], {}) as helper:
        while helper.alive:
            time.sleep(0.01)
        with pytest.raises(ProgramEnded, match=r"(?s)helper ended unexpectedly.*No module named no_such_module"):
            helper.check()


def test_topics_are_read_back_as_committed(bootstrap: str, make_topic: Callable[..., str], unique: str) -> None:
    topics = Topics(make_topic(2), make_topic(2), make_topic(1), unique, unique)
    producer = KafkaProducer(bootstrap_servers=bootstrap, transactional_id=unique)
    producer.init_transactions()
    plain = KafkaProducer(bootstrap_servers=bootstrap)
    for number, value in ((0, b"{}"), (0, b"{}"), (1, b"bad")):
        plain.send(topics.events, value, partition=number).get(timeout=30)
    plain.close()

    def score(partition: int, offset: int) -> bytes:
        source = {"topic": topics.events, "partition": partition, "offset": offset}
        return json.dumps(
            {"user_id": "u", "trigger": "event", "scores": {"p": 0.1}, "timestamp": 1, "event_id": None, "source": source, "model": "a"}
        ).encode()

    about = [("streamscore-reason", b"malformed"), ("streamscore-partition", b"1"), ("streamscore-offset", b"0")]
    for offset, commit in ((0, True), (1, False), (1, True)):
        producer.begin_transaction()
        producer.send(topics.scores, score(0, offset), partition=0)
        if offset:
            producer.send(topics.dead_letters, b"bad", partition=0, headers=about)
        producer.commit_transaction() if commit else producer.abort_transaction()
    producer.close()

    back = read_back(bootstrap, topics, history={0: 2, 1: 1})
    assert (back.audit.events, back.audit.event_scores, back.audit.dead_letters) == (3, 2, 1)
    assert (back.audit.lost, back.audit.doubled) == (0, 0)
    assert [decode_score(r.value).source.offset for r in records(bootstrap, topics.scores)] == [0, 1]  # type: ignore[union-attr]
