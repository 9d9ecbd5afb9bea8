"""Functions on the state of an LSTM or GRU, of this package or of torch.nn.

A state is a tensor ``(D * K, N, X)`` or, for an LSTM, a tuple ``(h, c)`` of two: layers and directions in dimension 0,
the batch in dimension 1. Every function returns a plain tensor or tuple of the same structure, edits nothing in place,
and lets gradients through. Results may share memory with the arguments; those of another layout are contiguous, as
cuDNN wants the states of torch.nn.

Errors: TypeError for anything but a state - a per-layer list becomes one with :func:`stack` - and for a mask that is
not bool; ValueError for shapes, dtypes and devices that do not fit. They are raised before anything is done.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import modules
from ._arguments import StateSpec

__all__ = [
    "cat",
    "clone",
    "detach",
    "expand_batch",
    "from_batch_first",
    "initial_state",
    "layer",
    "load",
    "repeat_interleave",
    "reset",
    "save",
    "select",
    "split",
    "stack",
    "to",
    "to_batch_first",
    "unstack",
    "where",
]

#: A state: what goes in comes out.
HX = TypeVar("HX", bound=Tensor | tuple[Tensor, Tensor])

_FORMAT, _VERSION = "hsm_kernels.state", "1"


def initial_state(
    rnn: nn.Module,
    batch_size: int | None,
    *,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A state of zeros for ``rnn``: an LSTM, GRU, LSTMCell or GRUCell of this package or of torch.nn.

    Args:
        rnn: the module.
        batch_size: N; None gives the form for unbatched input.
        device: where the state is made; None is where the module's weights are.
        dtype: of the state; None is that of the module's weights.

    Returns: ``(D * K, N, H)``, for an LSTM a tuple of ``(D * K, N, Hout)`` and ``(D * K, N, H)``; for cells ``(N, H)``.

    >>> initial_state(torch.nn.GRU(3, 4, num_layers=2), 5).shape
    torch.Size([2, 5, 4])
    """
    spec, weight = spec_of("state.initial_state", rnn), weight_of(rnn)
    if batch_size is not None:
        _check_size("state.initial_state", "batch_size", batch_size)
    lead = (*_rows(spec), *(() if batch_size is None else (batch_size,)))
    device, dtype = weight.device if device is None else device, dtype or weight.dtype
    parts = [torch.zeros(*lead, size, device=device, dtype=dtype) for size in spec.sizes]
    return parts[0] if len(parts) == 1 else tuple(parts)


def detach(hx: HX) -> HX:
    """The state without its graph, ``part.detach()``: what truncated back-propagation passes on. Any shape.

    >>> detach(torch.ones(1, 2, 3, requires_grad=True)).requires_grad
    False
    """
    return _map("state.detach", hx, Tensor.detach)


def clone(hx: HX) -> HX:
    """A copy in memory of its own, ``part.clone()``. Any shape.

    >>> hx = torch.zeros(1, 2, 3)
    >>> clone(hx).data_ptr() == hx.data_ptr()
    False
    """
    return _map("state.clone", hx, Tensor.clone)


def to(hx: HX, *args: Any, **kwargs: Any) -> HX:
    """The state on another device or in another dtype: ``part.to(*args, **kwargs)``. Any shape.

    >>> to(torch.zeros(1, 2, 3), torch.float64).dtype
    torch.float64
    """
    return _map("state.to", hx, lambda part: part.to(*args, **kwargs))


def select(hx: HX, index: Tensor | Sequence[int] | Sequence[bool]) -> HX:
    """The rows of the batch that ``index`` names, in its order: ``part[:, index]``.

    Args:
        hx: ``(D * K, N, X)``.
        index: integers from 0 to N - 1, ``(M,)``, which may repeat, as beam search reorders; or a bool mask ``(N,)`` of
            the rows to keep, which on a GPU makes the host wait, since the shape of the result depends on it.

    Raises: ValueError for an index out of range, if it is on the CPU.

    >>> select(torch.arange(3.0).reshape(1, 3, 1), [2, 0, 0]).flatten()
    tensor([2., 0., 0.])
    """
    who = "state.select"
    parts = _batched(who, hx)
    batch, device = parts[0].size(1), parts[0].device
    if not isinstance(index, Tensor):
        if not isinstance(index, Sequence) or isinstance(index, str):
            fix = "[index]" if isinstance(index, int) else "torch.as_tensor(index)"
            raise TypeError(f"{who}: index must be a Tensor or a list, got {type(index).__name__}; use {fix}")
        index = torch.tensor(index, device=device, dtype=None if len(index) else torch.int64)
    if index.dtype == torch.bool:
        check_rows(who, index, batch, device, "index")
        kept = index
        return _map(who, hx, lambda part: part[:, kept])
    if index.dtype.is_floating_point or index.dtype.is_complex:
        raise TypeError(f"{who}: index must hold integers or bools, got {index.dtype}; use index.long()")
    if index.dim() != 1:
        raise ValueError(f"{who}: index must have one dimension, got shape {tuple(index.shape)}")
    if index.device != device:
        raise ValueError(f"{who}: index must be on the state's device {device}, got {index.device}")
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        lowest, highest = int(index.min()), int(index.max())
        if lowest < 0 or highest >= batch:
            bad = lowest if lowest < 0 else highest
            raise ValueError(f"{who}: index must be between 0 and N - 1 = {batch - 1}, got {bad}")
    rows = index.long()
    return _map(who, hx, lambda part: part.index_select(1, rows))


def cat(states: Iterable[HX]) -> HX:
    """Several states as one batch: ``torch.cat(parts, dim=1)``. They must agree in everything but N.

    Raises: TypeError for one pair of tensors, which is a state and not two; pass ``[a, b]``.

    >>> cat([torch.zeros(1, 2, 4), torch.ones(1, 3, 4)]).shape
    torch.Size([1, 5, 4])
    """
    return _concatenated("state.cat", states, 1)


def split(hx: HX, sizes: int | Sequence[int]) -> list[HX]:
    """The batch in pieces, the inverse of :func:`cat`: ``part.split(sizes, dim=1)``.

    Args:
        hx: ``(D * K, N, X)``.
        sizes: rows of each piece, which add up to N; or one int for pieces of that size, the last perhaps smaller.

    >>> [piece.shape[1] for piece in split(torch.zeros(1, 5, 4), [2, 3])]
    [2, 3]
    """
    who = "state.split"
    parts = _batched(who, hx)
    rows = list(sizes) if isinstance(sizes, Sequence) else sizes
    if isinstance(rows, list):
        for size in rows:
            _check_size(who, "each of sizes", size)
        if sum(rows) != parts[0].size(1):
            raise ValueError(f"{who}: sizes must add up to the batch of {parts[0].size(1)}, got {rows}")
    else:
        _check_size(who, "sizes", rows, 1)
    pieces = zip(*(torch.split(part, rows, 1) for part in parts), strict=True)
    return [_like(hx, [part.contiguous() for part in piece]) for piece in pieces]


def where(mask: Tensor, a: HX, b: HX) -> HX:
    """Row by row, ``a`` where ``mask`` is True and ``b`` elsewhere: ``torch.where(mask[:, None], a, b)``.

    Args:
        mask: bool ``(N,)``.
        a: a state; its batch dimension may be 1.
        b: the same, of the same dtype.

    The rows are selected, never multiplied: a NaN in a row that is left out is gone, and its gradient is zero.

    >>> where(torch.tensor([True, False]), torch.ones(1, 1, 1), torch.zeros(1, 2, 1)).flatten()
    tensor([1., 0.])
    """
    return _where("state.where", mask, ("a", a), ("b", b))


def reset(hx: HX, mask: Tensor, reset_hx: HX | None = None) -> HX:
    """The state with the rows that ``mask`` marks replaced by ``reset_hx``, or by zeros.

    Args:
        hx: ``(D * K, N, X)``.
        mask: bool ``(N,)``.
        reset_hx: a state whose batch dimension may be 1; None is zeros. Receives the gradient of the replaced rows.

    This is ``torch.where(mask[:, None], reset_hx, hx)``, what ``reset_mask`` and ``reset_hx`` do inside a call.

    >>> reset(torch.ones(1, 3, 1), torch.tensor([True, False, True])).flatten()
    tensor([0., 1., 0.])
    """
    who = "state.reset"
    parts = _batched(who, hx)
    check_rows(who, mask, parts[0].size(1), parts[0].device)
    if reset_hx is None:
        return _map(who, hx, lambda part: part.masked_fill(mask[:, None], 0))
    return _where(who, mask, ("reset_hx", reset_hx), ("hx", hx))


def repeat_interleave(hx: HX, repeats: int | Tensor) -> HX:
    """Each row several times in a row: ``part.repeat_interleave(repeats, dim=1)``, for sampling or for beams.

    Args:
        hx: ``(D * K, N, X)``.
        repeats: how often; or integers ``(N,)``, which on a GPU make the host wait.

    >>> repeat_interleave(torch.arange(2.0).reshape(1, 2, 1), 2).flatten()
    tensor([0., 0., 1., 1.])
    """
    who = "state.repeat_interleave"
    parts = _batched(who, hx)
    if isinstance(repeats, Tensor):
        if repeats.dtype.is_floating_point or repeats.dtype == torch.bool:
            raise TypeError(f"{who}: repeats must be an int or an integer tensor, got {repeats.dtype}")
        if repeats.shape != (parts[0].size(1),):
            raise ValueError(f"{who}: repeats must have shape (N,) = ({parts[0].size(1)},), got {tuple(repeats.shape)}")
    else:
        _check_size(who, "repeats", repeats)
    return _map(who, hx, lambda part: part.repeat_interleave(repeats, 1))


def expand_batch(hx: HX, batch_size: int) -> HX:
    """A state of batch 1 for a batch of ``batch_size``: ``part.expand(-1, batch_size, -1).contiguous()``.

    Raises: ValueError if the batch is not 1.

    >>> expand_batch(torch.zeros(2, 1, 4), 3).shape
    torch.Size([2, 3, 4])
    """
    who = "state.expand_batch"
    batch = _batched(who, hx)[0].size(1)
    _check_size(who, "batch_size", batch_size)
    if batch != 1:
        raise ValueError(f"{who}: hx must have a batch of 1, got {batch}; use state.repeat_interleave or state.select")
    return _map(who, hx, lambda part: part.expand(-1, batch_size, -1).contiguous())


def to_batch_first(hx: HX) -> HX:
    """``(D * K, N, X)`` -> ``(N, D * K, X)``, for what splits or stores by the first dimension. No module takes it.

    >>> to_batch_first(torch.zeros(2, 3, 4)).shape
    torch.Size([3, 2, 4])
    """
    _batched("state.to_batch_first", hx)
    return _map("state.to_batch_first", hx, lambda part: part.transpose(0, 1).contiguous())


def from_batch_first(hx: HX) -> HX:
    """``(N, D * K, X)`` -> ``(D * K, N, X)``: the inverse of :func:`to_batch_first`.

    >>> from_batch_first(torch.zeros(3, 2, 4)).shape
    torch.Size([2, 3, 4])
    """
    _batched("state.from_batch_first", hx)
    return _map("state.from_batch_first", hx, lambda part: part.transpose(0, 1).contiguous())


def layer(hx: HX, k: int, direction: int = 0, *, bidirectional: bool = False) -> HX:
    """The state of one layer and direction, ``(N, X)``, as a cell takes it: ``part[k * D + direction]``.

    Args:
        hx: ``(D * K, N, X)``.
        k: the layer; a negative one counts from the last.
        direction: 0 is forward, 1 reverse, which needs ``bidirectional``.
        bidirectional: whether the layers have two directions, as ``rnn.bidirectional``.

    >>> layer(torch.arange(4.0).reshape(4, 1, 1), -1, direction=1, bidirectional=True)
    tensor([[3.]])
    """
    who = "state.layer"
    layers = _layers(who, hx, bidirectional)
    for name, value in (("k", k), ("direction", direction)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{who}: {name} must be an int, got {type(value).__name__}")
    if not -layers <= k < layers:
        raise ValueError(f"{who}: k must be between {-layers} and {layers - 1}, as hx has {layers} layers, got {k}")
    if direction not in ((0, 1) if bidirectional else (0,)):
        wanted = "0 or 1" if bidirectional else "0 without bidirectional=True"
        raise ValueError(f"{who}: direction must be {wanted}, got {direction}")
    row = (k % layers) * (2 if bidirectional else 1) + direction
    return _map(who, hx, lambda part: part[row])


def unstack(hx: HX, *, bidirectional: bool = False) -> list[HX]:
    """A list with one state per layer, ``(D, N, X)`` each: the per-layer form of ``hx``. The inverse of :func:`stack`.

    >>> [entry.shape for entry in unstack(torch.zeros(4, 5, 3), bidirectional=True)]
    [torch.Size([2, 5, 3]), torch.Size([2, 5, 3])]
    """
    _layers("state.unstack", hx, bidirectional)
    directions = 2 if bidirectional else 1
    parts = _parts("state.unstack", hx)
    return [_like(hx, entry) for entry in zip(*(torch.split(part, directions) for part in parts), strict=True)]


def stack(states: Iterable[HX]) -> HX:
    """One state of several layers from a list with one per layer: ``torch.cat(parts, dim=0)``.

    Raises: TypeError for one pair of tensors, which is a state and not two; pass ``[a, b]``.

    >>> stack([torch.zeros(2, 5, 3), torch.ones(2, 5, 3)]).shape
    torch.Size([4, 5, 3])
    """
    return _concatenated("state.stack", states, 0)


def save(path: str | os.PathLike[str], hx: Any, rnn: nn.Module) -> None:
    """Write a state of ``rnn`` to a file in the safetensors format, with what the module is.

    Args:
        path: the file, replaced as a whole: a reader finds the old or the new one, and a failure leaves the old one.
        hx: a state of ``rnn``, batched or not, in the dtype of its weights.
        rnn: an LSTM, GRU or cell of this package or of torch.nn.

    Raises: ImportError without safetensors, TypeError or ValueError for a state that is not one of ``rnn``.

    >>> import tempfile
    >>> rnn = torch.nn.GRU(3, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/state.safetensors", torch.ones(1, 2, 4), rnn)
    ...     load(f"{folder}/state.safetensors", rnn).shape
    torch.Size([1, 2, 4])
    """
    check_fits("state.save", hx, rnn)
    parts = _parts("state.save", hx)
    tensors = {name: part.detach().cpu().clone().contiguous() for name, part in zip("hc", parts, strict=False)}
    content = _safetensors().torch.save(tensors, _metadata("state.save", rnn))
    path = os.path.realpath(path)  # a link goes on pointing to the file
    temporary = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str], rnn: nn.Module, *, device: torch.device | str | int = "cpu") -> Any:
    """Read a state that :func:`save` wrote for a module like ``rnn``.

    Args:
        path: the file.
        rnn: the module, of this package or of torch.nn, which must be of the same kind, sizes and dtype.
        device: where the state is wanted.

    Raises: ImportError without safetensors; OSError for no file; ValueError for a file of another kind, a damaged one,
        another version of the format, or a state of another module or dtype.
    """
    who, path = "state.load", os.fspath(path)
    wanted, library = _metadata(who, rnn), _safetensors()
    try:
        with library.safe_open(path, framework="pt") as file:
            given = file.metadata() or {}
            if given.get("format") != _FORMAT:
                raise ValueError(f"{who}: {path} is not a state that state.save wrote")
            if given.get("version") != _VERSION:
                raise ValueError(
                    f"{who}: {path} must have version {_VERSION} of the format, got {given.get('version')}; "
                    "read it with the version of hsm_kernels that wrote it"
                )
            differing = [key for key in wanted if given.get(key) != wanted[key]]
            if differing:
                raise ValueError(
                    f"{who}: the module wants a state with {_listed(wanted, differing)}, "
                    f"{path} has one with {_listed(given, differing)}"
                )
            parts = [file.get_tensor(name).clone() for name in "hc"[: len(spec_of(who, rnn).sizes)]]
    except library.SafetensorError as error:
        raise ValueError(f"{who}: {path} is damaged, or not a safetensors file: {error}") from error
    hx = parts[0] if len(parts) == 1 else tuple(parts)
    check_fits(who, hx, rnn, f"the state in {path}")
    return _map(who, cast(Any, hx), lambda part: part.to(device))


def spec_of(who: str, rnn: object) -> StateSpec:
    """What the states of ``rnn`` look like; TypeError if it is no LSTM, GRU or cell."""
    module = getattr(rnn, "_orig_mod", rnn)  # what torch.compile wraps
    if isinstance(module, nn.RNNBase) and module.mode in ("LSTM", "GRU"):
        hidden_out = module.proj_size or module.hidden_size
        sizes = (hidden_out, module.hidden_size) if module.mode == "LSTM" else (module.hidden_size,)
        return StateSpec(module.mode, module.num_layers, 2 if module.bidirectional else 1, sizes)
    if isinstance(module, (nn.LSTMCell, modules.LSTMCell)):
        return StateSpec("LSTMCell", 1, 1, (module.hidden_size, module.hidden_size))
    if isinstance(module, (nn.GRUCell, modules.GRUCell)):
        return StateSpec("GRUCell", 1, 1, (module.hidden_size,))
    raise TypeError(
        f"{who}: rnn must be an LSTM, GRU, LSTMCell or GRUCell of hsm_kernels or torch.nn, got {type(rnn).__name__}"
    )


def weight_of(rnn: nn.Module) -> Tensor:
    """A tensor with the dtype and device of the state: a parameter, as computing a weight from others may cost."""
    weight = next(rnn.parameters())
    if weight.dtype != getattr(rnn, "weight_dtype", None):
        return weight
    biases = (parameter for parameter in rnn.parameters() if parameter.dim() == 1)
    return next(biases, weight.new_empty(0, dtype=torch.float32))


def check_fits(who: str, hx: object, rnn: nn.Module, name: str = "hx") -> None:
    """Raise unless ``hx`` is a state of ``rnn``, batched or not, in the dtype of its weights."""
    spec, parts, weight = spec_of(who, rnn), _parts(who, hx, name), weight_of(rnn)
    if len(parts) != len(spec.sizes):
        wanted, given = ("one Tensor", "a tuple") if len(parts) == 2 else ("a tuple (h, c)", "one Tensor")
        raise TypeError(f"{who}: {name} of this {spec.who} must be {wanted}, got {given}")
    rows = _rows(spec)
    batch = parts[0].shape[len(rows) : -1]
    for part, label, size in zip(parts, _labels(name, parts), spec.sizes, strict=True):
        if len(batch) > 1 or part.shape != (*rows, *batch, size):
            text = "(N, X)" if not rows else "(D * K, N, X)"
            values = ", ".join(map(str, (*rows, "N", size)))
            raise ValueError(f"{who}: {label} must have shape {text} = ({values}), got {tuple(part.shape)}")
        if part.dtype != weight.dtype:
            raise ValueError(
                f"{who}: {label} must have the dtype of the module's weights, {weight.dtype}, got {part.dtype}; "
                f"use state.to(hx, {weight.dtype})"
            )


def check_rows(who: str, mask: object, batch: int, device: torch.device, name: str = "mask") -> None:
    """Raise unless ``mask`` is bool ``(N,)`` on ``device``."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{who}: {name} must be a torch.bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{who}: {name} must be a torch.bool tensor, got {mask.dtype}; use {name}.bool()")
    if mask.shape != (batch,):
        raise ValueError(f"{who}: {name} must have shape (N,) = ({batch},), got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{who}: {name} must be on the state's device {device}, got {mask.device}")


def _parts(who: str, hx: object, name: str = "hx") -> tuple[Tensor, ...]:
    if isinstance(hx, Tensor):
        return (hx,)
    if isinstance(hx, tuple) and len(hx) == 2 and all(isinstance(part, Tensor) for part in hx):
        return hx
    fix = ""
    if hx is None:
        fix = "; state.initial_state(rnn, batch_size) makes one of zeros"
    elif isinstance(hx, list):
        fix = "; make one of a list with an entry per layer by state.stack, of [h, c] by tuple"
    given = f"a {type(hx).__name__} of {len(hx)}" if isinstance(hx, (list, tuple)) else type(hx).__name__
    raise TypeError(f"{who}: {name} must be a Tensor or a tuple (h, c) of two, got {given}{fix}")


def _batched(who: str, hx: object, name: str = "hx") -> tuple[Tensor, ...]:
    """The parts, if all have three dimensions and the same rows and batch."""
    parts = _parts(who, hx, name)
    for part, label in zip(parts, _labels(name, parts), strict=True):
        if part.dim() != 3:
            raise ValueError(
                f"{who}: {label} must have shape (D * K, N, X), got {tuple(part.shape)}; give an unbatched state its "
                "batch with unsqueeze(1), the state (N, X) of a cell its layer with unsqueeze(0)"
            )
    if parts[0].shape[:2] != parts[-1].shape[:2]:
        given = " and ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"{who}: h and c of {name} must agree in D * K and N, got {given}")
    return parts


def _labels(name: str, parts: Sequence[Tensor]) -> list[str]:
    return [name] if len(parts) == 1 else [f"{name}[{k}]" for k in range(len(parts))]


def _like(hx: HX, parts: Sequence[Tensor]) -> HX:
    return cast(HX, parts[0] if isinstance(hx, Tensor) else tuple(parts))


def _map(who: str, hx: HX, function: Callable[[Tensor], Tensor]) -> HX:
    return _like(hx, [function(part) for part in _parts(who, hx)])


def _where(who: str, mask: Tensor, a: tuple[str, HX], b: tuple[str, HX]) -> HX:
    parts_a, parts_b = _batched(who, a[1], a[0]), _batched(who, b[1], b[0])
    _check_same(who, a[0], parts_a, b[0], parts_b, but=1)
    batch = mask.size(0) if isinstance(mask, Tensor) and mask.dim() == 1 else parts_b[0].size(1)
    check_rows(who, mask, batch, parts_b[0].device)
    for (name, _), parts in ((a, parts_a), (b, parts_b)):
        if parts[0].size(1) not in (1, batch):
            raise ValueError(f"{who}: {name} must have a batch of 1 or {batch}, as mask has, got {parts[0].size(1)}")
    return _like(a[1], [torch.where(mask[:, None], x, y) for x, y in zip(parts_a, parts_b, strict=True)])


def _concatenated(who: str, states: Iterable[HX], dim: int) -> HX:
    if isinstance(states, Tensor) or (isinstance(states, tuple) and len(states) == 2 and isinstance(states[0], Tensor)):
        raise TypeError(f"{who}: states must be a list of states, got one state; use [a, b]")
    given = list(states)
    if not given:
        raise ValueError(f"{who}: states must hold at least one state, got none")
    parts = [_batched(who, hx, f"states[{k}]") for k, hx in enumerate(given)]
    for k, others in enumerate(parts):
        _check_same(who, f"states[{k}]", others, "states[0]", parts[0], but=dim)
    return _like(given[0], [torch.cat(pieces, dim) for pieces in zip(*parts, strict=True)])


def _check_same(
    who: str, name: str, parts: Sequence[Tensor], other: str, others: Sequence[Tensor], but: int
) -> None:
    """Raise unless two states agree in structure, dtype, device and shape, except for dimension ``but``."""
    if len(parts) != len(others):
        raise TypeError(f"{who}: {name} and {other} must both be a Tensor or both a tuple (h, c), got one of each")
    for x, y in zip(parts, others, strict=True):
        kept = [d for d in range(3) if d != but]
        if [x.size(d) for d in kept] != [y.size(d) for d in kept]:
            raise ValueError(
                f"{who}: {name} and {other} must have the same shape but for dimension {but}, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if x.dtype != y.dtype or x.device != y.device:
            raise ValueError(
                f"{who}: {name} and {other} must have the same dtype and device, got {x.dtype} on {x.device} and "
                f"{y.dtype} on {y.device}; use state.to"
            )


def _layers(who: str, hx: object, bidirectional: bool) -> int:
    """K."""
    rows = _batched(who, hx)[0].size(0)
    if bidirectional and rows % 2:
        raise ValueError(f"{who}: the state of a bidirectional module must have an even dimension 0, got {rows}")
    return rows // 2 if bidirectional else rows


def _rows(spec: StateSpec) -> tuple[int, ...]:
    """What stands before the batch in the shape of a state."""
    return () if spec.who.endswith("Cell") else (spec.layers * spec.directions,)


def _check_size(who: str, name: str, value: object, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{who}: {name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{who}: {name} must be at least {least}, got {value}")


def _metadata(who: str, rnn: nn.Module) -> dict[str, str]:
    """What a file says about the module whose state it holds."""
    spec = spec_of(who, rnn)
    projected = len(spec.sizes) == 2 and spec.sizes[0] != spec.sizes[1]
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "cell": spec.who,
        "num_layers": str(spec.layers),
        "bidirectional": str(spec.directions == 2),
        "hidden_size": str(spec.sizes[-1]),
        "proj_size": str(spec.sizes[0] if projected else 0),
        "dtype": str(weight_of(rnn).dtype).removeprefix("torch."),
    }


def _listed(metadata: dict[str, str], keys: list[str]) -> str:
    return ", ".join(f"{key} = {metadata.get(key)}" for key in keys)


def _safetensors() -> Any:
    try:
        import numpy  # noqa: F401 - safetensors writes with it
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "state.save and state.load need safetensors and numpy: pip install hsm_kernels[state]"
        ) from error
    return safetensors
