"""What was long ago counts less where behaviour drifts, by as much as the half-life says."""

import numpy as np
import pytest

from trainer.fading import fading


def test_moments_fade_by_half_each_half_life() -> None:
    end_ms, half_life_ms = 10_000, 2_000.0
    at_ms = np.array([10_000, 8_000, 6_000, 3_000])
    assert fading(at_ms, end_ms, half_life_ms) == pytest.approx([1, 0.5, 0.25, 0.5**3.5])
