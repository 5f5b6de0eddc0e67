"""Material: a history and moments in it, prepared once for a network to be fitted on or judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.artifact import Model
from model.clock import EVEN, Clock
from model.features import Scaling, StepFeatures, Vocabulary
from model.hazards import log_likelihood_terms
from model.network import Network, Silence, silence_of
from model.rhythm import NO_VISITS, Visits
from model.statistics import READOUT_SIZE, readout
from trainer.dataset import Landmarks, by_rank, features, gaps_ended, statistics_after
from trainer.history import History
from trainer.objective import negative_log_likelihood

BLOCK = 8192
"""Landmarks taken at once."""


@dataclass(slots=True)
class Material:
    """What a network is fitted on or judged by: a history and moments in it, as tensors. L landmarks, E events.

    readout_LR: what the head sees beside the state. silence: at the moment. gap_EK: what each event ends (`model.rhythm.Visits`).
    mask_LKB, event_LKB: the likelihood's terms, one byte each.
    """

    history: History
    moments: Landmarks
    steps: StepFeatures
    readout_LR: torch.Tensor
    silence: Silence
    gap_EK: NDArray[np.int64]
    mask_LKB: torch.Tensor
    event_LKB: torch.Tensor

    @property
    def end_ms(self) -> int:
        """Of what was observed of the moments; 0 without a moment."""
        return int(self.moments.at_ms[0] + self.moments.observed_ms[0]) if len(self.moments) else 0


def prepare(
    history: History,
    moments: Landmarks,
    vocabulary: Vocabulary,
    scaling: Scaling,
    edges_ms: Sequence[int],
    clock: Clock = EVEN,
    visits: Visits = NO_VISITS,
) -> Material:
    """Everything that does not depend on the weights, computed once. clock: the belief cell's. visits: of the rhythm cell's sets."""
    steps = features(history, vocabulary, scaling)
    after = statistics_after(history, steps.slot)
    size, sets = moments.wait_ms.shape
    mask = torch.empty((size, sets, len(edges_ms)), dtype=torch.uint8)
    event = torch.empty_like(mask)
    readout_LR = torch.empty((size, READOUT_SIZE))
    for i in range(0, size, BLOCK):
        rows = slice(i, i + BLOCK)
        readout_LR[rows] = readout(after[moments.event[rows]], moments.at_ms[rows])
        for k in range(sets):
            m, e = log_likelihood_terms(moments.wait_ms[rows, k], moments.observed_ms[rows], edges_ms)
            mask[rows, k], event[rows, k] = torch.from_numpy(m), torch.from_numpy(e)
    silence = silence_of(after[moments.event], moments.at_ms, clock, visits)
    gap_EK = gaps_ended(visits, history, steps.slot, after)
    return Material(history, moments, steps, readout_LR, silence, gap_EK, mask, event)


def states_along(model: Model, history: History) -> tuple[torch.Tensor, NDArray[np.void]]:
    """(E, Z) state and (E,) statistics after each event."""
    steps = features(history, model.vocabulary, model.scaling)
    after = statistics_after(history, steps.slot)
    return hidden_along(model.network, steps, history, gaps_ended(model.network.visits, history, steps.slot, after)), after


def hidden_along(network: Network, steps: StepFeatures, history: History, gap_EK: NDArray[np.int64]) -> torch.Tensor:
    """(E, Z) state after each event, stepped over each user's whole stream as a worker does. gap_EK: `Visits.gaps`."""
    users, first, active = by_rank(history.first)
    device = network.device
    out = torch.empty((len(history), network.state_size))
    with torch.inference_mode():
        columns = network.inputs(steps, gap_EK)
        state = torch.zeros((len(users), network.state_size), device=device)
        begin = torch.from_numpy(first)
        for rank, n in enumerate(active.tolist()):
            rows = begin[:n] + rank
            state = network.encoder.step(state[:n], *(c[rows] for c in columns))
            out[rows] = state.cpu()
    return out


def loss_of(network: Network, material: Material) -> NDArray[np.float32]:
    """(L,) negative log-likelihood of each landmark, summed over event sets and bins; each state as a worker would have it."""
    network.eval()
    return head_losses(network, material, hidden_along(network, material.steps, material.history, material.gap_EK))


def head_losses(network: Network, material: Material, hidden_EH: torch.Tensor, rows: torch.Tensor | None = None) -> NDArray[np.float32]:
    """(N,) as `loss_of`, where the hidden states are known already, of some landmarks or, by default, all."""
    rows = torch.arange(len(material.moments)) if rows is None else rows
    with torch.inference_mode():
        parts = [head_terms(network, material, hidden_EH, some).cpu().numpy() for some in rows.split(BLOCK)]  # type: ignore[no-untyped-call]
    return np.concatenate(parts)


def head_terms(network: Network, material: Material, hidden_EH: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(N,) negative log-likelihood of some landmarks, by their rows; hidden_EH: state after each event. Differentiable in the head."""
    device = network.device
    hidden_NH = hidden_EH[torch.from_numpy(material.moments.event)[rows]]
    logits = network.logits(hidden_NH.to(device), material.readout_LR[rows].to(device), material.silence[rows].to(device))
    return negative_log_likelihood(logits, material.event_LKB[rows].to(device), material.mask_LKB[rows].to(device))
