"""Fitting the belief cell: the likelihood of whole streams, types and times and the silence at the end, by gradient.

The forward-backward recursion is written out: torch's own backward would keep and add a matrix a step. It needs little data, as every
gap between two events says something about the states, not only whether a purchase followed.

Axis letters as in `model.belief`; U users of a batch, N packed events (each user's, and the silence at the end).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.belief import Belief, levels
from model.hazards import DAY_MS
from model.statistics import SLOTS
from trainer.dataset import by_rank
from trainer.history import History

BATCH_EVENTS, LEAST_BATCHES = 12_288, 12
STEP_SIZE = 0.06
TRIAL = 10
"""Steps after which it is clear how many the budget lasts for."""
HELD_OUT, CHECK_STEPS = 10, 40
BLOCK = 8192
"""Moments taken at once."""


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, event_CSS: torch.Tensor, first_VS: torch.Tensor, slot_U: torch.Tensor, cell_N: torch.Tensor, sizes: Sequence[int]
    ) -> torch.Tensor:
        """Sum over users. sizes: users that have a t-th event after their first, falling; cell_N: rows of event_CSS, in that order."""
        matrix_NSS = event_CSS[cell_N]
        n, s = len(cell_N), event_CSS.shape[1]
        before_NS, after_NS, factor_N = torch.empty(n, s), torch.empty(n, s), torch.empty(n, 1)
        belief = first_VS[slot_U]
        begin = 0
        for size in sizes:
            rows = slice(begin, begin := begin + size)
            before_NS[rows] = belief = belief[:size]
            after = torch.bmm(belief.unsqueeze(1), matrix_NSS[rows]).squeeze(1)
            factor = torch.sum(after, 1, keepdim=True, out=factor_N[rows]).clamp_(min=1e-30)
            belief = torch.div(after, factor, out=after_NS[rows])
        ctx.save_for_backward(event_CSS, first_VS, slot_U, cell_N, matrix_NSS, before_NS, after_NS, factor_N)
        ctx.sizes = sizes
        return factor_N.log().sum()

    @staticmethod
    def backward(ctx: Any, d_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        event_CSS, first_VS, slot_U, cell_N, matrix_NSS, before_NS, after_NS, factor_N = ctx.saved_tensors
        d_raw_NS = torch.empty_like(after_NS)
        carried = torch.zeros(len(slot_U), first_VS.shape[1])
        end = len(cell_N)
        for size in reversed(ctx.sizes):
            rows = slice(end - size, end)
            end -= size
            d_after = carried[:size]
            inner = (d_after * after_NS[rows]).sum(1, keepdim=True)
            d_raw = torch.div(d_after - inner + d_total, factor_N[rows], out=d_raw_NS[rows])
            carried[:size] = torch.bmm(matrix_NSS[rows], d_raw.unsqueeze(2)).squeeze(2)
        d_event = torch.zeros_like(event_CSS).index_add_(0, cell_N, before_NS.unsqueeze(2) * d_raw_NS.unsqueeze(1))
        return d_event, torch.zeros_like(first_VS).index_add_(0, slot_U, carried), None, None, None


class Streams:
    """Users' streams up to `end_ms`, as cells of the belief's tables."""

    def __init__(self, history: History, slot: NDArray[np.int64], end_ms: int) -> None:
        last = ~np.append(history.has_previous[1:], False)
        next_ms = np.where(last, end_ms, np.append(history.time_ms[1:], end_ms))
        self.gap_ms = np.maximum(next_ms - history.time_ms, 0)
        mark = np.where(last, SLOTS, np.append(slot[1:], SLOTS))
        self.first, self.slot, self.history = history.first, slot, history
        self.cell = levels(self.gap_ms) * (SLOTS + 1) + mark  # of what comes after each event

    def log_likelihood(self, tables: tuple[torch.Tensor, ...], users: NDArray[np.int64]) -> tuple[torch.Tensor, int]:
        """Of some users, and how many events they have."""
        length = (self.first[1:] - self.first[:-1])[users]
        users = users[np.argsort(-length, kind="stable")]
        begin, length = self.first[users], np.sort(length)[::-1]
        sizes = np.searchsorted(-length, -np.arange(length[0]), side="left")
        step = np.repeat(np.arange(length[0]), sizes)
        row = np.arange(len(step)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        cell = torch.from_numpy(self.cell[begin[row] + step])
        total = _LogLikelihood.apply(tables[1], tables[2], torch.from_numpy(self.slot[begin]), cell, sizes.tolist())
        return total, len(cell)


def start(belief: Belief, streams: Streams, generator: torch.Generator) -> None:
    """Spread the states over kinds of users, from a hundredth of the usual pace to fifty times it, with some taste for types. Rates are
    taken by the mean gap between events, so that minutes and months begin alike."""
    history = streams.history
    gaps_days = float(streams.gap_ms.sum()) / DAY_MS / max(len(streams.gap_ms), 1)
    share_V = np.bincount(streams.slot, minlength=SLOTS) / max(len(history), 1)
    usual_V = torch.from_numpy(np.log(np.maximum(share_V, 1e-4) / max(gaps_days, 1e-6)))
    pace_S = torch.linspace(-5.0, 4.0, belief.states)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        belief.log_rate.copy_(usual_V + pace_S.unsqueeze(1) + 0.7 * noise(belief.log_rate))
        belief.log_move.copy_(np.log(0.3 / belief.states / max(gaps_days, 1e-6)) + 0.7 * noise(belief.log_move))
        belief.lead.copy_(2.0 * torch.eye(belief.states) + 0.5 * noise(belief.lead))
        belief.first.copy_(0.3 * noise(belief.first))
        belief.refresh()


def fit_belief(
    belief: Belief,
    streams: Streams,
    *,
    steps: int,
    rng: np.random.Generator,
    step_size: float = STEP_SIZE,
    budget_seconds: float = 600,
    progress: Callable[[float], None] = lambda share: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[float]:
    """Mean log-likelihood an event along the fitting; fewer steps where the first ones show that the budget does not last. One user in
    HELD_OUT takes no part: what did best on them is kept. Leaves the tables fresh."""
    begin, trail = clock(), []
    optimizer = torch.optim.Adam(belief.parameters(), lr=step_size, betas=(0.9, 0.98))
    users = len(streams.first) - 1
    batch_events = min(BATCH_EVENTS, max(len(streams.cell) // LEAST_BATCHES, 256))
    a_batch = max(1, round(batch_events / max(len(streams.cell) / users, 1)))
    order: NDArray[np.int64] = np.zeros(0, np.int64)
    shuffled = rng.permutation(users)
    held, taking_part = np.split(shuffled, [users // HELD_OUT])
    best, best_state = -np.inf, copy.deepcopy(belief.state_dict())
    i = 0
    while i < steps:
        for group in optimizer.param_groups:
            group["lr"] = step_size * min(1.0, i / steps * 20 + 0.1) * (0.02 + 0.49 * (1 + float(np.cos(np.pi * i / steps))))
        if len(order) < a_batch:
            order = rng.permutation(taking_part)
        taken, order = order[:a_batch], order[a_batch:]
        total, events = streams.log_likelihood(belief.tables(), taken)
        loss = -total / events
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(belief.parameters(), 1.0)
        optimizer.step()
        trail.append(-loss.item())
        i += 1
        progress(i / steps)
        if len(held) and (i % CHECK_STEPS == 0 or i >= steps):
            with torch.no_grad():
                total, events = streams.log_likelihood(belief.tables(), held)
            if total.item() / events > best:
                best, best_state = total.item() / events, copy.deepcopy(belief.state_dict())
        if i == TRIAL or clock() - begin > budget_seconds:
            lasts = int(budget_seconds / max((clock() - begin) / i, 1e-9))
            steps = max(min(steps, lasts), i)
    if best > -np.inf:
        belief.load_state_dict(best_state)
    belief.refresh()
    return trail


def believed(belief: Belief, streams: Streams, event: NDArray[np.int64], level_L: torch.Tensor) -> torch.Tensor:
    """(L, S) belief at moments after the `event`s (L,), stepped over each user's whole stream as a worker does."""
    users, first, active = by_rank(streams.history)
    level, mark = np.divmod(streams.cell, SLOTS + 1)  # of what comes after each event
    with torch.inference_mode():
        root = torch.zeros(len(users), belief.states)
        root_ES = torch.empty(len(streams.cell), belief.states)
        for rank, n in enumerate(active.tolist()):
            rows = first[:n] + rank
            before = np.maximum(rows - 1, 0)
            slot = torch.from_numpy(streams.slot[rows] if rank == 0 else mark[before])
            root = belief.step(root[:n], slot, torch.from_numpy(level[before]))
            root_ES[torch.from_numpy(rows)] = root
        places = torch.from_numpy(event)
        parts = [belief.after_silence(root_ES[places[i : i + BLOCK]], level_L[i : i + BLOCK]) for i in range(0, len(event), BLOCK)]
        return torch.cat([torch.empty(0, belief.states), *parts])
