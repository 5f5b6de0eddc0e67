"""What the cells foresee at moments, stepped over whole streams as a worker does: inputs of the heads that no head changes.

Axis letters as in `model.network`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from model.belief import levels
from model.network import Network
from trainer.dataset import by_rank
from trainer.material import BLOCK, Material

Foresight = Callable[[Material], tuple[torch.Tensor, torch.Tensor]]
"""(L, S) belief and (L, J, X) hazard logits that follow from each cell, at each moment of some material (`Network.foresee`)."""


def nothing(material: Material) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a cell."""
    return torch.empty(len(material.moments), 0), torch.empty(len(material.moments), 0, 0)


def foresight(network: Network) -> Foresight:
    """By the cells as they are now, on the CPU: their recursions are many small products."""
    cells = copy.deepcopy(network).to("cpu")
    cells.refresh()
    return lambda material: _foreseen(cells, material)


@torch.inference_mode()
def _foreseen(network: Network, material: Material) -> tuple[torch.Tensor, torch.Tensor]:
    if not network.shape.cells:
        return nothing(material)
    belief, rhythm, moments = network.encoder.belief, network.encoder.rhythm, material.moments
    users, first, active = by_rank(material.history.first)
    slot = torch.from_numpy(material.steps.slot)
    level = torch.from_numpy(levels(network.clock.elapsed_ms(material.steps.time_ms - material.steps.gap_ms, material.steps.time_ms)))
    gap = torch.from_numpy(material.gap_EK)
    shape, events = network.shape, len(material.history)
    root_S, root_Y = torch.zeros(len(users), shape.belief), torch.zeros(len(users), shape.sets * shape.rhythm)
    root_ES, root_EY = torch.empty(events, root_S.shape[1]), torch.empty(events, root_Y.shape[1])
    begin = torch.from_numpy(first)
    for rank, n in enumerate(active.tolist()):
        rows = begin[:n] + rank
        if belief is not None:
            root_ES[rows] = root_S = belief.step(root_S[:n], slot[rows], level[rows])
        if rhythm is not None:
            root_EY[rows] = root_Y = rhythm.step(root_Y[:n], gap[rows])
    believed_LS = torch.empty(len(moments), shape.belief)
    base_LJX = torch.empty(len(moments), shape.cells, shape.sets * shape.bins)
    for i in range(0, len(moments), BLOCK):
        some = slice(i, i + BLOCK)
        event = torch.from_numpy(moments.event[some])
        believed_LS[some], base_LJX[some] = network.foresee(root_ES[event], root_EY[event], material.silence[some])
    return believed_LS, base_LJX
