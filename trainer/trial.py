"""A trial of two ways to begin: are the heads' logits added to those that follow from the belief, or is the belief an input alone?

Where a stream is much like the cell's model of it, the first is nearly exact at once; where habits change or depend on what the cell does
not see, it errs at long horizons, and the second is better. The likelihood of the waits does not tell: most of it is about the first hours.
So each is fitted for a few passes, and the log-loss of what the model will be asked, on the validation days, decides.

Axis letters: L moments, K event sets, B bins, T targets.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.hazards import probabilities, target_tensors
from model.network import Network
from model.targets import Target, event_sets
from trainer.distributed import Team
from trainer.levels import logits_at
from trainer.material import Material, hidden_along

PASSES = 2
LEAST_OUTCOMES = 30
"""Moments with, and moments without, an outcome that a target takes to have a say."""


@torch.no_grad()
def begin_without_belief(network: Network, hazard_KB: NDArray[np.float64], team: Team) -> None:
    """Let the heads begin at the hazards of everybody alike."""
    final = network.head[-1]
    assert isinstance(final, nn.Linear)
    network.trust.zero_()
    final.reset_parameters()
    final.bias.copy_(torch.from_numpy(np.log(hazard_KB / (1 - hazard_KB)).reshape(-1)))
    team.share(final.weight, final.bias)


def asked_loss(network: Network, material: Material, targets: tuple[Target, ...], team: Team) -> float:
    """Mean over targets of the log-loss at their horizons, each shortened to half of the days that the moments span, so that outcomes are
    known. Infinite where no target has outcomes enough."""
    network.eval()
    moments, sets = material.moments, event_sets(targets)
    longest_ms = max(int(team.most(int(moments.observed_ms.max(initial=0)))) // 2, 1)
    asked = [t.model_copy(update={"horizon_ms": min(t.horizon_ms, longest_ms)}) for t in targets]
    hidden_EH = hidden_along(network, material.steps, material.history)
    logits_LKB = logits_at(network, material, hidden_EH, torch.arange(len(moments)))
    p_LT = probabilities(logits_LKB, *target_tensors(asked, sets, network.edges_ms)).double().clamp(1e-6, 1 - 1e-6).numpy()
    losses = []
    for target, p_L in zip(asked, p_LT.T, strict=True):
        known = moments.observed_ms >= target.horizon_ms
        occurs = moments.wait_ms[known, sets.index(target.types)] <= target.horizon_ms
        outcome = occurs if target.outcome == "occurs" else ~occurs
        loss_N = -np.log(np.where(outcome, p_L[known], 1 - p_L[known]))
        weight_N = moments.weight[known].astype(np.float64)
        loss, weight, hits, misses = team.total(float(loss_N @ weight_N), float(weight_N.sum()), int(outcome.sum()), int((~outcome).sum()))
        if min(hits, misses) >= LEAST_OUTCOMES:
            losses.append(loss / weight)
    return float(np.mean(losses)) if losses else float("inf")
