"""Scores: from arrays of probabilities to the JSON that is published.

One f-string an event, with a table of 5-decimal numbers: 0.3 us where `json.dumps` takes 3.5. Ids go through the standard
library's own escaping, because they come from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted

import numpy as np
from numpy.typing import NDArray

DECIMALS = 5
_TABLE = [f"{i / 10**DECIMALS:.{DECIMALS}f}" for i in range(10**DECIMALS + 1)]


class ScoreEncoder:
    """Encodes the scores of one model on one set of targets."""

    def __init__(self, targets: Sequence[str], version: str) -> None:
        self._names = tuple(targets)
        self._model = quoted(version)

    def scores(self, probabilities: NDArray[np.float32]) -> list[str]:
        """The `scores` object of each row of (N, T) probabilities."""
        index_TN = np.rint(probabilities.T * 10**DECIMALS).astype(np.int64).tolist()
        columns = [[f'"{name}": {_TABLE[i]}' for i in column] for name, column in zip(self._names, index_TN, strict=True)]
        return [", ".join(row) for row in zip(*columns, strict=True)]

    def events(
        self,
        user: Sequence[str],
        time_ms: Sequence[int],
        event_id: Sequence[str | None],
        topic: str,
        partition: int,
        offset: Sequence[int],
        probabilities: NDArray[np.float32],
    ) -> list[bytes]:
        """Scores after events of one partition, in log order."""
        tail = f', "model": {self._model}}}'
        source = f'"source": {{"topic": {quoted(topic)}, "partition": {partition}, "offset": '
        return [
            f'{{"user_id": {quoted(u)}, "trigger": "event", "scores": {{{s}}}, "timestamp": {t}, '
            f'"event_id": {"null" if e is None else quoted(e)}, {source}{o}}}{tail}'.encode()
            for u, s, t, e, o in zip(user, self.scores(probabilities), time_ms, event_id, offset, strict=True)
        ]

    def silences(self, user: Sequence[str], due_ms: Sequence[int], probabilities: NDArray[np.float32]) -> list[bytes]:
        """Scores of users who fell silent, at their due times."""
        tail = f', "event_id": null, "source": null, "model": {self._model}}}'
        return [
            f'{{"user_id": {quoted(u)}, "trigger": "silence", "scores": {{{s}}}, "timestamp": {t}{tail}'.encode()
            for u, s, t in zip(user, self.scores(probabilities), due_ms, strict=True)
        ]
