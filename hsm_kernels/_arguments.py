"""Checks and canonical forms of the boundary arguments. Nothing here reads a value that lives on a GPU."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import State

#: The state of one layer, ``(D, N, ..)`` each; None = zeros.
LayerState = State | None

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


class StateSpec(NamedTuple):
    """What a state of one module looks like."""

    who: str  #: "LSTM" or "GRU", for messages
    layers: int
    directions: int
    sizes: tuple[int, ...]  #: (Hout, H) for LSTM, (H,) for GRU


class SequenceShape(NamedTuple):
    """How the caller laid out steps and sequences."""

    steps: int
    batch: int
    batch_first: bool
    batched: bool

    @property
    def mask_shape(self) -> tuple[int, ...]:
        if not self.batched:
            return (self.steps,)
        return (self.batch, self.steps) if self.batch_first else (self.steps, self.batch)

    @property
    def mask_names(self) -> str:
        return "(L,)" if not self.batched else "(N, L)" if self.batch_first else "(L, N)"


def time_major_mask(
    who: str, name: str, mask: Tensor | None, shape: SequenceShape, device: torch.device
) -> Tensor | None:
    """``mask`` as ``(L, N)``, checked for dtype, shape and device."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{who}: {name} must be a torch.bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{who}: {name} must be a torch.bool tensor, got {mask.dtype}; use {name}.bool()")
    if mask.shape != shape.mask_shape:
        raise ValueError(
            f"{who}: {name} must have shape {shape.mask_names} = {shape.mask_shape}, got {tuple(mask.shape)}"
            + ("; use mask.t()" if tuple(mask.shape) == shape.mask_shape[::-1] else "")
        )
    if mask.device != device:
        raise ValueError(
            f"{who}: {name} must be on the input's device {device}, got {mask.device}; use {name}.to(input.device)"
        )
    if not shape.batched:
        return mask[:, None]
    return mask.t() if shape.batch_first else mask


def combined_detach_mask(
    who: str,
    detach_mask: Tensor | None,
    truncated_bptt_steps: int | None,
    shape: SequenceShape,
    device: torch.device,
) -> Tensor | None:
    """``detach_mask`` ORed with a detach at steps k, 2k, ... for ``truncated_bptt_steps=k``: bool ``(L, N)``."""
    mask = time_major_mask(who, "detach_mask", detach_mask, shape, device)
    if truncated_bptt_steps is None:
        return mask
    k = truncated_bptt_steps
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{who}: truncated_bptt_steps must be an int, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"{who}: truncated_bptt_steps must be at least 1, got {k}")
    steps = torch.arange(shape.steps, device=device)
    every = ((steps % k == 0) & (steps > 0))[:, None].expand(shape.steps, shape.batch)
    return every if mask is None else mask | every


def checked_lengths(who: str, lengths: Tensor | None, shape: SequenceShape, device: torch.device) -> Tensor | None:
    """``lengths`` as int64 ``(N,)`` on ``device``. Their range is checked where the host can read them for nothing."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        raise TypeError(
            f"{who}: lengths must be an integer tensor, got {type(lengths).__name__}; use torch.tensor(lengths)"
        )
    if lengths.dtype not in _INTEGERS:
        raise TypeError(f"{who}: lengths must be an integer tensor, got {lengths.dtype}; use lengths.long()")
    expected = (shape.batch,) if shape.batched else ()
    if lengths.shape != (shape.batch,) and lengths.shape != expected:
        raise ValueError(f"{who}: lengths must have shape (N,) = ({shape.batch},), got {tuple(lengths.shape)}")
    if shape.batch and _is_readable(lengths):
        lowest, highest = int(lengths.min()), int(lengths.max())
        if lowest < 0 or highest > shape.steps:
            bad = lowest if lowest < 0 else highest
            raise ValueError(f"{who}: lengths must be between 0 and L = {shape.steps}, got {bad}")
    return lengths.reshape(shape.batch).to(device=device, dtype=torch.int64)


def _is_readable(tensor: Tensor) -> bool:
    """Whether reading values waits for nothing, and is allowed: not while a function is traced or transformed."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    traced = torch._C._len_torch_dispatch_stack() > 0
    return not traced and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def per_layer_states(
    name: str, state: object, spec: StateSpec, shape: SequenceShape, like: Tensor
) -> tuple[list[LayerState], bool]:
    """A state argument as one entry per layer, and whether it came as a per-layer list.

    ``state`` is None (zeros), a state of all layers (a tensor, or a pair for LSTM), or a list with one entry per
    layer. The batch dimension may be 1: it is expanded.
    """
    if state is None:
        return [None] * spec.layers, False
    if not _is_per_layer(state, spec):
        whole = _checked(name, state, spec, shape, like, spec.layers * spec.directions)
        if spec.layers == 1:
            return [whole], False
        d = spec.directions
        return [tuple(part[k * d : (k + 1) * d] for part in whole) for k in range(spec.layers)], False
    assert isinstance(state, list)
    if len(state) != spec.layers:
        raise ValueError(
            f"{spec.who}: a per-layer {name} must have one entry per layer, {spec.layers}, got a list of {len(state)}"
        )
    entries = [
        None if entry is None else _checked(f"{name}[{k}]", entry, spec, shape, like, spec.directions)
        for k, entry in enumerate(state)
    ]
    return entries, True


def _is_per_layer(state: object, spec: StateSpec) -> bool:
    """A list is per layer, but for an LSTM a list of two tensors is ``[h, c]``, as torch.nn takes it."""
    if not isinstance(state, list):
        return False
    return len(spec.sizes) == 1 or not all(isinstance(entry, Tensor) for entry in state)


def _checked(name: str, state: object, spec: StateSpec, shape: SequenceShape, like: Tensor, rows: int) -> State:
    """One state as a tuple of ``(rows, N, size)`` tensors, with the errors of torch.nn where torch.nn has them."""
    parts = _parts(name, state, spec)
    dims = 3 if shape.batched else 2
    if name.startswith("hx") and any(part.dim() != dims for part in parts):
        raise RuntimeError(_dimension_message(parts, dims))
    checked = []
    for k, (part, size) in enumerate(zip(parts, spec.sizes, strict=True)):
        if part.dtype != like.dtype and autocast_dtype(like.device) is None:
            raise ValueError(
                f"{spec.who}: {name} must have the input's dtype {like.dtype}, got {part.dtype}; use .to({like.dtype})"
            )
        if part.device != like.device:
            raise ValueError(
                f"{spec.who}: {name} must be on the input's device {like.device}, got {part.device}; "
                "use .to(input.device)"
            )
        batched = part if shape.batched else part.unsqueeze(1)
        if not _fits(batched, rows, shape.batch, size):
            raise _size_error(name, k, part, (rows, shape.batch, size), spec, shape.batched)
        checked.append(batched.expand(rows, shape.batch, size))
    return tuple(checked)


def _fits(part: Tensor, rows: int, batch: int, size: int) -> bool:
    """Whether ``part`` is ``(rows, batch, size)`` or ``(rows, 1, size)``.

    Number by number: torch.compile does not see that a tuple with a dynamic batch equals one of plain numbers.
    """
    if part.dim() != 3 or part.size(0) != rows or part.size(2) != size:
        return False
    return part.size(1) == batch or part.size(1) == 1


def _size_error(
    name: str, k: int, part: Tensor, expected: tuple[int, ...], spec: StateSpec, batched: bool
) -> RuntimeError | ValueError:
    which = f"{name}[{k}]" if len(spec.sizes) == 2 else name
    if name.startswith("hx"):
        which = which.replace("hx", "hidden", 1) if name == "hx" else which
        return RuntimeError(f"Expected {which} size {expected}, got {list((part if batched else part[:, None]).shape)}")
    wanted = expected if batched else (expected[0], expected[2])
    return ValueError(f"{spec.who}: {which} must have shape {wanted}, got {tuple(part.shape)}")


def _parts(name: str, state: object, spec: StateSpec) -> State:
    if len(spec.sizes) == 1:
        if isinstance(state, Tensor):
            return (state,)
        given = type(state).__name__
        raise TypeError(f"{spec.who}: {name} must be a Tensor or a list with one Tensor per layer, got {given}")
    if isinstance(state, Sequence) and len(state) == 2 and all(isinstance(s, Tensor) for s in state):
        return tuple(state)
    given = f"a {type(state).__name__} of {len(state)}" if isinstance(state, Sequence) else type(state).__name__
    raise TypeError(f"{spec.who}: {name} must be a pair of Tensors (h, c), got {given}")


def _dimension_message(parts: State, dims: int) -> str:
    given = ", ".join(f"{part.dim()}-D" for part in parts)
    kind = "batched 3-D" if dims == 3 else "unbatched 2-D"
    if len(parts) == 2:
        return f"For {kind} input, hx and cx should also be {dims}-D but got ({given}) tensors"
    return f"For {kind} input, hx should also be {dims}-D but got {given} tensor"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on ``device``, None if it is off there."""
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device.type):
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
