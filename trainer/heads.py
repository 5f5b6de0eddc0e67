"""The heads while they are fitted: the same logits as `Network.answer` on standardised inputs, in half the time.

Most of a training step is the heads' first layer, as there are more moments than events. Three things are not done here:
* standardising every input: (x - mean) / deviation is folded into the layer's weights, which are small, anew in each step;
* taking gradients of inputs that are given, eight in ten of them;
* multiplying an event's hidden state for each of its moments: that is done once an event, and the moments take its row.
And units to drop are drawn a byte each, not a number of 24 bits.

Axis letters: N events of a batch, L moments asked of them; the others as in `model.network`.
"""

from __future__ import annotations

import torch
from torch import nn

from model.network import Network, told
from trainer.standard import Standardise


def answer(
    network: Network,
    hidden_NH: torch.Tensor,
    place_L: torch.Tensor,
    believed_LS: torch.Tensor,
    base_LJX: torch.Tensor,
    readout_LR: torch.Tensor,
    mixed: bool = False,
) -> torch.Tensor:
    """(L, K, B) hazard logits at moments after the events at `place_L`. The network's head must be standardised (`trainer.standard`).

    mixed: multiply in bfloat16. Weights, what follows from the cells, and the sum of logits stay float32, as do the recurrent units: cuDNN
    would take them in float16, which needs its losses scaled.
    """
    standardise, first, _, dropout, last = network.head
    assert isinstance(standardise, Standardise)
    assert isinstance(first, nn.Linear)
    assert isinstance(dropout, nn.Dropout)
    weight = first.weight * standardise.factor
    bias = first.bias - weight @ standardise.mean
    of_hidden, of_cells, of_readout = weight.tensor_split((hidden_NH.shape[1], weight.shape[1] - readout_LR.shape[1]), dim=1)
    with torch.autocast(hidden_NH.device.type, torch.bfloat16, enabled=mixed):
        units_LU = (hidden_NH @ of_hidden.t()).index_select(0, place_L) + torch.addmm(bias, readout_LR, of_readout.t())
        if network.shape.cells:
            units_LU = units_LU + told(believed_LS, base_LJX) @ of_cells.t()
        out: torch.Tensor = last(dropped(torch.relu(units_LU), dropout.p if dropout.training else 0.0)).float()
    return network.trusting(out, base_LJX).view(-1, network.shape.sets, network.shape.bins)


def dropped(units: torch.Tensor, share: float) -> torch.Tensor:
    """Dropout of about this share: of 256ths."""
    kept = 256 - round(256 * share)
    if kept == 256:
        return units
    words = torch.empty(-(-units.numel() // 8), dtype=torch.int64, device=units.device).random_(-(1 << 63), None)
    mask = (words.view(torch.uint8)[: units.numel()] < kept).view(units.shape)
    return units * (mask * (256 / kept))
