"""The level of the hazards, moved to what the newest outcomes say: the part of a change in behaviour that few outcomes are enough for.

Weights need thousands of outcomes to follow a change, a level some dozens. One shift a head is added to its logits in all bins, by maximum
likelihood on moments that count the less the older they are: their weight halves with a half-life. First a long one, then shorter ones on
top of it, so that a small change is found by much evidence and a large one soon.

A level within its noise is left alone. Of a shift s with the standard error e, max(0, 1 - 2 (e / s)^2) is kept: the positive-part
shrinkage of James & Stein (Efron & Morris, JASA 1973), with a threshold of 1.4 standard errors. The error is White's sandwich over users,
because the moments of a user share their outcomes.

Axis letters: L moments, K event sets, B bins, U users.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.network import Network
from trainer.fading import fading
from trainer.material import BLOCK, Material

SHARES = (1 / 4, 1 / 16, 1 / 64)
"""Half-lives, as shares of the window."""
DOUBT = 2.0
"""Squared standard errors that a shift has to exceed."""
LEAST_USERS = 10
"""Users with an outcome that a level takes at least; fewer say nothing about everybody."""
NEWEST = 250_000
"""Moments that are looked at, at most."""
STEPS = 30

Doubles = NDArray[np.float64]


def half_lives(begin_ms: int, end_ms: int) -> list[float]:
    """Milliseconds, the longest first."""
    return [(end_ms - begin_ms) * share for share in SHARES]


def follow(network: Network, material: Material, hidden_EH: torch.Tensor, end_ms: int, half_lives_ms: Sequence[float]) -> Doubles:
    """Move the heads' levels in place, by the moments of `material`. Returns the shifts (K,), in log-odds."""
    rows = np.sort(np.argsort(-material.moments.at_ms, kind="stable")[:NEWEST])
    event = material.moments.event[rows]
    user, at_ms, weight = material.history.user[event], material.moments.at_ms[rows], material.moments.weight[rows].astype(np.float64)
    logits_LKB = logits_at(network, material, hidden_EH, torch.from_numpy(rows))
    shift_K = np.zeros(logits_LKB.shape[1])
    for k in range(len(shift_K)):
        logits_LB = logits_LKB[:, k].numpy().astype(np.float64)
        mask_LB, event_LB = (part[rows, k].numpy().astype(bool) for part in (material.mask_LKB, material.event_LKB))
        for half_life_ms in half_lives_ms:
            w_L = weight * fading(at_ms, end_ms, half_life_ms)
            shift_K[k] += beyond_noise(*shift(logits_LB + shift_K[k], mask_LB, event_LB, w_L, user))
    final = network.head[-1]
    assert isinstance(final, nn.Linear)
    with torch.no_grad():
        final.bias.view(len(shift_K), -1).add_(torch.from_numpy(shift_K).to(final.bias)[:, None])
    return shift_K


def shift(
    logits_LB: Doubles, mask_LB: NDArray[np.bool_], event_LB: NDArray[np.bool_], weight_L: Doubles, user_L: NDArray[np.int64]
) -> tuple[float, float]:
    """(what has to be added to all logits of a head, its standard error), by weighted maximum likelihood; (0, 0) of too few users.

    mask, event: the likelihood's terms (`hazards.log_likelihood_terms`).
    """
    with_outcome = np.unique(user_L[event_LB.any(1) & (weight_L > weight_L.max(initial=0) / 16)])
    if len(with_outcome) < LEAST_USERS:
        return 0.0, 0.0
    row, bin_ = np.nonzero(mask_LB)
    z, y, w = logits_LB[row, bin_], event_LB[row, bin_], weight_L[row]
    added = 0.0
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-(z + added)))
        curvature = float(w @ (p * (1 - p)))
        step = float(np.clip(w @ (y - p) / curvature, -1, 1))
        added += step
        if abs(step) < 1e-4:
            break
    score_U = np.bincount(user_L[row], w * (y - p))
    return added, float(np.sqrt(score_U @ score_U) / curvature)


def beyond_noise(added: float, error: float) -> float:
    """What is kept of a shift."""
    return added * max(0.0, 1 - DOUBT * (error / added) ** 2) if added else 0.0


def logits_at(network: Network, material: Material, hidden_EH: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(L, K, B) hazard logits at some moments, on the CPU."""
    network.eval()
    device, parts = network.device, []
    event = torch.from_numpy(material.moments.event)
    with torch.inference_mode():
        for begin in range(0, len(rows), BLOCK):
            some = rows[begin : begin + BLOCK]
            state, told = (x.to(device) for x in (hidden_EH[event[some]], material.readout_LR[some]))
            parts.append(network.logits(state, told, material.silence[some].to(device)).cpu())
    return torch.cat(parts)
