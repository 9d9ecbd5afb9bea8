"""``LSTM``, ``GRU``, ``LSTMCell``, ``GRUCell``: the modules of torch.nn, with boundaries and explicit state.

They derive from :class:`torch.nn.RNNBase` and :class:`torch.nn.RNNCellBase`, not from :class:`torch.nn.LSTM`, because
torch.compile refuses every instance of that.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _conversion, _plain, functional
from .reference import Weights

__all__ = ["GRU", "LSTM", "GRUCell", "LSTMCell"]


class _RNN(nn.RNNBase):
    """What LSTM and GRU share: everything but their state and their function."""

    weight_dtype: torch.dtype | None = None  #: of the weight matrices, if it is not the dtype of biases and states

    _is_replica = False  #: DataParallel sets it in the copies that it makes
    _function: Any  #: what runs the layers: functional.lstm or functional.gru
    _plain: Any  #: what runs one layer of a plain call: _plain.lstm or _plain.gru

    def flatten_parameters(self) -> None:
        """Do nothing: the weights are read where they are. Kept because callers of torch.nn call it."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raise as torch.nn does unless ``input`` has the right dtype and size; ``weight_dtype`` is not the input's."""
        kept = self.weight_dtype
        if kept is not None and self._flat_weights[0].dtype == kept:  # type: ignore[union-attr]
            if input.dtype != torch.float32 and not torch._C._is_any_autocast_enabled():
                raise ValueError(
                    f"{self.mode}: the input of a module with weight_dtype={kept} must have dtype torch.float32, got "
                    f"{input.dtype}; use input.float()"
                )
            input = torch.empty(input.shape, dtype=kept, device="meta")
        super().check_input(input, batch_sizes)

    def check_hidden_size(
        self, hx: Tensor, expected_hidden_size: tuple[int, int, int], msg: str = "Expected hidden size {}, got {}"
    ) -> None:
        """RuntimeError unless ``hx`` has the expected size; a batch dimension of 1 stands for any batch."""
        layers, _, size = expected_hidden_size
        if hx.size() not in (expected_hidden_size, (layers, 1, size)):
            raise RuntimeError(msg.format(expected_hidden_size, list(hx.size())))

    def _weights_have_changed(self) -> bool:
        """Whether ``_flat_weights`` is out of date."""
        if self._weights_are_the_parameters():
            return False
        return bool(super()._weights_have_changed())  # type: ignore[no-untyped-call]

    def _weights_are_the_parameters(self) -> bool:
        """Whether ``_flat_weights`` is up to date, and all of it parameters.

        They are compared without the attribute look-ups of torch.nn, which take longer than a short call. Whatever
        else stands in for a parameter is left to torch.nn: reading it may have effects.
        """
        parameters = self._parameters
        for reference, name in zip(self._flat_weight_refs, self._flat_weights_names, strict=True):
            if reference is None or reference() is not parameters.get(name, self):  # no parameter is a module
                return False
        return True

    def _weights(self) -> list[Weights]:
        """The parameters as they are now, one entry per layer and direction."""
        self._update_flat_weights()
        return self._by_direction(self._flat_weights)

    def _by_direction(self, flat: list[Any]) -> list[Weights]:
        """Parameters in the order of ``_flat_weights``, one entry per layer and direction."""
        per_entry = len(self._all_weights[0])
        entries = [flat[k : k + per_entry] for k in range(0, len(flat), per_entry)]
        if self.bias:
            return [Weights(*entry) for entry in entries]
        return [Weights(entry[0], entry[1], None, None, *entry[2:]) for entry in entries]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        reset_mask: Tensor | None = None,
        reset_hx: Any = None,
        detach_mask: Tensor | None = None,
        truncated_bptt_steps: int | None = None,
        lengths: Tensor | None = None,
        return_states: bool = False,
        recompute: bool = False,
    ) -> Any:
        """Run the layers over ``input``.

        Arguments, results, errors and formula are those of :func:`hsm_kernels.functional.lstm` and
        :func:`hsm_kernels.functional.gru`. ``forward(input, hx)`` alone is torch.nn's, PackedSequence included.

        >>> rnn, x = LSTM(3, 4), torch.randn(5, 2, 3)
        >>> starts = torch.zeros(5, 2, dtype=torch.bool)
        >>> starts[2, 0] = True  # sequence 0 starts afresh at step 2
        >>> output, _ = rnn(x, reset_mask=starts)
        >>> torch.testing.assert_close(output[2:, 0], rnn(x[2:, 0])[0])
        >>> output, h_n, states = GRU(3, 4)(x, return_states=True)
        >>> torch.testing.assert_close(states[:, -1], h_n)
        """
        if (
            not return_states and reset_mask is None and reset_hx is None and detach_mask is None
            and truncated_bptt_steps is None and lengths is None
        ):  # fmt: skip
            found = self._run_plain(input, hx, recompute)
            if found is not None:
                return found
        options = {
            "reset_mask": reset_mask,
            "reset_hx": reset_hx,
            "detach_mask": detach_mask,
            "truncated_bptt_steps": truncated_bptt_steps,
            "lengths": lengths,
            "return_states": return_states,
            "recompute": recompute,
        }
        result = self._run(input, hx, options)
        if self._is_watched_by_opacus():
            _refuse_what_opacus_does_not_see(self.mode, options, result[1])
        return result

    def _is_watched_by_opacus(self) -> bool:
        return hasattr(self._flat_weights[0], "_forward_counter")

    def _run_plain(self, input: Any, hx: Any, recompute: bool) -> Any:
        """The result of a plain call of the only layer; None for any other call."""
        if torch.compiler.is_compiling():
            return None
        if self.num_layers != 1 or not isinstance(input, Tensor) or input.dim() != 3:
            return None
        if self.weight_dtype is not None and torch.is_grad_enabled():  # weights that may have to be widened
            return None
        if not self._weights_are_the_parameters() or (torch.is_grad_enabled() and self._is_watched_by_opacus()):
            return None
        flat = self._flat_weights
        directions = [flat] if len(flat) == 4 and self.bias else self._by_direction(flat)
        found = self._plain(input.transpose(0, 1) if self.batch_first else input, hx, directions, recompute)
        if found is None or not self.batch_first:
            return found
        return found[0].transpose(0, 1), found[1]

    def _run(self, input: Any, hx: Any, options: dict[str, Any]) -> Any:
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx, options)
        if hx is not None and self._is_replica:
            self._refuse_scattered(hx)
        weights = self._weights()
        if input.dim() in (2, 3):  # the other cases have their message in the function
            self.check_input(input if input.dim() == 3 else input.unsqueeze(1), None)
        return self._function(
            input,
            hx,
            weights,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            **options,
        )

    def _refuse_scattered(self, hx: Any) -> None:
        """Raise, in a replica that DataParallel made, for a state of which it has only some layers."""
        rows = self.num_layers * (2 if self.bidirectional else 1)
        parts = [part for part in (hx if isinstance(hx, tuple) else (hx,)) if isinstance(part, Tensor)]
        if any(part.size(0) != rows for part in parts):
            raise RuntimeError(
                f"{self.mode}: hx must have {rows} rows, one per layer and direction, got {parts[0].size(0)}: "
                "torch.nn.DataParallel scatters every argument along its first dimension, which is not the batch here; "
                "use DistributedDataParallel, or give the state to a module around this one with the batch first, and "
                "transpose it there"
            )

    def _run_packed(self, packed: PackedSequence, hx: Any, options: dict[str, Any]) -> Any:
        """Run a PackedSequence as padded sequences with lengths, in the order in which it holds them."""
        given = [name for name, value in options.items() if value is not None and value is not False]
        refused = [name for name in given if name not in ("truncated_bptt_steps", "recompute")]
        if refused:
            raise ValueError(
                f"{self.mode}: {', '.join(refused)} cannot be combined with a PackedSequence, whose time axis is "
                "packed; pass the padded tensor and lengths instead"
            )
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        weights = self._weights()
        self.check_input(data, batch_sizes)
        padded, lengths = torch._VF._pad_packed_sequence(data, batch_sizes, False, 0.0, batch_sizes.numel())
        if hx is not None and sorted_indices is not None:
            hx = _map_state(hx, lambda part: part if part.size(1) == 1 else part.index_select(1, sorted_indices))
        output, hx_n = self._function(
            padded,
            hx,
            weights,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            lengths=lengths,
            truncated_bptt_steps=options["truncated_bptt_steps"],
            recompute=options["recompute"],
        )
        data, _ = torch._VF._pack_padded_sequence(output, lengths, False)
        if unsorted_indices is not None:
            hx_n = _map_state(hx_n, lambda part: part.index_select(1, unsorted_indices))
        return PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices), hx_n


def _refuse_what_opacus_does_not_see(who: str, options: dict[str, Any], hx_n: Any) -> None:
    """Raise for keyword arguments, and in the backward pass if a gradient comes back to the last state."""
    advice = (
        ", and would give wrong gradients; compute per-sample gradients with torch.func.vmap(torch.func.grad(...)) and "
        'grad_sample_mode="no_op"'
    )
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        raise RuntimeError(f"{who}: the hooks of Opacus do not see {', '.join(given)}{advice}")

    def refuse(grad: Tensor | None) -> None:
        if grad is not None and grad.any():  # zeros are no gradient
            raise RuntimeError(f"{who}: the hooks of Opacus do not see the gradient of the last state{advice}")

    def watch(part: Tensor) -> Tensor:
        if part.requires_grad:
            part.register_hook(refuse)  # type: ignore[no-untyped-call]
        return part

    _map_state(hx_n, watch)


def _map_state(state: Any, function: Any) -> Any:
    """Apply ``function`` to every tensor of a state, whatever its structure."""
    if isinstance(state, Tensor):
        return function(state)
    return type(state)(None if part is None else _map_state(part, function) for part in state)


def _keep_weights_in(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Round a new module's weight matrices to ``dtype``, if it is given."""
    if dtype is None:
        return
    who, parameters = type(module).__name__, list(module.parameters())
    if dtype != torch.bfloat16:
        raise ValueError(f"{who}: weight_dtype must be torch.bfloat16 or None, got {dtype}")
    given = parameters[0].dtype
    if given != torch.float32:
        raise ValueError(f"{who}: weight_dtype is for a float32 module, got dtype={given}; leave one of them out")
    for parameter in parameters:
        if parameter.dim() == 2:
            parameter.data = parameter.data.to(dtype)
    module.weight_dtype = dtype  # type: ignore[assignment]


class LSTM(_RNN):
    r"""A drop-in for :class:`torch.nn.LSTM`: same constructor, parameters, state_dict and results.

    Args: as :class:`torch.nn.LSTM` - ``input_size``, ``hidden_size``, ``num_layers=1``, ``bias=True``,
    ``batch_first=False``, ``dropout=0.0``, ``bidirectional=False``, ``proj_size=0``, ``device=None``, ``dtype=None`` -
    and, by keyword, ``weight_dtype=None``: with ``torch.bfloat16`` a float32 module keeps its weight matrices rounded
    to bfloat16, and computes with them in float32 (see :func:`hsm_kernels.functional.lstm`).

    Raises: as :class:`torch.nn.LSTM`; ValueError for another ``weight_dtype``, or one beside another ``dtype``.

    >>> rnn = LSTM(3, 4)
    >>> output, (h_n, c_n) = rnn(torch.randn(5, 2, 3))
    >>> output.shape, h_n.shape
    (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """

    _function = staticmethod(functional.lstm)
    _plain = staticmethod(_plain.lstm)

    def __init__(self, *args: Any, weight_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)
        _keep_weights_in(self, weight_dtype)

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def to_torch(self) -> nn.LSTM:
        """A :class:`torch.nn.LSTM` that shares this module's parameters, for ONNX export, quantization and so on."""
        return cast(nn.LSTM, _conversion.to_torch(self))


class GRU(_RNN):
    r"""A drop-in for :class:`torch.nn.GRU`: same constructor, parameters, state_dict and results.

    Args: as :class:`torch.nn.GRU` - ``input_size``, ``hidden_size``, ``num_layers=1``, ``bias=True``,
    ``batch_first=False``, ``dropout=0.0``, ``bidirectional=False``, ``device=None``, ``dtype=None`` - and, by keyword,
    ``weight_dtype=None``, as for :class:`LSTM`.

    Raises: as :class:`torch.nn.GRU`, and as :class:`LSTM`.

    >>> rnn = GRU(3, 4, batch_first=True)
    >>> output, h_n = rnn(torch.randn(2, 5, 3))
    >>> output.shape, h_n.shape
    (torch.Size([2, 5, 4]), torch.Size([1, 2, 4]))
    """

    _function = staticmethod(functional.gru)
    _plain = staticmethod(_plain.gru)

    def __init__(self, *args: Any, weight_dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)
        _keep_weights_in(self, weight_dtype)

    def to_torch(self) -> nn.GRU:
        """A :class:`torch.nn.GRU` that shares this module's parameters, for ONNX export, quantization and so on."""
        return cast(nn.GRU, _conversion.to_torch(self))


class _Cell(nn.RNNCellBase):
    """What the cells share: the checks of torch.nn's cells, with their messages."""

    weight_dtype: torch.dtype | None = None  #: as in LSTM and GRU

    _is_lstm: bool
    _plain: Any  #: what runs a plain step: _plain.lstm_cell or _plain.gru_cell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        num_chunks = 4 if self._is_lstm else 3
        super().__init__(input_size, hidden_size, bias, num_chunks, device, dtype)
        _keep_weights_in(self, weight_dtype)

    def _step(self, function: Any, input: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Check ``input`` and ``state``, give them a batch if they have none, and run ``function``."""
        batched = input.dim() == 2
        new = self._run_plain(input, state) if batched else None
        if new is not None:
            return new
        who = type(self).__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{who}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for k, part in enumerate(state or ()):
            if part.dim() not in (1, 2):
                label = f"hx[{k}]" if self._is_lstm else "hidden"
                raise ValueError(f"{who}: Expected {label} to be 1D or 2D, got {part.dim()}D instead")
        if not batched:
            input, state = input.unsqueeze(0), None if state is None else tuple(part.unsqueeze(0) for part in state)
        self._check(input, state or ())
        if not batched:
            new = self._run_plain(input, state)
        if new is None:
            new = function(input, state, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return new if batched else tuple(part.squeeze(0) for part in new)

    def _run_plain(self, input: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        """The new state of a plain call; None for any other call."""
        if torch.compiler.is_compiling() or (self.weight_dtype is not None and torch.is_grad_enabled()):
            return None
        try:
            weights = [self._parameters[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        except KeyError:  # reading what stands in for a parameter may have effects
            return None
        found: tuple[Tensor, ...] | None = self._plain(input, state, weights)
        return found

    def _check(self, input: Tensor, state: tuple[Tensor, ...]) -> None:
        if input.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}")
        for k, part in enumerate(state):
            if part.size(0) != input.size(0):
                raise RuntimeError(
                    f"Input batch size {input.size(0)} doesn't match hidden{k} batch size {part.size(0)}"
                )
            if part.shape != (input.size(0), self.hidden_size):
                given = part.size(min(1, part.dim() - 1))
                raise RuntimeError(f"hidden{k} has inconsistent hidden_size: got {given}, expected {self.hidden_size}")

    def to_torch(self) -> nn.RNNCellBase:
        """The cell of torch.nn that shares this module's parameters."""
        return cast(nn.RNNCellBase, _conversion.to_torch(self))


class LSTMCell(_Cell):
    r"""A drop-in for :class:`torch.nn.LSTMCell`.

    Args: ``input_size``, ``hidden_size``, ``bias=True``, ``device=None``, ``dtype=None``; by keyword,
    ``weight_dtype=None``, as for :class:`LSTM`.

    >>> h, c = LSTMCell(3, 4)(torch.randn(2, 3))
    >>> h.shape
    torch.Size([2, 4])
    """

    _is_lstm = True
    _plain = staticmethod(_plain.lstm_cell)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step: ``input`` ``(N, I)`` or ``(I,)``, ``hx`` ``(h, c)`` of ``(N, H)`` or ``(H,)`` -> the new pair.

        The formula is that of :func:`functional.lstm_cell`; errors are those of :class:`torch.nn.LSTMCell`.
        """
        if isinstance(hx, Tensor) or (hx is not None and len(hx) != 2):
            given = "a Tensor" if isinstance(hx, Tensor) else f"{len(hx)} entries"
            raise TypeError(f"LSTMCell: hx must be a pair of Tensors (h, c), got {given}")
        h, c = self._step(functional.lstm_cell, input, hx)
        return h, c


class GRUCell(_Cell):
    r"""A drop-in for :class:`torch.nn.GRUCell`.

    Args: ``input_size``, ``hidden_size``, ``bias=True``, ``device=None``, ``dtype=None``; by keyword,
    ``weight_dtype=None``, as for :class:`LSTM`.

    >>> GRUCell(3, 4)(torch.randn(2, 3)).shape
    torch.Size([2, 4])
    """

    _is_lstm = False
    _plain = staticmethod(_plain.gru_cell)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step: ``input`` ``(N, I)`` or ``(I,)``, ``hx`` ``(N, H)`` or ``(H,)`` -> the new ``h``.

        The formula is that of :func:`functional.gru_cell`; errors are those of :class:`torch.nn.GRUCell`.
        """
        if hx is not None and not isinstance(hx, Tensor):
            raise TypeError(f"GRUCell: hx must be a Tensor, got {type(hx).__name__}")
        (h,) = self._step(_gru_step, input, None if hx is None else (hx,))
        return h


def _gru_step(input: Tensor, state: tuple[Tensor] | None, *weights: Tensor) -> tuple[Tensor]:
    return (functional.gru_cell(input, None if state is None else state[0], *weights),)
