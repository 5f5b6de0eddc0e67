"""The command line: what it says, what it exits with, and the service as a real process on a real Kafka."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest
from kafka import KafkaProducer
from trainer_support import shop_table

from demo.process import free_port
from model.http import serve
from model.registry import Registry
from trainer.__main__ import main
from trainer.metrics import Metrics
from trainer.settings import TrainerSettings

ROOT = Path(__file__).parent.parent


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (
        ("REGISTRY", tmp_path / "registry"),
        ("TRAINER_LOG_DIRECTORY", tmp_path / "log"),
        ("TRAINER_HIDDEN", 16),
        ("TRAINER_HEAD", 16),
        ("TRAINER_EPOCHS", 3),
        ("TRAINER_BELIEF_STEPS", 50),
        ("TRAINER_GATE_MAX_ECE", 0.5),  # so little data and so few passes leave it to chance
        ("TRAINER_REPORT", "false"),  # its pictures take longer than the fitting
        ("TRAINER_MIN_USERS", 100),
        ("TRAINER_MIN_EVENTS", 1000),
    ):
        monkeypatch.setenv(f"STREAMSCORE_{name}", str(value))
    return tmp_path


def test_train_list_show_promote_rollback(environment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = environment / "events.csv"
    pyarrow.csv.write_csv(shop_table(500, 40), path)
    assert main(["train", "--input", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("promoted ")
    version = said.split()[1].rstrip(":")
    assert main(["train", "--input", str(path), "--no-promote"]) == 0
    other = capsys.readouterr().out.split()[1].rstrip(":")
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert version in listed
    assert other in listed
    assert "current" in listed
    assert main(["show", version]) == 0
    assert "on the test window" in capsys.readouterr().out
    registry = Registry(str(environment / "registry"))
    assert main(["promote", other, "--reason", "I say so"]) == 0
    pointer = registry.current()
    assert pointer
    assert pointer.version == other
    assert registry.decisions()[-1]["reason"] == "I say so"
    assert main(["rollback"]) == 0
    assert capsys.readouterr().out.endswith(f"{version} is the current model again\n")


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["show", "nope"], 1, "has no model nope"),
        (["promote", "nope"], 1, "has no complete model nope"),
        (["rollback"], 1, "knows no version before"),
        (["train"], 1, "there are no events in"),
        (["train", "--input", "/nowhere.csv"], 1, "/nowhere.csv"),
        (["list", "--config", "/nowhere.toml"], 2, "cannot read the settings file"),
    ],
)
def test_a_users_mistake_is_one_sentence(
    environment: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, complaint: str
) -> None:
    assert main(arguments) == status
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_too_little_in_a_file_is_said(environment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = environment / "events.parquet"
    pyarrow.parquet.write_table(shop_table(20, 40), path)
    assert main(["train", "--input", str(path)]) == 1
    assert "too little data to train on: 20 of 100 users seen" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("STREAMSCORE_TRAINER_HIDEN", "3", "did you mean STREAMSCORE_TRAINER_HIDDEN?"),
        ("STREAMSCORE_TRAINER_HIDDEN", "-3", "STREAMSCORE_TRAINER_HIDDEN: Input should be greater than 0"),
        ("STREAMSCORE_TRAINER_TARGETS", "purchase", "is no target"),
        ("STREAMSCORE_TRAINER_MIN_DAYS", "100", "a round would wait for ever"),
    ],
)
def test_an_impossible_setting_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str, complaint: str
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["list"]) == 2
    assert complaint in capsys.readouterr().err


def test_help_names_every_setting_and_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    program = "import sys; from trainer.__main__ import main\ntry: main(['list', '--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    for name in TrainerSettings.model_fields:
        assert name.upper() in done.stdout


def test_http_tells_health_and_a_taken_port() -> None:
    state = (True, "fine")
    server = serve("127.0.0.1", 0, Metrics().registry, lambda: state, lambda: (False, "not yet"))
    try:
        base = f"http://127.0.0.1:{server.port}"
        assert urllib.request.urlopen(f"{base}/healthz").read() == b"fine\n"
        assert b"streamscore_trainer_rows_total 0.0" in urllib.request.urlopen(f"{base}/metrics").read()
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{base}/readyz")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{base}/")
        with pytest.raises(OSError, match="taken by another program"):
            serve("127.0.0.1", server.port, Metrics().registry, lambda: state, lambda: state)
    finally:
        server.close()


def test_the_service_collects_trains_and_stops(
    environment: Path, bootstrap: str, make_topic: Callable[..., str], unique: str, tmp_path: Path
) -> None:
    topic = make_topic(2)
    rows = shop_table(400, 30).to_pylist()
    users = {u: i for i, u in enumerate(dict.fromkeys(r["user_id"] for r in rows))}
    with KafkaProducer(bootstrap_servers=bootstrap, linger_ms=20) as producer:
        for row in rows:
            present = {k: v for k, v in row.items() if v is not None}
            producer.send(topic, json.dumps(present).encode(), partition=users[row["user_id"]] % 2, timestamp_ms=row["timestamp"])
    port = free_port()
    config = tmp_path / "streamscore.toml"
    config.write_text(
        f"""
        kafka_bootstrap_servers = "{bootstrap}"
        event_topics = ["{topic}"]
        metrics_host = "127.0.0.1"
        [trainer]
        group = "{unique}"
        metrics_port = {port}
        log_flush_seconds = 0.2
        refresh_interval_seconds = 0.5
        """
    )
    command = [sys.executable, "-m", "trainer", "run", "--config", str(config)]
    process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stderr=subprocess.PIPE, text=True)
    registry = Registry(str(environment / "registry"))
    deadline = time.monotonic() + 150
    try:
        while registry.current() is None and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        assert registry.current() is not None, _log_of(process)
        while (
            'streamscore_trainer_rounds_total{outcome="promoted",rhythm="round"} 1.0' not in _get(port, "metrics")
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        assert f"streamscore_trainer_rows_total {len(rows)}.0" in _get(port, "metrics")
        assert _get(port, "readyz").startswith("promoted ")
        assert 'event_to_promotion_seconds{rhythm="round"}' in _get(port, "metrics")
        with KafkaProducer(bootstrap_servers=bootstrap) as producer:  # something new: a refresh is due, and no round for an hour
            more = {"user_id": rows[-1]["user_id"], "type": "page_view", "timestamp": rows[-1]["timestamp"] + 1}
            producer.send(topic, json.dumps(more).encode(), partition=0, timestamp_ms=rows[-1]["timestamp"])
        while 'rhythm="refresh"} 1.0' not in _get(port, "metrics") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 'rhythm="refresh"} 1.0' in _get(port, "metrics")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
        assert process.returncode == 0, log
        assert time.monotonic() - began < 10
        assert f"the log is whole: {len(rows) + 1:,} events" in log
    finally:
        process.kill()
        process.wait()


def _log_of(process: subprocess.Popen[str]) -> str:
    process.terminate()
    return process.communicate(timeout=20)[1]


def _get(port: int, path: str) -> str:
    return str(urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}").read().decode())
