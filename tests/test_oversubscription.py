"""Two threads where other programs want the cores: not much slower than one, and never stuck."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

import hsm_kernels as hsm

pytestmark = [pytest.mark.requires_library, pytest.mark.slow]


@pytest.fixture
def busy_cores() -> Iterator[None]:
    """One process spins on each core."""
    spinning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(len(os.sched_getaffinity(0)))
    ]
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    for process in spinning:
        process.kill()
        process.wait()


def seconds_per_call(module: torch.nn.Module, input: torch.Tensor, threads: int, seconds: float = 1.5) -> float:
    torch.set_num_threads(threads)
    start, calls = time.monotonic(), 0
    with torch.inference_mode():
        while time.monotonic() - start < seconds:
            module(input)
            calls += 1
    return (time.monotonic() - start) / calls


@pytest.mark.parametrize("cell, shape", [("LSTM", (100, 16, 128)), ("LSTM", (256, 1, 256)), ("GRU", (32, 64, 64))])
def test_busy_cores(cell: str, shape: tuple[int, int, int], busy_cores: None) -> None:
    """A waiting thread would take hundreds of times as long. Rounds of both, as the load itself comes and goes."""
    module, input = getattr(hsm, cell)(shape[2], shape[2]), torch.randn(shape)
    rounds = [[seconds_per_call(module, input, threads) for threads in (1, 2)] for _ in range(3)]
    assert min(two / one for one, two in rounds) <= 2.5
