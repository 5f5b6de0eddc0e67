"""Fading: what was long ago counts less. Behaviour drifts, and a model is asked about the days after its window, not about all of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def fading(at_ms: NDArray[np.int64], end_ms: int, half_life_ms: float) -> NDArray[np.float64]:
    """(L,) weights of moments: 1 at the end, a half one half-life before it."""
    weights: NDArray[np.float64] = np.exp2(-(end_ms - at_ms) / half_life_ms)
    return weights
