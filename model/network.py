"""The network: an encoder stepped once an event, and a head asked at any moment.

The encoder is recurrent units of one of ENCODERS, and beside them two cells that foresee hazards by themselves: a belief cell
(`model.belief`), of what users go through, and a rhythm cell (`model.rhythm`), of when they tend to come back. Its state at rest lies in
[-1, 1] and holds the units' hidden state, an LSTM's cells, and the roots of both cells' beliefs, in this order.

Shapes: N users or events, T steps, F inputs, H hidden units, Z size of the state, S latent states of the belief, G its levels of
silence, C classes of the rhythm, V slots of the vocabulary, K event sets, B bins of the hazard grid, X = K B, J cells, R readout of the
statistics.
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
from model.rhythm import NO_VISITS, Rhythm, Visits
from model.statistics import READOUT_SIZE, SLOTS, STATISTICS, readout, readout_columns
from model.targets import ANY

ENCODERS = ("gru", "lstm", "rnn")
CELL_LIMIT = 8.0
"""An LSTM's cells are clipped to this (as LSTMP has it: Sak et al., arXiv 1402.1128), so that they can be stored in fixed point."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network. hidden: recurrent units; head: units of each head's hidden layer; dropout: share dropped in training;
    encoder: one of ENCODERS; belief: latent states of the belief cell, rhythm: classes of the rhythm cell for each set; 0 for no cell."""

    hidden: int = 64
    head: int = 64
    sets: int = 2
    bins: int = 16
    dropout: float = 0.2
    encoder: str = "gru"
    belief: int = 0
    rhythm: int = 0

    @property
    def cells(self) -> int:
        """J."""
        return (self.belief > 0) + (self.rhythm > 0)

    @property
    def foreseen(self) -> int:
        """What heads are told by the cells, in numbers: the belief itself, and the hazards that follow from each."""
        return self.belief + self.cells * self.sets * self.bins

    @property
    def recurrent(self) -> int:
        """Size of the recurrent units' state: an LSTM has cells beside its hidden units."""
        return self.hidden * (2 if self.encoder == "lstm" else 1)


@dataclass(frozen=True, slots=True)
class Silence:
    """How long N users have been silent, as the cells take it. level_N: `model.belief.levels`; silence_NK: `model.rhythm.Visits`."""

    level_N: torch.Tensor
    silence_NK: torch.Tensor

    def __getitem__(self, rows: torch.Tensor | slice) -> Silence:
        return Silence(self.level_N[rows], self.silence_NK[rows])

    def to(self, device: torch.device) -> Silence:
        return Silence(self.level_N.to(device), self.silence_NK.to(device))


class Encoder(nn.Module):
    """Event embeddings, recurrent units (GRU: Cho et al., arXiv 1406.1078; LSTM: Hochreiter & Schmidhuber 1997; plain RNN: Elman 1990),
    the belief cell and the rhythm cell. A hidden state lies in [-1, 1]: it is a tanh, or a mix of them."""

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
        self.rhythm = Rhythm(shape.sets, shape.rhythm) if shape.rhythm else None

    def inputs(self, slot: torch.Tensor, item: torch.Tensor, category: torch.Tensor, numeric: torch.Tensor) -> torch.Tensor:
        """(..., F) the recurrent units' inputs."""
        return torch.cat([self.type_embedding(slot), self.item_embedding(item), self.category_embedding(category), numeric], dim=-1)

    def step(
        self, state_NZ: torch.Tensor, inputs_NF: torch.Tensor, slot_N: torch.Tensor, level_N: torch.Tensor, gap_NK: torch.Tensor
    ) -> torch.Tensor:
        """(N, Z) state after one event of each user, from that before it. level_N: of the silence between (`model.belief.levels`);
        gap_NK: what it ends (`model.rhythm.Visits`)."""
        recurrent, root_NS, root_NY = self.split(state_NZ)
        parts = [self.step_units(recurrent, inputs_NF)]
        if self.belief is not None:
            parts.append(self.belief.step(root_NS, slot_N, level_N))
        if self.rhythm is not None:
            parts.append(self.rhythm.step(root_NY, gap_NK))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def split(self, state_NZ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The recurrent units' state, and the roots of the belief and of the rhythm."""
        recurrent, root_NS, root_NY = state_NZ.tensor_split((self.shape.recurrent, self.shape.recurrent + self.shape.belief), dim=1)
        return recurrent, root_NS, root_NY

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

    The trunk sees the belief, and the logits of the hazards that follow from each cell. trust_JK says how much of these is added to what
    the heads say: of the belief's, and of the rhythm's.
    members_KV: which slots an event set has; edges_days: (B,) the grid; `ask` sets them.
    """

    members_KV: torch.Tensor
    edges_days: torch.Tensor
    trust_JK: torch.Tensor
    falls_SX: torch.Tensor
    survives_SX: torch.Tensor
    lasts_RCE: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = Encoder(shape)
        self.visits: Visits = NO_VISITS
        """Of the sets that the rhythm cell follows; of none, where there is no such cell."""
        answers = shape.sets * shape.bins
        self.head = nn.Sequential(
            nn.Linear(shape.hidden + shape.foreseen + READOUT_SIZE, shape.head),
            nn.ReLU(),
            nn.Dropout(shape.dropout),
            nn.Linear(shape.head, answers),
        )
        with torch.no_grad():
            final = self.head[-1]
            assert isinstance(final, nn.Linear)
            final.bias.fill_(-3.0)  # hazards are rare: start near their size rather than at one half
            if shape.cells:  # a cell says their size: start from it
                final.bias.zero_()
                final.weight.zero_()
        if shape.cells:
            self.register_buffer("members_KV", torch.ones(shape.sets, SLOTS))
            self.register_buffer("edges_days", torch.arange(1.0, shape.bins + 1))
            self.register_buffer("trust_JK", torch.eye(shape.cells)[0].unsqueeze(1).repeat(1, shape.sets))
            for name in ("falls_SX", "survives_SX", "lasts_RCE"):
                self.register_buffer(name, torch.empty(0), persistent=False)
            self.register_load_state_dict_pre_hook(_with_trust)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_post_hook(lambda module, _: module.refresh())  # type: ignore[no-untyped-call]
            self.refresh()

    @property
    def state_size(self) -> int:
        """Z, numbers of a user's state."""
        return self.shape.recurrent + self.shape.belief + self.shape.sets * self.shape.rhythm

    def ask(self, sets: Sequence[Sequence[str]], edges_ms: Sequence[int], vocabulary: Vocabulary) -> None:
        """Say what the heads are about: K event sets, whose types have slots in the vocabulary, on the grid of B bins."""
        if not self.shape.cells:
            return
        self.members_KV.copy_(torch.from_numpy(members(sets, vocabulary)))
        self.edges_days.copy_(torch.tensor([e / DAY_MS for e in edges_ms]))
        self.refresh()

    @property
    def edges_ms(self) -> list[int]:
        """(B,) the grid that `ask` has set, where there is a cell."""
        return [round(days * DAY_MS) for days in self.edges_days.tolist()]

    def refresh(self) -> None:
        """Make what is derived from the cells' parameters anew. Loading does it by itself."""
        if self.encoder.belief is not None:
            self.encoder.belief.refresh()
            self.falls_SX, self.survives_SX = self.encoder.belief.outlook(self.members_KV, self.edges_days)
        if self.encoder.rhythm is not None:
            self.encoder.rhythm.refresh()
            self.visits = Visits(self.members_KV.cpu().numpy())
            self.lasts_RCE = self.encoder.rhythm.outlook(self.edges_ms)

    def logits(self, state_NZ: torch.Tensor, readout_NR: torch.Tensor, silence: Silence, head: nn.Module | None = None) -> torch.Tensor:
        """(N, K, B) hazard logits of users who have been silent since the event of their state."""
        _, root_NS, root_NY = self.encoder.split(state_NZ)
        return self.answer(state_NZ[:, : self.shape.hidden], *self.foresee(root_NS, root_NY, silence), readout_NR, head)

    def answer(
        self,
        hidden_NH: torch.Tensor,
        believed_NS: torch.Tensor,
        base_NJX: torch.Tensor,
        readout_NR: torch.Tensor,
        head: nn.Module | None = None,
    ) -> torch.Tensor:
        """(N, K, B) hazard logits. believed_NS, base_NJX: as `foresee` has them. head: a `narrow_head`, if the readout is narrow."""
        out: torch.Tensor = (head or self.head)(torch.cat([hidden_NH, told(believed_NS, base_NJX), readout_NR], dim=1))
        return self.trusting(out, base_NJX).view(-1, self.shape.sets, self.shape.bins)

    def trusting(self, logits_NX: torch.Tensor, base_NJX: torch.Tensor) -> torch.Tensor:
        """(N, X) the logits of a head, and beside them what follows from the cells as far as they are trusted."""
        for j in range(base_NJX.shape[1]):
            logits_NX = torch.addcmul(logits_NX, base_NJX[:, j], self.trust_JK[j].repeat_interleave(self.shape.bins))
        return logits_NX

    def foresee(self, root_NS: torch.Tensor, root_NY: torch.Tensor, silence: Silence) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, S) the belief at the moment asked, and (N, J, X) the hazard logits that follow from each cell, from the cells' states."""
        believed_NS, base = root_NS, list[torch.Tensor]()
        if self.encoder.belief is not None:
            believed_NS = self.encoder.belief.after_silence(root_NS, silence.level_N)
            base.append(self.base(believed_NS))
        if self.encoder.rhythm is not None:
            base.append(self.encoder.rhythm.base(root_NY, silence.silence_NK, self.lasts_RCE))
        return believed_NS, torch.stack(base, 1) if base else root_NS.new_empty(len(root_NS), 0, 0)

    def base(self, believed_NS: torch.Tensor) -> torch.Tensor:
        """(N, X) hazard logits that follow from a belief."""
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

    def inputs(self, features: StepFeatures, gap_NK: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        """The encoder's inputs of events on the network's device, as `Encoder.step` takes them. gap_NK: `visits.gaps` that they end."""
        device = self.device
        names = ("slot", "item", "category", "numeric")
        slot, item, category, numeric = (torch.from_numpy(np.ascontiguousarray(getattr(features, n))).to(device) for n in names)
        gap_ms = self.clock.elapsed_ms(features.time_ms - features.gap_ms, features.time_ms)
        return self.encoder.inputs(slot, item, category, numeric), slot, *(torch.from_numpy(x).to(device) for x in (levels(gap_ms), gap_NK))

    @torch.inference_mode()
    def step(self, state_NZ: NDArray[np.float32], features: StepFeatures, before: NDArray[np.void]) -> torch.Tensor:
        """(N, Z) on the network's device: the worker's step, from numpy columns. before: (N,) each user's statistics before the event."""
        gap_NK = self.visits.gaps(before, features.slot, features.time_ms)
        return self.encoder.step(torch.from_numpy(state_NZ).to(self.device), *self.inputs(features, gap_NK))

    @property
    def clock(self) -> Clock:
        """By which silences are measured for the belief cell."""
        return EVEN if self.encoder.belief is None else self.encoder.belief.clock

    @property
    def device(self) -> torch.device:
        return self.encoder.type_embedding.weight.device


def members(sets: Sequence[Sequence[str]], vocabulary: Vocabulary) -> NDArray[np.float32]:
    """(K, V) which slots an event set has."""
    member_KV = np.zeros((len(sets), SLOTS), np.float32)
    for k, types in enumerate(sets):
        member_KV[k, [*range(SLOTS)] if ANY in types else [vocabulary.types.index(t) + 1 for t in types]] = 1
    return member_KV


def silence_of(stats: NDArray[np.void], at_ms: NDArray[np.int64], clock: Clock, visits: Visits) -> Silence:
    """Of users with `stats` (N,) at moments (N,); before their last event there is none."""
    at_ms = np.maximum(at_ms, stats["last_ms"])
    level_N = torch.from_numpy(levels(clock.elapsed_ms(stats["last_ms"], at_ms)))
    return Silence(level_N, torch.from_numpy(visits.silences(stats, at_ms)))


def told(believed_NS: torch.Tensor, base_NJX: torch.Tensor) -> torch.Tensor:
    """(N, S + J X) what heads are told by the cells."""
    return torch.cat([believed_NS.sqrt(), base_NJX.flatten(1) / 5], dim=1)


def _with_trust(network: Network, tensors: dict[str, torch.Tensor], *_: object) -> None:
    """Tensors that do not name the trust are from when there was no other; those that name one, from when there was one cell."""
    tensors.setdefault("trust_JK", tensors.pop("trust", torch.ones(())).expand(1, network.shape.sets).clone())
