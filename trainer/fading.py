"""Fading: what was long ago counts less. Behaviour drifts, and a model is asked about the days after its window, not about all of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trainer.dataset import Landmarks


def faded(moments: Landmarks, begin_ms: int, end_ms: int, half_life: float) -> Landmarks:
    """Moments of [begin, end), each weighed by 0.5 ** (its age at `end` / half-life). half_life: as a share of the window; 0: no fading."""
    if not half_life:
        return moments
    age = (end_ms - moments.at_ms) / max(end_ms - begin_ms, 1)
    return replace(moments, weight=(moments.weight * 0.5 ** (age / half_life)).astype(np.float32))
