"""What heads see once the units stand still, as a worker would serve it: states stepped along whole streams, at the moments of a part.

Axis letters as in `trainer.committee`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from model.network import Network, told
from trainer.dataset import by_rank
from trainer.parts import Part, Parts, kept_columns
from trainer.stage import Run
from trainer.standard import Standardise

BATCH, LEAST_BATCH = 1024, 64
"""Moments in a batch."""
LEAST_BATCHES = 64
"""Batches of a pass: few moments get smaller ones."""
SCALED_BY = 50_000
"""Moments that the scale of the inputs is taken from, at most."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Some moments: inputs_LF, base_LJX (logits that follow from the cells), and what `Objective` takes."""

    inputs_LF: torch.Tensor
    base_LJX: torch.Tensor
    event_LKB: torch.Tensor
    mask_LKB: torch.Tensor
    observed_L: torch.Tensor
    weight_L: torch.Tensor

    def __len__(self) -> int:
        return len(self.inputs_LF)


class Served:
    """The moments of a part, to be asked by rows. hidden_EH: of its events, where that is known already (`hidden_along`)."""

    def __init__(self, network: Network, part: Part, hidden_EH: torch.Tensor | None = None) -> None:
        self._network, self._part = network, part
        self.hidden_EH = hidden_along(network, part) if hidden_EH is None else hidden_EH

    def __len__(self) -> int:
        return len(self._part)

    def __call__(self, rows: torch.Tensor) -> Asked:
        part, network = self._part, self._network

        def taken(column: torch.Tensor) -> torch.Tensor:
            return column.index_select(0, rows).to(network.device)

        event = part.event_L.index_select(0, rows)
        hidden, readout = self.hidden_EH.index_select(0, event).to(network.device), taken(part.readout_LR)
        base_LJX = taken(part.base_LJX)
        inputs_LF = torch.cat([hidden, told(taken(part.believed_LS), base_LJX), readout], 1)
        return Asked(inputs_LF, base_LJX, taken(part.event_LKB), taken(part.mask_LKB), taken(part.observed_L), taken(part.weight_L))

    @property
    def mean_weight(self) -> float:
        return float(self._part.weight_L.mean()) if len(self) else 0.0


@torch.inference_mode()
def hidden_along(network: Network, part: Part) -> torch.Tensor:
    """(E, H) hidden state of the recurrent units after each event."""
    _, first, active = by_rank(part.first.numpy())
    encoder, begin = network.encoder, torch.from_numpy(first)
    columns = (part.slot_E, part.item_E, part.category_E, part.numeric_EM)
    state = torch.zeros(len(first), network.shape.recurrent, device=network.device)
    out = torch.empty(len(part.slot_E), network.shape.hidden)
    for rank, n in enumerate(active.tolist()):
        rows = begin[:n] + rank
        state = encoder.step_units(state[:n], encoder.inputs(*(c.index_select(0, rows).to(network.device) for c in columns)))
        out[rows] = state[:, : network.shape.hidden].cpu()
    return out


class Feed:
    """Batches of moments of all parts."""

    def __init__(self, network: Network, parts: Parts, run: Run) -> None:
        self._network, self._parts, self._run = network, parts, run
        ages_ms = [parts[number].observed_L for number in range(len(parts))]
        self._sizes = [len(age_ms) for age_ms in ages_ms]
        (moments,) = run.team.total(sum(self._sizes))
        batch = int(np.clip(moments // LEAST_BATCHES, LEAST_BATCH, BATCH))
        self._batch = max(1, batch // run.team.size)
        self.batches = max(1.0, moments / batch)
        """Of a pass that takes all moments."""
        self.window_ms = run.team.most(max((int(age_ms.max()) for age_ms in ages_ms if len(age_ms)), default=1))
        """From the first moment to the end of what was observed."""
        self._only: Served | None = None
        self._hidden: dict[int, Callable[[], dict[str, torch.Tensor]]] = {}

    def _served(self, number: int) -> Served:
        """The moments of a part. The only one is kept; of several, the hidden states are, on disk."""
        if self._only:
            return self._only
        load = self._hidden.get(number)
        served = Served(self._network, self._parts[number], load()["hidden"] if load else None)
        if len(self._sizes) == 1:
            self._only = served
        elif not load:
            with suppress(OSError):  # a full disk: they are computed anew each time
                self._hidden[number] = kept_columns({"hidden": served.hidden_EH})
        return served

    def scale(self) -> Standardise:
        """Of all inputs but the units' hidden state, which is of one size already, on a sample of the first part."""
        served, device = self._served(0), self._network.device
        rows = torch.from_numpy(np.sort(self._run.rng.permutation(len(served))[:SCALED_BY]))
        first = self._network.head[1]  # the head is standardised already
        assert isinstance(first, nn.Linear)
        mean_F, deviation_F = torch.zeros(first.in_features, device=device), torch.ones(first.in_features, device=device)
        if len(rows) > 1:
            spread_F, centre_F = torch.std_mean(served(rows).inputs_LF, dim=0)
            given = slice(self._network.shape.hidden, None)
            mean_F[given] = centre_F[given]
            deviation_F[given] = torch.where(spread_F[given] > 1e-3, spread_F[given], 1.0)  # a constant input stays as it is
        self._run.team.share(mean_F, deviation_F)
        return Standardise(mean_F, deviation_F)

    def count(self, share: float) -> int:
        """Batches of a pass over this share of the moments."""
        return sum(self._run.team.most(-(-math.ceil(share * size) // self._batch)) for size in self._sizes)

    def one_pass(self, share: float) -> Iterator[tuple[Asked, float]]:
        """Over this share of the moments, in random order: (the moments of a batch, their weight in the mean)."""
        team, rng = self._run.team, self._run.rng
        order = team.first_says(rng.permutation(len(self._sizes)).tolist())
        for number in order:
            served = self._served(number)
            chosen = rng.permutation(len(served))[: math.ceil(share * len(served))]
            count = team.most(-(-len(chosen) // self._batch))
            batch_weight = served.mean_weight * len(chosen) / max(count, 1)
            for rows in np.array_split(chosen, count) if count else []:
                yield served(torch.from_numpy(rows)), batch_weight
