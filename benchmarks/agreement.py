"""Whether contenders compute the same, and how far each is from the result in float64."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from cases import Problem
from peers import module_call
from torch import Tensor

# Relative distance between two results, each with its own rounding; far below any real mistake.
LARGEST_DIFFERENCE = {"float32": 1e-4, "TF32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}


def largest_distance(results: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The distance of the tensor in ``results`` that is farthest from its fellow."""
    return max(relative_distance(a, b) for a, b in zip(results, expected, strict=True))


def relative_distance(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |a|`` in the Euclidean norm, 0 where they are equal; NaN counts as infinitely far."""
    a, b = a.double(), b.double()
    difference = float((a - b).norm())
    if difference == 0:  # two zeros too
        return 0.0
    distance = difference / float(a.norm()) if a.any() else math.inf
    return math.inf if math.isnan(distance) else distance


@dataclass(frozen=True)
class Error:
    """Relative distances from float64: the output's, and the largest of the gradients'."""

    output: float
    gradients: float | None  # None outside training


def exact_results(problem: Problem) -> tuple[Tensor, ...]:
    """What torch.nn computes in float64 from the same inputs and weights."""
    state = problem.state
    doubled = replace(
        problem,
        input=problem.input.double(),
        state=tuple(part.double() for part in state) if isinstance(state, tuple) else state.double(),
        output_gradient=problem.output_gradient.double(),
    )
    with torch.set_grad_enabled(problem.case.kind == "training"):
        return module_call(copy.deepcopy(problem.torch_nn).double(), doubled)()


def error_of(results: Sequence[Tensor], exact: Sequence[Tensor], problem: Problem) -> Error:
    """How far ``results`` of ``problem`` are from the exact ones."""
    outputs = 1 if problem.case.kind == "training" else len(exact)
    return Error(
        largest_distance(exact[:outputs], results[:outputs]),
        largest_distance(exact[outputs:], results[outputs:]) if outputs < len(exact) else None,
    )
