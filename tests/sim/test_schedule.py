"""How sequences are cut on the device, and their segments dealt to the slots of the persistent kernels."""

import heapq
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from build_helpers import needs_compiler
from hypothesis import given
from hypothesis import strategies as st
from simulator import Build, Library
from torch import Tensor

pytestmark = needs_compiler

#: As in csrc/cuda/visits.cuh.
FLAGS = ("first", "initial", "reset", "detached", "last", "carries")
FLAG_BITS = 7

#: A step, and the names of its flags.
Step = tuple[int, frozenset[str]]
#: A sequence, and its steps in the order in which they run.
Segment = tuple[int, tuple[Step, ...]]


@dataclass
class Call:
    """Masks are (L, N); the chunk is the positions [begin, end) in the order in which a direction goes."""

    slots: int
    reset: Tensor
    detach: Tensor
    lengths: Tensor
    backward: bool
    begin: int
    end: int
    directions: int = 2

    def segments(self, direction: int) -> list[Segment]:
        """By a walk along every sequence."""
        return [run for n in range(self.reset.size(1)) for run in self._segments(direction, n)]

    def _segments(self, direction: int, n: int) -> list[Segment]:
        steps, length = self.reset.size(0), int(self.lengths[n])
        walk = [steps - 1 - p if direction else p for p in range(self.begin, self.end)]
        walk = [step for step in walk if step < length]
        runs: list[list[Step]] = []
        for k, step in enumerate(walk):
            entry, exit = (step + 1, step) if direction else (step, step + 1)
            is_initial, is_last = step == (length - 1 if direction else 0), step == (0 if direction else length - 1)
            if k == 0 or self._is_cut(entry, n):
                runs.append([])
            flags = set()
            if not runs[-1]:
                flags.add("first")
                if is_initial:
                    flags.add("initial")
                if entry < length and self.reset[entry, n]:
                    flags.add("reset")
                elif entry < length and self.backward and self.detach[entry, n]:
                    flags.add("detached")
            if is_last:
                flags.add("last")
            elif k == len(walk) - 1 and not self._is_cut(exit, n):
                flags.add("carries")
            runs[-1].append((step, frozenset(flags)))
        return [(n, tuple(run[::-1] if self.backward else run)) for run in runs]

    def _is_cut(self, edge: int, n: int) -> bool:
        if edge >= self.lengths[n]:
            return False
        return bool(self.reset[edge, n] or (self.backward and self.detach[edge, n]))


BUILD = Build(("tests/sim/schedule.cu", "csrc/cuda/schedule.cu"))


@pytest.fixture(scope="module")
def library() -> Library:
    return BUILD.load()


def visits_of(library: Library, call: Call) -> list[list[list[tuple[int, Step]]]]:
    """For each direction and slot its visits: sequence and step."""
    steps, batch = call.reset.shape
    room = steps * batch + 1
    table = torch.full((call.directions, call.slots, room, 2), -1, dtype=torch.int32)
    rounds = torch.full((call.directions, call.slots), -1, dtype=torch.int32)
    most = library.schedule_make(
        *(steps, batch, call.directions, call.slots, call.begin, call.end, call.backward),
        *(call.reset, call.detach, call.lengths.long(), room, table, rounds),
    )
    assert most >= rounds.max(), library.last_error
    found = []
    for direction in range(call.directions):
        found.append([])
        for row, count in zip(table[direction], rounds[direction].tolist(), strict=True):
            assert not row[count : min(most, room), 1].any(), "a round that is not counted"
            found[-1].append([(word >> FLAG_BITS, (step, _flags(word))) for step, word in row[:count].tolist()])
    return found


def _flags(word: int) -> frozenset[str]:
    assert word & 1, "no step"
    return frozenset(name for k, name in enumerate(FLAGS) if word >> (k + 1) & 1)


def as_segments(visits: list[tuple[int, Step]], backward: bool) -> list[Segment]:
    """A slot's visits, cut where its segments begin and end."""
    runs: list[tuple[int, list[Step]]] = []
    fresh = True
    for sequence, step in visits:
        if fresh or (not backward and "first" in step[1]):
            runs.append((sequence, []))
        assert runs[-1][0] == sequence
        runs[-1][1].append(step)
        fresh = backward and "first" in step[1]
    return [(sequence, tuple(steps)) for sequence, steps in runs]


def assert_right(library: Library, call: Call) -> list[list[int]]:
    """Every segment runs once, as a whole; returns the rounds of each slot in each direction."""
    loads = []
    for direction, slots in enumerate(visits_of(library, call)):
        found = [run for visits in slots for run in as_segments(visits, call.backward)]
        assert Counter(found) == Counter(call.segments(direction))
        loads.append([len(visits) for visits in slots])
    return loads


def random_call(steps: int, batch: int, chance: float, seed: int, **options: Any) -> Call:
    """Some edges are cut by both masks; lengths are 0 to L."""
    generator = torch.Generator().manual_seed(seed)
    reset, detach = (torch.rand(2, steps, batch, generator=generator) < chance).unbind()
    return Call(
        reset=reset, detach=detach, lengths=torch.randint(0, steps + 1, (batch,), generator=generator), **options
    )


@given(data=st.data(), backward=st.booleans())
def test_every_segment_runs_once(library: Library, data: st.DataObject, backward: bool) -> None:
    steps, seed = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 2**20))
    end = data.draw(st.integers(1, steps))
    chunk = {"begin": data.draw(st.integers(0, end - 1)), "end": end}
    chance, slots = data.draw(st.sampled_from([0, 0.1, 0.5, 1])), data.draw(st.integers(1, 20))
    call = random_call(steps, data.draw(st.integers(1, 6)), chance, seed, slots=slots, backward=backward, **chunk)
    if data.draw(st.booleans()):
        call.lengths[:] = steps
    library.set_seed(seed)
    assert_right(library, call)


@pytest.mark.parametrize("chance", [0.02, 0.3, 1])
@pytest.mark.parametrize("slots", [8, 24])
def test_slots_end_at_about_the_same_time(library: Library, slots: int, chance: float) -> None:
    """About as early as where the longest segment goes to the slot with the fewest steps."""
    torch.manual_seed(0)
    steps, batch = 500, 6
    mask = torch.rand(steps, batch) < chance
    call = Call(slots, mask, torch.zeros_like(mask), torch.full((batch,), steps), False, 0, steps, directions=1)
    least = [0] * slots
    for length in sorted((len(run) for _, run in call.segments(0)), reverse=True):
        heapq.heapreplace(least, least[0] + length)
    assert max(assert_right(library, call)[0]) <= 1.03 * max(least) + 1


SCHEDULE = "csrc/cuda/schedule.cu"
# What stands there, what is put in its place.
FAULTS = [
    ("(later ? tile + lowest_bit(later) : next)", "next"),
    ("if (all) next = tile + lowest_bit(all);", ""),
    ("step == begin || cuts", "cuts"),
    ("cuts(sequences, s.backward, step", "cuts(sequences, true, step"),
    ("length < chunk_end ? length : chunk_end", "chunk_end"),
    ("    before += sums[dealing_threads - 1];\n", ""),
    ("places[steps] = before + sums[t] - count", "places[steps] = before + sums[t]"),
    ("turn * rows * half", "turn * half"),
    (" || (loads[other] == mine && other < slot)", ""),
    ("s.backward && entry.detached", "entry.detached"),
    ("entry.detached && sequences.detaches(direction ? segment.end : segment.begin, run.sequence)", "entry.detached"),
    ("!cuts(sequences, s.backward, direction", "direction == 2 || !cuts(sequences, false, direction"),
    ("s.backward ? run.steps - 1 - i : i", "i"),
    ("d ? run.steps - 1 - place : place", "place"),
    ("      to += run.steps;\n", ""),
    ("queue.fill(s.table", "if (false) queue.fill(s.table"),
]


@pytest.mark.slow
@pytest.mark.parametrize("old, new", FAULTS)
def test_planted_faults_are_found(old: str, new: str) -> None:
    library = BUILD.patched(SCHEDULE, old, new).load()
    library.set_seed(0)
    calls = [
        random_call(1100, 2, 0.005, 1, slots=5, backward=False, begin=0, end=1100),
        *(random_call(90, 9, 0.2, 2, slots=3, backward=backward, begin=7, end=80) for backward in (False, True)),
    ]
    found = 0
    for call in calls:
        try:
            assert_right(library, call)
        except AssertionError:
            found += 1
    assert found > 0


def test_more_slots_and_lengths_than_a_block_has_threads(library: Library) -> None:
    steps, batch = 1100, 3
    mask = torch.zeros(steps, batch, dtype=torch.bool)
    mask[::7, 0] = mask[1050, 1] = True
    lengths = torch.tensor([1100, 1090, 5])
    assert_right(library, Call(1030, mask, mask, lengths, True, 0, steps, directions=1))
