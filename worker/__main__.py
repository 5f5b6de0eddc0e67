"""python -m worker run | check."""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from model import logs
from model.settings import SettingsError
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from worker.loop import Worker

log = logging.getLogger("worker")

ALIVE_SECONDS = 60.0

EPILOG = """
Settings come from environment variables, over a TOML file (--config, or STREAMSCORE_CONFIG), over defaults. In the file, settings that
both programs share stand at the top level, the worker's own in [worker]: redis_url = "..." there is STREAMSCORE_WORKER_REDIS_URL here.

"""


def main(arguments: list[str] | None = None) -> int:
    """The program. Exit status: 0 after a graceful stop, 1 after a failure, 2 for settings that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m worker",
        description="Scores behaviour events: Kafka in, RNN state in Redis, purchase and churn scores out.",
        epilog=EPILOG + WorkerSettings.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command",
        choices=["run", "check"],
        help="run: score until SIGTERM or SIGINT. check: hold the settings against the live servers; say what is wrong and how to fix it",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    options = parser.parse_args(arguments)
    try:
        settings = WorkerSettings.read(options.config)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(settings.log_format, settings.log_level)
    if options.command == "check":
        from worker.check import check

        return check(settings)
    return run(settings)


def run(settings: WorkerSettings) -> int:
    """Score until a signal. Whatever ends it otherwise is one line in the log."""
    import torch

    from model.http import serve
    from model.memory import keep_freed_memory
    from model.registry import Registry
    from worker.acquire import Refused
    from worker.batch import TooManyBadRecords
    from worker.loop import Worker
    from worker.metrics import Metrics
    from worker.models import Models
    from worker.store import StoreError, StoreUnavailable, connect
    from worker.transport import FatalTransportError
    from worker.transport_kafka import KafkaTransport

    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    metrics = Metrics()
    models = Models(Registry(settings.registry), settings.targets, settings.device, metrics)
    try:
        client = connect(
            settings.redis_url.get_secret_value(),
            cluster=settings.redis_cluster,
            timeout_seconds=settings.redis_timeout_seconds,
            ssl_cafile=settings.redis_ssl_cafile,
        )
    except (ValueError, StoreUnavailable) as error:
        log.error("%s", error)
        return 1
    worker = Worker(settings, lambda: KafkaTransport(settings), client, models, metrics)
    try:
        server = serve(settings.metrics_host, settings.metrics_port, metrics.registry, lambda: alive(worker), lambda: worker.ready)
    except OSError as error:
        log.error("%s", error)
        return 1
    log.info("started", extra={"fields": {"metrics_port": server.port, "group": settings.group, "guarantee": settings.guarantee}})

    def stop(number: int, _: FrameType | None) -> None:
        log.info("stopping", extra={"fields": {"signal": signal.Signals(number).name}})
        worker.patience.stop.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    # The garbage collector's full passes, over everything that was imported, took a tenth of the time and stood in p99.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    # Kafka's and Redis' threads are mostly waited for: let them have the interpreter after 1 ms, not after the 5 ms of the default.
    sys.setswitchinterval(0.001)
    try:
        worker.run()
    except (FatalTransportError, StoreError, Refused, TooManyBadRecords) as error:
        log.error("%s", error)
        return 1
    except Exception:
        log.exception("a defect of the worker; nothing of the batch at hand was committed, a restart goes on where it was")
        return 1
    finally:
        server.close()
    log.info("stopped")
    return 0


def alive(worker: Worker) -> tuple[bool, str]:
    """Whether the loop made progress lately."""
    still_seconds = worker.seconds_since_progress()
    return still_seconds < ALIVE_SECONDS, f"the loop made progress {still_seconds:.1f} s ago"


if __name__ == "__main__":
    sys.exit(main())
