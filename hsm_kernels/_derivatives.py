"""The derivatives of a layer in plain tensor algebra: gradients that can be differentiated again, and tangents.

Shapes and names are those of :mod:`hsm_kernels._ops`. The states of all steps are arguments of a gradient like any
other: what comes back to them goes through the backward pass once more. Derivatives stop at the edges with a detach.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import functional as F

from ._gradients import without_padding
from ._recurrences import Edges, Linear, adjoint, enter, tangent
from .reference import Weights


class Layer(NamedTuple):
    """A layer after its forward pass; ``states`` of all steps are ``(L, N, D, X)``, of a state ``(D, N, X)``."""

    input: Tensor
    initial: tuple[Tensor | None, ...]  #: h_0 and, for LSTM, c_0
    weights: list[Weights]
    reset_mask: Tensor | None
    reset: tuple[Tensor | None, ...]
    detach_mask: Tensor | None
    lengths: Tensor | None
    states: tuple[Tensor, ...]  #: h and, for LSTM, c
    gates: Tensor | None  #: ``(L, N, D, 4 * H)``, where the forward pass kept them
    entering: Tensor | None = None  #: the h that entered each step, ``(D, L, N, Hout)``, where it is known

    @property
    def is_lstm(self) -> bool:
        return len(self.states) == 2

    def directions(self) -> list["_Direction"]:
        return [_Direction(self, d) for d in range(len(self.weights))]


def _edges(layer: Layer, d: int) -> Edges:
    return Edges.of(layer.reset_mask, layer.detach_mask, layer.lengths, layer.input.size(0), reverse=d == 1)


class _Direction:
    """One direction of a layer, linearised."""

    def __init__(self, layer: Layer, d: int) -> None:
        self.weights, self.edges = layer.weights[d], _edges(layer, d)
        self.entering = self.enter(layer, d)
        if layer.entering is not None:
            self.entering[0] = layer.entering[d]
        kept = None if layer.gates is None else layer.gates[:, :, d]
        gates = _gates(layer.is_lstm, kept, layer.input, self.entering[0], self.weights)
        self.wide = torch.promote_types(gates.dtype, torch.float32)
        linearise = self._lstm if layer.is_lstm else self._gru
        left = layer.states[-1][:, :, d]
        linearise(*(part.to(self.wide) for part in (*gates.chunk(4, dim=-1), left, self.entering[-1])))

    @staticmethod
    def enter(layer: Layer, d: int) -> list[Tensor]:
        """The state that entered each step, ``(L, N, X)`` each."""
        entered = []
        for states, initial, reset in zip(layer.states, layer.initial, layer.reset, strict=True):
            left = states[:, :, d]
            first = left.new_zeros(left.shape[1:]) if initial is None else initial[d]
            entered.append(enter(left, first, None if reset is None else reset[d], _edges(layer, d), left.detach()))
        return entered

    def _lstm(self, i: Tensor, f: Tensor, g: Tensor, o: Tensor, c: Tensor, c_entering: Tensor) -> None:
        tanh_c = c.tanh()
        gain = [g * i * (1 - i), c_entering * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)]
        self.before_projection = o * tanh_c
        self._linear(torch.cat(gain, dim=-1), f, o * (1 - tanh_c * tanh_c))

    def _gru(self, r: Tensor, z: Tensor, n: Tensor, hidden_n: Tensor, _: Tensor, h_entering: Tensor) -> None:
        self.n_gain = (1 - z) * (1 - n * n)  # of the input half of n
        gain = [self.n_gain * hidden_n * r * (1 - r), (h_entering - n) * z * (1 - z), self.n_gain * r]
        self._linear(torch.cat(gain, dim=-1), z, None)

    def _linear(self, gain: Tensor, decay: Tensor, slope: Tensor | None) -> None:
        weight_hh, weight_hr = self.weights.weight_hh, self.weights.weight_hr
        self.linear = Linear(
            gain, decay, slope, weight_hh.to(self.wide), None if weight_hr is None else weight_hr.to(self.wide)
        )


# ------------------------------------------------------------------------------------------------------------ gradients


class StateGradients(NamedTuple):
    """What the recurrence leaves: gradients of all states, and of the gates' two halves. Lists are by direction."""

    of_input: list[Tensor]  #: ``(L, N, G * H)``: of ``input @ weight_ih.T``
    of_hidden: list[Tensor]  #: ``(L, N, G * H)``: of ``h @ weight_hh.T``
    h: list[Tensor]  #: ``(L, N, Hout)``: of every step's h
    initial: tuple[Tensor, ...]  #: ``(D, N, X)``
    reset: tuple[Tensor, ...]  #: likewise; empty without resets


def state_gradients(
    directions: Sequence[_Direction], steps: Sequence[Tensor | None], last: Sequence[Tensor | None]
) -> StateGradients:
    """From the gradients of all states: ``steps`` ``(L, N, D, X)``, ``last`` ``(D, N, X)``; None stands for zeros."""
    found = []
    for d, direction in enumerate(directions):
        dtype, wide = direction.entering[0].dtype, direction.wide
        final = [
            (part.new_zeros(part.shape[1:]) if grad is None else grad[d]).to(wide)
            for grad, part in zip(last, direction.entering, strict=True)
        ]
        of_steps = [None if grad is None else grad[:, :, d].to(wide) for grad in steps]
        p, *own = adjoint(direction.linear, direction.edges, tuple(of_steps), tuple(final))
        of_input = p
        if direction.linear.slope is None:
            of_input = torch.cat([p[..., : 2 * own[0].size(-1)], direction.n_gain * own[0]], dim=-1)
        found.append([part.to(dtype) for part in (of_input, p, *own)])
    n = len(steps)
    of_input_, of_hidden, h, *others = ([run[k] for run in found] for k in range(len(found[0])))
    states = [torch.stack(parts) for parts in others[n - 1 :]]
    return StateGradients(of_input_, of_hidden, h, tuple(states[:n]), tuple(states[n:]))


def weight_rows(grad_gates: Tensor, input_rows: int) -> tuple[Tensor, Tensor]:
    """The parts of ``(..., 4 * H)`` that came from the input and from the hidden state."""
    if input_rows == grad_gates.size(-1):  # an LSTM
        return grad_gates, grad_gates
    r, z, input_n, hidden_n = grad_gates.chunk(4, dim=-1)
    return torch.cat([r, z, input_n], dim=-1), torch.cat([r, z, hidden_n], dim=-1)


def _matrix(grad: Tensor, x: Tensor, samples: int = 1) -> Tensor:
    """The gradient of ``W`` in ``x @ W.T``."""
    if samples == 1:
        return grad.flatten(0, 1).mT @ x.flatten(0, 1)
    grad, x = (_by_sample(steps, samples).movedim(1, 0).flatten(1, 2) for steps in (grad, x))
    return grad.mT @ x


def _by_sample(steps: Tensor, samples: int) -> Tensor:
    """``(L, N, X)`` as ``(L, samples, N / samples, X)``."""
    return steps.reshape(steps.size(0), samples, steps.size(1) // samples, steps.size(2))


def summed(grad: Tensor, samples: int = 1) -> Tensor:
    """``(L, N, X)`` summed over steps and sequences, the gradient of a bias."""
    return grad.sum((0, 1)) if samples == 1 else _by_sample(grad, samples).sum((0, 2))


def entering(layer: Layer) -> list[Tensor]:
    """The h that entered each step of each direction, ``(L, N, Hout)``, differentiable."""
    return [_Direction.enter(layer, d)[0] for d in range(len(layer.weights))]


def projection_gradient(layer: Layer, grad_h: Tensor, direction: int) -> Tensor:
    """The gradient of ``weight_hr`` from that of every step's h, differentiable."""
    layer = layer._replace(input=without_padding(layer.input, layer.lengths))
    projected = layer.directions()[direction].before_projection
    return _matrix(grad_h[:, :, direction], projected.to(grad_h.dtype))


def gradients(
    layer: Layer,
    steps: Sequence[Tensor | None],
    last: Sequence[Tensor | None],
    needs_input: bool,
    samples: int,
) -> tuple[Tensor | None, StateGradients, list[Weights] | None]:
    """Of the input, the states and the weights, from those of all states as :func:`state_gradients` takes them.

    Those of the weights are of every sample, ``(samples, ..)``, where there are more than one, and left out where there
    is none: each is equally many of the sequences, in order.
    """
    layer = layer._replace(input=without_padding(layer.input, layer.lengths))
    directions = layer.directions()
    states = state_gradients(directions, steps, last)
    products = [
        part @ w.weight_ih for part, w in zip(states.of_input, layer.weights, strict=True) if needs_input
    ]
    at_input = sum(products[1:], products[0]) if needs_input else None
    if samples == 0:
        return at_input, states, None
    at_weights = []
    for d, run in enumerate(directions):
        of_input, of_hidden = states.of_input[d], states.of_hidden[d]
        at_weight_hr = None
        if run.weights.weight_hr is not None:
            at_weight_hr = _matrix(states.h[d], run.before_projection.to(of_input), samples)
        matrices = _matrix(of_input, layer.input, samples), _matrix(of_hidden, run.entering[0], samples)
        at_weights.append(Weights(*matrices, summed(of_input, samples), summed(of_hidden, samples), at_weight_hr))
    return at_input, states, at_weights


# ------------------------------------------------------------------------------------------------------------- tangents


def tangents(
    layer: Layer,
    input: Tensor | None,
    initial: Sequence[Tensor | None],
    weights: Sequence[Weights],
    reset: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor]]:
    """The tangents of the states of all steps, ``(L, N, D, X)``, and of the last ones, ``(D, N, X)``.

    The arguments behind ``layer`` are the tangents of its fields of the same name, None = zeros.
    """
    x, lengths = without_padding(layer.input, layer.lengths), layer.lengths
    dx = None if input is None else without_padding(input, lengths)
    layer = layer._replace(input=x)
    n, runs = len(layer.states), []
    for d, (run, dw) in enumerate(zip(layer.directions(), weights, strict=True)):
        w, wide = run.weights, run.wide
        of_input = _sum(_product(dx, w.weight_ih), _product(x, dw.weight_ih), dw.bias_ih)
        of_hidden = _sum(_product(run.entering[0], dw.weight_hh), dw.bias_hh)
        s, u = _sources(run, of_input, of_hidden)
        if dw.weight_hr is not None:
            u = F.linear(run.before_projection, dw.weight_hr.to(wide))
        zeros = [part.new_zeros(part.shape[1:]) for part in run.entering]
        first = [(z if part is None else part[d]).to(wide) for part, z in zip(initial, zeros, strict=True)]
        to = [None if part is None else part[d].to(wide) for part in reset]
        found = tangent(run.linear, run.edges, s, (u, None)[:n], tuple(first), tuple(to))
        runs.append([part.to(x.dtype) for part in found])
    parts = list(zip(*runs, strict=True))
    return [torch.stack(part, dim=2) for part in parts[:n]], [torch.stack(part) for part in parts[n:]]


def _product(x: Tensor | None, weight: Tensor | None) -> Tensor | None:
    return None if x is None or weight is None else F.linear(x, weight)


def _sum(*terms: Tensor | None) -> Tensor | None:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def _sources(run: _Direction, of_input: Tensor | None, of_hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The sources of :class:`Linear`, ``s`` and that of h."""
    zeros = torch.zeros_like(run.linear.gain)
    at_input, at_hidden = (zeros if part is None else part.to(run.wide) for part in (of_input, of_hidden))
    if run.linear.slope is not None:
        return at_input + at_hidden, None
    r, z, n = at_input.chunk(3, dim=-1)
    return at_hidden + torch.cat([r, z, torch.zeros_like(n)], dim=-1), run.n_gain * n


# ---------------------------------------------------------------------------------------------------------------- gates


def _gates(is_lstm: bool, kept: Tensor | None, input: Tensor, entering: Tensor, weights: Weights) -> Tensor:
    """The gates of one direction, ``(L, N, 4 * H)``, as a function of all but ``kept``, which are their values."""
    if kept is not None and forward_ad._current_level < 0:
        found: Tensor = _KeptGates.apply(is_lstm, kept, input, entering, *weights[:4])  # type: ignore[no-untyped-call]
        return found
    x, h = F.linear(input, weights.weight_ih, weights.bias_ih), F.linear(entering, weights.weight_hh, weights.bias_hh)
    if is_lstm:
        i, f, g, o = (x + h).chunk(4, dim=-1)
        return torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], dim=-1)
    (r_x, z_x, n_x), (r_h, z_h, n_h) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    return torch.cat([r, z, (n_x + r * n_h).tanh(), n_h], dim=-1)


class _KeptGates(Function):
    """The gates that the forward pass kept, with the derivative of what they were computed from."""

    generate_vmap_rule = True

    @staticmethod
    def forward(is_lstm: bool, kept: Tensor, input: Tensor, entering: Tensor, *weights: Any) -> Tensor:
        return kept.view_as(kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.is_lstm, _, input, entering, weight_ih, weight_hh, bias, _ = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(output, input, entering, weight_ih, weight_hh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gates, input, entering, weight_ih, weight_hh = ctx.saved_tensors
        a, b, c, d = gates.chunk(4, dim=-1)
        at_a, at_b, at_c, at_d = grad.chunk(4, dim=-1)
        at_c = at_c * (1 - c * c)
        if ctx.is_lstm:
            at_d = at_d * d * (1 - d)
        else:
            at_a, at_d = at_a + at_c * d, at_d + at_c * a
        at_gates = torch.cat([at_a * a * (1 - a), at_b * b * (1 - b), at_c, at_d], dim=-1)
        of_input, of_hidden = weight_rows(at_gates, weight_ih.size(0))
        biases = (of_input.sum((0, 1)), of_hidden.sum((0, 1))) if ctx.has_bias else (None, None)
        matrices = (_matrix(of_input, input), _matrix(of_hidden, entering))
        return (None, None, of_input @ weight_ih, of_hidden @ weight_hh, *matrices, *biases)
