"""Scores: valid JSON that says what was meant, whatever the ids are."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.scores import ScoreEncoder

texts = st.text() | st.sampled_from(['"', "\\", "{}", "\x00", "\n\r\t\x7f", "\u2028", "\U0001f600", "\ud7ff\ue000", '","x":"'])
rows = st.lists(
    st.tuples(
        texts, st.none() | texts, st.integers(-(2**62), 2**62), st.integers(0, 2**62), st.floats(0, 1, width=32), st.floats(0, 1, width=32)
    ),
    max_size=5,
)
encoder = ScoreEncoder(["purchase", "churn"], "v1")


@given(rows, texts, texts)
def test_an_events_score_is_json_that_says_what_was_meant(
    found: list[tuple[str, str | None, int, int, float, float]], topic: str, model: str
) -> None:
    users, ids, times, offsets, purchase, churn = ([row[i] for row in found] for i in range(6))
    probabilities = np.array([purchase, churn], np.float32).reshape(2, -1).T
    encoded = ScoreEncoder(["purchase", "churn"], model).events(users, times, ids, topic, 3, offsets, probabilities)  # type: ignore[arg-type]
    assert len(encoded) == len(found)
    for message, (user, event_id, time_ms, offset, p, c) in zip(encoded, found, strict=True):
        assert b"\n" not in message
        score = json.loads(message)
        scores = score.pop("scores")
        assert list(scores) == ["purchase", "churn"]
        assert abs(scores["purchase"] - p) <= 0.500001e-5
        assert abs(scores["churn"] - c) <= 0.500001e-5
        source = {"topic": topic, "partition": 3, "offset": offset}
        assert score == {"user_id": user, "trigger": "event", "timestamp": time_ms, "event_id": event_id, "source": source, "model": model}


@given(rows)
def test_a_silence_has_no_event_and_no_source(found: list[tuple[str, str | None, int, int, float, float]]) -> None:
    probabilities = np.array([row[4:] for row in found], np.float32).reshape(-1, 2)
    encoded = encoder.silences([row[0] for row in found], [row[2] for row in found], probabilities)
    for message, row in zip(encoded, found, strict=True):
        score = json.loads(message)
        del score["scores"]
        assert score == {"user_id": row[0], "trigger": "silence", "timestamp": row[2], "event_id": None, "source": None, "model": "v1"}


@pytest.mark.parametrize(
    ("probability", "text"),
    [
        (0, "0.00000"),
        (1, "1.00000"),
        (4.9e-6, "0.00000"),
        (5.1e-6, "0.00001"),
        (0.999995, "1.00000"),
        (0.123456, "0.12346"),
        (1 / 3, "0.33333"),
    ],
)
def test_rounding(probability: float, text: str) -> None:
    assert encoder.scores(np.array([[probability, 0]], np.float32)) == [f'"purchase": {text}, "churn": 0.00000']
