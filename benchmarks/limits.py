"""What this machine can do at best: multiply matrices, and read weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from cases import CPU_DTYPES, DTYPES, Case
from timing import Contender, Effort, measure, merged, torch_threads
from torch import Tensor

import hsm_kernels  # noqa: F401 - registers torch.ops.hsm_kernels

WEIGHT_SIZES = (128, 256, 512, 1024)  # H of an LSTM; its W_hh has 0.25, 1, 4, 16 MB
READ_AT_ONCE = 2**23  # bytes that one call reads, at least


@dataclass(frozen=True)
class Limit:
    """What a case takes at least: its products, and reading its weights."""

    products_ms: float
    weights_ms: float

    @property
    def milliseconds(self) -> float:
        """The larger one."""
        return max(self.products_ms, self.weights_ms)


@dataclass(frozen=True)
class Limits:
    """The speeds that were reached on so many threads, by what reached them."""

    threads: int
    gemm: dict[str, dict[str, float]]  # by data type: floating point operations per second
    reading: dict[str, dict[str, float]]  # by the bytes of a float32 matrix: bytes per second

    def of(self, case: Case) -> Limit:
        """The limit for a case, by the reading speed of the size nearest to that of its W_hh."""
        wanted = math.log(case.recurrent_weight_bytes)
        nearest = min(self.reading, key=lambda size: abs(math.log(int(size)) - wanted))
        peak, bandwidth = (max(speeds.values()) for speeds in (self.gemm[case.dtype], self.reading[nearest]))
        return Limit(1e3 * case.flops / peak, 1e3 * case.streamed_bytes / bandwidth)

    def __str__(self) -> str:
        """All speeds; the first of a line counts."""
        lines = []
        for dtype, speeds in self.gemm.items():
            lines.append(f"x{self.threads} GEMM {dtype}, GFLOP/s: {_format_speeds(speeds)}")
        for size, speeds in self.reading.items():
            megabytes = int(size) / 2**20
            lines.append(f"x{self.threads} reading {megabytes:g} MB, GB/s: {_format_speeds(speeds)}")
        return "\n".join(lines)


def _format_speeds(speeds: dict[str, float]) -> str:
    fastest_first = sorted(speeds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {speed / 1e9:.0f}" for name, speed in fastest_first)


def measure_limits(threads: int, seconds: float, gemm_sizes: Sequence[int]) -> Limits:
    """Measure all speeds in about ``seconds``."""
    each = seconds / (len(CPU_DTYPES) + len(WEIGHT_SIZES))
    with torch_threads(threads), torch.inference_mode():
        return Limits(
            threads,
            {name: _gemm_speeds(DTYPES[name], threads, each, gemm_sizes) for name in CPU_DTYPES},
            dict(_reading_speeds(hidden, threads, each) for hidden in WEIGHT_SIZES),
        )


def _gemm_speeds(
    dtype: torch.dtype, threads: int, seconds: float, sizes: Sequence[int]
) -> dict[str, float]:
    """Of square matrices, the best size for each."""
    found: dict[str, float] = {}
    for size in sizes:
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        times = _seconds(multiplications(a, b), threads, seconds / len(sizes))
        for name, time in times.items():
            found[name] = max(found.get(name, 0), 2 * size**3 / time)
    return found


def multiplications(a: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to multiply matrices: MKL's, or what else torch was built with; oneDNN's; ours."""
    ways = {
        "torch.mm": partial(torch.mm, a, b),
        "hsm_kernels product": partial(torch.ops.hsm_kernels.product, a, b),
    }
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        linear = torch.ops.mkldnn._linear_pointwise
        ways["oneDNN linear"] = partial(linear, a, b, None, "none", [], "")
    return ways


def _reading_speeds(hidden: int, threads: int, seconds: float) -> tuple[str, dict[str, float]]:
    weight, vector = torch.randn(4 * hidden, hidden), torch.randn(hidden)
    size = weight.nbytes
    # A small matrix again and again in one call, whose own cost would hide it; each thread its part.
    times = max(1, READ_AT_ONCE // size)
    parts = weight.flatten()[: weight.numel() // threads * threads].view(threads, 1, -1)
    repeated = parts.expand(-1, times, -1)
    ways: dict[str, Callable[[], Tensor]] = {
        "torch.mv": partial(torch.mv, weight, vector),
        "torch.sum": partial(torch.sum, weight),
        "torch.sum, repeated": partial(torch.sum, repeated, -1),
    }
    read = {"torch.mv": size, "torch.sum": size, "torch.sum, repeated": times * size}
    times = _seconds(ways, threads, seconds)
    return str(size), {name: read[name] / time for name, time in times.items()}


def _seconds(
    ways: dict[str, Callable[[], Tensor]], threads: int, seconds: float
) -> dict[str, float]:
    """The time of a call in the fastest block: a limit is what was reached once."""
    contenders = [Contender(name, run) for name, run in ways.items()]
    effort = Effort(block_seconds=0.002, row_seconds=seconds, fewest_rounds=3, most_rounds=100)
    blocks = measure(contenders, threads, effort)
    return {name: min(merged(measured).times) for name, measured in blocks.items()}
