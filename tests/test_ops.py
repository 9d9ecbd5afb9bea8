"""The operators against the reference: native kernels where a library is loaded, the fallback elsewhere."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close_to_reference
from torch import Tensor

import hsm_kernels as hsm
from hsm_kernels import _fallback, reference
from hsm_kernels._gradients import HiddenStates, without_padding
from hsm_kernels.reference import Weights

OPS = torch.ops.hsm_kernels
pytestmark = pytest.mark.any_device

LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Case:
    """The arguments of one forward call, drawn in float64."""

    cell: str
    steps: int = 5
    batch: int = 3
    inputs: int = 4
    hidden: int = 6
    proj_size: int = 0
    directions: int = 1
    bias: bool = True
    initial: bool = True
    resets: bool = False
    reset_state: bool = False
    detaches: bool = False
    lengths: bool = False
    recompute: bool = False
    detach_every: int = 0
    density: float = 0.3
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def __post_init__(self) -> None:
        # The same numbers on every device.
        generator, device = torch.Generator("cpu").manual_seed(self.seed), torch.get_default_device()

        def draw(*shape: int) -> Tensor:
            drawn = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
            return drawn.to(device, self.dtype).requires_grad_()

        def draw_matrix(rows: int, columns: int) -> Tensor:
            return (draw(rows, columns).detach() / columns**0.5).requires_grad_()

        out = self.proj_size or self.hidden
        rows = self.hidden * (4 if self.cell == "LSTM" else 3)
        self.weights = [
            Weights(
                draw_matrix(rows, self.inputs),
                draw_matrix(rows, out),
                draw(rows) if self.bias else None,
                draw(rows) if self.bias else None,
                draw_matrix(self.proj_size, self.hidden) if self.proj_size else None,
            )
            for _ in range(self.directions)
        ]
        self.input = draw(self.steps, self.batch, self.inputs)
        sizes = (out, self.hidden) if self.cell == "LSTM" else (out,)
        shapes = [(self.directions, self.batch, size) for size in sizes]
        none = (None,) * len(sizes)
        self.state = tuple(draw(*shape) for shape in shapes) if self.initial else none
        self.reset_to = tuple(draw(*shape) for shape in shapes) if self.resets and self.reset_state else none

        def mask(wanted: bool) -> Tensor | None:
            drawn = torch.rand(self.batch, self.steps, generator=generator, device="cpu").to(device)
            return drawn.t() < self.density if wanted else None

        self.reset_mask, self.detach_mask = mask(self.resets), mask(self.detaches)
        if self.detach_every:
            every = (torch.arange(self.steps) % self.detach_every == 0)[:, None].expand(self.steps, self.batch).clone()
            every[:1] = False
            self.detach_mask = every if self.detach_mask is None else self.detach_mask | every
        drawn = torch.randint(0, self.steps + 1, (self.batch,), generator=generator, device="cpu")
        self.length = drawn.to(device) if self.lengths else None

    @property
    def differentiable(self) -> list[Tensor]:
        tensors = [self.input, *self.state, *self.reset_to, *(w for entry in self.weights for w in entry)]
        return [tensor for tensor in tensors if tensor is not None]

    def arguments(self, training: bool = True, allow_tf32: bool = False) -> tuple[Any, ...]:
        """What the forward operator takes."""
        per_direction = 5 if self.cell == "LSTM" else 4
        flat = [tensor for entry in self.weights for tensor in entry[:per_direction]]
        flat += [None] * (2 * per_direction - len(flat))
        boundaries = (self.reset_mask, *self.reset_to, self.detach_mask, self.length)
        flags = (self.recompute, training)
        if self.cell == "LSTM":
            flags = (True, *flags)
        return (self.input, *self.state, *flat, *boundaries, self.detach_every, allow_tf32, *flags)

    def forward(self, training: bool = True, allow_tf32: bool = False) -> tuple[Tensor, ...]:
        """The operator's results, without the gates."""
        op = OPS.lstm_forward if self.cell == "LSTM" else OPS.gru_forward
        with torch.set_grad_enabled(training):
            return op(*self.arguments(training, allow_tf32))[:-1]

    def by_reference(self) -> tuple[Tensor, ...]:
        """The same by the reference, in the same order."""
        sizes = (self.proj_size or self.hidden, self.hidden)
        state = [
            _fallback.initial_or_zeros(part, self.input, self.directions, size)
            for part, size in zip(self.state, sizes, strict=False)
        ]
        if self.cell == "LSTM":
            boundaries = _fallback.lstm_boundaries(
                self.directions, self.reset_mask, *self.reset_to, self.detach_mask, self.length
            )
            return reference.lstm_layer(self.input, *state, self.weights, boundaries)
        boundaries = _fallback.gru_boundaries(
            self.directions, self.reset_mask, *self.reset_to, self.detach_mask, self.length
        )
        return reference.gru_layer(self.input, *state, self.weights, boundaries)

    def in_dtype(self, dtype: torch.dtype) -> "Case":
        """The same numbers, rounded to this case's dtype, in another one."""
        other = Case(**{name: getattr(self, name) for name in FIELDS})

        def convert(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

        other.input = self.input.detach().to(dtype).requires_grad_()
        other.state = tuple(map(convert, self.state))
        other.reset_to = tuple(map(convert, self.reset_to))
        other.weights = [Weights(*map(convert, entry)) for entry in self.weights]  # type: ignore[arg-type]
        return other

    def upstream(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Drawn gradients of ``outputs``."""
        generator = torch.Generator("cpu").manual_seed(self.seed + 1)
        drawn = (torch.randn(o.shape, dtype=torch.float64, generator=generator, device="cpu") for o in outputs)
        return [numbers.to(o) for numbers, o in zip(drawn, outputs, strict=True)]

    def gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of everything differentiable, for drawn gradients of all ``outputs``."""
        pairs = [(o, g) for o, g in zip(outputs, self.upstream(outputs), strict=True) if o.requires_grad]
        if not pairs:  # no steps and no state: nothing depends on anything
            return tuple(torch.zeros_like(tensor) for tensor in self.differentiable)
        return torch.autograd.grad(
            [o for o, _ in pairs], self.differentiable, [g for _, g in pairs], materialize_grads=True
        )


FIELDS = [entry.name for entry in fields(Case)]


@st.composite
def cases(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype]) -> Case:
    """Odd sizes around the widths of vectors and tiles, every flag, short and long."""
    cell = draw(st.sampled_from(["LSTM", "GRU"]))
    hidden = draw(st.integers(1, 37))
    projects = cell == "LSTM" and hidden > 1 and draw(st.booleans())
    return Case(
        cell,
        steps=draw(st.integers(0, 6)),
        batch=draw(st.integers(0, 15)),
        inputs=draw(st.integers(1, 9)),
        hidden=hidden,
        proj_size=draw(st.integers(1, hidden - 1)) if projects else 0,
        directions=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        initial=draw(st.booleans()),
        resets=draw(st.booleans()),
        reset_state=draw(st.booleans()),
        detaches=draw(st.booleans()),
        lengths=draw(st.booleans()),
        recompute=draw(st.booleans()),
        dtype=draw(dtypes),
        seed=draw(st.integers(0, 2**20)),
    )


@given(cases(st.just(torch.float64)))
def test_float64_equals_the_reference(poisoned_memory: None, case: Case) -> None:
    """Values and every gradient; what a kernel forgets to write, or reads too early, is NaN."""
    ours, wanted = case.forward(), case.by_reference()
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(case.gradients(ours), case.gradients(wanted), rtol=1e-9, atol=1e-9)


def assert_as_accurate_as_the_reference(case: Case) -> None:
    """Results and gradients against float64, with the reference's own error in the case's dtype as the allowance."""
    exact = case.in_dtype(torch.float64)
    ours, low, wanted = case.forward(), case.by_reference(), exact.by_reference()
    for k in range(len(wanted)):
        assert_close_to_reference(ours[k], wanted[k], low[k], f"result {k}")
    grads = case.gradients(ours), exact.gradients(wanted), case.gradients(low)
    for k, (ours_k, wanted_k, low_k) in enumerate(zip(*grads, strict=True)):
        assert_close_to_reference(ours_k, wanted_k, low_k, f"gradient {k}")


@given(cases(st.sampled_from(LOW_PRECISION)))
def test_other_dtypes_are_as_accurate_as_the_reference(poisoned_memory: None, case: Case) -> None:
    """Against float64 on the same numbers, with the reference's own error in the dtype as the allowance."""
    assert_as_accurate_as_the_reference(case)


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["resets", "detaches", "both"])
@pytest.mark.parametrize("cell, proj_size", [("LSTM", 0), ("LSTM", 3), ("GRU", 0)])
def test_many_segments(poisoned_memory: None, cell: str, proj_size: int, kind: str, density: float) -> None:
    """More segments than slots: every slot goes from one segment to the next, which begins elsewhere."""
    for seed, (steps, batch, directions) in enumerate([(200, 1, 1), (60, 3, 2), (25, 50, 1)]):
        for options in ({}, {"lengths": True, "reset_state": True}, {"recompute": True, "lengths": True}):
            case = Case(
                cell, steps, batch, hidden=5, proj_size=proj_size, directions=directions, density=density, seed=seed,
                resets=kind != "detaches", detaches=kind != "resets", **options,
            )  # fmt: skip
            ours, wanted = case.forward(), case.by_reference()
            torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(case.gradients(ours), case.gradients(wanted), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(70, 20), (3, 700)], ids=["rounds", "sequences"])
@pytest.mark.parametrize("cell, proj_size", [("LSTM", 0), ("LSTM", 3), ("GRU", 0)])
def test_many_chunks(poisoned_memory: None, cell: str, proj_size: int, shape: tuple[int, int]) -> None:
    """More rounds, or more sequences, than the native kernels project the input of at once."""
    for options in ({"directions": 2}, {"lengths": True}, {"directions": 2, "lengths": True, "resets": True}):
        case = Case(cell, *shape, hidden=18, proj_size=proj_size, density=0.05, **options)
        ours, wanted = case.forward(), case.by_reference()
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(case.gradients(ours), case.gradients(wanted), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell, proj_size", [("LSTM", 0), ("LSTM", 66), ("GRU", 0)])
def test_backward_chunks(
    poisoned_memory: None, cell: str, proj_size: int, directions: int, initial: bool, recompute: bool
) -> None:
    """So many steps that the backward pass goes through the products in several pieces, the last a smaller one."""
    for cuts in ({}, {"detaches": True}, {"resets": True, "reset_state": initial, "detaches": True}):
        case = Case(
            cell, 70, 20, 70, hidden=130, proj_size=proj_size, directions=directions, initial=initial,
            recompute=recompute, density=0.05, **cuts,
        )  # fmt: skip
        ours, wanted = case.forward(), case.by_reference()
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(case.gradients(ours), case.gradients(wanted), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_gradients_of_a_part(cell: str) -> None:
    """What is not asked for is not computed, and what is asked for does not change."""
    case = Case(cell, directions=2)
    wanted = case.gradients(case.forward())
    for tensor, gradient in zip(case.differentiable, wanted, strict=True):
        for other in case.differentiable:
            other.requires_grad_(other is tensor)
        outputs = case.forward()
        pairs = [(o, g) for o, g in zip(outputs, case.upstream(outputs), strict=True) if o.requires_grad]
        (found,) = torch.autograd.grad([o for o, _ in pairs], tensor, [g for _, g in pairs])
        torch.testing.assert_close(found, gradient, rtol=0, atol=0)


def case_of(cell: str, shape: tuple[int, ...], **options: Any) -> Case:
    """``shape``: (steps, batch, inputs, hidden, proj_size, directions); a GRU has no projection."""
    steps, batch, inputs, hidden, proj_size, directions = shape
    return Case(cell, steps, batch, inputs, hidden, proj_size if cell == "LSTM" else 0, directions, **options)


# (steps, batch, inputs, hidden, proj_size, directions). Kernels that work with pairs of numbers fill odd sizes up.
PAIRS = {
    "one unit": (4, 2, 1, 1, 0, 1),
    "even": (5, 7, 34, 66, 0, 2),
    "odd": (5, 7, 33, 35, 0, 2),
    "projected": (4, 9, 3, 39, 21, 2),
    "one step, few rows": (1, 2, 67, 129, 0, 2),
    "one step, large weights": (1, 4, 263, 257, 0, 1),
    "one step, projected": (1, 1, 5, 71, 35, 1),
    "one step, many rows": (1, 20, 33, 35, 0, 1),
    "several chunks": (40, 20, 5, 49, 0, 1),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", PAIRS)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_half_precision_shapes(poisoned_memory: None, cell: str, shape: str, dtype: torch.dtype) -> None:
    """Every way through the native kernels, with sizes that do and do not fill the vectors that they work with."""
    case = case_of(cell, PAIRS[shape], bias=PAIRS[shape][1] != 7, resets=True, reset_state=True, dtype=dtype)
    assert_as_accurate_as_the_reference(case)


@pytest.mark.parametrize("cell, proj_size", [("LSTM", 0), ("LSTM", 3), ("GRU", 0)])
def test_nothing_is_read_behind_the_weights(cell: str, proj_size: int) -> None:
    """An odd number of rows or columns is filled up with zero, not with what happens to lie there."""
    case = Case(cell, hidden=7, proj_size=proj_size, dtype=torch.bfloat16)

    def before_nan(w: Tensor | None) -> Tensor | None:
        return None if w is None else torch.cat((w, torch.full_like(w, torch.nan)))[: len(w)].detach().requires_grad_()

    outputs = case.forward()
    grads = case.gradients(outputs)
    case.weights = [Weights(*map(before_nan, entry)) for entry in case.weights]  # type: ignore[arg-type]
    again = case.forward()
    torch.testing.assert_close(again, outputs, rtol=0, atol=0)
    torch.testing.assert_close(case.gradients(again), grads, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell, proj_size", [("LSTM", 0), ("LSTM", 3), ("GRU", 0)])
def test_infinite_input_saturates(cell: str, proj_size: int, dtype: torch.dtype) -> None:
    """Infinity times the zeros that fill up a vector is NaN, which must not reach the units."""
    case = Case(cell, steps=4, hidden=7, inputs=5, proj_size=proj_size, dtype=dtype)
    with torch.no_grad():
        case.input[0, 0, 0] = torch.inf
        ours, low, wanted = case.forward(), case.by_reference(), case.in_dtype(torch.float64).by_reference()
    for k in range(len(wanted)):
        assert wanted[k].isfinite().all()
        assert_close_to_reference(ours[k], wanted[k], low[k], f"result {k}")


@pytest.mark.cpu  # cuBLAS may sum in another order where there are more rows
@pytest.mark.requires_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_calls_give_the_bits_of_one(dtype: torch.dtype) -> None:
    """What a GRU hands on between steps is what it returns, rounded to the dtype."""
    case = Case("GRU", steps=7, batch=7, inputs=9, hidden=37, dtype=dtype)
    output, h_n = case.forward()
    whole = case.input
    case.input = whole[:3]
    first, *case.state = case.forward()
    case.input = whole[3:]
    second, last = case.forward()
    torch.testing.assert_close((torch.cat((first, second)), last), (output, h_n), rtol=0, atol=0)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_input_of_any_strides(poisoned_memory: None, cell: str) -> None:
    case = Case(cell, steps=6, batch=5, inputs=7)
    wanted = case.forward()
    exact = {"rtol": 0, "atol": 0} if hsm.build_info().loaded else {"rtol": 1e-12, "atol": 1e-12}  # torch's products
    for view in (case.input.transpose(0, 1).contiguous().transpose(0, 1), case.input.mT.contiguous().mT):
        case.input = view
        torch.testing.assert_close(case.forward(), wanted, **exact)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_recomputation_keeps_no_gates(cell: str) -> None:
    op = OPS.lstm_forward if cell == "LSTM" else OPS.gru_forward
    kept, dropped = (op(*Case(cell, recompute=recompute).arguments()) for recompute in (False, True))
    assert kept[-1].shape == (5, 3, 1, 24)
    assert dropped[-1].shape == (0,)
    torch.testing.assert_close(kept[:-1], dropped[:-1], rtol=0, atol=0)


LARGE = {
    "unit groups": {"hidden": 150, "batch": 2, "steps": 40},
    "batch groups": {"hidden": 70, "batch": 40, "steps": 20},
    "projection": {"hidden": 130, "proj_size": 70, "batch": 5, "steps": 30, "cell": "LSTM"},
}


@pytest.mark.cpu
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_threads_give_the_same_bits(cell: str, directions: int, name: str) -> None:
    """Large enough to be cut between threads, by units or by sequences; more threads than cores must not hang."""
    options = {"cell": cell, **LARGE[name]}
    case = Case(**options, directions=directions, resets=True, lengths=True, detaches=True, dtype=torch.float32)  # type: ignore[arg-type]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs = case.forward()
            grads = case.gradients(outputs)
            results.append((outputs, grads))
    finally:
        torch.set_num_threads(before)
    # The fallback's products are torch's, whose bits depend on the threads on some CPUs (MKL on AMD).
    exact = {"rtol": 0, "atol": 0} if hsm.build_info().loaded else {"rtol": 1e-5, "atol": 1e-6}
    for outputs, grads in results[1:]:
        torch.testing.assert_close(outputs, results[0][0], **exact)
        torch.testing.assert_close(grads, results[0][1], rtol=1e-4, atol=1e-4)
    wanted = case.in_dtype(torch.float64).by_reference()
    torch.testing.assert_close(results[0][0], tuple(w.float() for w in wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.cpu
@pytest.mark.requires_library
def test_callers_at_once_have_memory_of_their_own() -> None:
    """More threads of Python than there are kept workspaces for; a thread's serves calls of other sizes, too."""
    callers, calls, before = 12, 100, torch.get_num_threads()
    # 8 MB of weights, and 50 KB.
    large, small = (hsm.LSTM(hidden, hidden).requires_grad_(False) for hidden in (512, 40))
    inputs = [(torch.randn(40, 4, 512), torch.randn(40, 4, 40)) for _ in range(callers)]
    together = threading.Barrier(callers)

    def call(caller: int) -> list[Tensor]:
        together.wait()
        x, y = inputs[caller]
        first = small(y)[0]  # and what it left has to grow
        return [large(x)[0], first, *(small(y)[0] for _ in range(calls - 1))]

    torch.set_num_threads(1)
    try:
        wanted = [(large(x)[0], small(y)[0]) for x, y in inputs]
        with ThreadPoolExecutor(callers) as pool:
            found = list(pool.map(call, range(callers)))
    finally:
        torch.set_num_threads(before)
    for (of_large, *of_small), (wanted_large, wanted_small) in zip(found, wanted, strict=True):
        torch.testing.assert_close(of_large, wanted_large, rtol=0, atol=0)
        torch.testing.assert_close(of_small, [wanted_small] * calls, rtol=0, atol=0)


@pytest.mark.cpu
@pytest.mark.requires_library
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_threads_give_the_same_bits_in_bfloat16(cell: str, name: str) -> None:
    case = Case(**{"cell": cell, **LARGE[name]}, directions=2, resets=True, lengths=True, dtype=torch.bfloat16)  # type: ignore[arg-type]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs = case.forward()
            # Of the states only: the other gradients are torch's products, whose bits may depend on the threads.
            of_states = case.gradients(outputs)[1 : 1 + len(case.state) + len(case.reset_to)]
            results.append((outputs, of_states))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


# (steps, batch, inputs, hidden, proj_size, directions): few enough rows for their weights to be read as they lie.
FEW_ROWS = {
    "one row": (1, 1, 5, 71, 0, 2),
    "one row at a time": (9, 1, 30, 120, 0, 2),
    "the input's packed": (8, 1, 3, 120, 0, 1),
    "the state's packed": (2, 4, 147, 20, 0, 1),
    "two rows": (1, 2, 129, 67, 0, 2),
    "several steps": (3, 3, 180, 183, 0, 1),
    "several tiles": (1, 14, 270, 259, 0, 1),
    "projected": (2, 2, 75, 80, 74, 2),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", FEW_ROWS)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_few_rows_without_gradients(poisoned_memory: None, cell: str, shape: str, dtype: torch.dtype) -> None:
    """Short calls take a way of their own through the native kernels, whose sums run in another order."""
    case = case_of(cell, FEW_ROWS[shape], resets=FEW_ROWS[shape][0] > 1, reset_state=True, dtype=dtype)
    ours, wanted = case.forward(training=False), case.in_dtype(torch.float64).by_reference()
    if dtype == torch.float64:
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
        return
    low = case.by_reference()
    for k in range(len(wanted)):
        assert_close_to_reference(ours[k], wanted[k], low[k], f"result {k}")


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_one_step_equals_many(device: torch.device, cell: str) -> None:
    """Single steps give what one call gives, in training on the CPU to the bit."""
    case = Case(cell, steps=6, batch=4, hidden=37, inputs=41, resets=True, reset_state=True)
    output, *final = case.forward()[:3] if cell == "LSTM" else case.forward()
    whole = (case.input, case.reset_mask, case.state)
    steps = []
    for t in range(6):
        case.input, case.reset_mask = whole[0][t : t + 1], whole[1][t : t + 1]
        step, *state = case.forward()[:3] if cell == "LSTM" else case.forward()
        case.state = tuple(state)
        steps.append(step)
    exact = {"rtol": 0, "atol": 0} if hsm.build_info().loaded and device.type == "cpu" else {}
    torch.testing.assert_close(torch.cat(steps), output, **exact)
    torch.testing.assert_close(list(case.state), final, **exact)


# Of a forward operator's arguments and results, then of a backward operator's: those of which one step leaves
# dimensions out.
SHORTENED = {
    "LSTM": ((0, 1, 2), (1, 2), (1, 2, 4, 5, 6), (0, 2, 3)),
    "GRU": ((0, 1), (1,), (1, 2, 3), (0, 1)),
}


def shortened(tensors: Any, positions: tuple[int, ...]) -> list[Any]:
    """Leaves without their first dimension at ``positions``."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().squeeze(0).requires_grad_(tensor.requires_grad)

    return [leaf(t) if k in positions and isinstance(t, Tensor) else t for k, t in enumerate(tensors)]


STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias, no state": {"bias": False, "initial": False},
    "resets": {"resets": True, "reset_state": True},
    "recomputed": {"recompute": True},
}


@pytest.mark.parametrize("flags", STEPS)
@pytest.mark.parametrize("cell, proj_size", [("LSTM", 0), ("LSTM", 3), ("GRU", 0)])
def test_one_step_without_dimensions(poisoned_memory: None, cell: str, proj_size: int, flags: str) -> None:
    """Those of steps and directions: they change no result, no gradient and no second one."""
    case = Case(cell, steps=1, proj_size=proj_size, **STEPS[flags])
    of_arguments, of_results, *of_backward = SHORTENED[cell]
    forward, backward = (getattr(OPS, f"{cell.lower()}_{name}").default for name in ("forward", "backward"))
    given = case.arguments(), shortened(case.arguments(), of_arguments)
    wanted, found = (forward(*arguments) for arguments in given)
    torch.testing.assert_close([*found], shortened(wanted, of_results), rtol=0, atol=0)
    gradients = []
    for arguments, results in zip(given, (wanted, found), strict=True):
        loss = sum((result.square().sum() for result in results[:-1]), torch.zeros(()))
        leaves = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(t.sum() for t in first), leaves)
        again = torch.autograd.grad(sum(result.sum() for result in forward(*arguments)[:-1]), leaves)
        gradients.append([t.reshape(-1) for t in (*first, *second, *again)])
    torch.testing.assert_close(*gradients)

    with torch.no_grad():
        whole = backward_arguments(case)
        short = shortened(whole, of_backward[0])
        torch.testing.assert_close([*backward(*short)], shortened(backward(*whole), of_backward[1]), rtol=0, atol=0)


@pytest.mark.requires_library
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("sizes", [{"steps": 2}, {"directions": 2, "steps": 1}], ids=str)
def test_only_one_step_goes_without_dimensions(cell: str, sizes: dict[str, int]) -> None:
    """More of them would read behind the input."""
    arguments = [*backward_arguments(Case(cell, **sizes))]  # type: ignore[arg-type]
    at = 4 if cell == "LSTM" else 2
    arguments[at] = arguments[at][0]
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"must have shape \("):
        getattr(OPS, f"{cell.lower()}_backward")(*arguments)
    forward = [*Case(cell, directions=2).arguments(training=False)]
    forward[0] = forward[0][0]
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"must have shape \("):
        getattr(OPS, f"{cell.lower()}_forward")(*forward)


FLAGS = {
    "plain": {},
    "no bias, no state": {"bias": False, "initial": False},
    "two directions": {"directions": 2},
    "boundaries": {"resets": True, "reset_state": True, "detaches": True, "lengths": True, "directions": 2},
    "recomputed": {"recompute": True, "resets": True, "lengths": True, "directions": 2},
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("cell, proj_size", [("LSTM", 0), ("LSTM", 3), ("GRU", 0)])
def test_opcheck(cell: str, proj_size: int, flags: str) -> None:
    """Schema, fake kernel, autograd registration and tracing, of the forward and the backward operator."""
    case = Case(cell, proj_size=proj_size, **FLAGS[flags])  # type: ignore[arg-type]
    name = cell.lower()
    torch.library.opcheck(getattr(OPS, f"{name}_forward").default, case.arguments())
    torch.library.opcheck(getattr(OPS, f"{name}_backward").default, backward_arguments(case))


@pytest.mark.parametrize("flags", STEPS)
@pytest.mark.parametrize("cell, proj_size", [("LSTM", 0), ("LSTM", 3), ("GRU", 0)])
def test_opcheck_without_dimensions(cell: str, proj_size: int, flags: str) -> None:
    case = Case(cell, steps=1, proj_size=proj_size, **STEPS[flags])
    forward, _, backward, _ = SHORTENED[cell]
    name = cell.lower()
    torch.library.opcheck(getattr(OPS, f"{name}_forward").default, tuple(shortened(case.arguments(), forward)))
    arguments = shortened(backward_arguments(case), backward)
    torch.library.opcheck(getattr(OPS, f"{name}_backward").default, tuple(arguments))


def backward_arguments(case: Case) -> tuple[Any, ...]:
    """What the backward operator takes after the forward pass of ``case``."""
    op = OPS.lstm_forward if case.cell == "LSTM" else OPS.gru_forward
    with torch.no_grad():
        output, *rest = op(*case.arguments())
    per_direction = 5 if case.cell == "LSTM" else 4
    weights = [None if w is None else w.detach() for entry in case.weights for w in entry[:per_direction]]
    weights += [None] * (2 * per_direction - len(weights))
    state = [None if part is None else part.detach() for part in case.state]
    reset = [None if part is None else part.detach() for part in case.reset_to]
    states = HiddenStates(output, state[0], case.directions, case.reset_mask, reset[0], case.length)
    entering = torch.stack(states.entering) if states.cut else None
    input, gates = without_padding(case.input.detach(), case.length), None if case.recompute else rest[-1]
    if case.cell == "LSTM":
        h_n, c_n, c_states, _ = rest
        grads = [torch.randn_like(t) for t in (output, h_n, c_n, c_states)]
        kept, boundaries = (output, c_states), (case.reset_mask, reset[1], case.detach_mask, case.length)
    else:
        h_n, _ = rest
        grads = [torch.randn_like(t) for t in (output, h_n)]
        kept, boundaries = (output,), (case.reset_mask, reset[0], case.detach_mask, case.length)
    hints = (case.detach_every, False)
    return (*grads, input, *state, *kept, gates, entering, *weights, *boundaries, *hints, True, 1)


SAMPLES: dict[str, dict[str, Any]] = {
    **FLAGS,
    "rows enough for a product of our own": {"hidden": 50, "steps": 3},
    "no steps": {"steps": 0},
    "one step": {"steps": 1, "resets": True},
}


@pytest.mark.parametrize("samples", [2, 8])
@pytest.mark.parametrize("flags", SAMPLES)
@pytest.mark.parametrize("cell, proj_size", [("LSTM", 0), ("LSTM", 3), ("GRU", 0)])
def test_gradients_of_samples(poisoned_memory: None, cell: str, proj_size: int, flags: str, samples: int) -> None:
    case = Case(cell, batch=8, proj_size=proj_size, **SAMPLES[flags])
    assert_gradients_of_samples(case, samples)
    op, *arguments, _ = getattr(OPS, f"{cell.lower()}_backward").default, *backward_arguments(case)
    torch.library.opcheck(op, (*arguments, samples))


def assert_gradients_of_samples(case: Case, samples: int) -> None:
    """Of each sample as of a call with its sequences alone."""
    op, *arguments, _ = getattr(OPS, f"{case.cell.lower()}_backward").default, *backward_arguments(case)
    of_weights = 6
    found, together = op(*arguments, samples), op(*arguments, 1)
    torch.testing.assert_close(found[:-of_weights], together[:-of_weights])
    for k in range(samples):
        alone = [sequences_of(argument, samples, k, case) for argument in arguments]
        wanted = op(*alone, 1)[-of_weights:]
        torch.testing.assert_close([grad[k] if grad.numel() else grad for grad in found[-of_weights:]], [*wanted])


def sequences_of(argument: Any, samples: int, k: int, case: Case) -> Any:
    """What sample ``k`` has of an operator's argument."""
    if not isinstance(argument, Tensor) or case.batch not in argument.shape:
        return argument
    return argument.chunk(samples, dim=argument.shape.index(case.batch))[k]


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_samples_without_sequences(cell: str) -> None:
    *arguments, _ = backward_arguments(Case(cell, batch=0))
    *_, grad_ih, grad_hh, grad_bias, _, _, _ = getattr(OPS, f"{cell.lower()}_backward")(*arguments, 2)
    for grad in (grad_ih, grad_hh, grad_bias):
        torch.testing.assert_close(grad, torch.zeros_like(grad))
        assert len(grad) == 2


@pytest.mark.cpu
@pytest.mark.parametrize("samples", [4, -1])
def test_samples_that_are_no_part_of_the_batch(samples: int) -> None:
    *arguments, _ = backward_arguments(Case("GRU", batch=6))
    words = f"samples must be a divisor of N = 6, got {samples}" if hsm.build_info().loaded else "shape"
    with pytest.raises(RuntimeError, match=words):
        OPS.gru_backward(*arguments, samples)


SHAPES = [(0, 3, 2), (70, 0, 2), (70, 3, 0), (1, 1, 1), (7, 300, 65), (130, 5, 200), (64, 1025, 33), (71, 520, 65)]


@pytest.mark.cpu  # elsewhere it is torch's, which may sum in 16 bits
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("shape", SHAPES)
def test_product(poisoned_memory: None, shape: tuple[int, int, int], order: str, dtype: torch.dtype) -> None:
    """Odd sizes around tiles, blocks and chunks, of matrices laid out by rows and by columns, and of a strided part."""
    rows, depth, columns = shape

    def matrix(height: int, width: int) -> Tensor:
        drawn = torch.randn(height, width + 3, dtype=torch.float64).to(dtype)[:, :width]
        return drawn if order == "row" else drawn.t().contiguous().t()

    a, b = matrix(rows, depth), matrix(depth, columns)
    got, wanted = OPS.product(a, b), a.double() @ b.double()
    assert got.dtype == dtype
    # Rounding of every term's sum, in float32 or better, and of the result.
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    sums = 2 * eps * (1 + depth**0.5) * (a.double().abs() @ b.double().abs())
    assert ((got.double() - wanted).abs() <= sums + torch.finfo(dtype).eps * wanted.abs()).all()


@pytest.mark.cpu
@pytest.mark.requires_library
@pytest.mark.parametrize("choice", ["own", "torch"])
def test_products_of_either_kind(choice: str) -> None:
    """The product that this machine would not choose passes the same tests."""
    if os.environ.get("HSM_KERNELS_CPU_PRODUCT"):
        pytest.skip("already runs with a chosen product")
    environment = {**os.environ, "HSM_KERNELS_CPU_PRODUCT": choice}
    chosen = "test_product and not kind or float64 or many_segments or backward_chunks"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", chosen, "-p", "no:cacheprovider"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_gradgradcheck(cell: str) -> None:
    case = Case(cell, steps=3, batch=2, hidden=3, resets=True, reset_state=True, lengths=True)
    tensors = case.differentiable

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        case.input, *rest = values
        parts = len(case.state)
        case.state, case.reset_to = tuple(rest[:parts]), tuple(rest[parts : 2 * parts])
        case.weights = [Weights(*rest[2 * parts :])]
        return case.forward()

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_backward_operators_can_be_differentiated(cell: str) -> None:
    first, *others = backward_arguments(Case(cell, steps=3, batch=2, inputs=2, hidden=3))
    op = getattr(OPS, f"{cell.lower()}_backward")
    assert torch.autograd.gradcheck(lambda grad_output: op(grad_output, *others)[0], first.requires_grad_())


def test_a_call_without_training_refuses_gradients() -> None:
    with pytest.raises(RuntimeError, match="training=True"):
        OPS.gru_forward(*Case("GRU").arguments(training=False))


@pytest.mark.requires_library
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("what", ["weight_ih", "weight_hh", "h_0", "reset_mask", "lengths"])
def test_the_native_kernels_guard_their_memory(cell: str, what: str) -> None:
    """Python checks first, with better words; this is what stands between a bug there and foreign memory."""
    case = Case(cell, resets=True, lengths=True)
    if what == "h_0":
        case.state = (torch.randn(1, 1, 6, dtype=torch.float64), *case.state[1:])
    elif what == "reset_mask":
        case.reset_mask = case.reset_mask[1:]
    elif what == "lengths":
        case.length = case.length[1:]
    else:
        case.weights = [case.weights[0]._replace(**{what: torch.randn(7, 2, dtype=torch.float64)})]
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"{what} must have shape"):
        case.forward()


def cpu_flags() -> set[str]:
    """What Linux says that the CPU can do."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


@pytest.mark.cpu
@pytest.mark.requires_library
@pytest.mark.parametrize("instruction_set", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_instruction_sets(instruction_set: str) -> None:
    """The kernels that this machine would not choose pass the same tests."""
    if os.environ.get("HSM_KERNELS_CPU_ISA"):
        pytest.skip("already runs with a chosen instruction set")
    if instruction_set == "avx512" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("the CPU has no AVX-512")
    if instruction_set == "avx512_bf16" and "amx_bf16" not in cpu_flags():
        pytest.skip("the CPU has no AVX512_BF16, or nothing better")
    chosen = "equals_the_reference or other_dtypes or half_precision or infinite or threads or one_step or few_rows"
    chosen += " or segments or chunks"
    environment = {**os.environ, "HSM_KERNELS_CPU_ISA": instruction_set}
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", chosen, "-p", "no:cacheprovider"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_lengths_beyond_the_end_read_no_mask_there(cell: str) -> None:
    """Where the host does not check lengths (torch.compile), too large ones count as L; behind the mask stands True."""
    case = Case(cell, directions=2)
    larger = torch.ones(case.steps + 2, case.batch, dtype=torch.bool)
    larger[: case.steps] = False
    case.reset_mask = larger[: case.steps]
    case.length = torch.full((case.batch,), case.steps)
    wanted = case.forward()
    case.length = case.length + 2
    torch.testing.assert_close(case.forward(), wanted, rtol=0, atol=0)


@pytest.mark.cpu
@pytest.mark.requires_library
@pytest.mark.parametrize(
    "variable, value, wanted",
    [
        ("HSM_KERNELS_CPU_ISA", "avx1024", "must be portable"),
        ("HSM_KERNELS_CPU_PRODUCT", "mkl", "must be own or torch"),
    ],
)
def test_unknown_choice_of_kernels_is_an_error(variable: str, value: str, wanted: str) -> None:
    code = "import hsm_kernels, torch; torch.ops.hsm_kernels.product(torch.zeros(70, 1), torch.zeros(1, 64))"
    environment = {**os.environ, variable: value}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert f"{variable} {wanted}" in run.stderr
    assert value in run.stderr


@pytest.mark.cpu
def test_library_is_what_the_dispatcher_says() -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key("hsm_kernels::lstm_forward", "CPU")
    assert registered == hsm.build_info().loaded


def activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(x) and tanh(x) as the kernels compute them: the gates of an LSTM whose bias is ``x``."""
    hidden, zero = x.numel(), torch.zeros(1, 1, 1)
    weights = (torch.zeros(4 * hidden, 1), torch.zeros(4 * hidden, hidden))
    none = (None,) * 12
    gates = OPS.lstm_forward(zero, None, None, *weights, x.repeat(4), *none, 0, False, False, False, True)[4].flatten()
    return gates[:hidden], gates[2 * hidden : 3 * hidden]


@pytest.mark.parametrize("sign", [1, -1])
def test_activations_are_accurate_over_every_exponent(sign: int) -> None:
    """Errors in units of the last place; sigmoid may lose relative accuracy only below 1e-37, where it underflows."""
    mantissas = 1 + torch.arange(8) / 8
    x = sign * torch.cat([torch.ldexp(mantissas, torch.tensor(e)) for e in range(-120, 8)])
    x = torch.cat([x, sign * torch.linspace(0, 30, 1001)])
    sigmoid, tanh = activations(x)
    for ours, wanted in ((sigmoid, x.double().sigmoid()), (tanh, x.double().tanh())):
        ulp = torch.finfo(torch.float32).eps * torch.ldexp(torch.ones_like(wanted), torch.frexp(wanted).exponent - 1)
        error = (ours.double() - wanted).abs() / ulp
        normal = wanted.abs() > 1e-37
        assert error[normal].max() <= 3
        assert ours[~normal].abs().sum() <= 1e-36


def test_activations_of_special_values() -> None:
    infinity = float("inf")
    sigmoid, tanh = activations(torch.tensor([infinity, -infinity, float("nan"), 0.0, 1e30, -1e30]))
    expected = torch.tensor([1.0, 0.0, float("nan"), 0.5, 1.0, 0.0])
    torch.testing.assert_close(sigmoid, expected, equal_nan=True, rtol=0, atol=1e-37)
    expected = torch.tensor([1.0, -1.0, float("nan"), 0.0, 1.0, -1.0])
    torch.testing.assert_close(tanh, expected, equal_nan=True, rtol=0, atol=0)
