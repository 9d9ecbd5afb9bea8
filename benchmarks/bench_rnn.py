"""Measure hsm_kernels against other implementations of LSTM and GRU on this machine's CPU.

    python benchmarks/bench_rnn.py                  # a choice of rows, under four minutes
    python benchmarks/bench_rnn.py --full           # the whole grid, float32 and bfloat16: hours
    python benchmarks/bench_rnn.py --full --resume  # the rows that are not in the file yet
    python benchmarks/bench_rnn.py --check          # tiny sizes, to see that everything works
    python benchmarks/bench_rnn.py --compare before.json after.json

Peers: torch.nn; ONNX Runtime, OpenVINO and JAX where they are installed (pip install
hsm_kernels[bench]). See README.md beside this file for what is measured and how to read it.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from agreement import LARGEST_DIFFERENCE, error_of, exact_results, largest_distance
from cases import Case, Problem, check_cases, full_cases, make_problem, quick_cases
from jax_peer import JAX
from limits import Limits, measure_limits
from onnx_peers import ONNX_RUNTIME, OPENVINO
from peers import LIGHT, OURS, TORCH, TORCH_PEERS, Peer, Prepared
from plots import draw
from results import (
    MEASURES,
    Results,
    Row,
    compare,
    describe_machine,
    format_changes,
    format_means,
    format_rows,
    spread_of,
    warn_of_load,
)
from targets import format_verdicts, verdicts
from timing import (
    Contender,
    Effort,
    default_threads,
    measure,
    merged,
    nested,
    ratio,
    share_time,
    torch_threads,
)
from torch import Tensor

PEERS = (*TORCH_PEERS, ONNX_RUNTIME, OPENVINO, JAX)
NEVER_SKIPPED = (OURS, TORCH)  # however long a call takes: the targets need them


@dataclass(frozen=True)
class Mode:
    """A choice of rows, and how long to spend on them."""

    help: str
    cases: Callable[[int], list[Case]]  # for a thread count
    effort: Effort
    seconds: float  # for all rows: a busy machine gets fewer rounds, then rows are left out
    limits_seconds: float  # for each thread count
    longest_call: float  # seconds; a peer that takes longer is left out of the row
    gemm_sizes: tuple[int, ...] = (1024, 1536)


MODES = {
    "quick": Mode(
        "a choice of rows in float32, under four minutes (the default)",
        quick_cases,
        Effort(block_seconds=0.01, row_seconds=1.0, fewest_rounds=3, most_rounds=15),
        seconds=190.0,
        limits_seconds=4.0,
        longest_call=1.0,
    ),
    "full": Mode(
        "all rows, float32 and bfloat16: hours",
        full_cases,
        Effort(block_seconds=0.02, row_seconds=3.0, fewest_rounds=5, most_rounds=25),
        seconds=math.inf,
        limits_seconds=20.0,
        longest_call=8.0,
    ),
    "check": Mode(
        "tiny sizes, to see that everything works",
        check_cases,
        Effort(block_seconds=0.001, row_seconds=0.02, fewest_rounds=2, most_rounds=3),
        seconds=math.inf,
        limits_seconds=0.1,
        longest_call=10.0,
        gemm_sizes=(128,),
    ),
}


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line (``sys.argv`` if ``arguments`` is None)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    task = parser.add_mutually_exclusive_group()
    for name, mode in MODES.items():
        task.add_argument(f"--{name}", dest="mode", action="store_const", const=name, help=mode.help)
    task.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE", "AFTER"),
        help="measure nothing; show what became slower between two JSON files",
    )
    parser.set_defaults(mode="quick")
    add = parser.add_argument
    add("--threads", type=int, nargs="+", help="thread counts (default: 1 and 2, if there are 2)")
    add("--only", default="", help="only rows whose name holds this text, e.g. 'GRU training'")
    add("--resume", action="store_true", help="keep the rows that the JSON file has, measure the rest")
    add("--out", type=Path, help="JSON file; pictures beside it (default: results/MODE.json)")
    add("--threshold", type=float, default=1.2, help="slowdown at which --compare fails (1.2)")
    add("--by", choices=MEASURES, default="ratio", help="--compare by ratio to torch.nn, or time")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure or compare; 1 if results disagree or a row became slower than allowed, else 0.

    A missed target is printed, no more.
    """
    options = parse_options(arguments)
    if options.compare:
        before, after = options.compare
        return report_changes(before, after, options.by, options.threshold)
    mode = MODES[options.mode]
    threads = options.threads or default_threads()
    chosen = [case for count in threads for case in mode.cases(count) if options.only in str(case)]
    if not chosen:
        raise SystemExit(f"bench_rnn: --only {options.only!r} leaves no row of --{options.mode}")

    path = options.out or default_path(options.mode)
    machine = describe_machine() | {"peers": {peer.name: peer.describe() for peer in PEERS[1:]}}
    try:
        results = Results.resume(path, machine) if options.resume else Results(machine)
    except ValueError as error:
        raise SystemExit(f"bench_rnn: {error}") from None
    measured = {row.case for row in results.rows}
    todo = [case for case in chosen if case not in measured]
    find_limits(results, todo, mode)
    done = 0
    for row in measure_all(todo, results, mode):
        results.rows.append(row)
        done += 1
        results.save(path)  # each time, so that a long run that is cut off is not lost
    report(results, path)
    warn_of_load("bench_rnn", machine, len(todo) - done)
    return complain_of_differences(results.rows)


def default_path(mode: str) -> Path:
    """Where results go unless --out says otherwise."""
    return Path(__file__).parent / "results" / f"{mode}.json"


def find_limits(results: Results, cases: list[Case], mode: Mode) -> None:
    """Measure the limits of the machine for all thread counts that ``results`` has none for."""
    known = {limits.threads for limits in results.limits}
    for threads in dict.fromkeys(case.threads for case in cases if case.threads not in known):
        results.limits.append(measure_limits(threads, mode.limits_seconds, mode.gemm_sizes))


def measure_all(cases: list[Case], results: Results, mode: Mode) -> Iterator[Row]:
    """Measure the cases one after the other; ``results`` has the limits, and the rows before."""
    limits = {found.threads: found for found in results.limits}
    for case, left in share_time(cases, mode.seconds):
        with torch_threads(case.threads):
            row = measure_row(case, limits[case.threads], left, mode, results.rows)
        yield row


def measure_row(
    case: Case, limits: Limits, left: float, mode: Mode, rows_before: Sequence[Row] = ()
) -> Row:
    """Check that all contenders agree on ``case``, then time them, in ``left`` seconds if possible."""
    begin = time.monotonic()
    problem = make_problem(case)
    contenders, results, skipped = prepare(problem, mode.longest_call, rows_before)
    exact = exact_results(problem)
    effort = mode.effort.within(left - (time.monotonic() - begin))
    blocks = measure(contenders, case.threads, effort)
    return Row(
        case=case,
        milliseconds={name: spread_of(merged(b), 1e3) for name, b in blocks.items()},
        ratio={
            name: spread_of(ratio(b, blocks[OURS])) for name, b in blocks.items() if name != OURS
        },
        skipped=skipped,
        difference={
            name: largest_distance(tensors, results[OURS])
            for name, tensors in results.items()
            if name != OURS
        },
        error={name: error_of(tensors, exact, problem) for name, tensors in results.items()},
        limit=limits.of(case),
        rounds=len(blocks[OURS]),
    )


def prepare(
    problem: Problem, longest_call: float, rows_before: Sequence[Row] = ()
) -> tuple[list[Contender], dict[str, tuple[Tensor, ...]], dict[str, str]]:
    """Who is timed, what each of them computes, and who is too slow for it, with the reason."""
    contenders, results, skipped = [], {}, {}
    for peer in PEERS:
        if smaller := smaller_skipped_row(peer, problem.case, rows_before):
            skipped[peer.name] = f"too slow in {smaller.case} already"
            continue
        prepared = None if peer.missing() else peer.prepare(problem)
        if prepared is None:
            continue
        context = context_of(peer, problem)
        with context():
            results[peer.name], seconds = first_call(prepared)
        if seconds > longest_call and peer.name not in NEVER_SKIPPED:
            skipped[peer.name] = f"one call took {seconds:.1f} s, more than {longest_call:g}"
        else:
            contenders.append(Contender(peer.name, prepared.run, context))
    return contenders, results, skipped


def smaller_skipped_row(peer: Peer, case: Case, rows: Sequence[Row]) -> Row | None:
    """A row with less work of the same sort that ``peer`` was too slow for, if there is one."""
    for row in rows:
        found = row.case
        same = replace(case, length=found.length, batch=found.batch, hidden=found.hidden) == found
        sizes = ((found.length, case.length), (found.batch, case.batch), (found.hidden, case.hidden))
        if peer.name in row.skipped and same and all(a <= b for a, b in sizes):
            return row
    return None


def first_call(prepared: Prepared) -> tuple[tuple[Tensor, ...], float]:
    """The results, copied, and about how many seconds they took."""
    begin = time.monotonic()
    found = prepared.run()
    seconds = time.monotonic() - begin
    return tuple(tensor.clone() for tensor in prepared.read(found)), seconds


def context_of(peer: Peer, problem: Problem) -> Callable[[], AbstractContextManager[object]]:
    """What surrounds each block: nothing records gradients outside training."""
    surrounding = partial(peer.context, problem)
    if problem.case.kind == "training":
        return surrounding
    return partial(nested, surrounding, torch.inference_mode)


def report(results: Results, path: Path) -> None:
    """Print the tables; save all of it at ``path`` and pictures beside it."""
    for name, value in results.machine.items():
        if name != "peers":
            print(f"{name + ':':17}{value}")
    for name, facts in results.machine["peers"].items():
        print(f"{name}: {describe_peer(facts)}")
    for limits in results.limits:
        print(limits)
    found = verdicts(results.rows)
    results.save(path, targets=[asdict(verdict) for verdict in found])
    print(f"\n{format_rows(results.rows)}\n\n{format_means(results.rows)}")
    print(f"\n{format_verdicts(found)}\n\nsaved {path}")
    for picture in draw(results, path):
        print(f"saved {picture}")


def describe_peer(facts: dict[str, Any]) -> str:
    """The versions and settings of a peer in a line."""
    if missing := facts.get("missing"):
        return f"MISSING, not measured: pip install {' '.join(missing)}"
    versions = [f"{package} {version}" for package, version in facts["versions"].items()]
    return "; ".join([*versions, facts["settings"]])


def largest_difference(case: Case, peer: str) -> float:
    """How far the results of ``peer`` may be from ours."""
    return LARGEST_DIFFERENCE["bfloat16" if peer == LIGHT else case.dtype]


def complain_of_differences(rows: list[Row]) -> int:
    """Name the rows whose results are not ours; 1 if there are any."""
    wrong = [
        (row.case, peer, difference)
        for row in rows
        for peer, difference in row.difference.items()
        if not difference <= largest_difference(row.case, peer)
    ]
    for case, peer, difference in wrong:
        limit = largest_difference(case, peer)
        print(
            f"bench_rnn: {case}: {OURS} and {peer} must agree within {limit:g}, "
            f"but differ by {difference:.2g}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def report_changes(before: Path, after: Path, measure_name: str, threshold: float) -> int:
    """Print how each row changed between two files; 1 if one slowed down beyond ``threshold``."""
    try:
        changes = compare(Results.load(before), Results.load(after), measure_name)
    except (OSError, ValueError) as error:
        raise SystemExit(f"bench_rnn: {error}") from None
    print(format_changes(changes, threshold))
    slower = sum(change.slowdown > threshold for change in changes)
    print(f"{slower} of {len(changes)} rows are slower than {threshold:g} times before")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
