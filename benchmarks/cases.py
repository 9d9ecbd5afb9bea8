"""What is measured: the grid of sizes, and one problem with data for each of them."""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import hsm_kernels as hsm

Operator = Literal["LSTM", "GRU"]
Kind = Literal["step", "inference", "training"]
State = Tensor | tuple[Tensor, Tensor]

GATES: dict[Operator, int] = {"LSTM": 4, "GRU": 3}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_DTYPES = ("float32", "bfloat16")  # of the benchmark of CPUs


@dataclass(frozen=True)
class Case:
    """One row: one layer, one direction, input size = hidden size."""

    op: Operator
    kind: Kind
    length: int  # L, steps
    batch: int  # N
    hidden: int  # H, and the input size
    dtype: str
    threads: int
    device: str = "cpu"

    def __str__(self) -> str:
        """The case in words, as --only finds it."""
        size = f"L={self.length} N={self.batch} H={self.hidden}"
        return f"{self.op} {self.kind} {size} {self.dtype} {self.place}"

    @property
    def place(self) -> str:
        """Where it runs, in a word."""
        return f"x{self.threads}" if self.device == "cpu" else self.device

    @property
    def flops(self) -> int:
        """Floating point operations of the matrix multiplications alone."""
        products = 2 * GATES[self.op] * self.hidden * (self.hidden + self.hidden)
        forward = self.length * self.batch * products
        return 3 * forward if self.kind == "training" else forward

    @property
    def recurrent_weight_bytes(self) -> int:
        """The size of W_hh, and of W_ih, which has the same shape here."""
        return GATES[self.op] * self.hidden**2 * DTYPES[self.dtype].itemsize

    @property
    def streamed_bytes(self) -> int:
        """What has to be read of the weights: W_hh at each step and W_ih once, in each pass."""
        passes = 2 if self.kind == "training" else 1
        return passes * (self.length + 1) * self.recurrent_weight_bytes


@dataclass(frozen=True)
class Problem:
    """The data of a case: two modules with equal weights, an input, a state, an output gradient."""

    case: Case
    ours: nn.RNNBase
    torch_nn: nn.RNNBase
    input: Tensor
    state: State
    output_gradient: Tensor


def make_problem(case: Case, *, bidirectional: bool = False) -> Problem:
    """The problem of ``case``; equal for equal cases. Drawn where it is wanted: a large one takes a CPU seconds."""
    torch.manual_seed(0)
    there = {"device": case.device, "dtype": DTYPES[case.dtype]}
    torch_nn, ours = (
        getattr(library, case.op)(case.hidden, case.hidden, bidirectional=bidirectional, device=case.device).to(**there)
        for library in (nn, hsm)
    )

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=case.device)

    ours.load_state_dict(torch_nn.state_dict())
    for module in (ours, torch_nn):
        module.train(case.kind == "training")
    directions = 2 if bidirectional else 1
    h = draw(directions, case.batch, case.hidden).tanh().to(**there)
    return Problem(
        case=case,
        ours=ours,
        torch_nn=torch_nn,
        input=draw(case.length, case.batch, case.hidden).to(**there),
        state=(h, h.clone()) if case.op == "LSTM" else h,
        output_gradient=draw(case.length, case.batch, directions * case.hidden).to(**there),
    )


def grid(
    kind: Kind, lengths: list[int], batches: list[int], sizes: list[int], dtype: str, threads: int
) -> list[Case]:
    """All combinations, for both operators."""
    operators: tuple[Operator, ...] = ("LSTM", "GRU")
    combinations = itertools.product(operators, lengths, batches, sizes)
    return [
        Case(op, kind, length, batch, hidden, dtype, threads)
        for op, length, batch, hidden in combinations
    ]


def quick_cases(threads: int) -> list[Case]:
    """A choice from the full grid, in float32, that takes about two minutes per thread count."""
    dtype = "float32"
    return [
        *grid("step", [1], [1], [64, 128, 256, 512], dtype, threads),
        *grid("inference", [32], [1, 16, 64], [64, 256], dtype, threads),
        *grid("inference", [32], [4], [256], dtype, threads),
        *grid("inference", [32], [1, 16], [512], dtype, threads),
        *grid("inference", [256], [1, 16], [128, 256], dtype, threads),
        *grid("training", [32], [1, 16, 64], [64, 256], dtype, threads),
        *grid("training", [32], [16], [512], dtype, threads),
        *grid("training", [256], [16], [128, 256], dtype, threads),
    ]


def full_cases(threads: int) -> list[Case]:
    """The whole grid, in float32 and bfloat16."""
    lengths, batches, sizes = [32, 256], [1, 4, 16, 64], [64, 128, 256, 512, 1024]
    cases = []
    for dtype in CPU_DTYPES:
        cases += grid("step", [1], [1], sizes[:-1], dtype, threads)
        cases += grid("inference", lengths, batches, sizes, dtype, threads)
        cases += grid("training", lengths, batches, sizes, dtype, threads)
    return cases


def check_cases(threads: int) -> list[Case]:
    """Tiny sizes that touch every kind of row, for continuous integration."""
    cases = []
    for dtype in CPU_DTYPES:
        cases += grid("step", [1], [1], [16], dtype, threads)
        cases += grid("inference", [5], [1, 3], [16], dtype, threads)
        cases += grid("training", [5], [3], [16], dtype, threads)
    return cases
