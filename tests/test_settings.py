"""Settings: where they come from, what is refused and with which sentence, and that secrets stay secret."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.settings import PREFIX, Settings, SettingsError
from model.targets import DEFAULT_TARGETS, Target
from trainer.settings import TrainerSettings
from worker.__main__ import main
from worker.settings import WorkerSettings
from worker.store import connect

PROGRAMS = (WorkerSettings, TrainerSettings)
SECRET = "hush-7f3a"


def read(environ: Mapping[str, str] | None = None, config: Path | None = None) -> WorkerSettings:
    return WorkerSettings.read(config, {PREFIX + name: value for name, value in (environ or {}).items()})


def refusal(environ: Mapping[str, str], config: Path | None = None) -> str:
    with pytest.raises(SettingsError) as error:
        read(environ, config)
    return str(error.value)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "streamscore.toml"


def test_the_environment_wins_over_the_file_and_the_file_over_defaults(toml: Path) -> None:
    toml.write_text('max_event_bytes = 100\nregistry = "file"\n[worker]\ngroup = "file"\nthreads = 3\n')
    found = read({"REGISTRY": "environment", "WORKER_GROUP": "environment"}, toml)
    assert (found.registry, found.group) == ("environment", "environment")
    assert (found.max_event_bytes, found.threads) == (100, 3)
    assert found.max_user_id_bytes == 256


def test_the_file_may_be_named_in_the_environment(toml: Path) -> None:
    toml.write_text("max_event_bytes = 100\n")
    assert read({"CONFIG": str(toml)}).max_event_bytes == 100
    assert read({"CONFIG": ""}).max_event_bytes == 65_536


def test_a_programs_own_word_on_a_shared_setting_wins(toml: Path) -> None:
    assert read({"REGISTRY": "shared", "WORKER_REGISTRY": "own", "TRAINER_REGISTRY": "theirs"}).registry == "own"
    toml.write_text('registry = "shared"\n[worker]\nregistry = "own"\n[trainer]\nregistry = "theirs"\nseed = 3\n')
    assert read(config=toml).registry == "own"
    assert TrainerSettings.read(toml, {}).registry == "theirs"


def test_lists_maps_and_targets(toml: Path) -> None:
    texts = {
        "EVENT_TOPICS": " a, b ,",
        "EVENT_FIELDS": '{"user_id": "uid"}',
        "WORKER_SILENCE_HOURS": "1.5, 24",
        "WORKER_TARGETS": "purchase=purchase:occurs:7d, churn=*:absent:30d",
    }
    found = read(texts)
    toml.write_text(
        'event_topics = ["a", "b"]\n[event_fields]\nuser_id = "uid"\n[worker]\nsilence_hours = [1.5, 24]\n'
        'targets = ["purchase=purchase:occurs:7d", {name = "churn", types = ["*"], outcome = "absent", horizon_ms = 2592000000}]\n'
    )
    assert found == read(config=toml)
    assert found.event_topics == ("a", "b")
    assert found.event_fields == {"user_id": "uid"}
    assert found.silence_hours == (1.5, 24)
    assert found.targets == DEFAULT_TARGETS
    assert read({"WORKER_SILENCE_HOURS": "", "WORKER_TARGETS": ""}).silence_hours == ()
    assert read({"WORKER_TARGETS": ""}).targets is None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("WORKER_GROOP", "STREAMSCORE_WORKER_GROOP is not a setting of the worker; did you mean STREAMSCORE_WORKER_GROUP?"),
        ("REDIS_URL", "STREAMSCORE_REDIS_URL is not a setting of the worker; did you mean STREAMSCORE_WORKER_REDIS_URL?"),
        ("WORKER_REGISTRI", "STREAMSCORE_WORKER_REGISTRI is not a setting of the worker; did you mean STREAMSCORE_REGISTRY?"),
        ("XYZZY", "STREAMSCORE_XYZZY is not a setting of the worker; see --help for those there are"),
    ],
)
def test_an_unknown_variable_is_refused(name: str, sentence: str) -> None:
    assert refusal({name: "1"}) == sentence


def test_an_unknown_name_in_the_file_is_refused(toml: Path) -> None:
    toml.write_text('redis_url = "redis://x"\n')
    assert refusal({}, toml) == f"redis_url in {toml} is not a setting of the worker; did you mean redis_url under [worker]?"
    toml.write_text("[worker]\nthread = 3\n")
    assert refusal({}, toml) == f"thread in {toml} is not a setting of the worker; did you mean threads under [worker]?"
    toml.write_text("[workers]\nthreads = 3\n")
    assert "workers in" in refusal({}, toml)


def test_the_other_programs_settings_are_none_of_ours(toml: Path) -> None:
    toml.write_text("[trainer]\nanything = 3\n")
    assert read({"TRAINER_ANYTHING": "1"}, toml) == read()


def test_a_file_that_is_none_is_refused(toml: Path) -> None:
    assert refusal({}, toml) == f"cannot read the settings file {toml}: No such file or directory"
    toml.write_text("group = streamscore")
    assert refusal({}, toml).startswith(f"the settings file {toml} is not TOML: ")
    toml.write_bytes(b"\xff\xfe")
    assert refusal({}, toml).startswith(f"the settings file {toml} is not TOML: ")
    toml.write_text('worker = "x"')
    assert refusal({}, toml) == f"worker in {toml} must be a table: write [worker] on a line of its own"


IMPOSSIBLE: tuple[tuple[dict[str, str], str], ...] = (
    ({"WORKER_THREADS": "many"}, "STREAMSCORE_WORKER_THREADS: Input should be a valid integer"),
    ({"WORKER_THREADS": "0"}, "STREAMSCORE_WORKER_THREADS: Input should be greater than or equal to 1"),
    ({"WORKER_GUARANTEE": "at_most_once"}, "STREAMSCORE_WORKER_GUARANTEE: Input should be 'exactly_once' or 'at_least_once'"),
    ({"WORKER_GROUP": "a b"}, "STREAMSCORE_WORKER_GROUP: String should match pattern"),
    ({"WORKER_GROUP": "{a}"}, "STREAMSCORE_WORKER_GROUP: String should match pattern"),
    ({"WORKER_MAX_BAD_SHARE": "0"}, "STREAMSCORE_WORKER_MAX_BAD_SHARE: Input should be greater than 0"),
    ({"WORKER_METRICS_PORT": "70000"}, "STREAMSCORE_WORKER_METRICS_PORT: Input should be less than or equal to 65535"),
    ({"WORKER_SILENCE_HOURS": "a,b"}, "STREAMSCORE_WORKER_SILENCE_HOURS: could not convert string to float"),
    ({"WORKER_SILENCE_HOURS": "24,6"}, "STREAMSCORE_WORKER_SILENCE_HOURS: must be positive and increasing, as in 24,72,168"),
    ({"WORKER_SILENCE_HOURS": "0"}, "STREAMSCORE_WORKER_SILENCE_HOURS: must be positive and increasing"),
    ({"WORKER_SILENCE_HOURS": "nan"}, "STREAMSCORE_WORKER_SILENCE_HOURS: Input should be a finite number"),
    ({"WORKER_RETENTION_DAYS": "20"}, "silence_hours must all lie before retention_days, after which a user is deleted"),
    ({"WORKER_RETENTION_DAYS": "1e9"}, "STREAMSCORE_WORKER_RETENTION_DAYS: Input should be less than or equal to 36500"),
    ({"MAX_FUTURE_SECONDS": "inf"}, "STREAMSCORE_MAX_FUTURE_SECONDS: Input should be a finite number"),
    ({"WORKER_IDLE_SECONDS": "nan"}, "STREAMSCORE_WORKER_IDLE_SECONDS: Input should be a finite number"),
    ({"WORKER_HEARTBEAT_INTERVAL_MS": "5000"}, "heartbeat_interval_ms must be at most a third of session_timeout_ms"),
    ({"WORKER_SCORE_TOPIC": "events"}, "score_topic and dead_letter_topic must not be event topics"),
    ({"WORKER_DEAD_LETTER_TOPIC": "events"}, "score_topic and dead_letter_topic must not be event topics"),
    ({"WORKER_TARGETS": "purchase"}, "STREAMSCORE_WORKER_TARGETS: 'purchase' is no target: write NAME=TYPE"),
    ({"WORKER_TARGETS": "x=a:occurs:0d"}, "STREAMSCORE_WORKER_TARGETS: 'x=a:occurs:0d' is no target: write NAME=TYPE"),
    ({"WORKER_TARGETS": "x=a:occurs:1d,x=b:occurs:1d"}, "STREAMSCORE_WORKER_TARGETS: two targets have one name"),
    ({"EVENT_TOPICS": ""}, "STREAMSCORE_EVENT_TOPICS: Tuple should have at least 1 item"),
    ({"EVENT_TOPICS": "a,b,a"}, "STREAMSCORE_EVENT_TOPICS: a topic is named twice"),
    ({"EVENT_FIELDS": "user_id=uid"}, "STREAMSCORE_EVENT_FIELDS: Input should be a valid dictionary"),
    ({"EVENT_FIELDS": '{"uid": "user_id"}'}, "STREAMSCORE_EVENT_FIELDS: no event field is called uid; the fields are user_id, type"),
    ({"KAFKA_SECURITY_PROTOCOL": "TLS"}, "STREAMSCORE_KAFKA_SECURITY_PROTOCOL: Input should be 'PLAINTEXT', 'SSL'"),
    ({"KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}, "kafka_security_protocol SASL_SSL needs kafka_sasl_mechanism and kafka_sasl_username and"),
    (
        {"KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "KAFKA_SASL_MECHANISM": "PLAIN", "KAFKA_SASL_USERNAME": "u"},
        "kafka_security_protocol SASL_PLAINTEXT needs kafka_sasl_password",
    ),
    ({"WORKER_REDIS_SSL_CAFILE": "ca.pem"}, "redis_ssl_cafile needs a redis_url with rediss://"),
)


@pytest.mark.parametrize(("environ", "sentence"), IMPOSSIBLE)
def test_what_is_impossible_is_refused(environ: dict[str, str], sentence: str) -> None:
    assert sentence in refusal(environ)


def test_every_fault_is_named_where_it_was_made(toml: Path) -> None:
    toml.write_text('[worker]\nthreads = 0\ngroup = "a b"\n')
    lines = refusal({"WORKER_GUARANTEE": "x"}, toml).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"group in {toml}", "STREAMSCORE_WORKER_GUARANTEE", f"threads in {toml}"]


@pytest.mark.parametrize("name", WorkerSettings.model_fields)
@settings(max_examples=25)
@given(
    text=st.one_of(st.text(), st.integers().map(str), st.floats().map(str), st.sampled_from(["null", "{}", "[]", "true", '{"user_id": 5}']))
)
@example(text="")
@example(text="1e400")
def test_no_text_does_worse_than_being_refused(name: str, text: str) -> None:
    with suppress(SettingsError):
        WorkerSettings.read(environ={f"{PREFIX}WORKER_{name.upper()}": text})


toml_values: Any = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@given(st.dictionaries(st.sampled_from([*WorkerSettings.model_fields]), toml_values, max_size=3))
def test_nor_does_a_value_of_any_type_from_the_file(values: dict[str, Any]) -> None:
    with suppress(ValueError):
        WorkerSettings(**values)


def test_secrets_stay_secret(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_SASL_MECHANISM": "PLAIN",
        "KAFKA_SASL_USERNAME": "u",
        "KAFKA_SASL_PASSWORD": SECRET,
        "KAFKA_SSL_PASSWORD": SECRET,
        "WORKER_REDIS_URL": f"redis://:{SECRET}@h:1/0",
    }
    found = read(secrets)
    assert found.kafka_client()["sasl_plain_password"] == SECRET
    assert found.kafka_client()["ssl_password"] == SECRET
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("worker").info("settings %s %r", found, found)
    said = [repr(found), str(found), str(found.model_dump()), found.model_dump_json(), caplog.text, found.describe()]
    said.append(refusal(secrets | {"WORKER_THREADS": "0", "WORKER_HEARTBEAT_INTERVAL_MS": "50"}))
    for name, value in secrets.items():
        monkeypatch.setenv(PREFIX + name, value)
    monkeypatch.setenv(PREFIX + "WORKER_THREADS", "0")
    assert main(["check"]) == 2
    assert "STREAMSCORE_WORKER_THREADS" in (err := capsys.readouterr().err)
    assert SECRET not in "".join([*said, err])


@pytest.mark.parametrize("url", ["redis://u:hu/sh@h:1", "redis://:hu#sh@h", "redis://:hush@h:port", "hush://:hush@h", "hush", ""])
def test_a_redis_url_that_is_none_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"redis_url is no Redis URL: write redis://USER:PASSWORD@HOST:PORT/DATABASE") as error:
        connect(url, cluster=False, timeout_seconds=1, ssl_cafile=None)
    assert "hu" not in str(error.value)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_setting_is_described(program: type[Settings]) -> None:
    text = program.describe()
    for name, field in program.model_fields.items():
        assert field.description, name
        assert not field.description.endswith("."), name
        prefix = PREFIX if name in Settings.model_fields else f"{PREFIX}{program.program.upper()}_"
        assert f"  {prefix}{name.upper()}\n      {field.description}. " in f"{text}\n", name


def test_help_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in WorkerSettings.model_fields:
        variable = PREFIX + ("" if name in Settings.model_fields else "WORKER_") + name.upper()
        assert f"  {variable}\n" in text
    for line in (
        "str; default localhost:9092",
        "int; default 65536",
        "exactly_once | at_least_once; default exactly_once",
        "secret str; default redis://localhost:6379/0",
        "list of float; default 24, 72, 168, 336, 720",
        "list of target; default none",
        "PLAIN | SCRAM-SHA-256 | SCRAM-SHA-512 | GSSAPI; default none",
        "map of str to str; default none",
        "path; default none",
    ):
        assert f". {line}\n" in text


def test_the_defaults_are_possible_and_frozen() -> None:
    found = read()
    with pytest.raises(ValueError, match="frozen"):
        found.group = "x"
    assert found.transactional_id == read({"WORKER_WORKER_ID": ""}).transactional_id
    assert read({"WORKER_WORKER_ID": "w1"}).transactional_id == "streamscore-w1"
    assert read({"WORKER_METRICS_PORT": "0"}).transactional_id != read({"WORKER_METRICS_PORT": "0"}).transactional_id


def test_targets_in_the_trainer_are_read_the_same_way() -> None:
    found = TrainerSettings.read(None, {PREFIX + "TRAINER_TARGETS": "a=x+y:occurs:1d"})
    assert found.targets == (Target.parse("a=y+x:occurs:1d"),)
