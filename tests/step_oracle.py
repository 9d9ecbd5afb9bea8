"""What the boundary arguments mean, spelled out: torch.nn, one sequence and one step at a time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rnn_helpers import moved, tensors
from torch import Tensor, nn
from torch.func import functional_call

State = tuple[Tensor, ...]


class Edges(NamedTuple):
    """What happens on the edges of one sequence, in one layer and direction."""

    reset: Tensor | None
    reset_to: State
    detach: Tensor | None

    def cross(self, edge: int, state: State) -> State:
        if self.reset is not None and self.reset[edge]:
            return self.reset_to
        if self.detach is not None and self.detach[edge]:
            return tuple(part.detach() for part in state)
        return state


class Result(NamedTuple):
    """`output` (L, N, D * Hout), `last` and `states` as hx with (N,) or (L, N) after the rows."""

    output: Tensor
    last: State
    states: State


def step_by_step(
    rnn: nn.Module,
    input: Tensor,
    hx: Any = None,
    *,
    reset_mask: Tensor | None = None,
    reset_hx: Any = None,
    detach_mask: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Result:
    """Runs the parameters of `rnn` over `input` (L, N, I), on the CPU; returns states as tuples, where the input is."""
    device, (steps, batch) = input.device, input.shape[:2]
    input, hx, reset_mask, reset_hx, detach_mask = (
        moved(value, "cpu") for value in (input, hx, reset_mask, reset_hx, detach_mask)
    )
    zeros = _zero_state(rnn, batch, input)
    hx, reset_hx = (
        zeros if state is None else tuple(part.expand(-1, batch, -1) for part in tensors(state))
        for state in (hx, reset_hx)
    )
    columns = []
    for n in range(batch):
        column_length = steps if lengths is None else int(lengths[n])
        masks = [None if mask is None else mask[:, n] for mask in (reset_mask, detach_mask)]
        columns.append(_one_sequence(rnn, input[:column_length, n], _pick(hx, n), _pick(reset_hx, n), *masks))
    outputs, last, states = zip(*columns, strict=True)
    padded = [nn.functional.pad(out, (0, 0, 0, steps - len(out))) for out in outputs]
    result = Result(
        torch.stack(padded, dim=1),
        tuple(torch.stack(parts, dim=1) for parts in zip(*last, strict=True)),
        tuple(
            torch.stack([nn.functional.pad(part, (0, 0, 0, steps - part.size(1))) for part in parts], dim=2)
            for parts in zip(*states, strict=True)
        ),
    )
    return Result(*(moved(part, device) for part in result))


def _one_sequence(
    rnn: nn.Module,
    input: Tensor,
    hx: State,
    reset_hx: State,
    reset: Tensor | None,
    detach: Tensor | None,
) -> tuple[Tensor, State, State]:
    """All layers of one sequence: output (l, D * Hout), hx_n (rows, X), states (rows, l, X)."""
    directions = 2 if rnn.bidirectional else 1
    all_last, all_states = [], []
    for layer in range(rnn.num_layers):
        outputs = []
        for direction in range(directions):
            row = layer * directions + direction
            edges = Edges(reset, _row(reset_hx, row), detach)
            weights = _weights_of(rnn, layer, direction)
            states, last = _one_direction(rnn, weights, input, _row(hx, row), edges, direction)
            outputs.append(states[0])
            all_states.append(states)
            all_last.append(last)
        input = torch.cat(outputs, dim=-1)
    return (
        input,
        tuple(torch.cat(parts) for parts in zip(*all_last, strict=True)),
        tuple(torch.stack(parts) for parts in zip(*all_states, strict=True)),
    )


def _one_direction(
    rnn: nn.Module,
    weights: dict[str, Tensor],
    input: Tensor,
    state: State,
    edges: Edges,
    direction: int,
) -> tuple[State, State]:
    """The states of all steps (l, X) of one layer and direction, and the last state (1, X)."""
    length = len(input)
    if length == 0:
        return tuple(part[:0] for part in state), state
    single = _single_layer(rnn, input)
    states: list[State] = [state] * length
    for t in reversed(range(length)) if direction else range(length):
        edge = t + direction
        if edge < length:
            state = edges.cross(edge, state)
        passed = state if rnn.mode == "LSTM" else state[0]
        _, new = functional_call(single, weights, (input[t : t + 1], passed))
        state = new if rnn.mode == "LSTM" else (new,)
        states[t] = state
    return tuple(torch.cat(parts) for parts in zip(*states, strict=True)), state


def _single_layer(rnn: nn.Module, input: Tensor) -> nn.Module:
    """A module of torch.nn for one layer and direction; its own weights are never used."""
    options: dict[str, Any] = {"bias": rnn.bias, "device": input.device, "dtype": input.dtype}
    if rnn.mode == "LSTM":
        options["proj_size"] = rnn.proj_size
    return getattr(nn, rnn.mode)(input.size(-1), rnn.hidden_size, **options)


def _weights_of(rnn: nn.Module, layer: int, direction: int) -> dict[str, Tensor]:
    suffix = "_reverse" if direction else ""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    names = {f"{kind}_l0": f"{kind}_l{layer}{suffix}" for kind in kinds}
    return {key: getattr(rnn, name).cpu() for key, name in names.items() if hasattr(rnn, name)}


def _zero_state(rnn: nn.Module, batch: int, input: Tensor) -> State:
    rows = rnn.num_layers * (2 if rnn.bidirectional else 1)
    widths = [rnn.proj_size or rnn.hidden_size]
    if rnn.mode == "LSTM":
        widths.append(rnn.hidden_size)
    return tuple(input.new_zeros(rows, batch, width) for width in widths)


def _pick(state: State, n: int) -> State:
    return tuple(part[:, n] for part in state)


def _row(state: State, row: int) -> State:
    return tuple(part[row : row + 1] for part in state)
