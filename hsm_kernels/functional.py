"""LSTM and GRU on tensors, without a module: the computation of :mod:`hsm_kernels.modules`."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _backend, _ops, reference
from ._arguments import (
    LayerState,
    SequenceShape,
    StateSpec,
    autocast_dtype,
    checked_lengths,
    combined_detach_mask,
    per_layer_states,
    time_major_mask,
)
from ._fallback import gru_boundaries, initial_or_zeros, lstm_boundaries
from .reference import State, Weights

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell"]

#: One layer and direction: ``[weight_ih, weight_hh, bias_ih, bias_hh, weight_hr]``, leaving out what there is not.
LayerWeights = Weights | Sequence[Tensor]


class _Boundaries(NamedTuple):
    """The boundary arguments of a call in canonical form: time-major, on the input's device."""

    reset_mask: Tensor | None
    reset_states: list[LayerState]
    detach_mask: Tensor | None
    lengths: Tensor | None
    detach_every: int  #: the mask detaches all sequences at each multiple of it; 0: not known


def lstm(
    input: Tensor,
    hx: Any,
    weights: Sequence[LayerWeights],
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset_mask: Tensor | None = None,
    reset_hx: Any = None,
    detach_mask: Tensor | None = None,
    truncated_bptt_steps: int | None = None,
    lengths: Tensor | None = None,
    return_states: bool = False,
    recompute: bool = False,
    backend: str | None = None,
) -> Any:
    r"""Run a multi-layer LSTM over whole sequences.

    Shapes: ``L`` steps, ``N`` sequences, ``I`` inputs, ``H`` hidden units, ``Hout`` = ``P`` with a projection and
    ``H`` without, ``D`` directions, ``K`` layers.

    Args:
        input: ``(L, N, I)``; ``(N, L, I)`` if ``batch_first``; ``(L, I)`` unbatched. float64, float32, bfloat16 or
        float16.
        hx: ``(h_0, c_0)`` of ``(D * K, N, Hout)`` and ``(D * K, N, H)``, or a list with one such pair per layer, ``(D,
            N, ..)`` each, or None for zeros. The batch dimension may be 1.
        weights: one entry per layer and direction, as :attr:`torch.nn.LSTM.all_weights`: ``weight_ih`` ``(4 * H, I)``,
            ``weight_hh`` ``(4 * H, Hout)``, ``bias_ih`` and ``bias_hh`` ``(4 * H,)``, ``weight_hr`` ``(P, H)``. For a
            float32 input the matrices may be bfloat16, and are used as ``weight.float()``: without gradients the
            kernels read them as they are, which takes half the time where reading the weights is most of it.
        bidirectional: whether ``weights`` alternate between the forward and the reverse direction.
        batch_first: whether ``input``, masks and per-step results have the batch first.
        dropout: probability, applied to the output of each layer but the last if ``training``.
        training: whether dropout is applied.
        reset_mask: bool ``(L, N)``, ``(N, L)`` if ``batch_first``, ``(L,)`` unbatched. The state that enters step
            ``t`` of the forward direction (and, in the reverse direction, step ``t - 1``) is replaced by ``reset_hx``.
        reset_hx: like ``hx``; None for zeros. Receives gradients.
        detach_mask: bool, shaped as ``reset_mask``. The state crosses the edge, its gradient does not.
        truncated_bptt_steps: ``k``: also detach at steps k, 2k, ...
        lengths: int ``(N,)``, 0 to L, in any order. Outputs behind a sequence's length are zero.
        return_states: also return ``h`` and ``c`` of every layer, direction and step, ``(D * K, L, N, ..)``.
        recompute: keep only ``h`` and ``c`` of every step for the backward pass, which computes the gates again, all
            steps at once: less memory, more time. Results are the same, gradients up to rounding. The reference keeps
            everything all the same.
        backend: "auto", "cuda", "cpu" or "reference"; None takes the process's choice.

    Returns:
        ``output`` ``(L, N, D * Hout)`` laid out as ``input``, ``(h_n, c_n)`` shaped as ``hx``, and the states if asked
        for.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range. RuntimeError: sizes that
            torch.nn refuses with RuntimeError, or a backend that cannot run the call.

    For one layer and direction, with :func:`torch.where` standing for the masks, this is::

        for t in range(L):
            h = torch.where(reset_mask[t, :, None], reset_h, h); c = torch.where(reset_mask[t, :, None], reset_c, c)
            gates = x[t] @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh
            i, f, g, o = gates.chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            output[t] = h

    >>> rnn, x = torch.nn.LSTM(3, 4, 2), torch.randn(5, 2, 3)
    >>> output, (h_n, c_n) = lstm(x, None, rnn.all_weights)
    >>> torch.testing.assert_close(output, rnn(x)[0])
    """
    return _run(
        _LSTM, input, hx, weights, bidirectional, batch_first, dropout, training, reset_mask, reset_hx, detach_mask,
        truncated_bptt_steps, lengths, return_states, recompute, backend,
    )  # fmt: skip


def gru(
    input: Tensor,
    hx: Any,
    weights: Sequence[LayerWeights],
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset_mask: Tensor | None = None,
    reset_hx: Any = None,
    detach_mask: Tensor | None = None,
    truncated_bptt_steps: int | None = None,
    lengths: Tensor | None = None,
    return_states: bool = False,
    recompute: bool = False,
    backend: str | None = None,
) -> Any:
    r"""Run a multi-layer GRU over whole sequences.

    Arguments, results and errors are those of :func:`lstm`, with one tensor ``(D * K, N, H)`` as the state, three gates
    (``weight_ih`` ``(3 * H, I)``, order r, z, n) and no projection.

    For one layer and direction this is::

        for t in range(L):
            h = torch.where(reset_mask[t, :, None], reset_h, h)
            x_r, x_z, x_n = (x[t] @ weight_ih.T + bias_ih).chunk(3, -1)
            h_r, h_z, h_n = (h @ weight_hh.T + bias_hh).chunk(3, -1)
            r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
            n = (x_n + r * h_n).tanh()
            h = (1 - z) * n + z * h
            output[t] = h

    >>> rnn, x = torch.nn.GRU(3, 4, bidirectional=True), torch.randn(5, 2, 3)
    >>> output, h_n = gru(x, None, rnn.all_weights, bidirectional=True)
    >>> torch.testing.assert_close(output, rnn(x)[0])
    """
    return _run(
        _GRU, input, hx, weights, bidirectional, batch_first, dropout, training, reset_mask, reset_hx, detach_mask,
        truncated_bptt_steps, lengths, return_states, recompute, backend,
    )  # fmt: skip


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step: ``input`` ``(N, I)``, ``hx`` ``(h, c)`` of ``(N, H)`` each or None -> the new ``(h, c)``.

    The formula is the body of the loop in :func:`lstm`; errors are those of :func:`lstm`.

    >>> cell, x = torch.nn.LSTMCell(3, 4), torch.randn(2, 3)
    >>> h, c = lstm_cell(x, None, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    >>> torch.testing.assert_close(h, cell(x)[0])
    """
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh)
    state = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
    _, (h, c) = lstm(input.unsqueeze(0), state, [weights], backend=backend)
    return h[0], c[0]


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One GRU step: ``input`` ``(N, I)``, ``hx`` ``(N, H)`` or None -> the new ``h``.

    The formula is the body of the loop in :func:`gru`; errors are those of :func:`gru`.

    >>> cell, x = torch.nn.GRUCell(3, 4), torch.randn(2, 3)
    >>> h = gru_cell(x, None, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    >>> torch.testing.assert_close(h, cell(x))
    """
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh)
    _, h = gru(input.unsqueeze(0), None if hx is None else hx.unsqueeze(0), [weights], backend=backend)
    return cast(Tensor, h[0])


def _run(
    kind: "_Kind",
    input: Tensor,
    hx: Any,
    weights: Sequence[LayerWeights],
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    reset_mask: Tensor | None,
    reset_hx: Any,
    detach_mask: Tensor | None,
    truncated_bptt_steps: int | None,
    lengths: Tensor | None,
    return_states: bool,
    recompute: bool,
    backend: str | None,
) -> Any:
    if input.dim() not in (2, 3):
        raise ValueError(f"{kind.name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    batched = input.dim() == 3
    steps = _time_major(input, batched, batch_first)
    shape = SequenceShape(steps.size(0), steps.size(1), batch_first, batched)

    directions = 2 if bidirectional else 1
    layers = _layers(kind, weights, directions, steps)
    spec = StateSpec(kind.name, len(layers), directions, kind.state_sizes(layers[0][0]))
    states, per_layer = per_layer_states("hx", hx, spec, shape, steps)
    if reset_hx is not None and reset_mask is None:
        raise ValueError(
            f"{kind.name}: reset_hx was given without reset_mask, so nothing would be reset to it; pass both"
        )
    boundaries = _Boundaries(
        time_major_mask(kind.name, "reset_mask", reset_mask, shape, input.device),
        per_layer_states("reset_hx", reset_hx, spec, shape, steps)[0],
        combined_detach_mask(kind.name, detach_mask, truncated_bptt_steps, shape, input.device),
        checked_lengths(kind.name, lengths, shape, input.device),
        truncated_bptt_steps or 0,
    )
    arguments = _Arguments(steps, layers, states, boundaries)
    autocast = autocast_dtype(input.device)
    if autocast is not None:
        arguments = _cast(arguments, autocast)
        with torch.autocast(input.device.type, enabled=False):
            results = _run_layers(kind, arguments, dropout if training else 0.0, return_states, recompute, backend)
    else:
        results = _run_layers(kind, arguments, dropout if training else 0.0, return_states, recompute, backend)
    return _in_the_layout_of_the_caller(kind, *results, shape, per_layer)


def _time_major(input: Tensor, batched: bool, batch_first: bool) -> Tensor:
    if not batched:
        return input.unsqueeze(1)
    return input.transpose(0, 1) if batch_first else input


class _Arguments(NamedTuple):
    """What the layers compute with, time-major: ``input`` ``(L, N, I)``."""

    input: Tensor
    layers: list[list[Weights]]
    states: list[LayerState]
    boundaries: _Boundaries


class _LayerResult(NamedTuple):
    output: Tensor  #: (L, N, D * Hout)
    final: State  #: (D, N, ..) each
    states: State | None  #: of every step, (D, L, N, ..) each


def _run_layers(
    kind: "_Kind", arguments: _Arguments, dropout: float, return_states: bool, recompute: bool, backend: str | None
) -> tuple[Tensor, list[State], list[State] | None]:
    """Run all layers -> the last one's output, every layer's final state, and every layer's states if asked for."""
    input, layers, states, boundaries = arguments
    reference_wanted = _backend.chooses_reference(backend, input.device, input.dtype)
    layer_function = kind.reference_layer if reference_wanted else kind.op_layer
    finals: list[State] = []
    all_states: list[State] = []
    for k, weights in enumerate(layers):
        if k > 0 and dropout > 0:
            input = F.dropout(input, dropout, True)
        result = layer_function(
            input, states[k], weights, boundaries, boundaries.reset_states[k], return_states, recompute
        )
        input = result.output
        finals.append(result.final)
        if result.states is not None:
            all_states.append(result.states)
    return input, finals, all_states if return_states else None


def _lstm_op_layer(
    input: Tensor,
    state: LayerState,
    weights: list[Weights],
    boundaries: _Boundaries,
    reset_state: LayerState,
    return_states: bool,
    recompute: bool,
) -> _LayerResult:
    h_0, c_0 = state or (None, None)
    reset_h, reset_c = reset_state or (None, None)
    training = _ops.needs_gradient(*weights[0], *weights[-1], input, h_0, c_0, reset_h, reset_c)
    weights = _op_weights(weights, input, training)
    reverse = weights[1] if len(weights) == 2 else (None,) * 5
    output, h_n, c_n, c_states, _ = _ops.lstm_forward(
        input, h_0, c_0, *weights[0], *reverse, boundaries.reset_mask, reset_h, reset_c, boundaries.detach_mask,
        boundaries.lengths, boundaries.detach_every, _backend.allows_tf32(input), return_states, recompute, training,
    )  # fmt: skip
    states = (_by_direction(output, len(weights)), c_states.permute(2, 0, 1, 3)) if return_states else None
    return _LayerResult(output, (h_n, c_n), states)


def _gru_op_layer(
    input: Tensor,
    state: LayerState,
    weights: list[Weights],
    boundaries: _Boundaries,
    reset_state: LayerState,
    return_states: bool,
    recompute: bool,
) -> _LayerResult:
    h_0, reset_h = (
        None if state is None else state[0],
        None if reset_state is None else reset_state[0],
    )
    training = _ops.needs_gradient(*weights[0], *weights[-1], input, h_0, reset_h)
    weights = _op_weights(weights, input, training)
    reverse = weights[1][:4] if len(weights) == 2 else (None,) * 4
    output, h_n, _ = _ops.gru_forward(
        input, h_0, *weights[0][:4], *reverse, boundaries.reset_mask, reset_h, boundaries.detach_mask,
        boundaries.lengths, boundaries.detach_every, _backend.allows_tf32(input), recompute, training,
    )  # fmt: skip
    return _LayerResult(output, (h_n,), (_by_direction(output, len(weights)),) if return_states else None)


def _lstm_reference_layer(
    input: Tensor,
    state: LayerState,
    weights: list[Weights],
    boundaries: _Boundaries,
    reset_state: LayerState,
    return_states: bool,
    recompute: bool,
) -> _LayerResult:
    gate_rows, hidden_out = weights[0].weight_hh.shape
    h_0, c_0 = state or (None, None)
    reset_h, reset_c = reset_state or (None, None)
    output, h_n, c_n, c_states = reference.lstm_layer(
        input,
        initial_or_zeros(h_0, input, len(weights), hidden_out),
        initial_or_zeros(c_0, input, len(weights), gate_rows // 4),
        _in_the_dtype_of(input, weights),
        lstm_boundaries(
            len(weights), boundaries.reset_mask, reset_h, reset_c, boundaries.detach_mask, boundaries.lengths
        ),
    )
    states = (_by_direction(output, len(weights)), c_states.permute(2, 0, 1, 3)) if return_states else None
    return _LayerResult(output, (h_n, c_n), states)


def _gru_reference_layer(
    input: Tensor,
    state: LayerState,
    weights: list[Weights],
    boundaries: _Boundaries,
    reset_state: LayerState,
    return_states: bool,
    recompute: bool,
) -> _LayerResult:
    h_0, reset_h = (
        None if state is None else state[0],
        None if reset_state is None else reset_state[0],
    )
    output, h_n = reference.gru_layer(
        input,
        initial_or_zeros(h_0, input, len(weights), weights[0].weight_hh.size(1)),
        _in_the_dtype_of(input, weights),
        gru_boundaries(len(weights), boundaries.reset_mask, reset_h, boundaries.detach_mask, boundaries.lengths),
    )
    return _LayerResult(output, (h_n,), (_by_direction(output, len(weights)),) if return_states else None)


class _Kind(NamedTuple):
    """What differs between LSTM and GRU above the operators."""

    name: str
    gates: int
    op_layer: Any
    reference_layer: Any

    def state_sizes(self, weights: Weights) -> tuple[int, ...]:
        """``(Hout, H)`` for LSTM, ``(H,)`` for GRU."""
        rows, hidden_out = weights.weight_hh.shape
        return (hidden_out, rows // self.gates) if self.name == "LSTM" else (hidden_out,)


_LSTM = _Kind("LSTM", 4, _lstm_op_layer, _lstm_reference_layer)
_GRU = _Kind("GRU", 3, _gru_op_layer, _gru_reference_layer)


def _op_weights(weights: list[Weights], input: Tensor, training: bool) -> list[Weights]:
    """The weights of a layer as the operators take them: those of a smaller dtype are widened unless a kernel does."""
    if weights[0].weight_hh.dtype == input.dtype or (not training and _backend.has_cpu_kernels(input.device)):
        return weights
    return _in_the_dtype_of(input, weights)


def _in_the_dtype_of(input: Tensor, weights: list[Weights]) -> list[Weights]:
    return [Weights(*(None if w is None else w.to(input.dtype) for w in entry)) for entry in weights]  # type: ignore[arg-type]


def _by_direction(output: Tensor, directions: int) -> Tensor:
    """``(L, N, D * Hout)`` -> ``(D, L, N, Hout)``, a view."""
    return output.view(*output.shape[:2], directions, output.size(2) // directions).permute(2, 0, 1, 3)


def _layers(kind: _Kind, weights: Sequence[LayerWeights], directions: int, input: Tensor) -> list[list[Weights]]:
    """Group ``weights`` by layer and direction, and check their shapes, dtypes and devices against the input's."""
    if not weights or len(weights) % directions:
        raise ValueError(
            f"{kind.name}: weights must have one entry per layer and direction, a positive multiple of {directions}, "
            f"got {len(weights)}"
        )
    named = [_named(kind, entry) for entry in weights]
    layers = [named[k : k + directions] for k in range(0, len(named), directions)]
    size, (rows, hidden_out) = input.size(2), named[0].weight_hh.shape
    dtype = input.dtype if autocast_dtype(input.device) is None else None
    matrix_dtype = dtype
    if dtype == torch.float32 and named[0].weight_hh.dtype == torch.bfloat16:
        matrix_dtype = torch.bfloat16
    for layer in layers:
        expected = ((rows, size), (rows, hidden_out), (rows,), (rows,), (hidden_out, rows // kind.gates))
        for entry in layer:
            for k, tensor in enumerate(entry):
                wanted = matrix_dtype if len(expected[k]) == 2 else dtype
                if tensor is not None and (
                    tensor.shape != expected[k] or (wanted and tensor.dtype != wanted) or tensor.device != input.device
                ):
                    raise _weight_error(kind, Weights._fields[k], tensor, expected[k], input)
        size = directions * hidden_out
    return layers


def _weight_error(
    kind: _Kind, name: str, tensor: Tensor, shape: tuple[int, ...], input: Tensor
) -> RuntimeError | ValueError:
    if tensor.shape != shape:
        return RuntimeError(f"{kind.name}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != input.device:
        return RuntimeError(
            f"{kind.name}: {name} must be on the input's device {input.device}, got {tensor.device}; use "
            "model.to(input.device)"
        )
    dtype = input.dtype
    return ValueError(
        f"{kind.name}: {name} must have the input's dtype {dtype}, got {tensor.dtype}; use input.to({tensor.dtype}) or "
        f"model.to({dtype})"
    )


def _named(kind: _Kind, entry: LayerWeights) -> Weights:
    if isinstance(entry, Weights):
        return entry
    matrices = [w for w in entry if w.dim() == 2]
    biases = [w for w in entry if w.dim() == 1]
    most = 3 if kind.name == "LSTM" else 2
    if not 2 <= len(matrices) <= most or len(biases) not in (0, 2):
        raise ValueError(
            f"{kind.name}: one layer's weights must be [weight_ih, weight_hh], with [bias_ih, bias_hh] and, for LSTM, "
            f"[weight_hr] after them if there are any, got {len(matrices)} matrices and {len(biases)} vectors"
        )
    bias_ih, bias_hh = biases or (None, None)
    return Weights(matrices[0], matrices[1], bias_ih, bias_hh, matrices[2] if len(matrices) == 3 else None)


def _cast(arguments: _Arguments, dtype: torch.dtype) -> _Arguments:
    """Autocast: input, weights and states are all cast to the autocast dtype, and so are the results."""

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    def cast_states(states: list[LayerState]) -> list[LayerState]:
        return [None if state is None else tuple(part.to(dtype) for part in state) for state in states]

    layers = [[Weights(*map(cast, w)) for w in layer] for layer in arguments.layers]  # type: ignore[arg-type]
    boundaries = arguments.boundaries._replace(reset_states=cast_states(arguments.boundaries.reset_states))
    return _Arguments(arguments.input.to(dtype), layers, cast_states(arguments.states), boundaries)


def _in_the_layout_of_the_caller(
    kind: _Kind,
    output: Tensor,
    finals: list[State],
    all_states: list[State] | None,
    shape: SequenceShape,
    per_layer: bool,
) -> Any:
    """Undo what the canonical form did: batch_first, unbatched, state of all layers or per layer, tuple or tensor."""
    if not shape.batched:
        output, finals = (
            output.squeeze(1),
            [tuple(part.squeeze(1) for part in state) for state in finals],
        )
    elif shape.batch_first:
        output = output.transpose(0, 1)
    hx_n: Any = [_unwrap(state) for state in finals] if per_layer else _unwrap(_joined(finals))
    if all_states is None:
        return output, hx_n
    states = _joined(all_states)
    if not shape.batched:
        states = tuple(part.squeeze(2) for part in states)
    elif shape.batch_first:
        states = tuple(part.transpose(1, 2) for part in states)
    return output, hx_n, _unwrap(states)


def _joined(states: list[State]) -> State:
    """The layers' states in one tensor, ``(D * K, ...)`` each."""
    return states[0] if len(states) == 1 else tuple(torch.cat(parts) for parts in zip(*states, strict=True))


def _unwrap(state: State) -> State | Tensor:
    return state if len(state) == 2 else state[0]
