"""The rhythm cell: when a user tends to come back, learned as a mixture of renewal processes, beside the encoder's units.

For each event set that is asked about, a user belongs to one of C classes. Each has a distribution of the gaps between two visits, of any
form: sharp peaks at 7 and 14 days of somebody who shops weekly and at times skips, a smooth fall of somebody who comes at random, and a
share that never ends of those who leave. (Renewal processes: Cox 1962; a mixture of them, with now and then a change of class, is a hidden
semi-Markov model: Yu, Artificial Intelligence 174, 2010.) The belief cell (`model.belief`) cannot say this: its states forget how long a
silence has lasted.

What is believed of a user is a distribution w over the classes. A gap that ends multiplies it by each class's mass at the gap's length,
and a silence of x that goes on, by each class's survival S; no event comes within u with the probability sum w S(x + u) / sum w S(x). Gaps
have LEVELS lengths, whole days among their ends, so that every step and every answer is a row of a table.

A visit is an event of the set after more than VISIT_GAP_MS without one; that a visit goes on is as likely in all classes (level 0). The
wait for a set's first event, from a user's first event of any kind, has a distribution of its own ("first": kind 0; gaps: kind 1).

At rest a belief is its square root, in [0, 1]; all zeros: nothing is known yet.

Axis letters: N users or events, K event sets, C classes, I kinds, G levels, B bins of the hazard grid, V slots of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.belief import weighted
from model.hazards import DAY_MS, HOUR_MS
from model.statistics import EPOCH_2000_MS, SLOTS, VISIT_GAP_MS


def _ends_ms() -> NDArray[np.int64]:
    """Fine enough for a jitter of a few per cent; from a day on, whole days are ends, as many files know days only."""
    hours = HOUR_MS // 2 * 2 ** (np.arange(45) / 8)
    days = np.concatenate([np.arange(24, 96, 2), np.arange(96, 384, 6), np.arange(384, 1536, 24)]) * float(HOUR_MS)
    weeks = np.unique(np.round(64 * 2 ** (np.arange(60) / 16))) * DAY_MS
    return np.unique(np.concatenate([hours[hours < DAY_MS], days, weeks]).astype(np.int64))


ENDS_MS = _ends_ms()
"""Where a level ends: a gap of exactly that belongs to it."""
LEVELS = len(ENDS_MS) + 1
"""The last one is of gaps longer than all of these."""
KINDS = 2
LEAST_ODDS = 1e-6
"""Of a hazard: beyond what is seen, none is certain."""
_ENDS_SECONDS = ENDS_MS // 1000
_ASKED_MS = np.concatenate([[0], (ENDS_MS[:-1] + ENDS_MS[1:]) // 2, ENDS_MS[-1:]])
"""The silence that stands for a level."""


class Visits:
    """How the users' statistics say which gaps end and how long silences last. members_KV: which slots an event set has.

    member_VK: the same as booleans.
    """

    def __init__(self, members_KV: Sequence[NDArray[np.float32]] | NDArray[np.float32]) -> None:
        self.member_VK = np.array(members_KV, bool).reshape(-1, SLOTS).T
        self._slots = [np.flatnonzero(member_V) for member_V in self.member_VK.T]

    def gaps(self, before: NDArray[np.void], slot: NDArray[np.int64], time_ms: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N, K) which gap an event ends: 0 none, else one more than kind * LEVELS + level. before: (N,) each user's statistics then."""
        seconds_NK, first_NK = self._silent(before, time_ms)
        ends = self.member_VK[slot] & (before["count"] > 0)[:, None] & (first_NK | (seconds_NK > VISIT_GAP_MS // 1000))
        return np.where(ends, 1 + np.where(first_NK, 0, LEVELS) + np.searchsorted(_ENDS_SECONDS, seconds_NK), 0)

    def silences(self, stats: NDArray[np.void], at_ms: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N, K) kind * LEVELS + level of the silence at a moment. stats: (N,) the users' statistics after their last event."""
        seconds_NK, first_NK = self._silent(stats, at_ms)
        return np.where(first_NK, 0, LEVELS) + np.searchsorted(_ENDS_SECONDS, seconds_NK)

    def _silent(self, stats: NDArray[np.void], at_ms: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(N, K) seconds since each set's last event, or else since the user's first of any kind; whether it is since that."""
        if not self._slots:
            return np.zeros((len(stats), 0), np.int64), np.zeros((len(stats), 0), bool)
        now = (np.maximum(at_ms, stats["last_ms"]) - EPOCH_2000_MS) // 1000
        last_seconds = stats["last_seconds"]
        last_NK = np.stack([last_seconds[:, slots].max(1, initial=0) for slots in self._slots], 1).astype(np.int64)
        first_NK = last_NK == 0
        begin_NK = np.where(first_NK, ((stats["first_ms"] - EPOCH_2000_MS) // 1000)[:, None], last_NK)
        return np.maximum(now[:, None] - begin_NK, 0), first_NK


NO_VISITS = Visits([])


class Rhythm(nn.Module):
    """Tables of a mixture for each of K event sets; `trainer.rhythm` fits them.

    survival_KICG: P(gap > the level's end). prior_KC: shares of the classes. switch_K: chance that a visit ends a class.
    """

    survival_KICG: torch.Tensor
    prior_KC: torch.Tensor
    switch_K: torch.Tensor
    mass_KXC: torch.Tensor

    def __init__(self, sets: int, classes: int) -> None:
        super().__init__()
        self.sets, self.classes = sets, classes
        self.register_buffer("survival_KICG", torch.linspace(1, 0.5, LEVELS + 1)[1:].repeat(sets, KINDS, classes, 1))
        self.register_buffer("prior_KC", torch.full((sets, classes), 1 / classes))
        self.register_buffer("switch_K", torch.full((sets,), 0.02))
        self.register_buffer("mass_KXC", torch.empty(0), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())  # type: ignore[no-untyped-call]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make what is derived from the tables anew. Loading does it by itself."""
        mass_KICG = (_lasted(self.survival_KICG) - self.survival_KICG).clamp(min=1e-9)
        no_gap = torch.ones_like(mass_KICG[:, 0, :1, :1]).expand(-1, -1, self.classes)
        self.mass_KXC = torch.cat([no_gap, mass_KICG.permute(0, 1, 3, 2).flatten(1, 2)], 1).contiguous()

    def believed(self, root_NY: torch.Tensor) -> torch.Tensor:
        """(N, K, C) distribution over the classes."""
        w_NKC = root_NY.view(-1, self.sets, self.classes) ** 2
        return torch.where(w_NKC.sum(2, keepdim=True) > 0.5, w_NKC, self.prior_KC)

    def step(self, root_NY: torch.Tensor, gap_NK: torch.Tensor) -> torch.Tensor:
        """(N, K C) root of the belief after one event of each user, from that before it. gap_NK: what it ends (`Visits.gaps`)."""
        w_NKC = self.believed(root_NY)
        mass_RC = self.mass_KXC.flatten(0, 1)
        after_NKC = w_NKC * mass_RC.index_select(0, self._rows(gap_NK, self.mass_KXC.shape[1])).view_as(w_NKC)
        after_NKC /= after_NKC.sum(2, keepdim=True)
        ended_NK1 = (gap_NK > 0).unsqueeze(2)
        return after_NKC.lerp_(self.prior_KC, self.switch_K[:, None] * ended_NK1).sqrt_().flatten(1)

    @torch.no_grad()
    def outlook(self, edges_ms: Sequence[int]) -> torch.Tensor:
        """(K I G, C, E) P(the silence lasts until it is of a level, and from then on until each edge), of which the first is 0."""
        ends_ms = np.concatenate([[0], ENDS_MS]).astype(np.float64)
        until_GE = _ASKED_MS[:, None] + np.concatenate([[0], np.asarray(edges_ms)]).astype(np.float64)
        level_GE = np.clip(np.searchsorted(ends_ms, until_GE), 1, len(ENDS_MS))
        begin_GE, end_GE = ends_ms[level_GE - 1], ends_ms[level_GE]
        share_GE = torch.from_numpy(np.clip((until_GE - begin_GE) / (end_GE - begin_GE), 0, 1)).to(self.prior_KC)
        index_GE = torch.from_numpy(level_GE - 1).to(self.prior_KC.device)
        before, after = _lasted(self.survival_KICG)[..., index_GE], self.survival_KICG[..., index_GE]
        return (before + share_GE * (after - before)).transpose(2, 3).flatten(0, 2).contiguous()

    def base(self, root_NY: torch.Tensor, silence_NK: torch.Tensor, lasts_RCE: torch.Tensor) -> torch.Tensor:
        """(N, K B) hazard logits that follow from the rhythm. silence_NK: as `Visits.silences`; lasts_RCE: as `outlook`."""
        row = self._rows(silence_NK, KINDS * LEVELS)
        lasts_NKE = weighted(self.believed(root_NY).flatten(0, 1), lasts_RCE, row).view(len(root_NY), self.sets, lasts_RCE.shape[2])
        lasts_NKE = lasts_NKE.clamp_(min=1e-12)
        return torch.log((lasts_NKE[..., :-1] / lasts_NKE[..., 1:]).sub_(1).clamp_(LEAST_ODDS, 1 / LEAST_ODDS)).flatten(1)

    def _rows(self, row_NK: torch.Tensor, each: int) -> torch.Tensor:
        """(N K) rows of the tables of all sets, one after the other, of `each` rows."""
        return (row_NK + torch.arange(self.sets, device=row_NK.device) * each).flatten()


def _lasted(survival_KICG: torch.Tensor) -> torch.Tensor:
    """P(gap > the level's begin)."""
    return torch.cat([torch.ones_like(survival_KICG[..., :1]), survival_KICG[..., :-1]], -1)
