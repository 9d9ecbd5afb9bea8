"""Measure resets, detaches, lengths and recomputing against what is written around torch.nn.

    python benchmarks/bench_boundaries.py            # all rows, under four minutes
    python benchmarks/bench_boundaries.py --check    # tiny sizes, to see that everything works

See README.md beside this file for what is measured and how to read it.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from agreement import LARGEST_DIFFERENCE, largest_distance
from boundary_cases import (
    CHECK,
    QUICK,
    BoundaryCase,
    Comparison,
    Entry,
    Sizes,
    all_cases,
)
from boundary_results import BoundaryRow, Difference, Finding, draw, format_rows
from results import Spread, describe_machine, save, spread_of, warn_of_load
from timing import (
    Contender,
    Effort,
    Measure,
    default_threads,
    measure,
    merged,
    ratio,
    share_time,
    torch_threads,
)
from torch.utils.benchmark import Measurement


@dataclass(frozen=True)
class Mode:
    """The sizes, and how long to spend on them."""

    sizes: Sizes
    effort: Effort
    seconds: float  # for all rows: a busy machine gets fewer rounds, then rows are left out


MODES = {
    "quick": Mode(
        QUICK,
        Effort(block_seconds=0.02, row_seconds=2.0, fewest_rounds=3, most_rounds=15),
        seconds=200.0,
    ),
    "check": Mode(
        CHECK,
        Effort(block_seconds=0.001, row_seconds=0.02, fewest_rounds=2, most_rounds=3),
        seconds=math.inf,
    ),
}


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line (``sys.argv`` if ``arguments`` is None)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", dest="mode", action="store_const", const="check", default="quick")
    add("--threads", type=int, nargs="+", help="thread counts (default: 1 and 2, if there are 2)")
    add("--only", default="", help="only rows whose name holds this text, e.g. 'GRU resets'")
    add("--out", type=Path, help="JSON file; a picture goes beside it (default: results/)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure; 1 if results disagree, else 0, whether targets are met or missed."""
    options = parse_options(arguments)
    mode = MODES[options.mode]
    threads = options.threads or default_threads()
    cases = [case for count in threads for case in all_cases(mode.sizes, count)]
    chosen = [case for case in cases if options.only in str(case)]
    if not chosen:
        raise SystemExit(f"bench_boundaries: --only {options.only!r} leaves no row")

    path = options.out or default_path(options.mode)
    machine, rows = describe_machine(), []
    for case, seconds in share_time(chosen, mode.seconds):
        rows.append(measure_row(case, mode.effort.within(seconds)))
        save(path, machine, [row.to_json() for row in rows])
    picture = path.with_suffix(".png")
    draw(machine, rows, picture)
    for name, value in machine.items():
        print(f"{name + ':':17}{value}")
    print(f"\n{format_rows(rows)}\n\nsaved {path}\nsaved {picture}")
    warn_of_load("bench_boundaries", machine, len(chosen) - len(rows))
    return complain_of_differences(rows)


def default_path(mode: str) -> Path:
    """Where results go unless --out says otherwise."""
    name = "boundaries-check" if mode == "check" else "boundaries"
    return Path(__file__).parent / "results" / f"{name}.json"


def measure_row(case: BoundaryCase, effort: Effort, measure: Measure = measure) -> BoundaryRow:
    """Check that contenders agree on ``case``, then time them."""
    with torch_threads(case.sizes.threads):
        plan = case.plan(case.sizes)
        differences = differences_of(plan.entries)
        contenders = [Contender(entry.name, entry.call) for entry in plan.entries if entry.timed]
        blocks = measure(contenders, case.sizes.threads, effort)
    return BoundaryRow(
        case=case,
        milliseconds={name: spread_of(merged(b), 1e3) for name, b in blocks.items()},
        saved_bytes=plan.saved_bytes,
        findings=[finding(c, blocks, plan.saved_bytes) for c in plan.comparisons],
        differences=differences,
        rounds=len(next(iter(blocks.values()))),
    )


def differences_of(entries: list[Entry]) -> list[Difference]:
    """How far entries are from the first one with the same result."""
    differences, first = [], {}
    for entry in entries:
        tensors = entry.call()
        if entry.result not in first:
            first[entry.result] = entry.name, tensors
            continue
        name, expected = first[entry.result]
        differences.append(Difference((name, entry.name), largest_distance(tensors, expected)))
    return differences


def finding(
    comparison: Comparison, blocks: dict[str, list[Measurement]], saved_bytes: dict[str, int]
) -> Finding:
    """The ratio that ``comparison`` asks for."""
    over, under = comparison.over, comparison.under
    if comparison.quantity == "bytes":
        share = saved_bytes[over] / saved_bytes[under]
        return Finding(comparison, Spread(share, share, share))
    return Finding(comparison, spread_of(ratio(blocks[over], blocks[under])))


def complain_of_differences(rows: list[BoundaryRow]) -> int:
    """Name the contenders that do not agree; 1 if there are any."""
    limits = {row.case: LARGEST_DIFFERENCE[row.case.sizes.dtype] for row in rows}
    wrong = [(row.case, d) for row in rows for d in row.differences if not d.distance <= limits[row.case]]
    for case, difference in wrong:
        print(
            f"bench_boundaries: {case}: {' and '.join(difference.names)} must agree within "
            f"{limits[case]:g}, but differ by {difference.distance:.2g}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
