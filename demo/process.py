"""One embedded server's process, in its own folder, in the care of a guard (guard.py)."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

POLL_S = 0.01


class StartFailed(RuntimeError):
    """The server did not come up; the message ends with the last lines of its log."""


class Process:
    """``ready(pid)`` says whether the server answers, and that it is this process which does."""

    def __init__(self, name: str, command: Sequence[str], ready: Callable[[int], bool], directory: Path | None = None) -> None:
        self.name = name
        self.pid = 0
        self._ready = ready
        guard = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))]
        self._guard = subprocess.Popen(
            [*guard, str(os.getpid()), str(directory.absolute()) if directory else "", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.directory = Path(self._answer())
        self.log = self.directory / "server.log"

    def _answer(self) -> str:
        assert self._guard.stdout
        if not (line := self._guard.stdout.readline()):
            raise StartFailed(f"{self.name}'s guard ended unexpectedly.")
        return line.rstrip("\n")

    @property
    def alive(self) -> bool:
        if not self.pid:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def start(self, timeout_s: float = 60) -> None:
        assert self._guard.stdin
        assert not self.alive, f"{self.name} is running"
        self._guard.stdin.write("\n")
        self._guard.stdin.flush()
        self.pid = int(self._answer())
        deadline = time.monotonic() + timeout_s
        while not self._ready(self.pid):
            if not self.alive or time.monotonic() > deadline:
                why = f"was not ready after {timeout_s:.0f} s" if self.alive else "ended while starting"
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                self.kill()
                raise StartFailed(f"{self.name} {why}. The end of its log:\n{tail}")
            time.sleep(POLL_S)

    def stop(self, timeout_s: float = 30) -> None:
        """End in good order; killed if that takes too long."""
        self._signal(signal.SIGTERM, timeout_s)
        self.kill()

    def kill(self) -> None:
        self._signal(signal.SIGKILL, timeout_s=30)

    def _signal(self, number: signal.Signals, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        if self.alive:
            os.kill(self.pid, number)
        while self.alive and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def close(self) -> None:
        """Kill the server and remove its folder, if that was a temporary one."""
        self._guard.terminate()
        with self._guard:  # waits, and closes the pipes
            pass


def start_on_free_ports(launch: Callable[[], Process]) -> Process:
    """Another program may take a free port before the server does: then again, on other ports."""
    for attempt in range(5):
        process = launch()
        try:
            process.start()
            return process
        except BaseException as error:
            process.close()
            taken = isinstance(error, StartFailed) and "address already in use" in str(error).lower()
            if not taken or attempt == 4:
                raise
    raise AssertionError


def free_port() -> int:
    """A free port below those that the kernel gives to outgoing connections.

    Above, any client could take it while its server is down; one that retries on loopback can even connect to itself.
    """
    try:
        first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        first_outgoing = 32768
    ports = range(10_000, first_outgoing) if first_outgoing > 11_000 else range(10_000, 65_536)
    while True:
        port = random.choice(ports)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
