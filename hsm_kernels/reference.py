"""The definition of hsm_kernels: one recurrent layer, in one direction, in plain PyTorch.

Every kernel is tested against these functions in float64. They are written to be read and to be right, not to be fast;
they are differentiable as often as PyTorch is. Shapes: ``L`` steps, ``N`` sequences, ``I`` inputs, ``H`` hidden units,
``Hout`` is ``P`` (the projected size) with a projection and ``H`` without.

Masks act on edges: entry ``[t, n]`` belongs to the edge between step ``t - 1`` and step ``t`` of sequence ``n``. The
forward direction crosses edge ``t`` when it enters step ``t``; the reverse direction crosses edge ``t + 1`` when it
enters step ``t``, and starts without crossing any.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]


class Weights(NamedTuple):
    """The parameters of one layer and direction, as ``torch.nn`` has them (``G`` = 4 for LSTM, 3 for GRU)."""

    weight_ih: Tensor  #: ``(G * H, I)``
    weight_hh: Tensor  #: ``(G * H, Hout)``
    bias_ih: Tensor | None = None  #: ``(G * H,)``
    bias_hh: Tensor | None = None  #: ``(G * H,)``
    weight_hr: Tensor | None = None  #: ``(P, H)``, LSTM only


class Boundaries(NamedTuple):
    """What happens on the edges between steps, and where sequences end."""

    reset_mask: Tensor | None = None  #: bool ``(L, N)``: the state that crosses is replaced by ``reset_state``
    reset_state: State | None = None  #: like the state, ``None`` = zeros
    detach_mask: Tensor | None = None  #: bool ``(L, N)``: the value crosses, its gradient does not
    lengths: Tensor | None = None  #: int ``(N,)``: steps at and after it are not run


#: No boundaries at all.
UNBOUNDED = Boundaries()

Cell = Callable[[Tensor, State, Weights], State]


def lstm_cell(x: Tensor, state: State, weights: Weights) -> State:
    """One step of :class:`torch.nn.LSTM`: ``x`` ``(N, I)``, state ``(h, c)`` -> the new ``(h, c)``."""
    h, c = state
    gates = F.linear(x, weights.weight_ih, weights.bias_ih) + F.linear(h, weights.weight_hh, weights.bias_hh)
    i, f, g, o = gates.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = (o.sigmoid() * c.tanh()).to(h.dtype)
    if weights.weight_hr is not None:
        h = F.linear(h, weights.weight_hr)
    return h, c


def gru_cell(x: Tensor, state: State, weights: Weights) -> State:
    """One step of :class:`torch.nn.GRU`: ``x`` ``(N, I)``, state ``(h,)`` -> the new ``(h,)``."""
    (h,) = state
    x_r, x_z, x_n = F.linear(x, weights.weight_ih, weights.bias_ih).chunk(3, dim=-1)
    h_r, h_z, h_n = F.linear(h, weights.weight_hh, weights.bias_hh).chunk(3, dim=-1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return ((1 - z) * n + z * h,)


def lstm(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Weights,
    boundaries: Boundaries = UNBOUNDED,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run an LSTM over a whole sequence.

    ``input`` ``(L, N, I)``, ``h_0`` ``(N, Hout)``, ``c_0`` ``(N, H)`` -> ``h`` of every step ``(L, N, Hout)``, ``c``
    of every step ``(L, N, H)``, ``h_n`` ``(N, Hout)``, ``c_n`` ``(N, H)``. Steps at or after a sequence's length are
    zero. The cell state accumulates in float32 or better.

    >>> rnn, x = torch.nn.LSTM(3, 2), torch.randn(4, 1, 3)
    >>> h, c, h_n, c_n = lstm(x, torch.zeros(1, 2), torch.zeros(1, 2), Weights(*rnn.all_weights[0]))
    >>> torch.testing.assert_close(h, rnn(x)[0])
    """
    wide_c = c_0.to(torch.promote_types(c_0.dtype, torch.float32))
    (h, c), (h_n, c_n) = scan(lstm_cell, input, (h_0, wide_c), weights, boundaries, reverse)
    return h, c.to(c_0.dtype), h_n, c_n.to(c_0.dtype)


def gru(
    input: Tensor,
    h_0: Tensor,
    weights: Weights,
    boundaries: Boundaries = UNBOUNDED,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a GRU over a whole sequence.

    ``input`` ``(L, N, I)``, ``h_0`` ``(N, H)`` -> ``h`` of every step ``(L, N, H)`` and ``h_n`` ``(N, H)``. Steps at
    or after a sequence's length are zero.

    >>> rnn, x = torch.nn.GRU(3, 2), torch.randn(4, 1, 3)
    >>> h, h_n = gru(x, torch.zeros(1, 2), Weights(*rnn.all_weights[0]))
    >>> torch.testing.assert_close(h, rnn(x)[0])
    """
    (h,), (h_n,) = scan(gru_cell, input, (h_0,), weights, boundaries, reverse)
    return h, h_n


def scan(
    cell: Cell, input: Tensor, state: State, weights: Weights, boundaries: Boundaries, reverse: bool
) -> tuple[State, State]:
    """Apply ``cell`` to every step of ``input`` -> the states of all steps ``(L, N, ..)``, and the last state."""
    num_steps, batch = input.shape[:2]
    valid = valid_steps(num_steps, batch, boundaries.lengths, input.device)
    # What stands behind the end of a sequence, NaN included, must not reach a gradient.
    input = torch.where(valid[..., None], input, 0)
    zeros = tuple(torch.zeros_like(s) for s in state)
    states: list[State] = [zeros] * num_steps
    for t in reversed(range(num_steps)) if reverse else range(num_steps):
        edge = t + 1 if reverse else t
        if edge < num_steps:
            state = cross(state, edge, valid, boundaries)
        # Nor must a state that waits: the cell is not run on it, and sees zeros in its place.
        new = cell(input[t], select(valid[t], state, zeros), weights)
        state = select(valid[t], new, state)
        states[t] = select(valid[t], new, zeros)
    if not states:
        return tuple(s.new_empty(0, *s.shape) for s in state), state
    return tuple(torch.stack(parts) for parts in zip(*states, strict=True)), state


def cross(state: State, edge: int, valid: Tensor, boundaries: Boundaries) -> State:
    """The state after it crossed ``edge``: detached, or replaced, where the masks say so. Reset wins over detach."""
    if boundaries.detach_mask is not None:
        state = select(boundaries.detach_mask[edge] & valid[edge], tuple(s.detach() for s in state), state)
    if boundaries.reset_mask is not None:
        reset_state = boundaries.reset_state or tuple(torch.zeros_like(s) for s in state)
        state = select(boundaries.reset_mask[edge] & valid[edge], reset_state, state)
    return state


def select(condition: Tensor, yes: State, no: State) -> State:
    """``yes`` for the sequences where ``condition`` ``(N,)`` holds, else ``no``; selected, so that no NaN leaks."""
    return tuple(torch.where(condition[:, None], y.to(n.dtype), n) for y, n in zip(yes, no, strict=True))


def valid_steps(num_steps: int, batch: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Bool ``(L, N)``: True where ``t < lengths[n]``, everywhere without lengths."""
    if lengths is None:
        return torch.ones(num_steps, batch, dtype=torch.bool, device=device)
    return torch.arange(num_steps, device=device)[:, None] < lengths.to(device)


def lstm_layer(
    input: Tensor, h_0: Tensor, c_0: Tensor, weights: list[Weights], boundaries: list[Boundaries]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All directions of one LSTM layer, the forward one first.

    ``h_0`` ``(D, N, Hout)``, ``c_0`` ``(D, N, H)`` -> ``output`` ``(L, N, D * Hout)``, ``h_n`` ``(D, N, Hout)``,
    ``c_n`` ``(D, N, H)``, ``c`` of every step ``(L, N, D, H)``.
    """
    runs = [lstm(input, h_0[d], c_0[d], w, boundaries[d], reverse=d == 1) for d, w in enumerate(weights)]
    h, c, h_n, c_n = zip(*runs, strict=True)
    return torch.cat(h, dim=-1), torch.stack(h_n), torch.stack(c_n), torch.stack(c, dim=2)


def gru_layer(
    input: Tensor, h_0: Tensor, weights: list[Weights], boundaries: list[Boundaries]
) -> tuple[Tensor, Tensor]:
    """All directions of one GRU layer: ``h_0`` ``(D, N, H)`` -> ``output`` ``(L, N, D * H)``, ``h_n`` ``(D, N, H)``."""
    runs = [gru(input, h_0[d], w, boundaries[d], reverse=d == 1) for d, w in enumerate(weights)]
    h, h_n = zip(*runs, strict=True)
    return torch.cat(h, dim=-1), torch.stack(h_n)
