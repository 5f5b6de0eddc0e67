"""What was long ago counts less in a fitting, and nothing less in what judges it."""

from pathlib import Path

import numpy as np
import pytest
from trainer_support import NOW, START_MS, quick_settings, shop_history

from model.hazards import DAY_MS
from trainer.challenger import Split, train
from trainer.dataset import landmarks
from trainer.fading import faded
from trainer.metrics import Metrics
from trainer.stage import no_progress

SETS = (("purchase",), ("*",))


def test_moments_fade_by_half_each_half_life() -> None:
    history = shop_history(50, 20)
    begin_ms, end_ms = START_MS, START_MS + 20 * DAY_MS
    moments = landmarks(history, SETS, begin_ms, end_ms, np.random.default_rng(0))
    before = moments.weight.copy()
    halves = (end_ms - moments.at_ms) / (5 * DAY_MS)
    assert faded(moments, begin_ms, end_ms, 0.25).weight == pytest.approx(before * 0.5**halves, rel=1e-5)
    assert (moments.weight == before).all()
    assert faded(moments, begin_ms, end_ms, 0).weight is moments.weight


def test_a_model_is_told_of_the_newest_level(tmp_path: Path) -> None:
    """A shop that is busier from its 25th day on: what everybody does, as the artifact has it, follows with a short half-life."""
    day = START_MS + np.array([0, 36, 40, 40], np.int64) * DAY_MS
    history = shop_history(150, 40)
    keep = (history.time_ms >= START_MS + 25 * DAY_MS) | (history.user % 4 == 0) | ~history.has_previous
    quiet_first = history.where(keep)
    hazards = []
    for half_life in (0.0, 0.1):
        settings = quick_settings(tmp_path, epochs=1, belief_states=0, half_life=half_life)
        rng = np.random.default_rng(0)
        made = train(quiet_first, Split(*day.tolist()), None, settings, Metrics(), NOW, rng, no_progress, lambda: False)
        hazards.append(made.hazard_KB)
    anything = SETS.index(("*",))  # purchases are too few here
    assert (hazards[1][anything, 4:9] > 1.1 * hazards[0][anything, 4:9]).all()
