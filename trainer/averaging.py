"""The weights' running mean along the fitting, which is judged and kept in place of the last ones: a mean of nearby weights answers much
like the mean of several networks, and costs a worker nothing (Polyak & Juditsky 1992; Izmailov et al., arXiv 1803.05407)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class RunningMean:
    """Mean of the parameters that are fitted, over about the newest `steps` steps; over fewer while there are fewer."""

    def __init__(self, parameters: list[nn.Parameter], steps: float) -> None:
        self._parameters = parameters
        self._mean = [p.detach().clone() for p in parameters]
        self._steps, self._taken = max(steps, 1.0), 0

    @torch.no_grad()
    def take(self) -> None:
        """After a step of the optimizer."""
        self._taken += 1
        share = max(1 / self._taken, 1 / self._steps)
        for mean, parameter in zip(self._mean, self._parameters, strict=True):
            mean.lerp_(parameter, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the parameters are their means."""
        own = [p.detach().clone() for p in self._parameters]
        self._put(self._mean)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
