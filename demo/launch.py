"""The worker, the trainer and the shop, started as the real programs: by their public command lines and settings alone.

Each is in the care of a guard (guard.py): in a session of its own, so that Ctrl-C reaches the demo alone, in a temporary folder that goes
when it goes, and gone itself when the demo is, whatever ends that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from demo.process import Process

ROOT = Path(__file__).parents[1]
LAST_LINES, TAIL_BYTES = 12, 8192


class ProgramEnded(RuntimeError):
    """A program ended though nobody had asked it to. The message quotes the end of its log."""


@dataclass(frozen=True)
class Program:
    """A program that was started."""

    name: str
    process: Process
    patience_s: float = 5

    @property
    def directory(self) -> Path:
        return self.process.directory

    @property
    def alive(self) -> bool:
        return self.process.alive

    @property
    def log(self) -> list[str]:
        """Its last lines."""
        with open(self.process.log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-LAST_LINES:]

    def last_said(self) -> str:
        """What it logged last, without time and level."""
        said = [line.partition(" INFO ")[2].partition(": ")[2] for line in self.log if " INFO " in line]
        return said[-1] if said else "starting"

    def check(self) -> None:
        if not self.alive:
            raise ProgramEnded(f"{self.name} ended unexpectedly. {self.last_words()}")

    def last_words(self) -> str:
        return "\n    ".join(["The end of its log:", *self.log]) if self.log else "Its log is empty."

    def step_back(self, nice: int) -> None:
        """Let others have the CPU first, or no longer (0). Where the kernel shares the CPU out by session (sched_autogroup, the default
        of many), the niceness that a program gives itself counts among the processes of its own session only."""
        with suppress(OSError):
            Path(f"/proc/{self.process.pid}/autogroup").write_text(str(nice))

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that has no effect for long."""
        self.process.stop(timeout_s=self.patience_s)


@contextmanager
def program(name: str, module: Sequence[str], settings: Mapping[str, object], nice: int = 0, patience_s: float = 5) -> Iterator[Program]:
    """`python -m module...` with `settings` in its environment, and no other STREAMSCORE_ variables.

    patience_s: how long it may take to end in good order."""
    inherited = [variable for variable in os.environ if variable.startswith("STREAMSCORE_")]
    environment = {
        **settings,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),  # it runs in a folder of its own
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": ".",  # what torch leaves in a temporary folder goes with this one
    }
    command = [
        *("env", *(f"--unset={variable}" for variable in inherited), *(f"{key}={value}" for key, value in environment.items())),
        *(("nice", f"-n{nice}") if nice else ()),
        *(sys.executable, "-m", *module),
    ]
    process = Process(name, command, ready=lambda _: True)
    try:
        process.start()
        started = Program(name, process, patience_s)
        try:
            yield started
        finally:
            started.stop()
    finally:
        process.close()
