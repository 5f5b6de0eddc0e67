"""Fitting: minimise the censored survival loss over chunks of users' streams, on one thread if need be, within a time budget."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from model.network import Network
from trainer import trial
from trainer.batches import Batch, Packer
from trainer.belief import STEP_SIZE, Streams, believed, fit_anew, fit_belief
from trainer.distributed import ALONE, Team
from trainer.evaluate import constant_hazards
from trainer.heads import answer
from trainer.material import Material, loss_of, negative_log_likelihood
from trainer.parts import Part, Parts
from trainer.recurrence import hidden_states
from trainer.settings import TrainerSettings
from trainer.standard import standardised

logger = logging.getLogger(__name__)

LEAST_BATCHES = 16
"""Batches of a pass: a short history gets smaller batches, or it would be fitted in a handful of steps."""

BELIEF_SHARE = 0.3
"""Of the time budget, for the belief cell."""


class Stopped(Exception):
    """The program was asked to stop in the middle of a round."""


Progress = Callable[[float, str], None]
"""Told the share of the fitting that is done, and a few words on it."""


def no_progress(share: float, words: str) -> None:
    pass


@dataclass(slots=True)
class Fitted:
    """What came of a fitting. The network holds the best weights.

    losses: validation loss before the first and after each pass. train_losses: mean loss of a training moment during each pass.
    pass_speeds: events trained on a second, in each pass.
    """

    losses: list[float]
    seconds: float
    why: str
    train_losses: list[float] = field(default_factory=list)
    pass_speeds: list[float] = field(default_factory=list)


def fit(
    network: Network,
    train: Parts | Material,
    validation: Material,
    settings: TrainerSettings,
    *,
    warm: bool,
    progress: Progress = no_progress,
    stopping: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    team: Team = ALONE,
) -> Fitted:
    """Fit `network` in place and leave it with the weights that did best on `validation`. Raises Stopped when told to.

    team: the processes that fit it together, each on material of its own; all must begin with the same weights, and end with the same.
    """
    parts = train if isinstance(train, Parts) else Parts.whole(train)
    with standardised(network, parts.first.readout_LR, team.share):
        fitted = _fit(network, parts, validation, settings, warm, progress, stopping, clock, team)
    network.eval()
    return fitted


def _fit(
    network: Network,
    train: Parts,
    validation: Material,
    settings: TrainerSettings,
    warm: bool,
    progress: Progress,
    stopping: Callable[[], bool],
    clock: Callable[[], float],
    team: Team,
) -> Fitted:
    begin = clock()
    rng = np.random.default_rng(settings.seed if team.first else (settings.seed, team.rank))
    torch.manual_seed(settings.seed + team.rank)
    fitted_here = [p for n, p in network.named_parameters() if not n.startswith("encoder.belief.")]
    peak = settings.learning_rate * (0.5 if warm else 1.0)

    def at_rest() -> torch.optim.Optimizer:
        return adam(fitted_here, settings.weight_decay, peak)

    optimizer = at_rest()

    def validation_loss() -> float:
        weight_L = validation.moments.weight
        loss, weight = team.total(float(loss_of(network, validation) @ weight_L), float(weight_L.sum()))
        return loss / max(weight, 1e-9)

    best_loss = validation_loss() if warm else float("inf")
    best = copy.deepcopy(network.state_dict())
    tries = not warm and network.encoder.belief is not None and settings.epochs > trial.PASSES
    hazard_KB = constant_hazards(train.first, network.edges_ms) if tries else None
    _fit_belief(network, train, settings, warm, rng, progress, stopping, clock, team)
    words, batch_losses = "", list[torch.Tensor]()
    asked_events = 0
    for number in range(len(train)):
        if stopping():
            raise Stopped
        progress(0.0, f"preparing shard {number + 1} of {len(train)}")
        asked_events += len(torch.unique_consecutive(train[number].event_L))
    (asked_in_all,) = team.total(asked_events)
    batch_events = max(1, min(settings.batch_events, max(int(asked_in_all) // LEAST_BATCHES, 64)) // team.size)

    def over_budget() -> bool:
        return bool(team.most(clock() - begin > settings.round_budget_seconds))

    def train_on(part: Part, done_before: float, share: float) -> int:
        """A pass over one part, `share` of the fitting. Returns how many events that was."""
        events = 0
        packer = Packer(part.first.numpy(), part.event_L.numpy(), settings.chunk_events, batch_events, rng)
        packer.in_batches(team.most(len(packer)))
        for i, batch in enumerate(packer):
            if team.most(stopping()):
                raise Stopped
            if over_budget():
                break
            done = done_before + share * i / len(packer)
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate_share(done)
            batch_losses.extend(_step(network, part, batch, optimizer, settings.gradient_norm, settings.mixed, team))
            events += len(batch.events)
            progress(done if words else 0.0, words or f"trial {done:.0%}")
        return events

    def train_on_all(begun: float, share: float) -> int:
        """A pass, `share` of the fitting, of which `begun` is done. Returns how many events that was."""
        network.train()
        order = team.first_says(rng.permutation(len(train)).tolist())
        return sum(train_on(train[number], begun + share * i / len(train), share / len(train)) for i, number in enumerate(order))

    def tried() -> float:
        """What the targets lose after a few passes, of a schedule of their own. What follows begins with an optimizer at rest, too."""
        nonlocal optimizer
        for number in range(trial.PASSES):
            train_on_all(number / trial.PASSES, 1 / trial.PASSES)
        optimizer = at_rest()
        return trial.asked_loss(network, validation, settings.targets, team)

    if hazard_KB is not None:
        begun = copy.deepcopy(network.state_dict())
        with_belief = tried()
        network.load_state_dict(begun)
        trial.begin_without_belief(network, hazard_KB, team)
        begun_without = copy.deepcopy(network.state_dict())
        without = tried()
        network.load_state_dict(begun_without if without < with_belief else begun)
        logger.info("log-loss after a trial: %.4f with the belief's hazards to start from, %.4f without", with_belief, without)

    passes_begin = clock()
    fitted = Fitted([best_loss], 0.0, f"all {settings.epochs} passes done")
    planned = settings.epochs  # fewer, once it shows that the budget does not last for them: the step size must come down in any case
    since_best = 0
    for epoch in range(settings.epochs):
        words, batch_losses = f"pass {epoch + 1}", []
        pass_begin = clock()
        events = train_on_all(epoch / planned, 1 / planned)
        fitted.pass_speeds.append(team.total(events)[0] / max(clock() - pass_begin, 1e-9))
        loss = validation_loss()
        fitted.losses.append(loss)
        fitted.train_losses.append(_mean(batch_losses, team))
        if epoch == 0:
            left = settings.round_budget_seconds - (passes_begin - begin)
            planned = team.first_says(min(planned, max(1, int(left / max(clock() - passes_begin, 1e-9)))))
        progress((epoch + 1) / planned, f"pass {epoch + 1}: validation loss {loss:.4f}")
        since_best += 1
        if loss < best_loss:
            best_loss, best, since_best = loss, copy.deepcopy(network.state_dict()), 0
        if over_budget() or epoch + 1 == planned < settings.epochs:
            fitted.why = f"the budget of {settings.round_budget_seconds:.0f} s is spent"
            break
        if since_best >= settings.patience:
            fitted.why = f"no better on validation for {settings.patience} passes"
            break
    network.load_state_dict(best)
    fitted.seconds = clock() - begin
    return fitted


def _fit_belief(
    network: Network,
    train: Parts,
    settings: TrainerSettings,
    warm: bool,
    rng: np.random.Generator,
    progress: Progress,
    stopping: Callable[[], bool],
    clock: Callable[[], float],
    team: Team,
) -> None:
    """Fit the belief cell first, by the likelihood of the streams: what it then believes at each moment is an input of the heads.
    A cell whose parameters require no gradient stays as it is."""
    belief = network.encoder.belief
    if belief is None or not team.most(len(train.first.moments)):
        return
    streams = streams_of(train.first)

    def told(share: float) -> None:
        if stopping():
            raise Stopped
        progress(0.0, f"belief {share:.0%}")

    frozen = not belief.log_rate.requires_grad
    belief.to("cpu")  # its recursion is many small products
    if team.first and not frozen:
        steps, budget_seconds = settings.belief_steps, settings.round_budget_seconds * BELIEF_SHARE
        if warm:
            steps, step_size = steps // 4, STEP_SIZE / 5
            fit_belief(
                belief, streams, steps=steps, rng=rng, step_size=step_size, budget_seconds=budget_seconds, progress=told, clock=clock
            )
        else:
            generator = torch.Generator().manual_seed(settings.seed)
            fit_anew(belief, streams, steps=steps, rng=rng, generator=generator, budget_seconds=budget_seconds, progress=told, clock=clock)
    belief.to(team.device)
    team.share_weights(belief)
    belief.to("cpu").refresh()
    cell = copy.deepcopy(belief)  # on the CPU still
    train.believe = lambda material: believed(cell, streams_of(material), material.moments.event, material.level_L)
    belief.to(network.device)
    network.refresh()


def streams_of(material: Material) -> Streams:
    """Its users' streams, up to the end of what was observed of the moments."""
    end_ms = int(material.moments.at_ms[0] + material.moments.observed_ms[0]) if len(material.moments) else 0
    return Streams(material.history, material.steps.slot, end_ms)


def _step(
    network: Network,
    part: Part,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    gradient_norm: float,
    mixed: bool = False,
    team: Team = ALONE,
) -> tuple[torch.Tensor, ...]:
    """(the batch's loss times its weight, its weight) in one tensor, left on its device; () of a batch that asks nothing."""
    if not len(batch.landmarks) and team.size == 1:
        return ()
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss = weight = torch.zeros((), device=network.device)
    if len(batch.landmarks):
        loss, weight = _loss(network, part, batch, mixed)
        (loss / weight).backward()  # type: ignore[no-untyped-call]
    team.average_gradients(parameters, weight)
    torch.nn.utils.clip_grad_norm_(parameters, gradient_norm)
    optimizer.step()
    return (torch.stack([loss.detach(), weight]),)


def _loss(network: Network, part: Part, batch: Batch, mixed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch: the sum of its moments' losses, each times its weight, and the sum of the weights."""
    device = network.device
    landmarks, events, place = (torch.from_numpy(rows) for rows in (batch.landmarks, batch.events, batch.place))

    def taken(column: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return column.index_select(0, rows).to(device)  # of rows of floats, a tenth of the time of column[rows]

    inputs = network.encoder.inputs(*(taken(c, events) for c in (part.slot_E, part.item_E, part.category_E, part.numeric_EM)))
    hidden_NH = hidden_states(network.encoder, inputs, batch.sizes.tolist())
    believed_LS = None if part.believed_LS is None else taken(part.believed_LS, landmarks)
    logits = answer(network, hidden_NH, place.to(device), believed_LS, taken(part.readout_LR, landmarks), mixed)
    weight = taken(part.weight_L, landmarks)
    terms = negative_log_likelihood(logits, taken(part.event_LKB, landmarks), taken(part.mask_LKB, landmarks))
    return terms @ weight, weight.sum()


def _mean(batch_losses: list[torch.Tensor], team: Team) -> float:
    """NaN of none."""
    total, weight = team.total(*torch.stack(batch_losses).double().sum(0).tolist()) if batch_losses else (float("nan"), 1.0)
    return total / weight


def adam(parameters: Sequence[nn.Parameter], weight_decay: float, step_size: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) in which weights decay, and biases do not."""
    decayed, plain = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}], lr=step_size)


def learning_rate_share(done: float) -> float:
    """Share of the peak step size when this share of the fitting is done: up over a twentieth, then down a cosine."""
    return min(1.0, done / 0.05 + 0.05) * 0.5 * (1 + float(np.cos(np.pi * min(done, 1.0))))


def warm_up() -> None:
    """Let torch load what it loads on the first step of an optimizer (2 s), while there is nothing else to do."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    torch.optim.AdamW([parameter]).step()
