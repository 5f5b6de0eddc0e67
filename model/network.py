"""The network: an encoder stepped once an event, and a head asked at any moment.

The encoder is recurrent units of one of ENCODERS, and beside them a belief cell (see `model.belief`). Its state at rest lies in [-1, 1]
and holds the units' hidden state, an LSTM's cells, and the root of the belief, in this order.

Shapes: N users or events, T steps, F inputs, H hidden units, Z size of the state, S latent states of the belief, G its levels of
silence, V slots of the vocabulary, K event sets, B bins of the hazard grid, R readout of the statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.belief import Belief, levels
from model.clock import EVEN, Clock
from model.features import CATEGORY_BUCKETS, ITEM_BUCKETS, NUMERIC, StepFeatures, Vocabulary
from model.hazards import DAY_MS
from model.statistics import READOUT_SIZE, SLOTS, STATISTICS, readout, readout_columns
from model.targets import ANY

ENCODERS = ("gru", "lstm", "rnn")
CELL_LIMIT = 8.0
"""An LSTM's cells are clipped to this (as LSTMP has it: Sak et al., arXiv 1402.1128), so that they can be stored in fixed point."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network. hidden: recurrent units; head: units of each head's hidden layer; dropout: share dropped in training;
    encoder: one of ENCODERS; belief: latent states of the belief cell, 0 for none."""

    hidden: int = 64
    head: int = 64
    sets: int = 2
    bins: int = 16
    dropout: float = 0.2
    encoder: str = "gru"
    belief: int = 0

    @property
    def recurrent(self) -> int:
        """Size of the recurrent units' state: an LSTM has cells beside its hidden units."""
        return self.hidden * (2 if self.encoder == "lstm" else 1)


class Encoder(nn.Module):
    """Event embeddings, recurrent units (GRU: Cho et al., arXiv 1406.1078; LSTM: Hochreiter & Schmidhuber 1997; plain RNN: Elman 1990),
    and the belief cell. A hidden state lies in [-1, 1]: it is a tanh, or a mix of them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        if shape.encoder not in ENCODERS:
            raise ValueError(f"this streamscore knows no encoder {shape.encoder!r}; it has: {', '.join(ENCODERS)}")
        self.shape = shape
        self.type_embedding = nn.Embedding(SLOTS, 12)
        self.item_embedding = nn.Embedding(ITEM_BUCKETS + 1, 8)
        self.category_embedding = nn.Embedding(CATEGORY_BUCKETS + 1, 8)
        kind = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}[shape.encoder]
        self.rnn: nn.RNNBase = kind(12 + 8 + 8 + NUMERIC, shape.hidden, batch_first=True)
        self.belief = Belief(shape.belief) if shape.belief else None

    def inputs(self, slot: torch.Tensor, item: torch.Tensor, category: torch.Tensor, numeric: torch.Tensor) -> torch.Tensor:
        """(..., F) the recurrent units' inputs."""
        return torch.cat([self.type_embedding(slot), self.item_embedding(item), self.category_embedding(category), numeric], dim=-1)

    def step(self, state_NZ: torch.Tensor, inputs_NF: torch.Tensor, slot_N: torch.Tensor, level_N: torch.Tensor) -> torch.Tensor:
        """(N, Z) state after one event of each user, from that before it. level_N: of the silence between (`model.belief.levels`)."""
        recurrent = self.step_units(state_NZ[:, : self.shape.recurrent], inputs_NF)
        if self.belief is None:
            return recurrent
        return torch.cat([recurrent, self.belief.step(state_NZ[:, self.shape.recurrent :], slot_N, level_N)], dim=1)

    def step_units(self, state: torch.Tensor, inputs_NF: torch.Tensor) -> torch.Tensor:
        """The recurrent units' part of `step`."""
        weights: Sequence[torch.Tensor] = self.rnn.all_weights[0]  # w_ih, w_hh, b_ih, b_hh of the one layer
        if self.shape.encoder == "gru":
            return torch.gru_cell(inputs_NF, state, *weights)
        if self.shape.encoder == "rnn":
            return torch.rnn_tanh_cell(inputs_NF, state, *weights)
        hidden, cells = state[:, : self.shape.hidden], state[:, self.shape.hidden :]
        hidden, cells = torch.lstm_cell(inputs_NF, (hidden, cells * CELL_LIMIT), *weights)
        return torch.cat([hidden, cells.clamp(-CELL_LIMIT, CELL_LIMIT) / CELL_LIMIT], dim=1)


class Network(nn.Module):
    """Encoder and heads: one MLP trunk, one linear head of hazard logits an event set.

    With a belief cell, the trunk sees the belief and the logits of the hazards that follow from it; where trust is 1 and not 0, the heads'
    logits are added to these.
    members_KV: which slots an event set has; edges_days: (B,) the grid; `ask` sets them.
    """

    members_KV: torch.Tensor
    edges_days: torch.Tensor
    trust: torch.Tensor
    falls_SX: torch.Tensor
    survives_SX: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = Encoder(shape)
        answers = shape.sets * shape.bins
        self.head = nn.Sequential(
            nn.Linear(shape.hidden + (shape.belief + answers if shape.belief else 0) + READOUT_SIZE, shape.head),
            nn.ReLU(),
            nn.Dropout(shape.dropout),
            nn.Linear(shape.head, answers),
        )
        with torch.no_grad():
            final = self.head[-1]
            assert isinstance(final, nn.Linear)
            final.bias.fill_(-3.0)  # hazards are rare: start near their size rather than at one half
            if shape.belief:  # the belief says their size: start from it
                final.bias.zero_()
                final.weight.zero_()
        if shape.belief:
            self.register_buffer("members_KV", torch.ones(shape.sets, SLOTS))
            self.register_buffer("edges_days", torch.arange(1.0, shape.bins + 1))
            self.register_buffer("trust", torch.ones(()))
            for name in ("falls_SX", "survives_SX"):
                self.register_buffer(name, torch.empty(shape.belief, answers), persistent=False)
            self.register_load_state_dict_pre_hook(_with_trust)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_post_hook(lambda module, _: module.refresh())  # type: ignore[no-untyped-call]
            self.refresh()

    @property
    def state_size(self) -> int:
        """Z, numbers of a user's state."""
        return self.shape.recurrent + self.shape.belief

    def ask(self, sets: Sequence[Sequence[str]], edges_ms: Sequence[int], vocabulary: Vocabulary) -> None:
        """Say what the heads are about: K event sets, whose types have slots in the vocabulary, on the grid of B bins."""
        if self.encoder.belief is None:
            return
        members = torch.zeros(len(sets), SLOTS)
        for k, types in enumerate(sets):
            members[k, [*range(SLOTS)] if ANY in types else [vocabulary.types.index(t) + 1 for t in types]] = 1
        self.members_KV.copy_(members)
        self.edges_days.copy_(torch.tensor([e / DAY_MS for e in edges_ms]))
        self.refresh()

    @property
    def edges_ms(self) -> list[int]:
        """(B,) the grid that `ask` has set, where there is a belief cell."""
        return [round(days * DAY_MS) for days in self.edges_days.tolist()]

    def refresh(self) -> None:
        """Make what is derived from the belief cell's parameters anew. Loading does it by itself."""
        if self.encoder.belief is not None:
            self.encoder.belief.refresh()
            self.falls_SX, self.survives_SX = self.encoder.belief.outlook(self.members_KV, self.edges_days)

    def logits(
        self, state_NZ: torch.Tensor, readout_NR: torch.Tensor, level_N: torch.Tensor, head: nn.Module | None = None
    ) -> torch.Tensor:
        """(N, K, B) hazard logits of users who have been silent for level_N (`model.belief.levels`) since the event of their state."""
        belief = self.encoder.belief
        believed_NS = None if belief is None else belief.after_silence(state_NZ[:, self.shape.recurrent :], level_N)
        return self.answer(state_NZ[:, : self.shape.hidden], believed_NS, readout_NR, head)

    def answer(
        self, hidden_NH: torch.Tensor, believed_NS: torch.Tensor | None, readout_NR: torch.Tensor, head: nn.Module | None = None
    ) -> torch.Tensor:
        """(N, K, B) hazard logits. believed_NS: the belief at the moment asked, where there is a belief cell. head: a `narrow_head`, if the
        readout is of fewer slots."""
        head = head or self.head
        if believed_NS is None:
            out: torch.Tensor = head(torch.cat([hidden_NH, readout_NR], dim=1))
        else:
            base_NX = self.base(believed_NS)
            out = self.trust * base_NX + head(torch.cat([hidden_NH, believed_NS.sqrt(), base_NX / 5, readout_NR], dim=1))
        return out.view(-1, self.shape.sets, self.shape.bins)

    def base(self, believed_NS: torch.Tensor) -> torch.Tensor:
        """(N, K B) hazard logits that follow from a belief."""
        return torch.log((believed_NS @ self.falls_SX) / (believed_NS @ self.survives_SX))

    @torch.no_grad()
    def narrow_head(self, slots: int) -> nn.Module:
        """The head as it is now, for readouts of so many slots: what it makes of the others, the same for everybody, is in its bias."""
        first = self.head[0]
        assert isinstance(first, nn.Linear)
        others = first.in_features - READOUT_SIZE
        columns = readout_columns(slots)
        empty_R = readout(np.zeros(1, STATISTICS), np.zeros(1, np.int64), self.device)[0]
        empty_R[columns] = 0
        narrow = nn.Linear(others + len(columns), first.out_features, device=self.device)
        narrow.weight.copy_(torch.cat([first.weight[:, :others], first.weight[:, others + columns]], dim=1))
        narrow.bias.copy_(first.bias + first.weight[:, others:] @ empty_R)
        return nn.Sequential(narrow, *self.head[1:])

    def inputs(self, features: StepFeatures) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The encoder's inputs of events on the network's device, from numpy columns: as `Encoder.step` takes them."""
        device = self.device
        names = ("slot", "item", "category", "numeric")
        slot, item, category, numeric = (torch.from_numpy(np.ascontiguousarray(getattr(features, n))).to(device) for n in names)
        gap_ms = self.clock.elapsed_ms(features.time_ms - features.gap_ms, features.time_ms)
        return self.encoder.inputs(slot, item, category, numeric), slot, torch.from_numpy(levels(gap_ms)).to(device)

    @torch.inference_mode()
    def step(self, state_NZ: NDArray[np.float32], features: StepFeatures) -> torch.Tensor:
        """(N, Z) on the network's device: the worker's step, from numpy columns."""
        return self.encoder.step(torch.from_numpy(state_NZ).to(self.device), *self.inputs(features))

    @property
    def clock(self) -> Clock:
        """By which silences are measured for the belief cell."""
        return EVEN if self.encoder.belief is None else self.encoder.belief.clock

    @property
    def device(self) -> torch.device:
        return self.encoder.type_embedding.weight.device


def _with_trust(network: Network, tensors: dict[str, torch.Tensor], *_: object) -> None:
    """Tensors that do not name the trust are from when there was no other."""
    tensors.setdefault("trust", torch.ones_like(network.trust))
