"""The simulator itself: what right kernels compute on it, and that it finds the faults that are planted in them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from build_helpers import needs_compiler
from simulator import SANITIZED, Build, Library, sanitized_environment
from torch import Tensor

pytestmark = needs_compiler

SOURCES, INCLUDES = ("tests/sim/selftest.cu",), ("csrc", "tests", "benchmarks/probes")
SEEDS = range(6)


@pytest.fixture(scope="module")
def library() -> Library:
    return Build(SOURCES, INCLUDES).load()


def outcomes(library: Library, run: Callable[[], Tensor | None], seeds: range = SEEDS) -> list[Tensor | str]:
    """For each schedule the result of `run`, or the error where it gives none."""
    found: list[Tensor | str] = []
    for seed in seeds:
        library.set_seed(seed)
        result = run()
        found.append(library.last_error if result is None else result)
    return found


def assert_right(found: list[Tensor | str], expected: Tensor) -> None:
    for result in found:
        assert not isinstance(result, str), result
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def assert_some_wrong(found: list[Tensor | str], expected: Tensor) -> None:
    assert any(isinstance(result, str) or not torch.equal(result, expected) for result in found)


def assert_error(found: list[Tensor | str], *words: str) -> None:
    for result in found:
        assert isinstance(result, str), "no error was found"
        assert all(word in result for word in words), result


# -------------------------------------------------------------------------------------------------- barriers of a block

ROUNDS, THREADS = 3, 96


def reverse(library: Library, fault: int = 0) -> Tensor | None:
    values = torch.arange(THREADS, dtype=torch.float32)
    return values if library.selftest_reverse(fault, THREADS, ROUNDS, values) == 0 else None


def test_block_barrier(library: Library) -> None:
    expected = torch.arange(THREADS, dtype=torch.float32).flip(0) + ROUNDS
    assert_right(outcomes(library, lambda: reverse(library)), expected)
    for fault in (1, 2):  # read or written again without a barrier
        assert_some_wrong(outcomes(library, lambda fault=fault: reverse(library, fault)), expected)
    barrier_in_a_branch = outcomes(library, lambda: reverse(library, 3))
    assert_error(barrier_in_a_branch, "block barrier", "(3, 0, 0)", "selftest.cu:")
    end_before_the_barrier = outcomes(library, lambda: reverse(library, 4))
    assert_error(end_before_the_barrier, "thread", "block (0, 0, 0)")
    assert_error(outcomes(library, lambda: reverse(library, 5)), "waits at selftest.cu:")


def test_ucontext() -> None:
    """What switches stacks where there is no assembly for it."""
    library = Build(SOURCES, INCLUDES, flags=("-DSIM_UCONTEXT",)).load()
    assert_right(outcomes(library, lambda: reverse(library), range(1)), torch.arange(THREADS).float().flip(0) + ROUNDS)


@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer ends the process")
def test_overrun_of_shared_memory(library: Library) -> None:
    assert_error(outcomes(library, lambda: reverse(library, 6)), "wrote behind its shared memory")


def test_named_barrier(library: Library) -> None:
    def run(fault: int) -> Tensor | None:
        values = torch.arange(128, dtype=torch.int32)
        return values if library.selftest_pairs(fault, values) == 0 else None

    expected = torch.arange(128, dtype=torch.int32).view(2, 2, 32)[:, :1].expand(2, 2, 32).reshape(-1).contiguous()
    assert_right(outcomes(library, lambda: run(0)), expected)
    assert_some_wrong(outcomes(library, lambda: run(1)), expected)


# ---------------------------------------------------------------------------------------------------------------- warps


def test_warp(library: Library) -> None:
    values = torch.randint(-100, 100, (64,), dtype=torch.int32)

    def run(fault: int) -> Tensor | None:
        out, bits = torch.empty(64, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
        ok = library.selftest_warp_sum(fault, 64, values, out, bits) == 0
        return torch.stack([out, bits]) if ok else None

    sums = values.view(2, 32).sum(1, dtype=torch.int32).repeat_interleave(32)
    odd = (values.view(2, 32) % 2 != 0).long() @ (1 << torch.arange(32))
    expected = torch.stack([sums, odd.to(torch.int32).repeat_interleave(32)])
    assert_right(outcomes(library, lambda: run(0)), expected)
    assert_some_wrong(outcomes(library, lambda: run(1))[:1], expected)
    assert_error(outcomes(library, lambda: run(2)), "selftest.cu:", "lanes")
    assert_some_wrong(outcomes(library, lambda: run(3)), expected)
    assert_some_wrong(outcomes(library, lambda: run(4))[:1], expected)


# ---------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("own_barrier", [False, True])
def test_grid_barrier(library: Library, own_barrier: bool) -> None:
    blocks, rounds = 5, 4

    def run(fault: int) -> Tensor | None:
        values = torch.full((rounds + 1, blocks), -1, dtype=torch.int32)
        values[0] = torch.arange(blocks)
        arrived = torch.zeros(1, dtype=torch.int32)
        ok = library.selftest_neighbours(fault, own_barrier, blocks, rounds, values, arrived) == 0
        return values if ok else None

    expected = torch.arange(blocks, dtype=torch.int32)[None].repeat(rounds + 1, 1)
    for t in range(rounds):
        expected[t + 1] = expected[t] + expected[t].roll(1)
    assert_right(outcomes(library, lambda: run(0)), expected)
    assert_some_wrong(outcomes(library, lambda: run(1)), expected)
    if own_barrier:
        assert_error(outcomes(library, lambda: run(2)), "deadlock", "load_acquire at selftest.cu:")
    else:
        assert_error(outcomes(library, lambda: run(3)), "not cooperative")


# ------------------------------------------------------------------------------------------------------------- clusters

RANKS = 4


def all_to_all(library: Library, fault: int = 0) -> Tensor | None:
    rounds = 7
    values = torch.full((rounds + 1, RANKS, 4), -1, dtype=torch.int32)
    values[0] = torch.arange(RANKS * 4).view(RANKS, 4)
    return values if library.selftest_all_to_all(fault, RANKS, rounds, values) == 0 else None


def all_to_all_expected() -> Tensor:
    values = [torch.arange(RANKS * 4).view(RANKS, 4)]
    for _ in range(7):
        next_values = torch.arange(1, RANKS + 1)[:, None].expand(RANKS, 4)
        for row in values[-1]:
            next_values = (next_values * 31 + row) % 2**32
        values.append(next_values)
    return torch.stack(values).to(torch.int32)


def test_cluster(library: Library) -> None:
    assert_right(outcomes(library, lambda: all_to_all(library), range(12)), all_to_all_expected())


@pytest.mark.parametrize("fault", [1, 2, 3], ids=["no wait", "swapped buffer", "wrong phase"])
def test_cluster_wrong_results(library: Library, fault: int) -> None:
    assert_some_wrong(outcomes(library, lambda: all_to_all(library, fault)), all_to_all_expected())


def test_cluster_wrong_byte_count(library: Library) -> None:
    assert_some_wrong(outcomes(library, lambda: all_to_all(library, 4)), all_to_all_expected())
    assert_error(
        outcomes(library, lambda: all_to_all(library, 5)), "deadlock", "mbarrier at selftest.cu:", "16 bytes missing"
    )


def test_cluster_errors(library: Library) -> None:
    not_started = outcomes(library, lambda: all_to_all(library, 6), range(12))
    assert any(isinstance(found, str) and "has not started" in found for found in not_started)
    ended = outcomes(library, lambda: all_to_all(library, 7), range(40))
    assert any(isinstance(found, str) and "ended" in found for found in ended)
    assert_error(outcomes(library, lambda: all_to_all(library, 8)), "memory of the mbarrier was overwritten")
    assert_error(outcomes(library, lambda: all_to_all(library, 9)), "deadlock", "mbarrier")


def test_distributed_shared_memory(library: Library) -> None:
    rounds = 5

    def run(fault: int) -> Tensor | None:
        values = torch.full((rounds + 1, RANKS), -1, dtype=torch.int32)
        values[0] = torch.arange(RANKS)
        return values if library.selftest_distributed(fault, RANKS, rounds, values) == 0 else None

    expected = torch.arange(RANKS, dtype=torch.int32)[None].repeat(rounds + 1, 1)
    for t in range(rounds):
        expected[t + 1] = expected[t] + expected[t].roll(-1)
    assert_right(outcomes(library, lambda: run(0)), expected)
    assert_some_wrong(outcomes(library, lambda: run(1)), expected)
    assert_error(outcomes(library, lambda: run(2)), "arrives twice")
    assert_error(outcomes(library, lambda: run(3)), "it has no rank 4")


# ---------------------------------------------------------------------------------------------------- matrices, scalars

MMA_TYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("kind", range(3), ids=["bf16", "fp16", "tf32"])
def test_mma(library: Library, kind: int) -> None:
    depth = 8 if kind == 2 else 16
    a, b, d = torch.randn(16, depth), torch.randn(depth, 8), torch.randn(16, 8)
    if kind == 2:  # the low bits are ignored
        rounded = [(m.view(torch.int32) & ~0x1FFF).view(torch.float32) for m in (a, b)]
    else:
        a, b = a.to(MMA_TYPES[kind]), b.to(MMA_TYPES[kind])
        rounded = [a, b]
    expected = (d.double() + rounded[0].double() @ rounded[1].double()).float()

    def run(fault: int) -> Tensor:
        out = d.clone()
        assert library.selftest_multiply(fault, kind, a, b, out) == 0
        return out

    torch.testing.assert_close(run(0), expected, rtol=1e-6, atol=1e-6)
    for fault in (1, 2) if kind == 2 else (1, 2, 3):
        assert (run(fault) - expected).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions(library: Library, dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype).float()
    # Every value, what lies halfway to its neighbour, and a little to both sides.
    halfway = (every + every.roll(-1)) / 2
    scale = torch.randn(2**15).exp() * torch.randn(2**15)
    floats = torch.cat(
        [every, halfway, halfway * (1 + 2e-7), halfway * (1 - 2e-7), scale, scale * 1e-6, scale * 1e5, scale * 1e-39]
    )
    narrowed = torch.empty(floats.numel(), dtype=torch.int16)
    widened = torch.empty(floats.numel())
    all_bits = bits.repeat(floats.numel() // bits.numel())
    library.selftest_convert(dtype == torch.bfloat16, floats.numel(), floats, narrowed, all_bits, widened)
    torch.testing.assert_close(widened, all_bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    expected = floats.to(dtype)
    numbers = ~expected.isnan()
    assert torch.equal(narrowed.view(dtype).isnan(), expected.isnan())
    assert torch.equal(narrowed[numbers], expected.view(torch.int16)[numbers])


# ----------------------------------------------------------------------------------------------------------- sanitizers


@pytest.mark.skipif(SANITIZED, reason="it is this run")
def test_sanitizers_accept_the_simulator() -> None:
    """These tests once more under AddressSanitizer and UndefinedBehaviorSanitizer."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", Path(__file__).name]
    done = subprocess.run(
        command, env=sanitized_environment(), cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.skipif(SANITIZED, reason="it ends the process")
def test_sanitizers_find_an_overrun() -> None:
    code = "from test_simulator import *; reverse(Build(SOURCES, INCLUDES).load(), 6)"
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**sanitized_environment(), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
