"""Plain calls of one layer: on the CPU, without options or transforms, straight to the operator.

A short step takes less time than the checks and canonical forms of :mod:`hsm_kernels.functional`. So a module tries
these functions first. They return None for any call that is not plain and for any that the operator refuses; then the
module goes the long way, which computes the same or says what is wrong.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend, _ops

#: weight_ih, weight_hh, bias_ih, bias_hh and, for LSTM, weight_hr of one direction.
_Weights = Sequence[Tensor | None]

_NO_WEIGHTS = (None,) * 5


def _is_plain(input: Any) -> bool:
    """Whether nothing but ``input`` decides which kernel runs."""
    return (
        type(input) is Tensor
        and input.is_cpu
        and _backend.always_takes_cpu_kernels()
        and not torch._C._is_any_autocast_enabled()
    )


def lstm(
    input: Any, hx: Any, directions: Sequence[_Weights], recompute: bool = False
) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    """``output, (h_n, c_n)`` of one LSTM layer, time-major, or None."""
    if not _is_plain(input):
        return None
    if hx is None:
        h_0 = c_0 = None
    elif type(hx) is tuple and len(hx) == 2 and type(hx[0]) is Tensor and type(hx[1]) is Tensor:
        h_0, c_0 = hx
    else:
        return None
    forward, reverse = directions if len(directions) == 2 else (directions[0], _NO_WEIGHTS)
    if len(forward) == 4:
        forward = (*forward, None)
    training = torch.is_grad_enabled() and _ops.needs_gradient(*forward, *reverse, input, h_0, c_0)
    try:
        output, h_n, c_n, _, _ = _ops.plain_lstm_forward[training](
            input, h_0, c_0, *forward, *reverse, None, None, None, None, None, 0, False, False, recompute, training
        )
    except RuntimeError:
        return None
    return output, (h_n, c_n)


def gru(
    input: Any, hx: Any, directions: Sequence[_Weights], recompute: bool = False
) -> tuple[Tensor, Tensor] | None:
    """``output, h_n`` of one GRU layer, time-major, or None."""
    if not _is_plain(input) or not (hx is None or type(hx) is Tensor):
        return None
    forward, reverse = directions if len(directions) == 2 else (directions[0], _NO_WEIGHTS)
    training = torch.is_grad_enabled() and _ops.needs_gradient(*forward, *reverse, input, hx)
    try:
        output, h_n, _ = _ops.plain_gru_forward[training](
            input, hx, *forward[:4], *reverse[:4], None, None, None, None, 0, False, recompute, training
        )
    except RuntimeError:
        return None
    return output, h_n


def lstm_cell(input: Any, hx: Any, weights: _Weights) -> tuple[Tensor, ...] | None:
    """The new ``(h, c)`` of an LSTM cell, or None."""
    return _cell(_ops.plain_lstm_step, input, (None, None) if hx is None else hx, weights)


def gru_cell(input: Any, hx: Any, weights: _Weights) -> tuple[Tensor, ...] | None:
    """The new ``(h,)`` of a GRU cell, or None."""
    return _cell(_ops.plain_gru_step, input, (None,) if hx is None else hx, weights)


def _cell(step: tuple[Any, Any], input: Any, state: tuple[Any, ...], weights: _Weights) -> tuple[Tensor, ...] | None:
    if not _is_plain(input) or any(part is not None and type(part) is not Tensor for part in state):
        return None
    training = torch.is_grad_enabled() and _ops.needs_gradient(*weights, input, *state)
    try:
        results = step[training](input, *state, *weights, training)
    except RuntimeError:
        return None
    new: tuple[Tensor, ...] = results[: len(state)]
    return new
