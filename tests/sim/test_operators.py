"""What the CUDA operators do beside their kernels, on the simulator: cuBLAS, and errors in mid-call."""

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from build_helpers import needs_compiler
from layer_cases import assert_right
from operators import BUILD, register, simulated
from rnn_helpers import SEQUENCE_CELLS, assert_same_bits
from simulator import Library
from test_ops import Case
from torch import Tensor

import hsm_kernels as hsm

pytestmark = [needs_compiler, pytest.mark.usefixtures("poisoned_memory")]
every_cell = pytest.mark.parametrize("cell", SEQUENCE_CELLS)

FULL = "CUDA out of memory. Tried to allocate 20.00 MiB."
LOST = "CUDA error: an illegal memory access was encountered"


@pytest.fixture(scope="module")
def library() -> Library:
    return BUILD.load()


@pytest.fixture(autouse=True)
def simulator(library: Library, operators: torch.library.Library) -> Iterator[Library]:
    library.set_seed(0)
    with simulated(operators):
        yield library
    library.sim_fail_allocation(-1, b"")
    library.sim_fail_launch(0)


def step(cell: str) -> Callable[[], list[Tensor]]:
    """A call with gradients; the input is a transposed view, which a GPU's kernels take as a copy."""
    rnn = getattr(hsm, cell)(5, 7, bidirectional=True).double()
    x = torch.randn(3, 4, 5, dtype=torch.float64).transpose(0, 1).requires_grad_()
    mask = torch.rand(4, 3) < 0.3

    def call() -> list[Tensor]:
        output, _ = rnn(x, reset_mask=mask)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), (x, *rnn.parameters()))]

    return call


def failures(simulator: Library, call: Callable[[], list[Tensor]], words: str) -> list[RuntimeError]:
    """What calls raise with memory for no allocation, for one, and so on until they succeed."""
    wanted, found = call(), []
    while True:
        simulator.sim_fail_allocation(len(found), words.encode())
        try:
            assert_same_bits(call(), wanted)
        except RuntimeError as error:
            found.append(error)
        else:
            return found
        finally:
            simulator.sim_fail_allocation(-1, b"")
        assert_same_bits(call(), wanted)


@every_cell
def test_out_of_memory_in_mid_call(simulator: Library, cell: str) -> None:
    """Wherever it happens it is torch's error, says what to do, and the next call works."""
    errors = failures(simulator, step(cell), FULL)
    assert len(errors) > 15
    told = [str(error) for error in errors]
    assert all("recompute=True; torch says: CUDA out of memory. Tried" in text for text in told)
    for what in ("tensor of shape (4, 3, 14)", "cuBLAS handle, or workspace", "contiguous copy of input (4, 3, 5)"):
        assert any(f"out of memory: no room for {what}" in text for text in told), what
    for name in ("forward", "backward"):
        assert any(f"{cell.lower()}_{name}" in text for text in told)
    assert all(type(error) is torch.OutOfMemoryError for error in errors)


@every_cell
def test_out_of_memory_where_torch_does_not_say_why(simulator: Library, cell: str) -> None:
    """Before 2.13 it prints why."""
    for error in failures(simulator, step(cell), ""):
        on_gpu = "on the CPU" not in str(error)  # but for copies, which are on the simulator's device
        assert type(error) is (torch.OutOfMemoryError if on_gpu else RuntimeError)
        assert "out of memory, or another error, which torch has printed: no room for " in str(error)


@every_cell
def test_another_error_than_out_of_memory_stays_what_it_is(simulator: Library, cell: str) -> None:
    for error in failures(simulator, step(cell), LOST):
        assert type(error) is RuntimeError
        assert ": torch made no " in str(error) and LOST in str(error)


@pytest.mark.parametrize(
    "status, words",
    [
        (35, "the driver serves CUDA 12.4, hsm_kernels was compiled with 13.0; update the driver, or compile"),
        (209, "not compiled for this GPU; compile it again with its architecture in HSM_KERNELS_CUDA_ARCHS"),
        (719, "CUDA error 719"),
    ],
    ids=["driver too old", "another GPU", "lost"],
)
@every_cell
def test_a_launch_that_fails(simulator: Library, cell: str, status: int, words: str) -> None:
    call = step(cell)
    wanted = call()
    simulator.sim_fail_launch(status)
    with pytest.raises(RuntimeError, match=words) as error:
        call()
    assert f"CUDA error {status}, " in str(error.value) and f"{cell.lower()}_forward" in str(error.value)
    assert_same_bits(call(), wanted)


@every_cell
def test_the_math_mode_of_cublas_is_left_as_it_was(simulator: Library, cell: str) -> None:
    """Also by calls that fail."""
    call = step(cell)
    for fail in (False, True):
        simulator.sim_set_math_mode(1)
        simulator.sim_fail_launch(719 if fail else 0)
        with pytest.raises(RuntimeError) if fail else torch.no_grad():
            Case(cell).forward()
        assert simulator.sim_math_mode() == 1
    simulator.sim_set_math_mode(0)
    call()
    assert simulator.sim_math_mode() == 0


@pytest.mark.parametrize("sizes", [(2**31, 1, 1), (1, 2**32 + 1, 1), (1, 1, 2**31)], ids=str)
def test_sizes_that_cublas_cannot_count(simulator: Library, sizes: tuple[int, int, int]) -> None:
    refusal = simulator.text("sim_refusal_of_product", *map(ctypes.c_int64, sizes))
    assert f"has {max(sizes)} rows or columns, cuBLAS counts up to 2^31 - 1" in refusal


@every_cell
def test_more_units_than_the_y_dimension_of_a_grid_has_blocks_for(cell: str) -> None:
    """Of inputs there may be so many: here a grid is taken to end at one block."""
    build = BUILD.patched("csrc/cuda/layer.cuh", "most_grid_y = 65535", "most_grid_y = 1")
    with simulated(register(build.load())):
        for recompute in (False, True):
            assert_right(Case(cell, 2, 3, 5, 300, directions=2, resets=True, reset_state=True, recompute=recompute))


def test_a_torch_without_a_function_that_is_needed() -> None:
    build = BUILD.patched("csrc/binding/cuda/cublas.cpp", '"cublasGemmEx"', '"cublasGemmEx_v0"')
    with simulated(register(build.load())), pytest.raises(RuntimeError, match="has cublasGemmEx_v0; use backend="):
        Case("GRU").forward()
