"""What follows the backward recurrence: weight and input gradients, each one product over all steps.

The recurrence leaves the gradient of every gate pre-activation, ``grad_gates`` ``(L, N, D, 4 * H)``. For a GRU its
four parts are ``r``, ``z``, the input half of ``n`` and the hidden half of ``n``. Everything here is plain tensor
algebra and runs on any device.
"""

import torch
from torch import Tensor

from .reference import valid_steps


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

    ``initial`` and ``reset_state`` are ``(N, X)``, None meaning zeros. What stands at padded steps is unspecified but
    finite.
    """
    num_steps, batch = states.shape[:2]
    first = torch.zeros_like(states[:1]) if initial is None else initial[None, :, :][:num_steps]
    entering = torch.cat([states[1:], first]) if reverse else torch.cat([first, states[:-1]])
    if lengths is None and reset_mask is None:
        return entering
    # crossed[t]: the state that entered step t came over an edge of the sequence, not from `initial`.
    crossed = valid_steps(num_steps, batch, lengths, states.device)
    if reverse:
        crossed = _edges_of_reverse(crossed)
        entering = torch.where(crossed[..., None], entering, 0 if initial is None else initial)
    if reset_mask is not None:
        reset = crossed & (_edges_of_reverse(reset_mask) if reverse else reset_mask)
        entering = torch.where(reset[..., None], 0 if reset_state is None else reset_state, entering)
    return entering


def _edges_of_reverse(mask: Tensor) -> Tensor:
    """Entry ``t + 1`` at ``t``: the edge that the reverse direction crosses to enter ``t``; no edge to the last."""
    return torch.cat([mask[1:], torch.zeros_like(mask[:1])])


def flat(steps: Tensor) -> Tensor:
    """Join steps and sequences: ``(L, N, X)`` -> ``(L * N, X)``, a view wherever the strides allow it."""
    return steps.flatten(0, 1)


def weight_gradient(grad_outputs: Tensor, inputs: Tensor) -> Tensor:
    """The gradient of ``W`` in ``outputs = inputs @ W.T``, summed over steps and sequences: ``(O, X)``."""
    return flat(grad_outputs).t() @ flat(inputs)


def recurrent_weight_gradient(
    grad_outputs: Tensor,
    states: Tensor,
    initial: Tensor | None,
    *,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> Tensor:
    """The gradient of ``weight_hh``, ``(O, X)``: each step's gate gradients times the state that entered the step."""
    if reset_mask is None and lengths is None and states.size(0) > 0:
        # Shifted views serve as "the state that entered", so nothing is copied.
        gates_after, states_before, gates_first = (
            (grad_outputs[:-1], states[1:], grad_outputs[-1])
            if reverse
            else (grad_outputs[1:], states[:-1], grad_outputs[0])
        )
        grad = weight_gradient(gates_after, states_before)
        return grad if initial is None else torch.addmm(grad, gates_first.t(), initial)
    entering = previous_states(
        states,
        initial,
        reset_mask=reset_mask,
        reset_state=reset_state,
        lengths=lengths,
        reverse=reverse,
    )
    return weight_gradient(grad_outputs, entering)


def without_padding(steps: Tensor, lengths: Tensor | None) -> Tensor:
    """``steps`` ``(L, N, X)`` with zeros behind the end of each sequence: what stands there reaches no gradient."""
    if lengths is None:
        return steps
    return torch.where(valid_steps(steps.size(0), steps.size(1), lengths, steps.device)[..., None], steps, 0)
