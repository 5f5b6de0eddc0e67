"""A refresh: the champion's heads fitted anew on the newest window, and nothing else. Its encoder, vocabulary and scaling stay as they are.

So the encoder_id stays, too, and with it every hidden state that a worker has stored: a refresh costs the workers nothing. It takes
seconds where a round takes minutes, because the hidden states along the window are computed once, and the heads are small.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from datetime import datetime

import numpy as np
import torch

from model.artifact import Model, Window
from model.network import Network
from model.registry import new_version
from model.targets import event_sets
from trainer import evaluate
from trainer.challenger import Challenger, Split, grid
from trainer.dataset import landmarks
from trainer.fit import Fitted, Progress, Stopped, learning_rate_share, no_progress
from trainer.history import History
from trainer.material import Material, head_losses, head_terms, hidden_along, prepare
from trainer.metrics import Metrics
from trainer.settings import TrainerSettings
from trainer.standard import standardised

BATCH = 4096
"""Moments in a batch at most."""
LEAST_BATCHES = 16
"""Batches of a pass at least, where there are so few moments."""

logger = logging.getLogger(__name__)


def obstacle(champion: Model | None, settings: TrainerSettings) -> str:
    """Why the champion cannot be refreshed and a round must come first, or "" where it can."""
    if champion is None:
        return "there is no champion to refresh"
    if champion.sets != event_sets(settings.targets) or tuple(champion.manifest.edges_ms) != grid(settings.targets):
        return "the targets are not those of the champion's heads"
    return ""


def refresh(
    history: History,
    split: Split,
    champion: Model | None,
    settings: TrainerSettings,
    metrics: Metrics,
    now: datetime,
    rng: np.random.Generator,
    progress: Progress,
    stopping: Callable[[], bool],
) -> Challenger:
    """The champion with heads fitted on what was known before the test window. It must have no `obstacle`."""
    assert champion is not None
    vocabulary, scaling, edges_ms = champion.vocabulary, champion.scaling, champion.manifest.edges_ms
    with metrics.timed("dataset"):
        train_history, validation_history = history.before(split.validation_ms), history.before(split.test_ms)
        training, validation = (
            prepare(part, landmarks(part, champion.sets, begin_ms, end_ms, rng), vocabulary, scaling, edges_ms)
            for part, begin_ms, end_ms in (
                (train_history, split.begin_ms, split.validation_ms),
                (validation_history, split.validation_ms, split.test_ms),
            )
        )
        hazard_KB = evaluate.constant_hazards(training, edges_ms)
    network = copy.deepcopy(champion.network)
    with metrics.timed("fit"):
        fitted = fit_heads(network, training, validation, settings, progress=progress, stopping=stopping)
    metrics.validation_loss.set(min(fitted.losses))
    logger.info("refreshed the heads of %s in %.1f s: %s", champion.manifest.version, fitted.seconds, fitted.why)
    manifest = champion.manifest.model_copy(
        update={
            "version": new_version(now),
            "created_at": now,
            "targets": list(settings.targets),
            "window": Window(start_ms=split.begin_ms, end_ms=split.test_ms, users=validation_history.users, events=len(validation_history)),
        }
    )
    return Challenger(Model(network, manifest, vocabulary, scaling), hazard_KB, fitted)


def fit_heads(
    network: Network,
    train: Material,
    validation: Material,
    settings: TrainerSettings,
    *,
    progress: Progress = no_progress,
    stopping: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> Fitted:
    """Fit the heads in place, and leave them with the weights that did best on `validation`. Raises Stopped when told to."""
    begin = clock()
    rng = np.random.default_rng(settings.seed)
    torch.manual_seed(settings.seed)
    network.eval()
    hidden_EH, validation_hidden_EH = (hidden_along(network, part.steps, part.history) for part in (train, validation))
    weight_L = torch.from_numpy(train.moments.weight).to(network.device)
    validation_total = max(float(validation.moments.weight.sum()), 1e-9)
    peak = settings.learning_rate / 2
    batch = min(BATCH, max(len(train.moments) // LEAST_BATCHES, 64))

    def validation_loss() -> float:
        network.head.eval()
        return float(head_losses(network, validation, validation_hidden_EH) @ validation.moments.weight) / validation_total

    with standardised(network, train.readout_LR):
        decayed = [p for p in network.head.parameters() if p.dim() > 1]
        plain = [p for p in network.head.parameters() if p.dim() <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}], lr=peak
        )
        losses = [validation_loss()]
        best, best_pass, why = copy.deepcopy(network.head.state_dict()), 0, f"all {settings.epochs} passes done"
        for epoch in range(settings.epochs):
            network.head.train()
            order = torch.from_numpy(rng.permutation(len(train.moments)))
            for i in range(0, len(order), batch):
                if stopping():
                    raise Stopped
                rows, done = order[i : i + batch], (epoch + i / len(order)) / settings.epochs
                for group in optimizer.param_groups:
                    group["lr"] = peak * learning_rate_share(done)
                weight = weight_L[rows]
                loss = head_terms(network, train, hidden_EH, rows) @ weight / weight.sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(network.head.parameters(), settings.gradient_norm)
                optimizer.step()
            losses.append(validation_loss())
            progress((epoch + 1) / settings.epochs, f"heads, pass {epoch + 1}: validation loss {losses[-1]:.4f}")
            if losses[-1] < losses[best_pass]:
                best, best_pass = copy.deepcopy(network.head.state_dict()), epoch + 1
            elif epoch + 1 - best_pass >= settings.patience:
                why = f"no better on validation for {settings.patience} passes"
                break
            if clock() - begin > settings.refresh_budget_seconds:
                why = f"the budget of {settings.refresh_budget_seconds:.0f} s is spent"
                break
        network.head.load_state_dict(best)
    network.eval()
    return Fitted(losses, clock() - begin, why)
