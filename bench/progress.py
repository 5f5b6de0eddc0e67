"""How fast a client is, seen from outside: what it has committed to its output topic, and the CPU time of its process.

Nothing is asked of the client itself, so the worker and the bare loop are measured with the same ruler. Start-up and tail are left out:
a span reaches from one share of the output to another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kafka import KafkaConsumer, TopicPartition

from bench.stream import PARTITIONS
from demo.launch import Program

LOOK_S = 0.1
QUIET_S = 1.0  # complete when nothing more has come for so long
STUCK_S = 60.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Look:
    """A moment: seconds on any clock, messages committed so far, CPU seconds of the client and of programs that are none of ours."""

    at: float
    done: int
    cpu: float
    others: float


@dataclass(frozen=True)
class Span:
    """What a client did between two shares of its output. others: cores that programs took which have nothing to do with it."""

    events_per_s: float
    cpu_us: float
    seconds: float
    others: float


def measure(looks: Sequence[Look], events: int, begin: float, end: float) -> Span:
    """The span between two shares of the output, interpolated between looks. Raises ValueError where there are too few looks."""
    done = np.array([look.done for look in looks], float)
    if len(looks) < 3 or done[-1] <= 0:
        raise ValueError("too few looks: the run was over before it could be measured; take more events")
    first = int(np.flatnonzero(done > 0)[0])
    kept = [look for i, look in enumerate(looks) if i >= max(first - 1, 0)]
    done = np.array([look.done for look in kept], float)
    keep = np.concatenate([[True], np.diff(done) > 0])  # np.interp wants the moment at which a number was reached

    def at(share: float, values: list[float]) -> float:
        return float(np.interp(share * done[-1], done[keep], np.array(values)[keep]))

    def between(values: list[float]) -> float:
        return at(end, values) - at(begin, values)

    seconds = between([look.at for look in kept])
    spanned = events * (end - begin)
    cpu = between([look.cpu for look in kept])
    return Span(spanned / seconds, cpu / spanned * 1e6, seconds, between([look.others for look in kept]) / seconds)


class Outlook:
    """Looks at an output topic. Counts what read_committed readers may see, and a transaction's markers with it. servers: process ids."""

    def __init__(self, bootstrap: str, topic: str, servers: Sequence[int]) -> None:
        self._servers = servers
        self._consumer = KafkaConsumer(
            bootstrap_servers=bootstrap, isolation_level="read_committed", enable_auto_commit=False, metrics_enabled=False
        )
        self._partitions = [TopicPartition(topic, p) for p in range(PARTITIONS)]

    def look(self, pid: int) -> Look:
        """At the topic, and at the client of this process id."""
        done = sum(self._consumer.end_offsets(self._partitions).values())
        client = cpu_seconds(pid)
        ours = client + sum(map(cpu_seconds, [os.getpid(), *self._servers]))
        return Look(time.monotonic(), done, client, machine_seconds() - ours)

    def close(self) -> None:
        self._consumer.close()


def follow(running: Program, outlook: Outlook, events: int) -> list[Look]:
    """Look until everything has come out. Raises RuntimeError if it does not."""
    looks: list[Look] = []
    changed_at = time.monotonic()
    while True:
        running.check()
        look = outlook.look(running.process.pid)
        if not looks or look.done != looks[-1].done:
            changed_at = look.at
        looks.append(look)
        quiet_s = look.at - changed_at
        if look.done >= events and quiet_s > QUIET_S:
            return looks
        if quiet_s > STUCK_S:
            raise RuntimeError(f"The {running.name} came to a stop after {look.done:,} of {events:,} events. {running.last_words()}")
        time.sleep(LOOK_S)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def machine_seconds() -> float:
    """CPU seconds of all programs on this machine so far."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / TICKS
