"""The kernels that multiply tiles of bfloat16 (AMX), in a library whose tile instructions are emulated.

That library has processes of its own: the tests marked `in_emulation` run there, started by `test_in_emulation`.
"""

import ctypes
import faulthandler
import mmap
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from build_helpers import COMPILER, PACKAGE, needs_compiler
from test_ops import Case, assert_as_accurate_as_the_reference, cpu_flags
from tolerances import assert_close_to_reference
from torch import Tensor

import hsm_kernels as hsm
from hsm_kernels import _library

EMULATION = Path(__file__).parent / "amx_emulation"
SOURCES = _library._description().root
FEWEST_ROWS = 5  # that are multiplied by tiles
FEWEST_ROWS_WORTH_PACKING = 12  # of all steps, where weights could be read as they lie

emulated = os.environ.get("HSM_KERNELS_CPU_ISA") == "amx_bf16" and "amx_bf16" not in cpu_flags()
in_emulation = pytest.mark.skipif(not emulated, reason="runs in a process of its own, started by test_in_emulation")


# The emulation itself.


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The emulated instructions and the product that is made of them, by ctypes."""
    library = tmp_path_factory.mktemp("amx") / "probe.so"
    command = [str(COMPILER), "-std=c++17", "-O2", "-Wno-psabi", "-shared", "-fPIC", "-I", EMULATION, "-I", SOURCES]
    subprocess.run([*command, EMULATION / "tile_product_probe.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


def shapes(*tiles: tuple[int, int], palette: int = 1) -> bytes:
    """What ldtilecfg reads, for tiles of so many rows of so many bytes."""
    rows, row_bytes = (list(numbers) + [0] * (16 - len(tiles)) for numbers in zip(*tiles, strict=True))
    return struct.pack("<2B14x16H16B", palette, 0, *row_bytes, *rows)


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@needs_compiler
@pytest.mark.parametrize("rows, pairs, columns", [(16, 16, 16), (3, 5, 7), (1, 16, 1)])
def test_emulated_product(instructions: ctypes.CDLL, rows: int, pairs: int, columns: int) -> None:
    """Against float64, with operands and sums that lie apart in memory, and nothing beyond the tile touched."""
    a, b, c = torch.randn(rows, 40).bfloat16(), torch.randn(2 * pairs, 20).bfloat16(), torch.randn(rows, 18)
    by_pairs = b.view(pairs, 2, 20).transpose(1, 2).reshape(pairs, 40).contiguous()  # b's rows, two by two
    wanted = c.clone().double()
    wanted[:, :columns] += a[:, : 2 * pairs].double() @ b[:, :columns].double()
    instructions.emulated_ldtilecfg(shapes((rows, 4 * columns), (rows, 4 * pairs), (pairs, 4 * columns)))
    for tile, tensor in enumerate((c, a, by_pairs)):
        instructions.emulated_tileloadd(tile, address(tensor), ctypes.c_int64(tensor.stride(0) * tensor.element_size()))
    instructions.emulated_tdpbf16ps(0, 1, 2)
    instructions.emulated_tilestored(0, address(c), ctypes.c_int64(4 * 18))
    assert instructions.emulated_configured_threads() == 1
    instructions.emulated_tilerelease()
    assert instructions.emulated_configured_threads() == 0
    torch.testing.assert_close(c.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(c[:, columns:].double(), wanted[:, columns:])


def one_sum(instructions: ctypes.CDLL, start: float, a: list[float], b: list[float]) -> float:
    """``start`` plus the products of two rows, which are pairs of bfloat16."""
    sums, left, right = torch.tensor([start]), torch.tensor(a).bfloat16(), torch.tensor(b).bfloat16()
    instructions.emulated_ldtilecfg(shapes((1, 4), (1, 2 * len(a)), (len(a) // 2, 4)))
    for tile, tensor, stride in ((0, sums, 4), (1, left, 2 * len(a)), (2, right, 4)):
        instructions.emulated_tileloadd(tile, address(tensor), ctypes.c_int64(stride))
    instructions.emulated_tdpbf16ps(0, 1, 2)
    instructions.emulated_tilestored(0, address(sums), ctypes.c_int64(4))
    instructions.emulated_tilerelease()
    return sums.item()


@needs_compiler
def test_emulated_rounding(instructions: ctypes.CDLL) -> None:
    """Sums of even and of odd elements, then of both, then with what there was; subnormal numbers are zero."""
    big, one = 2.0**24, 1.0
    ones = [one] * 4
    assert one_sum(instructions, 0.0, [big, -big, one, 0.0], ones) == 0.0  # even: 2^24 + 1 is 2^24
    assert one_sum(instructions, 0.0, [big, one, -big, 0.0], ones) == 1.0
    assert one_sum(instructions, big, [one, one, one, one], ones) == big + 4.0  # the four ones come first
    smallest = 2.0**-126
    assert one_sum(instructions, smallest / 2, [0.0] * 4, ones) == 0.0
    assert one_sum(instructions, 0.0, [smallest / 2, 0.0, 0.0, 0.0], [big] * 4) == 0.0
    assert one_sum(instructions, 0.0, [smallest, 0.0, 0.0, 0.0], [0.5] * 4) == 0.0
    assert one_sum(instructions, 0.0, [smallest, 0.0, 0.0, 0.0], ones) == smallest


FAULTS = {
    "no such palette": (lambda i: i.emulated_ldtilecfg(shapes((16, 64), palette=2)), "palette"),
    "too many rows": (lambda i: i.emulated_ldtilecfg(shapes((17, 64))), "too large"),
    "too many columns": (lambda i: i.emulated_ldtilecfg(shapes((16, 68))), "too large"),
    "rows alone": (lambda i: i.emulated_ldtilecfg(shapes((16, 0))), "no columns"),
    "a ninth tile": (lambda i: i.emulated_ldtilecfg(shapes(*[(16, 64)] * 9)), "reserved"),
    "nothing configured": (lambda i: i.emulated_tilezero(0), "no tiles"),
    "released": (
        lambda i: (i.emulated_ldtilecfg(shapes((16, 64))), i.emulated_tilerelease(), i.emulated_tilezero(0)),
        "no tiles",
    ),
    "a tile that was left out": (
        lambda i: (i.emulated_ldtilecfg(shapes((16, 64))), i.emulated_tilezero(1)),
        "not configured",
    ),
    "shapes that do not fit": (
        lambda i: (i.emulated_ldtilecfg(shapes((5, 64), (4, 64), (16, 64))), i.emulated_tdpbf16ps(0, 1, 2)),
        "do not fit",
    ),
    "one tile for two": (
        lambda i: (i.emulated_ldtilecfg(shapes((16, 64), (16, 64))), i.emulated_tdpbf16ps(0, 1, 1)),
        "used twice",
    ),
}


@needs_compiler
@pytest.mark.parametrize("name", FAULTS)
def test_emulated_faults(instructions: ctypes.CDLL, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """What a CPU refuses ends the process, here a copy of it."""
    act, words = FAULTS[name]
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            act(instructions)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert words in capfd.readouterr().err


# The product.


class Guarded:
    """Tensors that end where memory ends: to go on reading or writing is a fault."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        pages = mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE)
        self._maps.append(pages)
        whole = torch.frombuffer(pages, dtype=torch.uint8)
        end = len(pages) - mmap.PAGESIZE
        last_page, no_access = ctypes.c_void_p(whole.data_ptr() + end), 0
        assert ctypes.CDLL(None).mprotect(last_page, ctypes.c_size_t(mmap.PAGESIZE), no_access) == 0
        placed = whole[end - size : end].view(tensor.dtype).view(tensor.shape)
        return placed.copy_(tensor)


def check_product(instructions: ctypes.CDLL, columns: int, rows: int, depth: int, kind: str) -> None:
    guarded, width = Guarded(), 16 * columns
    state, weights = (
        torch.zeros(rows, -(-depth // 32) * 32).bfloat16(),
        torch.zeros(-(-depth // 32) * 32, width).bfloat16(),
    )
    state[:, :depth], weights[:depth] = torch.randn(rows, depth), torch.randn(depth, width)
    start = torch.randn(1 if kind == "bias" else rows, width)
    wanted = state.double() @ weights.double() + (0 if kind == "none" else start.double())
    packed = guarded(weights.view(-1, 2, width).transpose(1, 2).contiguous())
    state, start, result = guarded(state), guarded(start), guarded(torch.full((rows, width), torch.nan))
    instructions.multiply_block(
        columns, rows, None if kind == "none" else address(start), ctypes.c_int64(0 if kind == "bias" else width),
        address(state), ctypes.c_int64(state.size(1)), address(packed), ctypes.c_int64(depth), address(result),
    )  # fmt: skip
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-4)
    assert instructions.emulated_configured_threads() == 0


@needs_compiler
@pytest.mark.parametrize("kind", ["none", "bias", "rows"])
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_product_of_tiles(instructions: ctypes.CDLL, columns: int, kind: str) -> None:
    """Every number of rows, with no access behind the operands and the result."""
    for rows in range(1, 33):
        for depth in (1, 32, 70):
            check_product(instructions, columns, rows, depth, kind)


# The kernels in a process whose library has emulated tiles.


def emulating_package(folder: Path) -> Path:
    """A copy of the package whose tile instructions are the emulated ones."""
    package = Path(shutil.copytree(PACKAGE, folder / "hsm_kernels", ignore=shutil.ignore_patterns("*.so", "csrc")))
    shutil.copytree(SOURCES, package / "csrc")
    shutil.copy(EMULATION / "cpu" / "amx_tiles.h", package / "csrc" / "cpu")
    return folder


@needs_compiler
@pytest.mark.slow
@pytest.mark.requires_library
@pytest.mark.skipif("avx512_bf16" not in cpu_flags(), reason="the rest of these kernels needs AVX512_BF16")
@pytest.mark.skipif(bool(os.environ.get("HSM_KERNELS_CPU_ISA")), reason="already runs with a chosen instruction set")
def test_in_emulation(tmp_path: Path) -> None:
    """Builds the library and runs the tests of this file and of test_ops.py that concern tiles."""
    cache = os.environ.get("HSM_KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    site = emulating_package(tmp_path / "site")
    environment = {key: value for key, value in os.environ.items() if key != "HSM_KERNELS_JIT"}
    environment |= {"PYTHONPATH": str(site), "HSM_KERNELS_CACHE_DIR": cache, "HSM_KERNELS_CPU_ISA": "amx_bf16"}
    chosen = "half_precision and bfloat16 or bits_in_bfloat16 or nothing_is_read or infinite or two_calls or few_rows"
    chosen += " or other_dtypes"
    for test_file, choice in ((__file__, "tiles"), (Path(__file__).with_name("test_ops.py"), chosen)):
        command = [sys.executable, "-m", "pytest", "-q", "-x", test_file, "-k", choice, "-p", "no:cacheprovider"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


def library() -> Any:
    path = hsm.build_info().library
    assert path is not None
    return ctypes.CDLL(str(path))


@pytest.fixture
def counted() -> Iterator[Callable[[Callable[[], object]], tuple[int, int]]]:
    """Counts the configurations and tile products of a call. In the end no thread has tiles."""
    counters = library()

    def count(call: Callable[[], object]) -> tuple[int, int]:
        before = counters.emulated_configurations(), counters.emulated_products()
        call()
        return counters.emulated_configurations() - before[0], counters.emulated_products() - before[1]

    yield count
    assert counters.emulated_configured_threads() == 0


@in_emulation
@pytest.mark.parametrize("batch", range(1, 36))
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_every_number_of_rows_by_tiles(poisoned_memory: None, cell: str, batch: int) -> None:
    """Whole tiles, tiles that overlap, and fewer rows than a tile has; depths around whole tiles."""
    inputs = (1, 31, 32, 33, 40, 64)[batch % 6]
    hidden = (31, 50, 32, 17, 33, 16, 1)[batch % 7]
    case = Case(cell, 3, batch, inputs, hidden, bias=batch % 2 == 0, initial=batch % 3 > 0, dtype=torch.bfloat16)
    assert_as_accurate_as_the_reference(case)


OPTIONS = {
    "projected": {"proj_size": 37},
    "projected, whole tiles": {"proj_size": 32, "hidden": 64},
    "two directions": {"directions": 2},
    "lengths": {"lengths": True, "directions": 2},
    "resets": {"resets": True, "reset_state": True},
    "detaches": {"detaches": True},
    "all": {"proj_size": 5, "directions": 2, "lengths": True, "resets": True, "reset_state": True, "detaches": True},
    "one step": {"steps": 1, "directions": 2},
    "recomputed": {"recompute": True, "lengths": True},
}


@in_emulation
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [6, 16, 19, 40])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_options_by_tiles(
    poisoned_memory: None, counted: Any, cell: str, options: str, batch: int, threads: int
) -> None:
    """Rows that come and go, products of several kinds in one call, and threads that share units or sequences."""
    chosen = {"steps": 6, "inputs": 9, "hidden": 40, "density": 0.2, **OPTIONS[options]}
    if cell == "GRU":
        chosen["proj_size"] = 0
    torch.set_num_threads(threads)
    case = Case(cell, batch=batch, dtype=torch.bfloat16, **chosen)  # type: ignore[arg-type]
    try:
        _, products = counted(lambda: assert_as_accurate_as_the_reference(case))
    finally:
        torch.set_num_threads(2)
    rows = batch if case.length is None else int((case.length > 0).sum())
    assert products > 0 or rows < FEWEST_ROWS


@in_emulation
@pytest.mark.parametrize("shape", [(3, 150, 70, 66), (40, 40, 20, 66), (150, 7, 33, 40)])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_large_calls_by_tiles(poisoned_memory: None, counted: Any, cell: str, shape: tuple[int, ...]) -> None:
    """Several chunks of the input and threads that share the work; each leaves its tiles behind."""
    case = Case(cell, *shape, dtype=torch.bfloat16)
    counted(lambda: assert_as_accurate_as_the_reference(case))


@in_emulation
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_bits_by_tiles(cell: str) -> None:
    """A sequence gives the same bits among many sequences, among few, and among some that end before it."""
    case = Case(cell, 9, 40, 33, 50, initial=False, dtype=torch.bfloat16)
    with torch.no_grad():
        whole = case.forward()[0]
        case.length = torch.arange(40) % 10
        case.length[:3] = 9
        ragged = case.forward()[0]
        case.length, everything = None, case.input
        case.input = everything[:, 3:9]
        few = case.forward()[0]
    torch.testing.assert_close(ragged[:, :3], whole[:, :3], rtol=0, atol=0)
    torch.testing.assert_close(few, whole[:, 3:9], rtol=0, atol=0)


@in_emulation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("batch", [1, FEWEST_ROWS - 1, FEWEST_ROWS, 17])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_what_is_multiplied_by_tiles(counted: Any, name: str, batch: int, dtype: torch.dtype) -> None:
    """Bfloat16 of enough rows, forward and backward; `explain` says so, and names what runs instead elsewhere."""
    rnn, input = getattr(hsm, name)(8, 8, dtype=dtype), torch.zeros(5, batch, 8, dtype=dtype)
    by_tiles = dtype == torch.bfloat16 and batch >= FEWEST_ROWS
    variant = "amx_bf16" if by_tiles else "avx512_bf16" if dtype == torch.bfloat16 else "avx512"
    assert hsm.explain(rnn, input).variant == variant
    output = rnn(input)[0]
    for products in (counted(lambda: rnn(input))[1], counted(output.sum().backward)[1]):
        assert (products > 0) == by_tiles


@in_emulation
@pytest.mark.parametrize("batch", [FEWEST_ROWS_WORTH_PACKING - 1, FEWEST_ROWS_WORTH_PACKING])
def test_single_steps_by_tiles(counted: Any, batch: int) -> None:
    """Packing must pay where it could be left out, which is without gradients."""
    rnn, input = hsm.LSTM(8, 8, dtype=torch.bfloat16), torch.zeros(1, batch, 8, dtype=torch.bfloat16)
    assert counted(lambda: rnn(input))[1] > 0
    with torch.no_grad():
        by_tiles = batch >= FEWEST_ROWS_WORTH_PACKING
        assert (counted(lambda: rnn(input))[1] > 0) == by_tiles
        assert hsm.explain(rnn, input).variant == ("amx_bf16" if by_tiles else "avx512_bf16")


@in_emulation
@pytest.mark.parametrize("batch, wanted", [(6, 2), (16, 1), (33, 1), (40, 1), (47, 1), (64, 1)])
def test_configurations_for_tiles(counted: Any, batch: int, wanted: int) -> None:
    """One serves whole and remaining tiles; few rows take another than the input of several steps."""
    torch.set_num_threads(1)
    rnn, input = hsm.LSTM(40, 50, dtype=torch.bfloat16), torch.zeros(6, batch, 40, dtype=torch.bfloat16)
    assert counted(lambda: rnn(input))[0] == wanted
    torch.set_num_threads(2)


@in_emulation
def test_a_last_sequence_by_tiles(counted: Any) -> None:
    """The one that still runs is multiplied as it would be among others."""
    lengths = torch.tensor([9, 1, 1, 1, 1, 1])
    rnn, input = hsm.LSTM(40, 50, dtype=torch.bfloat16), torch.zeros(9, 6, 40, dtype=torch.bfloat16)
    shorter, longer = (counted(lambda n=n: rnn(input, lengths=lengths.clamp(max=n)))[1] for n in (8, 9))
    assert longer - shorter == 4 * 4 * 2  # vectors of units, gates, and tiles of 50 numbers


@in_emulation
@pytest.mark.parametrize("cell, proj_size", [("LSTM", 0), ("LSTM", 3), ("GRU", 0)])
def test_infinite_input_of_tiles(cell: str, proj_size: int) -> None:
    """Infinity times the zeros that fill up a tile is NaN, which must not reach the units."""
    case = Case(cell, steps=4, batch=6, hidden=7, inputs=5, proj_size=proj_size, dtype=torch.bfloat16)
    with torch.no_grad():
        case.input[0, 0, 0] = torch.inf
        ours, low, wanted = case.forward(), case.by_reference(), case.in_dtype(torch.float64).by_reference()
    for k in range(len(wanted)):
        assert_close_to_reference(ours[k], wanted[k], low[k], f"result {k}")


# The library of this machine.


@pytest.mark.requires_library
@pytest.mark.skipif("amx_bf16" in cpu_flags(), reason="the CPU has tiles")
@pytest.mark.skipif(emulated, reason="the library emulates them")
def test_a_cpu_without_them_refuses_to_take_tiles() -> None:
    code = "import torch, hsm_kernels as hsm; hsm.GRU(4, 4)(torch.zeros(5, 3, 4))"
    environment = {**os.environ, "HSM_KERNELS_CPU_ISA": "amx_bf16"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "HSM_KERNELS_CPU_ISA must be portable, or" in run.stderr
    assert "where the CPU has it, got amx_bf16" in run.stderr


def inner_loops(library: Path) -> Iterator[list[str]]:
    """The instructions of each loop without another one inside that multiplies tiles."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s*([0-9a-f]+):\s+(\S+)(?:\s+([0-9a-f]+)\b)?", text, re.MULTILINE)
    names = [name for _, name, _ in lines]
    places = {int(address, 16): k for k, (address, _, _) in enumerate(lines)}
    end = 0
    for k, (_, name, target) in enumerate(lines):
        start = places.get(int(target, 16), k) if name.startswith("j") and target else k
        if end <= start < k and "tdpbf16ps" in names[start:k]:
            yield names[start:k]
            end = k


@pytest.mark.requires_library
@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
@pytest.mark.skipif(emulated or platform.machine() != "x86_64", reason="the library has no tile instructions")
def test_loads_for_each_product() -> None:
    """What the compiler made of the loops: 16 and 32 rows by one to four vectors, two of four at a time for 32."""
    info = hsm.build_info()
    assert info.library is not None
    if "-DHSM_WITHOUT_AMX" in info.flags:
        pytest.skip("the compiler does not know the instructions")
    ratios = {Fraction(loop.count("tileloadd"), loop.count("tdpbf16ps")) for loop in inner_loops(info.library)}
    of_16_rows = {Fraction(2), Fraction(3, 2), Fraction(4, 3), Fraction(5, 4)}
    of_32_rows = {Fraction(3, 2), Fraction(1), Fraction(8, 6)}
    assert ratios == of_16_rows | of_32_rows
