"""Measure what short calls cost beside their kernel, per-sample gradients, and a compiled training step.

    python benchmarks/bench_transforms.py            # all rows, three minutes
    python benchmarks/bench_transforms.py --check    # tiny sizes, to see that everything works

See README.md beside this file for what is measured.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from agreement import LARGEST_DIFFERENCE, largest_distance
from boundary_cases import Comparison, Target
from boundary_results import Finding
from cases import Case, Problem, make_problem
from peers import OURS, TORCH, Call, module_call
from results import describe_machine, spread_of, warn_of_load
from timing import Contender, Effort, default_threads, measure, merged, nested, ratio, share_time, torch_threads
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import hsm_kernels as hsm

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import char_lm

OPERATOR = "the operator"
VMAP = "vmap(grad)"
LOOP = {OURS: f"loop over {OURS}", TORCH: f"loop over {TORCH}"}
COMPILED = {OURS: f"{OURS}, compiled", TORCH: f"{TORCH}, compiled"}
VOCABULARY = 96


@dataclass(frozen=True)
class Sizes:
    """The sizes of all rows."""

    call: int  # H
    cells: tuple[int, int, tuple[int, ...]]  # L, H, and N of each row
    samples: tuple[int, int, int]  # samples, L, H
    models: tuple[tuple[int, int, int], ...]  # L, N, H of the character model
    effort: Effort


QUICK = Sizes(
    call=64,
    cells=(8, 64, (1, 64)),
    samples=(64, 64, 128),
    models=((64, 32, 256), (16, 8, 64)),
    effort=Effort(block_seconds=0.02, row_seconds=6.0, fewest_rounds=5, most_rounds=60),
)
CHECK = Sizes(
    call=8,
    cells=(2, 8, (3,)),
    samples=(3, 4, 8),
    models=((4, 2, 8),),
    effort=Effort(block_seconds=0.001, row_seconds=0.02, fewest_rounds=2, most_rounds=3),
)


@dataclass(frozen=True)
class Row:
    """What is measured: ``make`` prepares the contenders, all of which compute the same."""

    name: str
    case: Case
    make: Callable[[Case], dict[str, Call]]
    comparisons: tuple[Comparison, ...]
    without_gradients: bool = False

    def __str__(self) -> str:
        """The row in words, as --only finds it."""
        size = f"L={self.case.length} N={self.case.batch} H={self.case.hidden}"
        return f"{self.case.op} {self.name} {size} {self.case.place}"


# Short calls


def calls(case: Case) -> dict[str, Call]:
    """One step: its results, in training the gradients of the input and of all weights too."""
    problem = make_problem(case)
    found = {TORCH: module_call(problem.torch_nn, problem), OURS: module_call(problem.ours, problem)}
    return found if case.kind == "training" else found | {OPERATOR: operator_call(problem)}


def operator_call(problem: Problem) -> Call:
    """The operator, which is the kernel and torch's dispatcher."""
    name, state = problem.case.op.lower(), problem.state
    operator = getattr(torch.ops.hsm_kernels, f"{name}_forward").default
    states = state if isinstance(state, tuple) else (state,)
    weights = [*(w.detach() for w in problem.ours.parameters()), *[None] * (6 if len(states) == 2 else 4)]
    nothing = [None] * (3 + len(states))  # no boundaries
    flags = (0, *[False] * (2 + len(states)))
    arguments = (problem.input, *states, *weights, *nothing, *flags)
    return lambda: operator(*arguments)[: 1 + len(states)]


def cell_loops(case: Case) -> dict[str, Call]:
    """Steps of a cell one by one: the last h, and the gradients of all inputs and of all weights."""
    torch.manual_seed(0)
    torch_nn = getattr(nn, f"{case.op}Cell")(case.hidden, case.hidden)
    inputs = [torch.randn(case.batch, case.hidden, requires_grad=True) for _ in range(case.length)]

    def loop(cell: nn.RNNCellBase) -> tuple[Tensor, ...]:
        state = None
        for x in inputs:
            state = cell(x, state)
        h = state[0] if isinstance(state, tuple) else state
        return h.detach(), *torch.autograd.grad(h.sum(), [*inputs, *cell.parameters()])

    return {TORCH: partial(loop, torch_nn), OURS: partial(loop, hsm.from_torch(torch_nn))}


# Per-sample gradients


def sample_gradients(samples: int, case: Case) -> dict[str, Call]:
    """The gradients of all weights for each sample, stacked."""
    problem = make_problem(replace(case, batch=1))
    inputs = torch.randn(samples, case.length, 1, case.hidden)
    weights = {name: weight.detach() for name, weight in problem.ours.named_parameters()}

    def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(problem.ours, weights, (sample,))[0].square().sum()

    def loop(module: nn.Module) -> tuple[Tensor, ...]:
        parameters = list(module.parameters())
        each = [torch.autograd.grad(module(sample)[0].square().sum(), parameters) for sample in inputs]
        return tuple(torch.stack(grads) for grads in zip(*each, strict=True))

    per_sample = vmap(grad(loss), (None, 0))
    return {
        VMAP: lambda: tuple(per_sample(weights, inputs).values()),
        LOOP[OURS]: partial(loop, problem.ours),
        LOOP[TORCH]: partial(loop, problem.torch_nn),
    }


# A training step of the character model


def training_steps(case: Case) -> dict[str, Call]:
    """Forward, backward, clipping and optimizer, as examples/char_lm.py does them; each returns its loss."""
    text = torch.randint(VOCABULARY, (case.length + 1, case.batch))
    return {
        name: training_step(library, case, text, compiled)
        for library in (TORCH, OURS)
        for name, compiled in ((library, False), (COMPILED[library], True))
    }


def training_step(library: str, case: Case, text: Tensor, compiled: bool) -> Call:
    """One contender; what is before the backward pass, and what is behind it, are a compiled function each."""
    options: Any = argparse.Namespace(cell=case.op, hidden=case.hidden, layers=1)
    torch.manual_seed(0)
    model = char_lm.CharacterModel(char_lm.LIBRARIES[library], VOCABULARY, options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def forward(inputs: Tensor, targets: Tensor, state: char_lm.State) -> tuple[Tensor, char_lm.State]:
        logits, state = model(inputs, state)
        return char_lm.bits_per_character(logits, targets), state

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    if compiled:
        forward, update = torch.compile(forward, fullgraph=library == OURS), torch.compile(update)
    carried = [hsm.state.initial_state(model.rnn, case.batch)]

    def call() -> tuple[Tensor, ...]:
        loss, state = forward(text[:-1], text[1:], carried[0])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        update()
        carried[0] = char_lm.detach(state)
        return (loss.detach(),)

    return call


# Measuring


def all_rows(sizes: Sizes, threads: int) -> list[Row]:
    """Every row, for LSTM and GRU."""
    rows = []
    for op in ("LSTM", "GRU"):
        one = Case(op, "step", 1, 1, sizes.call, "float32", threads)  # type: ignore[arg-type]
        at_most = partial(Target, "at most")
        against_torch = Comparison(OURS, TORCH, at_most(1))
        bare = Comparison(OURS, OPERATOR, at_most(2))
        rows.append(Row("call", one, calls, (against_torch, bare), without_gradients=True))
        rows.append(Row("training call", replace(one, kind="training"), calls, (against_torch,)))
        length, hidden, batches = sizes.cells
        for batch in batches:
            case = replace(one, kind="training", length=length, batch=batch, hidden=hidden)
            rows.append(Row("cell in a loop", case, cell_loops, (against_torch,)))
        samples, length, hidden = sizes.samples
        case = replace(one, kind="training", length=length, hidden=hidden)
        against_loops = (Comparison(LOOP[OURS], VMAP), Comparison(LOOP[TORCH], VMAP, Target("at least", 10)))
        rows.append(Row(f"{samples} per-sample gradients", case, partial(sample_gradients, samples), against_loops))
        for length, batch, hidden in sizes.models:
            case = replace(one, kind="training", length=length, batch=batch, hidden=hidden)
            faster = tuple(Comparison(name, COMPILED[OURS], Target("at least", 1)) for name in (OURS, TORCH))
            rows.append(Row("character model", case, training_steps, (*faster, Comparison(TORCH, COMPILED[TORCH]))))
    return rows


def measure_row(row: Row, effort: Effort) -> tuple[str, bool]:
    """The text of a row, and whether all contenders agreed before they were timed."""
    context = torch.inference_mode if row.without_gradients else torch.enable_grad
    with torch_threads(row.case.threads), context():
        entries = row.make(row.case)
        (name, *others), limit = entries, LARGEST_DIFFERENCE["float32"]
        expected = entries[name]()
        distances = {other: largest_distance(entries[other](), expected) for other in others}
        blocks = measure([Contender(name, call, partial(nested, context)) for name, call in entries.items()],
                         row.case.threads, effort)  # fmt: skip
    lines = [f"{row}  ({len(blocks[name])} rounds)"]
    for comparison in row.comparisons:
        over, under = (merged(blocks[side]).median * 1e3 for side in (comparison.over, comparison.under))
        finding = Finding(comparison, spread_of(ratio(blocks[comparison.over], blocks[comparison.under])))
        times = f"{over:9.4g} / {under:9.4g} ms  {finding.ratio!s:>22}"
        lines.append(f"  {finding.title:48} {times}  {comparison.target or ''!s:13} {finding.verdict}".rstrip())
    wrong = {other: distance for other, distance in distances.items() if not distance <= limit}
    lines += [f"  WRONG: {other} and {name} must agree within {limit:g}, but differ by {distance:.2g}"
              for other, distance in wrong.items()]  # fmt: skip
    return "\n".join(lines), not wrong


def main(arguments: list[str] | None = None) -> int:
    """Measure; 1 if results disagree, else 0, whether targets are met or missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="tiny sizes")
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts (default: 1 and 2, if there are 2)")
    parser.add_argument("--only", default="", help="only rows whose name holds this text, e.g. 'GRU call'")
    options = parser.parse_args(arguments)
    sizes = CHECK if options.check else QUICK
    rows = [row for count in options.threads or default_threads() for row in all_rows(sizes, count)]
    chosen = [row for row in rows if options.only in str(row)]
    if not chosen:
        raise SystemExit(f"bench_transforms: --only {options.only!r} leaves no row")
    machine, agreed = describe_machine(), True
    found = []
    for row, seconds in share_time(chosen, 180.0):
        text, agrees = measure_row(row, sizes.effort.within(seconds))
        found.append(text)
        agreed &= agrees
    for name, value in machine.items():
        print(f"{name + ':':17}{value}")
    print("", *found, sep="\n")
    warn_of_load("bench_transforms", machine, len(chosen) - len(found))
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
