"""Derivatives of higher order and in forward mode, of the operators, against those of the reference."""

from typing import Any

import pytest
import torch
from test_ops import Case
from tolerances import assert_close_to_reference
from torch import Tensor

import hsm_kernels as hsm

CELLS = [("LSTM", 0), ("LSTM", 3), ("GRU", 0)]
EVERYTHING = {"directions": 2, "resets": True, "reset_state": True, "detaches": True, "lengths": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias, no state": {"bias": False, "initial": False},
    "resets to zero": {"resets": True, "directions": 2},
    "resets to a state": {"resets": True, "reset_state": True},
    "detaches": {"detaches": True, "directions": 2},
    "lengths": {"lengths": True, "directions": 2},
    "everything": EVERYTHING,
    "recomputed": {**EVERYTHING, "recompute": True},
    "one step": {"steps": 1, "resets": True, "detaches": True},
    "no steps": {"steps": 0, "lengths": True},
    "no sequences": {"batch": 0, "resets": True},
}
cells = pytest.mark.parametrize("cell, proj_size", CELLS)


def weighting(outputs: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in outputs]


def derivatives(case: Case, outputs: tuple[Tensor, ...], order: int) -> list[list[Tensor]]:
    """Gradients of everything, gradients of a weighted sum of those, and so on."""
    wanted, levels = case.differentiable, []
    values = list(outputs)
    for k in range(order):
        values = [value for value in values if value.requires_grad]
        values = list(
            torch.autograd.grad(
                values, wanted, weighting(values, k), create_graph=True, allow_unused=True, materialize_grads=True
            )
        )
        levels.append([value.detach() for value in values])
    return levels


@pytest.mark.parametrize("name", CASES)
@cells
def test_second_derivatives(poisoned_memory: None, cell: str, proj_size: int, name: str) -> None:
    case = Case(cell, proj_size=proj_size, **CASES[name])
    if case.length is not None:  # what stands behind a sequence reaches nothing
        with torch.no_grad():
            case.input[torch.arange(case.steps)[:, None] >= case.length] = torch.nan
    ours, wanted = (derivatives(case, run(), 2) for run in (case.forward, case.by_reference))
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@cells
def test_third_derivatives(cell: str, proj_size: int) -> None:
    case = Case(cell, steps=3, batch=2, proj_size=proj_size, **EVERYTHING, seed=1)
    ours, wanted = (derivatives(case, run(), 3) for run in (case.forward, case.by_reference))
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@cells
def test_second_derivatives_in_float32(cell: str, proj_size: int) -> None:
    """As accurate as the reference in the dtype."""
    case = Case(cell, proj_size=proj_size, **EVERYTHING, dtype=torch.float32)
    exact = case.in_dtype(torch.float64)
    ours, low = derivatives(case, case.forward(), 2)[1], derivatives(case, case.by_reference(), 2)[1]
    wanted = derivatives(exact, exact.by_reference(), 2)[1]
    for k in range(len(wanted)):
        assert_close_to_reference(ours[k], wanted[k], low[k], f"derivative {k}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@cells
def test_second_derivatives_in_half_precision(cell: str, proj_size: int, dtype: torch.dtype) -> None:
    """With all of them in one number: of two derivatives with errors of this size, either may be the better one."""
    errors = [0.0, 0.0]
    for seed in range(4):
        case = Case(cell, proj_size=proj_size, **EVERYTHING, dtype=dtype, seed=seed)
        exact = case.in_dtype(torch.float64)
        wanted = derivatives(exact, exact.by_reference(), 2)[1]
        for k, run in enumerate((case.forward, case.by_reference)):
            found = derivatives(case, run(), 2)[1]
            assert all(f.dtype == dtype for f in found)
            errors[k] += sum(float((f.double() - w).square().mean()) for f, w in zip(found, wanted, strict=True))
    assert errors[0] <= 4 * errors[1]  # the errors may be twice as large, as everywhere; these are squares


@pytest.mark.parametrize("only", ["input", "state", "weight"])
@cells
def test_second_derivatives_of_a_part(cell: str, proj_size: int, only: str) -> None:
    """Where the rest is frozen, as the weights are in a gradient penalty's sample."""
    case = Case(cell, proj_size=proj_size, **EVERYTHING)
    kept = {"input": case.input, "state": case.state[0], "weight": case.weights[0].weight_hh}[only]
    for tensor in case.differentiable:
        tensor.requires_grad_(tensor is kept)
    found = []
    for run in (case.forward, case.by_reference):
        (first,) = torch.autograd.grad(sum(out.sum() for out in run()), kept, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), kept))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_gradgradcheck_with_every_argument(cell: str) -> None:
    """Against finite differences, which know nothing of the reference; they see no detach."""
    rnn = getattr(hsm, cell)(2, 2, 2, bidirectional=True, dtype=torch.float64)
    parts = 2 if cell == "LSTM" else 1
    reset_mask, lengths = torch.rand(4, 3) < 0.4, torch.tensor([4, 2, 0])
    names, parameters = zip(*rnn.named_parameters(), strict=True)

    def function(input: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx, to, weights = rest[:parts], rest[parts : 2 * parts], rest[2 * parts :]
        hx, to = (hx, to) if cell == "LSTM" else (hx[0], to[0])  # type: ignore[assignment]
        output, last, states = torch.func.functional_call(
            rnn, dict(zip(names, weights, strict=True)), (input, hx),
            {"reset_mask": reset_mask, "reset_hx": to, "lengths": lengths, "return_states": True},
        )  # fmt: skip
        return (output, *last, *states) if cell == "LSTM" else (output, last, states)

    state = [torch.randn(4, n, 2, dtype=torch.float64) for n in [3] * parts + [1] * parts]
    inputs = [torch.randn(4, 3, 2, dtype=torch.float64), *state, *(p.detach().clone() for p in parameters)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_the_backward_pass_of_a_second_derivative_is_not_one_of_steps() -> None:
    """Its graph has one node for the recurrence, however many steps there are."""

    def nodes(steps: int) -> int:
        case = Case("LSTM", steps=steps)
        (grad,) = torch.autograd.grad(case.forward()[0].sum(), case.input, create_graph=True)
        seen, todo = set(), [grad.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [parent for parent, _ in node.next_functions]
        return len(seen)

    assert nodes(3) == nodes(30)
