"""Layers of every kind, small, and what is asserted of them: for the kernels of all devices."""

from dataclasses import replace
from typing import Any

import torch
from test_ops import FIELDS, LOW_PRECISION, Case
from tolerances import assert_close_to_reference
from torch import Tensor

DTYPES = [torch.float64, *LOW_PRECISION]
CELLS = [("LSTM", 0), ("LSTM", 3), ("GRU", 0)]
BOUNDARIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no state, no bias": {"initial": False, "bias": False},
    "resets": {"resets": True},
    "resets to a state": {"resets": True, "reset_state": True},
    "detaches": {"detaches": True},
    "detached every 2": {"detach_every": 2},
    "all of them": {"resets": True, "reset_state": True, "detaches": True, "detach_every": 3, "lengths": True},
    "lengths": {"lengths": True},
}
# (steps, batch, inputs, hidden, proj_size): nothing to do; more units than a block has threads, or rows that
# it shares; many steps; more rows than are summed at once.
SHAPES = [
    (0, 2, 3, 4, 2),
    (1, 0, 3, 4, 0),
    (1, 1, 1, 1, 0),
    (2, 3, 5, 131, 0),
    (3, 2, 4, 140, 130),
    (2, 67, 2, 33, 1),
    (40, 1, 2, 3, 0),
    (9, 70, 2, 3, 0),
]


def moved(value: Any, device: str) -> Any:
    """Tensors, and tuples and lists of them, on a device, as leaves."""
    if isinstance(value, Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)):
        parts = [moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def on(case: Case, device: str) -> Case:
    """The same case on a device."""
    other = replace(case)
    for name in vars(case).keys() - set(FIELDS):
        setattr(other, name, moved(getattr(case, name), device))
    return other


def results(case: Case, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What a forward call returned, and the gradients."""
    return [tensor.detach().cpu() for tensor in (*outputs, *case.gradients(outputs))]


def assert_right(case: Case, device: str = "cpu") -> None:
    """Results and gradients against the reference in float64; its own error in the dtype is the allowance."""
    there, exact = on(case, device), case.in_dtype(torch.float64)
    ours, wanted = results(there, there.forward()), results(exact, exact.by_reference())
    if case.dtype == torch.float64:
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
        return
    low = results(case, case.by_reference())
    for k, (ours_k, wanted_k, low_k) in enumerate(zip(ours, wanted, low, strict=True)):
        assert_close_to_reference(ours_k, wanted_k, low_k, f"result {k}")
