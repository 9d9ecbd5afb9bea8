"""The kernels of the ops in plain PyTorch, for devices and machines that have no native library.

The forward passes run :mod:`hsm_kernels.reference`. The backward passes are the closed form that the native kernels
compute: one sequential loop over the steps for the gate gradients.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import reference
from ._gradients import HiddenStates, gru_gates, lstm_gates, previous_states, weight_gradient, without_padding
from .reference import Boundaries, State, Weights, select, valid_steps


def at(tensor: Tensor | None, direction: int) -> Tensor | None:
    """The part of a ``(D, ...)`` tensor that belongs to one direction; None stays None."""
    return None if tensor is None else tensor[direction]


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
    return output, h_n, gates


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


def products(
    grad_gates: Tensor,
    input: Tensor,
    entering: Sequence[Tensor] | Tensor,
    weights: list[Weights],
    needs_input: bool,
    needs_weights: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the input, and of weights and biases as the backward operators return them.

    ``grad_gates`` ``(L, N, D, 4 * H)``; ``entering``: the hidden state that entered each step, by direction.
    """
    grad_input = torch.zeros_like(input) if needs_input else input.new_empty(0)
    grad_weights = [input.new_empty(0) for _ in range(6)]
    for d, w in enumerate(weights):
        grad, rows = grad_gates[:, :, d], w.weight_ih.size(0)
        if needs_input:
            grad_input = grad_input + grad[..., :rows] @ w.weight_ih
        if needs_weights:
            hidden = grad.size(-1) // 4
            grad_hidden = grad if rows == 4 * hidden else torch.cat([grad[..., : 2 * hidden], grad[..., rows:]], dim=-1)
            grad_weights[3 * d : 3 * d + 3] = [
                weight_gradient(grad[..., :rows], input),
                weight_gradient(grad_hidden, entering[d]),
                grad.sum((0, 1)),
            ]
    return grad_input, grad_weights


#: (step, gradients of the state that left it) -> (gradients of the state that entered it, what to keep).
BackwardStep = Callable[[int, State], tuple[State, State]]


def backward_scan(
    step: BackwardStep, carried: State, num_steps: int, boundaries: Boundaries, reverse: bool
) -> tuple[list[State], State, State]:
    """Run ``step`` over all steps against the direction of time.

    ``carried`` holds the gradients of the last state. Returns what each step keeps (zero at padded steps), the
    gradients of the initial state and those of the reset state.
    """
    valid = valid_steps(num_steps, carried[0].size(0), boundaries.lengths, carried[0].device)
    zeros = tuple(torch.zeros_like(g) for g in carried)
    reset_grads, kept = zeros, [zeros] * num_steps
    for t in range(num_steps) if reverse else reversed(range(num_steps)):
        entering, keep = step(t, carried)
        kept[t] = select(valid[t], keep, tuple(torch.zeros_like(k) for k in keep))
        edge = t + 1 if reverse else t
        if edge < num_steps:
            if boundaries.reset_mask is not None:
                reset = boundaries.reset_mask[edge] & valid[edge]
                reset_grads = tuple(r + s for r, s in zip(reset_grads, select(reset, entering, zeros), strict=True))
                entering = select(reset, zeros, entering)
            if boundaries.detach_mask is not None:
                entering = select(boundaries.detach_mask[edge] & valid[edge], zeros, entering)
        carried = select(valid[t], entering, carried)
    return kept, carried, reset_grads


def lstm_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_c_states: Tensor | None,
    c_states: Tensor,
    gates: Tensor,
    c_0: Tensor | None,
    weights: list[Weights],
    reset_mask: Tensor | None,
    reset_c: Tensor | None,
    detach_mask: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``lstm_backward`` in ``_ops.py``."""
    dtype, wide = gates.dtype, torch.promote_types(gates.dtype, torch.float32)
    num_steps, batch, directions, hidden = c_states.shape
    hidden_out = weights[0].weight_hh.size(1)
    zeros_h, zeros_c = (torch.zeros(batch, s, dtype=wide, device=gates.device) for s in (hidden_out, hidden))
    runs = []
    for d, w in enumerate(weights):
        c = c_states[:, :, d]
        c_entering = previous_states(
            c,
            at(c_0, d),
            reset_mask=reset_mask,
            reset_state=at(reset_c, d),
            lengths=lengths,
            reverse=d == 1,
        )
        grad_h = None if grad_output is None else grad_output.chunk(directions, dim=-1)[d]
        step = _lstm_backward_step(
            gates[:, :, d].to(wide),
            c.to(wide),
            c_entering.to(wide),
            grad_h,
            None if grad_c_states is None else grad_c_states[:, :, d],
            w.weight_hh.to(wide),
            None if w.weight_hr is None else w.weight_hr.to(wide),
        )
        carried = (
            zeros_h if grad_h_n is None else grad_h_n[d].to(wide),
            zeros_c if grad_c_n is None else grad_c_n[d].to(wide),
        )
        runs.append(backward_scan(step, carried, num_steps, Boundaries(reset_mask, None, detach_mask, lengths), d == 1))
    kept, initial, resets = zip(*runs, strict=True)
    grad_gates = _stack_kept(kept, 0, gates)
    has_projection = weights[0].weight_hr is not None
    like_h = gates.new_empty(num_steps, batch, directions, hidden_out)
    return (
        grad_gates,
        _stack_kept(kept, 1, like_h) if has_projection else gates.new_empty(0),
        torch.stack([s[0] for s in initial]).to(dtype),
        torch.stack([s[1] for s in initial]).to(dtype),
        gates.new_empty(0) if reset_c is None else torch.stack([s[0] for s in resets]).to(dtype),
        gates.new_empty(0) if reset_c is None else torch.stack([s[1] for s in resets]).to(dtype),
    )


def _lstm_backward_step(
    gates: Tensor,
    c: Tensor,
    c_entering: Tensor,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
) -> BackwardStep:
    def step(t: int, carried: State) -> tuple[State, State]:
        dh, dc = carried
        dh = dh if grad_h is None else dh + grad_h[t]
        dc = dc if grad_c is None else dc + grad_c[t]
        i, f, g, o = gates[t].chunk(4, dim=-1)
        tanh_c = c[t].tanh()
        dm = dh if weight_hr is None else dh @ weight_hr
        dc = dc + dm * o * (1 - tanh_c * tanh_c)
        grad_gates = torch.cat(
            [
                dc * g * i * (1 - i),
                dc * c_entering[t] * f * (1 - f),
                dc * i * (1 - g * g),
                dm * tanh_c * o * (1 - o),
            ],
            dim=-1,
        )
        return (grad_gates @ weight_hh, dc * f), (grad_gates, dh)

    return step


def gru_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    gates: Tensor,
    h_0: Tensor | None,
    weights: list[Weights],
    reset_mask: Tensor | None,
    reset_h: Tensor | None,
    detach_mask: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``gru_backward`` in ``_ops.py``."""
    dtype, wide = gates.dtype, torch.promote_types(gates.dtype, torch.float32)
    num_steps, batch, directions, hidden = (
        gates.size(0),
        gates.size(1),
        gates.size(2),
        weights[0].weight_hh.size(1),
    )
    runs = []
    for d, w in enumerate(weights):
        h_entering = previous_states(
            output.chunk(directions, dim=-1)[d],
            at(h_0, d),
            reset_mask=reset_mask,
            reset_state=at(reset_h, d),
            lengths=lengths,
            reverse=d == 1,
        )
        grad_h = None if grad_output is None else grad_output.chunk(directions, dim=-1)[d]
        step = _gru_backward_step(gates[:, :, d].to(wide), h_entering.to(wide), grad_h, w.weight_hh.to(wide))
        zeros = torch.zeros(batch, hidden, dtype=wide, device=gates.device)
        carried = (zeros if grad_h_n is None else grad_h_n[d].to(wide),)
        runs.append(backward_scan(step, carried, num_steps, Boundaries(reset_mask, None, detach_mask, lengths), d == 1))
    kept, initial, resets = zip(*runs, strict=True)
    return (
        _stack_kept(kept, 0, gates),
        torch.stack([s[0] for s in initial]).to(dtype),
        gates.new_empty(0) if reset_h is None else torch.stack([s[0] for s in resets]).to(dtype),
    )


def _gru_backward_step(gates: Tensor, h_entering: Tensor, grad_h: Tensor | None, weight_hh: Tensor) -> BackwardStep:
    def step(t: int, carried: State) -> tuple[State, State]:
        (dh,) = carried
        dh = dh if grad_h is None else dh + grad_h[t]
        r, z, n, h_n = gates[t].chunk(4, dim=-1)
        dn = dh * (1 - z) * (1 - n * n)
        dz = dh * (h_entering[t] - n) * z * (1 - z)
        dr = dn * h_n * r * (1 - r)
        grad_hidden = torch.cat([dr, dz, dn * r], dim=-1)
        return (grad_hidden @ weight_hh + dh * z,), (torch.cat([dr, dz, dn, dn * r], dim=-1),)

    return step


def _stack_kept(kept: tuple[list[State], ...], part: int, like: Tensor) -> Tensor:
    """One part of what the steps of all directions kept, as ``(L, N, D, X)`` in the dtype of ``like``."""
    if like.size(0) == 0:
        return torch.empty_like(like)
    return torch.stack([torch.stack([k[part] for k in run]) for run in kept], dim=2).to(like.dtype)
