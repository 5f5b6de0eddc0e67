"""Fading: what was long ago counts less. Behaviour drifts, and a model is asked about the days after its window, not about all of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from trainer.dataset import Landmarks


def faded(moments: Landmarks, begin_ms: int, end_ms: int, half_life: float) -> Landmarks:
    """Moments of [begin, end), each weighed by 0.5 ** (its age at `end` / half-life). half_life: as a share of the window; 0: no fading."""
    if not half_life:
        return moments
    weight = moments.weight * fading(moments.at_ms, end_ms, half_life * max(end_ms - begin_ms, 1))
    return replace(moments, weight=weight.astype(np.float32))


def fading(at_ms: NDArray[np.int64], end_ms: int, half_life_ms: float) -> NDArray[np.float64]:
    """(L,) weights of moments: 1 at the end, a half one half-life before it."""
    weights: NDArray[np.float64] = np.exp2(-(end_ms - at_ms) / half_life_ms)
    return weights
