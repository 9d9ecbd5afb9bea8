"""``explain``: which backend and kernel a call would use, and why."""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _backend
from ._arguments import autocast_dtype
from ._backend import Plan


def explain(rnn: nn.Module, input: Tensor | PackedSequence, hx: Any = None, **options: Any) -> Plan:
    """The backend, kernel variant and reason that ``rnn(input, hx, **options)`` would run with; nothing is computed.

    ``rnn`` is a module of hsm_kernels, ``input`` what it would be called with; ``options`` are the keyword arguments
    of its forward. Raises TypeError for another module, RuntimeError if :func:`set_backend` asked for a backend that
    cannot run it.

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
    return _backend.plan(None, data.device, autocast_dtype(data.device) or data.dtype)
