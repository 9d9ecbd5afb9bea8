"""The operators ``torch.ops.hsm_kernels.*``: schemas, shapes, gradients and fallback kernels.

One call runs all steps and both directions of one layer. Shapes: ``input`` ``(L, N, I)``, ``h_0`` ``(D, N, Hout)``,
``c_0`` ``(D, N, H)`` (None = zeros), masks bool ``(L, N)``, ``reset_h`` and ``reset_c`` like ``h_0`` and ``c_0``,
``lengths`` int64 ``(N,)`` between 0 and L. Results: ``output`` ``(L, N, D * Hout)``, ``c_states`` ``(L, N, D, H)``,
``gates`` ``(L, N, D, 4 * H)`` in the order i, f, g, o for LSTM and r, z, n, hidden half of n for GRU. A result that
was not asked for has shape ``(0,)``. ``training`` keeps what the gradients need; with ``recompute`` too, the gates are
not kept, and a backward operator that is given none computes them again. ``entering``, the hidden state that entered
each step, ``(D, L, N, Hout)``, must be given with ``reset_mask`` or ``lengths``; there ``input`` must be zero behind
the lengths. Backward operators return the gradients of the input and states, then for each direction those of
``weight_ih``, of ``weight_hh``, and of the pre-activations summed over steps and sequences, ``(4 * H,)``, in GRU r, z
and the input and hidden half of n; with a projection also that of every step's ``h``, ``grad_h`` ``(L, N, D, Hout)``.
``samples`` = 0 leaves the gradients of weights out, 1 sums them over all sequences, k > 1 over each of k equal parts of
the sequences, in order: ``(k, ..)``.
``product`` is ``a @ b``, by a kernel of our own where that is faster than torch's. ``detach_every`` = k says that
``detach_mask`` holds for every sequence at steps k, 2k, ..., which a GPU cannot know without reading the mask back; 0
says nothing. ``allow_tf32`` allows TF32 in products of float32; the CPU has none.
A call for one step of one direction may leave these dimensions out: ``input`` and its gradient are ``(N, I)`` then,
``h_0``, ``c_0``, ``h_n``, ``c_n`` and theirs ``(N, X)``. vmap takes no such calls.

The native library adds CPU and CUDA kernels for the same operators; they win over the fallback by dispatch.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _backend, _derivatives, _fallback
from ._derivatives import Layer
from ._gradients import HiddenStates, gru_gates, lstm_gates, weight_gradient, without_padding
from ._vmap import batched_backward, batched_layer
from .reference import Weights

NAMESPACE = "hsm_kernels"

_LSTM_WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
_GRU_WEIGHTS = _LSTM_WEIGHTS[:4]


def _weight_arguments(names: list[str]) -> str:
    forward = [f"Tensor{'?' if 'bias' in n or n == 'weight_hr' else ''} {n}" for n in names]
    return ", ".join(forward + [f"Tensor? {n}_reverse" for n in names])


_WEIGHT_GRADIENTS = ", ".join(
    f"Tensor grad_{name}{suffix}" for suffix in ("", "_reverse") for name in ("weight_ih", "weight_hh", "bias")
)

_SCHEMAS = {
    "lstm_forward": f"(Tensor input, Tensor? h_0, Tensor? c_0, {_weight_arguments(_LSTM_WEIGHTS)}, "
    "Tensor? reset_mask, Tensor? reset_h, Tensor? reset_c, Tensor? detach_mask, Tensor? lengths, int detach_every, "
    "bool allow_tf32, bool return_states, bool recompute, bool training) -> "
    "(Tensor output, Tensor h_n, Tensor c_n, Tensor c_states, Tensor gates)",
    "lstm_backward": "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_c_states, Tensor input, "
    "Tensor? h_0, Tensor? c_0, Tensor output, Tensor c_states, Tensor? gates, Tensor? entering, "
    f"{_weight_arguments(_LSTM_WEIGHTS)}, Tensor? reset_mask, Tensor? reset_c, Tensor? detach_mask, Tensor? lengths, "
    "int detach_every, bool allow_tf32, bool needs_input, int samples) -> "
    "(Tensor grad_input, Tensor grad_h, Tensor grad_h_0, Tensor grad_c_0, Tensor grad_reset_h, Tensor grad_reset_c, "
    f"{_WEIGHT_GRADIENTS})",
    "gru_forward": f"(Tensor input, Tensor? h_0, {_weight_arguments(_GRU_WEIGHTS)}, Tensor? reset_mask, "
    "Tensor? reset_h, Tensor? detach_mask, Tensor? lengths, int detach_every, bool allow_tf32, bool recompute, "
    "bool training) -> "
    "(Tensor output, Tensor h_n, Tensor gates)",
    "gru_backward": "(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? h_0, Tensor output, Tensor? gates, "
    f"Tensor? entering, {_weight_arguments(_GRU_WEIGHTS)}, Tensor? reset_mask, Tensor? reset_h, Tensor? detach_mask, "
    "Tensor? lengths, int detach_every, bool allow_tf32, bool needs_input, int samples) -> "
    f"(Tensor grad_input, Tensor grad_h_0, Tensor grad_reset_h, {_WEIGHT_GRADIENTS})",
    "product": "(Tensor a, Tensor b) -> Tensor",
}

_library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]

# They have no other kernels than those of the native library.
_EXPLAIN_SCHEMAS = {
    # How a forward pass without boundaries would run on the CPU: the name of the instruction set, and ForwardPlan of
    # csrc/common/params.h without the bytes.
    "explain_forward": "(Tensor input, Tensor weight_ih, Tensor weight_hh, bool is_lstm, bool projection, "
    "bool bidirectional, bool training) -> (Tensor instruction_set, Tensor numbers)",
    # How the recurrence of one pass would run on a GPU, in words: "cluster: ...". `cuts`: whether masks or lengths cut
    # sequences in it.
    "explain_recurrence": "(Tensor input, Tensor weight_hh, bool is_lstm, bool projection, bool bidirectional, "
    "bool backward, bool cuts, bool allow_tf32) -> Tensor words",
}
for _name, _schema in _EXPLAIN_SCHEMAS.items():
    _library.define(_name + _schema)  # type: ignore[no-untyped-call]


def _directions(arguments: tuple[Tensor | None, ...]) -> list[Weights]:
    """Group the flat weight arguments of an operator by direction."""
    half = len(arguments) // 2
    groups = [arguments[:half]] if arguments[half] is None else [arguments[:half], arguments[half:]]
    return [Weights(*group) for group in groups]  # type: ignore[arg-type]


_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def _of_one_step_too(
    input: int, others: tuple[int, ...], results: tuple[int, ...]
) -> Callable[[_Kernel], _Kernel]:
    """Makes a fallback or fake kernel take calls too whose ``input`` is ``(N, I)``; arguments are given by position."""

    def decorate(kernel: _Kernel) -> _Kernel:
        def call(*arguments: Any) -> Any:
            if arguments[input].dim() != 2:
                return kernel(*arguments)
            given = [a.unsqueeze(0) if a is not None and k in (input, *others) else a for k, a in enumerate(arguments)]
            found = kernel(*given)
            return tuple(r.squeeze(0) if k in results and r.dim() == 3 else r for k, r in enumerate(found))

        return cast(_Kernel, call)

    return decorate


# ---------------------------------------------------------------------------------------------------- fallback kernels


@_of_one_step_too(0, (1, 2), (1, 2))
def _lstm_forward_fallback(input: Tensor, h_0: Any, c_0: Any, *rest: Any) -> tuple[Tensor, ...]:
    weights, (reset_mask, reset_h, reset_c, _, lengths, _, _, return_states, recompute, training) = (
        _directions(rest[:10]),
        rest[10:],
    )
    return _fallback.lstm_forward(
        input, h_0, c_0, weights, reset_mask, reset_h, reset_c, lengths,
        training or return_states, training and not recompute,
    )  # fmt: skip


@_of_one_step_too(0, (1,), (1,))
def _gru_forward_fallback(input: Tensor, h_0: Any, *rest: Any) -> tuple[Tensor, ...]:
    weights, (reset_mask, reset_h, _, lengths, _, _, recompute, training) = _directions(rest[:8]), rest[8:]
    return _fallback.gru_forward(input, h_0, weights, reset_mask, reset_h, lengths, training and not recompute)


@_of_one_step_too(4, (1, 2, 5, 6), (0, 2, 3))
def _lstm_backward_fallback(
    grad_output: Any,
    grad_h_n: Any,
    grad_c_n: Any,
    grad_c_states: Any,
    input: Tensor,
    h_0: Any,
    c_0: Any,
    output: Tensor,
    c_states: Tensor,
    gates: Tensor | None,
    entering: Any,
    *rest: Any,
) -> tuple[Tensor, ...]:
    weights, (reset_mask, reset_c, detach_mask, lengths, _, _, needs_input, samples) = (
        _directions(rest[:10]),
        rest[10:],
    )
    layer = Layer(
        input, (h_0, c_0), weights, reset_mask, (None, reset_c), detach_mask, lengths,
        (_by_direction(output, len(weights)), c_states), gates, entering,
    )  # fmt: skip
    steps = (_by_direction(grad_output, len(weights)), grad_c_states)
    grad_input, grad_h, initial, resets, of_weights = _fallback.backward(
        layer, steps, (grad_h_n, grad_c_n), needs_input, samples
    )
    of_h = input.new_empty(0) if weights[0].weight_hr is None else torch.stack(grad_h, dim=2)
    return (grad_input, of_h, *initial, *resets, *of_weights)


@_of_one_step_too(2, (1, 3), (0, 1))
def _gru_backward_fallback(
    grad_output: Any,
    grad_h_n: Any,
    input: Tensor,
    h_0: Any,
    output: Tensor,
    gates: Tensor | None,
    entering: Any,
    *rest: Any,
) -> tuple[Tensor, ...]:
    weights, (reset_mask, reset_h, detach_mask, lengths, _, _, needs_input, samples) = (
        _directions(rest[:8]),
        rest[8:],
    )
    layer = Layer(
        input, (h_0,), weights, reset_mask, (reset_h,), detach_mask, lengths,
        (_by_direction(output, len(weights)),), gates, entering,
    )  # fmt: skip
    steps = (_by_direction(grad_output, len(weights)),)
    grad_input, _, initial, resets, of_weights = _fallback.backward(
        layer, steps, (grad_h_n,), needs_input, samples
    )
    return (grad_input, *initial, *resets, *of_weights)


def _by_direction(output: Any, directions: int) -> Any:
    """``(L, N, D * Hout)`` as ``(L, N, D, Hout)``; None stays None."""
    return None if output is None else output.view(*output.shape[:2], directions, output.size(2) // directions)


# --------------------------------------------------------------------------------------------------------- fake kernels


@_of_one_step_too(0, (1, 2), (1, 2))
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


@_of_one_step_too(0, (1,), (1,))
def _gru_forward_fake(input: Tensor, h_0: Any, *rest: Any) -> tuple[Tensor, ...]:
    weights, (recompute, training) = _directions(rest[:8]), rest[-2:]
    (steps, batch, _), directions, hidden = input.shape, len(weights), weights[0].weight_hh.size(1)
    return (
        input.new_empty(steps, batch, directions * hidden),
        input.new_empty(directions, batch, hidden),
        input.new_empty(steps, batch, directions, 4 * hidden) if training and not recompute else input.new_empty(0),
    )


@_of_one_step_too(4, (1, 2, 5, 6), (0, 2, 3))
def _lstm_backward_fake(
    grad_output: Any,
    grad_h_n: Any,
    grad_c_n: Any,
    grad_c_states: Any,
    input: Tensor,
    h_0: Any,
    c_0: Any,
    output: Tensor,
    c_states: Tensor,
    gates: Any,
    entering: Any,
    *rest: Any,
) -> tuple[Tensor, ...]:
    weights, has_resets, new = _directions(rest[:10]), rest[11] is not None, input.new_empty
    (steps, batch, directions, hidden), hidden_out = c_states.shape, weights[0].weight_hh.size(1)
    grad_input, *grad_weights = _products_fake(input, weights, hidden, *rest[-2:])
    return (
        grad_input,
        new(0) if weights[0].weight_hr is None else new(steps, batch, directions, hidden_out),
        new(directions, batch, hidden_out),
        new(directions, batch, hidden),
        new(directions, batch, hidden_out) if has_resets else new(0),
        new(directions, batch, hidden) if has_resets else new(0),
        *grad_weights,
    )


@_of_one_step_too(2, (1, 3), (0, 1))
def _gru_backward_fake(
    grad_output: Any, grad_h_n: Any, input: Tensor, h_0: Any, output: Tensor, gates: Any, entering: Any, *rest: Any
) -> tuple[Tensor, ...]:
    weights, has_resets, new = _directions(rest[:8]), rest[9] is not None, input.new_empty
    hidden = weights[0].weight_hh.size(1)
    state = (len(weights), input.size(1), hidden)
    grad_input, *grad_weights = _products_fake(input, weights, hidden, *rest[-2:])
    return (grad_input, new(state), new(state) if has_resets else new(0), *grad_weights)


def _products_fake(
    input: Tensor, weights: list[Weights], hidden: int, needs_input: bool, samples: int
) -> list[Tensor]:
    found = [input.new_empty(input.shape if needs_input else 0)]
    for d in range(2):
        needed = samples > 0 and d < len(weights)
        shapes = (weights[d].weight_ih.shape, weights[d].weight_hh.shape, (4 * hidden,)) if needed else ((0,),) * 3
        found += [input.new_empty((samples, *shape) if needed and samples > 1 else shape) for shape in shapes]
    return found


def _product_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.size(0), b.size(1))


# -------------------------------------------------------------------------------------------------------------
# gradients


def _save(
    ctx: Any, tensors: tuple[Tensor | None, ...], gates: Tensor, hints: tuple[int, bool], training: bool
) -> None:
    """``hints`` are ``detach_every`` and ``allow_tf32``."""
    if not training:
        raise RuntimeError(
            f"{NAMESPACE}: gradients were asked for of a call made with training=False; pass training=True"
        )
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)
    ctx.hints = hints
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)


def _lstm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    result, _, _, c_states, gates = output
    _save(ctx, (*inputs[:18], result, c_states, gates), gates, inputs[18:20], inputs[-1])


def _lstm_gradients(
    ctx: Any, grad_output: Any, grad_h_n: Any, grad_c_n: Any, grad_c_states: Any, _: Any
) -> tuple[Tensor | None, ...]:
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad
    grads = (grad_output, grad_h_n, grad_c_n, grad_c_states)
    input, h_0, c_0, *weights = saved[:13]
    reset_mask, _, reset_c, detach_mask, lengths, output, c_states, gates = saved[13:]
    layer, entering = None, None
    if not _is_plain(gates, reset_mask, lengths, weights[4]):
        if input.dim() == 2:
            return _with_all_dimensions(_lstm_gradients, ctx, 2, (*grads, None))
        layer = _lstm_after_forward(saved)
        if forward_ad._current_level >= 0:  # the operators have no rule for it, their fallback's operations have
            return _step_by_step(ctx, layer, (grad_output, grad_c_states), grads[1:3])
        gates, input, entering = _backward_operands(layer, output, lstm_gates)
    grad_input, grad_h, grad_h_0, grad_c_0, grad_reset_h, grad_reset_c, *found = (
        _lstm_backward(
            *grads, input, h_0, c_0, output, c_states, gates, entering, *saved[3:13], reset_mask, reset_c, detach_mask,
            lengths, *ctx.hints, needs[0], int(any(needs[3:13])), differentiable=torch.is_grad_enabled(),
        )
    )  # fmt: skip
    grad_weights: list[Tensor | None] = [None] * 10
    for d in range(_count(weights)):
        asked, (grad_ih, grad_hh, grad_bias) = needs[3 + 5 * d : 8 + 5 * d], found[3 * d : 3 * d + 3]
        biases = (grad_bias, grad_bias.clone() if asked[2] and asked[3] else grad_bias)
        grad_hr = _projection_gradient(grad_h, gates, layer, d) if layer is not None and asked[4] else None
        grad_weights[5 * d : 5 * d + 5] = _asked(asked, grad_ih, grad_hh, *biases, grad_hr)
    has_resets = reset_c is not None
    return (
        *_asked(needs[:3], grad_input, grad_h_0, grad_c_0),
        *grad_weights,
        None,
        grad_reset_h if has_resets else None,
        grad_reset_c if has_resets else None,
        None, None, None, None, None, None, None,
    )  # fmt: skip


def _gru_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    result, _, gates = output
    _save(ctx, (*inputs[:14], result, gates), gates, inputs[14:16], inputs[-1])


def _gru_gradients(ctx: Any, grad_output: Any, grad_h_n: Any, _: Any) -> tuple[Tensor | None, ...]:
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad
    grads = (grad_output, grad_h_n)
    input, h_0, *weights = saved[:10]
    reset_mask, reset_h, detach_mask, lengths, output, gates = saved[10:]
    entering = None
    if not _is_plain(gates, reset_mask, lengths):
        if input.dim() == 2:
            return _with_all_dimensions(_gru_gradients, ctx, 1, (*grads, None))
        layer = _gru_after_forward(saved)
        if forward_ad._current_level >= 0:
            return _step_by_step(ctx, layer, (grad_output,), (grad_h_n,))
        gates, input, entering = _backward_operands(layer, output, gru_gates)
    grad_input, grad_h_0, grad_reset_h, *found = _gru_backward(
        *grads, input, h_0, output, gates, entering, *saved[2:10], reset_mask, reset_h, detach_mask, lengths,
        *ctx.hints, needs[0], int(any(needs[2:10])), differentiable=torch.is_grad_enabled(),
    )  # fmt: skip
    hidden = weights[1].size(1)
    grad_weights: list[Tensor | None] = [None] * 8
    for d in range(_count(weights)):
        asked, (grad_ih, grad_hh, sums) = needs[2 + 4 * d : 6 + 4 * d], found[3 * d : 3 * d + 3]
        grad_bias_hh = torch.cat([sums[: 2 * hidden], sums[3 * hidden :]]) if asked[3] else None
        grad_weights[4 * d : 4 * d + 4] = _asked(asked, grad_ih, grad_hh, sums[: 3 * hidden], grad_bias_hh)
    return (
        *_asked(needs[:2], grad_input, grad_h_0),
        *grad_weights,
        None,
        grad_reset_h if reset_h is not None else None,
        None, None, None, None, None, None,
    )  # fmt: skip


def _is_plain(gates: Tensor, *unusual: Tensor | None) -> bool:
    """Whether a backward operator takes what was saved as it is, and no transform is active."""
    kept = gates.dim() == 4 and all(tensor is None for tensor in unusual)
    return kept and (torch.compiler.is_compiling() or not transformed())


class _Context(NamedTuple):
    """What the gradients of a forward operator read of a context."""

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]
    hints: tuple[int, bool]


def _with_all_dimensions(gradients: Any, ctx: Any, states: int, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The gradients of one step that left dimensions out, from those of the same step with all of them."""
    inner = 1 + states
    saved = (*_in_front(ctx.saved_tensors[:inner]), *ctx.saved_tensors[inner:])
    grads = (grads[0], *_in_front(grads[1:inner]), *grads[inner:])
    found = gradients(_Context(saved, ctx.needs_input_grad, ctx.hints), *grads)
    return *(None if grad is None else grad.squeeze(0) for grad in found[:inner]), *found[inner:]


def _in_front(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The tensors with a dimension in front."""
    return [None if tensor is None else tensor.unsqueeze(0) for tensor in tensors]


def _count(weights: list[Tensor | None]) -> int:
    """The number of directions that the flat weight arguments of an operator are for."""
    return 1 if weights[len(weights) // 2] is None else 2


def _asked(needs: tuple[bool, ...], *grads: Tensor | None) -> list[Tensor | None]:
    """The gradients that are needed, None for the others."""
    return [grad if needed else None for needed, grad in zip(needs, grads, strict=False)]


def _backward_operands(layer: Layer, output: Tensor, gates_of: Any) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The arguments gates, input and entering of a backward operator.

    Gates that were not kept are computed by the operator: on the CPU in float32 and float64, in the memory of its
    results, on a GPU for some steps at a time. A projection needs them once more.
    """
    input, h_0, weights = without_padding(layer.input, layer.lengths), layer.initial[0], layer.weights
    states = HiddenStates(output, h_0, len(weights), layer.reset_mask, layer.reset[0], layer.lengths)
    entering = None
    if states.cut:
        entering = _joined(_derivatives.entering(layer) if torch.is_grad_enabled() else states.entering)
    if layer.gates is not None:
        return layer.gates, input, entering
    by_operator = input.is_cuda or input.dtype in (torch.float32, torch.float64)
    if by_operator and weights[0].weight_hr is None:
        return None, input, entering
    with torch.no_grad():  # an operator's gates are values: their derivative is that of what they are computed from
        return gates_of(input, states.entering, weights), input, entering


def _joined(directions: list[Tensor]) -> Tensor:
    return directions[0].unsqueeze(0) if len(directions) == 1 else torch.stack(directions)


def _projection_gradient(grad_h: Tensor, gates: Any, layer: Layer, direction: int) -> Tensor:
    """The gradient of weight_hr: what was projected, ``o * tanh(c)``, is computed again rather than stored."""
    if torch.is_grad_enabled():
        return _derivatives.projection_gradient(layer._replace(gates=gates), grad_h, direction)
    o = gates[:, :, direction].chunk(4, dim=-1)[3]
    return weight_gradient(grad_h[:, :, direction], o * layer.states[1][:, :, direction].tanh())


def _lstm_after_forward(saved: tuple[Any, ...]) -> Layer:
    """What ``_lstm_setup`` saved."""
    input, h_0, c_0, *weights = saved[:13]
    reset_mask, reset_h, reset_c, detach_mask, lengths, output, c_states, gates = saved[13:]
    directions = _directions(tuple(weights))
    states = (_by_direction(output, len(directions)), c_states)
    kept = gates if gates.dim() == 4 else None
    return Layer(
        input, (h_0, c_0), directions, reset_mask, (reset_h, reset_c), detach_mask, lengths, states, kept
    )


def _gru_after_forward(saved: tuple[Any, ...]) -> Layer:
    """What ``_gru_setup`` saved."""
    input, h_0, *weights = saved[:10]
    reset_mask, reset_h, detach_mask, lengths, output, gates = saved[10:]
    directions = _directions(tuple(weights))
    states = (_by_direction(output, len(directions)),)
    kept = gates if gates.dim() == 4 else None
    return Layer(input, (h_0,), directions, reset_mask, (reset_h,), detach_mask, lengths, states, kept)


def _step_by_step(
    ctx: Any, layer: Layer, steps: tuple[Tensor | None, ...], last: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of a forward operator's arguments, by operations that have derivatives of every kind."""
    states, per_direction = len(steps), 5 if layer.is_lstm else 4
    steps = (_by_direction(steps[0], len(layer.weights)), *steps[1:])
    of_weights = range(1 + states, 1 + states + 2 * per_direction)
    needs = ctx.needs_input_grad
    samples = int(any(needs[k] for k in of_weights))
    at_input, at_states, at_weights = _derivatives.gradients(layer, steps, last, needs[0], samples)
    flat = [grad for w in at_weights or () for grad in w[:per_direction]]
    flat += [None] * (2 * per_direction - len(flat))
    resets = at_states.reset or (None,) * states
    found = [at_input, *at_states.initial, *flat, None, *resets]
    return *_asked(needs, *found), *(None for _ in needs[len(found) :])


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.flags = inputs[-4:]
    ctx.save_for_backward(*inputs[:-4])


def _second_gradients(fallback: Any) -> Any:
    """The gradients of a backward operator: those of its fallback, whose operations are differentiable."""

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = [*ctx.saved_tensors]
        wanted = [k for k, needed in enumerate(ctx.needs_input_grad) if needed]

        def of_wanted(*tensors: Tensor) -> tuple[Tensor, ...]:
            for k, tensor in zip(wanted, tensors, strict=True):
                arguments[k] = tensor
            found: tuple[Tensor, ...] = fallback(*arguments, *ctx.flags)
            return found

        results, transpose, *_ = torch.func.vjp(of_wanted, *(arguments[k] for k in wanted))
        given = tuple(torch.zeros_like(r) if g is None else g for r, g in zip(results, grads, strict=True))
        found = transpose(given)
        by_position = dict(zip(wanted, found, strict=True))
        return tuple(by_position.get(k) for k in range(len(ctx.needs_input_grad)))

    return gradients


def _refuse_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(f"{NAMESPACE}: product has no gradient; use torch.mm")


_KERNELS: dict[str, tuple[Any, Any, Any, Any]] = {
    "lstm_forward": (_lstm_forward_fallback, _lstm_forward_fake, _lstm_gradients, _lstm_setup),
    "gru_forward": (_gru_forward_fallback, _gru_forward_fake, _gru_gradients, _gru_setup),
    "lstm_backward": (
        _lstm_backward_fallback, _lstm_backward_fake, _second_gradients(_lstm_backward_fallback), _backward_setup,
    ),
    "gru_backward": (
        _gru_backward_fallback, _gru_backward_fake, _second_gradients(_gru_backward_fallback), _backward_setup,
    ),
    "product": (torch.mm, _product_fake, _refuse_backward, None),
}  # fmt: skip
for _name, (_kernel, _fake, _gradients, _setup) in _KERNELS.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _gradients, setup_context=_setup, lib=_library)


# ------------------------------------------------------------------------------------------------- eager and transforms


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a derivative may be asked for; inside a transform a tensor does not say whether it requires one."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    if any(t is not None and t.requires_grad for t in tensors):
        return True
    return not torch.compiler.is_compiling() and transformed()


_NOT_COMPILED = (
    f"{NAMESPACE}: torch.func.grad, vjp, jvp, what is made of them, and forward-mode differentiation are not supported "
    "inside torch.compile and torch.export; leave them outside, or compile a function whose backward() is called"
)


# Evaluated while a function is traced: torch would take an operator's tangents for zeros.
@_backend.assume_constant_result
def _traced_derivative() -> bool:
    """Whether a transform of torch.func other than vmap, or forward-mode differentiation, is active."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    vmap = torch._C._functorch.TransformType.Vmap
    return forward_ad._current_level >= 0 or any(level.key() != vmap for level in levels)


def _tangents(
    layer: Layer, per_direction: int, tangents: tuple[Any, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """The tangents of the states, from those of a forward operator's arguments."""
    n = len(layer.states)
    initial, rest = tangents[1 : 1 + n], tangents[1 + n :]
    flat, rest = rest[: 2 * per_direction], rest[2 * per_direction :]
    weights = [Weights(*flat[d * per_direction : (d + 1) * per_direction]) for d in range(len(layer.weights))]
    return _derivatives.tangents(layer, tangents[0], initial, weights, rest[1 : 1 + n])


def _lstm_tangents(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
    (h, c), (h_n, c_n) = _tangents(_lstm_after_forward(ctx.saved_tensors), 5, tangents)
    return h.flatten(-2), h_n, c_n, c, None


def _gru_tangents(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
    (h,), (h_n,) = _tangents(_gru_after_forward(ctx.saved_tensors), 4, tangents)
    return h.flatten(-2), h_n, None


def below_autograd(op: Any, returned: slice = slice(None)) -> Any:
    """``op``, called without a look at gradients, for all or some of its results."""

    def call(*arguments: Any) -> Any:
        if torch.is_inference_mode_enabled():  # which leaves autograd out by itself
            return op(*arguments)[returned]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)[returned]

    return call


def _function(op: Any, setup: Any, gradients: Any, returned: slice = slice(None)) -> Any:
    """The :class:`torch.autograd.Function` of ``op``, or of some results of it, where no transform is active."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*arguments)
            setup(ctx, arguments, output)
            return output[returned]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(ctx, *grads)

    return Function


def _eager(op: Any, setup: Any, gradients: Any, tangents: Any, rule: Any) -> Any:
    """``op``, called without the detour that a gradient registered in Python takes through the dispatcher.

    The detour costs more than a short call, and ends before transforms. What runs and what is saved is the same.
    torch.compile must see the operator. ``rule(call, info, in_dims, *arguments)`` is for vmap.
    """
    function = _function(op, setup, gradients)

    # What transforms need costs every call some fifty microseconds.
    class TransformedFunction(function):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, inputs, output)

        @staticmethod
        def jvp(ctx: Any, *grads: Any) -> Any:
            return tangents(ctx, *grads)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
            return rule(partial(call, differentiable=torch.is_grad_enabled()), info, in_dims, *arguments)

    def call(*arguments: Any, differentiable: bool = False) -> Any:
        if torch.compiler.is_compiling():
            if _traced_derivative():
                raise RuntimeError(_NOT_COMPILED)
            return op(*arguments)
        try:
            if transformed():
                return TransformedFunction.apply(*arguments)
            if differentiable:
                return function.apply(*arguments)
            return without_gradients(*arguments)
        except RuntimeError as error:
            # What torch's own operators raise. It is one of Python, and a library can raise none.
            if "CUDA out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from None
            raise

    without_gradients = below_autograd(op)
    torch.library.register_vmap(op, partial(rule, op), lib=_library)
    return call


def _plain(op: Any, setup: Any, gradients: Any, returned: slice = slice(None)) -> tuple[Any, Any]:
    """``op`` without and with gradients, to be called where no transform is active."""
    return below_autograd(op, returned), _function(op, setup, gradients, returned).apply


def _step(op: Any, setup: Any, gradients: Any, absent: tuple[Any, ...]) -> tuple[Any, Any, Any, slice]:
    """A forward operator, its setup and its gradients for a cell, and which results are returned.

    Each argument and each result takes time. ``absent`` are the arguments before ``training`` that are left out; of the
    results the first, h once more, and the last, the gates, are only saved.
    """

    def run(*arguments: Any) -> Any:
        return op(*arguments[:-1], *absent, arguments[-1])

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        setup(ctx, (*inputs[:-1], *absent, inputs[-1]), output)

    def gradients_of_step(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        context = _Context(ctx.saved_tensors, needs + (False,) * len(absent), ctx.hints)
        found: tuple[Tensor | None, ...] = gradients(context, None, *grads, None)
        return found[: len(needs)]

    return run, set_up, gradients_of_step, slice(1, -1)


_lstm_forward = _eager(
    torch.ops.hsm_kernels.lstm_forward.default,
    _lstm_setup,
    _lstm_gradients,
    _lstm_tangents,
    partial(batched_layer, range(3, 13)),
)
_gru_forward = _eager(
    torch.ops.hsm_kernels.gru_forward.default,
    _gru_setup,
    _gru_gradients,
    _gru_tangents,
    partial(batched_layer, range(2, 10)),
)
_lstm_backward = _eager(
    torch.ops.hsm_kernels.lstm_backward.default,
    _backward_setup,
    _second_gradients(_lstm_backward_fallback),
    None,  # under forward mode the backward pass takes another way
    partial(batched_backward, range(11, 21), 10),
)
_gru_backward = _eager(
    torch.ops.hsm_kernels.gru_backward.default,
    _backward_setup,
    _second_gradients(_gru_backward_fallback),
    None,
    partial(batched_backward, range(7, 15), 6),
)


def lstm_forward(*arguments: Any) -> Any:
    """The operator; the last argument, ``training``, says whether a gradient is needed."""
    return _lstm_forward(*arguments, differentiable=arguments[-1])


def gru_forward(*arguments: Any) -> Any:
    """The operator; the last argument, ``training``, says whether a gradient is needed."""
    return _gru_forward(*arguments, differentiable=arguments[-1])


_LSTM = (torch.ops.hsm_kernels.lstm_forward.default, _lstm_setup, _lstm_gradients)
_GRU = (torch.ops.hsm_kernels.gru_forward.default, _gru_setup, _gru_gradients)

#: For calls that no transform sees: the operator without gradients, and with them. ``training`` is an index.
plain_lstm_forward = _plain(*_LSTM)
plain_gru_forward = _plain(*_GRU)

#: Likewise ``(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, training)`` -> the new h and c, and c once more.
plain_lstm_step = _plain(*_step(*_LSTM, (None,) * 11 + (0, False, False, False)))
#: ``(input, h, weight_ih, weight_hh, bias_ih, bias_hh, training)`` -> the new h.
plain_gru_step = _plain(*_step(*_GRU, (None,) * 8 + (0, False, False)))
