"""Resets, detaches, lengths and returned states: API.md's boundary semantics, on both backends."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rnn_helpers import (
    DTYPES,
    SEQUENCE_CELLS,
    assert_same_bits,
    gradients,
    in_float64,
    leaf,
    make_pair,
    map_tensors,
    random_state,
    tensors,
)
from step_oracle import step_by_step
from tolerances import assert_close_to_reference
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import hsm_kernels as hsm

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.any_device]

# Each is a way to build a module that the semantics must hold for.
VARIANTS = [
    pytest.param("LSTM", {}, id="LSTM"),
    pytest.param("GRU", {}, id="GRU"),
    pytest.param("LSTM", {"num_layers": 2, "bidirectional": True}, id="LSTM-stacked-bidirectional"),
    pytest.param("GRU", {"num_layers": 2, "bidirectional": True}, id="GRU-stacked-bidirectional"),
    pytest.param("LSTM", {"num_layers": 2, "proj_size": 2}, id="LSTM-projected"),
]
variants = pytest.mark.parametrize(("cell", "options"), VARIANTS)
STEPS, BATCH, FEATURES, HIDDEN = 7, 3, 3, 4


def make(cell: str, **options: Any) -> nn.Module:
    return getattr(hsm, cell)(FEATURES, HIDDEN, dtype=torch.float64, **options)


def make_input(*lead: int) -> Tensor:
    return torch.randn(*(lead or (STEPS, BATCH)), FEATURES, dtype=torch.float64)


def make_state(rnn: nn.Module, batch: int | None = BATCH) -> Any:
    return random_state(rnn, batch, torch.float64)


def as_state(rnn: nn.Module, parts: Sequence[Tensor]) -> Any:
    """The form in which the module takes a state: a pair for LSTM, a tensor for GRU."""
    return tuple(parts) if rnn.mode == "LSTM" else parts[0]


def edges(*steps: int) -> Tensor:
    """A mask that is set at these steps for every sequence."""
    mask = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    mask[list(steps)] = True
    return mask


def assert_close(ours: Any, wanted: Any) -> None:
    for ours_one, wanted_one in zip(tensors(ours), tensors(wanted), strict=True):
        torch.testing.assert_close(ours_one, wanted_one, rtol=1e-9, atol=1e-11)


# Everything at once, against torch.nn taken one sequence and one step at a time.


@dataclass(frozen=True)
class Case:
    """One drawn module, input and set of boundaries; a mask's number is how often it is set."""

    cell: str
    layers: int
    bidirectional: bool
    projection: bool
    bias: bool
    length: int
    batch: int
    hidden_size: int
    state: str
    reset: float | None
    reset_state: str
    detach: float | None
    lengths: bool
    return_states: bool
    dtype: torch.dtype
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small shapes, and masks from never set to always set."""
    cell = draw(st.sampled_from(SEQUENCE_CELLS))
    states, density = st.sampled_from(["none", "full", "one"]), st.sampled_from([None, 0, 0.3, 1])
    return Case(
        cell=cell,
        layers=draw(st.integers(1, 2)),
        bidirectional=draw(st.booleans()),
        projection=cell == "LSTM" and draw(st.booleans()),
        bias=draw(st.booleans()),
        length=draw(st.integers(1, 6)),
        batch=draw(st.integers(1, 4)),
        hidden_size=draw(st.sampled_from([2, 3, 5, 8, 17])),
        state=draw(states),
        reset=draw(density),
        reset_state=draw(states),
        detach=draw(density),
        lengths=draw(st.booleans()),
        return_states=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
    )


def build(case: Case) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A module, an input (L, N, I), and the keyword arguments that the case draws."""
    torch.manual_seed(case.seed)
    projection = {"proj_size": (case.hidden_size + 1) // 2} if case.projection else {}
    rnn = getattr(hsm, case.cell)(
        FEATURES,
        case.hidden_size,
        case.layers,
        case.bias,
        bidirectional=case.bidirectional,
        dtype=case.dtype,
        **projection,
    )

    def state(kind: str) -> Any:
        batch = 1 if kind == "one" else case.batch
        return None if kind == "none" else random_state(rnn, batch, case.dtype)

    def mask(density: float | None) -> Tensor | None:
        return None if density is None else torch.rand(case.length, case.batch) < density

    boundaries = {
        "hx": state(case.state),
        "reset_mask": mask(case.reset),
        "reset_hx": None if case.reset is None else state(case.reset_state),
        "detach_mask": mask(case.detach),
        "lengths": torch.randint(0, case.length + 1, (case.batch,)) if case.lengths else None,
    }
    return rnn, torch.randn(case.length, case.batch, FEATURES, dtype=case.dtype), boundaries


def values_and_gradients(
    call: Any, rnn: nn.Module, input: Tensor, boundaries: dict[str, Any], grain: torch.dtype
) -> list[Tensor]:
    """Results of `call`, then the gradients of input, hx, reset_hx and every parameter."""
    dtype = next(rnn.parameters()).dtype
    leaves = {name: leaf(map_tensors(lambda tensor: tensor.to(dtype), boundaries[name])) for name in ("hx", "reset_hx")}
    input = leaf(input.to(dtype))
    values = tensors(call(rnn, input, **boundaries | leaves))
    wanted = [input, leaves["hx"], leaves["reset_hx"], list(rnn.parameters())]
    return values + gradients(values, wanted, grain)


@given(case=cases())
def test_all_boundaries_together(backend: str, case: Case) -> None:
    rnn, input, boundaries = build(case)

    def ours(rnn: nn.Module, input: Tensor, **boundaries: Any) -> Any:
        return rnn(input, return_states=case.return_states, **boundaries)

    def oracle(rnn: nn.Module, input: Tensor, **boundaries: Any) -> Any:
        result = step_by_step(rnn, input, **boundaries)
        return result if case.return_states else result[:2]

    got = values_and_gradients(ours, rnn, input, boundaries, case.dtype)
    low = values_and_gradients(oracle, rnn, input, boundaries, case.dtype)
    wanted = values_and_gradients(oracle, in_float64(rnn), input, boundaries, case.dtype)
    for i, (value, reference, yardstick) in enumerate(zip(got, wanted, low, strict=True)):
        assert_close_to_reference(value, reference, yardstick, f"value {i}")


# Resets.


def run_segments(theirs: nn.Module, input: Tensor, cuts: list[int], hx: Any, reset_hx: Any) -> Any:
    """torch.nn on each segment alone; reverse rows enter a segment from the right."""
    bounds = [0, *cuts, len(input)]
    reverse = torch.arange(tensors(hx)[0].size(0)) % 2 == 1 if theirs.bidirectional else None
    outputs, states = [], []
    for start, stop in pairwise(bounds):
        entering = hx if start == 0 else reset_hx
        if reverse is not None:
            from_right = hx if stop == len(input) else reset_hx
            entering = merge(reverse, from_right, entering)
        output, state = theirs(input[start:stop], entering)
        outputs.append(output)
        states.append(state)
    last = states[-1] if reverse is None else merge(reverse, states[0], states[-1])
    return torch.cat(outputs), last


def merge(rows: Tensor, yes: Any, no: Any) -> Any:
    """`yes` in the rows that are marked, else `no`."""
    if isinstance(no, Tensor):
        return torch.where(rows[:, None, None], yes, no)
    return tuple(merge(rows, y, n) for y, n in zip(yes, no, strict=True))


@variants
@pytest.mark.parametrize("cuts", [[3], [1, 4, 6], [1, 2, 3, 4, 5, 6]], ids=str)
def test_reset_equals_running_each_segment_alone(
    backend: str, cell: str, options: dict[str, Any], cuts: list[int]
) -> None:
    rnn, theirs = make_pair(cell, FEATURES, HIDDEN, dtype=torch.float64, **options)
    input, hx, reset_hx = leaf(make_input()), leaf(make_state(rnn)), leaf(make_state(rnn))
    result = rnn(input, hx, reset_mask=edges(*cuts), reset_hx=reset_hx)
    wanted = run_segments(theirs, input, cuts, hx, reset_hx)
    assert_close(result, wanted)
    assert_close(
        gradients(result, [input, hx, reset_hx, list(rnn.parameters())]),
        gradients(wanted, [input, hx, reset_hx, list(theirs.parameters())]),
    )


@variants
def test_reset_without_state_means_zeros(backend: str, cell: str, options: dict[str, Any]) -> None:
    rnn = make(cell, **options)
    input, zeros = make_input(), map_tensors(torch.zeros_like, make_state(rnn))
    assert_same_bits(rnn(input, reset_mask=edges(2, 5)), rnn(input, reset_mask=edges(2, 5), reset_hx=zeros))


@variants
def test_reset_at_first_step_replaces_hx_going_forward(backend: str, cell: str, options: dict[str, Any]) -> None:
    rnn = make(cell, **options)
    input, hx, reset_hx = make_input(), leaf(make_state(rnn)), leaf(make_state(rnn))
    result = rnn(input, hx, reset_mask=edges(0), reset_hx=reset_hx)
    forward = torch.ones(tensors(hx)[0].size(0), dtype=torch.bool)
    if rnn.bidirectional:
        forward[1::2] = False
    assert_close(result, rnn(input, merge(forward, reset_hx, hx)))
    for grad_hx, grad_reset in zip(gradients(result, hx), gradients(result, reset_hx), strict=True):
        assert not grad_hx[forward].any()
        assert grad_hx[~forward].all()
        assert grad_reset[forward].all()
        assert not grad_reset[~forward].any()


@variants
def test_reset_state_of_one_sequence_is_shared(backend: str, cell: str, options: dict[str, Any]) -> None:
    """Batch dimension 1: broadcast, and the gradient is the sum over sequences and edges."""
    rnn = make(cell, **options)
    input, mask = make_input(), torch.rand(STEPS, BATCH) < 0.5
    shared = leaf(make_state(rnn, 1))
    repeated = leaf(map_tensors(lambda part: part.repeat(1, BATCH, 1), shared))
    result = rnn(input, reset_mask=mask, reset_hx=shared)
    wanted = rnn(input, reset_mask=mask, reset_hx=repeated)
    assert_same_bits(result, wanted)
    sums = [grad.sum(1, keepdim=True) for grad in gradients(wanted, repeated)]
    assert_close(gradients(result, shared), sums)


@variants
def test_reset_state_can_be_all_that_is_trained(backend: str, cell: str, options: dict[str, Any]) -> None:
    """A learned reset state of a frozen module still gets its gradient."""
    rnn = make(cell, **options)
    input, mask = make_input(), edges(3)
    reset_hx = leaf(make_state(rnn))
    wanted = gradients(rnn(input, reset_mask=mask, reset_hx=reset_hx), reset_hx)
    rnn.requires_grad_(False)
    got = gradients(rnn(input, reset_mask=mask, reset_hx=reset_hx), reset_hx)
    assert_close(got, wanted)
    assert all(grad.any() for grad in got)


@variants
def test_nan_in_a_dropped_initial_state_reaches_nothing(backend: str, cell: str, options: dict[str, Any]) -> None:
    """One sequence enters with NaN and is reset at once; the reverse direction has no such edge."""
    rnn = make(cell, **options | {"bidirectional": False})
    input, hx, mask = (
        leaf(make_input()),
        make_state(rnn),
        torch.zeros(STEPS, BATCH, dtype=torch.bool),
    )
    mask[0, 1] = True
    clean = leaf(map_tensors(torch.clone, hx))
    for part in tensors(hx):
        part[:, 1] = torch.nan
    hx, parameters = leaf(hx), list(rnn.parameters())
    result, wanted = rnn(input, hx, reset_mask=mask), rnn(input, clean, reset_mask=mask)
    assert_same_bits(result, wanted)
    got = gradients(result, [input, hx, parameters])
    assert_close(got, gradients(wanted, [input, clean, parameters]))
    for grad in gradients(result, hx):
        assert torch.equal(grad[:, 1], torch.zeros_like(grad[:, 1]))


@variants
def test_nan_does_not_cross_a_reset(backend: str, cell: str, options: dict[str, Any]) -> None:
    """Steps on the other side of a reset are the same as with a clean input."""
    rnn = make(cell, **options)
    input = make_input()
    poisoned = input.clone()
    poisoned[2, 1] = torch.nan
    output, _ = rnn(poisoned, reset_mask=edges(2, 3))
    clean, _ = rnn(input, reset_mask=edges(2, 3))
    assert output[2, 1].isnan().all()
    keep = torch.ones(STEPS, BATCH, dtype=torch.bool)
    keep[2, 1] = False
    assert torch.equal(output[keep], clean[keep])


@variants
def test_nan_in_an_unused_reset_state_reaches_nothing(backend: str, cell: str, options: dict[str, Any]) -> None:
    rnn = make(cell, **options)
    input, mask = leaf(make_input()), edges(3)
    mask[:, 1] = False
    clean = leaf(make_state(rnn))
    reset_hx = map_tensors(lambda part: part.detach().clone(), clean)
    for part in tensors(reset_hx):
        part[:, 1] = torch.nan
    reset_hx, parameters = leaf(reset_hx), list(rnn.parameters())
    result = rnn(input, reset_mask=mask, reset_hx=reset_hx)
    wanted = rnn(input, reset_mask=mask, reset_hx=clean)
    assert_same_bits(result, wanted)
    got = gradients(result, [input, reset_hx, parameters])
    assert_close(got, gradients(wanted, [input, clean, parameters]))


# Detaches and truncated backpropagation through time.


@variants
def test_detach_does_not_change_values(backend: str, cell: str, options: dict[str, Any]) -> None:
    rnn = make(cell, **options)
    input, hx = make_input(), make_state(rnn)
    assert_same_bits(rnn(input, hx, detach_mask=torch.rand(STEPS, BATCH) < 0.5), rnn(input, hx))


@pytest.mark.parametrize(("cell", "options"), [v for v in VARIANTS if not v.values[1].get("bidirectional")])
@pytest.mark.parametrize("cuts", [[3], [1, 4, 6]], ids=str)
def test_detach_equals_detaching_between_chunks(
    backend: str, cell: str, options: dict[str, Any], cuts: list[int]
) -> None:
    rnn, theirs = make_pair(cell, FEATURES, HIDDEN, dtype=torch.float64, **options)
    input, hx = leaf(make_input()), leaf(make_state(rnn))
    result = rnn(input, hx, detach_mask=edges(*cuts))
    state, outputs = hx, []
    for start, stop in zip([0, *cuts], [*cuts, STEPS], strict=True):
        entering = map_tensors(Tensor.detach, state) if start else hx
        output, state = theirs(input[start:stop], entering)
        outputs.append(output)
    wanted = (torch.cat(outputs), state)
    assert_close(result, wanted)
    assert_close(
        gradients(result, [input, hx, list(rnn.parameters())]),
        gradients(wanted, [input, hx, list(theirs.parameters())]),
    )


@pytest.mark.parametrize(("cell", "options"), [v for v in VARIANTS if not v.values[1].get("bidirectional")])
def test_detaching_between_calls_gives_the_same_bits(
    backend: str, device: torch.device, cell: str, options: dict[str, Any]
) -> None:
    """In float32, where rounding would show: one call with detaches, and our own module chunk by chunk."""
    rnn = make(cell, **options).float()
    input, hx = leaf(torch.randn(150, 2, FEATURES)), leaf(random_state(rnn, 2))
    wanted_of = [input, hx, list(rnn.parameters())]
    result = rnn(input, hx, truncated_bptt_steps=7)
    outputs, state = [], hx
    for number, chunk in enumerate(input.split(7)):
        output, state = rnn(chunk, map_tensors(Tensor.detach, state) if number else state)
        outputs.append(output)
    wanted = (torch.cat(outputs), state)
    # A single step, as the last chunk is, sums in another order; so may cuBLAS in calls of other lengths.
    if device.type == "cpu":
        assert_same_bits(result[0][:-3], wanted[0][:-3])
    torch.testing.assert_close(tensors(result), tensors(wanted))
    torch.testing.assert_close(gradients(result, wanted_of), gradients(wanted, wanted_of), rtol=1e-4, atol=1e-4)


@variants
def test_detach_at_first_step_detaches_hx_going_forward(backend: str, cell: str, options: dict[str, Any]) -> None:
    rnn = make(cell, **options)
    input, hx = make_input(), leaf(make_state(rnn))
    for grad in gradients(rnn(input, hx, detach_mask=edges(0)), hx):
        reverse = grad[1::2] if rnn.bidirectional else grad[:0]
        forward = grad[::2] if rnn.bidirectional else grad
        assert not forward.any()
        assert reverse.all()


@variants
def test_reset_wins_where_both_are_set(backend: str, cell: str, options: dict[str, Any]) -> None:
    rnn = make(cell, **options)
    input, reset_hx, mask = (
        leaf(make_input()),
        leaf(make_state(rnn)),
        torch.rand(STEPS, BATCH) < 0.4,
    )
    wanted_of = [input, reset_hx, list(rnn.parameters())]
    both = rnn(input, reset_mask=mask, reset_hx=reset_hx, detach_mask=mask)
    reset = rnn(input, reset_mask=mask, reset_hx=reset_hx)
    assert_same_bits(both, reset)
    assert_close(gradients(both, wanted_of), gradients(reset, wanted_of))


@variants
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 7, 100])
def test_truncated_bptt_detaches_every_few_steps(backend: str, cell: str, options: dict[str, Any], steps: int) -> None:
    rnn = make(cell, **options)
    input, hx, mask = leaf(make_input()), leaf(make_state(rnn)), torch.rand(STEPS, BATCH) < 0.2
    wanted_of = [input, hx, list(rnn.parameters())]
    result = rnn(input, hx, detach_mask=mask, truncated_bptt_steps=steps)
    wanted = rnn(input, hx, detach_mask=mask | edges(*range(steps, STEPS, steps)))
    assert_same_bits(result, wanted)
    assert_close(gradients(result, wanted_of), gradients(wanted, wanted_of))


@pytest.mark.requires_library  # the reference takes minutes
@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_seventy_thousand_steps(cell: str) -> None:
    """Longer than cuDNN runs in one call, against torch.nn segment by segment: one sequence is reset, one detached."""
    steps, rnn = 70_000, getattr(hsm, cell)(FEATURES, HIDDEN)
    theirs = rnn.to_torch()
    input = leaf(torch.randn(steps, 2, FEATURES))
    reset, detach = (torch.zeros(steps, 2, dtype=torch.bool) for _ in range(2))
    reset[9_000::9_500, 0] = True  # 66_000 is one of them; torch.nn takes longest for long pieces
    detach[1_000::1_000, 1] = True
    result, _ = rnn(input, reset_mask=reset, detach_mask=detach)
    columns = []
    for n, mask in enumerate((reset, detach)):
        cuts = [0, *mask[:, n].nonzero().flatten().tolist(), steps]
        state, outputs = None, []
        for start, stop in pairwise(cuts):
            output, state = theirs(input[start:stop, n : n + 1], state)
            state = None if n == 0 else map_tensors(Tensor.detach, state)
            outputs.append(output)
        columns.append(torch.cat(outputs))
    wanted = torch.cat(columns, dim=1)
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)
    parameters = list(rnn.parameters())
    wanted_of = [input, parameters]
    for ours, theirs_one in zip(gradients(result, wanted_of), gradients(wanted, wanted_of), strict=True):
        assert (ours - theirs_one).norm() <= 1e-4 * theirs_one.norm()


# Lengths.


@variants
@pytest.mark.parametrize("lengths", [[7, 4, 1], [1, 7, 3], [7, 7, 7], [5, 2, 2]], ids=str)
def test_lengths_equal_a_packed_sequence(backend: str, cell: str, options: dict[str, Any], lengths: list[int]) -> None:
    rnn, theirs = make_pair(cell, FEATURES, HIDDEN, dtype=torch.float64, **options)
    input, hx = leaf(make_input()), leaf(make_state(rnn))
    result = rnn(input, hx, lengths=torch.tensor(lengths))
    packed = pack_padded_sequence(input, torch.tensor(lengths, device="cpu"), enforce_sorted=False)
    packed_output, state = theirs(packed, hx)
    wanted = (pad_packed_sequence(packed_output, total_length=STEPS)[0], state)
    assert_close(result, wanted)
    assert_close(
        gradients(result, [input, hx, list(rnn.parameters())]),
        gradients(wanted, [input, hx, list(theirs.parameters())]),
    )


@variants
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
def test_lengths_of_zero_return_hx(backend: str, cell: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    rnn = make(cell, **options)
    input, hx = make_input(), leaf(make_state(rnn))
    output, state = rnn(input, hx, lengths=torch.tensor([0, STEPS, 0], dtype=dtype))
    full_output, full_state = rnn(input, hx)
    assert not output[:, [0, 2]].any()
    assert_close(output[:, 1], full_output[:, 1])
    for part, initial, full in zip(*map(tensors, (state, hx, full_state)), strict=True):
        assert torch.equal(part[:, [0, 2]], initial[:, [0, 2]])
        assert_close(part[:, 1], full[:, 1])
    for grad, weight in zip(gradients(state, hx), weights_of(state), strict=True):
        assert torch.equal(grad[:, [0, 2]], weight[:, [0, 2]])


def weights_of(state: Any) -> list[Tensor]:
    """The weighting that `gradients` gives to each part of a state."""
    return gradients(map_tensors(torch.clone, leafed := leaf(state)), leafed)


@variants
def test_masks_beyond_the_length_are_ignored(backend: str, cell: str, options: dict[str, Any]) -> None:
    rnn = make(cell, **options)
    input, hx, reset_hx = leaf(make_input()), leaf(make_state(rnn)), leaf(make_state(rnn))
    lengths, parameters = torch.tensor([3, 0, 6]), list(rnn.parameters())
    behind = torch.arange(STEPS)[:, None] >= lengths
    reset, detach = (torch.rand(STEPS, BATCH) < 0.4 for _ in range(2))
    results = [
        rnn(
            input,
            hx,
            reset_mask=(reset & ~behind) | (behind & fill),
            reset_hx=reset_hx,
            detach_mask=(detach & ~behind) | (behind & fill),
            lengths=lengths,
        )
        for fill in torch.tensor([False, True])
    ]
    assert_same_bits(*results)
    assert_close(*(gradients(r, [input, hx, reset_hx, parameters]) for r in results))


@variants
@pytest.mark.parametrize("recompute", [False, True])
def test_nan_behind_the_lengths_reaches_no_gradient(
    backend: str, cell: str, options: dict[str, Any], recompute: bool
) -> None:
    """In the padding, and in the state of a sequence without steps."""
    rnn, lengths = make(cell, **options), torch.tensor([3, 0, STEPS])
    padding = torch.arange(STEPS)[:, None] >= lengths
    clean, hx = make_input().masked_fill(padding[..., None], 0), make_state(rnn)
    grads = []
    for filler in (0.0, torch.nan):
        input = leaf(clean.masked_fill(padding[..., None], filler))
        state = leaf(map_tensors(lambda part, filler=filler: part.index_fill(1, torch.tensor([1]), filler), hx))
        output, _ = rnn(input, state, lengths=lengths, recompute=recompute)
        grads.append(gradients(output, [input, state, list(rnn.parameters())]))
    assert_close(grads[1], grads[0])


# Returned states.


def step_alone(rnn: nn.Module, input: Tensor, hx: Any) -> list[Tensor]:
    """The states after every step, from one call of the module per step."""
    after = []
    for x in input:
        _, hx = rnn(x[None], hx)
        after.append(tensors(hx))
    return [torch.stack(parts, dim=1) for parts in zip(*after, strict=True)]


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
@pytest.mark.parametrize("projection", [0, 2])
def test_returned_states_equal_stepping(backend: str, cell: str, projection: int) -> None:
    if cell == "GRU" and projection:
        pytest.skip("GRU has no projection")
    options = {"proj_size": projection} if projection else {}
    rnn = make(cell, num_layers=2, **options)
    input, hx = leaf(make_input()), leaf(make_state(rnn))
    _, _, states = rnn(input, hx, return_states=True)
    wanted = step_alone(rnn, input, hx)
    assert isinstance(states, tuple) == (cell == "LSTM")
    assert_close(states, wanted)
    wanted_of = [input, hx, list(rnn.parameters())]
    assert_close(gradients(states, wanted_of), gradients(wanted, wanted_of))


@variants
def test_returned_states_have_the_layout_of_hx(backend: str, cell: str, options: dict[str, Any]) -> None:
    rnn = make(cell, **options)
    output, last, states = rnn(make_input(), return_states=True)
    width = rnn.proj_size or HIDDEN
    for part, hx_part, state_width in zip(tensors(states), tensors(last), (width, HIDDEN), strict=False):
        assert part.shape == (hx_part.size(0), STEPS, BATCH, state_width)
        assert part[:, 0].shape == hx_part.shape
    top = tensors(states)[0]
    last_rows = top[-2:] if rnn.bidirectional else top[-1:]
    assert_close(torch.cat(list(last_rows), dim=-1), output)
    ends = [part[:, -1] for part in tensors(states)]
    starts = [part[:, 0] for part in tensors(states)]
    for row in range(top.size(0)):
        source = starts if rnn.bidirectional and row % 2 else ends
        assert_close([part[row] for part in source], [part[row] for part in tensors(last)])


@variants
def test_return_states_does_not_change_the_rest(backend: str, cell: str, options: dict[str, Any]) -> None:
    rnn = make(cell, **options)
    input, hx = make_input(), make_state(rnn)
    assert_same_bits(rnn(input, hx, return_states=True)[:2], rnn(input, hx))


# Layouts: the same boundaries whichever way the arguments are laid out.


def boundaries_for(rnn: nn.Module, batch: int) -> dict[str, Any]:
    """Every boundary argument at once, time first."""
    return {
        "reset_mask": torch.rand(STEPS, batch) < 0.3,
        "reset_hx": make_state(rnn, batch),
        "detach_mask": torch.rand(STEPS, batch) < 0.3,
        "lengths": torch.randint(0, STEPS + 1, (batch,)),
        "return_states": True,
    }


@variants
def test_batch_first(backend: str, cell: str, options: dict[str, Any]) -> None:
    rnn, transposed = make(cell, **options), make(cell, batch_first=True, **options)
    transposed.load_state_dict(rnn.state_dict())
    input, hx, extras = make_input(), make_state(rnn), boundaries_for(rnn, BATCH)
    output, last, states = rnn(input, hx, **extras)
    masks = {name: extras[name].t() for name in ("reset_mask", "detach_mask")}
    result = transposed(input.transpose(0, 1), hx, **extras | masks)
    swapped = [part.transpose(1, 2) for part in tensors(states)]
    assert_close(result, [output.transpose(0, 1), last, swapped])


@variants
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(backend: str, cell: str, options: dict[str, Any], batch_first: bool) -> None:
    rnn = make(cell, batch_first=batch_first, **options)
    time_first = make(cell, **options)
    time_first.load_state_dict(rnn.state_dict())
    input, hx, extras = make_input(STEPS, 1), make_state(rnn, 1), boundaries_for(rnn, 1)
    del extras["lengths"]
    output, last, states = time_first(input, hx, **extras)
    masks = {name: extras[name][:, 0] for name in ("reset_mask", "detach_mask")}
    reset_hx = map_tensors(lambda part: part[:, 0], extras["reset_hx"])
    result = rnn(
        input[:, 0],
        map_tensors(lambda part: part[:, 0], hx),
        **extras | masks | {"reset_hx": reset_hx},
    )
    dropped = [part.squeeze(2) for part in tensors(states)]
    assert_close(result, [output[:, 0], [part[:, 0] for part in tensors(last)], dropped])


@variants
@pytest.mark.parametrize("length", [0, 1, 4, STEPS])
def test_length_of_an_unbatched_sequence(backend: str, cell: str, options: dict[str, Any], length: int) -> None:
    rnn = make(cell, **options)
    input, hx = make_input(STEPS), make_state(rnn, None)
    output, state = rnn(input, hx, lengths=torch.tensor(length))
    wanted, wanted_state = rnn(input[:length], hx)
    assert_close([output[:length], state], [wanted, wanted_state])
    assert not output[length:].any()


@variants
def test_masks_with_any_strides(backend: str, cell: str, options: dict[str, Any]) -> None:
    """Transposed, expanded and sliced masks, and a strided reset state."""
    rnn = make(cell, **options)
    input, reset_hx, mask = leaf(make_input()), leaf(make_state(rnn)), torch.rand(STEPS, BATCH) < 0.4
    column = mask[:, :1]
    strided = map_tensors(lambda part: part.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0), reset_hx)
    wanted_of = list(rnn.parameters())
    for laid_out, plain in (
        (mask.t().contiguous().t(), mask),
        (torch.stack([mask, ~mask], dim=-1)[..., 0], mask),
        (column.expand(STEPS, BATCH), column.repeat(1, BATCH)),
    ):
        got = rnn(input, reset_mask=laid_out, reset_hx=strided, detach_mask=laid_out.flip(0))
        wanted = rnn(input, reset_mask=plain, reset_hx=reset_hx, detach_mask=plain.flip(0))
        assert_close(got, wanted)
        assert_close(gradients(got, [input, wanted_of]), gradients(wanted, [input, wanted_of]))


def per_layer(rnn: nn.Module, state: Any) -> list[Any]:
    """A stacked state as a list with the state of each layer."""
    chunks = zip(*(part.chunk(rnn.num_layers) for part in tensors(state)), strict=True)
    return [as_state(rnn, parts) for parts in chunks]


@variants
@pytest.mark.parametrize("layers", [1, 3])
def test_state_per_layer(backend: str, cell: str, options: dict[str, Any], layers: int) -> None:
    rnn = make(cell, **options | {"num_layers": layers})
    input, hx, extras = make_input(), make_state(rnn), boundaries_for(rnn, BATCH)
    output, last, states = rnn(input, hx, **extras)
    split = extras | {"reset_hx": per_layer(rnn, extras["reset_hx"])}
    split_output, split_last, split_states = rnn(input, per_layer(rnn, hx), **split)
    assert type(split_last) is list
    assert len(split_last) == layers
    assert_close([split_output, split_states], [output, states])
    for got, wanted in zip(split_last, per_layer(rnn, last), strict=True):
        assert type(got) is type(wanted)
        assert_close(got, wanted)


@variants
def test_state_per_layer_carries_on(backend: str, cell: str, options: dict[str, Any]) -> None:
    """The list that comes out goes in again."""
    rnn = make(cell, **options | {"bidirectional": False})
    input, hx = make_input(), per_layer(rnn, make_state(rnn))
    first, middle = rnn(input[:4], hx)
    second, last = rnn(input[4:], middle)
    output, end = rnn(input, hx)
    assert_close([torch.cat([first, second]), last], [output, end])


# Masks at their extremes, derivatives, and the function they all belong to.


@variants
def test_masks_that_are_never_set_change_nothing(backend: str, cell: str, options: dict[str, Any]) -> None:
    rnn, nothing = make(cell, **options), torch.zeros(STEPS, BATCH, dtype=torch.bool)
    input, hx, parameters = leaf(make_input()), leaf(make_state(rnn)), list(rnn.parameters())
    result = rnn(
        input, hx, reset_mask=nothing, reset_hx=make_state(rnn), detach_mask=nothing,
        lengths=torch.full((BATCH,), STEPS),
    )  # fmt: skip
    wanted = rnn(input, hx)
    assert_close(result, wanted)
    assert_close(*(gradients(r, [input, hx, parameters]) for r in (result, wanted)))


@variants
def test_reset_at_every_step_forgets_everything(backend: str, cell: str, options: dict[str, Any]) -> None:
    """Every step is then a sequence of length one that starts from the reset state."""
    rnn, theirs = make_pair(cell, FEATURES, HIDDEN, dtype=torch.float64, **options | {"bidirectional": False})
    input, reset_hx = make_input(), make_state(rnn)
    everywhere = torch.ones(STEPS, BATCH, dtype=torch.bool)
    output, last = rnn(input, make_state(rnn), reset_mask=everywhere, reset_hx=reset_hx)
    alone = [theirs(x[None], reset_hx) for x in input]
    assert_close([output, last], [torch.cat([step[0] for step in alone]), alone[-1][1]])


@variants
def test_detach_at_every_step_leaves_one_step_of_gradient(backend: str, cell: str, options: dict[str, Any]) -> None:
    rnn = make(cell, **options)
    input = leaf(make_input())
    output, _ = rnn(input, detach_mask=torch.ones(STEPS, BATCH, dtype=torch.bool))
    (grad,) = torch.autograd.grad(output[3].sum(), input)
    assert grad[3].all()
    assert not grad[:3].any()
    assert not grad[4:].any()


def tiny(cell: str, options: dict[str, Any], recompute: bool = False) -> tuple[Any, list[Tensor]]:
    """A module with every differentiable boundary, small enough for numerical derivatives.

    No detach: finite differences see through it.
    """
    rnn = getattr(hsm, cell)(2, 3, dtype=torch.float64, **options)
    names, parameters = zip(*rnn.named_parameters(), strict=True)
    input = torch.randn(4, 3, 2, dtype=torch.float64)
    hx, reset_hx = make_state(rnn, 3), make_state(rnn, 1)
    mask, lengths = torch.rand(4, 3) < 0.4, torch.tensor([4, 0, 3])
    width = len(tensors(hx))

    def function(input: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        result = functional_call(
            rnn,
            dict(zip(names, rest[2 * width :], strict=True)),
            (input, as_state(rnn, rest[:width])),
            {
                "reset_mask": mask,
                "reset_hx": as_state(rnn, rest[width : 2 * width]),
                "lengths": lengths,
                "return_states": True,
                "recompute": recompute,
            },
        )
        return tuple(tensors(result))

    return function, [leaf(tensor) for tensor in tensors([input, hx, reset_hx, parameters])]


@variants
def test_gradients_by_finite_differences(backend: str, cell: str, options: dict[str, Any]) -> None:
    assert torch.autograd.gradcheck(*tiny(cell, options), fast_mode="num_layers" in options)


@variants
def test_double_backward_by_finite_differences(backend: str, cell: str, options: dict[str, Any]) -> None:
    assert torch.autograd.gradgradcheck(*tiny(cell, options), fast_mode=True)


@variants
def test_double_backward_with_detaches(backend: str, cell: str, options: dict[str, Any]) -> None:
    """Second derivatives stop at a detach too: the same as by the step-by-step definition."""
    rnn = make(cell, **options)
    input, hx, mask = leaf(make_input()), leaf(make_state(rnn)), torch.rand(STEPS, BATCH) < 0.4
    wanted_of = [input, hx, list(rnn.parameters())]
    seconds = []
    for output in (
        rnn(input, hx, detach_mask=mask)[0],
        step_by_step(rnn, input, hx, detach_mask=mask).output,
    ):
        (first,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
        seconds.append(gradients(first.square().sum(), wanted_of))
    assert_close(*seconds)


# Memory mode.


@variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_recomputation_changes_nothing_but_memory(
    backend: str, cell: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    rnn = make(cell, **options).to(dtype)
    input, hx = leaf(make_input().to(dtype)), leaf(random_state(rnn, BATCH, dtype))
    extras = map_extras(boundaries_for(rnn, BATCH), dtype)
    wanted_of = [input, hx, extras["reset_hx"], list(rnn.parameters())]
    kept, again = (rnn(input, hx, recompute=recompute, **extras) for recompute in (False, True))
    assert_same_bits(kept, again)
    for got, wanted in zip(gradients(again, wanted_of), gradients(kept, wanted_of), strict=True):
        tolerance = 1e-9 if dtype == torch.float64 else 0.05
        assert (got - wanted).norm() <= tolerance * (wanted.norm() + 1e-3)


def map_extras(extras: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same, with the reset state as a leaf in ``dtype``."""
    return extras | {"reset_hx": leaf(map_tensors(lambda part: part.to(dtype), extras["reset_hx"]))}


@variants
def test_recomputation_by_finite_differences(cell: str, options: dict[str, Any]) -> None:
    function, leaves = tiny(cell, options, recompute=True)
    assert torch.autograd.gradcheck(function, leaves, fast_mode="num_layers" in options)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def saved_bytes(rnn: nn.Module, input: Tensor, **options: Any) -> int:
    """What the graph of a call holds, each memory once, parameters aside."""
    held: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in rnn.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rnn(input, **options)
    return sum(held.values())


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_recomputation_saves_memory(cell: str) -> None:
    rnn, input = getattr(hsm, cell)(512, 512), torch.randn(8, 4, 512, requires_grad=True)
    assert saved_bytes(rnn, input, recompute=True) <= 0.45 * saved_bytes(rnn, input)


def test_a_packed_sequence_can_be_recomputed() -> None:
    rnn, input = make("LSTM"), make_input()
    packed = pack_padded_sequence(input, torch.tensor([7, 5, 2], device="cpu"))
    assert_close(rnn(packed, recompute=True), rnn(packed))
