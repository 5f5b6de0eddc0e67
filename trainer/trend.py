"""The trend of the hazards' level: what holds at the end of the window, where rates drift for everybody alike.

Heads know no date, so where rates drift they answer for the middle of what they have learnt from. The window is cut into blocks of days;
in each, one shift of a head's logits in all bins makes up for what came to pass there. A line through these shifts, more by the newest
blocks than by old ones, says what the level is at the window's end. It is a robust line (Cleveland, "Robust locally weighted regression",
JASA 1979): a sale that lasts some days is no trend, neither when it is on nor when it is over. But campaigns that come again and again are
part of what is to come: where many blocks stand out, all count, the line's error is large, and the level stays (`levels.beyond_noise`).

Axis letters: L moments, K event sets, B bins, W blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.hazards import DAY_MS
from model.network import Network
from trainer.levels import beyond_noise
from trainer.material import BLOCK
from trainer.parts import Part
from trainer.served import Asked, Served

BLOCKS, SHORTEST_MS = 20, 7 * DAY_MS
"""Blocks of a window, at most, and how short one may be: whole weeks, or weekends would be a trend."""
LEAST_BLOCKS, LEAST_OUTCOMES = 6, 30
"""Blocks that make a line, and outcomes that make a block."""
MOMENTS = 200_000
"""Looked at, at most."""
STEPS, ROBUST = 8, 5
RARE = 0.12
"""Of the blocks, up to which those that stand out are taken for accidents."""

Floats = NDArray[np.float64]


def follow_trend(network: Network, part: Part, edges_ms: NDArray[np.int64], rng: np.random.Generator) -> Floats:
    """Move the levels of the network's heads in place to those of the end of what was observed. Returns the shifts (K,), in log-odds."""
    shift_K = np.zeros(network.shape.sets)
    if not len(part):
        return shift_K
    rows = np.sort(rng.permutation(len(part))[:MOMENTS])
    asked = Served(network, part)(torch.from_numpy(rows))
    logits_LKB = _logits(network, asked)
    observed_L = part.observed_L.numpy()[rows]
    block_ms = max(SHORTEST_MS, int(observed_L.max()) // BLOCKS)
    begin_ms = np.concatenate([[0], edges_ms[:-1]])
    short_B = edges_ms - begin_ms <= block_ms
    # How long before the end the middle of each bin was.
    age_LB = (observed_L[:, None] - (begin_ms + edges_ms) // 2)[:, short_B]
    for k in range(len(shift_K)):
        mask_LB = part.mask_LKB[rows, k].numpy().astype(bool)[:, short_B]
        row, bin_ = np.nonzero(mask_LB)
        block = np.minimum(age_LB[row, bin_] // block_ms, BLOCKS)
        event = part.event_LKB[rows, k].numpy()[:, short_B][row, bin_]
        z = logits_LKB[:, k].numpy()[:, short_B][row, bin_].astype(np.float64)
        shift_W, outcomes_W = _shifts(z, event.astype(np.float64), part.weight_L.numpy()[rows][row].astype(np.float64), block)
        told = outcomes_W >= LEAST_OUTCOMES
        shift_K[k] = beyond_noise(*line_at_the_end((np.flatnonzero(told) + 0.5) * block_ms / observed_L.max(), shift_W[told]))
    final = network.head[-1]
    assert isinstance(final, nn.Linear)
    with torch.no_grad():
        final.bias.view(len(shift_K), -1).add_(torch.from_numpy(shift_K).to(final.bias)[:, None])
    return shift_K


def _shifts(z: Floats, event: Floats, weight: Floats, block: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """(W,) what has to be added to the logits `z` in each block, by Newton's method; (W,) outcomes."""
    blocks = BLOCKS + 1
    outcomes_W: Floats = np.bincount(block, event, blocks).astype(np.float64)
    shift_W = np.zeros(blocks)
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-(z + shift_W[block])))
        score_W = np.bincount(block, weight * (event - p), blocks)
        curvature_W = np.bincount(block, weight * p * (1 - p), blocks)
        shift_W += np.clip(score_W / np.maximum(curvature_W, 1e-9), -1, 1)
    return shift_W, outcomes_W


def line_at_the_end(age_W: Floats, shift_W: Floats, *, robust: bool = True) -> tuple[float, float]:
    """(a robust line's value at age 0, its standard error); (0, 0) of too few blocks. age_W: as shares of the window."""
    if len(age_W) < LEAST_BLOCKS:
        return 0.0, 0.0
    near_W = (1 - np.minimum(age_W, 1) ** 3) ** 3
    trust_W = np.ones_like(age_W)
    design_W2 = np.stack([np.ones_like(age_W), age_W], 1)
    for _ in range(ROBUST if robust else 1):
        weight_W = near_W * trust_W
        inverse_22 = np.linalg.pinv((design_W2 * weight_W[:, None]).T @ design_W2)
        line_2 = inverse_22 @ (design_W2.T @ (weight_W * shift_W))
        rest_W = shift_W - design_W2 @ line_2
        scale = max(float(np.median(np.abs(rest_W))), 1e-6)
        trust_W = np.maximum(1 - (rest_W / (6 * scale)) ** 2, 0) ** 2
    if robust and np.mean(trust_W < 0.5) > RARE:
        return line_at_the_end(age_W, shift_W, robust=False)
    freedom = max(float(weight_W.sum()) - 2, 1.0)
    variance = float(weight_W @ rest_W**2) / freedom
    spread_22 = inverse_22 @ ((design_W2 * weight_W[:, None] ** 2).T @ design_W2) @ inverse_22
    return float(line_2[0]), float(np.sqrt(variance * spread_22[0, 0]))


@torch.inference_mode()
def _logits(network: Network, asked: Asked) -> torch.Tensor:
    """(L, K, B) of the network's heads, on the CPU."""
    parts = []
    for i in range(0, len(asked), BLOCK):
        some = slice(i, i + BLOCK)
        out = network.trusting(network.head(asked.inputs_LF[some]), asked.base_LJX[some])
        parts.append(out.view(-1, network.shape.sets, network.shape.bins).cpu())
    return torch.cat(parts)
