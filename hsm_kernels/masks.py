"""Masks for the boundary arguments of LSTM and GRU, built from what environments, data sets and trainers have.

An entry ``[t, n]`` of a mask is the edge between step ``t - 1`` and step ``t`` of sequence ``n``: a reset mask marks
the **first** step of a segment, never the last. Every mask is a fresh bool tensor on the device of its argument:
``(L, N)``, ``(N, L)`` if ``batch_first``, ``(L,)`` for unbatched input. Values on a GPU are not read on the host,
except where an argument says so.
"""

import torch
from torch import Tensor

__all__ = [
    "detach_mask_every",
    "reset_mask_from_cu_seqlens",
    "reset_mask_from_dones",
    "reset_mask_from_lengths",
    "reset_mask_from_segment_ids",
]


def reset_mask_from_dones(dones: Tensor, first: Tensor | bool | None = None, batch_first: bool = False) -> Tensor:
    """The reset mask of episodes whose **last** steps are marked: the reset is one step later.

    Flags that mark the first step of an episode (``is_first``, ``is_init``, ``episode_starts``) are a reset mask
    already, as ``flags.bool()``. Where an episode ends in two ways, ``dones = terminated | truncated``.

    Args:
        dones: ``(L, N)``, ``(N, L)`` if ``batch_first``, or ``(L,)``; bool, or numbers, where 0 is False.
        first: whether step 0 starts an episode: the dones of the step before this window, ``(N,)``, a scalar tensor for
            ``(L,)``, or one bool for all. None is False: the window continues the state passed as ``hx``.
        batch_first: whether ``dones`` and the mask have the batch first.

    Raises: TypeError, ValueError for arguments of another type or shape.

    For ``(L, N)`` this is::

        mask[0] = first
        mask[1:] = dones[:-1] != 0

    >>> reset_mask_from_dones(torch.tensor([0, 0, 1, 0, 1])).int()
    tensor([0, 0, 0, 1, 0], dtype=torch.int32)
    """
    who = "reset_mask_from_dones"
    _check_tensor(who, "dones", dones, "(L,)", "(N, L)" if batch_first else "(L, N)")
    values = _time_major(dones, batch_first)
    if isinstance(first, Tensor):
        _check_row(who, "first", first, values)
        first = first != 0
    elif first is not None and not isinstance(first, bool):
        raise TypeError(f"{who}: first must be a Tensor, a bool or None, got {type(first).__name__}")
    mask = torch.zeros_like(dones, dtype=torch.bool)
    steps = _time_major(mask, batch_first)
    steps[1:] = values[:-1] != 0
    if first is not None:
        steps[:1] = first
    return mask


def reset_mask_from_lengths(
    lengths: Tensor, L: int | None = None, *, first: bool = True, batch_first: bool = False
) -> Tensor:
    """The reset mask of segments that stand one after the other in a row, from their lengths.

    Args:
        lengths: integers ``(S,)`` for one row, ``(S, N)`` (``(N, S)`` if ``batch_first``) for N rows of S segments. A
            length of 0 marks nothing, so rows of fewer segments are filled up with zeros.
        L: steps of the mask; those behind the last segment are not marked. None takes the sum of the lengths, the
            largest of all rows, which is **read on the host**.
        first: whether the segment at step 0 starts there, or continues the state passed as ``hx``.
        batch_first: whether ``lengths`` and the mask have the batch first.

    Raises: TypeError, ValueError for arguments of another type or shape; ValueError for lengths on the CPU that are
        negative or take more than ``L`` steps. On a GPU, segments behind step ``L`` are ignored.

    For one row this is::

        start = 0
        for length in lengths:
            if length > 0:
                mask[start] = first or start > 0
            start += length

    >>> reset_mask_from_lengths(torch.tensor([2, 0, 3]), L=6).int()
    tensor([1, 0, 1, 0, 0, 0], dtype=torch.int32)
    """
    who = "reset_mask_from_lengths"
    _check_tensor(who, "lengths", lengths, "(S,)", "(N, S)" if batch_first else "(S, N)")
    _check_integers(who, "lengths", lengths)
    _check_first(who, first)
    rows = _time_major(lengths, batch_first)
    if _is_free_to_read(rows) and bool((rows < 0).any()):
        raise ValueError(f"{who}: lengths must be at least 0, got {int(rows.min())}")
    steps = _steps(who, L, rows.sum(0), "the sum of lengths")
    mask = _mask_of_starts(rows.cumsum(0) - rows, rows > 0, steps, first)
    return mask.t().contiguous() if batch_first else mask


def reset_mask_from_cu_seqlens(cu_seqlens: Tensor, L: int | None = None, *, first: bool = True) -> Tensor:
    """The reset mask of packed segments, from the cumulative lengths that variable-length attention takes.

    Args:
        cu_seqlens: integers ``(S + 1,)``: 0, and the end of each segment. An empty segment marks nothing.
        L: steps of the mask; those behind the last segment are not marked. None takes the last entry, which is **read
            on the host**.
        first: whether the segment at step 0 starts there, or continues the state passed as ``hx``.

    Returns: ``(L,)``, for unbatched input; ``mask[:, None]`` is that of a batch of one.

    Raises: TypeError, ValueError for arguments of another type or shape; ValueError for values on the CPU that do not
        start with 0, decrease, or exceed ``L``. On a GPU, segments behind step ``L`` are ignored.

    This is ``reset_mask_from_lengths(cu_seqlens.diff(), L, first=first)``.

    >>> reset_mask_from_cu_seqlens(torch.tensor([0, 2, 2, 5])).int()
    tensor([1, 0, 1, 0, 0], dtype=torch.int32)
    """
    who = "reset_mask_from_cu_seqlens"
    _check_tensor(who, "cu_seqlens", cu_seqlens, "(S + 1,)")
    _check_integers(who, "cu_seqlens", cu_seqlens)
    _check_first(who, first)
    if cu_seqlens.size(0) == 0:
        raise ValueError(f"{who}: cu_seqlens must have shape (S + 1,) and start with 0, got no entry")
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    if _is_free_to_read(cu_seqlens):
        if int(cu_seqlens[0]) != 0:
            raise ValueError(
                f"{who}: cu_seqlens must start with 0, got {int(cu_seqlens[0])}; "
                "for lengths use reset_mask_from_lengths"
            )
        if bool((ends < starts).any()):
            k = int((ends < starts).nonzero()[0])
            raise ValueError(f"{who}: cu_seqlens must not decrease, got {int(ends[k])} after {int(starts[k])}")
    return _mask_of_starts(starts, ends > starts, _steps(who, L, cu_seqlens[-1], "the last entry of cu_seqlens"), first)


def reset_mask_from_segment_ids(
    ids: Tensor, previous: Tensor | None = None, *, first: bool = True, batch_first: bool = False
) -> Tensor:
    """The reset mask of segments that are numbered step by step: a reset wherever the number changes.

    Args:
        ids: integers ``(L, N)``, ``(N, L)`` if ``batch_first``, or ``(L,)``; they need not be sorted.
        previous: the ids of the step before this window, ``(N,)``, or a scalar tensor for ``(L,)``: step 0 is marked
            where its id differs from them.
        first: without ``previous``, whether step 0 starts a segment, or continues the state passed as ``hx``.
        batch_first: whether ``ids`` and the mask have the batch first.

    Raises: TypeError, ValueError for arguments of another type or shape.

    For ``(L, N)`` this is::

        mask[0] = first if previous is None else ids[0] != previous
        mask[1:] = ids[1:] != ids[:-1]

    >>> reset_mask_from_segment_ids(torch.tensor([7, 7, 3, 3, 7]), first=False).int()
    tensor([0, 0, 1, 0, 1], dtype=torch.int32)
    """
    who = "reset_mask_from_segment_ids"
    _check_tensor(who, "ids", ids, "(L,)", "(N, L)" if batch_first else "(L, N)")
    _check_integers(who, "ids", ids)
    _check_first(who, first)
    values = _time_major(ids, batch_first)
    if previous is not None:
        _check_row(who, "previous", previous, values)
        _check_integers(who, "previous", previous)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    steps = _time_major(mask, batch_first)
    steps[1:] = values[1:] != values[:-1]
    steps[:1] = first if previous is None else values[:1] != previous
    return mask


def detach_mask_every(
    k: int,
    L: int,
    N: int | None,
    offset: int = 0,
    *,
    batch_first: bool = False,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """The detach mask of truncated back-propagation through ``k`` steps, aligned over several calls.

    Without an offset it is what ``truncated_bptt_steps=k`` stands for.

    Args:
        k: steps from one detach to the next, at least 1.
        L: steps of the mask.
        N: sequences; None gives ``(L,)``, for unbatched input.
        offset: steps of the same sequences that came before this window, in earlier calls.
        batch_first: whether the mask has the batch first.
        device: where the mask is made; None is torch's default.

    Raises: TypeError, ValueError for numbers of another type or range.

    For ``(L, N)`` this is::

        mask[t] = (t + offset) % k == 0 and t + offset > 0

    >>> detach_mask_every(3, 7, None).int()
    tensor([0, 0, 0, 1, 0, 0, 1], dtype=torch.int32)
    >>> detach_mask_every(3, 4, None, offset=3).int()
    tensor([1, 0, 0, 1], dtype=torch.int32)
    """
    who = "detach_mask_every"
    _check_int(who, "k", k, 1)
    _check_int(who, "L", L, 0)
    _check_int(who, "offset", offset, 0)
    if N is not None:
        _check_int(who, "N", N, 0)
    steps = torch.arange(L, device=device) + offset
    mask = (steps % k == 0) & (steps > 0)
    if N is None:
        return mask
    return mask.repeat(N, 1) if batch_first else mask[:, None].repeat(1, N)


def _time_major(values: Tensor, batch_first: bool) -> Tensor:
    """A view with the steps, or the segments, in dimension 0; of one row there is nothing to transpose."""
    return values.t() if batch_first else values


def _mask_of_starts(starts: Tensor, marks: Tensor, L: int, first: bool) -> Tensor:
    """``(L,)`` or ``(L, N)``: True at the ``starts``, ``(S,)`` or ``(S, N)``, below ``L`` that ``marks`` chooses."""
    starts = starts.long()
    index = torch.where(marks & (starts < L), starts, L)  # a row of its own for what marks nothing
    mask = torch.zeros(L + 1, *starts.shape[1:], dtype=torch.bool, device=starts.device).scatter(0, index, True)[:L]
    if not first:
        mask[:1] = False
    return mask


def _steps(who: str, L: int | None, ends: Tensor, what: str) -> int:
    """``L``, checked against the ``ends`` of all rows where they are free to read; None is the last of them."""
    if L is None:
        return int(ends.max()) if ends.numel() else 0
    _check_int(who, "L", L, 0)
    if ends.numel() and _is_free_to_read(ends) and int(ends.max()) > L:
        raise ValueError(f"{who}: L must be at least {what}, {int(ends.max())}, got {L}")
    return L


def _is_free_to_read(values: Tensor) -> bool:
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_tensor(who: str, name: str, value: object, *shapes: str) -> None:
    """``shapes`` are the texts of those allowed: the first has one dimension, the next two."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{who}: {name} must be a Tensor, got {type(value).__name__}; use torch.as_tensor({name})")
    if not 1 <= value.dim() <= len(shapes):
        raise ValueError(f"{who}: {name} must have shape {' or '.join(shapes)}, got {tuple(value.shape)}")


def _check_row(who: str, name: str, row: object, values: Tensor) -> None:
    """``row`` must be one step of ``values``."""
    if not isinstance(row, Tensor):
        raise TypeError(f"{who}: {name} must be a Tensor, got {type(row).__name__}; use torch.as_tensor({name})")
    if row.shape != values.shape[1:]:
        text = "(N,)" if values.dim() == 2 else "()"
        raise ValueError(f"{who}: {name} must have shape {text} = {tuple(values.shape[1:])}, got {tuple(row.shape)}")
    if row.device != values.device:
        raise ValueError(f"{who}: {name} must be on {values.device}, got {row.device}; use {name}.to({values.device})")


def _check_integers(who: str, name: str, value: Tensor) -> None:
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{who}: {name} must be an integer tensor, got {value.dtype}; use {name}.long()")


def _check_first(who: str, first: object) -> None:
    if not isinstance(first, bool):
        raise TypeError(f"{who}: first must be a bool, got {type(first).__name__}")


def _check_int(who: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{who}: {name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{who}: {name} must be at least {least}, got {value}")
