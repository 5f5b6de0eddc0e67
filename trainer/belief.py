"""Fitting the belief cell: the likelihood of whole streams, types and times and the silence at the end, by gradient.

The forward-backward recursion is written out: torch's own backward would keep and add a matrix a step. It needs little data, as every
gap between two events says something about the states, not only whether a purchase followed.

The likelihood has many maxima, and two things lead to a good one. A prior says that most events change nothing (as of a sticky hidden
Markov model: Fox et al., "An HDP-HMM for systems with state persistence", ICML 2008). And cells of half of the states are fitted first, and
the best is doubled: it finds what users go through, and its copies, a livelier one and a quieter one, find that users differ for life.

Axis letters as in `model.belief`; U users of a batch, N packed events (each user's, and the silence at the end).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.belief import SLOWEST, Belief, levels
from model.clock import EVEN, Clock
from model.hazards import DAY_MS
from model.statistics import SLOTS
from trainer.history import History

BATCH_EVENTS, LEAST_BATCHES = 12_288, 12
STEP_SIZE = 0.06
TRIAL = 10
"""Steps after which it is clear how many the budget lasts for."""
HELD_OUT, CHECK_STEPS = 10, 40
AVERAGED_STEPS = 40
"""What is kept is a running mean of the parameters over so many steps (Polyak & Juditsky 1992): single steps are noisy."""
STAYS = 10
"""The prior: events of each type, in each state, that it is as good as having seen change nothing."""
LEAST_TO_DOUBLE, LEAST_HALF_STEPS = 4, 16
"""States of a cell, and steps of each half of it, below which it is fitted as it is."""
HALVES, HALF_STEPS, HALF_BUDGET = 4, 0.1, 0.06
"""Cells of half of the states, of which the best is doubled, and what each takes of the steps and of the time."""
LIVELIER, JITTER = 0.4, 0.2
"""Of a cell's copies: by how much the rates (log) of one are above, and of the other below, the cell's; and noise on all they have."""


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
    """Users' streams up to `end_ms`, as cells of the belief's tables. clock: by which silences are measured."""

    def __init__(self, history: History, slot: NDArray[np.int64], end_ms: int, clock: Clock = EVEN) -> None:
        last = ~np.append(history.has_previous[1:], False)
        next_ms = np.where(last, end_ms, np.append(history.time_ms[1:], end_ms))
        self.gap_ms = clock.elapsed_ms(history.time_ms, np.maximum(next_ms, history.time_ms))
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


def fit_anew(
    belief: Belief,
    streams: Streams,
    *,
    steps: int,
    rng: np.random.Generator,
    generator: torch.Generator,
    budget_seconds: float = 600,
    progress: Callable[[float], None] = lambda share: None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Fit a cell that knows nothing yet. Arguments as of `fit_belief`."""
    begin, halves = clock(), list[tuple[float, Belief]]()

    def fit(cell: Belief, share_of_steps: float, budget_seconds: float, done: float, share: float) -> float:
        """Of the whole fitting, so much is done, and this is a share of it."""
        return fit_belief(
            cell, streams, steps=round(share_of_steps * steps), rng=rng, budget_seconds=budget_seconds,
            progress=lambda share_of_it: progress(done + share * share_of_it), clock=clock,
        )  # fmt: skip

    doubles = belief.states >= LEAST_TO_DOUBLE and HALF_STEPS * steps >= LEAST_HALF_STEPS
    for i in range(HALVES if doubles else 0):
        half = Belief(-(-belief.states // 2))
        start(half, streams, generator)
        halves.append((fit(half, HALF_STEPS, HALF_BUDGET * budget_seconds, HALF_BUDGET * i, HALF_BUDGET), half))
    if halves:
        double(max(halves, key=itemgetter(0))[1], belief, generator)
    else:
        start(belief, streams, generator)
    done = HALF_BUDGET * len(halves)
    fit(belief, 1 - HALF_STEPS * len(halves), budget_seconds - (clock() - begin), done, 1 - done)


def start(belief: Belief, streams: Streams, generator: torch.Generator) -> None:
    """Spread the states over kinds of users, from a hundredth of the usual pace to fifty times it, with some taste for types. Rates are
    taken by the mean gap between events, so that minutes and months begin alike."""
    history = streams.history
    gaps_days = float(streams.gap_ms.sum()) / DAY_MS / max(len(streams.gap_ms), 1)
    share_V = np.bincount(streams.slot, minlength=SLOTS) / max(len(history), 1)
    usual_V = torch.from_numpy(np.log(np.maximum(share_V, 1e-4) / max(gaps_days, 1e-6)))
    pace_S = torch.linspace(-5.0, 4.0, belief.states)
    with torch.no_grad():
        belief.log_rate.copy_(usual_V + pace_S.unsqueeze(1) + 0.7 * _noise(belief.log_rate, generator))
        belief.log_move.copy_(np.log(0.3 / belief.states / max(gaps_days, 1e-6)) + 0.7 * _noise(belief.log_move, generator))
        belief.lead.copy_(8.0 * torch.eye(belief.states) + 0.5 * _noise(belief.lead, generator))
        belief.first.copy_(0.3 * _noise(belief.first, generator))
        for rates in (belief.log_rate, belief.log_move):  # the first state is of those who are gone for good
            rates[0] = np.log(10 * SLOWEST)
        belief.refresh()


def double(half: Belief, belief: Belief, generator: torch.Generator) -> None:
    """Let `belief` begin as two copies of `half`, as of two kinds of users: a way from one to the other is rare. Of an odd number of
    states, the second copy lacks one."""
    with torch.no_grad():
        crosses = torch.kron(1 - torch.eye(2), torch.ones_like(half.log_move))
        log_move = half.log_move.clamp(np.log(SLOWEST))
        move = torch.where(crosses > 0, log_move.mean() - 3.0, log_move.repeat(2, 2))
        lead = half.lead.repeat(1, 2, 2) - 6.0 * crosses
        rate = torch.cat([half.log_rate - LIVELIER, half.log_rate + LIVELIER])
        for own, copied in ((belief.log_rate, rate), (belief.log_move, move), (belief.lead, lead), (belief.first, half.first.repeat(1, 2))):
            kept = tuple(slice(0, size) for size in own.shape)
            own.copy_(copied[kept] + JITTER * _noise(own, generator))
        belief.refresh()


def _noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator)


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
) -> float:
    """Fit a cell from where it is; fewer steps where the first ones show that the budget does not last. One user in HELD_OUT takes no
    part, the same in every fitting: what does best on them, from the start on, is kept. Returns their mean log-likelihood an event. Leaves
    the tables fresh."""
    begin = clock()
    optimizer = torch.optim.Adam(belief.parameters(), lr=step_size, betas=(0.9, 0.98))
    users = len(streams.first) - 1
    batch_events = min(BATCH_EVENTS, max(len(streams.cell) // LEAST_BATCHES, 256))
    a_batch = max(1, round(batch_events / max(len(streams.cell) / users, 1)))
    order: NDArray[np.int64] = np.zeros(0, np.int64)
    shuffled = np.random.default_rng(0).permutation(users)
    held, taking_part = np.split(shuffled, [users // HELD_OUT])
    averaged = copy.deepcopy(belief)

    def held_out() -> float:
        with torch.no_grad():
            total, events = streams.log_likelihood(averaged.tables(), held)
        return total.item() / events

    best, best_state = held_out() if len(held) else -np.inf, copy.deepcopy(belief.state_dict())
    i = 0
    while i < steps:
        for group in optimizer.param_groups:
            group["lr"] = step_size * min(1.0, i / steps * 20 + 0.1) * (0.02 + 0.49 * (1 + float(np.cos(np.pi * i / steps))))
        if len(order) < a_batch:
            order = rng.permutation(taking_part)
        taken, order = order[:a_batch], order[a_batch:]
        total, events = streams.log_likelihood(belief.tables(), taken)
        stays = torch.diagonal(belief.lead.log_softmax(2), dim1=1, dim2=2).sum()
        loss = -total / events - STAYS * stays / len(streams.cell)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(belief.parameters(), 1.0)
        optimizer.step()
        i += 1
        with torch.no_grad():
            for mean, now in zip(averaged.parameters(), belief.parameters(), strict=True):
                mean.lerp_(now, max(1 / i, 1 / AVERAGED_STEPS))
        progress(i / steps)
        if len(held) and (i % CHECK_STEPS == 0 or i >= steps) and (likelihood := held_out()) > best:
            best, best_state = likelihood, copy.deepcopy(averaged.state_dict())
        if i == TRIAL or clock() - begin > budget_seconds:
            lasts = int(budget_seconds / max((clock() - begin) / i, 1e-9))
            steps = max(min(steps, lasts), i)
    if best > -np.inf:
        belief.load_state_dict(best_state)
    belief.refresh()
    return float(best)
