"""The store on a real Redis and on a real Redis Cluster of one node: atomic, compare-and-set, one slot a partition, clear about trouble."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from redis.crc import key_slot
from support import events
from world import World

from demo.process import Process, free_port, start_on_free_ports
from demo.programs import find_redis
from demo.servers import RedisServer
from demo.servers import redis as redis_server_of_ones_own
from worker.store import Applied, Flush, Moved, Store, StoreError, StoreUnavailable, connect

ODD = ["{}", "{a}", "}{", " ", "a:b", "\U0001f600", "\x00", "a\x00b", "*", "\n", '"', "ü" * 128, "applied", "due", ""]
FIRST, SECOND, THIRD = (Applied({"events": n}, n, n, 4) for n in (1, 2, 3))


@contextmanager
def cluster() -> Iterator[tuple[str, Process]]:
    port = 0

    def launch() -> Process:
        nonlocal port
        port = free_port()
        options = {"port": port, "bind": "127.0.0.1", "cluster-port": free_port(), "cluster-enabled": "yes", "save": "", "dir": "."}
        command = [find_redis(), *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
        return Process("Redis Cluster", ["env", "LC_ALL=C", *command], lambda _: answers(port))

    process = start_on_free_ports(launch)
    try:
        with redis.Redis(port=port) as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
            while client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                pass
        yield f"redis://127.0.0.1:{port}/0", process
    finally:
        process.close()


def answers(port: int) -> bool:
    try:
        with redis.Redis(port=port) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


@pytest.fixture(scope="module")
def cluster_url() -> Iterator[str]:
    with cluster() as (url, _):
        yield url


@dataclass
class Place:
    """Where stores are made: partitions of one group."""

    client: Any
    group: str

    def store(self, partition: int = 0, slots: int = 3) -> Store:
        made = Store(self.client, self.group, partition, slots)
        made.acquire()
        return made

    def key(self, name: str, partition: int = 0) -> str:
        return f"{{{self.group}:{partition}}}:{name}"

    def keys(self, partition: int = 0) -> list[str]:
        return sorted(key.decode() for key in self.client.scan_iter(match=self.key("*", partition), count=10_000))


@pytest.fixture(params=["one server", "cluster"])
def place(request: pytest.FixtureRequest, unique: str) -> Iterator[Place]:
    is_cluster = request.param == "cluster"
    url = request.getfixturevalue("cluster_url" if is_cluster else "redis_url")
    client = connect(url, cluster=is_cluster, timeout_seconds=10, ssl_cafile=None)
    yield Place(client, unique)
    client.close()


def changes(users: Sequence[str], content: bytes = b"record", due_ms: int = 7) -> Flush:
    return Flush(
        dict.fromkeys(users, content), {(u, 1): b"chunk of " + u.encode() for u in users}, {u: due_ms + i for i, u in enumerate(users)}
    )


def unavailable(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(StoreUnavailable, match=sentence):
        call()


def test_what_is_flushed_is_loaded(place: Place) -> None:
    store = place.store()
    assert store.acquire() is None
    assert (store.load(["a"]), store.users(), store.next_due(-(1 << 62)), store.scan(0, 10)) == ([None], 0, None, (0, []))
    store.flush(changes(ODD), FIRST)
    again = place.store()
    assert again.acquire() == FIRST
    assert again.load([*ODD, "nobody"]) == [b"record"] * len(ODD) + [None]
    assert again.chunks(["{a}", "nobody"]) == [[None, b"chunk of {a}", None], [None, None, None]]
    assert again.users() == len(ODD)
    assert again.due(6, 9, 10) == [(ODD[i], 7 + i) for i in range(3)]
    assert again.due(7, 1000, 2) == [(ODD[i], 7 + i) for i in (1, 2)]
    assert (again.next_due(9), again.next_due(7 + len(ODD))) == (10, None)
    cursor, found = again.scan(0, 1000)
    assert (cursor, sorted(found)) == (0, sorted(ODD))


def test_all_keys_of_a_partition_share_a_slot(place: Place) -> None:
    for partition in range(3):
        place.store(partition).flush(changes(ODD), FIRST)
    for partition in range(3):
        keys = place.keys(partition)
        assert len(keys) == 2 * len(ODD) + 2
        assert len({key_slot(key.encode()) for key in keys}) == 1
    assert len({key_slot(place.key("", partition).encode()) for partition in range(100)}) > 50, "partitions spread over the cluster"


def test_a_flush_of_thousands(place: Place) -> None:
    store, users = place.store(), [f"u{i}" for i in range(2501)]
    store.flush(changes(users), FIRST)
    assert store.load(users) == [b"record"] * 2501
    assert store.users() == 2501
    store.flush(Flush(gone=users[:2100]), SECOND)
    assert store.users() == 401
    assert len(place.keys()) == 2 * 401 + 2


def test_whoever_is_gone_leaves_nothing(place: Place) -> None:
    store = place.store()
    store.flush(changes(ODD), FIRST)
    store.flush(Flush(gone=ODD), SECOND)
    assert place.keys() == [place.key("applied")]


def test_a_stale_writer_changes_nothing(place: Place) -> None:
    stale = place.store()
    stale.flush(changes(["a"], b"old"), FIRST)
    fresh = place.store()
    fresh.flush(changes(["a"], b"new", due_ms=50), SECOND)
    with pytest.raises(Moved, match="applied was changed by another worker, or Redis was flushed or restored"):
        stale.flush(Flush({"a": b"stale", "b": b"stale"}, {("a", 1): b"stale"}, {"a": 1, "b": 1}, ["c"]), THIRD)
    assert fresh.load(["a", "b"]) == [b"new", None]
    assert fresh.chunks(["a"]) == [[None, b"chunk of a", None]]
    assert fresh.due(0, 100, 9) == [("a", 50)]
    assert place.store().acquire() == SECOND


def test_a_stale_reader_is_told_nothing(place: Place) -> None:
    stale = place.store()
    stale.flush(changes(["a"]), FIRST)
    place.store().flush(changes(["a"]), SECOND)
    for read in (lambda: stale.load(["a"]), lambda: stale.chunks(["a"]), lambda: stale.due(0, 100, 9), lambda: stale.next_due(0)):
        with pytest.raises(Moved):
            read()
    assert stale.acquire() == SECOND
    assert stale.load(["a"]) == [b"record"]


def test_two_who_begin_at_once_are_one_too_many(place: Place) -> None:
    one, other = place.store(), place.store()
    one.flush(changes(["a"], b"one"), FIRST)
    with pytest.raises(Moved):
        other.flush(changes(["a"], b"other"), SECOND)
    assert one.load(["a"]) == [b"one"]


def test_a_flush_whose_answer_was_lost_may_be_repeated(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.store()
    store.flush(changes(["a"]), FIRST)
    evaluate = place.client.evalsha

    def lose_the_answer(*arguments: Any) -> None:
        monkeypatch.undo()
        evaluate(*arguments)
        raise redis.ConnectionError("gone")

    monkeypatch.setattr(place.client, "evalsha", lose_the_answer)
    unavailable(lambda: store.flush(changes(["a"], b"new"), SECOND), "Redis does not answer: gone")
    store.flush(changes(["a"], b"new"), SECOND)
    assert store.load(["a"]) == [b"new"]


def test_redis_flushed_is_noticed(place: Place) -> None:
    store = place.store()
    store.flush(changes(["a"]), FIRST)
    place.client.delete(*place.keys())
    with pytest.raises(Moved):
        store.load(["a"])
    with pytest.raises(Moved):
        store.flush(changes(["a"]), SECOND)
    assert store.acquire() is None
    store.flush(changes(["a"]), SECOND)
    assert store.load(["a"]) == [b"record"]


def test_clearing_a_partition_leaves_the_others(place: Place) -> None:
    for partition in (0, 1):
        place.store(partition).flush(changes([*ODD, *(f"u{i}" for i in range(1500))]), FIRST)
    store = place.store(0)
    store.clear()
    assert place.keys(0) == []
    assert len(place.keys(1)) > 3000
    assert store.acquire() is None


def test_a_key_of_another_kind_is_an_error_that_names_it_and_nothing_is_written(place: Place) -> None:
    store = place.store()
    store.flush(changes(["a"]), FIRST)
    place.client.rpush(place.key("u:b"), "not ours")
    with pytest.raises(StoreError, match=r"u:b is not a string: another program uses this key space; choose another `group`"):
        store.load(["a", "b"])
    place.client.delete(place.key("due"))
    place.client.set(place.key("due"), "not ours")
    with pytest.raises(StoreError, match=r"holds another type than a worker writes .*due holds a string"):
        store.flush(changes(["a"], b"new"), SECOND)
    assert store.load(["a"]) == [b"record"]
    with pytest.raises(StoreError, match="holds another type than a worker writes"):
        store.users()
    place.client.delete(place.key("applied"))
    place.client.rpush(place.key("applied"), "not ours")
    for call in (store.acquire, lambda: store.flush(changes(["a"]), SECOND)):
        with pytest.raises(StoreError, match="holds another type than a worker writes"):
            call()


@pytest.mark.parametrize("content", [b"", b"x", b"[]", b"17", b"{}", b'{"offsets": {}, "fired_ms": 1}', b"\xff"])
def test_an_applied_of_another_program_is_an_error(place: Place, content: bytes) -> None:
    place.client.set(place.key("applied"), content)
    with pytest.raises(StoreError, match=r"applied does not hold what a worker writes there: is another program using it\?"):
        place.store()


def test_applied_comes_back() -> None:
    applied = Applied({"a": 5, "b": 1 << 40}, -(1 << 62), 1 << 61, 12, "3f9a")
    assert Applied.decode(applied.encode(), "key") == applied


@pytest.fixture(scope="module")
def own() -> Iterator[RedisServer]:
    """A server that tests may bring into trouble."""
    with redis_server_of_ones_own() as server:
        yield server


@pytest.fixture
def troubled(own: RedisServer, unique: str) -> Iterator[Place]:
    client: Any
    with redis.Redis.from_url(own.url) as client:
        place = Place(client, unique)
        place.store().flush(changes(["a"]), FIRST)
        yield place
        for name, value in (("maxmemory", "0"), ("min-replicas-to-write", "0"), ("requirepass", "")):
            client.config_set(name, value)
        client.execute_command("REPLICAOF NO ONE")


def test_a_full_redis_refuses_and_loses_nothing(troubled: Place) -> None:
    store = troubled.store()
    troubled.client.config_set("maxmemory", "1")
    unavailable(
        lambda: store.flush(changes(["a"], b"x" * 100), SECOND),
        r"Redis is full .*: raise its maxmemory or lower retention_days; states wait",
    )
    assert troubled.store().load(["a"]) == [b"record"]
    troubled.client.config_set("maxmemory", "0")
    assert store.load(["a"]) == [b"x" * 100]  # what waited went first
    store.flush(changes(["a"], b"new"), SECOND)
    assert store.load(["a"]) == [b"new"]


def test_a_replica_refuses(troubled: Place) -> None:
    store = troubled.store()
    troubled.client.execute_command(f"REPLICAOF 127.0.0.1 {free_port()}")
    unavailable(lambda: store.flush(changes(["a"]), SECOND), "Redis is a read-only replica .*: point redis_url at the primary")


def test_too_few_replicas_refuse_for_now(troubled: Place) -> None:
    store = troubled.store()
    troubled.client.config_set("min-replicas-to-write", "1")
    unavailable(lambda: store.flush(changes(["a"]), SECOND), "Redis refuses for now: NOREPLICAS")


def test_a_forgotten_script_is_sent_again(troubled: Place) -> None:
    store = troubled.store()
    store.flush(changes(["a"]), SECOND)
    troubled.client.script_flush()
    store.flush(changes(["a"], b"new"), THIRD)
    assert store.load(["a"]) == [b"new"]


def test_a_redis_that_is_away(unique: str) -> None:
    nobody = f"redis://:hush@127.0.0.1:{free_port()}"
    store = Store(connect(nobody, cluster=False, timeout_seconds=1, ssl_cafile=None), unique, 0, 1)
    unavailable(store.acquire, "Redis does not answer: Error 111 connecting")
    with pytest.raises(StoreUnavailable, match=r"is redis_cluster right\?") as error:
        connect(nobody, cluster=True, timeout_seconds=1, ssl_cafile=None)
    assert "hush" not in str(error.value)


def test_a_login_that_is_refused(troubled: Place, own: RedisServer, unique: str) -> None:
    url = own.url.replace("//", "//:hush@")
    troubled.client.config_set("requirepass", "other")
    store = Store(connect(url, cluster=False, timeout_seconds=5, ssl_cafile=None), unique, 0, 1)
    unavailable(store.acquire, "Redis refuses this login: write its user and password into redis_url")


def test_what_is_no_redis_is_not_taken_for_one(unique: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        url = f"redis://127.0.0.1:{server.getsockname()[1]}"
        store = Store(connect(url, cluster=False, timeout_seconds=1, ssl_cafile=None), unique, 0, 1)
        unavailable(store.acquire, "Redis does not answer")
        server.shutdown(socket.SHUT_RDWR)


def test_a_cluster_that_dies_and_comes_back(unique: str) -> None:
    with cluster() as (url, process):
        store = Store(connect(url, cluster=True, timeout_seconds=1, ssl_cafile=None), unique, 0, 1)
        store.flush(changes(["a"]), FIRST)
        process.kill()
        for call in (store.acquire, store.users, lambda: store.load(["a"]), lambda: store.flush(changes(["a"]), SECOND)):
            unavailable(call, "Redis does not answer")
        process.start()
        while True:
            try:
                assert store.acquire() is None
                break
            except StoreUnavailable:  # the node looks around before it serves its slots again
                continue
        store.flush(changes(["a"]), SECOND)
        assert store.load(["a"]) == [b"record"]


def test_a_worker_on_a_cluster(world: Callable[..., World], cluster_url: str) -> None:
    shop = world(redis_url=cluster_url, redis_cluster=True, history_events=20)
    half = events(300, 40), events(300, 40, seed=1)
    for some in half:
        shop.feed(some)
        shop.start()
        shop.wait_caught_up()
        assert shop.workers[-1].stop() == 0
    expected, _ = shop.finish()
    assert len(expected.silences) > 0
    assert Store(shop.client, shop.name, 0, 3).acquire() is not None
