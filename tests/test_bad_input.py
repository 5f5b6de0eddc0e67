"""Bad input, on the real worker, Kafka and Redis: each record is scored or a dead letter, exactly once, and disturbs nobody."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType
from support import DAY_MS, HOUR_MS, START_MS, events, read_all
from world import World

HEADERS = [("trace", b"7f-\x00\xff"), ("content-type", b"application/json")]
LARGE = 6_000_000


def event(**fields: object) -> bytes:
    return json.dumps({"user_id": "u1", "type": "page_view", "timestamp": START_MS, **fields}).encode()


def without(name: str) -> bytes:
    fields = json.loads(event())
    del fields[name]
    return json.dumps(fields).encode()


@dataclass
class Message:
    value: bytes | None
    key: bytes | None = b"u1"
    headers: Sequence[tuple[str, bytes]] = ()


BAD: dict[str, tuple[str, Message]] = {
    "cut off": ("malformed", Message(event()[:-7])),
    "no JSON": ("malformed", Message(b"<event/>")),
    "two events in one": ("malformed", Message(event() + event())),
    "a byte order mark": ("malformed", Message(b"\xef\xbb\xbf" + event())),
    "not UTF-8": ("malformed", Message(event(user_id="?").replace(b"?", b"\xff\xfe"), headers=HEADERS)),
    "random bytes": ("malformed", Message(bytes(range(256)), key=b"\x00\xff")),
    "half a surrogate pair": ("malformed", Message(event(user_id="?").replace(b"?", rb"\ud83d"))),
    "NaN": ("malformed", Message(event(value=float("nan")))),
    "Infinity": ("malformed", Message(event(value=float("inf")), headers=HEADERS)),
    "-Infinity": ("malformed", Message(event(value=float("-inf")))),
    "nested too deeply": (
        "malformed",
        Message(event(attributes=0).replace(b'"attributes": 0', b'"attributes": ' + b"[" * 5000 + b"]" * 5000)),
    ),
    "a list": ("wrong_type", Message(b"[" + event() + b"]")),
    "a number": ("wrong_type", Message(b"17")),
    "JSON null": ("wrong_type", Message(b"null")),
    "user_id a number": ("wrong_type", Message(event(user_id=17))),
    "user_id null": ("wrong_type", Message(event(user_id=None))),
    "type a list": ("wrong_type", Message(event(type=["page_view"]))),
    "timestamp a word": ("wrong_type", Message(event(timestamp="yesterday"))),
    "timestamp true": ("wrong_type", Message(event(timestamp=True))),
    "timestamp an object": ("wrong_type", Message(event(timestamp={}))),
    "timestamp with a fraction": ("wrong_type", Message(event(timestamp=START_MS + 0.5))),
    "timestamp a number in quotes": ("wrong_type", Message(event(timestamp=str(START_MS)))),
    "timestamp of 30 digits": ("wrong_type", Message(event(timestamp=10**30))),
    "timestamp at the edge of 64 bits": ("wrong_type", Message(event(timestamp=-(2**63)))),
    "value a text": ("wrong_type", Message(event(value="12"))),
    "value of 400 digits": ("wrong_type", Message(event(value=10**400))),
    "value 1e999": ("wrong_type", Message(event(value=7).replace(b'"value": 7', b'"value": 1e999'))),
    "event_id a number": ("wrong_type", Message(event(event_id=5))),
    "no user_id": ("missing_field", Message(without("user_id"))),
    "no type": ("missing_field", Message(without("type"), key=None, headers=HEADERS)),
    "no timestamp": ("missing_field", Message(without("timestamp"))),
    "an empty object": ("missing_field", Message(b"{}")),
    "far future": ("timestamp_in_future", Message(event(timestamp=START_MS + 40 * 365 * DAY_MS))),
    "next day": ("timestamp_in_future", Message(event(timestamp=START_MS + DAY_MS))),
    "microseconds": ("timestamp_in_future", Message(event(timestamp=START_MS * 1000))),
    "seconds": ("timestamp_too_old", Message(event(timestamp=START_MS // 1000))),
    "far past": ("timestamp_too_old", Message(event(timestamp="0001-01-01T00:00:00Z"))),
    "before 1970": ("timestamp_too_old", Message(event(timestamp=-START_MS))),
    "an empty value": ("empty", Message(b"")),
    "an empty value without a key": ("empty", Message(b"", key=None)),
    "no value": ("empty", Message(None, headers=HEADERS)),
    "neither key nor value": ("empty", Message(None, key=None)),
    "a user_id of 10 kB": ("user_id_too_long", Message(event(user_id="u" * 10_000), key=b"u" * 10_000)),
    "an empty user_id": ("empty_user_id", Message(event(user_id=""), key=b"")),
    "100 kB": ("too_large", Message(event(attributes={"note": "x" * 100_000}))),
}
HARMLESS: dict[str, tuple[str, Message]] = {
    "fields that nobody knows": ("u1", Message(event(unknown=[1, {"a": None}], user={"id": "u9"}))),
    "duplicate fields, of which the last counts": ("u2", Message(event().replace(b'"user_id": "u1"', b'"user_id": "u1", "user_id": "u2"'))),
    "a key that disagrees": ("u3", Message(event(user_id="u3"), key=b"somebody else")),
    "no key": ("u4", Message(event(user_id="u4"), key=None)),
    "a key that is no text": ("u5", Message(event(user_id="u5"), key=b"\xff\x00\xfe")),
    "not UTF-8 where nobody reads": ("u6", Message(event(user_id="u6", note="?").replace(b"?", b"\xff"))),
    "a zone": ("u7", Message(event(user_id="u7", timestamp="2025-10-09T10:53:20+02:00"))),
    "nulls": ("u8", Message(event(user_id="u8", event_id=None, item_id=None, category=None, value=None, session_id=None))),
    "a large number": ("u9", Message(event(user_id="u9", value=1e300))),
    "a refund": ("u10", Message(event(user_id="u10", value=-1e300))),
    "a surrogate pair": ("\U0001f600", Message(event(user_id="?").replace(b"?", rb"\ud83d\ude00"))),
    "an empty type": ("u11", Message(event(user_id="u11", type="", item_id="", category=""))),
    "nested 100 deep": ("u12", Message(event(user_id="u12", attributes={"deep": 0}).replace(b": 0", b": " + b"[" * 100 + b"]" * 100))),
    "white space": ("u13", Message(b" \n\t" + event(user_id="u13") + b"\r\n ")),
    "headers": ("u14", Message(event(user_id="u14"), headers=HEADERS)),
    "an old event": ("u15", Message(event(user_id="u15", timestamp=START_MS - 10 * 365 * DAY_MS))),
    "nine minutes ahead": ("u16", Message(event(user_id="u16", timestamp=START_MS + 9 * 60_000))),
}


def produce(world: World, messages: Sequence[Message], partition: int | None = None) -> list[tuple[int, int]]:
    """(partition, offset) of each. Kafka's timestamps are those of the simulated shop, so that the run is the same every day."""
    producer = KafkaProducer(bootstrap_servers=world.bootstrap, linger_ms=5, max_request_size=2 * LARGE)
    sent = []
    for m in messages:
        value = b"" if m.key is None and m.value is None else m.value  # kafka-python sends no message without both
        sent.append(producer.send(world.topic, value, m.key, list(m.headers), partition, START_MS))
    producer.flush()
    world.sent += len(messages)
    places = [future.get(1) for future in sent]
    producer.close()
    return [(at.partition, at.offset) for at in places]


def let_take(world: World, topics: Sequence[str], most_bytes: int) -> None:
    with KafkaAdminClient(bootstrap_servers=world.bootstrap) as admin:
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": str(most_bytes)}) for topic in topics])


def dead_letters(world: World) -> dict[tuple[int, int], Any]:
    """By (partition, offset) of the original; exactly one each."""
    found: dict[tuple[int, int], Any] = {}
    for record in read_all(world.bootstrap, world.dead):
        headers = dict(record.headers)
        assert headers["streamscore-topic"].decode() == world.topic
        place = int(headers["streamscore-partition"]), int(headers["streamscore-offset"])
        assert place not in found, f"doubled: {place}"
        found[place] = record
    return found


def good(count: int) -> list[Message]:
    return [Message(value, key) for key, value in events(count, 50, step_ms=10, start_ms=START_MS - HOUR_MS)]


def among(special: Sequence[Message], plain: Sequence[Message]) -> list[Message]:
    each = len(plain) // len(special)
    return [m for i, one in enumerate(special) for m in (*plain[i * each : (i + 1) * each], one)]


def test_each_is_scored_or_a_dead_letter_and_nothing_of_it_is_lost(world: Callable[..., World]) -> None:
    shop = world()
    let_take(shop, [shop.topic, shop.dead], LARGE)
    five_mb = Message(event(attributes={"note": "x" * 5_000_000}), headers=HEADERS)
    bad = {**BAD, "5 MB": ("too_large", five_mb)}
    special = [m for _, m in (*bad.values(), *HARMLESS.values())]
    messages = among(special, good(5 * len(special)))
    places = dict(zip(map(id, messages), produce(shop, messages), strict=True))
    shop.start()

    expected, found = shop.finish()

    assert len(expected.bad) == len(bad)
    letters = dead_letters(shop)
    for name, (reason, message) in bad.items():
        record = letters[places[id(message)]]
        headers = dict(record.headers)
        assert headers["streamscore-reason"].decode() == reason, name
        assert headers["streamscore-detail"], name
        assert headers["streamscore-version"], name
        assert list(record.headers)[: len(message.headers)] == list(message.headers), name
        assert record.key == message.key, name
        assert record.value == (b"" if message.key is None and message.value is None else message.value), name
        assert "streamscore-truncated-from-bytes" not in headers, name
    for name, (user, message) in HARMLESS.items():
        ((found_user, _, _),) = found.events[shop.topic, *places[id(message)]]
        assert found_user == user, name


def test_what_the_dead_letter_topic_cannot_take_is_cut_short_and_says_so(world: Callable[..., World]) -> None:
    shop = world()
    let_take(shop, [shop.topic], LARGE)
    value, key = event(attributes={"note": "x" * 5_000_000}), b"k" * 3_000_000
    headers = [("blob", b"h" * 2_000_000)]
    large = Message(value, headers=HEADERS)
    special = [large, replace(large, key=None), Message(b"{", key), Message(None, key), Message(value[:2_500_000], key[:2_500_000])]
    special += [Message(b"{", headers=headers), Message(value[:3_000_000], headers=headers)]
    messages = among(special, good(100))
    places = dict(zip(map(id, messages), produce(shop, messages), strict=True))
    shop.start()

    shop.finish()

    letters = dead_letters(shop)
    for i, message in enumerate(special):
        record = letters[places[id(message)]]
        about = {name: content for name, content in record.headers if name.startswith("streamscore-")}
        for name, whole, kept in (("", message.value, record.value), ("key-", message.key, record.key)):
            cut = about.get(f"streamscore-{name}truncated-from-bytes")
            if cut is None:
                assert kept == whole, i
            else:
                assert int(cut) == len(whole or b""), i
                assert whole is not None
                assert whole.startswith(kept), i
                assert len(kept) < len(whole), i
        theirs = [header for header in record.headers if header[0] not in about]
        assert theirs == ([] if "streamscore-headers-left-out" in about else list(message.headers)), i
    assert len(letters[places[id(large)]].value) > 1_000_000


def test_a_flood_of_rubbish_stops_the_worker_and_drains_nothing(world: Callable[..., World]) -> None:
    shop = world(max_bad_share=0.4, bad_window_records=100)
    start = good(40)
    rubbish = [Message(b'{"ts": 17, "uid": "u1"}')] * 1500
    produce(shop, [*start, *rubbish], partition=0)
    worker = shop.start(real=True)

    assert worker.wait(60) == 1

    log = worker.text()
    assert "records are no events (the last one: Object missing required field `user_id`)" in log
    assert "map its field names with event_fields, or raise max_bad_share" in log
    assert "Traceback" not in log
    letters, committed = dead_letters(shop), sum(shop.committed().values())
    assert len(letters) < 100
    assert sorted(letters) == [(0, offset) for offset in range(40, committed)]


def test_field_names_of_ones_own(world: Callable[..., World]) -> None:
    shop = world(event_fields=json.dumps({"user_id": "userId", "timestamp": "at", "type": "event"}))
    theirs = [Message(json.dumps({"userId": f"u{i % 7}", "event": "purchase", "at": START_MS + i}).encode()) for i in range(50)]
    produce(shop, [*theirs, Message(event())])
    shop.start()
    shop.wait_caught_up()
    assert shop.workers[0].stop() == 0
    assert sum(map(len, shop.found().events.values())) == 50
    ((reason, _, value),) = [entry for entries in shop.found().bad.values() for entry in entries]
    assert (reason, value) == ("missing_field", event())


def test_a_late_event_is_taken_at_its_users_last_event(world: Callable[..., World]) -> None:
    shop = world()
    late = {"type": "purchase", "value": 30.0}

    def two(user: str, second_ms: int) -> list[Message]:
        return [Message(event(user_id=user)), Message(event(user_id=user, timestamp=second_ms, **late))]

    messages = [*two("late", START_MS - HOUR_MS), *two("on time", START_MS)]
    produce(shop, messages, partition=0)
    shop.start()
    shop.finish()
    scores = [json.loads(record.value) for record in read_all(shop.bootstrap, shop.scores)]
    after = {s["user_id"]: s for s in scores}  # the last one of each
    assert after["late"]["scores"] == after["on time"]["scores"]
    assert after["late"]["timestamp"] == START_MS - HOUR_MS


ODD = [
    "{}",
    "{a}:u:b",
    " ",
    "a b",
    "a:b:c",
    "\U0001f600",
    "\x00",
    "a\x00b",
    "*",
    "?[x]",
    "\n",
    '"',
    "\\",
    "'",
    "applied",
    "due",
    "u:due",
    "null",
]
ODD += ["\u202e\u0301", "\ud7ff\ue000", "ü" * 128, "x" * 256, "-1", "\x7f", "%s", "{0.__class__}", "a\r\n$5\r\n"]


def test_odd_user_ids_keep_their_states_over_a_restart(world: Callable[..., World]) -> None:
    shop = world(history_events=10)

    def some(first: int) -> list[Message]:
        return [
            Message(event(user_id=user, timestamp=START_MS + first + i, event_id=user, value=i), user.encode())
            for i in range(6)
            for user in ODD
        ]

    for first in (0, 1000):
        produce(shop, some(first))
        shop.start()
        shop.wait_caught_up()
        assert shop.workers[-1].stop() == 0
    expected, found = shop.finish()
    assert sorted({user for user, _ in expected.events.values()}) == sorted(ODD)
    assert len(found.events) == 12 * len(ODD)
    keys = {record.key: json.loads(record.value) for record in read_all(shop.bootstrap, shop.scores)}
    assert {key.decode(): score["event_id"] for key, score in keys.items()} == {user: user for user in ODD}
