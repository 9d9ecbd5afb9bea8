"""The scheduler that cuts sequences at their boundaries and deals the segments to slots."""

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from build_helpers import COMPILER, needs_compiler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

ROOT = Path(__file__).parent.parent
pytestmark = needs_compiler


class Segment(ctypes.Structure):
    """As in csrc/common/params.h."""

    _fields_ = [(name, ctypes.c_int32) for name in ("sequence", "begin", "end", "index")]


class Schedule(ctypes.Structure):
    """As in csrc/common/params.h."""

    _fields_ = [
        ("segments", ctypes.POINTER(Segment)),
        ("slot_starts", ctypes.POINTER(ctypes.c_int32)),
        ("sequence_starts", ctypes.POINTER(ctypes.c_int32)),
        ("slots", ctypes.c_int64),
        ("rounds", ctypes.c_int64),
    ]


class Mask(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("step_stride", ctypes.c_int64), ("batch_stride", ctypes.c_int64)]


@dataclass(frozen=True)
class Run:
    """A segment in Python."""

    sequence: int
    begin: int
    end: int
    index: int

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Result:
    slots: list[list[Run]]
    sequence_starts: list[int]
    rounds: int

    @property
    def runs(self) -> list[Run]:
        return [run for slot in self.slots for run in slot]

    @property
    def loads(self) -> list[int]:
        return [sum(map(len, slot)) for slot in self.slots]


Planner = Callable[..., Result]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("segments") / "probe.so"
    sources = [ROOT / "tests" / "segments_probe.cpp", ROOT / "csrc" / "cpu" / "plan.cpp"]
    checks = ["-D_GLIBCXX_ASSERTIONS", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    flags = ["-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
    subprocess.run([str(COMPILER), *flags, *checks, *map(str, sources), "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    loaded.make_plan.restype = ctypes.c_void_p
    loaded.make_plan.argtypes = [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 3 + [ctypes.c_bool]
    loaded.read_plan.argtypes = [ctypes.c_void_p] * 2
    loaded.free_plan.argtypes = [ctypes.c_void_p]
    loaded.choose_slots.restype = ctypes.c_int64
    loaded.choose_slots.argtypes = [ctypes.c_int64] * 2
    return loaded


@pytest.fixture
def plan(library: ctypes.CDLL) -> Iterator[Planner]:
    """Plans a call; masks are (L, N), lengths (N,)."""

    def run(
        steps: int,
        batch: int,
        reset: Tensor | None = None,
        detach: Tensor | None = None,
        lengths: Tensor | None = None,
        backward: bool = True,
    ) -> Result:
        masks = [None if m is None else Mask(m.data_ptr(), m.stride(0), m.stride(1)) for m in (reset, detach)]
        pointers = [None if m is None else ctypes.byref(m) for m in masks]
        ends = None if lengths is None else lengths.data_ptr()
        made = library.make_plan(steps, batch, *pointers, ends, backward)
        schedule = Schedule()
        library.read_plan(made, ctypes.byref(schedule))
        starts = schedule.slot_starts[: schedule.slots + 1]
        runs = [Run(s.sequence, s.begin, s.end, s.index) for s in schedule.segments[: starts[-1]]]
        result = Result(
            [runs[a:b] for a, b in pairwise(starts)], schedule.sequence_starts[: batch + 1], schedule.rounds
        )
        library.free_plan(made)
        return result

    yield run


def check(
    result: Result,
    steps: int,
    batch: int,
    reset: Tensor | None = None,
    detach: Tensor | None = None,
    lengths: Tensor | None = None,
    backward: bool = True,
) -> None:
    """Everything that a kernel relies on."""
    cut = torch.zeros(steps, batch, dtype=torch.bool)
    for mask in (reset, detach if backward else None):
        cut = cut if mask is None else cut | mask
    ends = [steps] * batch if lengths is None else lengths.tolist()
    by_sequence: list[list[Run]] = [[] for _ in range(batch)]
    for run in sorted(result.runs, key=lambda run: run.index):
        by_sequence[run.sequence].append(run)
    for n, runs in enumerate(by_sequence):
        # Every valid step exactly once, by time; cut where a mask says so and nowhere else.
        cuts = [t for t in range(1, ends[n]) if cut[t, n]]
        bounds = [0, *cuts, ends[n]] if ends[n] else []
        assert [(run.begin, run.end) for run in runs] == list(pairwise(bounds))
        assert [run.index for run in runs] == list(range(*result.sequence_starts[n : n + 2]))
    assert all(slot for slot in result.slots)  # no slot without work
    # The busiest slot first.
    assert result.loads == sorted(result.loads, reverse=True)
    assert result.rounds == max(result.loads, default=0)
    if len(result.slots) == sum(end > 0 for end in ends):  # a slot a sequence, by time
        for slot in result.slots:
            assert len({run.sequence for run in slot}) == 1
            assert [run.begin for run in slot] == sorted(run.begin for run in slot)
    elif result.slots:  # longest first, and no slot much busier than it must be
        for slot in result.slots:
            assert [len(run) for run in slot] == sorted(map(len, slot), reverse=True)
        assert result.rounds <= sum(result.loads) / len(result.slots) + max(map(len, result.runs))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, object]:
    steps, batch = draw(st.integers(0, 40)), draw(st.integers(0, 15))
    torch.manual_seed(draw(st.integers(0, 2**16)))

    def mask() -> Tensor | None:
        density = draw(st.sampled_from([None, 0.0, 0.05, 0.5, 1.0]))
        drawn = None if density is None else torch.rand(steps, batch) < density
        layout = draw(st.sampled_from(["plain", "transposed", "expanded"]))
        if drawn is None or layout == "plain":
            return drawn
        return drawn.t().contiguous().t() if layout == "transposed" else drawn[:, :1].expand(steps, batch)

    lengths = torch.randint(0, steps + 1, (batch,)) if draw(st.booleans()) else None
    return {
        "steps": steps,
        "batch": batch,
        "reset": mask(),
        "detach": mask(),
        "lengths": lengths,
        "backward": draw(st.booleans()),
    }


@given(call=calls())
def test_any_call(plan: Planner, call: dict[str, object]) -> None:
    check(plan(**call), **call)


@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 9, 9])])
def test_without_boundaries_a_slot_is_a_sequence(plan: Planner, lengths: Tensor | None) -> None:
    nothing = torch.zeros(9, 3, dtype=torch.bool)
    for masks in ({}, {"reset": nothing, "detach": nothing}):
        result = plan(9, 3, lengths=lengths, **masks)
        assert result.slots == [[Run(n, 0, 9, n)] for n in range(3)]
        assert result.rounds == 9


def test_the_forward_pass_does_not_cut_at_detaches(plan: Planner) -> None:
    everywhere = torch.ones(5, 2, dtype=torch.bool)
    assert len(plan(5, 2, detach=everywhere, backward=False).runs) == 2
    assert len(plan(5, 2, detach=everywhere, backward=True).runs) == 10
    assert len(plan(5, 2, reset=everywhere, backward=False).runs) == 10


def test_all_steps_alone(plan: Planner) -> None:
    everywhere = torch.ones(100, 4, dtype=torch.bool)
    result = plan(100, 4, reset=everywhere)
    check(result, 100, 4, reset=everywhere)
    assert set(result.loads) == {8}  # 400 steps on 50 slots


def test_equal_segments_are_dealt_in_their_order(plan: Planner) -> None:
    """To the slots in turn, so that slots beside each other run steps beside each other."""
    result = plan(100, 1, reset=torch.ones(100, 1, dtype=torch.bool))
    assert result.slots == [[Run(0, t, t + 1, t) for t in (k, k + 50)] for k in range(50)]


def test_one_long_and_many_short(plan: Planner) -> None:
    """The long one has a slot to itself, and does not hold up the others."""
    detach = torch.ones(200, 2, dtype=torch.bool)
    detach[1:, 0] = False
    result = plan(200, 2, detach=detach)
    check(result, 200, 2, detach=detach)
    assert result.slots[0] == [Run(0, 0, 200, 0)]
    assert max(result.loads[1:]) <= 5


def test_equal_segments_fill_the_slots_evenly(plan: Planner) -> None:
    """As truncated backpropagation makes them: no slot runs one more than another."""
    for steps, batch in ((1024, 1), (512, 4), (4096, 1), (70_000, 1)):
        detach = (torch.arange(steps) % 32 == 0)[:, None].expand(steps, batch)
        result = plan(steps, batch, detach=detach)
        check(result, steps, batch, detach=detach)
        assert max(map(len, result.slots)) - min(map(len, result.slots)) <= 1


def test_enough_sequences_keep_their_order(plan: Planner) -> None:
    """Cut or not, each has a slot to itself; the longest comes first."""
    reset = torch.rand(30, 12) < 0.2
    lengths = torch.arange(12) + 15
    result = plan(30, 12, reset=reset, lengths=lengths)
    check(result, 30, 12, reset=reset, lengths=lengths)
    assert [slot[0].sequence for slot in result.slots] == list(reversed(range(12)))


def test_short_sequences_share_a_slot_with_nobody_where_none_is_cut(plan: Planner) -> None:
    result = plan(7, 4, lengths=torch.tensor([3, 0, 7, 3]))
    assert result.slots == [[Run(2, 0, 7, 1)], [Run(0, 0, 3, 0)], [Run(3, 0, 3, 2)]]


@pytest.mark.parametrize(
    ("segments", "sequences", "slots"),
    [
        (0, 0, 0),
        (1, 1, 1),
        (32, 32, 32),  # nothing is cut
        (32, 1, 32),
        (64, 4, 64),  # one turn with more rows rather than two with fewer
        (100, 4, 50),
        (128, 1, 43),
        (40, 11, 40),
        (40, 12, 12),  # enough rows as it is
        (1000, 256, 256),
        (2**31 - 1, 1, 48),
    ],
)
def test_number_of_slots(library: ctypes.CDLL, segments: int, sequences: int, slots: int) -> None:
    assert library.choose_slots(segments, sequences) == slots
