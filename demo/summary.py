"""What came of it all: for people, and as one line of JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo.audit import ReadBack
from demo.board import Board
from demo.quality import Measure


@dataclass(frozen=True)
class Summary:
    """`scores` counts all that were published, `silence_scores` those of them that no event had caused."""

    seconds: float
    events: int
    scores: int
    silence_scores: int
    dead_letters: dict[str, int]
    events_per_second: float
    visible: tuple[float, float] | None
    models: list[str]
    swaps: int
    quality: dict[str, Measure]
    lost: int
    doubled: int

    @classmethod
    def of(cls, board: Board, back: ReadBack, visible: tuple[float, float] | None) -> Summary:
        audit = back.audit
        return cls(
            seconds=board.elapsed_s,
            events=audit.events,
            scores=audit.event_scores + audit.silence_scores,
            silence_scores=audit.silence_scores,
            dead_letters=dict(audit.reasons.most_common()),
            events_per_second=back.events_per_second,
            visible=visible,
            models=[*audit.models, *(version for version in board.versions if version not in audit.models)],
            swaps=board.swaps,
            quality=board.quality,
            lost=audit.lost,
            doubled=audit.doubled,
        )

    def problems(self, *, quality_needed: bool) -> list[str]:
        """Why the demo did not show what it is there to show; empty if it did."""
        found = []
        if self.lost:
            found.append(f"{self.lost:,} events got no answer")
        if self.doubled:
            found.append(f"{self.doubled:,} answers came twice")
        if not self.swaps:
            found.append("the worker never swapped to another model")
        if quality_needed and (unknown := [name for name, measure in self.quality.items() if measure.published is None]):
            found.append(f"too few scores of {' and '.join(unknown)} could be judged: let it run longer")
        return found

    def json(self) -> str:
        def rounded(value: float | None, digits: int) -> float | None:
            return None if value is None else round(value, digits)

        p50, p99 = self.visible or (None, None)
        values: dict[str, Any] = {
            "events": self.events,
            "scores": self.scores,
            "silence_scores": self.silence_scores,
            "dead_letters": sum(self.dead_letters.values()),
            "events_per_second": round(self.events_per_second),
            "visible_ms": {"p50": rounded(p50, 1), "p99": rounded(p99, 1)},
            "models": self.models,
            "swaps": self.swaps,
            "auc": {name: rounded(m.published, 4) for name, m in self.quality.items()},
            "attainable_auc": {name: rounded(m.attainable, 4) for name, m in self.quality.items()},
            "judged": {name: m.count for name, m in self.quality.items()},
            "lost": self.lost,
            "doubled": self.doubled,
            "dead_letter_reasons": self.dead_letters,
            "seconds": round(self.seconds, 1),
        }
        return json.dumps(values)

    def print(self, console: Console) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="grey62")
        table.add_column()
        p50, p99 = self.visible or (float("nan"), float("nan"))
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dead_letters.items())
        table.add_row("events", f"{self.events:,}: {self.events - self.lost:,} answered, {self.lost:,} lost, {self.doubled:,} doubled")
        table.add_row("scores", f"{self.scores:,}, of them {self.silence_scores:,} by silence")
        table.add_row("dead letters", f"{sum(self.dead_letters.values()):,}" + (f": {reasons}" if reasons else ""))
        table.add_row("catching up", f"{self.events_per_second:,.0f} events/s")
        table.add_row("visible", f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, from an event's arrival in Kafka to its score being readable")
        table.add_row("models", f"{', '.join(self.models)}: {self.swaps} hot swap{'s' * (self.swaps != 1)}")
        for name, measure in self.quality.items():
            table.add_row(f"AUC {name}", auc_in_words(measure))
        table.add_row("took", f"{self.seconds:.0f} s")
        console.print()
        console.print(Text("Read back from Kafka, as a read_committed consumer sees it:", "bold"))
        console.print(table, highlight=False)


def auc_in_words(measure: Measure) -> str:
    if measure.published is None:
        return f"not measured: {measure.count:,} scores whose horizon has passed, too few of one outcome"
    best = "" if measure.attainable is None else f"; the best attainable by anyone is {measure.attainable:.3f}"
    return f"{measure.published:.3f}{best} (on {measure.count:,} live scores)"
