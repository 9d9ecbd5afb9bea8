"""Measure hsm_kernels against other implementations of LSTM and GRU on this machine's CPU.

    python benchmarks/bench_rnn.py                  # a choice of rows, under four minutes
    python benchmarks/bench_rnn.py --full           # the whole grid, float32 and bfloat16
    python benchmarks/bench_rnn.py --check          # tiny sizes, to see that everything works
    python benchmarks/bench_rnn.py --compare before.json after.json

See README.md beside this file for what is measured and how to read it.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from agreement import LARGEST_DIFFERENCE, largest_distance
from cases import DTYPES, Case, check_cases, full_cases, make_problem, quick_cases
from peers import OURS, PEERS, Peer
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
from timing import (
    Contender,
    Effort,
    default_threads,
    gemm_flops_per_second,
    measure,
    merged,
    nested,
    ratio,
    share_time,
    torch_threads,
)


@dataclass(frozen=True)
class Mode:
    """A choice of rows, and how long to spend on them."""

    cases: Callable[[int], list[Case]]  # for a thread count
    effort: Effort
    seconds: float  # for all rows: a busy machine gets fewer rounds, then rows are left out
    gemm_seconds: float


MODES = {
    "quick": Mode(
        quick_cases,
        Effort(block_seconds=0.01, row_seconds=1.0, fewest_rounds=3, most_rounds=15),
        seconds=200.0,
        gemm_seconds=1.5,
    ),
    "full": Mode(
        full_cases,
        Effort(block_seconds=0.02, row_seconds=3.0, fewest_rounds=7, most_rounds=25),
        seconds=math.inf,
        gemm_seconds=5.0,
    ),
    "check": Mode(
        check_cases,
        Effort(block_seconds=0.001, row_seconds=0.02, fewest_rounds=2, most_rounds=3),
        seconds=math.inf,
        gemm_seconds=0.1,
    ),
}


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line (``sys.argv`` if ``arguments`` is None)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    task = parser.add_mutually_exclusive_group()
    for mode in MODES:
        task.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode)
    task.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    parser.set_defaults(mode="quick")
    add = parser.add_argument
    add("--threads", type=int, nargs="+", help="thread counts (default: 1 and 2, if there are 2)")
    add("--only", default="", help="only rows whose name holds this text, e.g. 'GRU training'")
    add("--out", type=Path, help="JSON file; pictures go beside it (default: results/MODE.json)")
    add("--threshold", type=float, default=1.2, help="slowdown at which --compare fails (1.2)")
    add("--by", choices=MEASURES, default="ratio", help="--compare by ratio to torch.nn, or time")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure or compare; 1 if results disagree or a row became slower than allowed, else 0."""
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
    results = Results(describe_machine(), [])
    for row in measure_all(chosen, mode):
        results.rows.append(row)
        results.save(path)  # each time, so that a long run that is cut off is not lost
    report(results, path)
    warn_of_load("bench_rnn", results.machine, len(chosen) - len(results.rows))
    return complain_of_differences(results.rows)


def default_path(mode: str) -> Path:
    """Where results go unless --out says otherwise."""
    return Path(__file__).parent / "results" / f"{mode}.json"


def measure_all(cases: list[Case], mode: Mode) -> Iterator[Row]:
    """Measure the cases one after the other, and the GEMM speed that each is compared with."""
    kinds = dict.fromkeys((case.dtype, case.threads) for case in cases)
    gemm_speeds = {
        (dtype, threads): gemm_flops_per_second(DTYPES[dtype], threads, mode.gemm_seconds) / 1e9
        for dtype, threads in kinds
    }
    for case, left in share_time(cases, mode.seconds):
        with torch_threads(case.threads):
            speed = gemm_speeds[case.dtype, case.threads]
            row = measure_row(case, speed, mode.effort.within(left))
        yield row


def measure_row(case: Case, gemm_gflops: float, effort: Effort) -> Row:
    """Check that all contenders agree on ``case``, then time them."""
    problem = make_problem(case)
    calls = {peer: call for peer in PEERS if (call := peer.prepare(problem)) is not None}
    contenders = [
        Contender(peer.name, call, context_of(peer, case)) for peer, call in calls.items()
    ]
    difference = differences(contenders)
    blocks = measure(contenders, case.threads, effort)
    return Row(
        case=case,
        milliseconds={name: spread_of(merged(b), 1e3) for name, b in blocks.items()},
        ratio={
            name: spread_of(ratio(b, blocks[OURS])) for name, b in blocks.items() if name != OURS
        },
        difference=difference,
        gemm_gflops=gemm_gflops,
        rounds=len(blocks[OURS]),
    )


def context_of(peer: Peer, case: Case) -> Callable[[], AbstractContextManager[object]]:
    """What surrounds each block: nothing records gradients outside training."""
    if case.kind == "training":
        return peer.context
    return partial(nested, peer.context, torch.inference_mode)


def differences(contenders: list[Contender]) -> dict[str, float]:
    """How far each peer's results are from ours, relative to their size."""
    outputs = {}
    for contender in contenders:
        with contender.context():
            outputs[contender.name] = contender.run()
    return {
        name: largest_distance(peer, outputs[OURS])
        for name, peer in outputs.items()
        if name != OURS
    }


def report(results: Results, path: Path) -> None:
    """Print the tables; save a picture for each data type beside the results at ``path``."""
    for name, value in results.machine.items():
        print(f"{name + ':':17}{value}")
    print(f"\n{format_rows(results.rows)}\n\n{format_means(results.rows)}\n\nsaved {path}")
    for dtype in dict.fromkeys(row.case.dtype for row in results.rows):
        picture = path.with_name(f"{path.stem}-{dtype}.png")
        draw(results, dtype, picture)
        print(f"saved {picture}")


def complain_of_differences(rows: list[Row]) -> int:
    """Name the rows whose results are not ours; 1 if there are any."""
    wrong = [
        (row.case, peer, difference)
        for row in rows
        for peer, difference in row.difference.items()
        if not difference <= LARGEST_DIFFERENCE[row.case.dtype]
    ]
    for case, peer, difference in wrong:
        limit = LARGEST_DIFFERENCE[case.dtype]
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
