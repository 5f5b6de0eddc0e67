"""The recurrent units over a packed batch; the GRU, for training on CPU: the same numbers as `torch.nn.GRU`, at a third of its time.

torch's backward pass adds to the weights' gradients at every step; here the steps only carry the hidden state's gradient back, and
the weights' gradients are one product over all events at the end (as cuDNN has it).

Axis letters: N packed events, F features, H units, G = 3 H gates (reset, update, new).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from model.network import CELL_LIMIT, Encoder


def hidden_states(
    encoder: Encoder, inputs_NF: torch.Tensor, sizes: Sequence[int], begin_CZ: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, H) hidden state after each event of C chunks, and (C, Z) the recurrent state in which each chunk ends.

    sizes: chunks that have a t-th event, falling. begin_CZ: states from which the chunks begin, without gradient; zeros by default.
    """
    shape = encoder.shape
    if begin_CZ is None:
        begin_CZ = inputs_NF.new_zeros(sizes[0], shape.recurrent)
    if inputs_NF.is_cuda or shape.encoder != "gru":
        return _of_torch(encoder, inputs_NF, sizes, begin_CZ)
    weights = encoder.rnn.all_weights[0]
    states: torch.Tensor = _Gru.apply(inputs_NF, *weights, sizes, begin_CZ)
    return states, states.detach()[_last_places(sizes)]


def _of_torch(encoder: Encoder, inputs_NF: torch.Tensor, sizes: Sequence[int], begin_CZ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    packed = PackedSequence(inputs_NF, torch.tensor(sizes))
    hidden_CH = begin_CZ[:, : encoder.shape.hidden].unsqueeze(0).contiguous()
    if encoder.shape.encoder != "lstm":
        out, ended = encoder.rnn(packed, hidden_CH)
        return out.data, ended[0]
    cells_CH = begin_CZ[:, encoder.shape.hidden :].unsqueeze(0).contiguous() * CELL_LIMIT
    out, (ended, cells) = encoder.rnn(packed, (hidden_CH, cells_CH))
    return out.data, torch.cat([ended[0], cells[0].clamp(-CELL_LIMIT, CELL_LIMIT) / CELL_LIMIT], dim=1)


def _last_places(sizes: Sequence[int]) -> torch.Tensor:
    """(C,) packed position of each chunk's last event."""
    sizes_T = torch.tensor([*sizes, 0])
    length_C = torch.searchsorted(-sizes_T[:-1], -torch.arange(sizes[0]) - 1, side="right")
    starts_T = torch.cumsum(sizes_T, 0) - sizes_T
    return starts_T[length_C - 1] + torch.arange(sizes[0])


class _Gru(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NF: torch.Tensor, w_ih: torch.Tensor, w_hh: torch.Tensor, b_ih: torch.Tensor, b_hh: torch.Tensor, sizes: Sequence[int],
        begin_CH: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        n, h = len(x_NF), w_hh.shape[1]
        from_input_NG = torch.addmm(b_ih, x_NF, w_ih.t())
        gates_NG, before_NH, after_NH, candidate_NH = (torch.empty(n, k) for k in (3 * h, h, h, h))
        w_HG = w_hh.t().contiguous()
        hidden = begin_CH
        begin = 0
        for size in sizes:
            rows = slice(begin, begin := begin + size)
            hidden = hidden[:size]
            before_NH[rows] = hidden
            from_hidden = torch.addmm(b_hh, hidden, w_HG)
            gates, from_input = gates_NG[rows], from_input_NG[rows]
            reset_update, new = gates[:, : 2 * h], gates[:, 2 * h :]
            torch.add(from_input[:, : 2 * h], from_hidden[:, : 2 * h], out=reset_update).sigmoid_()
            candidate_NH[rows] = from_hidden[:, 2 * h :]
            torch.addcmul(from_input[:, 2 * h :], reset_update[:, :h], from_hidden[:, 2 * h :], out=new).tanh_()
            hidden = torch.lerp(new, hidden, reset_update[:, h:])
            after_NH[rows] = hidden
        ctx.save_for_backward(x_NF, w_ih, w_hh, gates_NG, before_NH, candidate_NH)
        ctx.sizes = sizes
        return after_NH

    @staticmethod
    def backward(ctx: Any, d_after_NH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NF, w_ih, w_hh, gates_NG, before_NH, candidate_NH = ctx.saved_tensors
        n, h = before_NH.shape
        reset, update, new = gates_NG.split(h, dim=1)
        # What a gradient of the state becomes at each gate's input: known for all steps at once.
        to_new = (1 - update) * (1 - new * new)
        to_update = (before_NH - new) * update * (1 - update)
        new_to_reset = candidate_NH * reset * (1 - reset)
        d_input_NG, d_hidden_NG = torch.empty(n, 3 * h), torch.empty(n, 3 * h)
        carried = torch.zeros(ctx.sizes[0], h)
        end = n
        for size in reversed(ctx.sizes):
            rows = slice(end - size, end)
            end -= size
            d_state = d_after_NH[rows] + carried[:size]
            d_new, gates = d_input_NG[rows, 2 * h :], d_hidden_NG[rows]
            torch.mul(d_state, to_new[rows], out=d_new)
            torch.mul(d_new, new_to_reset[rows], out=gates[:, :h])
            torch.mul(d_state, to_update[rows], out=gates[:, h : 2 * h])
            torch.mul(d_new, reset[rows], out=gates[:, 2 * h :])
            torch.addcmul(gates @ w_hh, d_state, update[rows], out=carried[:size])
        d_input_NG[:, : 2 * h] = d_hidden_NG[:, : 2 * h]
        return d_input_NG @ w_ih, d_input_NG.t() @ x_NF, d_hidden_NG.t() @ before_NH, d_input_NG.sum(0), d_hidden_NG.sum(0), None, None
