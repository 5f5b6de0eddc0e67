"""What is made of the figures: medians over runs, ratios between neighbours, a table for people. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.progress import Span


@dataclass(frozen=True)
class Case:
    """What was run. client: limit or worker. history: the worker's history_events."""

    users: int
    guarantee: str
    client: str
    history: int = 50


@dataclass(frozen=True)
class Run:
    """A case, once. stages: the worker's seconds by stage, cache misses and more, a microsecond or a share an event."""

    case: Case
    round: int
    span: Span
    stages: dict[str, float]


def spread(values: Sequence[float]) -> float:
    """Noise: from the lowest to the highest, over the median."""
    return (max(values) - min(values)) / median(values)


def ratios(runs: Sequence[Run], users: int, guarantee: str) -> list[float]:
    """Events/s of the worker over those of the limit that ran beside it, one a round."""
    found = {
        (r.case.client, r.round): r.span.events_per_s
        for r in runs
        if (r.case.users, r.case.guarantee, r.case.history) == (users, guarantee, 50)
    }
    return [found["worker", n] / found["limit", n] for client, n in sorted(found) if client == "limit"]


def history_ratio(runs: Sequence[Run]) -> float:
    """CPU of an event at the longest history over that at the shortest, as the median over rounds."""
    cost = {(r.case.history, r.round): r.span.cpu_us for r in runs}
    shortest, longest = min(h for h, _ in cost), max(h for h, _ in cost)
    return median([cost[longest, n] / cost[shortest, n] for h, n in sorted(cost) if h == shortest])


def figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians of one case's runs, and their noise."""
    speed, cost = [r.span.events_per_s for r in runs], [r.span.cpu_us for r in runs]
    stages = {name: round(median([r.stages[name] for r in runs]), 2) for name in runs[0].stages}
    return {
        "events_per_s": round(median(speed)),
        "events_per_s_spread": round(spread(speed), 3),
        "cpu_us": round(median(cost), 2),
        "cpu_us_spread": round(spread(cost), 3),
        "others_cores": round(median([r.span.others for r in runs]), 2),
        **({"stages": stages} if stages else {}),
    }


def by_case(runs: Sequence[Run]) -> dict[Case, list[Run]]:
    """Runs, grouped."""
    groups: dict[Case, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.case, []).append(run)
    return groups


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns, the first two to the left."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = [
        [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))] for row in [headers, *rows]
    ]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def throughput_table(runs: Sequence[Run]) -> str:
    """One line a case, the worker's under the limit it is held against."""
    rows = []
    for case, group in sorted(by_case(runs).items(), key=lambda item: (item[0].users, item[0].guarantee != "exactly_once", item[0].client)):
        f = figures(group)
        ratio = f"{median(ratios(runs, case.users, case.guarantee)):.2f}" if case.client == "worker" else ""
        name = "worker" if case.client == "worker" else "consume -> send (limit)"
        noise = f"±{f['events_per_s_spread'] / 2:.0%}"
        rows.append([f"{case.users:,} users, {case.guarantee}", name, f"{f['events_per_s']:,}", noise, f"{f['cpu_us']:.1f}", ratio])
    return table(["", "client", "events/s", "noise", "CPU us/event", "ratio"], rows)


def latency_table(latency: dict[str, dict[str, float]]) -> str:
    """One line a case."""
    rows = [[name, "", f"{q['p50']:.0f}", f"{q['p99']:.0f}", f"{q['max']:.0f}"] for name, q in latency.items()]
    return table(["visible latency, ms", "", "p50", "p99", "worst"], rows)
