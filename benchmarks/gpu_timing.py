"""Timing of calls on a GPU: by CUDA events, each call with a cold L2 cache, contenders in turns."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from timing import Contender, Effort
from torch import Tensor
from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec

WARM_UP_CALLS = 2
FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU


def device() -> str:
    """Where everything is measured; without a GPU the CPU, to see that everything works."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(contenders: Sequence[Contender], threads: int, effort: Effort) -> dict[str, list[Measurement]]:
    """As :func:`timing.measure`, with one call in a block; on a CPU by the clock.

    What a call waits for on the host counts only if the GPU waits for it, too.
    """
    seconds = {}
    for contender in contenders:
        with contender.context():
            seconds[contender.name] = statistics.median(_seconds(contender.run) for _ in range(WARM_UP_CALLS))
    rounds = int(effort.row_seconds / sum(seconds.values()))
    rounds = max(effort.fewest_rounds, min(effort.most_rounds, rounds))
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for start in range(rounds):
        for i in range(len(contenders)):
            contender = contenders[(start + i) % len(contenders)]
            with contender.context():
                times[contender.name].append(_seconds(contender.run))
    spec = TaskSpec(stmt="run()", setup="pass", num_threads=threads)
    return {
        name: [Measurement(number_per_run=1, raw_times=[time], task_spec=spec) for time in found]
        for name, found in times.items()
    }


def _seconds(run: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    _flush_buffer().zero_()
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return float(begin_event.elapsed_time(end_event)) / 1e3


@cache
def _flush_buffer() -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not be written to in training
        return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device())


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph; on a CPU the call itself."""
    if not torch.cuda.is_available():
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@contextmanager
def recurrence_by(variant: str) -> Iterator[None]:
    """On a GPU the native library runs the recurrence by this variant where it can; it looks at every call."""
    name = "HSM_KERNELS_CUDA_VARIANT"
    before = os.environ.get(name, "")
    os.environ[name] = variant
    try:
        yield
    finally:
        os.environ[name] = before


@contextmanager
def float32_precision(name: str) -> Iterator[None]:
    """Whether RNNs may round float32 to TF32: ``TF32``, or anything else."""
    switch = torch.backends.cudnn.rnn
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if name == "TF32" else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before
