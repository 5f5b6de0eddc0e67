"""The network: an encoder stepped once an event, and a head asked at any moment.

Shapes: N users or events, T steps, H hidden units, K event sets, B bins of the hazard grid, R readout of the statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.features import CATEGORY_BUCKETS, ITEM_BUCKETS, NUMERIC, StepFeatures
from model.statistics import READOUT_SIZE, SLOTS


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network. hidden: units of the GRU; head: units of each head's hidden layer; dropout: share dropped in training."""

    hidden: int = 64
    head: int = 64
    sets: int = 2
    bins: int = 16
    dropout: float = 0.2


class Encoder(nn.Module):
    """Event embeddings and a GRU (Cho et al., arXiv 1406.1078). The hidden state lies in [-1, 1]: it is a mix of tanh outputs."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.type_embedding = nn.Embedding(SLOTS, 12)
        self.item_embedding = nn.Embedding(ITEM_BUCKETS + 1, 8)
        self.category_embedding = nn.Embedding(CATEGORY_BUCKETS + 1, 8)
        self.rnn = nn.GRU(12 + 8 + 8 + NUMERIC, shape.hidden, batch_first=True)

    def inputs(self, slot: torch.Tensor, item: torch.Tensor, category: torch.Tensor, numeric: torch.Tensor) -> torch.Tensor:
        """(..., 39) the GRU's inputs."""
        return torch.cat([self.type_embedding(slot), self.item_embedding(item), self.category_embedding(category), numeric], dim=-1)

    def step(self, hidden_NH: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """(N, H) hidden state after one event of each user."""
        weights: Sequence[torch.Tensor] = self.rnn.all_weights[0]  # w_ih, w_hh, b_ih, b_hh of the one layer
        return torch.gru_cell(inputs, hidden_NH, *weights)

    def forward(self, inputs_NTF: torch.Tensor, hidden_NH: torch.Tensor | None = None) -> torch.Tensor:
        """(N, T, H) hidden state after each event of whole sequences, for training."""
        out_NTH, _ = self.rnn(inputs_NTF, None if hidden_NH is None else hidden_NH.unsqueeze(0))
        return out_NTH  # type: ignore[no-any-return]


class Network(nn.Module):
    """Encoder and heads: one MLP trunk on (hidden state, readout), one linear head of hazard logits an event set."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = Encoder(shape)
        self.head = nn.Sequential(
            nn.Linear(shape.hidden + READOUT_SIZE, shape.head),
            nn.ReLU(),
            nn.Dropout(shape.dropout),
            nn.Linear(shape.head, shape.sets * shape.bins),
        )
        with torch.no_grad():
            final = self.head[-1]
            assert isinstance(final, nn.Linear)
            final.bias.fill_(-3.0)  # hazards are rare: start near their size rather than at one half

    def logits(self, hidden_NH: torch.Tensor, readout_NR: torch.Tensor) -> torch.Tensor:
        """(N, K, B) hazard logits."""
        out: torch.Tensor = self.head(torch.cat([hidden_NH, readout_NR], dim=-1))
        return out.view(-1, self.shape.sets, self.shape.bins)

    def inputs(self, features: StepFeatures) -> torch.Tensor:
        """(N, 39) the encoder's inputs on the network's device, from numpy columns."""
        columns = (features.slot, features.item, features.category, features.numeric)
        return self.encoder.inputs(*(torch.from_numpy(c).to(self.device) for c in columns))

    @torch.inference_mode()
    def step(self, hidden_NH: NDArray[np.float32], features: StepFeatures) -> torch.Tensor:
        """(N, H) on the network's device: the worker's step, from numpy columns."""
        return self.encoder.step(torch.from_numpy(hidden_NH).to(self.device), self.inputs(features))

    @property
    def device(self) -> torch.device:
        return self.encoder.type_embedding.weight.device
