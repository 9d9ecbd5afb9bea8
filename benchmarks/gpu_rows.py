"""What is measured on a GPU: the rows in the order of their importance, how one is measured, and the tables."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from agreement import LARGEST_DIFFERENCE, largest_distance
from boundary_cases import BoundaryCase, Target, resets, truncated
from cases import Case, Kind, Operator, make_problem
from gpu_timing import captured, float32_precision, measure, recurrence_by
from peers import OURS, TORCH, module_call
from results import Spread, spread_of
from timing import Contender, Effort, merged, ratio

import hsm_kernels as hsm

#: Kernels that run the recurrence only where they are asked for, each beside what runs by default.
VARIANTS = ("cluster", "grid")

PRECISIONS = {"bfloat16": "bfloat16", "TF32": "float32", "float16": "float16", "float32": "float32"}  # to the dtype


@dataclass(frozen=True)
class GpuCase:
    """One row: its sizes, and what float32 is multiplied in."""

    sizes: Case
    precision: str

    def __str__(self) -> str:
        """The case in words, as --only finds it."""
        case = self.sizes
        return f"{case.op} {case.kind} L={case.length} N={case.batch} H={case.hidden} {self.precision}"


@dataclass(frozen=True)
class Sizes:
    """The grid, and the rows with boundaries."""

    hidden: tuple[int, ...]
    batch: tuple[int, ...]
    length: tuple[int, ...]
    resets: tuple[int, int, int]  # L, N, H
    p: float  # that a sequence is reset at a step
    truncated: tuple[int, int, int]
    detach_steps: int


FULL = Sizes(
    hidden=(128, 256, 512, 768, 1024, 2048),
    batch=(1, 16, 64, 256),
    length=(1024, 128),
    resets=(128, 64, 256),
    p=0.02,
    truncated=(1024, 16, 256),
    detach_steps=64,
)
CHECK = Sizes(
    hidden=(8,), batch=(1, 3), length=(5,), resets=(9, 3, 8), p=0.2, truncated=(12, 2, 8), detach_steps=4
)


def cases(sizes: Sizes, device: str) -> list[GpuCase]:
    """All rows without boundaries, the most important first."""

    def rows(kind: Kind, length: int) -> Iterable[GpuCase]:
        for precision, dtype in PRECISIONS.items():
            for hidden in sizes.hidden:
                for batch in sizes.batch:
                    for op in ("LSTM", "GRU"):
                        yield GpuCase(Case(op, kind, length, batch, hidden, dtype, 1, device), precision)

    found = list(rows("step", 1))
    for length in sizes.length:
        for kind in ("inference", "training"):
            found += rows(kind, length)
    return sorted(found, key=importance)  # which keeps the order of equals


def importance(case: GpuCase) -> int:
    """The group of a row; the lower, the sooner it is measured."""
    size, precision = case.sizes, case.precision
    small = size.hidden <= 512 and size.batch <= 64
    long = size.length > 128
    groups = (
        long and small and precision == "bfloat16",
        long and small and precision == "TF32",
        long and (size.hidden, size.batch) == (768, 16),  # cuDNN's persistent kernels, in float16
        long and size.hidden == 1024 and size.batch <= 64 and precision == "bfloat16",
        size.kind == "step" and size.hidden <= 1024 and size.batch <= 64 and precision in ("bfloat16", "TF32"),
        long and size.hidden <= 1024 and precision != "float32",
        long and small,
        size.hidden <= 1024 and precision != "float32",
    )
    return groups.index(True) if any(groups) else len(groups)


def boundary_cases(sizes: Sizes, device: str) -> list[BoundaryCase]:
    """Resets against what people write around torch.nn; detaches against chunks."""
    p, k = sizes.p, sizes.detach_steps
    targets = {f"{OURS}, no mask": Target("at most", 1.05), "split and pad": Target("at least", 3)}
    plans: list[tuple[str, tuple[int, int, int], Callable[..., Any]]] = [
        (f"resets p={p}", sizes.resets, partial(resets, p=p, peers=("split and pad", "step loop"), targets=targets)),
        (f"truncated every {k}", sizes.truncated, partial(truncated, steps=k, target=Target("at least", 1))),
    ]
    operators: tuple[Operator, ...] = ("LSTM", "GRU")
    return [
        BoundaryCase(topic, Case(op, "training", length, batch, hidden, dtype, 1, device), plan)
        for topic, (length, batch, hidden), plan in plans
        for dtype in ("bfloat16", "float32")
        for op in operators
    ]


@dataclass(frozen=True)
class GpuRow:
    """What was measured for one case."""

    case: GpuCase
    milliseconds: dict[str, Spread]  # by contender
    ratio: Spread  # torch.nn's time / our time
    difference: float  # between torch.nn's results and ours, relative; the largest of all variants'
    explanation: str  # how ours ran
    rounds: int
    variants: dict[str, Spread] = field(default_factory=dict)  # ratios of those that can run the case
    explanations: dict[str, str] = field(default_factory=dict)  # how they ran

    @property
    def microseconds_per_step(self) -> float:
        """Our time for one step of all sequences."""
        return self.microseconds_per_step_of(OURS)

    def microseconds_per_step_of(self, contender: str) -> float:
        """A contender's time for one step of all sequences."""
        return 1e3 * self.milliseconds[contender].median / self.case.sizes.length

    @property
    def differs(self) -> bool:
        """Whether results are farther apart than rounding explains."""
        return not self.difference <= LARGEST_DIFFERENCE[self.case.precision]

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self) | {"us_per_step": self.microseconds_per_step}


def measure_row(case: GpuCase, effort: Effort) -> GpuRow:
    """Check that torch.nn, we and our variants agree on ``case``, then time all; a single step as a CUDA graph."""
    problem = make_problem(case.sizes)
    grad = torch.enable_grad if case.sizes.kind == "training" else torch.inference_mode
    ours = module_call(problem.ours, problem)
    with float32_precision(case.precision), grad():
        explanation = str(hsm.explain(problem.ours, problem.input))
        explanations: dict[str, str] = {}
        for variant in VARIANTS:
            with recurrence_by(variant):
                plan = hsm.explain(problem.ours, problem.input)
            if plan.variant == variant:
                explanations[variant] = str(plan)
        calls = {OURS: ours, TORCH: module_call(problem.torch_nn, problem)} | dict.fromkeys(explanations, ours)
        contexts = {name: partial(recurrence_by, name) if name in explanations else nullcontext for name in calls}
        difference, runs = 0.0, {}
        wanted = calls[TORCH]()
        for name, call in calls.items():
            with contexts[name]():
                difference = max(difference, largest_distance(wanted, call()))
                runs[name] = captured(call) if case.sizes.kind == "step" else call
        del wanted
        blocks = measure([Contender(name, run, contexts[name]) for name, run in runs.items()], 1, effort)
    return GpuRow(
        case=case,
        milliseconds={name: spread_of(merged(b), 1e3) for name, b in blocks.items()},
        ratio=spread_of(ratio(blocks[TORCH], blocks[OURS])),
        difference=difference,
        explanation=explanation,
        rounds=len(blocks[OURS]),
        variants={name: spread_of(ratio(blocks[TORCH], blocks[name])) for name in explanations},
        explanations=explanations,
    )


def format_rows(rows: list[GpuRow]) -> str:
    """For each operator, kind, precision, length and variant a line for each H with ratios and our times for each N."""
    groups: dict[tuple[str, str, str, int], dict[tuple[int, int], GpuRow]] = defaultdict(dict)
    for row in rows:
        size = row.case.sizes
        groups[size.op, size.kind, row.case.precision, size.length][size.hidden, size.batch] = row
    batches = sorted({row.case.sizes.batch for row in rows})
    lines = ["torch.nn's time / our time (above 1 we are faster), and our microseconds for a step"]
    for (op, kind, precision, length), found in groups.items():
        for contender in (OURS, *VARIANTS):
            if contender != OURS and not any(contender in row.variants for row in found.values()):
                continue
            lines += ["", f"{op} {kind} {precision} L={length}" + (f", {contender}" if contender != OURS else "")]
            lines.append(f"{'H':>6}" + "".join(f"{f'N={batch}':>18}" for batch in batches))
            for hidden in sorted({hidden for hidden, _ in found}):
                cells = (_cell(found.get((hidden, batch)), contender) for batch in batches)
                lines.append(f"{hidden:>6}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def _cell(row: GpuRow | None, contender: str) -> str:
    if row is None:
        return "not measured"
    spread = row.ratio if contender == OURS else row.variants.get(contender)
    if spread is None:
        return "step"
    return f"{spread.median:.2f}{'~' if spread.noisy else ' '}({row.microseconds_per_step_of(contender):.2f})"
