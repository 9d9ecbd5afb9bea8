"""Outputs and every gradient against torch.nn, over drawn shapes, layouts and dtypes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rnn_helpers import (
    DTYPES,
    SEQUENCE_CELLS,
    STEP_CELLS,
    gradients,
    in_float64,
    leaf,
    make_pair,
    map_tensors,
    random_state,
    run,
    tensors,
)
from tolerances import assert_close_to_reference
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

import hsm_kernels as hsm

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.any_device]


@dataclass(frozen=True)
class Case:
    """One drawn configuration of a sequence module and of its input."""

    cell: str
    layers: int
    bidirectional: bool
    projection: bool
    bias: bool
    batch_first: bool
    layout: str
    length: int
    batch: int
    input_size: int
    hidden_size: int
    state: str
    training: bool
    dtype: torch.dtype
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small shapes, odd and prime sizes, and every layout of input and state."""
    cell = draw(st.sampled_from(SEQUENCE_CELLS))
    layout = draw(st.sampled_from(["batched", "unbatched", "packed", "packed unsorted"]))
    batches = [1, 2, 3, 5, 7, 16, 33] + [0] * (not layout.startswith("packed"))
    hidden_size = draw(st.sampled_from([1, 2, 3, 5, 8, 13, 16, 31, 37, 64, 130]))
    return Case(
        cell=cell,
        layers=draw(st.integers(1, 3)),
        bidirectional=draw(st.booleans()),
        projection=cell == "LSTM" and hidden_size > 1 and draw(st.booleans()),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        layout=layout,
        length=draw(st.sampled_from([1, 2, 3, 5, 9, 20])),
        batch=draw(st.sampled_from(batches)),
        input_size=draw(st.sampled_from([1, 3, 4, 7, 17, 64])),
        hidden_size=hidden_size,
        state=draw(st.sampled_from(["none", "contiguous", "expanded", "transposed", "strided"])),
        training=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**16)),
    )


class Packed(nn.Module):
    """Packs a padded input before it reaches the module, with lengths that include the longest."""

    def __init__(self, rnn: nn.Module, lengths: Tensor, enforce_sorted: bool) -> None:
        super().__init__()
        self.rnn, self.lengths, self.enforce_sorted = rnn, lengths, enforce_sorted

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        packed = pack_padded_sequence(input, self.lengths, self.rnn.batch_first, enforce_sorted=self.enforce_sorted)
        return self.rnn(packed, hx)


def lay_out(state: Tensor, how: str) -> Tensor:
    """The same shape in another memory layout; `expanded` repeats the first sequence."""
    if how == "expanded" and state.dim() == 3:
        return state[:, :1].expand_as(state)
    if how == "transposed":
        return state.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "strided":
        return torch.stack([state, state], dim=-1)[..., 0]
    return state


def build(case: Case) -> tuple[nn.Module, nn.Module, Tensor, Any]:
    """Our module, torch.nn's, an input and a state."""
    torch.manual_seed(case.seed)
    projection = {"proj_size": (case.hidden_size + 1) // 2} if case.projection else {}
    ours, theirs = make_pair(
        case.cell,
        case.input_size,
        case.hidden_size,
        case.layers,
        case.bias,
        case.batch_first,
        bidirectional=case.bidirectional,
        dtype=case.dtype,
        **projection,
    )
    batch = None if case.layout == "unbatched" else case.batch
    lead = [case.length] if batch is None else [case.length, batch]
    if case.batch_first:
        lead.reverse()
    input = torch.randn(*lead, case.input_size, dtype=case.dtype)
    state = random_state(ours, batch, case.dtype)
    hx = None if case.state == "none" else map_tensors(lambda s: lay_out(s, case.state), state)
    if case.layout.startswith("packed"):
        lengths = torch.randint(1, case.length + 1, (case.batch,))
        lengths[0] = case.length
        is_sorted = case.layout == "packed"
        lengths = lengths.sort(descending=True).values if is_sorted else lengths.flip(0)
        ours, theirs = (Packed(rnn, lengths.cpu(), is_sorted) for rnn in (ours, theirs))
    return ours.train(case.training), theirs.train(case.training), input, hx


def assert_equivalent(ours: nn.Module, theirs: nn.Module, input: Tensor, hx: Any) -> None:
    """Compares outputs and all gradients with torch.nn in float64."""
    dtype = input.dtype
    low = run(theirs, input, hx)
    got = run(ours, input, hx)
    reference = run(in_float64(theirs), input.double(), map_tensors(Tensor.double, hx), grain=dtype)
    assert got.keys() == low.keys()
    for name, value in got.items():
        assert_close_to_reference(value, reference[name], low[name], name)


@given(case=cases())
def test_sequence_modules(backend: str, case: Case) -> None:
    assert_equivalent(*build(case))


@settings(max_examples=40)
@given(case=cases())
def test_inference(backend: str, case: Case) -> None:
    ours, theirs, input, hx = build(case)
    with torch.inference_mode():
        got, low = tensors(ours(input, hx)), tensors(theirs(input, hx))
        wide_hx = map_tensors(Tensor.double, hx)
        reference = tensors(in_float64(theirs)(input.double(), wide_hx))
    for i, (value, yardstick, wanted) in enumerate(zip(got, low, reference, strict=True)):
        assert_close_to_reference(value, wanted, yardstick, f"out[{i}]")


@given(
    cell=st.sampled_from(STEP_CELLS),
    sizes=st.tuples(st.sampled_from([1, 3, 7, 17]), st.sampled_from([1, 2, 5, 16, 37])),
    bias=st.booleans(),
    batch=st.sampled_from([None, 0, 1, 2, 5]),
    with_state=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_step_modules(
    backend: str,
    cell: str,
    sizes: tuple[int, int],
    bias: bool,
    batch: int | None,
    with_state: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    ours, theirs = make_pair(cell, *sizes, bias, dtype=dtype)
    lead = () if batch is None else (batch,)
    input = torch.randn(*lead, sizes[0], dtype=dtype)
    states = [torch.randn(*lead, sizes[1], dtype=dtype) for _ in range(2)]
    hx = (tuple(states) if cell == "LSTMCell" else states[0]) if with_state else None
    assert_equivalent(ours, theirs, input, hx)


# What the sweep does not draw: single outputs, extreme values, odd strides, partly frozen modules.


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
@pytest.mark.parametrize("part", range(3))
def test_gradients_of_one_output_alone(backend: str, cell: str, part: int) -> None:
    """The others then have no gradient at all, rather than zeros."""
    if cell == "GRU" and part == 2:
        pytest.skip("GRU has no cell state")
    ours, theirs = make_pair(cell, 3, 4, 2, bidirectional=True, dtype=torch.float64)
    input, hx = leaf(torch.randn(5, 2, 3, dtype=torch.float64)), leaf(random_state(ours, 2, torch.float64))
    got, wanted = (
        gradients(tensors(rnn(input, hx))[part], [input, hx, list(rnn.parameters())]) for rnn in (ours, theirs)
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("cell", SEQUENCE_CELLS + STEP_CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [30.0, -30.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan])
def test_extreme_values(backend: str, cell: str, dtype: torch.dtype, value: float) -> None:
    """Saturated gates, infinities and NaN come out as in torch.nn."""
    ours, theirs = make_pair(cell, 1, 19, dtype=dtype)
    input = torch.tensor([[value], [1.0]], dtype=dtype)
    input = input if cell in STEP_CELLS else torch.stack([input, input.flip(0), input])
    got, wanted = tensors(ours(input)), tensors(theirs.double()(input.double()))
    for ours_one, wanted_one in zip(got, wanted, strict=True):
        torch.testing.assert_close(
            ours_one.double(), wanted_one, rtol=0, atol=4 * torch.finfo(dtype).eps, equal_nan=True
        )


def other_strides(tensor: Tensor) -> Tensor:
    """The same values with the first dimension innermost, among values that are not to be read."""
    room = torch.full((*tensor.shape[1:], tensor.shape[0] + 1, 2), torch.nan, dtype=tensor.dtype)
    room[..., :-1, 1] = tensor.movedim(0, -1)
    return room[..., :-1, 1].movedim(-1, 0)


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_any_strides_of_input_weights_and_gradients(backend: str, cell: str, dtype: torch.dtype, grad: bool) -> None:
    rnn = getattr(hsm, cell)(3, 5, 2, bidirectional=True, dtype=dtype)
    strided = getattr(hsm, cell)(3, 5, 2, bidirectional=True, dtype=dtype)
    for name, parameter in rnn.named_parameters():
        setattr(strided, name, nn.Parameter(other_strides(parameter.detach())))
    input = torch.randn(6, 4, 3, dtype=dtype)
    results = []
    with torch.set_grad_enabled(grad):
        for module, lay_out in ((rnn, Tensor.clone), (strided, other_strides)):
            laid_out = leaf(lay_out(input))
            outputs = tensors(module(laid_out))
            results.append(list(outputs))
            if grad:
                weights = [lay_out(torch.ones_like(out)) for out in outputs]
                wanted = [laid_out, *module.parameters()]
                results[-1] += torch.autograd.grad(outputs, wanted, weights)
    tolerance = {} if dtype == torch.float64 else {"rtol": 0, "atol": 0.1}
    torch.testing.assert_close(*results, **tolerance)


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_expanded_input_and_gradient(backend: str, cell: str) -> None:
    """Strides of zero: one sequence for all, and the gradient that a sum sends back."""
    ours, theirs = make_pair(cell, 3, 4, dtype=torch.float64)
    row = torch.randn(5, 1, 3, dtype=torch.float64)
    results = []
    for rnn in (ours, theirs):
        one = leaf(row)
        output, state = rnn(one.expand(5, 4, 3))
        loss = output.sum() + sum(part.sum() for part in tensors(state))
        results.append(torch.autograd.grad(loss, [one, *rnn.parameters()]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cell", SEQUENCE_CELLS + STEP_CELLS)
def test_any_part_of_a_module_may_be_trained_alone(backend: str, cell: str) -> None:
    rnn = getattr(hsm, cell)(3, 4, dtype=torch.float64)
    input = torch.randn(*((2, 3) if cell in STEP_CELLS else (5, 2, 3)), dtype=torch.float64)
    result = rnn(input)
    wanted = dict(zip(dict(rnn.named_parameters()), gradients(result, list(rnn.parameters())), strict=True))
    for name, parameter in rnn.named_parameters():
        rnn.requires_grad_(False)
        parameter.requires_grad_(True)
        torch.testing.assert_close(gradients(rnn(input), parameter), [wanted[name]])
    rnn.requires_grad_(False)
    assert not any(tensor.requires_grad for tensor in tensors(rnn(input)))


@pytest.mark.parametrize("cell", SEQUENCE_CELLS + STEP_CELLS)
def test_gradients_share_no_memory(backend: str, cell: str) -> None:
    """Whoever clips or scales gradients in place edits each of them once."""
    rnn = getattr(hsm, cell)(3, 4)
    input = leaf(torch.randn(*((2, 3) if cell in STEP_CELLS else (5, 2, 3))))
    found = gradients(rnn(input), [input, list(rnn.parameters())])
    assert len({grad.untyped_storage().data_ptr() for grad in found}) == len(found)
    tensors(rnn(input))[0].sum().backward()
    found = [input.grad, *(parameter.grad for parameter in rnn.parameters())]
    assert len({grad.untyped_storage().data_ptr() for grad in found}) == len(found)


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_the_same_call_gives_the_same_bits(cell: str) -> None:
    rnn = getattr(hsm, cell)(32, 96, 2, bidirectional=True)
    input = torch.randn(12, 24, 32)
    first = run(rnn, input)
    for _ in range(3):
        for name, value in run(rnn, input).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_gradients_accumulate(backend: str, cell: str) -> None:
    ours, theirs = make_pair(cell, 3, 4, 2, dtype=torch.float64)
    inputs = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    for rnn in (ours, theirs):
        for input in inputs:
            tensors(rnn(input))[0].square().sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad)


# Derivatives of every kind.


def differentiable(rnn: nn.Module, input: Tensor, hx: Any) -> tuple[Any, list[Tensor]]:
    """`rnn` as a plain function of its input, its state and its parameters."""
    names, parameters = zip(*rnn.named_parameters(), strict=True)
    is_pair = isinstance(hx, tuple)

    def function(input: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state = rest[:2] if is_pair else rest[0]
        weights = dict(zip(names, rest[2 if is_pair else 1 :], strict=True))
        return tuple(tensors(functional_call(rnn, weights, (input, state))))

    inputs = [leaf(tensor) for tensor in tensors([input, hx, parameters])]
    return function, inputs


def tiny(cell: str, **options: Any) -> tuple[Any, list[Tensor]]:
    """A float64 module small enough for numerical derivatives."""
    if cell.endswith("Cell"):
        rnn, lead = getattr(hsm, cell)(2, 2, dtype=torch.float64), (2,)
        states = tuple(torch.randn(2, 2, dtype=torch.float64) for _ in range(2))
        hx = states if cell == "LSTMCell" else states[0]
    else:
        rnn, lead = getattr(hsm, cell)(2, 2, dtype=torch.float64, **options), (3, 2)
        lead = lead[::-1] if rnn.batch_first else lead
        hx = random_state(rnn, 2, torch.float64)
    return differentiable(rnn, torch.randn(*lead, 2, dtype=torch.float64), hx)


TINY = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"proj_size": 1, "bidirectional": True, "bias": False}),
    ("GRU", {}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("GRU", {"bias": False, "batch_first": True}),
    ("LSTMCell", {}),
    ("GRUCell", {}),
]


@pytest.mark.parametrize(("cell", "options"), TINY)
def test_gradients_by_finite_differences(backend: str, cell: str, options: dict) -> None:
    assert torch.autograd.gradcheck(*tiny(cell, **options))


@pytest.mark.parametrize(("cell", "options"), TINY)
def test_double_backward_by_finite_differences(backend: str, cell: str, options: dict) -> None:
    assert torch.autograd.gradgradcheck(*tiny(cell, **options), fast_mode=True)


@pytest.mark.parametrize(("cell", "options"), TINY)
def test_double_backward_equals_torch(backend: str, cell: str, options: dict) -> None:
    """The gradient penalty of a WGAN, whose gradients are second derivatives."""
    ours, theirs = make_pair(cell, 3, 4, dtype=torch.float64, **options)
    lead = (2,) if cell.endswith("Cell") else (5, 2)
    input = torch.randn(*lead, 3, dtype=torch.float64, requires_grad=True)
    penalties = []
    for rnn in (ours, theirs):
        grads = torch.autograd.grad(tensors(rnn(input))[0].square().sum(), input, create_graph=True)
        penalty = grads[0].square().sum()
        penalties.append(gradients(penalty, [input, list(rnn.parameters())]))
    for got, wanted in zip(*penalties, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("cell", SEQUENCE_CELLS + STEP_CELLS)
def test_forward_mode_derivatives(backend: str, cell: str) -> None:
    assert torch.autograd.gradcheck(*tiny(cell), check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_per_sample_gradients(backend: str, cell: str) -> None:
    """vmap(grad) over samples equals one backward per sample."""
    rnn = getattr(hsm, cell)(3, 4, 2, bidirectional=True, dtype=torch.float64)
    samples = torch.randn(5, 6, 3, dtype=torch.float64)
    parameters = dict(rnn.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(rnn, parameters, (sample,))[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        single = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        for name, wanted in zip(parameters, single, strict=True):
            torch.testing.assert_close(per_sample[name][i], wanted)


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_ensembles_of_models(backend: str, cell: str) -> None:
    """vmap over stacked parameters equals one call per model."""
    models = [getattr(hsm, cell)(3, 4, dtype=torch.float64) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(models)
    input = torch.randn(6, 2, 3, dtype=torch.float64)
    together = torch.func.vmap(lambda weights: functional_call(models[0], weights, (input,))[0])
    for out, model in zip(together(stacked), models, strict=True):
        torch.testing.assert_close(out, model(input)[0])


@pytest.mark.slow
@pytest.mark.requires_library
@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_more_than_65535_steps(cell: str) -> None:
    """One call equals two shorter ones that carry the state, in values and gradients."""
    rnn = getattr(hsm, cell)(1, 2, dtype=torch.float64)
    input = torch.randn(65_600, 1, 1, dtype=torch.float64)

    class InTwoCalls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = rnn

        def forward(self, input: Tensor, hx: Any) -> Any:
            first, hx = self.rnn(input[:40_000], hx)
            second, hx = self.rnn(input[40_000:], hx)
            return torch.cat([first, second]), hx

    whole, parts = run(rnn, input), run(InTwoCalls(), input)
    for got, wanted in zip(whole.values(), parts.values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
