"""Timers: against a simulation of one event at a time; what is fired does not depend on how records fall into batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.schedule import NEVER_MS, Clock, Schedule, clock_along

Firing = tuple[str, int]  # user, due time; a deletion is ("-user", due time)
plans = st.lists(st.integers(1, 100), min_size=1, max_size=4, unique=True).map(sorted)
events_of_a_partition = st.lists(st.tuples(st.sampled_from("abc"), st.integers(-60, 60)), max_size=25).map(
    lambda gaps: [(user, int(at)) for (user, _), at in zip(gaps, np.cumsum([gap for _, gap in gaps]), strict=True)]
)


@dataclass
class Simulation:
    """One event at a time. Whenever the clock has moved, whoever is due up to it is fired, soonest first."""

    ages: list[int]
    retention: int
    lateness: int
    clock: int = NEVER_MS
    last: dict[str, int] = field(default_factory=dict)
    passed: dict[str, int] = field(default_factory=dict)  # by user: dues up to here are fired, or were passed before the last event
    fired: list[Firing] = field(default_factory=list)

    def event(self, user: str, at: int) -> None:
        self.last[user] = max(at, self.last.get(user, at))
        self.clock = max(self.clock, at - self.lateness)
        self.passed[user] = self.clock
        for name in sorted(self.last):
            last = self.last[name]
            self.fired += [(name, last + age) for age in self.ages if self.passed[name] < last + age <= self.clock]
            self.passed[name] = self.clock
            if last + self.retention <= self.clock:
                self.fired.append((f"-{name}", last + self.retention))
                del self.last[name], self.passed[name]


class Batches:
    """The same with the functions under test, in the way of worker.step: an event's user before it, everybody at the end of the batch."""

    def __init__(self, ages: list[int], retention: int, lateness: int) -> None:
        self.schedule = Schedule(tuple(ages), retention)
        self.lateness = lateness
        self.clock = NEVER_MS
        self.last: dict[str, int] = {}
        self.due: dict[str, int] = {}
        self.fired: list[Firing] = []

    def batch(self, events: list[tuple[str, int]]) -> None:
        if not events:
            return
        before, reached = clock_along(np.array([at for _, at in events]), self.clock, self.lateness)
        for (user, at), passed_ms, reached_ms in zip(events, before.tolist(), reached.tolist(), strict=True):
            if user in self.last and self.due[user] <= passed_ms:
                self.fire([user], passed_ms)
            self.last[user] = max(at, self.last.get(user, at))
            self.due[user] = int(self.schedule.next_due(np.array([self.last[user]]), np.array([reached_ms]))[0])
        self.clock = int(reached[-1])
        self.fire([user for user in sorted(self.last) if self.due[user] <= self.clock], self.clock)

    def fire(self, users: list[str], upto: int) -> None:
        if not users:
            return
        last = np.array([self.last[u] for u in users])
        who, dues, deleted = self.schedule.passed(last, np.array([self.due[u] for u in users]), np.full(len(users), upto))
        self.fired += [(users[i], due) for i, due in zip(who.tolist(), dues.tolist(), strict=True)]
        for user, gone, due in zip(users, deleted.tolist(), self.schedule.next_due(last, upto).tolist(), strict=True):
            self.due[user] = due
            if gone:
                self.fired.append((f"-{user}", self.last.pop(user) + self.schedule.retention_ms))
                del self.due[user]


def cut(events: list[tuple[str, int]], at: list[int]) -> list[list[tuple[str, int]]]:
    edges = [0, *sorted(min(a, len(events)) for a in at), len(events)]
    return [events[a:b] for a, b in pairwise(edges)]


@given(plans, st.integers(1, 50), st.integers(0, 30), events_of_a_partition, st.lists(st.integers(0, 25), max_size=6))
def test_what_is_fired_does_not_depend_on_batch_boundaries(
    ages: list[int], more: int, lateness: int, events: list[tuple[str, int]], cuts: list[int]
) -> None:
    retention = ages[-1] + more
    simulation, batches = Simulation(ages, retention, lateness), Batches(ages, retention, lateness)
    for user, at in events:
        simulation.event(user, at)
    for batch in cut(events, cuts):
        batches.batch(batch)
    assert len(set(batches.fired)) == len(batches.fired), "nothing is fired twice"
    assert sorted(batches.fired) == sorted(simulation.fired)
    for user in "abc":
        mine, expected = ([f for f in run.fired if f[0].endswith(user)] for run in (batches, simulation))
        assert mine == expected, "in order for each user"


@given(plans, st.integers(1, 50), st.integers(-200, 200), st.integers(-200, 400))
def test_the_next_due(ages: list[int], more: int, last: int, fired: int) -> None:
    retention = ages[-1] + more
    ahead = [last + age for age in (*ages, retention) if last + age > fired]
    found = Schedule(tuple(ages), retention).next_due(np.array([last]), fired)
    assert found.tolist() == [ahead[0] if ahead else last + retention]


@given(plans, st.integers(1, 50), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5), st.integers(0, 300)), max_size=5))
def test_what_has_passed(ages: list[int], more: int, users: list[tuple[int, int, int]]) -> None:
    dues = [*ages, ages[-1] + more]
    last = [at for at, _, _ in users]
    due = [at + dues[min(k, len(dues) - 1)] for at, k, _ in users]
    upto = [d + later for d, (_, _, later) in zip(due, users, strict=True)]
    who, times, deleted = Schedule(tuple(ages), dues[-1]).passed(*(np.array(a, np.int64) for a in (last, due, upto)))
    expected = [(i, at + age) for i, at in enumerate(last) for age in ages if due[i] <= at + age <= upto[i]]
    assert list(zip(who.tolist(), times.tolist(), strict=True)) == expected
    assert deleted.tolist() == [at + dues[-1] <= u for at, u in zip(last, upto, strict=True)]


def test_without_ages_there_is_retention_only() -> None:
    schedule = Schedule((), 100)
    assert schedule.next_due(np.array([5]), NEVER_MS).tolist() == [105]
    who, _, deleted = schedule.passed(np.array([5, 5]), np.array([105, 105]), np.array([104, 105]))
    assert (who.tolist(), deleted.tolist()) == ([], [False, True])


@given(st.lists(st.integers(-(2**61), 2**61), min_size=1), st.integers(-(2**61), 2**61), st.integers(0, 10**9), st.integers(0, 50))
def test_the_clock_is_the_highest_time_less_the_lateness_wherever_it_is_cut(times: list[int], start: int, lateness: int, at: int) -> None:
    before, reached = clock_along(np.array(times), start, lateness)
    clock, expected = start, []
    for time_ms in times:
        expected.append((clock, max(clock, time_ms - lateness)))
        clock = expected[-1][1]
    assert list(zip(before.tolist(), reached.tolist(), strict=True)) == expected
    if 0 < at < len(times):
        _, first = clock_along(np.array(times[:at]), start, lateness)
        assert clock_along(np.array(times[at:]), int(first[-1]), lateness)[1].tolist() == reached[at:].tolist()


clocks = st.builds(Clock, st.integers(NEVER_MS, 1 << 62), st.integers(NEVER_MS, 1 << 62))


@given(clocks, clocks)
def test_a_clock_travels_as_metadata(one: Clock, other: Clock) -> None:
    assert Clock.decode(one.encode()) == one
    assert len(one.encode()) < 100
    assert one.latest(other) == Clock(max(one.fired_ms, other.fired_ms), max(one.stream_ms, other.stream_ms))


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "null",
        "17",
        "[]",
        "{}",
        '"x"',
        '{"fired_ms": 1}',
        '{"fired_ms": null, "stream_ms": 2}',
        '{"fired_ms": Infinity, "stream_ms": 1}',
    ],
)
def test_anybody_elses_metadata_is_a_clock_that_has_not_started(metadata: str) -> None:
    assert Clock.decode(metadata) == Clock()


@given(st.text())
def test_whatever_the_metadata(metadata: str) -> None:
    assert isinstance(Clock.decode(metadata), Clock)
