"""What the boundary benchmark measures: its rows, and for each the contenders and the targets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import recipes
import torch
from cases import Case, Problem, grid, make_problem
from peers import OURS, TORCH, Call, training_call
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

WITHOUT_MASK = f"{OURS}, no mask"
WITHOUT_DETACHES = f"{OURS}, no detaches"
RECOMPUTING = f"{OURS}, recompute"

RESET_RECIPES = {
    "union split": recipes.union_split,
    "step loop": recipes.step_loop,
    "split and pad": recipes.split_and_pad,
    "split and pack": recipes.split_and_pack,
}


@dataclass(frozen=True)
class Target:
    """The ratio that is wanted."""

    kind: Literal["at least", "at most"]
    ratio: float

    def __str__(self) -> str:
        return f"{self.kind} {self.ratio:g}"

    def met_by(self, ratio: float) -> bool:
        """Whether ``ratio`` is what is wanted."""
        return ratio >= self.ratio if self.kind == "at least" else ratio <= self.ratio


@dataclass(frozen=True)
class Entry:
    """A contender. Entries with the same word for their result must agree in all they return."""

    name: str
    call: Call
    result: str
    timed: bool = True  # or only called once, to check the others


@dataclass(frozen=True)
class Comparison:
    """The time of one entry, or what it saves for backward, over that of another."""

    over: str
    under: str
    target: Target | None = None
    quantity: Literal["time", "bytes"] = "time"


@dataclass(frozen=True)
class Plan:
    """All that is needed to measure a row."""

    entries: list[Entry]
    comparisons: list[Comparison]
    saved_bytes: dict[str, int] = field(default_factory=dict)  # for backward, by entry


@dataclass(frozen=True)
class BoundaryCase:
    """One row: its sizes, and the plan that is made for them."""

    topic: str
    sizes: Case
    plan: Callable[[Case], Plan]

    def __str__(self) -> str:
        """The case in words, as --only finds it."""
        case = self.sizes
        size = f"L={case.length} N={case.batch} H={case.hidden}"
        dtype = "" if case.dtype == "float32" else f" {case.dtype}"
        return f"{case.op} {self.topic} {size}{dtype} {case.place}"


# The rows

Size = tuple[int, int, int]  # L, N, H


@dataclass(frozen=True)
class Sizes:
    """The sizes of all rows."""

    resets: Size
    p: float  # that a sequence is reset at a step
    truncated: dict[Size, Target]
    backward: dict[Size, Target | None]
    detach_steps: int
    memory: tuple[Size, ...]


QUICK = Sizes(
    resets=(128, 32, 128),
    p=0.02,
    truncated={(512, 4, 128): Target("at least", 1.5), (512, 1, 256): Target("at least", 2)},
    backward={(1024, 1, 256): Target("at least", 4), (1024, 16, 256): None},
    detach_steps=32,
    memory=((128, 16, 512), (256, 1, 512), (64, 64, 256)),
)
CHECK = Sizes(
    resets=(9, 3, 8),
    p=0.2,  # a few resets in so few steps
    truncated={(12, 2, 8): Target("at least", 1.5)},
    backward={(12, 2, 8): Target("at least", 4)},
    detach_steps=4,
    memory=((6, 2, 8),),
)

RESET_TARGETS = {
    WITHOUT_MASK: Target("at most", 1.05),
    "union split": Target("at least", 3),
    "step loop": Target("at least", 6),
}
RECOMPUTE_TIME, RECOMPUTE_BYTES = Target("at most", 1.35), Target("at most", 0.45)


def all_cases(sizes: Sizes, threads: int) -> list[BoundaryCase]:
    """All rows for a thread count, those that are only for information last."""

    def rows(topic: str, size: Size, plan: Callable[..., Plan], **options: Any) -> None:
        length, batch, hidden = size
        for case in grid("training", [length], [batch], [hidden], "float32", threads):
            cases.append(BoundaryCase(topic, case, partial(plan, **options)))

    cases: list[BoundaryCase] = []
    k, p = sizes.detach_steps, sizes.p
    peers = ("union split", "step loop", "split and pad")
    rows(f"resets p={p}", sizes.resets, resets, p=p, peers=peers, targets=RESET_TARGETS)
    for size, target in sizes.truncated.items():
        rows(f"truncated every {k}", size, truncated, steps=k, target=target)
    for size, backward_target in sizes.backward.items():
        rows("backward alone", size, backward_alone, steps=k, target=backward_target)
    for size in sizes.memory:
        rows("memory", size, memory)
    rows("lengths", sizes.resets, lengths)
    for where, other in {"p=0.1": 0.1, "everywhere": 1.0, "nowhere": 0.0}.items():
        rows(f"resets {where}", sizes.resets, resets, p=other, peers=("union split",))
    both = {"peers": ("split and pack",), "bidirectional": True}
    rows(f"bidirectional resets p={p}", sizes.resets, resets, p=p, **both)
    return cases


# A plan for each kind of row


def resets(
    case: Case,
    *,
    p: float,
    peers: Sequence[str],
    targets: dict[str, Target] | None = None,
    bidirectional: bool = False,
) -> Plan:
    """Resets at random steps, each with probability ``p``."""
    problem = make_problem(case, bidirectional=bidirectional)
    mask = torch.rand(case.length, case.batch, device=case.device) < p
    torch_without_mask = f"{TORCH}, no mask"
    targets = targets or {}
    return Plan(
        [
            ours(OURS, problem, "reset", reset_mask=mask),
            ours(WITHOUT_MASK, problem, "plain"),
            theirs(torch_without_mask, problem, "plain", recipes.plain),
            *(theirs(peer, problem, "reset", RESET_RECIPES[peer], mask) for peer in peers),
        ],
        [
            Comparison(OURS, WITHOUT_MASK, targets.get(WITHOUT_MASK)),
            *(Comparison(peer, OURS, targets.get(peer)) for peer in peers),
            Comparison(torch_without_mask, OURS),
        ],
    )


def truncated(case: Case, *, steps: int, target: Target) -> Plan:
    """Backpropagation through ``steps`` steps, over all of a long sequence."""
    problem = make_problem(case)
    return Plan(
        [
            ours(OURS, problem, "detached", truncated_bptt_steps=steps),
            ours(WITHOUT_DETACHES, problem, "plain"),
            theirs(TORCH, problem, "plain", recipes.plain, timed=False),
            theirs("chunks", problem, "detached", recipes.chunks, steps),
            theirs("folded chunks", problem, "detached", recipes.folded_chunks, steps),
        ],
        [
            Comparison("chunks", OURS, target),
            Comparison("folded chunks", OURS),
            Comparison(WITHOUT_DETACHES, OURS),
        ],
    )


def backward_alone(case: Case, *, steps: int, target: Target | None) -> Plan:
    """Our backward pass with detaches, regular and random, against that without."""
    problem = make_problem(case)
    mask = torch.rand(case.length, case.batch, device=case.device) < 1 / steps
    regular, random = f"{OURS}, every {steps}", f"{OURS}, p=1/{steps}"
    loop = recipes.detaching_step_loop
    return Plan(
        [
            Entry(regular, backward_call(problem, truncated_bptt_steps=steps), "regular"),
            Entry(random, backward_call(problem, detach_mask=mask), "random"),
            Entry(WITHOUT_DETACHES, backward_call(problem), "plain"),
            theirs("chunks", problem, "regular", recipes.chunks, steps, timed=False),
            theirs("step loop", problem, "random", loop, mask, timed=False),
            theirs(TORCH, problem, "plain", recipes.plain, timed=False),
        ],
        [
            Comparison(WITHOUT_DETACHES, regular, target),
            Comparison(WITHOUT_DETACHES, random),
        ],
    )


def lengths(case: Case) -> Plan:
    """Sequences of lengths from 1 to L."""
    problem = make_problem(case)
    drawn = torch.randint(1, case.length + 1, (case.batch,), device=case.device)
    ignored = f"{TORCH}, lengths ignored"
    return Plan(
        [
            ours(OURS, problem, "lengths", lengths=drawn),
            theirs("PackedSequence", problem, "lengths", recipes.packed, drawn),
            theirs(ignored, problem, "plain", recipes.plain),
        ],
        [Comparison("PackedSequence", OURS), Comparison(ignored, OURS)],
    )


def memory(case: Case) -> Plan:
    """Gates computed again in backward, against gates saved."""
    problem = make_problem(case)
    options: dict[str, dict[str, bool]] = {OURS: {}, RECOMPUTING: {"recompute": True}}
    return Plan(
        [
            *(ours(name, problem, "plain", **given) for name, given in options.items()),
            theirs(TORCH, problem, "plain", recipes.plain, timed=False),
        ],
        [
            Comparison(RECOMPUTING, OURS, RECOMPUTE_TIME),
            Comparison(RECOMPUTING, OURS, RECOMPUTE_BYTES, "bytes"),
        ],
        {name: saved_bytes(problem, **given) for name, given in options.items()},
    )


def ours(name: str, problem: Problem, result: str, **options: Any) -> Entry:
    """Our module with ``options`` in training."""
    rnn = problem.ours
    return Entry(name, training_call(lambda x: rnn(x, **options)[0], rnn, problem), result)


def theirs(
    name: str,
    problem: Problem,
    result: str,
    recipe: Callable[..., Tensor],
    *boundaries: Any,
    timed: bool = True,
) -> Entry:
    """A recipe for torch.nn in training."""
    rnn = problem.torch_nn
    call = training_call(lambda x: recipe(rnn, x, *boundaries), rnn, problem)
    return Entry(name, call, result, timed)


def backward_call(problem: Problem, **options: Any) -> Call:
    """A call of backward alone, on a graph that is kept."""
    sequence = problem.input.clone().requires_grad_()
    wanted = (sequence, *problem.ours.parameters())
    output, _ = problem.ours(sequence, **options)

    def call() -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(output, wanted, problem.output_gradient, retain_graph=True)
        return output.detach(), *gradients

    return call


def saved_bytes(problem: Problem, **options: Any) -> int:
    """What our forward pass keeps for backward: each storage once, parameters left out."""
    parameters = {address(parameter) for parameter in problem.ours.parameters()}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[address(tensor)] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        problem.ours(problem.input.clone().requires_grad_(), **options)
    return sum(s.nbytes() for place, s in storages.items() if place not in parameters)


def address(tensor: Tensor) -> int:
    """Where the storage of a tensor lies."""
    return tensor.untyped_storage().data_ptr()
