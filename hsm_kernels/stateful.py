"""``InitialState`` and ``Stateful``: modules that own a state, around an LSTM or GRU that does not."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import state as states
from ._arguments import StateSpec, autocast_dtype

__all__ = ["InitialState", "Stateful"]

_ON_BATCH_CHANGE = ("error", "reset", "keep")


class InitialState(nn.Module):
    """The state that sequences start from, zeros at first, as parameters of its own.

    The module that it is for keeps its parameters and its state_dict. ``initial(1)`` serves as ``reset_hx``.

    Args:
        rnn: an LSTM or GRU of this package or of torch.nn; only its sizes, dtype and device are taken.
        learned: whether ``h_0`` and, for an LSTM, ``c_0``, ``(D * K, 1, size)`` each, are parameters or buffers.

    Raises: TypeError for another module.

    >>> rnn = nn.GRU(3, 4, num_layers=2)
    >>> initial = InitialState(rnn)
    >>> output, h_n = rnn(torch.randn(5, 7, 3), initial(7))
    >>> [(name, tuple(value.shape)) for name, value in initial.named_parameters()]
    [('h_0', (2, 1, 4))]
    """

    def __init__(self, rnn: nn.Module, learned: bool = True) -> None:
        super().__init__()
        spec, weight = _sequence_spec("InitialState", rnn), states.weight_of(rnn)
        self.learned = learned
        self._names = ("h_0", "c_0")[: len(spec.sizes)]
        for name, size in zip(self._names, spec.sizes, strict=True):
            value = torch.zeros(spec.layers * spec.directions, 1, size, dtype=weight.dtype, device=weight.device)
            if learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, batch_size: int | None) -> Any:
        """The state for a batch of ``batch_size``, ``(D * K, N, size)``; None is the form for unbatched input.

        This is ``h_0.expand(-1, batch_size, -1)``, and for an LSTM the tuple of it and that of ``c_0``.
        """
        parts = [getattr(self, name) for name in self._names]
        hx = parts[0] if len(parts) == 1 else tuple(parts)
        if batch_size is None:
            return _without_batch(hx)
        return states.expand_batch(hx, batch_size)

    def extra_repr(self) -> str:
        """What is not a submodule."""
        return f"learned={self.learned}"


class Stateful(nn.Module):
    """An LSTM or GRU that starts each call from the state in which the last one ended, cut off from its graph.

    For streams, rollouts, and training on long sequences window by window. In the reverse direction of a bidirectional
    module, too, the final state of one call is the first of the next, as in ``rnn(input, hx_n)``. Training may follow
    calls in inference mode, unless torch.compile was given the whole container and not just ``rnn``: then use no_grad.

    Args:
        rnn: an LSTM or GRU of this package or of torch.nn, batch first or not.
        initial: the state that sequences start from: None for zeros; an :class:`InitialState`, then a submodule,
            which gets a gradient in each call that starts from it; or an ``hx`` whose batch is 1 or that of every
            input, of which a copy is kept as a constant.
        on_batch_change: what to do when the input has another batch than the kept state. "error" raises; "reset" lets
            all rows start from the initial state; "keep" keeps the first rows and lets new ones start from the initial
            state. Unbatched input counts as a batch of 1.
        persistent: whether the kept state is part of the state_dict, as ``h``, ``c`` and ``pending``, and comes back by
            ``load_state_dict``, whatever its batch. Where the state_dict has none, none is kept afterwards.

    Raises: TypeError, ValueError for arguments of another kind or an ``initial`` that does not fit.

    One call is, in plain PyTorch::

        result = rnn(input, kept, **options)
        kept = result[1].detach()                                  # both parts of an LSTM's

    >>> rnn = nn.LSTM(3, 4)
    >>> stream, x = Stateful(rnn), torch.randn(6, 2, 3)
    >>> parts = [stream(window)[0] for window in x.split(2)]
    >>> torch.testing.assert_close(torch.cat(parts), rnn(x)[0])
    >>> stream.reset(torch.tensor([True, False]))  # sequence 0 has ended
    """

    def __init__(
        self, rnn: nn.Module, initial: Any = None, on_batch_change: str = "error", persistent: bool = False
    ) -> None:
        super().__init__()
        _sequence_spec("Stateful", rnn)
        if on_batch_change not in _ON_BATCH_CHANGE:
            raise ValueError(
                f"Stateful: on_batch_change must be one of {', '.join(map(repr, _ON_BATCH_CHANGE))}, "
                f"got {on_batch_change!r}"
            )
        if initial is not None:
            states.check_fits("Stateful", initial(1) if isinstance(initial, InitialState) else initial, rnn, "initial")
        self.rnn = rnn
        self.on_batch_change = on_batch_change
        self.persistent = persistent
        self.initial = initial if initial is None or isinstance(initial, InitialState) else _own(_with_batch(initial))
        # Not buffers: DistributedDataParallel sends those of one process to all others.
        self._state: Any = None  # as the last call returned it
        self._pending: Tensor | None = None  # bool (N,): rows of it that were reset since

    @property
    def state(self) -> Any:
        """The state that the next call starts from, without a graph; None if all rows start from the initial state."""
        if self._state is None:
            return None
        with torch.no_grad():
            kept = _usable(self._state)
            hx = self._continued(_with_batch(kept), _batch_of(kept))
        return _without_batch(hx) if _is_unbatched(kept) else hx

    def forward(self, input: Tensor | PackedSequence, **options: Any) -> Any:
        """Run ``rnn(input, hx, **options)`` from the kept state, return its result, and keep its final state.

        Args:
            input: as the module takes it; a PackedSequence has the rows of the state in its unsorted order.
            **options: keyword arguments of the module. ``reset_hx`` defaults to the initial state.

        The kept state shares memory with the result. After an error it is what it was.

        Raises: ValueError for another batch than that of the kept state, if ``on_batch_change`` is "error"; and
            whatever the module raises.
        """
        if "hx" in options:
            raise TypeError("Stateful: the module keeps hx itself; use set_state(hx) before the call")
        batch, dtype = self._batch_and_dtype(input)
        hx = self._start(1 if batch is None else batch, dtype)
        if options.get("reset_mask") is not None and options.get("reset_hx") is None and self.initial is not None:
            reset_hx = self.initial(1) if isinstance(self.initial, InitialState) else self.initial
            options["reset_hx"] = _in_form(reset_hx, batch, dtype)
        result = self.rnn(input, None if hx is None else _in_form(hx, batch, dtype), **options)
        self._state, self._pending = states.detach(result[1]), None
        return result

    def reset(self, mask: Tensor | None = None) -> None:
        """Let rows start from the initial state at the next call.

        Args:
            mask: bool ``(N,)``, the rows of the kept state, copied; for unbatched input ``(1,)`` or a scalar. None is
                all rows. Where no state is kept, all rows start from the initial state anyway.

        Raises: TypeError, ValueError for a mask of another dtype, shape or device.
        """
        if mask is None:
            self._state, self._pending = None, None
        elif self._state is not None:
            if _is_unbatched(self._state) and isinstance(mask, Tensor) and mask.dim() == 0:
                mask = mask.reshape(1)
            states.check_rows("Stateful.reset", mask, _batch_of(self._state), _first(self._state).device)
            with torch.inference_mode(False):
                self._pending = mask.clone() if self._pending is None else self._pending | mask

    def set_state(self, hx: Any) -> None:
        """Let the next call start from a copy of ``hx``, without its graph; None is the initial state.

        Args:
            hx: a state of the module, of any batch or unbatched; a list with one entry per layer is first made into one
                by :func:`hsm_kernels.state.stack`.

        Raises: TypeError, ValueError for another structure, shape, dtype or device; nothing has changed then.
        """
        if hx is None:
            self.reset()
            return
        weight = states.weight_of(self.rnn)
        if isinstance(hx, (Tensor, tuple)) and _dtypes(hx) == {autocast_dtype(weight.device)}:
            hx = states.to(hx, weight.dtype)  # a state that a call under autocast returned
        states.check_fits("Stateful.set_state", hx, self.rnn)
        if _first(hx).device != weight.device:
            raise ValueError(
                f"Stateful.set_state: hx must be on the module's device {weight.device}, got {_first(hx).device}; "
                "use state.to"
            )
        self._state, self._pending = _own(hx), None

    def extra_repr(self) -> str:
        """What is not a submodule."""
        return f"on_batch_change={self.on_batch_change!r}, persistent={self.persistent}"

    def _batch_and_dtype(self, input: object) -> tuple[int | None, torch.dtype]:
        """The batch of an input, None if it has none."""
        if isinstance(input, PackedSequence):
            return int(input.batch_sizes[0]), input.data.dtype
        if not isinstance(input, Tensor):
            raise TypeError(f"Stateful: input must be a Tensor or a PackedSequence, got {type(input).__name__}")
        if input.dim() not in (2, 3):
            raise ValueError(f"Stateful: Expected input to be 2D or 3D, got {input.dim()}D instead")
        return None if input.dim() == 2 else input.size(0 if self.rnn.batch_first else 1), input.dtype

    def _start(self, batch: int, dtype: torch.dtype) -> Any:
        """What a call on ``batch`` rows starts from, with a batch dimension; None for zeros."""
        if self._state is None:
            return self._initial(batch)
        kept = states.to(_with_batch(_usable(self._state)), dtype)
        given = _batch_of(kept)
        if given == batch or self.on_batch_change == "keep":
            return self._continued(kept, batch)
        if self.on_batch_change == "reset":
            return self._initial(batch)
        raise ValueError(
            f"Stateful: the kept state has a batch of {given}, the input one of {batch}; call reset() where new "
            "sequences start, or choose by on_batch_change: 'error' (now), 'reset' (all rows start afresh) or 'keep' "
            "(the first rows are kept)"
        )

    def _continued(self, kept: Any, batch: int) -> Any:
        """The first ``batch`` rows of the kept state; what was reset, and what is new, from the initial state."""
        common = min(_batch_of(kept), batch)
        if common < _batch_of(kept):
            kept = states.split(kept, [common, _batch_of(kept) - common])[0]
        if self._pending is None and common == batch:
            return kept
        start = self._initial(batch)
        if start is None:
            start = _map(kept, lambda part: part.new_zeros(part.size(0), batch, part.size(2)))
        old, new = states.split(states.to(start, _first(kept).dtype), [common, batch - common])
        if self._pending is not None:
            kept = states.where(self._pending[:common], old, kept)
        return kept if common == batch else states.cat([kept, new])

    def _initial(self, batch: int) -> Any:
        """The initial state of ``batch`` rows; None for zeros."""
        if self.initial is None or isinstance(self.initial, InitialState):
            return None if self.initial is None else self.initial(batch)
        given = _batch_of(self.initial)
        if given not in (1, batch):
            raise ValueError(
                f"Stateful: initial has a batch of {given}, the input one of {batch}; an initial of batch 1 fits all"
            )
        return self.initial if given == batch else states.expand_batch(self.initial, batch)

    def _apply(self, fn: Any, recurse: bool = True) -> "Stateful":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._state is not None:
            self._state = _map(self._state, fn)
        if self._pending is not None:
            self._pending = fn(self._pending).bool()
        if self.initial is not None and not isinstance(self.initial, InitialState):
            self.initial = _map(self.initial, fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.persistent and self._state is not None:
            destination.update({prefix + name: part for name, part in zip("hc", _tuple(self._state), strict=False)})
            if self._pending is not None:
                destination[prefix + "pending"] = self._pending

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not self.persistent:
            return
        saved = {name: state_dict[prefix + name] for name in ("h", "c", "pending") if prefix + name in state_dict}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in {prefix + name for name in saved}]
        try:
            self._state, self._pending = self._restored(saved)
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))

    def _restored(self, saved: dict[str, Tensor]) -> tuple[Any, Tensor | None]:
        """The kept state and the rows to reset, from what the state_dict has of them."""
        pending = saved.pop("pending", None)
        if not saved:
            return None, None
        weight = states.weight_of(self.rnn)
        device = _first(tuple(saved.values())).device if weight.is_meta else weight.device
        parts = tuple(part.to(device, weight.dtype) for part in saved.values())
        hx = parts if len(parts) == 2 else parts[0]
        states.check_fits("Stateful.load_state_dict", hx, self.rnn, "the kept state")
        if pending is not None:
            pending = _own(pending.to(device))
            states.check_rows("Stateful.load_state_dict", pending, _batch_of(hx), device, "pending")
        return _own(hx), pending


def _sequence_spec(who: str, rnn: nn.Module) -> StateSpec:
    spec = states.spec_of(who, rnn)
    if spec.who.endswith("Cell"):
        raise TypeError(f"{who}: rnn must be an LSTM or GRU, got {spec.who}; one step is a sequence of length 1")
    return spec


def _tuple(hx: Any) -> tuple[Tensor, ...]:
    return (hx,) if isinstance(hx, Tensor) else hx


def _first(hx: Any) -> Tensor:
    return _tuple(hx)[0]


def _map(hx: Any, function: Any) -> Any:
    return function(hx) if isinstance(hx, Tensor) else tuple(function(part) for part in hx)


def _dtypes(hx: Any) -> set[Any]:
    return {part.dtype for part in _tuple(hx) if isinstance(part, Tensor)}


def _is_unbatched(hx: Any) -> bool:
    return _first(hx).dim() == 2


def _batch_of(hx: Any) -> int:
    """N; an unbatched state counts as a batch of 1."""
    return 1 if _is_unbatched(hx) else _first(hx).size(1)


def _with_batch(hx: Any) -> Any:
    return _map(hx, lambda part: part.unsqueeze(1)) if _is_unbatched(hx) else hx


def _without_batch(hx: Any) -> Any:
    return _map(hx, lambda part: part.squeeze(1))


def _in_form(hx: Any, batch: int | None, dtype: torch.dtype) -> Any:
    """A state with a batch dimension as the module takes it for this input."""
    hx = states.to(hx, dtype)
    return _without_batch(hx) if batch is None else hx


def _own(hx: Any) -> Any:
    """A copy without a graph that no one else writes to, and that autograd may save."""
    with torch.inference_mode(False):
        return _map(hx, lambda part: part.detach().clone())


def _usable(hx: Any) -> Any:
    """The state as autograd takes it: what a call in inference mode left is copied outside of it."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return hx
    return _map(hx, lambda part: part.clone() if part.is_inference() else part)
