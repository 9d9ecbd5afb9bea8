"""The kernels of the ops in plain PyTorch, for devices and machines that have no native library.

The forward passes run :mod:`hsm_kernels.reference`. The backward passes are those of :mod:`hsm_kernels._derivatives`.
"""

from typing import Any, cast

import torch
from torch import Tensor

from . import _derivatives, reference
from ._gradients import HiddenStates, gru_gates, lstm_gates, without_padding
from .reference import Boundaries, Weights


def initial_or_zeros(initial: Tensor | None, like: Tensor, directions: int, size: int) -> Tensor:
    """``initial``, or zeros ``(D, N, size)`` for the sequences of ``like`` ``(L, N, ..)``."""
    return like.new_zeros(directions, like.size(1), size) if initial is None else initial


def lstm_forward(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Weights],
    reset_mask: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    lengths: Tensor | None,
    keep_c: bool,
    keep_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``lstm_forward`` in ``_ops.py``."""
    directions, (gate_rows, hidden_out) = len(weights), weights[0].weight_hh.shape
    h_0 = initial_or_zeros(h_0, input, directions, hidden_out)
    c_0 = initial_or_zeros(c_0, input, directions, gate_rows // 4)
    boundaries = lstm_boundaries(directions, reset_mask, reset_h, reset_c, None, lengths)
    output, h_n, c_n, c_states = reference.lstm_layer(input, h_0, c_0, weights, boundaries)
    gates = input.new_empty(0)
    if keep_gates:
        states = HiddenStates(output, h_0, directions, reset_mask, reset_h, lengths)
        gates = lstm_gates(without_padding(input, lengths), states.entering, weights)
    # torch.stack leaves views below autograd, and a view that a function returns cannot be edited in place.
    h_n, c_n = h_n.clone(), c_n.clone()
    return output, h_n, c_n, c_states if keep_c else input.new_empty(0), gates


def gru_forward(
    input: Tensor,
    h_0: Tensor | None,
    weights: list[Weights],
    reset_mask: Tensor | None,
    reset_h: Tensor | None,
    lengths: Tensor | None,
    keep_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``gru_forward`` in ``_ops.py``."""
    directions = len(weights)
    h_0 = initial_or_zeros(h_0, input, directions, weights[0].weight_hh.size(1))
    boundaries = gru_boundaries(directions, reset_mask, reset_h, None, lengths)
    output, h_n = reference.gru_layer(input, h_0, weights, boundaries)
    gates = input.new_empty(0)
    if keep_gates:
        states = HiddenStates(output, h_0, directions, reset_mask, reset_h, lengths)
        gates = gru_gates(without_padding(input, lengths), states.entering, weights)
    return output, h_n.clone(), gates  # see lstm_forward


def lstm_boundaries(
    directions: int,
    reset_mask: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    detach_mask: Tensor | None,
    lengths: Tensor | None,
) -> list[Boundaries]:
    """The boundaries of each direction of an LSTM layer; ``reset_h`` and ``reset_c`` are ``(D, N, ..)``."""
    states = [None if reset_h is None or reset_c is None else (reset_h[d], reset_c[d]) for d in range(directions)]
    return [Boundaries(reset_mask, state, detach_mask, lengths) for state in states]


def gru_boundaries(
    directions: int,
    reset_mask: Tensor | None,
    reset_h: Tensor | None,
    detach_mask: Tensor | None,
    lengths: Tensor | None,
) -> list[Boundaries]:
    """The boundaries of each direction of a GRU layer; ``reset_h`` is ``(D, N, H)``."""
    states = [None if reset_h is None else (reset_h[d],) for d in range(directions)]
    return [Boundaries(reset_mask, state, detach_mask, lengths) for state in states]


def backward(
    layer: _derivatives.Layer,
    steps: tuple[Tensor | None, ...],
    last: tuple[Tensor | None, ...],
    needs_input: bool,
    samples: int,
) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...], tuple[Tensor, ...], list[Any]]:
    """Gradients of the input, of every step's h, of the initial and of the reset state, and those of the weights.

    See ``lstm_backward`` in ``_ops.py``; a state's gradients are one for LSTM's h and one for its c. ``samples``: see
    :func:`_derivatives.gradients`.
    """
    at_input, states, weights = _derivatives.gradients(layer, steps, last, needs_input, samples)
    empty = layer.input.new_empty
    of_weights: list[Any] = [empty(0) for _ in range(6)]
    for d, w in enumerate(weights or ()):
        of_input, of_hidden = cast(tuple[Tensor, Tensor], w[2:4])  # of which a GRU's differ in the halves of n
        of_gates = of_input if layer.is_lstm else torch.cat([of_input, of_hidden.tensor_split(3, dim=-1)[2]], dim=-1)
        of_weights[3 * d : 3 * d + 3] = [w.weight_ih, w.weight_hh, of_gates]
    resets = tuple(empty(0) for _ in steps) if layer.reset[-1] is None else states.reset
    return empty(0) if at_input is None else at_input, states.h, states.initial, resets, of_weights
