"""``explain``: which backend and kernel a call would use, and why."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _backend
from ._arguments import autocast_dtype
from ._backend import Plan


def explain(rnn: nn.Module, input: Tensor | PackedSequence, hx: Any = None, **options: Any) -> Plan:
    """The backend, kernel variant and reason that ``rnn(input, hx, **options)`` would run with; nothing is computed.

    ``rnn`` is a module of hsm_kernels, ``input`` what it would be called with; ``options`` are the keyword arguments
    of its forward. For the CPU kernels the variant is the instruction set, and the reason says how many threads the
    first layer's forward pass uses, where it packs the weights, and how many steps of the input it multiplies at once,
    all of which may differ without gradients; masks and lengths, which may change it too, are not looked at. On a GPU
    the variant is that of the first layer's forward recurrence, ``"step"``, ``"cluster"`` or ``"grid"``; the reason
    says why, and with gradients also how the backward one runs; where masks or lengths are given, also to how many
    slots segments are dealt. Others than ``"step"`` run only where the environment
    variable ``HSM_KERNELS_CUDA_VARIANT`` asks for them. Raises TypeError for another module, RuntimeError if
    :func:`set_backend` asked for a backend that cannot run it.

    >>> import torch, hsm_kernels as hsm
    >>> with hsm.use_backend("reference"):
    ...     print(hsm.explain(hsm.LSTM(3, 4), torch.zeros(5, 2, 3)))
    reference (python): the reference was asked for
    """
    from . import modules

    ours = (modules.LSTM, modules.GRU, modules.LSTMCell, modules.GRUCell)
    if not isinstance(rnn, ours):
        raise TypeError(
            f"explain: rnn must be a module of hsm_kernels, got {type(rnn).__name__}; see hsm_kernels.convert"
        )
    data = input.data if isinstance(input, PackedSequence) else input
    dtype = autocast_dtype(data.device) or data.dtype
    plan = _backend.plan(None, data.device, dtype)
    if plan.backend == "reference":
        return plan
    steps, batch = _steps_and_batch(rnn, input)
    # As far as it shows in the arguments: a gradient may also be wanted of a state.
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (data, *rnn.parameters()))
    like = torch.empty((), dtype=dtype, device=data.device).expand(steps, batch, data.size(-1))
    kind = (
        isinstance(rnn, (modules.LSTM, modules.LSTMCell)),
        bool(getattr(rnn, "proj_size", 0)),
        bool(getattr(rnn, "bidirectional", False)),
    )
    if plan.backend == "cuda":
        given = {name for name, option in options.items() if option is not None}
        if isinstance(input, PackedSequence):
            given.add("lengths")
        return _explain_cuda(like, _first_weights(rnn, dtype, training)[1], kind, training, given)
    instruction_set, numbers = torch.ops.hsm_kernels.explain_forward.default(
        like, *_first_weights(rnn, dtype, training), *kind, training
    )
    name = bytes(instruction_set.tolist()).decode()
    return Plan("cpu", name, f"{plan.reason}; {_describe(batch, steps, *numbers.tolist())}")


#: The options that cut sequences, by whether it is the backward pass.
_CUTS = {
    False: {"reset_mask", "lengths"},
    True: {"reset_mask", "lengths", "detach_mask", "truncated_bptt_steps"},
}


def _explain_cuda(
    like: Tensor, weight_hh: Tensor, kind: tuple[bool, bool, bool], training: bool, given: set[str]
) -> Plan:
    def words(backward: bool) -> str:
        found = torch.ops.hsm_kernels.explain_recurrence.default(
            like, weight_hh, *kind, backward, bool(given & _CUTS[backward]), _backend.allows_tf32(like)
        )
        return bytes(found.tolist()).decode()

    variant, reason = words(backward=False).split(": ", 1)
    if training:
        reason += f"; backward {words(backward=True)}"
    return Plan("cuda", variant, reason)


def _steps_and_batch(rnn: nn.Module, input: Tensor | PackedSequence) -> tuple[int, int]:
    if isinstance(input, PackedSequence):
        return input.batch_sizes.numel(), int(input.batch_sizes[0])
    if isinstance(rnn, nn.RNNCellBase):
        return 1, input.size(0) if input.dim() == 2 else 1
    if input.dim() == 2:
        return input.size(0), 1
    return (input.size(1), input.size(0)) if rnn.batch_first else (input.size(0), input.size(1))


def _first_weights(rnn: nn.Module, dtype: torch.dtype, training: bool) -> list[Tensor]:
    suffix = "" if isinstance(rnn, nn.RNNCellBase) else "_l0"
    weights = [getattr(rnn, f"{name}{suffix}").detach() for name in ("weight_ih", "weight_hh")]
    if getattr(rnn, "weight_dtype", None) is not None and dtype == torch.float32 and not training:
        return weights
    return [weight.to(dtype) for weight in weights]


#: Packing of csrc/common/params.h, of W_ih and W_hh.
_NONE, _AS_USED, _BEFORE = range(3)

_HOW = {_NONE: "read as it lies", _AS_USED: "packed block by block as it is used", _BEFORE: "packed once for all steps"}


def _packing(input_packing: int, state_packing: int) -> str:
    if input_packing == state_packing:
        how = _HOW[input_packing].replace("it is", "they are").replace("it lies", "they lie")
        why = ", since there is too little work to pay for packing" if input_packing == _NONE else ""
        return f"weights are {how}{why}"
    return f"W_ih is {_HOW[input_packing]}, W_hh {_HOW[state_packing]}"


def _describe(
    batch: int,
    steps: int,
    batch_groups: int,
    unit_groups: int,
    input_packing: int,
    state_packing: int,
    chunk_sequences: int,
    chunk_steps: int,
) -> str:
    """The numbers of ForwardPlan in words."""
    threads = batch_groups * unit_groups
    shared = " and ".join(
        text for count, text in ((batch_groups, "sequences"), (unit_groups, "hidden units, which meet after each step"))
        if count > 1
    )  # fmt: skip
    available = torch.get_num_threads()
    who = f"{threads} threads share {shared}" if threads > 1 else "1 thread"
    if threads < available:
        who += f" of {available}, as there is too little work for more"
    packing = _packing(input_packing, state_packing)
    rows = f"{chunk_steps} of {steps} steps" if chunk_steps > 1 else f"{chunk_sequences} of {batch} sequences"
    return f"{who}; {packing}; the input of {rows} is multiplied at once"
