"""python -m bench throughput: how fast the worker is, held against the fastest that its Kafka client could be.

What is measured, in one run, on Kafka and Redis that it starts itself:

* For 300 and for 200,000 users, in both guarantees, alternating: the limit (bench.limit: kafka-python consumes and sends, nothing between)
  and the real worker (`python -m worker run`), each as a new group that reads the same preloaded topic from its start into a new topic.
  Events/s and CPU microseconds an event of the client's process, from 10% to 95% of the output (bench.progress): start-up is left out.
  A ratio is taken between neighbours in time, the rest are medians over rounds; noise is half the distance from lowest to highest.
* Every user has a full history before the start (bench.states), at rest in Redis: the worker's cache begins empty. Users are drawn
  uniformly, which is hard on a cache: of 200,000 users most are met once, and then each event costs a read and a write of Redis.
* The cost of an event at histories of 10 and of 200 events, with 300 users.
* Visible latency at 5,000 events/s (bench.latency), three programs beside the two servers.

What is not: silence scores (switched off), several workers, a network between client and servers (all share this machine's cores, so
figures in events/s are of the whole, while CPU is of the client alone), a trained model (weights are random, which costs the same).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from kafka import KafkaAdminClient

from bench import clients, report, states, stream
from bench.clients import GUARANTEES, Job
from bench.progress import Outlook, follow, measure
from bench.report import Case, Run
from demo.launch import program
from demo.servers import KafkaServer, RedisServer, create_topics, kafka, redis
from model.artifact import Model

SPAN = (0.10, 0.95)
HISTORIES = (10, 200)
FEW_USERS = 300
STAGES = ("poll", "decode", "load", "step", "publish", "commit", "flush")


@dataclass(frozen=True)
class Plan:
    """How much of everything. rate: events/s of the latency runs; skip_s, count_s: their seconds not taken and taken."""

    events: int = 150_000
    users: tuple[int, ...] = (FEW_USERS, 200_000)
    rounds: int = 3
    rate: int = 5000
    skip_s: int = 4
    count_s: int = 8

    def quick(self) -> Plan:
        """For a glance: one round, no noise known."""
        return replace(self, events=min(self.events, 60_000), rounds=1, skip_s=3, count_s=4)


class Bench:
    """The servers, the preloaded topics, and what is run on them."""

    def __init__(self, plan: Plan, broker: KafkaServer, store: RedisServer, folder: Path) -> None:
        self._plan = plan
        self._broker = broker
        self._store = store
        self._registry = folder / "registry"
        self._model: Model = clients.publish_model(self._registry)
        self._servers = [server.pid for server in (broker, store) if server.embedded]
        self._began_ms = int(time.time() * 1000)
        self._jobs = 0
        create_topics(broker.bootstrap, {"bench-dead": (1, {})})

    def preload(self) -> None:
        """Write the input of every throughput case."""
        for users in self._plan.users:
            say(f"writing {self._plan.events:,} events of {users:,} users")
            create_topics(self._broker.bootstrap, {self._source(users): (stream.PARTITIONS, {})})
            stream.write_all(self._broker.bootstrap, self._source(users), self._plan.events, users, self._began_ms, seed=users)

    def throughput(self) -> list[Run]:
        """Limit and worker next to each other, in changing order."""
        self._run(Case(self._plan.users[0], "at_least_once", "limit"), 0)  # warms the broker up
        runs = []
        for n in range(self._plan.rounds):
            for users in self._plan.users:
                for guarantee in GUARANTEES:
                    pair = [Case(users, guarantee, client) for client in ("limit", "worker")]
                    runs += [self._run(case, n) for case in (pair if n % 2 == 0 else pair[::-1])]
        return runs

    def history(self) -> list[Run]:
        """The worker at short and long histories."""
        cases = [Case(self._plan.users[0], "exactly_once", "worker", history) for history in HISTORIES]
        return [self._run(case, n) for n in range(self._plan.rounds) for case in (cases if n % 2 == 0 else cases[::-1])]

    def latency(self) -> dict[str, dict[str, float]]:
        """Quantiles of the visible latency, by case."""
        cases = [(users, "exactly_once") for users in self._plan.users] + [(self._plan.users[-1], "at_least_once")]
        return {f"{users:,} users, {guarantee}": self._latency(users, guarantee) for users, guarantee in cases}

    def _run(self, case: Case, n: int) -> Run:
        with self._job(self._source(case.users), case.guarantee) as job, ExitStack() as stack:
            stages: dict[str, float] = {}
            outlook = Outlook(job.bootstrap, job.target, self._servers)
            stack.callback(outlook.close)
            if case.client == "limit":
                looks = follow(stack.enter_context(clients.limit(job)), outlook, self._plan.events)
            else:
                states.fill(job.redis_url, job.group, job.source, case.users, self._model, case.history, self._began_ms)
                worker = clients.worker(job, {"history_events": case.history})
                looks = follow(stack.enter_context(worker.running), outlook, self._plan.events)
                stages = per_event(worker.series())
            span = measure(looks, self._plan.events, *SPAN)
        name = case.client if case.history == 50 else f"{case.client}, history of {case.history}"
        say(
            f"round {n + 1}: {case.users:,} users, {case.guarantee}, {name}: {span.events_per_s:,.0f} events/s, {span.cpu_us:.1f} us CPU"
            f" an event, other programs on {span.others:.1f} cores" + "".join(f", {k} {v:.2f}" for k, v in stages.items())
        )
        return Run(case, n, span, stages)

    def _latency(self, users: int, guarantee: str) -> dict[str, float]:
        plan = self._plan
        source = f"paced-{users}-{guarantee}"
        create_topics(self._broker.bootstrap, {source: (stream.PARTITIONS, {})})
        amount = ["--count", str(plan.rate * plan.count_s), "--skip", str(plan.rate * plan.skip_s)]
        with self._job(source, guarantee) as job, ExitStack() as stack:
            states.fill(job.redis_url, job.group, job.source, users, self._model, 50, int(time.time() * 1000))
            worker = clients.worker(job, {})
            clients.wait_ready(stack.enter_context(worker.running), worker.endpoint)
            at = ["--bootstrap", job.bootstrap, *amount]
            reader = stack.enter_context(program("reader", ["bench.latency", "read", "--topic", job.target, *at], {}))
            while reader.alive and not reader.log:
                time.sleep(0.05)
            feed = ["bench.latency", "feed", "--topic", source, "--users", str(users), "--rate", str(plan.rate), *at]
            feeder = stack.enter_context(program("feeder", feed, {}))
            while reader.alive:
                time.sleep(0.05)
            try:
                found: dict[str, float] = {**json.loads(reader.log[-1]), "feeder_behind_ms": json.loads(feeder.log[-1])["behind_ms"]}
            except (ValueError, IndexError):
                raise RuntimeError(f"The latency was not measured. {reader.last_words()}\n{feeder.last_words()}") from None
        say(f"latency, {users:,} users, {guarantee}: {found}")
        return found

    @contextmanager
    def _job(self, source: str, guarantee: str) -> Iterator[Job]:
        self._jobs += 1
        name = f"bench-{self._jobs}"
        create_topics(self._broker.bootstrap, {name: (stream.PARTITIONS, {})})
        yield Job(self._broker.bootstrap, self._store.url, self._registry, source, name, "bench-dead", name, guarantee)
        with KafkaAdminClient(bootstrap_servers=self._broker.bootstrap) as admin:
            admin.delete_topics([name])

    def _source(self, users: int) -> str:
        return f"bench-{users}-users"


def per_event(series: dict[str, float]) -> dict[str, float]:
    """What the worker says of itself, an event: microseconds by stage; misses of the cache; and the mean size of a batch."""
    events = series["streamscore_events_total"]
    found = {stage: series[f'streamscore_stage_seconds_total{{stage="{stage}"}}'] / events * 1e6 for stage in STAGES}
    return {
        **found,
        "misses": series.get('streamscore_cache_lookups_total{result="miss"}', 0.0) / events,
        "batch": events / max(series.get('streamscore_batch_records_count{kind="live"}', 0.0), 1.0),
    }


def run(plan: Plan, as_json: bool) -> int:
    """The whole benchmark. Exit status."""
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="streamscore-bench-") as folder, kafka(say=say) as broker, redis() as store:
            bench = Bench(plan, broker, store, Path(folder))
            bench.preload()
            runs = bench.throughput()
            history = bench.history()
            latency = bench.latency()
    except RuntimeError as error:
        print(f"The benchmark could not be run: {error}", file=sys.stderr)
        return 1
    ratios = {(u, g): median(report.ratios(runs, u, g)) for u in plan.users for g in GUARANTEES}
    summary: dict[str, Any] = {
        **{f"ratio_{g}": round(min(ratios[u, g] for u in plan.users), 3) for g in GUARANTEES},  # the worse of the user counts
        "history_cost_ratio": round(report.history_ratio(history), 3),
        "visible_ms": latency,
        "ratios": [{"users": u, "guarantee": g, "ratio": round(r, 3)} for (u, g), r in ratios.items()],
        "cases": [{**asdict(case), **report.figures(group)} for case, group in report.by_case([*runs, *history]).items()],
        "plan": asdict(plan),
        "seconds": round(time.monotonic() - began),
    }
    print(report.throughput_table(runs))
    print()
    print(report.latency_table(latency))
    print()
    print(
        f"An event at a history of {HISTORIES[1]} costs {summary['history_cost_ratio']:.2f} of one at {HISTORIES[0]}. Histories full, "
        f"silence scores off, {plan.events:,} events of 190 bytes a run, {plan.rounds} rounds, {summary['seconds']} s in all."
    )
    if as_json:
        print(json.dumps(summary))
    return 0


def say(what: str) -> None:
    """Progress."""
    print(what, file=sys.stderr, flush=True)
