"""The belief cell: a learned continuous-time hidden Markov model of the stream, as a recurrence beside the encoder's.

A user is in one of S latent states. From state i, silent moves to j come at the rate D0[i, j] and events of slot k that lead to j at
D_k[i, j]; the rows of D0 + sum D_k are zero (a marked Markovian arrival process: Neuts 1979; Asmussen & Koole 1993). With b what is
believed of a user, a distribution over the states, a silence of d turns it into b exp(D0 d), and an event of slot k into b D_k, each time
normalised. The normalisers are the likelihood of types and times, from which `trainer.belief` learns the rates. No event of a set A
comes within H with the probability b exp((D0 + sum of D_k, k not in A) H) 1: that is the base of the hazards, which the head corrects.

Silences are measured on the stream's own clock (`model.clock`), on which users are as lively at night as in the evening. They are rounded
to LEVELS on a logarithmic scale (2 per cent), so that every exponential and every product with an event's matrix is computed once, when the
weights are loaded; a step is then one small product. Each octave is the square of the one before it: only positive numbers are multiplied,
whatever the rates.

At rest a belief is its square root, which lies in [0, 1]: 15 bits of it resolve probabilities of 1e-9. All zeros: no event yet.

Axis letters: N users or events, S states, V slots of the vocabulary, G levels of silence, K event sets, B bins of the hazard grid.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import embedding_bag

from model.clock import HOURS, Clock
from model.hazards import DAY_MS
from model.statistics import SLOTS

SHORTEST_MS = 20_000
PER_OCTAVE = 16
LEVELS = 24 * PER_OCTAVE
"""Of silence, from SHORTEST_MS to ten years."""
LEVEL_MS = SHORTEST_MS * 2 ** (np.arange(LEVELS) / PER_OCTAVE)
_BOUNDS_MS = np.floor(np.sqrt(LEVEL_MS[:-1] * LEVEL_MS[1:])).astype(np.int64)
SLOWEST, FASTEST = 1e-6, 2000.0
"""Rates a day that a state can have: events at one and the same time must not make them infinite."""


def levels(silent_ms: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) level of each silence."""
    return np.searchsorted(_BOUNDS_MS, silent_ms)


class Belief(nn.Module):
    """Parameters of the process, and the tables that are made of them.

    log_rate (S, V), log_move (S, S) off the diagonal: per day; lead (V, S, S): logits of the state after an event;
    first (V, S): logits of the state after a user's first event. pace_W (168,): of the clock by which silences are measured.
    silence_GSS: exp(D0 t); event_CSS: exp(D0 t) D_k, at C = level * (V + 1) + slot; "slot" V is no event.
    """

    pace_W: torch.Tensor
    silence_GSS: torch.Tensor
    event_CSS: torch.Tensor
    first_VS: torch.Tensor

    def __init__(self, states: int) -> None:
        super().__init__()
        self.states = states
        self.log_rate = nn.Parameter(torch.zeros(states, SLOTS))
        self.log_move = nn.Parameter(torch.full((states, states), -4.0))
        self.lead = nn.Parameter(4.0 * torch.eye(states).repeat(SLOTS, 1, 1))
        self.first = nn.Parameter(torch.zeros(SLOTS, states))
        self.register_buffer("pace_W", torch.ones(HOURS, dtype=torch.float64))
        for name, tensor in zip(("silence_GSS", "event_CSS", "first_VS"), self._empty(), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.register_load_state_dict_pre_hook(_with_pace)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())  # type: ignore[no-untyped-call]
        self.refresh()

    def _empty(self) -> tuple[torch.Tensor, ...]:
        s = self.states
        return torch.empty(LEVELS, s, s), torch.empty(LEVELS * (SLOTS + 1), s, s), torch.empty(SLOTS, s)

    def generators(self) -> tuple[torch.Tensor, torch.Tensor]:
        """D0 (S, S) and D (V, S, S), per day."""
        eye = torch.eye(self.states, device=self.lead.device)
        rate_SV = self.log_rate.clamp(np.log(SLOWEST), np.log(FASTEST)).exp()
        move_SS = self.log_move.clamp(np.log(SLOWEST), np.log(50.0)).exp() * (1 - eye)
        d_VSS = rate_SV.t().unsqueeze(2) * self.lead.softmax(2)
        return move_SS - torch.diag(move_SS.sum(1) + rate_SV.sum(1)), d_VSS

    def tables(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """silence_GSS, event_CSS and first_VS, differentiable."""
        d0_SS, d_VSS = self.generators()
        base_days = torch.tensor(LEVEL_MS[:PER_OCTAVE] / DAY_MS, dtype=d0_SS.dtype, device=d0_SS.device)
        octaves = [torch.linalg.matrix_exp(d0_SS * base_days.view(-1, 1, 1)).clamp(min=1e-12)]
        while len(octaves) * PER_OCTAVE < LEVELS:
            octaves.append((octaves[-1] @ octaves[-1]).clamp(min=1e-30))
        silence_GSS = torch.cat(octaves)
        marks_SX = torch.cat([d_VSS, torch.eye(self.states, device=d_VSS.device).unsqueeze(0)]).permute(1, 0, 2).flatten(1)
        event = (silence_GSS.flatten(0, 1) @ marks_SX).view(LEVELS, self.states, SLOTS + 1, self.states)
        return silence_GSS, event.transpose(1, 2).flatten(0, 1), self.first.softmax(1)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the tables anew after the parameters changed. Loading does it by itself."""
        self.silence_GSS, self.event_CSS, self.first_VS = (t.contiguous() for t in self.tables())
        self.clock = Clock(self.pace_W.cpu().numpy())

    def set_pace(self, pace_W: torch.Tensor) -> None:
        """Measure silences by another clock (`model.clock.pace_of`)."""
        self.pace_W.copy_(pace_W)
        self.clock = Clock(self.pace_W.cpu().numpy())

    def step(self, root_NS: torch.Tensor, slot_N: torch.Tensor, level_N: torch.Tensor) -> torch.Tensor:
        """(N, S) root of the belief after one event of each user, from that before it and the silence between them."""
        new = root_NS.sum(1) == 0
        after = weighted(root_NS * root_NS, self.event_CSS, level_N * (SLOTS + 1) + slot_N)
        after = torch.where(new.unsqueeze(1), self.first_VS[slot_N], after)
        return (after / after.sum(1, keepdim=True)).sqrt()

    def after_silence(self, root_NS: torch.Tensor, level_N: torch.Tensor) -> torch.Tensor:
        """(N, S) belief after a silence that goes on. A user without an event is believed to be anywhere."""
        before = root_NS * root_NS
        belief = before @ self.silence_GSS[0]  # most are asked right after an event
        late = level_N.nonzero().squeeze(1)
        belief[late] = weighted(before[late], self.silence_GSS, level_N[late])
        belief = belief + 1e-12
        return belief / belief.sum(1, keepdim=True)

    @torch.no_grad()
    def outlook(self, members_KV: torch.Tensor, edges_days: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """By state, (S, K * B) each: P(first event of a set falls into a bin), P(none up to the bin's end)."""
        d0_SS, d_VSS = (d.double() for d in self.generators())
        parts = []
        for member_V in members_KV.double():
            within = d0_SS + ((1 - member_V).view(-1, 1, 1) * d_VSS).sum(0)
            moments = torch.cat([edges_days.new_zeros(1), edges_days]).double().view(-1, 1, 1)
            parts.append(torch.linalg.matrix_exp(within * moments).sum(2).clamp(0, 1))  # (B + 1, S)
        survival_KBS = torch.stack(parts)
        falls = (survival_KBS[:, :-1] - survival_KBS[:, 1:]).clamp(min=1e-9)
        return tuple(t.flatten(0, 1).t().float().contiguous() for t in (falls, survival_KBS[:, 1:].clamp(min=1e-7)))  # type: ignore[return-value]


def _with_pace(belief: Belief, tensors: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    """Tensors that name no pace are from when silences were measured by the wall clock."""
    tensors.setdefault(f"{prefix}pace_W", torch.ones_like(belief.pace_W))


def weighted(weight_NS: torch.Tensor, table_RSE: torch.Tensor, row_N: torch.Tensor) -> torch.Tensor:
    """(N, E) each row of weights times its matrix (S, E) of a table. No matrix is copied, so on a CPU it takes a fifth of what indexing and
    `bmm` take."""
    size = table_RSE.shape[1]
    index_NS = row_N.unsqueeze(1) * size + torch.arange(size, device=row_N.device)
    return embedding_bag(index_NS, table_RSE.flatten(0, 1), per_sample_weights=weight_NS, mode="sum")
