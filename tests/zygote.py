"""A process that has imported everything a worker needs, and forks workers: one starts in milliseconds, so a test can afford to kill many.

A program of its own: JSON lines on standard input, one answer each. {"start": environment, "log": file} -> process id;
{"poll": process id} -> exit status, null while it runs, -9 if it was killed. At end of input it kills its workers and ends.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from importlib import import_module

NEEDED = ("torch", "redis", "fsspec.implementations.local", "kafka.admin", "worker.__main__", "worker.loop", "worker.transport_kafka")


def preload() -> None:
    for name in NEEDED:
        import_module(name)
    import_module("torch").set_num_threads(1)
    assert threading.active_count() == 1, "a process with threads cannot fork safely"


def start(environment: dict[str, str], log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        faulthandler.register(signal.SIGUSR1)  # says where it hangs
        os.environ.update(environment)
        from worker.__main__ import main

        code = main(["run"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    preload()
    print("ready", flush=True)
    running: dict[int, int | None] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            pid = start(order["start"], order["log"])
            running[pid] = None
            print(pid, flush=True)
        else:
            pid = order["poll"]
            if running[pid] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                running[pid] = os.waitstatus_to_exitcode(status) if found else None
            print(json.dumps(running[pid]), flush=True)
    for pid, status in running.items():
        if status is None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
