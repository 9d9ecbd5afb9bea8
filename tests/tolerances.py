"""How close is close enough: the yardstick is float64, the allowance is torch.nn's own error.

The numbers were fixed by measurement over thousands of drawn cases with inputs, weights and output
gradients of order one. There the excess over torch.nn's error stayed below 2.3 roundings in float32
and 1.1 in the half precisions.
"""

import torch
from torch import Tensor

# Largest error, relative to the largest element of the reference or to 1, the size of a gate:
# a few roundings, except in float64, where torch.nn is the reference and so has no error itself.
LARGEST_RATIO = {
    torch.float64: 1e-12,
    torch.float32: 4 * torch.finfo(torch.float32).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps,
}

# Root-mean-square error relative to that of the reference, or to 0.01 where cancellation has left
# less. A few elements say nothing about it: torch.nn's may be exact by luck.
RMS_RATIO = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
RMS_FLOOR = 0.01
RMS_ELEMENTS = 32


def assert_close_to_reference(out: Tensor, reference: Tensor, low: Tensor, what: str = "result") -> None:
    """Asserts that `out` is as near to the float64 `reference` as a sound kernel must be.

    `low` is the same quantity by torch.nn in the dtype of `out`: an error may be twice as large
    as that of `low`, plus rounding.
    """
    assert reference.dtype == torch.float64
    assert out.shape == reference.shape, f"{what}: shape {out.shape}, wanted {reference.shape}"
    assert out.dtype == low.dtype, f"{what}: dtype {out.dtype}, wanted {low.dtype}"
    if out.numel() == 0:
        return
    error, yardstick = out.double() - reference, low.double() - reference
    size = max(1.0, reference.abs().max().item())
    worst = error.abs().max().item()
    allowed = 2 * yardstick.abs().max().item() + LARGEST_RATIO[out.dtype] * size
    assert worst <= allowed, f"{what}: largest error {worst:.3g}, allowed {allowed:.3g}"
    if out.numel() >= RMS_ELEMENTS:
        rms = _rms(error)
        allowed = 2 * _rms(yardstick) + RMS_RATIO[out.dtype] * max(RMS_FLOOR, _rms(reference))
        assert rms <= allowed, f"{what}: rms error {rms:.3g}, allowed {allowed:.3g}"


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()
