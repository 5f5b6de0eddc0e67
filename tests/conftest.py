"""One real Kafka and one real Redis for each process that runs tests; names that no other test uses keep the tests apart."""

import itertools
import secrets
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, settings
from world import World, Zygote

from demo.servers import KafkaServer, RedisServer, create_topics, kafka, redis
from model.registry import Registry

counter = itertools.count()
# The same examples on every run, however busy the machine is.
quiet = [HealthCheck.too_slow]
settings.register_profile("suite", max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=quiet)
settings.load_profile("suite")

PROCESSES = 2
"""That share the suite: each starts servers of its own."""
LONGEST = (
    "test_worker_faults",
    "test_gate_campaign",
    "test_trainer_rounds",
    "test_bench_quality",
    "test_trainer_cli",
    "test_trainer_shards",
    "test_trainer_distributed",
    "test_trainer_offline",
    "test_trainer_refresh",
    "test_trainer_report",
    "test_trainer_compare",
    "test_bad_input",
    "test_time_honesty",
)
"""Files that come first, so that no process is left with a long one at the end."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Several processes for a folder; a few files named by hand are run in this one, which starts sooner."""
    return 0 if all(".py" in argument for argument in config.args) else PROCESSES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def kafka_server() -> Iterator[KafkaServer]:
    """Shared: a test that stops or kills a server starts its own."""
    with kafka(say=print) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """Shared: a test that stops, kills or flushes a server starts its own."""
    with redis(say=print) as server:
        yield server


@pytest.fixture
def bootstrap(kafka_server: KafkaServer) -> str:
    return kafka_server.bootstrap


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture
def unique() -> str:
    """A short name for this test's groups, prefixes and transactional ids."""
    return f"t{next(counter)}-{secrets.token_hex(3)}"


@pytest.fixture
def make_topic(bootstrap: str, unique: str) -> Callable[..., str]:
    """``make_topic(4, cleanup_policy="compact")``: a new topic's name, ready for use; underscores stand for Kafka's dots."""

    def make(partitions: int = 2, **config: object) -> str:
        name = f"{unique}-{next(counter)}"
        create_topics(bootstrap, {name: (partitions, {key.replace("_", "."): str(value) for key, value in config.items()})})
        return name

    return make


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def world(bootstrap: str, redis_url: str, unique: str, tmp_path: Path, zygote: Zygote) -> Iterator[Callable[..., World]]:
    """``world(partitions=2, redis_url=..., **worker settings)``: with a model, but no worker yet."""
    made: list[World] = []

    def make(
        *, partitions: int = 2, redis_url: str = redis_url, bootstrap: str = bootstrap, model: bool = True, **settings: object
    ) -> World:
        name = f"{unique}-{len(made)}"
        (tmp_path / name).mkdir()
        made.append(World(bootstrap, redis_url, name, tmp_path / name, zygote, partitions, **settings))
        if model:
            made[-1].model("v1")
        return made[-1]

    yield make
    for each in made:
        each.close()
        print(each.log())  # pytest shows it where a test failed


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 kB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    yield mount
    # lazily: what a test has logged may hold an exception, this its frames, and these a file on the disk
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.fixture(params=["directory", "memory://"])
def registry(request: pytest.FixtureRequest, tmp_path: Path, unique: str) -> Iterator[Registry]:
    """An empty registry, in a folder and in another of fsspec's storages."""
    if request.param == "directory":
        yield Registry(str(tmp_path / "models"))
    else:
        yield Registry(f"memory://{unique}/models")
        with suppress(FileNotFoundError):
            fsspec.filesystem("memory").rm(f"/{unique}", recursive=True)
