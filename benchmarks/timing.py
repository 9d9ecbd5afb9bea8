"""Interleaved timing with torch.utils.benchmark."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch.utils.benchmark import Measurement, Timer
from tqdm import tqdm

AnyCase = TypeVar("AnyCase")

LONGEST_BLOCK = 10_000  # calls
LONGEST_WAIT = 0.1  # seconds, for the threads of the contender before


@dataclass(frozen=True)
class Contender:
    """Something to time: ``run`` is called again and again inside ``context``."""

    name: str
    run: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Effort:
    """How long a comparison may take."""

    block_seconds: float  # a block repeats a fast call until it has lasted this long
    row_seconds: float  # aim for all blocks of all contenders together
    fewest_rounds: int
    most_rounds: int

    def within(self, seconds: float) -> "Effort":
        """The same effort, or less where only ``seconds`` are left for a row."""
        return replace(self, row_seconds=min(self.row_seconds, seconds))


Measure = Callable[[Sequence[Contender], int, Effort], dict[str, list[Measurement]]]


def measure(
    contenders: Sequence[Contender], threads: int, effort: Effort
) -> dict[str, list[Measurement]]:
    """Time all contenders in turns: in each round every one gets one block of calls.

    Blocks of one round lie side by side in time, so a change in the machine's load meets all
    contenders alike. Who begins changes from round to round. On several threads a block begins when
    the worker threads of the one before have gone to sleep: those of OpenMP spin for some 10 ms after
    a call, those of ONNX Runtime for some 35 ms.
    """
    timers = {
        contender.name: Timer("run()", globals={"run": contender.run}, num_threads=threads)
        for contender in contenders
    }
    calls = {}
    round_seconds = 0.0
    for contender in contenders:
        with contender.context():
            once = _seconds_per_call(timers[contender.name])
        calls[contender.name] = _calls_per_block(once, effort)
        # Timer runs up to two warm-up calls, or one in a hundred, before each block.
        round_seconds += once * (calls[contender.name] + 2) + _wait_for_workers(threads)
    rounds = int(effort.row_seconds / round_seconds)
    rounds = max(effort.fewest_rounds, min(effort.most_rounds, rounds))

    blocks: dict[str, list[Measurement]] = {contender.name: [] for contender in contenders}
    for start in range(rounds):
        for i in range(len(contenders)):
            contender = contenders[(start + i) % len(contenders)]
            with contender.context():
                block = _block(timers[contender.name], calls[contender.name])
            blocks[contender.name].append(block)
            _wait_for_workers(threads)
    return blocks


def merged(blocks: list[Measurement]) -> Measurement:
    """All blocks of one contender as one measurement, with its median and quartiles."""
    return Measurement.merge(blocks)[0]


def ratio(peer: list[Measurement], ours: list[Measurement]) -> Measurement:
    """Peer time / our time, round by round, as a measurement with median and quartiles."""
    ratios = [p.median / o.median for p, o in zip(peer, ours, strict=True)]
    return Measurement(number_per_run=1, raw_times=ratios, task_spec=ours[0].task_spec)


def share_time(cases: Sequence[AnyCase], seconds: float) -> Iterator[tuple[AnyCase, float]]:
    """Each case with its share of the seconds that are left, until they are over; shows progress."""
    end = time.monotonic() + seconds
    progress = tqdm(cases, unit="row")
    for done, case in enumerate(progress):
        left = (end - time.monotonic()) / (len(cases) - done)
        if left < 0:
            break
        progress.set_description(str(case))
        yield case, left


def default_threads() -> list[int]:
    """The thread counts to measure with: 1, and 2 where there are two cores."""
    return sorted({1, min(2, len(os.sched_getaffinity(0)))})


@contextmanager
def nested(*contexts: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Several context managers as one, the first outermost."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        yield


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wait_for_workers(threads: int) -> float:
    """Wait until no thread of this process spins any more; the seconds that took."""
    begin = time.monotonic()
    if threads > 1:
        used = time.process_time()
        while time.monotonic() - begin < LONGEST_WAIT:
            time.sleep(0.002)
            before, used = used, time.process_time()
            if used - before < 0.0005:
                break
    return time.monotonic() - begin


def _block(timer: Timer, calls: int) -> Measurement:
    """One block; a call that fills it alone gets one warm-up call, not the two of ``timeit``."""
    return timer.blocked_autorange(min_run_time=0) if calls == 1 else timer.timeit(calls)


def _seconds_per_call(timer: Timer) -> float:
    first = timer.timeit(1).median
    return timer.timeit(10).median if first < 1e-3 else first


def _calls_per_block(once: float, effort: Effort) -> int:
    return max(1, min(LONGEST_BLOCK, round(effort.block_seconds / once)))
