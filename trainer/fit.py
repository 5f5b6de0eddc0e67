"""Fitting, in stages, stopped by users who are held out:

1. the cells, by the likelihood of whole streams (`trainer.belief`, `trainer.rhythm`);
2. the recurrent units, by the likelihood of the waits, over chunks of streams (`trainer.units`);
3. the heads, by that and by what the targets ask, over states stepped along whole streams (`trainer.committee`);
4. the heads' level, by the newest weeks (`trainer.trend`).

On one thread if need be, and within a time budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from model.hazards import grid
from model.network import Network
from trainer.belief import STEP_SIZE, Streams, fit_anew, fit_belief
from trainer.committee import fit_heads
from trainer.distributed import ALONE, Team
from trainer.evaluate import constant_hazards
from trainer.foresight import foresight
from trainer.material import Material
from trainer.parts import Parts
from trainer.rhythm import fit_rhythm
from trainer.settings import TrainerSettings
from trainer.stage import Progress, Run, Stopped, no_progress
from trainer.standard import standardised
from trainer.units import fit_units

BELIEF_SHARE = 0.3
"""Of the time budget, for the belief cell."""


@dataclass(slots=True)
class Fitted:
    """What came of a fitting. The network holds the weights that were kept.

    losses, train_losses, pass_speeds: of the passes over the streams, as in `units.Passes`.
    """

    losses: list[float]
    seconds: float
    why: str
    train_losses: list[float] = field(default_factory=list)
    pass_speeds: list[float] = field(default_factory=list)


def fit(
    network: Network,
    train: Parts | Material,
    validation: Material | Sequence[Material],
    settings: TrainerSettings,
    whole: Callable[[], Parts] | None = None,
    *,
    warm: bool,
    progress: Progress = no_progress,
    stopping: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    team: Team = ALONE,
) -> Fitted:
    """Fit `network` in place, and leave it with the weights that did best on `validation`. Raises `stage.Stopped` when told to.

    validation: what no stage learns from until the last, in parts of like weight. whole: makes the material of everything, on which the
    heads are fitted at last; by default there is none but `train`. team: the processes that fit it together, each on material of its
    own; all must begin with the same weights, and end with the same.
    """
    parts = train if isinstance(train, Parts) else Parts.whole(train)
    panels = [validation] if isinstance(validation, Material) else [*validation]
    rng = np.random.default_rng(settings.seed if team.first else (settings.seed, team.rank))
    torch.manual_seed(settings.seed + team.rank)
    run = Run(settings, warm, rng, progress, stopping, clock, clock(), team)
    hazard_KB = constant_hazards(parts.first, grid(settings.targets))
    with standardised(network, parts.first.readout_LR, team.share):
        _fit_cells(network, parts, run)
        passes = fit_units(network, parts, panels, run)
        fit_heads(network, parts, panels, whole, run, hazard_KB)
    network.eval()
    return Fitted(passes.losses, clock() - run.begin, passes.why, passes.train_losses, passes.speeds)


def _fit_cells(network: Network, train: Parts, run: Run) -> None:
    """Fit the cells: what they then foresee at each moment is an input of the heads. A belief cell whose parameters require no gradient
    stays as it is."""
    team = run.team
    if not network.shape.cells or not team.most(len(train.first.moments)):
        return
    device = network.device
    network.encoder.to("cpu")  # the cells' recursions are many small products
    if team.first:
        _fit_belief(network, train.first, run)
        if network.encoder.rhythm is not None:
            fit_rhythm(network.encoder.rhythm, network.visits, train.first, run.rng)
    network.encoder.to(device)
    team.share_weights(network.encoder)
    network.refresh()
    train.foresee = foresight(network)


def _fit_belief(network: Network, material: Material, run: Run) -> None:
    belief, settings = network.encoder.belief, run.settings
    if belief is None or not belief.log_rate.requires_grad:
        return
    streams = streams_of(material, network)

    def told(share: float) -> None:
        if run.stopping():
            raise Stopped
        run.progress(0.0, f"belief {share:.0%}")

    within: dict[str, Any] = {"budget_seconds": settings.round_budget_seconds * BELIEF_SHARE, "progress": told, "clock": run.clock}
    if run.warm:
        fit_belief(belief, streams, steps=settings.belief_steps // 4, rng=run.rng, step_size=STEP_SIZE / 5, **within)
    else:
        generator = torch.Generator().manual_seed(settings.seed)
        fit_anew(belief, streams, steps=settings.belief_steps, rng=run.rng, generator=generator, **within)


def streams_of(material: Material, network: Network) -> Streams:
    """Its users' streams, up to the end of what was observed of the moments, by the network's clock."""
    return Streams(material.history, material.steps.slot, material.end_ms, network.clock)
