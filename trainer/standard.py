"""Standardised inputs for the head while it is fitted, folded into its weights afterwards, so that a worker knows nothing of it.

Adam moves every weight at about the same pace, so an input that varies little (log of the silent age over 15) is learned slowly. Fitting
on (x - mean) / deviation and writing W / deviation and b - W mean / deviation into the artifact gives the same function of x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from model.network import Network


class Standardise(nn.Module):
    """(x - mean) * factor of the head's inputs."""

    mean: torch.Tensor
    factor: torch.Tensor

    def __init__(self, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("factor", 1 / deviation)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs - self.mean) * self.factor


@contextmanager
def standardised(network: Network, readout_LR: torch.Tensor, share: Callable[..., None] = lambda *tensors: None) -> Iterator[None]:
    """Within, the head's readout inputs have mean 0 and deviation 1 over `readout_LR`; it computes the same as before, and after.

    share: makes means and deviations those of the first process (`distributed.Team.share`).
    """
    head, linear = network.head, network.head[0]
    assert isinstance(linear, nn.Linear)
    before = linear.in_features - readout_LR.shape[1]
    mean, deviation = torch.zeros(linear.in_features), torch.ones(linear.in_features)
    spread, centre = torch.std_mean(readout_LR, dim=0)
    del readout_LR  # large, and not looked at again
    mean[before:], deviation[before:] = centre, torch.where(spread > 1e-3, spread, 1.0)  # a constant input stays as it is
    mean, deviation = mean.to(network.device), deviation.to(network.device)
    share(mean, deviation)
    with torch.no_grad():
        linear.bias.add_(linear.weight @ mean)
        linear.weight.mul_(deviation)
    network.head = nn.Sequential(Standardise(mean, deviation), *head)
    try:
        yield
    finally:
        network.head = head
        with torch.no_grad():
            linear.weight.div_(deviation)
            linear.bias.sub_(linear.weight @ mean)
