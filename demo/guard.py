"""Run one server for another process, and outlive that process just long enough to kill the server and remove its folder.

A program of its own (standard library only): ``guard.py PARENT_PID FOLDER COMMAND...``. It answers with the folder (a new temporary one if
FOLDER is empty), then starts COMMAND in it for every line on standard input and answers with the process id. It ends, and the server with
it, at end of input, at SIGTERM, or when it is no longer PARENT_PID's child: even ``kill -9`` of the parent leaves nothing behind.
It is in a session of its own, so Ctrl-C in the terminal reaches the parent only, which may need its servers to finish what it is doing.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile

POLL_S = 0.02  # how soon a server that died is reaped, and an orphaned guard notices
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)


def die_with_guard() -> None:
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(command: list[str]) -> subprocess.Popen[bytes]:
    with open("server.log", "ab") as log:
        # preexec_fn is safe here: the guard has one thread, which is also the one whose death PDEATHSIG tells of
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0, preexec_fn=die_with_guard)


def main(parent: int, folder: str, command: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    temporary = None
    server = None
    try:
        if not folder:
            folder = temporary = tempfile.mkdtemp(prefix="streamscore-")
        os.chdir(folder)
        print(folder, flush=True)
        # a process that the parent forked may hold the pipe open: so end of input alone would not do
        while os.getppid() == parent:
            if select.select([sys.stdin], [], [], POLL_S)[0]:
                if not sys.stdin.readline():
                    break
                server = start(command)
                print(server.pid, flush=True)
            if server:
                server.poll()
    finally:
        if server and server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
