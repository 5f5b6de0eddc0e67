"""The shop as a program of its own: writes events to a Kafka topic, history at full speed and live ones as their time comes.

    python -m demo.feed --bootstrap localhost:9092 --topic events                        history, then live, a day a second
    python -m demo.feed --bootstrap localhost:9092 --topic events --input events.csv     the events of a file instead

Every record's key is its user_id. Event times are in the past: the last event of the live part lies at --end-ms, by default now.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from kafka import KafkaProducer

from demo.arguments import moment, speed
from demo.malformed import bad_records
from demo.replay import File, InputError
from demo.shop import DAY_MS, Ints
from demo.stream import Shop, Stream

TICK_S = 0.02
CHUNK = 5000
LATEST_S = 0.25  # a machine that was suspended has missed nothing: its shop was, too
LARGEST_RECORD = 8 * 1024 * 1024
Record = tuple[bytes | None, bytes | None]  # key, value


class Feed:
    """Sends records of one topic, each user's in one partition."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._topic = topic
        self._failures: list[Exception] = []
        self._producer = KafkaProducer(
            bootstrap_servers=bootstrap,
            acks="all",
            linger_ms=0,
            batch_size=64 * 1024,
            max_request_size=LARGEST_RECORD,
        )

    def send(self, records: list[Record]) -> None:
        for key, value in records:
            self._producer.send(self._topic, value, key).add_errback(self._failures.append)

    def flush(self) -> None:
        """Wait until Kafka has acknowledged all records. Raises what became of one that it did not."""
        self._producer.flush()
        if self._failures:
            raise self._failures[0]

    def history(self, stream: Stream) -> int:
        """Everything before the live part, as fast as Kafka takes it."""
        count = stream.live_from
        for begin in range(0, count, CHUNK):
            self.send(events(stream, begin, min(begin + CHUNK, count)))
        self.flush()
        return count

    def live(self, stream: Stream, speed: float, bad: int) -> int:
        """Every event when its time has come; `bad` malformed records among them."""
        begin = first = stream.live_from
        bad_ms, bad_begin = bad_times(stream, bad), 0
        elapsed_s, looked_at = 0.0, time.monotonic()
        while begin < len(stream.history.time_ms) or bad_begin < bad:
            now = time.monotonic()
            elapsed_s, looked_at = elapsed_s + min(now - looked_at, LATEST_S), now
            now_ms = simulated_ms(stream, speed, elapsed_s)
            end, bad_end = min(due(stream.history.time_ms, now_ms), begin + CHUNK), due(bad_ms, now_ms)
            self.send(events(stream, begin, end))
            self.send([malformed(int(bad_ms[n]), n) for n in range(bad_begin, bad_end)])
            begin, bad_begin = end, bad_end
            time.sleep(TICK_S if speed < float("inf") else 0)
        self.flush()
        return begin - first + bad_begin

    def close(self) -> None:
        self._producer.close(timeout=10)


def bad_times(stream: Stream, count: int) -> Ints:
    """When the malformed records are due: evenly over the live part."""
    times: Ints = np.linspace(stream.live_ms, stream.end_ms, count + 2)[1:-1].astype(np.int64)
    return times


def simulated_ms(stream: Stream, speed: float, elapsed_s: float) -> int:
    """What time it is in the stream, so long after its live part began: `speed` simulated seconds a second."""
    return stream.end_ms if speed == float("inf") else stream.live_ms + int(elapsed_s * 1000 * speed)


def due(time_ms: Ints, now_ms: int) -> int:
    """How many of the sorted times have come."""
    return int(np.searchsorted(time_ms, now_ms, side="right"))


def events(stream: Stream, begin: int, end: int) -> list[Record]:
    history = stream.history
    users = (history.users[u].encode() for u in history.user[begin:end].tolist())
    return list(zip(users, stream.encode(begin, end), strict=True))


def malformed(at_ms: int, number: int) -> Record:
    """The kinds take turns. Without a key any partition may get it; Kafka wants a key where there is no value."""
    kinds = bad_records(at_ms, int(time.time() * 1000))
    value = kinds[number % len(kinds)]
    return (b"bad-day" if value is None else None), value


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.feed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstrap", default="localhost:9092", help="Kafka's address")
    parser.add_argument("--topic", default="events", help="where to write; it must exist")
    parser.add_argument("--part", choices=("history", "live", "all"), default="all", help="what to write (all)")
    parser.add_argument("--speed", type=speed, default=DAY_MS / 1000, help="simulated seconds a second, or max (86400: a day a second)")
    parser.add_argument("--bad", type=int, default=0, metavar="N", help="malformed records among the live ones (0)")
    shop = parser.add_argument_group("the shop")
    shop.add_argument("--users", type=int, default=2000, help="users who ever come (2000)")
    shop.add_argument("--seed", type=int, default=0, help="another seed, another sample (0)")
    shop.add_argument("--history-days", type=float, default=85, help="days of history (85)")
    shop.add_argument("--live-days", type=float, default=65, help="days after it (65)")
    shop.add_argument("--end-ms", type=int, default=int(time.time() * 1000), help="when the last day ends, in epoch milliseconds (now)")
    shop.add_argument("--promotion", type=float, default=1.0, metavar="N", help="carts and purchases N times as often from some day on (1)")
    shop.add_argument("--promotion-day", type=float, default=0.0, metavar="N", help="the live day on which that begins (0)")
    file = parser.add_argument_group("a file of your own")
    file.add_argument("--input", type=Path, metavar="FILE", help="events as CSV, JSONL or Parquet")
    file.add_argument("--until", type=moment, metavar="DATE", help="leave out what comes later")
    options = parser.parse_args()
    try:
        days = options.history_days, options.live_days
        source = (
            File(options.input, options.until)
            if options.input
            else Shop(options.users, options.seed, options.end_ms, *days, options.promotion, options.promotion_day)
        )
        stream = source.load()
    except InputError as error:
        sys.exit(str(error))
    feed = Feed(options.bootstrap, options.topic)
    try:
        if options.part in ("history", "all"):
            print(f"history written: {feed.history(stream):,} events", flush=True)
        if options.part in ("live", "all"):
            print(f"live part written: {feed.live(stream, options.speed, options.bad):,} records", flush=True)
    finally:
        feed.close()


if __name__ == "__main__":
    main()
