"""Fused LSTM and GRU for PyTorch with explicit hidden state: resets, detaches and lengths inside the kernel.

``hsm_kernels.LSTM``, ``GRU``, ``LSTMCell`` and ``GRUCell`` stand in for the modules of :mod:`torch.nn`.
"""

from . import _library
from ._build import description
from ._library import build_info

_library.load()

from . import _ops, functional, reference, state  # noqa: E402, F401
from ._backend import get_backend, set_backend, use_backend  # noqa: E402
from ._conversion import Conversion, convert, from_torch, to_torch  # noqa: E402
from ._explain import explain  # noqa: E402
from .masks import (  # noqa: E402
    detach_mask_every,
    reset_mask_from_cu_seqlens,
    reset_mask_from_dones,
    reset_mask_from_lengths,
    reset_mask_from_segment_ids,
)
from .modules import GRU, LSTM, GRUCell, LSTMCell  # noqa: E402
from .stateful import InitialState, Stateful  # noqa: E402

__version__ = description.VERSION

__all__ = [
    "GRU",
    "LSTM",
    "Conversion",
    "GRUCell",
    "InitialState",
    "LSTMCell",
    "Stateful",
    "build_info",
    "convert",
    "detach_mask_every",
    "explain",
    "from_torch",
    "functional",
    "get_backend",
    "reference",
    "reset_mask_from_cu_seqlens",
    "reset_mask_from_dones",
    "reset_mask_from_lengths",
    "reset_mask_from_segment_ids",
    "set_backend",
    "state",
    "to_torch",
    "use_backend",
]
