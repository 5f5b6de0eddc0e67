"""Fitting: minimise the censored survival loss over chunks of users' streams, on one thread if need be, within a time budget."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from model.network import Network
from trainer.batches import Batch, chunks, pack
from trainer.belief import STEP_SIZE, Streams, believed, fit_belief, start
from trainer.material import Material, inputs_of, loss_of, negative_log_likelihood
from trainer.recurrence import hidden_states
from trainer.settings import TrainerSettings
from trainer.standard import standardised

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
    """

    losses: list[float]
    seconds: float
    why: str
    train_losses: list[float] = field(default_factory=list)


def fit(
    network: Network,
    train: Material,
    validation: Material,
    settings: TrainerSettings,
    *,
    warm: bool,
    progress: Progress = no_progress,
    stopping: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> Fitted:
    """Fit `network` in place and leave it with the weights that did best on `validation`. Raises Stopped when told to."""
    with standardised(network, train.readout_LR):
        fitted = _fit(network, train, validation, settings, warm, progress, stopping, clock)
    network.eval()
    return fitted


def _fit(
    network: Network,
    train: Material,
    validation: Material,
    settings: TrainerSettings,
    warm: bool,
    progress: Progress,
    stopping: Callable[[], bool],
    clock: Callable[[], float],
) -> Fitted:
    begin = clock()
    rng = np.random.default_rng(settings.seed)
    torch.manual_seed(settings.seed)
    fitted_here = [p for n, p in network.named_parameters() if not n.startswith("encoder.belief.")]
    decayed = [p for p in fitted_here if p.dim() > 1]
    plain = [p for p in fitted_here if p.dim() <= 1]
    peak = settings.learning_rate * (0.5 if warm else 1.0)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}], lr=peak
    )
    weight_total = float(validation.moments.weight.sum())

    def validation_loss() -> float:
        return float(loss_of(network, validation) @ validation.moments.weight) / max(weight_total, 1e-9)

    best_loss = validation_loss() if warm else float("inf")
    best = copy.deepcopy(network.state_dict())
    believed_LS = _fit_belief(network, train, settings, warm, rng, progress, stopping, clock)
    train_losses: list[float] = []
    passes_begin = clock()
    losses, since_best, why = [best_loss], 0, f"all {settings.epochs} passes done"
    landmark_first = np.searchsorted(train.moments.event, np.arange(len(train.history) + 1))
    asked_events = len(np.unique(train.moments.event))
    batch_events = min(settings.batch_events, max(asked_events // LEAST_BATCHES, 64))
    planned = settings.epochs  # fewer, once it shows that the budget does not last for them: the step size must come down in any case
    for epoch in range(settings.epochs):
        network.train()
        batch_losses: list[torch.Tensor] = []
        begins, ends = chunks(train.history.first, settings.chunk_events, rng)
        asked = landmark_first[ends] > landmark_first[begins]  # chunks before the window only lead up to it
        begins, ends = begins[asked], ends[asked]
        cuts = np.flatnonzero(np.diff(np.cumsum(ends - begins) // batch_events)) + 1
        batches = list(zip(np.split(begins, cuts), np.split(ends, cuts), strict=True))
        for i, (low, high) in enumerate(batches):
            if stopping():
                raise Stopped
            if clock() - begin > settings.round_budget_seconds:
                break
            done = (epoch + i / len(batches)) / planned
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate_share(done)
            packed = pack(low, high, train.moments.event, landmark_first)
            batch_losses += _step(network, train, packed, believed_LS, optimizer, settings.gradient_norm)
            progress(done, f"pass {epoch + 1}")
        loss = validation_loss()
        losses.append(loss)
        train_losses.append(_mean(batch_losses))
        if epoch == 0:
            left = settings.round_budget_seconds - (passes_begin - begin)
            planned = min(planned, max(1, int(left / max(clock() - passes_begin, 1e-9))))
        progress((epoch + 1) / planned, f"pass {epoch + 1}: validation loss {loss:.4f}")
        since_best += 1
        if loss < best_loss:
            best_loss, best, since_best = loss, copy.deepcopy(network.state_dict()), 0
        if clock() - begin > settings.round_budget_seconds or epoch + 1 == planned < settings.epochs:
            why = f"the budget of {settings.round_budget_seconds:.0f} s is spent"
            break
        if since_best >= settings.patience:
            why = f"no better on validation for {settings.patience} passes"
            break
    network.load_state_dict(best)
    return Fitted(losses, clock() - begin, why, train_losses)


def _fit_belief(
    network: Network,
    train: Material,
    settings: TrainerSettings,
    warm: bool,
    rng: np.random.Generator,
    progress: Progress,
    stopping: Callable[[], bool],
    clock: Callable[[], float],
) -> torch.Tensor | None:
    """Fit the belief cell first, by the likelihood of the streams: (L, S) what it then believes at each moment, an input of the heads.
    A cell whose parameters require no gradient stays as it is."""
    belief = network.encoder.belief
    if belief is None or not len(train.moments):
        return None
    streams = Streams(train.history, train.steps.slot, int(train.moments.at_ms[0] + train.moments.observed_ms[0]))

    def told(share: float) -> None:
        if stopping():
            raise Stopped
        progress(0.0, f"belief {share:.0%}")

    frozen = not belief.log_rate.requires_grad
    belief.to("cpu")  # its recursion is many small products
    if not warm and not frozen:
        start(belief, streams, torch.Generator().manual_seed(settings.seed))
    steps, step_size = (settings.belief_steps // 4, STEP_SIZE / 5) if warm else (settings.belief_steps, STEP_SIZE)
    budget_seconds = settings.round_budget_seconds * BELIEF_SHARE
    if not frozen:
        fit_belief(belief, streams, steps=steps, rng=rng, step_size=step_size, budget_seconds=budget_seconds, progress=told, clock=clock)
    believed_LS = believed(belief, streams, train.moments.event, train.level_L)
    belief.to(network.device)
    network.refresh()
    return believed_LS


def _step(
    network: Network,
    train: Material,
    batch: Batch,
    believed_LS: torch.Tensor | None,
    optimizer: torch.optim.Optimizer,
    gradient_norm: float,
) -> tuple[torch.Tensor, ...]:
    """(the batch's loss times its weight, its weight) in one tensor, left on its device; () of a batch that asks nothing."""
    if not len(batch.landmarks):
        return ()
    device = network.device
    landmarks = torch.from_numpy(batch.landmarks)
    hidden_NH = hidden_states(network.encoder, inputs_of(network, train.steps, batch.events), batch.sizes.tolist())
    asked = None if believed_LS is None else believed_LS[landmarks].to(device)
    logits = network.answer(hidden_NH[torch.from_numpy(batch.place).to(device)], asked, train.readout_LR[landmarks].to(device))
    weight = torch.from_numpy(train.moments.weight[batch.landmarks]).to(device)
    terms = negative_log_likelihood(logits, train.event_LKB[landmarks].to(device), train.mask_LKB[landmarks].to(device))
    loss = terms @ weight / weight.sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], gradient_norm)
    optimizer.step()
    return (torch.stack([loss.detach() * weight.sum(), weight.sum()]),)


def _mean(batch_losses: list[torch.Tensor]) -> float:
    if not batch_losses:
        return float("nan")
    total, weight = torch.stack(batch_losses).sum(0).tolist()
    return float(total / weight)


def learning_rate_share(done: float) -> float:
    """Share of the peak step size when this share of the fitting is done: up over a twentieth, then down a cosine."""
    return min(1.0, done / 0.05 + 0.05) * 0.5 * (1 + float(np.cos(np.pi * min(done, 1.0))))


def warm_up() -> None:
    """Let torch load what it loads on the first step of an optimizer (2 s), while there is nothing else to do."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    torch.optim.AdamW([parameter]).step()
