"""The operators of hsm_kernels by the CUDA kernels and their binding, compiled for the simulator."""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from simulator import ROOT, Build, Library
from test_ops import Case

from hsm_kernels import _ops

CUDA_SOURCES = tuple(
    sorted(
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.cu", "*.cpp")
        for path in (ROOT / "csrc" / "cuda").glob(pattern)
    )
)
BINDING_SOURCES = (
    "csrc/binding/lstm_ops.cpp",
    "csrc/binding/gru_ops.cpp",
    "csrc/binding/cuda/cublas.cpp",
    "csrc/binding/cuda/device.cpp",
    "csrc/binding/cuda/explain_ops.cpp",
    "tests/sim/torch_on_cpu.cpp",
)
NAMES = ("lstm_forward", "lstm_backward", "gru_forward", "gru_backward")

BUILD = Build(CUDA_SOURCES, torch_sources=BINDING_SOURCES)
_ONE_TO_SIX_ROUNDS = "persistent_input_product_bytes = 1 << 17"
_LITTLE_ROOM = [
    ("csrc/cuda/passes.h", "int64_t{32} << 20", "1024"),
    ("csrc/cuda/passes.h", "persistent_input_product_bytes = int64_t{128} << 20", _ONE_TO_SIX_ROUNDS),
    ("csrc/cuda/passes.h", "int64_t{128} << 20", "1024"),
    ("csrc/cuda/cluster.h", "(column_tiles == 1 ? 8 : 5) - (cell == CellKind::gru)", "1"),
    ("csrc/cuda/plan.cpp", "<= device.multiprocessors", "<= device.multiprocessors / 8"),
    ("csrc/cuda/plan.cpp", "(device.multiprocessors / (", "(device.multiprocessors / 16 / ("),
]
#: The same with so little memory for products over many steps that both passes go through every call in pieces.
#: Persistent kernels have little room there, too: few weights in registers, and so few multiprocessors that a block
#: takes many sequences, and a slot many segments.
IN_PIECES = BUILD
for _change in _LITTLE_ROOM:
    IN_PIECES = IN_PIECES.patched(*_change)

_numbers = itertools.count()


def register(library: Library) -> torch.library.Library:
    """The operators of a library in a namespace of their own, ``ns`` of the result."""
    name = f"hsm_kernels_simulator_{next(_numbers)}"
    operators = torch.library.Library(name, "DEF")
    for operator in NAMES:
        operators.define(operator + _ops._SCHEMAS[operator])
    operators.define("explain_recurrence" + _ops._EXPLAIN_SCHEMAS["explain_recurrence"])
    library.sim_register_operators(name.encode())
    return operators


def recurrence(
    operators: torch.library.Library, case: Case, backward: bool = False, allow_tf32: bool = False
) -> str:
    """How that of a case would run, in words."""
    op = getattr(torch.ops, operators.ns).explain_recurrence
    kind = (case.cell == "LSTM", case.proj_size > 0, case.directions == 2)
    masks = (case.reset_mask, case.length, case.detach_mask if backward else None)
    cuts = any(mask is not None for mask in masks)
    return bytes(op(case.input, case.weights[0].weight_hh, *kind, backward, cuts, allow_tf32).tolist()).decode()


@contextmanager
def simulated(operators: torch.library.Library) -> Iterator[None]:
    """Calls on CPU tensors run these operators."""
    ours = torch.library.Library(_ops.NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for name in NAMES:
            ours.impl(name, getattr(getattr(torch.ops, operators.ns), name).default, "CPU")
    try:
        yield
    finally:
        ours._destroy()
