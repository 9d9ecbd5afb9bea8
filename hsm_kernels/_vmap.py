"""How vmap runs a layer: what it maps over becomes more sequences of one call, or, over weights, several calls.

A layer's own kernels are faster than batched products step by step, so an ensemble of models is a call for each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Where vmap's dimension stands before it is joined with that of the sequences, by a tensor's dimensions: time-major
#: tensors of every step, states ``(D, N, X)`` and masks have the sequences second, ``lengths`` have them first.
_BATCH = {4: 1, 3: 1, 2: 1, 1: 0}


def batched_layer(
    weights: range, call: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: Sequence[Any], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The vmap rule of a forward operator: ``call(*arguments)`` for each slice of the arguments, and the results' dims.

    ``weights`` are the positions of weights, all else of more than no dimension has sequences. Used for
    ``vmap`` of :class:`torch.autograd.Function` and of torch.library.
    """
    if any(in_dims[k] is not None for k in weights):
        return _one_by_one(call, info.batch_size, in_dims, arguments)
    joined = [
        argument if k in weights or not isinstance(argument, Tensor) else _join(argument, dim, info.batch_size)
        for k, (argument, dim) in enumerate(zip(arguments, in_dims, strict=True))
    ]
    results = call(*joined)
    return tuple(_split(result, info.batch_size) for result in results), tuple(_dim(result) for result in results)


def _join(tensor: Tensor, dim: int | None, size: int, is_entering: bool = False) -> Tensor:
    """``size`` times as many sequences."""
    at = 2 if is_entering else _BATCH[tensor.dim() - (dim is not None)]
    if dim is None:
        tensor = tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])
    else:
        tensor = tensor.movedim(dim, at)
    return tensor.flatten(at, at + 1)


def _dim(result: Tensor) -> int:
    return _BATCH[result.dim()]


def _split(result: Tensor, size: int) -> Tensor:
    at = _BATCH[result.dim()]
    if result.dim() == 1:  # it was not asked for
        return result.expand(size, 0)
    return result.reshape(*result.shape[:at], size, result.size(at) // size, *result.shape[at + 1 :])


def _one_by_one(
    call: Callable[..., tuple[Tensor, ...]], size: int, in_dims: Sequence[Any], arguments: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    slices = [
        [argument] * size if dim is None else argument.unbind(dim)
        for argument, dim in zip(arguments, in_dims, strict=True)
    ]
    runs = [call(*entry) for entry in zip(*slices, strict=True)]
    results = tuple(torch.stack(parts) for parts in zip(*runs, strict=True))
    return results, (0,) * len(results)


def batched_backward(
    weights: range,
    entering: int,
    call: Callable[..., tuple[Tensor, ...]],
    info: Any,
    in_dims: Sequence[Any],
    *arguments: Any,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The vmap rule of a backward operator; ``entering`` is the position of ``(D, L, N, Hout)``.

    Where weights are the same for all slices, each slice is a sample, or as many samples as it had.
    """
    size = info.batch_size
    if any(in_dims[k] is not None for k in weights):
        return _one_by_one(call, size, in_dims, arguments)
    *operands, samples = (
        argument
        if k in weights or not isinstance(argument, Tensor)
        else _join(argument, dim, size, k == entering)
        for k, (argument, dim) in enumerate(zip(arguments, in_dims, strict=True))
    )
    results = call(*operands, size * samples)
    of_weights = 6
    states = [_split(result, size) for result in results[:-of_weights]]
    inner = (samples,) if samples > 1 else ()
    at_weights = [
        grad.view(size, *inner, *grad.shape[size * samples > 1 :]) if grad.numel() else grad.new_empty(size, 0)
        for grad in results[-of_weights:]
    ]
    return (*states, *at_weights), (*(_dim(result) for result in results[:-of_weights]), *(0,) * of_weights)
