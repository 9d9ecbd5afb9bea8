"""The recurrence of one direction, linearised: its tangents, forward in time, and its adjoints, against it.

Both are linear in what they are given, and each is the transpose of the other. So the derivative of one is the other
and products over all steps: derivatives of any order and in any mode come down to these two. Plain tensor algebra, a
few operations a step. Shapes: ``L`` steps, ``N`` sequences; of every step ``(L, N, X)``, of a state ``(N, X)``. Behind
the first dimension of the former and before the first of the latter there may be more, and the weights may have those,
too, for each of them its own weights.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .reference import valid_steps

#: (h, c) for LSTM, (h,) for GRU: of one step or of all. A part that is None is zero.
Parts = tuple[Tensor | None, ...]


class Edges(NamedTuple):
    """What happens to the state that enters each step of one direction: bool ``(L, N, 1)``, None for nowhere."""

    reset: Tensor | None
    detach: Tensor | None
    valid: Tensor | None  #: whether the step is run
    reverse: bool

    @staticmethod
    def of(
        reset_mask: Tensor | None, detach_mask: Tensor | None, lengths: Tensor | None, num_steps: int, reverse: bool
    ) -> "Edges":
        """The edges of a direction, from masks ``(L, N)`` and lengths ``(N,)``."""
        valid = None
        if lengths is not None:
            valid = valid_steps(num_steps, lengths.size(0), lengths, lengths.device)

        def entered(mask: Tensor | None) -> Tensor | None:
            if mask is None:
                return None
            crossed = mask if valid is None else mask & valid
            return (following(crossed) if reverse else crossed).unsqueeze(-1)

        return Edges(entered(reset_mask), entered(detach_mask), None if valid is None else valid.unsqueeze(-1), reverse)

    def order(self, num_steps: int) -> Iterable[int]:
        """The steps in the order of the forward pass."""
        return reversed(range(num_steps)) if self.reverse else range(num_steps)


def following(mask: Tensor) -> Tensor:
    """Entry ``t + 1`` at ``t``: the edge that the reverse direction crosses to enter ``t``; no edge to the last."""
    return torch.cat([mask[1:], torch.zeros_like(mask[:1])])


class Linear(NamedTuple):
    """One direction at every step, as a linear function of the state that entered it.

    With ``p = s + h @ weight_hh.T`` and ``q = gain * p``, an LSTM step is ``c = decay * c + q_i + q_f + q_g + u_c``,
    ``m = q_o + slope * c``, ``h = m @ weight_hr.T + u_h``, and a GRU step ``h = decay * h + q_r + q_z + q_n + u_h``.
    ``s`` and ``u`` are the sources.
    """

    gain: Tensor  #: ``(L, N, G * H)``
    decay: Tensor  #: ``(L, N, H)``
    slope: Tensor | None  #: ``(L, N, H)``; LSTM only
    weight_hh: Tensor  #: ``(G * H, Hout)``
    weight_hr: Tensor | None = None  #: ``(P, H)``


def enter(states: Tensor, initial: Tensor, reset: Tensor | None, edges: Edges, behind_detach: Tensor | None) -> Tensor:
    """What entered each step, ``(L, N, X)``, where ``states`` left them.

    ``initial`` entered the first step, ``reset`` (None = zeros) crossed the edges with a reset and ``behind_detach``,
    like ``states`` (None = zeros), those with a detach. At steps that are not run it is zero.
    """
    entering = _shifted(states, initial, edges)
    if edges.detach is not None:
        crossing = 0 if behind_detach is None else _shifted(behind_detach, initial.detach(), edges)
        entering = torch.where(edges.detach, crossing, entering)
    if edges.reset is not None:
        entering = torch.where(edges.reset, 0 if reset is None else reset, entering)
    return entering if edges.valid is None else torch.where(edges.valid, entering, 0)


def _shifted(states: Tensor, initial: Tensor, edges: Edges) -> Tensor:
    first = initial.unsqueeze(0).expand_as(states[:1])
    if not edges.reverse:
        return torch.cat([first, states[:-1]])
    shifted = torch.cat([states[1:], first])
    if edges.valid is None:
        return shifted
    return torch.where(following(edges.valid), shifted, initial)  # a sequence that ends earlier begins there


# --------------------------------------------------------------------------------------------------------- step by step


def _tangent_steps(
    linear: Linear, edges: Edges, s: Tensor, u: Parts, initial: Parts, reset: Parts
) -> tuple[Tensor, ...]:
    weight_hh, weight_hr = linear.weight_hh, linear.weight_hr
    gains, decays, slopes, sources = _by_step(linear.gain, linear.decay, linear.slope, s)
    num_steps, hidden = s.size(0), linear.decay.size(-1)
    state = tuple(part.view_as(part) for part in initial if part is not None)  # with no steps they are results
    zeros = tuple(torch.zeros_like(part) for part in state)
    reset_to = tuple(z if r is None else r for r, z in zip(reset, zeros, strict=True))
    left: list[Any] = [zeros] * num_steps
    for t in edges.order(num_steps):
        entering = state
        if edges.detach is not None:
            entering = _where(edges.detach[t], zeros, entering)
        if edges.reset is not None:
            entering = _where(edges.reset[t], reset_to, entering)
        q = gains[t] * _affine(sources[t], entering[0], weight_hh)
        carried = _plus(q[..., : 3 * hidden].unflatten(-1, (3, hidden)).sum(-2) + decays[t] * entering[-1], u[-1], t)
        new: tuple[Tensor, ...] = (carried,)
        if linear.slope is not None:
            m = q[..., 3 * hidden :] + slopes[t] * carried
            new = (_plus(m if weight_hr is None else m @ weight_hr.mT, u[0], t), carried)
        if edges.valid is None:
            left[t] = state = new
        else:
            left[t] = _where(edges.valid[t], new, zeros)
            state = _where(edges.valid[t], new, state)
    return (*_stacked(left, zeros), *state)


def _adjoint_steps(linear: Linear, edges: Edges, steps: Parts, last: Parts) -> tuple[Tensor, ...]:
    weight_hh, weight_hr = linear.weight_hh, linear.weight_hr
    gains, decays, slopes = _by_step(linear.gain, linear.decay, linear.slope)
    num_steps = linear.gain.size(0)
    state = tuple(part.view_as(part) for part in last if part is not None)  # with no steps they are results
    zeros = tuple(torch.zeros_like(part) for part in state)
    cut = edges.detach if edges.reset is None or edges.detach is None else edges.reset | edges.detach
    cut = edges.reset if cut is None else cut
    left: list[Any] = [None] * num_steps
    entered: list[Any] = [None] * num_steps
    for t in reversed([*edges.order(num_steps)]):
        own = tuple(_plus(part, step, t) for part, step in zip(state, steps, strict=True))
        carried = own[-1]
        if linear.slope is not None:
            m = own[0] if weight_hr is None else own[0] @ weight_hr
            carried = carried + slopes[t] * m
            own = (own[0], carried)
            p = gains[t] * torch.cat([carried, carried, carried, m], dim=-1)
            entering: tuple[Tensor, ...] = (p @ weight_hh, decays[t] * carried)
        else:
            p = gains[t] * torch.cat([carried, carried, carried], dim=-1)
            entering = (_affine(decays[t] * carried, p, weight_hh.mT),)
        if edges.valid is not None:
            p, own = torch.where(edges.valid[t], p, 0), _where(edges.valid[t], own, zeros)
            entering = _where(edges.valid[t], entering, state)
        left[t] = (p, *own)
        if edges.reset is not None:
            entered[t] = entering
        state = entering if cut is None else _where(cut[t], zeros, entering)
    results = (*_stacked(left, (linear.gain[:0].sum(0), *zeros)), *state)
    if edges.reset is None:
        return results
    # The state that a reset replaced gets nothing; the one that replaced it, all.
    return (*results, *(torch.where(edges.reset, part, 0).sum(0) for part in _stacked(entered, zeros)))


def _by_step(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.unbind() for tensor in tensors]


def _stacked(steps: list[tuple[Tensor, ...]], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each part of all steps as one tensor; ``like`` are the parts of one step."""
    if not steps:
        return tuple(part.new_empty(0, *part.shape) for part in like)
    return tuple(torch.stack(parts) for parts in zip(*steps, strict=True))


def _where(condition: Tensor, yes: tuple[Tensor, ...], no: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.where(condition, y, n) for y, n in zip(yes, no, strict=True))


def _plus(x: Tensor, source: Tensor | None, step: int) -> Tensor:
    return x if source is None else x + source[step]


def _affine(s: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``s + x @ weight.T``."""
    if s.dim() == x.dim() == weight.dim() == 2:
        return torch.addmm(s, x, weight.mT)
    return s + x @ weight.mT


# --------------------------------------------------------------------------------------------------- with a derivative


def tangent(linear: Linear, edges: Edges, s: Tensor, u: Parts, initial: Parts, reset: Parts) -> tuple[Tensor, ...]:
    """The tangents of all steps' states, ``(L, N, X)`` each, then of the last ones, ``(N, X)`` each.

    ``s`` ``(L, N, G * H)`` and ``u`` ``(L, N, X)`` are the sources; ``initial`` and ``reset`` ``(N, X)`` the tangents
    of the initial state and of the one that replaces others.
    """
    if forward_ad._current_level >= 0:  # the steps are differentiated one by one
        return _tangent_steps(linear, edges, s, u, initial, reset)
    found: tuple[Tensor, ...] = _Tangent.apply(edges.reverse, *edges[:3], *linear, s, *_flat(u, initial, reset))  # type: ignore[no-untyped-call]
    return found


def adjoint(linear: Linear, edges: Edges, steps: Parts, last: Parts) -> tuple[Tensor, ...]:
    """The gradients of ``s`` and of ``u`` ``(L, N, X)``, of the initial state and, with resets, of the reset state.

    ``steps`` ``(L, N, X)`` are the gradients of every step's state, ``last`` ``(N, X)`` those of the last one.
    """
    if forward_ad._current_level >= 0:
        return _adjoint_steps(linear, edges, steps, last)
    found: tuple[Tensor, ...] = _Adjoint.apply(edges.reverse, *edges[:3], *linear, *_flat(steps, last))  # type: ignore[no-untyped-call]
    return found


def _flat(*states: Parts) -> list[Tensor | None]:
    """Two parts of each, so that there are as many arguments for a GRU as for an LSTM."""
    return [part for state in states for part in (*state, None)[:2]]


def _gradients(
    linear: Linear, edges: Edges, adjoints: Sequence[Tensor], s: Tensor, tangents: Sequence[Tensor],
    initial: Parts, reset: Parts,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of :class:`Linear`: of ``sum(adjoints * tangents)``, taken over all steps."""
    gain, _, slope, weight_hh, weight_hr = linear
    p, *own = adjoints
    entering = [
        enter(states, states.new_zeros(states.shape[1:]) if first is None else first, to, edges, None)
        for states, first, to in zip(tangents, initial, reset, strict=True)
    ]
    pre = s + entering[0] @ weight_hh.mT
    at_carried = own[-1]
    at_decay, at_weight_hh = at_carried * entering[-1], _outer(p, entering[0], weight_hh)
    if slope is None:
        return pre * torch.cat([at_carried] * 3, dim=-1), at_decay, None, at_weight_hh, None
    at_m = own[0] if weight_hr is None else own[0] @ weight_hr
    at_gain, at_slope = pre * torch.cat([at_carried] * 3 + [at_m], dim=-1), at_m * tangents[1]
    if weight_hr is None:
        return at_gain, at_decay, at_slope, at_weight_hh, None
    m = (gain * pre)[..., -slope.size(-1) :] + slope * tangents[1]
    return at_gain, at_decay, at_slope, at_weight_hh, _outer(own[0], m, weight_hr)


def _outer(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """``a.T @ b``, summed over steps and sequences, and over everything else that ``like``, a weight, does not have."""
    if like.dim() == 2:
        return a.flatten(0, -2).mT @ b.flatten(0, -2)
    a, b = (x.movedim(0, -3).flatten(-3, -2) for x in (a, b))
    return a.mT @ b


class _Recurrence(Function):
    """What both share: their arguments begin with ``reverse``, the other edges and :class:`Linear`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.reverse, *tensors = inputs
        ctx.given = len(tensors)
        ctx.save_for_backward(*tensors, *output)


def _grouped(reverse: bool, tensors: Sequence[Any]) -> tuple[Edges, Linear, list[Any]]:
    """The arguments of a function after ``reverse``: edges, linear, sources, and the states as their parts."""
    (reset, detach, valid), linear = tensors[:3], Linear(*tensors[3:8])
    edges, others = Edges(reset, detach, valid, reverse), list(tensors[8:])
    sources = others[: len(others) % 2]
    parts = 1 if linear.slope is None else 2
    pairs = others[len(sources) :]
    return edges, linear, sources + [tuple(pairs[k : k + parts]) for k in range(0, len(pairs), 2)]


def _saved(ctx: Any) -> tuple[Edges, Linear, list[Any], tuple[Tensor, ...]]:
    """The arguments of a function, grouped, and its results."""
    tensors = ctx.saved_tensors
    return *_grouped(ctx.reverse, tensors[: ctx.given]), tensors[ctx.given :]


def _where_given(given: Iterable[Tensor | None], grads: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(None if argument is None else grad for argument, grad in zip(given, grads, strict=False))


def _with_batch(size: int, in_dims: Sequence[Any], tensors: Sequence[Any], states: int) -> list[Any]:
    """The arguments after ``reverse`` with vmap's dimension behind the steps, in front of a state or of a weight.

    The last ``states`` arguments are states. Weights that do not have it go without.
    """
    moved = []
    for k, (tensor, dim) in enumerate(zip(tensors, in_dims, strict=True)):
        is_weight, is_state = k in (6, 7), k >= len(tensors) - states
        to = 0 if is_weight or is_state else 1
        if tensor is None or (dim is None and is_weight):
            moved.append(tensor)
        elif dim is None:
            moved.append(tensor.unsqueeze(to).expand(*tensor.shape[:to], size, *tensor.shape[to:]))
        else:
            moved.append(tensor.movedim(dim, to))
    return moved


class _Tangent(_Recurrence):
    @staticmethod
    def forward(reverse: bool, *tensors: Any) -> tuple[Tensor, ...]:
        edges, linear, others = _grouped(reverse, tensors)
        return _tangent_steps(linear, edges, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        edges, linear, (s, u, initial, reset), states = _saved(ctx)
        n = len(initial)
        p, *found = adjoint(linear, edges, grads[:n], grads[n:])
        of_linear = _gradients(linear, edges, (p, *found[:n]), s, states[:n], initial, reset)
        of_states = _flat(
            _where_given(u, found[:n]), _where_given(initial, found[n:]), _where_given(reset, found[2 * n :] or reset)
        )
        return (None, None, None, None, *of_linear, p, *of_states)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], reverse: bool, *tensors: Any) -> Any:
        edges, linear, others = _grouped(reverse, _with_batch(info.batch_size, in_dims[1:], tensors, states=4))
        found = tangent(linear, edges, *others)
        n = len(found) // 2
        return found, (1,) * n + (0,) * n


class _Adjoint(_Recurrence):
    @staticmethod
    def forward(reverse: bool, *tensors: Any) -> tuple[Tensor, ...]:
        edges, linear, others = _grouped(reverse, tensors)
        return _adjoint_steps(linear, edges, *others)

    @staticmethod
    def backward(ctx: Any, s: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        edges, linear, (steps, last), adjoints = _saved(ctx)
        n = len(last)
        initial, reset = grads[n : 2 * n], grads[2 * n :] or (None,) * n
        found = tangent(linear, edges, s, grads[:n], initial, reset)
        of_linear = _gradients(linear, edges, adjoints[: n + 1], s, found[:n], initial, reset)
        return (None, None, None, None, *of_linear, *_flat(_where_given(steps, found[:n]), found[n:]))

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], reverse: bool, *tensors: Any) -> Any:
        edges, linear, others = _grouped(reverse, _with_batch(info.batch_size, in_dims[1:], tensors, states=2))
        found = adjoint(linear, edges, *others)
        of_steps = 1 + len(others[1])
        return found, (1,) * of_steps + (0,) * (len(found) - of_steps)
