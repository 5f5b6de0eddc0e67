"""An embedded Apache Kafka: one KRaft node with both roles, tuned for a quick start beside other programs on two cores."""

import base64
import shlex
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from kafka import KafkaAdminClient
from kafka.errors import KafkaError

from demo.process import Process, free_port, start_on_free_ports
from demo.programs import KafkaProgram, cache

JVM_FLAGS = [
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",  # or a kill -9 leaves a file in /tmp/hsperfdata_*
    "-Djava.io.tmpdir=.",  # native compression libraries are unpacked here
    "--sun-misc-unsafe-memory-access=allow",
    "--enable-native-access=ALL-UNNAMED",
    "-Xlog:disable",  # the JVM's own warnings: each start would write some about the recorded one
    "-Xlog:all=error",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
]
PROPERTIES = {
    "node.id": "1",
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "log.dirs": "data",
    "auto.create.topics.enable": "false",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",  # so that a test can wait for a short transaction timeout
    "broker.session.timeout.ms": "2000",  # a broker that was killed can come back after this; the default is 9 s
    "broker.heartbeat.interval.ms": "400",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "log.retention.ms": "-1",  # simulated events may be older than the default of 7 days
    "log.cleaner.dedupe.buffer.size": "8388608",  # of a heap of 512 MB, the default of 128 MB is too much
}


def start_broker(program: KafkaProgram, directory: Path | None = None, record: Path | None = None) -> tuple[Process, str]:
    """The process and its bootstrap address."""
    java = [program.java, *JVM_FLAGS, "-cp", program.class_path]
    recorded = [f"-XX:AOTCache={program.startup}"] if program.startup.exists() else []
    recording = [f"-XX:AOTCacheOutput={record}"] if record else []
    cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    form = [*java, *recorded, "kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "--config=server.properties"]
    serve = [*java, *recorded, *recording, "kafka.Kafka", "server.properties"]
    script = f"[ -f data/meta.properties ] || {shlex.join(form)} || exit; exec {shlex.join(serve)}"
    bootstrap = ""

    def launch() -> Process:
        nonlocal bootstrap
        port, controller_port = free_port(), free_port()
        bootstrap = f"127.0.0.1:{port}"
        process = Process(
            "Kafka", ["sh", "-c", script], lambda _: listens(port) and cluster_of(bootstrap) == cluster_in(process), directory
        )
        properties = {
            **PROPERTIES,
            "listeners": f"PLAINTEXT://{bootstrap},CONTROLLER://127.0.0.1:{controller_port}",
            "advertised.listeners": f"PLAINTEXT://{bootstrap}",
            "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        }
        (process.directory / "server.properties").write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        return process

    return start_on_free_ports(launch), bootstrap


def record_startup(program: KafkaProgram) -> None:
    with cache("kafka"):
        if program.startup.exists():
            return
        partial = program.startup.with_suffix(".partial")
        process, bootstrap = start_broker(program, record=partial)
        try:
            create_topics(bootstrap, {"startup": (1, {})})
            process.stop(timeout_s=60)  # the JVM writes its record as it ends
        finally:
            process.close()
        partial.rename(program.startup)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def cluster_of(bootstrap: str) -> str | None:
    """The cluster's id, once a broker takes requests."""
    try:
        with KafkaAdminClient(bootstrap_servers=bootstrap, bootstrap_timeout_ms=10_000) as admin:
            cluster = admin.describe_cluster()
    except (KafkaError, OSError):
        return None
    return str(cluster["cluster_id"]) if cluster["brokers"] else None


def cluster_in(process: Process) -> str:
    lines = (process.directory / "data" / "meta.properties").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)["cluster.id"]


def create_topics(bootstrap: str, topics: Mapping[str, tuple[int, Mapping[str, str]]], timeout_s: float = 30) -> None:
    """``{name: (partitions, config)}``; returns when every partition has a leader."""
    deadline = time.monotonic() + timeout_s
    with KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
        admin.create_topics({name: {"num_partitions": partitions, "configs": config} for name, (partitions, config) in topics.items()})
        while True:
            found = {topic["name"]: topic["partitions"] for topic in admin.describe_topics(list(topics))}
            if all(
                len(found[name]) == partitions and all(partition["leader_id"] >= 0 for partition in found[name])
                for name, (partitions, _) in topics.items()
            ):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"Some partitions of {', '.join(topics)} had no leader after {timeout_s:.0f} s.")
            time.sleep(0.01)
