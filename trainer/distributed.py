"""Several processes that fit one model: `torchrun --nproc-per-node N -m trainer train`.

1. Each process has the users of its share of every shard, prepares them and validates on them: memory and time are divided.
2. A step is one for all. Each process takes its part of a batch, gradients are averaged by the weight of what they are of, so that they
   are those of the whole batch; every process then moves its own copy of the weights in the same way.
3. What is to be decided is decided by the first process, or by all together: vocabulary, scaling, the belief cell (which it fits alone),
   the start, when to stop. The first process also judges and publishes.
4. A process that dies takes the others with it: they wait for it in the next step, and torchrun ends them.

One process alone is a team of one, for which all of this is nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from trainer.settings import TrainerSettings

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: the first one may be fitting the belief cell."""


@dataclass(frozen=True, slots=True)
class Team:
    """This process among the others: its number, and how many there are. device: where its tensors are exchanged."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        return self.rank == 0

    def first_says(self, value: T) -> T:
        """The first process's value."""
        if self.size == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def total(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return [float(v) for v in summed]

    def most(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def share(self, *tensors: torch.Tensor) -> None:
        """Give everybody the first process's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def share_weights(self, module: nn.Module) -> None:
        self.share(*module.state_dict().values())

    def average_gradients(self, parameters: Iterable[nn.Parameter], weight: torch.Tensor) -> torch.Tensor:
        """Average the gradients in place, each process's by its `weight`, a scalar. Returns the weights' sum. No gradient counts as 0."""
        if self.size == 1:
            return weight
        parameters = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(g.flatten() * weight for g in gradients), weight.view(1)])
        dist.all_reduce(flat)
        total = flat[-1]
        parts = torch.split(flat[:-1] / total.clamp(min=1e-9), [p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return total


ALONE = Team()


@contextmanager
def joined(settings: TrainerSettings) -> Iterator[tuple[Team, TrainerSettings]]:
    """The team that torchrun's environment speaks of, and the settings with this process's own device: each has a GPU, or a CPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE, settings
        return
    device = settings.resolved_device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), size, device), settings.model_copy(update={"device": device})
    finally:
        dist.destroy_process_group()
