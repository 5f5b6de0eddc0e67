"""Settings that both programs read, and how they are read: environment variables over one TOML file over defaults.

    STREAMSCORE_REGISTRY=...          a shared setting, for both programs
    STREAMSCORE_WORKER_REDIS_URL=...  a setting of the worker (STREAMSCORE_TRAINER_... of the trainer)

    registry = "..."                  the same in the TOML file
    [worker]
    redis_url = "..."

The file is named by --config or STREAMSCORE_CONFIG. A name that nobody knows is refused: a typo must not become a default.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from model.targets import DEFAULT_TARGETS, Target

PREFIX = "STREAMSCORE_"
PROGRAMS = ("worker", "trainer")


class SettingsError(ValueError):
    """Settings that cannot be: one sentence a line, each saying which setting, what is wrong and where it was set."""


class Settings(BaseSettings):
    """Shared settings. A program's own settings extend this class and set `program`."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    program: ClassVar[str] = ""

    kafka_bootstrap_servers: str = Field("localhost:9092", description="Kafka brokers, as host:port,host:port")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to talk to Kafka"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "GSSAPI"] | None = Field(
        None, description="with SASL protocols"
    )
    kafka_sasl_username: str | None = Field(None, description="with PLAIN and SCRAM")
    kafka_sasl_password: SecretStr | None = Field(None, description="with PLAIN and SCRAM")
    kafka_ssl_cafile: Path | None = Field(None, description="PEM file of the authority that signed the brokers' certificates")
    kafka_ssl_certfile: Path | None = Field(None, description="PEM file of the client's certificate")
    kafka_ssl_keyfile: Path | None = Field(None, description="PEM file of the client's key")
    kafka_ssl_password: SecretStr | None = Field(None, description="of the client's key")
    event_topics: Annotated[tuple[str, ...], NoDecode] = Field(("events",), min_length=1, description="topics with events, co-partitioned")
    event_fields: dict[str, str] = Field(
        default_factory=dict, description='own names of event fields, as {"user_id": "userId"} (JSON in the environment)'
    )
    max_event_bytes: int = Field(65_536, gt=0, description="a larger record is a dead letter")
    max_user_id_bytes: int = Field(256, gt=0, description="a longer user_id is a dead letter")
    max_future_seconds: float = Field(600, ge=0, description="an event further ahead of its record's Kafka timestamp is a dead letter")
    max_age_days: float = Field(7300, gt=0, description="an event older than this when it was written to Kafka is a dead letter")
    registry: str = Field("registry", description="where models are: a directory or an fsspec URL (s3://bucket/models)")
    metrics_host: str = Field("0.0.0.0", description="address of /metrics, /healthz and /readyz")
    log_format: Literal["text", "json"] = Field("text", description="one line an event of note, as text or as JSON")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="the least that is logged")

    @field_validator("event_topics", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(v.strip() for v in value.split(",") if v.strip()) if isinstance(value, str) else value

    @field_validator("event_fields")
    @classmethod
    def _known_fields(cls, value: dict[str, str]) -> dict[str, str]:
        from model.events import FIELDS

        if unknown := set(value) - set(FIELDS):
            raise ValueError(f"no event field is called {', '.join(sorted(unknown))}; the fields are {', '.join(FIELDS)}")
        return value

    @field_validator("event_topics")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a topic is named twice")
        return value

    @model_validator(mode="after")
    def _login(self) -> Self:
        if self.kafka_security_protocol.startswith("SASL"):
            needed = ["kafka_sasl_mechanism"]
            if self.kafka_sasl_mechanism != "GSSAPI":
                needed += ["kafka_sasl_username", "kafka_sasl_password"]
            if missing := [name for name in needed if not getattr(self, name)]:
                raise ValueError(f"kafka_security_protocol {self.kafka_security_protocol} needs {' and '.join(missing)}")
        return self

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> Any:
        return (init_settings,)  # `read` does the reading, so that it can say where a wrong setting came from

    @classmethod
    def read(cls, config: Path | None = None, environ: Mapping[str, str] = os.environ) -> Self:
        """The settings of this program. Raises SettingsError."""
        config = config or (Path(environ[PREFIX + "CONFIG"]) if environ.get(PREFIX + "CONFIG") else None)
        values: dict[str, Any] = {}
        origin: dict[str, str] = {}
        for source in (cls._from_file(config) if config else {}, cls._from_environment(environ)):
            for name, (value, where) in source.items():
                values[name], origin[name] = value, where
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsError("\n".join(_sentence(e, origin) for e in error.errors())) from None

    @classmethod
    def _from_environment(cls, environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
        own, found = f"{PREFIX}{cls.program.upper()}_", {}
        others = tuple(f"{PREFIX}{p.upper()}_" for p in PROGRAMS if p != cls.program)
        for key in sorted(environ, key=lambda k: k.startswith(own)):  # the program's own prefix wins
            if not key.startswith(PREFIX) or key.startswith(others) or key == PREFIX + "CONFIG":
                continue
            mine = key.startswith(own)
            name = key.removeprefix(own if mine else PREFIX).lower()
            known = cls.model_fields if mine else Settings.model_fields
            if name not in known:
                raise SettingsError(cls._unknown(key, name, cls._variable))
            found[name] = (_decoded(environ[key], cls.model_fields[name].annotation), key)
        return found

    @classmethod
    def _from_file(cls, path: Path) -> dict[str, tuple[Any, str]]:
        try:
            tables = tomllib.loads(path.read_text())
        except OSError as error:
            raise SettingsError(f"cannot read the settings file {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"the settings file {path} is not TOML: {error}") from None
        shared = {k: v for k, v in tables.items() if k not in PROGRAMS}
        own = tables.get(cls.program, {})
        if not isinstance(own, dict):
            raise SettingsError(f"{cls.program} in {path} must be a table: write [{cls.program}] on a line of its own")
        for name, known in [*((n, Settings.model_fields) for n in shared), *((n, cls.model_fields) for n in own)]:
            if name not in known:
                raise SettingsError(cls._unknown(f"{name} in {path}", name, cls._in_file))
        return {k: (v, f"{k} in {path}") for k, v in {**shared, **own}.items()}

    @classmethod
    def describe(cls) -> str:
        """Every setting with its environment variable, type, default and meaning, for --help."""
        lines = []
        for name, field in cls.model_fields.items():
            default = field.get_default(call_default_factory=True)
            default = default.get_secret_value() if isinstance(default, SecretStr) else default
            shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
            kind = _type_name(field.annotation)
            shown = "none" if shown in (None, "", {}) else shown
            lines.append(f"  {cls._variable(name)}\n      {field.description}. {kind}; default {shown}")
        return "\n".join(lines)

    @classmethod
    def _variable(cls, name: str) -> str:
        return (PREFIX if name in Settings.model_fields else f"{PREFIX}{cls.program.upper()}_") + name.upper()

    @classmethod
    def _in_file(cls, name: str) -> str:
        return name if name in Settings.model_fields else f"{name} under [{cls.program}]"

    @classmethod
    def _unknown(cls, where: str, name: str, spelled: Callable[[str], str]) -> str:
        close = difflib.get_close_matches(name, cls.model_fields, 1)
        return f"{where} is not a setting of the {cls.program}; " + (
            f"did you mean {spelled(close[0])}?" if close else "see --help for those there are"
        )

    def kafka_client(self) -> dict[str, Any]:
        """Keyword arguments for kafka-python's clients: brokers, TLS and SASL."""
        config: dict[str, Any] = {
            "bootstrap_servers": self.kafka_bootstrap_servers.split(","),
            "security_protocol": self.kafka_security_protocol,
            "sasl_mechanism": self.kafka_sasl_mechanism,
            "sasl_plain_username": self.kafka_sasl_username,
            "sasl_plain_password": _revealed(self.kafka_sasl_password),
            "ssl_cafile": self.kafka_ssl_cafile and str(self.kafka_ssl_cafile),
            "ssl_certfile": self.kafka_ssl_certfile and str(self.kafka_ssl_certfile),
            "ssl_keyfile": self.kafka_ssl_keyfile and str(self.kafka_ssl_keyfile),
            "ssl_password": _revealed(self.kafka_ssl_password),
        }
        return {k: v for k, v in config.items() if v is not None}


TargetList = Annotated[tuple[Target, ...], NoDecode]


def split_targets(value: Any) -> Any:
    """Targets as written in one string: `purchase=purchase:occurs:7d, churn=*:absent:30d`."""
    if isinstance(value, str):
        value = [v for v in value.split(",") if v.strip()]
    return tuple(value) if value else DEFAULT_TARGETS


def _decoded(text: str, annotation: Any) -> Any:
    import json

    if getattr(annotation, "__origin__", None) is dict:
        try:
            return json.loads(text)
        except ValueError:
            return text  # pydantic will say what it should have been
    return text


def _revealed(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


def _sentence(error: Any, origin: Mapping[str, str]) -> str:
    name = str(error["loc"][0]) if error["loc"] else "settings"
    message = error["msg"].removeprefix("Value error, ")
    return f"{origin.get(name, name)}: {message}"


def _type_name(annotation: Any) -> str:
    kinds = [a for a in get_args(annotation) if a is not type(None) and a is not ...]
    match get_origin(annotation):
        case None:
            return {SecretStr: "secret str", Path: "path", Target: "target"}.get(annotation) or str(annotation.__name__)
        case origin if origin is Literal:
            return " | ".join(map(str, kinds))
        case origin if origin is dict:
            return "map of " + " to ".join(map(_type_name, kinds))
        case origin if origin is tuple:
            return f"list of {_type_name(kinds[0])}"
        case _:
            return " | ".join(map(_type_name, kinds))
