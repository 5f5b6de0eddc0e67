"""Discrete-time hazards on a log-spaced grid of time from the moment asked.

Source: logistic hazard / Nnet-survival (Gensheimer & Narasimhan, arXiv 1805.00917). One pass gives every horizon:

    P(occurs within H) = 1 - product over bins up to H of (1 - hazard)

A hazard is the sigmoid of a logit z, so log(1 - hazard) = -softplus(z) and a product of survivals is a sum: `horizon_weights` turns
"up to H" into one matrix, in which a bin that H cuts counts with the share of it that lies before H (constant rate within
the bin; the last bin's rate goes on beyond the grid).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import softplus

from model.targets import Target

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
# Fine where intent decides (hours), coarse where habit does (weeks); the usual horizons 1, 7, 14, 30, 60, 90 days are edges.
DEFAULT_EDGES_MS = tuple(round(h * HOUR_MS) for h in (0.25, 1, 3, 8, 24, 48, 72, 120, 168, 240, 336, 504, 720, 1080, 1440, 2160))


def grid(targets: Sequence[Target]) -> tuple[int, ...]:
    """The hazard grid: the default one, with every target's horizon as an edge."""
    return tuple(sorted({*DEFAULT_EDGES_MS, *(t.horizon_ms for t in targets)}))


def horizon_weights(edges_ms: Sequence[int], horizons_ms: Sequence[int]) -> NDArray[np.float32]:
    """(B, T): the share of bin b that lies before horizon t. edges_ms: the B right ends of the bins, the first bin starts at 0.

    Beyond the grid the last bin's rate goes on: its share is then more than 1.
    """
    right = np.asarray(edges_ms, np.float64)
    left = np.concatenate([[0.0], right[:-1]])
    share = np.maximum((np.asarray(horizons_ms, np.float64)[None, :] - left[:, None]) / (right - left)[:, None], 0)
    share[:-1] = np.minimum(share[:-1], 1)
    weights: NDArray[np.float32] = share.astype(np.float32)
    return weights


def probabilities(logits: torch.Tensor, weights: torch.Tensor, sets: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
    """(N, T) probabilities of T targets.

    logits: (N, K, B) of K event sets on B bins; weights: (B, T) as `horizon_weights`; sets: (T,) which event set a target asks about;
    absent: (T,) bool.
    """
    log_survival_NKT = -(softplus(logits) @ weights)
    index = sets.view(1, 1, -1).expand(logits.shape[0], 1, -1)
    survival_NT = torch.exp(log_survival_NKT.gather(1, index).squeeze(1))
    return torch.where(absent, survival_NT, 1 - survival_NT)


def log_likelihood_terms(
    wait_ms: NDArray[np.int64], observed_ms: NDArray[np.int64], edges_ms: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What a right-censored wait says, as (mask, event), both (N, B): the loss is the binary cross-entropy of `event` where `mask`.

    wait_ms: time from the moment asked to the event (any value >= observed_ms if none was seen); observed_ms: time under observation.
    A bin counts only if its whole width is under observation, event or not: counting a cut bin when an event fell into it, and
    leaving it out when none did, would overstate the hazard near the end of the data.
    """
    right = np.asarray(edges_ms, np.int64)
    left = np.concatenate([[0], right[:-1]])
    under_observation = right[None, :] <= observed_ms[:, None]
    at_risk = left[None, :] <= wait_ms[:, None]
    hit = (left[None, :] <= wait_ms[:, None]) & (wait_ms[:, None] < right[None, :])
    mask = under_observation & at_risk
    return mask.astype(np.float32), (hit & mask).astype(np.float32)


def target_tensors(
    targets: Sequence[Target], sets: Sequence[tuple[str, ...]], edges_ms: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights, sets, absent) as `probabilities` takes them. Raises ValueError where the model has no head for a target."""
    for target in targets:
        if target.types not in sets:
            known = ", ".join("+".join(s) for s in sets)
            raise ValueError(f"the model has no head for target {target.name} ({'+'.join(target.types)}); it has: {known}")
    return (
        torch.from_numpy(horizon_weights(edges_ms, [t.horizon_ms for t in targets])),
        torch.tensor([list(sets).index(t.types) for t in targets], dtype=torch.int64),
        torch.tensor([t.outcome == "absent" for t in targets]),
    )
