"""What is not sequential in the backward pass: weight and input gradients, gates computed again.

Each is a product over all steps.

The recurrence leaves the gradient of every gate pre-activation, ``grad_gates`` ``(L, N, D, 4 * H)``. For a GRU its
four parts are ``r``, ``z``, the input half of ``n`` and the hidden half of ``n``. Everything here is plain tensor
algebra and runs on any device.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ._recurrences import Edges, enter
from .reference import Weights, valid_steps


def previous_states(
    states: Tensor,
    initial: Tensor | None,
    *,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> Tensor:
    """The state that entered each step of one direction, ``(L, N, X)``, from the state that left it.

    ``initial`` and ``reset_state`` are ``(N, X)``, None meaning zeros. Padded steps are zero.
    """
    num_steps = states.size(0)
    first = states.new_zeros(states.shape[1:]) if initial is None else initial
    if lengths is None and reset_mask is not None and num_steps > 0:
        return _with_resets(states, first, reset_mask, reset_state, reverse)
    return enter(states, first, reset_state, Edges.of(reset_mask, None, lengths, num_steps, reverse), None)


def _with_resets(
    states: Tensor, first: Tensor, reset_mask: Tensor, reset_state: Tensor | None, reverse: bool
) -> Tensor:
    """``previous_states`` where all sequences have all steps, which takes one pass over memory."""
    value = states.new_zeros(()) if reset_state is None else reset_state
    entering = torch.empty_like(states, memory_format=torch.contiguous_format)
    edges = reset_mask[..., None]
    if reverse:
        torch.where(edges[1:], value, states[1:], out=entering[:-1])
        entering[-1] = first
    else:
        torch.where(edges[1:], value, states[:-1], out=entering[1:])
        torch.where(edges[:1], value, first, out=entering[:1])
    return entering


def flat(steps: Tensor) -> Tensor:
    """Join steps and sequences: ``(L, N, X)`` -> ``(L * N, X)``, a view wherever the strides allow it."""
    return steps.flatten(0, 1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of matrices, by the fastest kernel there is; not differentiable."""
    found: Tensor = torch.ops.hsm_kernels.product.default(a, b)
    return found


def weight_gradient(grad_outputs: Tensor, inputs: Tensor) -> Tensor:
    """The gradient of ``W`` in ``outputs = inputs @ W.T``, summed over steps and sequences: ``(O, X)``."""
    return product(flat(grad_outputs).t(), flat(inputs))


class HiddenStates:
    """The hidden states of a layer's directions, as the steps left them and as they entered the next ones."""

    def __init__(
        self,
        output: Tensor,
        h_0: Tensor | None,
        directions: int,
        reset_mask: Tensor | None,
        reset_h: Tensor | None,
        lengths: Tensor | None,
    ) -> None:
        self.output = output
        self.h_0 = h_0
        self.directions = directions
        self.reset_mask = reset_mask
        self.reset_h = reset_h
        self.lengths = lengths

    @cached_property
    def entering(self) -> list[Tensor]:
        """The state that entered each step, ``(L, N, Hout)`` for each direction."""
        return [
            previous_states(
                states,
                None if self.h_0 is None else self.h_0[d],
                reset_mask=self.reset_mask,
                reset_state=None if self.reset_h is None else self.reset_h[d],
                lengths=self.lengths,
                reverse=d == 1,
            )
            for d, states in enumerate(self.output.chunk(self.directions, dim=-1))
        ]

    @property
    def cut(self) -> bool:
        """Whether some steps were entered by another state than the one before left, or the initial one."""
        return self.reset_mask is not None or self.lengths is not None


def lstm_gates(input: Tensor, entering: Sequence[Tensor] | Tensor, weights: list[Weights]) -> Tensor:
    """The gates i, f, g, o of all steps, ``(L, N, D, 4 * H)``, from the hidden state that entered each step."""
    parts = []
    for h, w in zip(entering, weights, strict=True):
        gates = _affine(input, w.weight_ih, w.bias_ih).add_(_affine(h, w.weight_hh, w.bias_hh))
        hidden = gates.size(1) // 4
        gates[:, : 2 * hidden].sigmoid_()
        gates[:, 2 * hidden : 3 * hidden].tanh_()
        gates[:, 3 * hidden :].sigmoid_()
        parts.append(gates)
    return _by_step(parts, input)


def gru_gates(input: Tensor, entering: Sequence[Tensor] | Tensor, weights: list[Weights]) -> Tensor:
    """The gates r, z, n and the hidden half of n of all steps, ``(L, N, D, 4 * H)``; see :func:`lstm_gates`."""
    parts = []
    for h, w in zip(entering, weights, strict=True):
        hidden = w.weight_hh.size(0) // 3
        rz_of, n_of = slice(2 * hidden), slice(2 * hidden, None)
        rz = _affine(input, *_rows(w, rz_of, "ih")).add_(_affine(h, *_rows(w, rz_of, "hh"))).sigmoid_()
        hidden_n = _affine(h, *_rows(w, n_of, "hh"))
        n = _affine(input, *_rows(w, n_of, "ih")).addcmul_(rz[:, :hidden], hidden_n).tanh_()
        parts.append(torch.cat([rz, n, hidden_n], dim=1))
    return _by_step(parts, input)


def _rows(weights: Weights, rows: slice, kind: str) -> tuple[Tensor, Tensor | None]:
    """Some rows of ``weight_{kind}`` and ``bias_{kind}``."""
    weight, bias = getattr(weights, f"weight_{kind}"), getattr(weights, f"bias_{kind}")
    return weight[rows], None if bias is None else bias[rows]


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` of all steps, ``(L * N, O)``."""
    found = product(flat(x), weight.t())
    return found if bias is None else found.add_(bias)


def _by_step(parts: list[Tensor], like: Tensor) -> Tensor:
    """The directions' ``(L * N, X)`` as ``(L, N, D, X)``."""
    joined = parts[0].unsqueeze(1) if len(parts) == 1 else torch.stack(parts, dim=1)
    return joined.view(like.size(0), like.size(1), len(parts), joined.size(2))


def without_padding(steps: Tensor, lengths: Tensor | None) -> Tensor:
    """``steps`` ``(L, N, X)`` with zeros behind the end of each sequence: what stands there reaches no gradient."""
    if lengths is None:
        return steps
    return torch.where(valid_steps(steps.size(0), steps.size(1), lengths, steps.device)[..., None], steps, 0)
