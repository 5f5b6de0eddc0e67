"""A refresh: a model's heads fitted anew on the newest window, and nothing else. Its encoder, vocabulary and scaling stay as they are.

So the encoder_id stays, too, and with it every hidden state that a worker has stored: a refresh costs the workers nothing. It takes
seconds where a round takes minutes, because the hidden states along the window are computed once, and the heads are small.

It learns from events up to the newest, of all but the judges (`trainer.judges`), for a change in behaviour shows there first; the gate
judges it on the judges. First the weights are fitted, on moments that count the less the older they are, and the stoppers say when it is
enough: where they find the new weights no better beyond noise, the old ones stay. Then the levels follow the newest outcomes
(`trainer.levels`). A round that has to compete with a refreshed champion ends with a refresh, too.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from datetime import datetime

import numpy as np
import torch
from numpy.typing import NDArray

from model.artifact import Model, Window
from model.hazards import grid
from model.network import Network
from model.registry import new_version
from model.targets import event_sets
from trainer import evaluate, levels
from trainer.challenger import Challenger, Split
from trainer.dataset import to_learn_from
from trainer.fading import fading
from trainer.fit import Fitted
from trainer.gate import ONE_SIDED
from trainer.history import History
from trainer.judges import Role, roles, unseen_from
from trainer.material import Material, head_losses, head_terms, hidden_along, prepare
from trainer.metrics import Metrics
from trainer.settings import TrainerSettings
from trainer.stage import Progress, Stopped, adam, learning_rate_share, no_progress
from trainer.standard import standardised

BATCH = 4096
"""Moments in a batch at most."""
LEAST_BATCHES = 16
"""Batches of a pass at least, where there are so few moments."""

logger = logging.getLogger(__name__)


def obstacle(history: History, model: Model | None, settings: TrainerSettings) -> str:
    """Why the model cannot be refreshed and a round must come first, or "" where it can."""
    if model is None:
        return "there is no champion to refresh"
    if model.sets != event_sets(settings.targets) or tuple(model.manifest.edges_ms) != grid(settings.targets):
        return "the targets are not those of the champion's heads"
    counts = np.bincount(roles(history.user_ids, settings), minlength=len(Role))
    if not counts.all():
        return f"{len(history.user_ids)} users are too few to be split into learners, stoppers and judges"
    return ""


def refresh(
    history: History,
    split: Split,
    model: Model,
    settings: TrainerSettings,
    metrics: Metrics,
    now: datetime,
    rng: np.random.Generator,
    progress: Progress,
    stopping: Callable[[], bool],
) -> Challenger:
    """The model with heads that have learnt from all of the window but the judges. It must have no `obstacle`."""
    edges_ms = model.manifest.edges_ms
    half_lives_ms = levels.half_lives(split.begin_ms, split.end_ms)
    network = copy.deepcopy(model.network)

    with metrics.timed("dataset"):
        role_U = roles(history.user_ids, settings)
        known = history.of_users(role_U != Role.judge)
        moments = to_learn_from(known, model.sets, split.begin_ms, split.end_ms, rng)
        moments.weight *= fading(moments.at_ms, split.end_ms, half_lives_ms[0]).astype(np.float32)
        material = prepare(known, moments, model.vocabulary, model.scaling, edges_ms, network.clock, network.visits)
        hidden_EH = hidden_along(network, material.steps, known, material.gap_EK)
        stops_U = role_U[role_U != Role.judge] == Role.stopper
        hazard_KB = evaluate.constant_hazards(material, edges_ms)
    with metrics.timed("fit"):
        stops_L = stops_U[known.user[moments.event]]
        fitted = fit_heads(network, material, hidden_EH, stops_L, settings, progress=progress, stopping=stopping)
        shift_K = levels.follow(network, material, hidden_EH, split.end_ms, half_lives_ms)
    metrics.validation_loss.set(min(fitted.losses))
    said = ", ".join(f"{'+'.join(types)} {shift:+.2f}" for types, shift in zip(model.sets, shift_K, strict=True))
    logger.info("refreshed the heads of %s in %.1f s: %s; levels moved: %s", model.manifest.version, fitted.seconds, fitted.why, said)
    manifest = model.manifest.model_copy(
        update={
            "version": new_version(now),
            "created_at": now,
            "targets": list(settings.targets),
            "base_hazards": hazard_KB.tolist(),
            "window": Window(
                start_ms=split.begin_ms,
                end_ms=split.end_ms,
                users=history.users,
                events=len(history),
                judges_end_ms=unseen_from(model.manifest.window),
            ),
        }
    )
    return Challenger(Model(network, manifest, model.vocabulary, model.scaling), hazard_KB, fitted)


def fit_heads(
    network: Network,
    material: Material,
    hidden_EH: torch.Tensor,
    stops_L: NDArray[np.bool_],
    settings: TrainerSettings,
    *,
    progress: Progress = no_progress,
    stopping: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> Fitted:
    """Fit the heads in place on the moments that are not the stoppers', and leave them with the weights that did best on those.

    hidden_EH: state after each event, which does not depend on the heads. Raises Stopped when told to.
    """
    begin = clock()
    rng = np.random.default_rng(settings.seed)
    torch.manual_seed(settings.seed)
    network.eval()
    weight_L = torch.from_numpy(material.moments.weight)
    learn, stop = (torch.from_numpy(np.flatnonzero(which)) for which in (~stops_L, stops_L))
    share_N = material.moments.weight[stops_L] / max(float(material.moments.weight[stops_L].sum()), 1e-9)
    _, user_N = np.unique(material.history.user[material.moments.event[stops_L]], return_inverse=True)
    peak = settings.learning_rate / 2
    batch = min(BATCH, max(len(learn) // LEAST_BATCHES, 64))

    def stoppers_terms() -> NDArray[np.float64]:
        """(N,) parts of the stoppers' loss."""
        network.head.eval()
        return head_losses(network, material, hidden_EH, stop).astype(np.float64) * share_N

    with standardised(network, material.readout_LR):
        optimizer = adam([*network.head.parameters()], settings.weight_decay, peak)
        before = best_terms = stoppers_terms()
        losses = [float(before.sum())]
        begun = copy.deepcopy(network.head.state_dict())
        best, best_pass, why = begun, 0, f"all {settings.epochs} passes done"
        for epoch in range(settings.epochs):
            network.head.train()
            order = learn[torch.from_numpy(rng.permutation(len(learn)))]
            for i in range(0, len(order), batch):
                if stopping():
                    raise Stopped
                rows, done = order[i : i + batch], (epoch + i / len(order)) / settings.epochs
                for group in optimizer.param_groups:
                    group["lr"] = peak * learning_rate_share(done)
                weight = weight_L[rows].to(network.device)
                loss = head_terms(network, material, hidden_EH, rows) @ weight / weight.sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(network.head.parameters(), settings.gradient_norm)
                optimizer.step()
            terms = stoppers_terms()
            losses.append(float(terms.sum()))
            progress((epoch + 1) / settings.epochs, f"heads, pass {epoch + 1}: the stoppers' loss {losses[-1]:.4f}")
            if losses[-1] < losses[best_pass]:
                best, best_terms, best_pass = copy.deepcopy(network.head.state_dict()), terms, epoch + 1
            elif epoch + 1 - best_pass >= settings.patience:
                why = f"no better on the stoppers for {settings.patience} passes"
                break
            if clock() - begin > settings.refresh_budget_seconds:
                why = f"the budget of {settings.refresh_budget_seconds:.0f} s is spent"
                break
        gain_U = np.bincount(user_N, before - best_terms)
        if gain_U.sum() <= ONE_SIDED * np.sqrt(gain_U @ gain_U):
            best, why = begun, f"{why}; the weights stay, for no others are better beyond noise"
        network.head.load_state_dict(best)
    network.eval()
    return Fitted(losses, clock() - begin, why)
