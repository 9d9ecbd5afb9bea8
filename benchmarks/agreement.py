"""Whether contenders compute the same."""

import math
from collections.abc import Iterable

from torch import Tensor

# Relative distance between two results, each with its own rounding; far below any real mistake.
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": 5e-2}


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
