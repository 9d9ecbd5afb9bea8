"""The operators ``torch.ops.hsm_kernels.*``: schemas, shapes, gradients and fallback kernels.

One call runs all steps and both directions of one layer. Shapes: ``input`` ``(L, N, I)``, ``h_0`` ``(D, N, Hout)``,
``c_0`` ``(D, N, H)`` (None = zeros), masks bool ``(L, N)``, ``reset_h`` and ``reset_c`` like ``h_0`` and ``c_0``,
``lengths`` int64 ``(N,)`` between 0 and L. Results: ``output`` ``(L, N, D * Hout)``, ``c_states`` ``(L, N, D, H)``,
``gates`` ``(L, N, D, 4 * H)`` in the order i, f, g, o for LSTM and r, z, n, hidden half of n for GRU. A result that
was not asked for has shape ``(0,)``. ``training`` keeps what the gradients need; with ``recompute`` too, the gates are
not kept. A backward operator that is given no gates computes them from ``input`` and ``entering``, the hidden state
that entered each step, ``(D, L, N, Hout)``. ``product`` is ``a @ b``, by a kernel of our own where that is faster than
torch's.

The native library adds CPU kernels for the same operators; they win over the fallback by dispatch.
"""

from typing import Any

import torch
from torch import Tensor

from . import _fallback, reference
from ._gradients import HiddenStates, flat, gru_gates, lstm_gates, product, weight_gradient, without_padding
from .reference import Weights

NAMESPACE = "hsm_kernels"

_LSTM_WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
_GRU_WEIGHTS = _LSTM_WEIGHTS[:4]


def _weight_arguments(names: list[str]) -> str:
    forward = [f"Tensor{'?' if 'bias' in n or n == 'weight_hr' else ''} {n}" for n in names]
    return ", ".join(forward + [f"Tensor? {n}_reverse" for n in names])


_SCHEMAS = {
    "lstm_forward": f"(Tensor input, Tensor? h_0, Tensor? c_0, {_weight_arguments(_LSTM_WEIGHTS)}, "
    "Tensor? reset_mask, Tensor? reset_h, Tensor? reset_c, Tensor? detach_mask, Tensor? lengths, "
    "bool return_states, bool recompute, bool training) -> "
    "(Tensor output, Tensor h_n, Tensor c_n, Tensor c_states, Tensor gates)",
    "lstm_backward": "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_c_states, "
    "Tensor c_states, Tensor? gates, Tensor? input, Tensor? entering, Tensor? c_0, "
    f"{_weight_arguments(_LSTM_WEIGHTS)}, Tensor? reset_mask, Tensor? reset_c, Tensor? detach_mask, "
    "Tensor? lengths) -> "
    "(Tensor grad_gates, Tensor grad_h, Tensor grad_h_0, Tensor grad_c_0, Tensor grad_reset_h, Tensor grad_reset_c)",
    "gru_forward": f"(Tensor input, Tensor? h_0, {_weight_arguments(_GRU_WEIGHTS)}, Tensor? reset_mask, "
    "Tensor? reset_h, Tensor? detach_mask, Tensor? lengths, bool recompute, bool training) -> "
    "(Tensor output, Tensor h_n, Tensor gates)",
    "gru_backward": "(Tensor? grad_output, Tensor? grad_h_n, Tensor output, Tensor? gates, Tensor? input, "
    f"Tensor? entering, Tensor? h_0, {_weight_arguments(_GRU_WEIGHTS)}, Tensor? reset_mask, Tensor? reset_h, "
    "Tensor? detach_mask, Tensor? lengths) -> (Tensor grad_gates, Tensor grad_h_0, Tensor grad_reset_h)",
    "product": "(Tensor a, Tensor b) -> Tensor",
}

_library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def _directions(arguments: tuple[Tensor | None, ...]) -> list[Weights]:
    """Group the flat weight arguments of an operator by direction."""
    half = len(arguments) // 2
    groups = [arguments[:half]] if arguments[half] is None else [arguments[:half], arguments[half:]]
    return [Weights(*group) for group in groups]  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- fallback kernels


def _lstm_forward_fallback(input: Tensor, h_0: Any, c_0: Any, *rest: Any) -> tuple[Tensor, ...]:
    weights, (reset_mask, reset_h, reset_c, _, lengths, return_states, recompute, training) = (
        _directions(rest[:10]),
        rest[10:],
    )
    return _fallback.lstm_forward(
        input, h_0, c_0, weights, reset_mask, reset_h, reset_c, lengths,
        training or return_states, training and not recompute,
    )  # fmt: skip


def _gru_forward_fallback(input: Tensor, h_0: Any, *rest: Any) -> tuple[Tensor, ...]:
    weights, (reset_mask, reset_h, _, lengths, recompute, training) = _directions(rest[:8]), rest[8:]
    return _fallback.gru_forward(input, h_0, weights, reset_mask, reset_h, lengths, training and not recompute)


def _lstm_backward_fallback(
    grad_output: Any,
    grad_h_n: Any,
    grad_c_n: Any,
    grad_c_states: Any,
    c_states: Tensor,
    gates: Tensor | None,
    input: Any,
    entering: Any,
    c_0: Any,
    *rest: Any,
) -> tuple[Tensor, ...]:
    weights, boundaries = _directions(rest[:10]), rest[10:]
    if gates is None:
        gates = lstm_gates(input, entering, weights)
    return _fallback.lstm_backward(
        grad_output, grad_h_n, grad_c_n, grad_c_states, c_states, gates, c_0, weights, *boundaries
    )


def _gru_backward_fallback(
    grad_output: Any,
    grad_h_n: Any,
    output: Tensor,
    gates: Tensor | None,
    input: Any,
    entering: Any,
    h_0: Any,
    *rest: Any,
) -> tuple[Tensor, ...]:
    weights, boundaries = _directions(rest[:8]), rest[8:]
    if gates is None:
        gates = gru_gates(input, entering, weights)
    return _fallback.gru_backward(grad_output, grad_h_n, output, gates, h_0, weights, *boundaries)


# --------------------------------------------------------------------------------------------------------- fake kernels


def _lstm_forward_fake(input: Tensor, h_0: Any, c_0: Any, *rest: Any) -> tuple[Tensor, ...]:
    weights, (return_states, recompute, training) = _directions(rest[:10]), rest[-3:]
    (steps, batch, _), directions = input.shape, len(weights)
    gate_rows, hidden_out = weights[0].weight_hh.shape
    hidden = gate_rows // 4
    keep_c = training or return_states
    return (
        input.new_empty(steps, batch, directions * hidden_out),
        input.new_empty(directions, batch, hidden_out),
        input.new_empty(directions, batch, hidden),
        input.new_empty(steps, batch, directions, hidden) if keep_c else input.new_empty(0),
        input.new_empty(steps, batch, directions, gate_rows) if training and not recompute else input.new_empty(0),
    )


def _gru_forward_fake(input: Tensor, h_0: Any, *rest: Any) -> tuple[Tensor, ...]:
    weights, (recompute, training) = _directions(rest[:8]), rest[-2:]
    (steps, batch, _), directions, hidden = input.shape, len(weights), weights[0].weight_hh.size(1)
    return (
        input.new_empty(steps, batch, directions * hidden),
        input.new_empty(directions, batch, hidden),
        input.new_empty(steps, batch, directions, 4 * hidden) if training and not recompute else input.new_empty(0),
    )


def _lstm_backward_fake(
    grad_output: Any,
    grad_h_n: Any,
    grad_c_n: Any,
    grad_c_states: Any,
    c_states: Tensor,
    gates: Tensor | None,
    input: Any,
    entering: Any,
    c_0: Any,
    *rest: Any,
) -> tuple[Tensor, ...]:
    weight_hh, weight_hr, reset_c, new = rest[1], rest[4], rest[11], c_states.new_empty
    (steps, batch, directions, hidden), hidden_out = c_states.shape, weight_hh.size(1)
    has_resets = reset_c is not None
    return (
        new(steps, batch, directions, 4 * hidden),
        new(0) if weight_hr is None else new(steps, batch, directions, hidden_out),
        new(directions, batch, hidden_out),
        new(directions, batch, hidden),
        new(directions, batch, hidden_out) if has_resets else new(0),
        new(directions, batch, hidden) if has_resets else new(0),
    )


def _gru_backward_fake(
    grad_output: Any,
    grad_h_n: Any,
    output: Tensor,
    gates: Tensor | None,
    input: Any,
    entering: Any,
    h_0: Any,
    *rest: Any,
) -> tuple[Tensor, ...]:
    weights, reset_h, (steps, batch, _) = _directions(rest[:8]), rest[9], output.shape
    hidden = weights[0].weight_hh.size(1)
    state = (len(weights), batch, hidden)
    return (
        output.new_empty(steps, batch, len(weights), 4 * hidden),
        output.new_empty(state),
        output.new_empty(0) if reset_h is None else output.new_empty(state),
    )


def _product_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.size(0), b.size(1))


# -------------------------------------------------------------------------------------------------------------
# gradients


def _save(ctx: Any, tensors: tuple[Tensor | None, ...], gates: Tensor, recompute: bool, training: bool) -> None:
    if not training:
        raise RuntimeError(
            f"{NAMESPACE}: gradients were asked for of a call made with training=False; pass training=True"
        )
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)
    ctx.recompute = recompute
    ctx.save_for_backward(*tensors)


def _lstm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    result, _, _, c_states, gates = output
    _save(ctx, (*inputs[:18], result, c_states, gates), gates, *inputs[19:])


def _lstm_gradients(
    ctx: Any, grad_output: Any, grad_h_n: Any, grad_c_n: Any, grad_c_states: Any, _: Any
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = (grad_output, grad_h_n, grad_c_n, grad_c_states)
    if torch.is_grad_enabled():
        return (*_differentiable(_lstm_reference, saved[:18], grads, ctx.needs_input_grad), None, None, None)
    input, h_0, c_0 = saved[:3]
    reset_mask, reset_h, reset_c, detach_mask, lengths, output, c_states, gates = saved[13:]
    weights = _directions(saved[3:13])
    states = HiddenStates(output, h_0, len(weights), reset_mask, reset_h, lengths)
    input = without_padding(input, lengths)
    gates, *operands = _gates(ctx.recompute, gates, input, states, weights, lstm_gates)
    grad_gates, grad_h, grad_h_0, grad_c_0, grad_reset_h, grad_reset_c = torch.ops.hsm_kernels.lstm_backward.default(
        *grads, c_states, gates, *operands, c_0, *saved[3:13], reset_mask, reset_c, detach_mask, lengths
    )
    grad_weights, needs = [], ctx.needs_input_grad
    for d, w in enumerate(weights):
        parts = (grad_gates[:, :, d],)
        grad_weights += _projected_gradients(needs[3 + 5 * d : 7 + 5 * d], parts, parts, input, states, d)
        needs_hr = w.weight_hr is not None and needs[7 + 5 * d]
        grad_weights.append(_projection_gradient(grad_h, gates, c_states, d) if needs_hr else None)
    grad_input = (
        _input_gradient([(grad_gates[:, :, d], w.weight_ih) for d, w in enumerate(weights)]) if needs[0] else None
    )
    has_resets = reset_h is not None
    return (
        grad_input,
        grad_h_0 if needs[1] else None,
        grad_c_0 if needs[2] else None,
        *grad_weights,
        *[None] * (10 - len(grad_weights)),
        None,
        grad_reset_h if has_resets else None,
        grad_reset_c if has_resets else None,
        None, None, None, None, None,
    )  # fmt: skip


def _gru_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    result, _, gates = output
    _save(ctx, (*inputs[:14], result, gates), gates, *inputs[14:])


def _gru_gradients(ctx: Any, grad_output: Any, grad_h_n: Any, _: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = (grad_output, grad_h_n)
    if torch.is_grad_enabled():
        return (*_differentiable(_gru_reference, saved[:14], grads, ctx.needs_input_grad), None, None)
    input, h_0 = saved[:2]
    reset_mask, reset_h, detach_mask, lengths, output, gates = saved[10:]
    weights = _directions(saved[2:10])
    states = HiddenStates(output, h_0, len(weights), reset_mask, reset_h, lengths)
    input = without_padding(input, lengths)
    gates, *operands = _gates(ctx.recompute, gates, input, states, weights, gru_gates)
    grad_gates, grad_h_0, grad_reset_h = torch.ops.hsm_kernels.gru_backward.default(
        *grads, output, gates, *operands, h_0, *saved[2:10], reset_mask, reset_h, detach_mask, lengths
    )
    hidden = weights[0].weight_hh.size(1)
    grad_weights, needs = [], ctx.needs_input_grad
    for d in range(len(weights)):
        grad = grad_gates[:, :, d]
        input_parts = (grad[..., : 3 * hidden],)
        hidden_parts = (grad[..., : 2 * hidden], grad[..., 3 * hidden :])
        grad_weights += _projected_gradients(
            needs[2 + 4 * d : 6 + 4 * d], input_parts, hidden_parts, input, states, d
        )
    pairs = [(grad_gates[:, :, d, : 3 * hidden], w.weight_ih) for d, w in enumerate(weights)]
    return (
        _input_gradient(pairs) if needs[0] else None,
        grad_h_0 if needs[1] else None,
        *grad_weights,
        *[None] * (8 - len(grad_weights)),
        None,
        grad_reset_h if reset_h is not None else None,
        None, None, None, None,
    )  # fmt: skip


def _gates(
    recompute: bool, gates: Tensor, input: Tensor, states: HiddenStates, weights: list[Weights], gates_of: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The arguments gates, input and entering of a backward operator: the gates, or what it computes them from.

    In float32 and float64 the operator does that itself, in the memory of its result. A projection needs the gates
    once more.
    """
    if not recompute:
        return gates, None, None
    if input.dtype in (torch.float32, torch.float64) and weights[0].weight_hr is None:
        entering = states.entering
        return None, input, entering[0].unsqueeze(0) if len(entering) == 1 else torch.stack(entering)
    return gates_of(input, states.entering, weights), None, None


def _projected_gradients(
    needs: tuple[bool, ...],
    input_parts: tuple[Tensor, ...],
    hidden_parts: tuple[Tensor, ...],
    input: Tensor,
    states: HiddenStates,
    direction: int,
) -> list[Tensor | None]:
    """Gradients of weight_ih, weight_hh, bias_ih, bias_hh of one direction. ``input`` is zero behind the lengths.

    ``input_parts`` and ``hidden_parts`` are the gate gradients that reach the input product and the recurrent product,
    cut along the gates where they are not adjacent in memory.
    """
    needs_ih, needs_hh, needs_bias_ih, needs_bias_hh = needs
    grad_ih = grad_hh = grad_bias_ih = grad_bias_hh = None
    if needs_ih:
        grad_ih = _join([weight_gradient(part, input) for part in input_parts])
    if needs_hh:
        grad_hh = _join([states.weight_gradient(part, direction) for part in hidden_parts])
    if needs_bias_ih:
        grad_bias_ih = _join([part.sum((0, 1)) for part in input_parts])
    if needs_bias_hh:
        if grad_bias_ih is not None and input_parts is hidden_parts:
            grad_bias_hh = grad_bias_ih.clone()
        else:
            grad_bias_hh = _join([part.sum((0, 1)) for part in hidden_parts])
    return [grad_ih, grad_hh, grad_bias_ih, grad_bias_hh]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _projection_gradient(grad_h: Tensor, gates: Any, c_states: Tensor, direction: int) -> Tensor:
    """The gradient of weight_hr: what was projected, ``o * tanh(c)``, is computed again rather than stored."""
    o = gates[:, :, direction].chunk(4, dim=-1)[3]
    return weight_gradient(grad_h[:, :, direction], o * c_states[:, :, direction].tanh())


def _input_gradient(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The gradient of the layer's input, ``(L, N, I)``, from each direction's gate gradients and weight_ih."""
    (grad, weight_ih), *others = pairs
    total = product(flat(grad), weight_ih)
    for other, weight in others:
        total += product(flat(other), weight)
    return total.view(*grad.shape[:2], weight_ih.size(1))


def _differentiable(
    forward: Any,
    inputs: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients with a graph of their own (``create_graph=True``): the reference, run again from the inputs."""
    wanted = [i for i, tensor in enumerate(inputs) if tensor is not None and needs[i]]
    outputs = forward(*inputs)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        [inputs[i] for i in wanted],  # type: ignore[arg-type]
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    by_position = dict(zip(wanted, found, strict=True))
    return tuple(by_position.get(i) for i in range(len(inputs)))


def _lstm_reference(input: Tensor, h_0: Any, c_0: Any, *rest: Any) -> tuple[Tensor, ...]:
    weights, (reset_mask, reset_h, reset_c, detach_mask, lengths) = (
        _directions(rest[:10]),
        rest[10:],
    )
    gate_rows, hidden_out = weights[0].weight_hh.shape
    return reference.lstm_layer(
        input,
        _fallback.initial_or_zeros(h_0, input, len(weights), hidden_out),
        _fallback.initial_or_zeros(c_0, input, len(weights), gate_rows // 4),
        weights,
        _fallback.lstm_boundaries(len(weights), reset_mask, reset_h, reset_c, detach_mask, lengths),
    )


def _gru_reference(input: Tensor, h_0: Any, *rest: Any) -> tuple[Tensor, ...]:
    weights, (reset_mask, reset_h, detach_mask, lengths) = _directions(rest[:8]), rest[8:]
    return reference.gru_layer(
        input,
        _fallback.initial_or_zeros(h_0, input, len(weights), weights[0].weight_hh.size(1)),
        weights,
        _fallback.gru_boundaries(len(weights), reset_mask, reset_h, detach_mask, lengths),
    )


def _refuse_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        f"{NAMESPACE}: the backward operators have no gradient of their own; differentiate the forward operator with "
        "create_graph=True, which uses the differentiable reference"
    )


_KERNELS: dict[str, tuple[Any, Any, Any, Any]] = {
    "lstm_forward": (_lstm_forward_fallback, _lstm_forward_fake, _lstm_gradients, _lstm_setup),
    "gru_forward": (_gru_forward_fallback, _gru_forward_fake, _gru_gradients, _gru_setup),
    "lstm_backward": (_lstm_backward_fallback, _lstm_backward_fake, _refuse_backward, None),
    "gru_backward": (_gru_backward_fallback, _gru_backward_fake, _refuse_backward, None),
    "product": (torch.mm, _product_fake, _refuse_backward, None),
}
for _name, (_kernel, _fake, _gradients, _setup) in _KERNELS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _gradients, setup_context=_setup, lib=_library)


# ----------------------------------------------------------------------------------------------------- the short way in


def _eager(op: Any, setup: Any, gradients: Any) -> Any:
    """``op``, called without the detour that a gradient registered in Python takes through the dispatcher.

    The detour costs more than a short call. What runs and what is saved is the same. torch.compile must see the
    operator.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*arguments)
            setup(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(ctx, *grads)

    def call(*arguments: Any) -> Any:
        """The last argument is ``training``: whether a gradient is needed."""
        if torch.compiler.is_compiling():
            return op(*arguments)
        if arguments[-1]:
            return Function.apply(*arguments)  # type: ignore[no-untyped-call]
        if torch.is_inference_mode_enabled():  # which leaves autograd out by itself
            return op(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return call


lstm_forward = _eager(torch.ops.hsm_kernels.lstm_forward.default, _lstm_setup, _lstm_gradients)
gru_forward = _eager(torch.ops.hsm_kernels.gru_forward.default, _gru_setup, _gru_gradients)
