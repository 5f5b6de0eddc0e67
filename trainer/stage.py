"""What the stages of a fitting share: what it is told, when it has to stop, and how it steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from trainer.distributed import Team
from trainer.settings import TrainerSettings


class Stopped(Exception):
    """The program was asked to stop in the middle of a round."""


Progress = Callable[[float, str], None]
"""Told the share of the fitting that is done, and a few words on it."""


def no_progress(share: float, words: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Run:
    """One fitting. begin: when it began, by `clock`, in seconds. team: the processes that fit one network together."""

    settings: TrainerSettings
    warm: bool
    rng: np.random.Generator
    progress: Progress
    stopping: Callable[[], bool]
    clock: Callable[[], float]
    begin: float
    team: Team

    def goes_on(self, share: float = 1.0) -> bool:
        """Whether less than this share of the time budget is spent, by every process. Raises Stopped where any of them has been told to."""
        said = self.team.most(2 * self.stopping() + (self.spent > share))
        if said >= 2:
            raise Stopped
        return said == 0

    @property
    def spent(self) -> float:
        """Share of the time budget that is spent."""
        return (self.clock() - self.begin) / self.settings.round_budget_seconds


def adam(parameters: Sequence[nn.Parameter], weight_decay: float, step_size: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) in which weights decay, and biases do not."""
    decayed, plain = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}], lr=step_size)


def learning_rate_share(done: float) -> float:
    """Share of the peak step size when this share of the fitting is done: up over a twentieth, then down a cosine."""
    return min(1.0, done / 0.05 + 0.05) * 0.5 * (1 + float(np.cos(np.pi * min(done, 1.0))))


def set_step_size(optimizer: torch.optim.Optimizer, step_size: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = step_size


def warm_up() -> None:
    """Let torch load what it loads on the first step of an optimizer (2 s), while there is nothing else to do."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    torch.optim.AdamW([parameter]).step()
