"""Fitting the recurrent units: the likelihood of the waits, over chunks of users' streams (`trainer.batches`), under heads of their own.

These heads are a first try: `trainer.committee` fits them anew once the units stand still.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from model.network import Network
from trainer.batches import Batch, Carried, Packer
from trainer.distributed import ALONE, Team
from trainer.heads import answer
from trainer.material import Material, loss_of
from trainer.objective import negative_log_likelihood
from trainer.parts import Part, Parts
from trainer.recurrence import hidden_states
from trainer.stage import Run, adam, learning_rate_share, set_step_size

LEAST_BATCHES = 32
"""Batches of a pass: a short history gets smaller batches, or it would be fitted in a handful of steps."""
LEAST_BATCH = 64
"""Events in a batch, of however short a history."""
STEPS, LEAST_PASSES = 1500, 5
"""Steps in all, about, unless that were fewer passes than these, or more than `epochs`: a long history needs fewer passes."""
ASKED_AN_EVENT = 3
"""Moments asked in a pass, for one event: more would cost time, and tell the units little."""
BUDGET_SHARE = 0.6
"""Of the time budget, at the end of which the last pass ends."""


@dataclass(slots=True)
class Passes:
    """losses: validation loss before the first pass and after each. train_losses: mean loss of a training moment during each pass.

    speeds: events trained on a second, in each pass. why: the last pass was the last.
    """

    losses: list[float]
    train_losses: list[float]
    speeds: list[float]
    why: str


class PartStreams:
    """The chunks of one part, and the states that they carry from pass to pass. count: batches of a pass."""

    def __init__(self, part: Part, network: Network, batch_events: int, run: Run) -> None:
        self.packer = Packer(part.first.numpy(), part.event_L.numpy(), run.settings.chunk_events, run.rng)
        self.carried = Carried(self.packer.continues, network.shape.recurrent)
        self.count = run.team.most(self.packer.count(batch_events))
        self.asked_share = min(1.0, ASKED_AN_EVENT * len(part.slot_E) / max(len(part), 1))
        self.batch_weight = torch.tensor(self.asked_share * float(part.weight_L.sum()) / max(self.count, 1))
        """Of the moments in a batch, in the mean."""


class _Pass:
    """A pass over all parts."""

    def __init__(self, network: Network, train: Parts, run: Run) -> None:
        self._network, self._train, self._run = network, train, run
        settings = run.settings
        fitted = [p for n, p in network.named_parameters() if not n.startswith("encoder.belief.")]
        self._peak = settings.learning_rate * (0.5 if run.warm else 1.0)
        self._optimizer = adam(fitted, settings.weight_decay, self._peak)
        events = 0
        for number in range(len(train)):
            run.goes_on()
            run.progress(0.0, f"preparing shard {number + 1} of {len(train)}")
            events += len(train[number].slot_E)
        (in_all,) = run.team.total(events)
        batch_events = max(1, min(settings.batch_events, max(int(in_all) // LEAST_BATCHES, LEAST_BATCH)) // run.team.size)
        self._streams = [PartStreams(train[number], network, batch_events, run) for number in range(len(train))]
        self.batches = sum(streams.count for streams in self._streams)

    def __call__(self, begun: float, share: float, words: str) -> tuple[float, float]:
        """A pass that is `share` of the fitting, of which `begun` is done: (mean loss of a moment, events trained on a second)."""
        self._network.train()
        run, losses, events, clock = self._run, list[torch.Tensor](), 0, self._run.clock()
        order = run.team.first_says(run.rng.permutation(len(self._train)).tolist())
        for i, number in enumerate(order):
            part, streams = self._train[number], self._streams[number]
            for j, batch in enumerate(streams.packer.batches(streams.count, run.rng, streams.asked_share)):
                if not run.goes_on(BUDGET_SHARE):
                    break
                done = begun + share * (i + j / streams.count) / len(order)
                set_step_size(self._optimizer, self._peak * learning_rate_share(done))
                losses += _step(self._network, part, batch, streams, self._optimizer, run)
                events += len(batch.events)
                run.progress(done, words)
        loss, weight = run.team.total(*torch.stack(losses).double().sum(0).tolist()) if losses else (float("nan"), 1.0)
        (in_all,) = run.team.total(events)
        return loss / max(weight, 1e-9), in_all / max(run.clock() - clock, 1e-9)


def fit_units(network: Network, train: Parts, validation: Sequence[Material], run: Run) -> Passes:
    """Fit the recurrent units and leave the network with the weights that did best on `validation`."""
    settings, one_pass = run.settings, _Pass(network, train, run)
    epochs = min(settings.epochs, max(LEAST_PASSES, round(STEPS / max(one_pass.batches, 1))))
    best_loss = mean_loss(network, validation, run.team) if run.warm else float("inf")
    best, best_pass = copy.deepcopy(network.state_dict()), 0
    out = Passes([best_loss], [], [], f"all {epochs} passes done")
    begun, planned = run.spent, epochs
    for epoch in range(epochs):
        train_loss, speed = one_pass(epoch / planned, 1 / planned, f"pass {epoch + 1}")
        loss = mean_loss(network, validation, run.team)
        out.losses.append(loss)
        out.train_losses.append(train_loss)
        out.speeds.append(speed)
        if epoch == 0:  # fewer passes, where the budget does not last for them: the step size must come down in any case
            last = (BUDGET_SHARE - begun) / max(run.spent - begun, 1e-9)
            planned = run.team.first_says(min(epochs, max(1, int(min(last, epochs)))))
        run.progress((epoch + 1) / planned, f"pass {epoch + 1}: validation loss {loss:.4f}")
        if loss < best_loss:
            best_loss, best, best_pass = loss, copy.deepcopy(network.state_dict()), epoch + 1
        if not run.goes_on(BUDGET_SHARE) or epoch + 1 == planned < epochs:
            out.why = f"the budget of {settings.round_budget_seconds:.0f} s is spent"
            break
        if epoch + 1 - best_pass >= settings.patience:
            out.why = f"no better on validation for {settings.patience} passes"
            break
    network.load_state_dict(best)
    return out


def mean_loss(network: Network, validation: Sequence[Material], team: Team = ALONE) -> float:
    """Negative log-likelihood of a validation moment, each state as a worker would have it; each material counts alike."""
    losses = []
    for material in validation:
        weight_L = material.moments.weight
        loss, weight = team.total(float(loss_of(network, material) @ weight_L), float(weight_L.sum()))
        losses.append(loss / max(weight, 1e-9))
    return float(np.mean(losses))


def _step(
    network: Network, part: Part, batch: Batch, streams: PartStreams, optimizer: torch.optim.Optimizer, run: Run
) -> tuple[torch.Tensor, ...]:
    """(the batch's loss times its weight, its weight) in one tensor, left on its device; () of a batch that asks nothing."""
    if not len(batch.events) and run.team.size == 1:
        return ()
    parameters: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss = weight = torch.zeros((), device=network.device)
    batch_weight = streams.batch_weight.to(network.device)
    if len(batch.events):
        loss, weight = _loss(network, part, batch, streams.carried, run.settings.mixed)
        if len(batch.landmarks):
            (loss / batch_weight.clamp(min=1e-9)).backward()  # type: ignore[no-untyped-call]
    run.team.average_gradients(parameters, batch_weight)
    torch.nn.utils.clip_grad_norm_(parameters, run.settings.gradient_norm)
    optimizer.step()
    return (torch.stack([loss.detach(), weight]),)


def _loss(network: Network, part: Part, batch: Batch, carried: Carried, mixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch: the sum of its moments' losses, each times its weight, and the sum of the weights."""
    device = network.device
    landmarks, events, place = (torch.from_numpy(rows) for rows in (batch.landmarks, batch.events, batch.place))

    def taken(column: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return column.index_select(0, rows).to(device)  # of rows of floats, a tenth of the time of column[rows]

    inputs = network.encoder.inputs(*(taken(c, events) for c in (part.slot_E, part.item_E, part.category_E, part.numeric_EM)))
    hidden_NH, ended_CZ = hidden_states(network.encoder, inputs, batch.sizes.tolist(), carried.before(batch.chunk).to(device))
    carried.keep(batch.chunk, ended_CZ)
    foreseen = (taken(part.believed_LS, landmarks), taken(part.base_LJX, landmarks))
    logits = answer(network, hidden_NH, place.to(device), *foreseen, taken(part.readout_LR, landmarks), mixed)
    weight = taken(part.weight_L, landmarks)
    terms = negative_log_likelihood(logits, taken(part.event_LKB, landmarks), taken(part.mask_LKB, landmarks))
    return terms @ weight, weight.sum()
