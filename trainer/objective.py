"""What is minimised, at each moment asked: how unlikely the waits were, and the log-loss of what the targets ask.

1. The likelihood of the waits, censored by the end of the data, over all bins of the grid and all event sets. It learns from everything
   that is seen, so any horizon can be asked. Most of it is about the first hours, though.
2. The cross-entropy of each target's outcome at its own horizon, at moments whose horizon has closed by the calendar (not by the outcome:
   a short wait would be known earlier than a long one). It says what the units are to be spent on.

Axis letters: L moments, K event sets, B bins, T targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from model.targets import Target


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What came of L moments. event, mask: (L, K, B) the likelihood's terms. occurs, closed: a tensor (L,) for each target."""

    event_LKB: torch.Tensor
    mask_LKB: torch.Tensor
    occurs: tuple[torch.Tensor, ...]
    closed: tuple[torch.Tensor, ...]


class Objective:
    """targets: what is asked. sets, edges_ms: what the network's heads are about; every horizon is an edge of the grid."""

    def __init__(self, targets: Sequence[Target], sets: Sequence[Sequence[str]], edges_ms: Sequence[int]) -> None:
        known, edges = [tuple(s) for s in sets], list(edges_ms)
        self._asked = [(known.index(t.types), edges.index(t.horizon_ms) + 1, t.horizon_ms) for t in targets]

    def outcomes(self, event_LKB: torch.Tensor, mask_LKB: torch.Tensor, observed_L: torch.Tensor) -> Outcomes:
        """Of moments, from the likelihood's terms (`model.hazards.log_likelihood_terms`) and the time under observation in ms."""
        occurs = tuple(event_LKB[:, k, :bins].bool().any(1) for k, bins, _ in self._asked)
        closed = tuple((observed_L >= horizon_ms).float() for _, _, horizon_ms in self._asked)
        return Outcomes(event_LKB.float(), mask_LKB.float(), occurs, closed)

    def __call__(self, logits_LKB: torch.Tensor, outcomes: Outcomes, asked: float) -> torch.Tensor:
        """(L,) loss of each moment, in nats. asked: weight of the targets' cross-entropies beside the likelihood."""
        terms_LKB = binary_cross_entropy_with_logits(logits_LKB, outcomes.event_LKB, outcomes.mask_LKB, reduction="none")
        loss_L = terms_LKB.sum((1, 2))
        for (k, bins, _), occurs_L, closed_L in zip(self._asked, outcomes.occurs, outcomes.closed, strict=True):
            until_L = softplus(logits_LKB[:, k, :bins]).sum(1)  # -log P(no event within the horizon)
            of_target_L = torch.where(occurs_L, -torch.log(-torch.expm1(-until_L) + 1e-7), until_L)
            loss_L = loss_L + asked * of_target_L * closed_L
        return loss_L


def negative_log_likelihood(logits_LKB: torch.Tensor, event_LKB: torch.Tensor, mask_LKB: torch.Tensor) -> torch.Tensor:
    """(L,) of the waits."""
    return likelihood_terms(logits_LKB, event_LKB, mask_LKB).sum((1, 2))


def likelihood_terms(logits_LKB: torch.Tensor, event_LKB: torch.Tensor, mask_LKB: torch.Tensor) -> torch.Tensor:
    """(L, K, B) of the waits' negative log-likelihood (`model.hazards.log_likelihood_terms`)."""
    return binary_cross_entropy_with_logits(logits_LKB, event_LKB.float(), mask_LKB.float(), reduction="none")
