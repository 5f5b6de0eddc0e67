"""Ask the head about a stepped batch, all tasks and both triggers at once, and make messages of the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.scores import ScoreEncoder
from worker.intake import Intake
from worker.models import Loaded
from worker.publish import merged, score_messages
from worker.step import Questions, joined
from worker.transport import Outgoing


@dataclass(slots=True)
class Scored:
    """outgoing: score messages, a partition each. events, silences: how many of each. probability: (N, T) all of them."""

    outgoing: list[Outgoing]
    events: int
    silences: int
    probability: NDArray[np.float32]


class Scoring:
    """One model's scores. score_partitions: of the score topic; where it has as many as the event topics, numbers are kept."""

    def __init__(self, loaded: Loaded, topic: str, same_partition: bool) -> None:
        self.loaded = loaded
        self._topic = topic
        self._same_partition = same_partition
        self._encoder = ScoreEncoder([t.name for t in loaded.scorer.targets], loaded.model.manifest.version)

    def score(self, intake: Intake | None, after: Questions, silences: Questions, ends: Mapping[int, Questions]) -> Scored:
        """after: of the batch's events; silences: due before one of them; ends: due after the batch, for every task to be published."""
        parts = []
        for number, end in ends.items():
            span = intake.slices[number] if intake else slice(0, 0)
            before = silences.where((silences.place >= span.start) & (silences.place < span.stop))
            parts.append((number, span, after.where(span), joined([before, end], end.hidden.shape[1])))
        asked = joined([q for _, _, events, silent in parts for q in (events, silent)], after.hidden.shape[1])
        probability = self.loaded.scorer(asked.hidden, asked.stats, asked.at_ms)
        outgoing: list[Outgoing] = []
        at = 0
        for number, span, events, silent in parts:
            n, m = len(events.user), len(silent.user)
            scored = self._events(intake, number, span, probability[at : at + n]) if intake else []
            spoken = self._encoder.silences(silent.user, silent.at_ms.tolist(), probability[at + n : at + n + m])
            place = np.where(silent.place < 0, -1, silent.place - span.start)
            users, values = merged(events.user, scored, silent.user, spoken, place)
            if values:
                outgoing.append(score_messages(self._topic, number if self._same_partition else None, users, values))
            at += n + m
        events_scored = sum(len(events.user) for _, _, events, _ in parts)
        return Scored(outgoing, events_scored, len(probability) - events_scored, probability)

    def _events(self, intake: Intake, number: int, span: slice, probability: NDArray[np.float32]) -> list[bytes]:
        """Scores of a task's events in log order, source by source (a task has one source a topic)."""
        events, out, begin = intake.events, [], span.start
        for s, source in enumerate(intake.sources):
            if source.partition.number == number:
                end = int(np.searchsorted(events.index, intake.first[s + 1]))
                mine, first = slice(begin, end), int(intake.first[s])
                out += self._encoder.events(
                    events.user[mine],
                    events.time_ms[mine].tolist(),
                    events.event_id[mine],
                    source.partition.topic,
                    number,
                    [source.offsets[i - first] for i in events.index[mine].tolist()],
                    probability[begin - span.start : end - span.start],
                )
                begin = end
        return out
