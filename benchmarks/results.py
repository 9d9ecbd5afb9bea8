"""Results as data: the machine, the rows, JSON files, the printed table, and two files compared."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from cases import Case
from peers import OURS, TORCH
from torch.utils.benchmark import Measurement

import hsm_kernels as hsm

FORMAT = 1


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """The median, and the quartiles in brackets."""
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def spread_of(measurement: Measurement, scale: float = 1.0) -> Spread:
    """Median and quartiles of a measurement."""
    quartiles = torch.tensor(measurement.times, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.75], dtype=torch.float64)
    )
    low, high = (scale * quartiles).tolist()
    return Spread(scale * measurement.median, low, high)


@dataclass(frozen=True)
class Row:
    """The measured times of one case."""

    case: Case
    milliseconds: dict[str, Spread]  # by contender
    ratio: dict[str, Spread]  # peer time / our time, by peer
    difference: dict[str, float]  # relative distance of a peer's results from ours
    gemm_gflops: float  # what large matrix products reach on the same threads in the same run
    rounds: int

    @property
    def share_of_gemm(self) -> float:
        """The part of the GEMM speed that our multiplications reach; 1 is the limit."""
        seconds = self.milliseconds[OURS].median / 1e3
        return self.case.flops / seconds / (self.gemm_gflops * 1e9)

    def to_json(self) -> dict[str, Any]:
        """Everything, derived figures too, for readers without this program."""
        return asdict(self) | {
            "flops": self.case.flops,
            "share_of_gemm": self.share_of_gemm,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Row":
        """The row that ``to_json`` wrote."""
        known = {field.name: data[field.name] for field in fields(cls)}
        known["case"] = Case(**data["case"])
        for name in ("milliseconds", "ratio"):
            known[name] = {key: Spread(**spread) for key, spread in data[name].items()}
        return cls(**known)


@dataclass(frozen=True)
class Results:
    """One run of the benchmark."""

    machine: dict[str, Any]
    rows: list[Row]

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        save(path, self.machine, [row.to_json() for row in self.rows])

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a JSON file that ``save`` wrote."""
        data = json.loads(path.read_text())
        if data.get("format") != FORMAT:
            raise ValueError(
                f"{path}: a results file of format {FORMAT} is wanted, got {data.get('format')}; "
                "measure again with this version"
            )
        return cls(data["machine"], [Row.from_json(row) for row in data["rows"]])


def save(path: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the rows of any benchmark to a JSON file."""
    data = {"format": FORMAT, "machine": machine, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


# The machine


def describe_machine() -> dict[str, Any]:
    """What ran where and when, without a path or a name of this machine."""
    build = hsm.build_info()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu",
        "processor": _processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hsm_kernels": hsm.__version__,
        "commit": _commit(),
        "build": f"{build.how}; {build.compiler}; {_without_paths(build.flags)}",
    }


def warn_of_load(program: str, machine: dict[str, Any], rows_left_out: int) -> None:
    """Say so where a busy machine took rows away or makes the rest doubtful."""
    load, cores = machine["load_at_start"], machine["cores"]
    if rows_left_out:
        print(f"{program}: the time was over: {rows_left_out} rows are left out", file=sys.stderr)
    if load > cores / 2:
        print(
            f"{program}: the machine was busy (load {load} on {cores} cores): ratios on several "
            "threads tell little, times nothing",
            file=sys.stderr,
        )


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git here
        return None
    return done.stdout.strip() or None


def _without_paths(flags: Iterable[str]) -> str:
    return " ".join(flag for flag in flags if "/" not in flag)


# The table


def format_rows(rows: list[Row]) -> str:
    """One line for each row: our time, the share of the GEMM speed, the ratio to each peer."""
    peers = peer_names(rows)
    head = f"{'':9} {'':9} {'':8} {'L':>4} {'N':>3} {'H':>4} {'ms':>9} {'of GEMM':>8}"
    lines = [head + "".join(f"  {'vs ' + peer:>27}" for peer in peers)]
    return "\n".join(lines + [format_row(row, peers) for row in rows])


def format_row(row: Row, peers: list[str]) -> str:
    """One line of the table."""
    case = row.case
    line = (
        f"{case.op + ' x' + str(case.threads):9} {case.kind:9} {case.dtype:8} {case.length:4} "
        f"{case.batch:3} {case.hidden:4} {row.milliseconds[OURS].median:9.4f} "
        f"{row.share_of_gemm:8.1%}"
    )
    return line + "".join(f"  {row.ratio.get(peer, '-')!s:>27}" for peer in peers)


def peer_names(rows: list[Row]) -> list[str]:
    """All peers of some rows, in their order."""
    return list(dict.fromkeys(peer for row in rows for peer in row.ratio))


def format_means(rows: list[Row]) -> str:
    """Geometric means of the ratios for each operator, kind, type and thread count."""
    groups: dict[tuple[int, str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        case = row.case
        groups[case.threads, case.dtype, case.op, case.kind].append(row)
    for row in rows:
        case = row.case
        groups[case.threads, case.dtype, case.op, "all"].append(row)
    peers = peer_names(rows)
    lines = ["Geometric means of peer time / our time (above 1 we are faster), and the worst row:"]
    for group in sorted(groups, key=lambda group: group[:3]):
        threads, dtype, op, kind = group
        line = f"{op + ' x' + str(threads):9} {kind:9} {dtype:8} {len(groups[group]):3} rows"
        lines.append(line + "".join(f"  {_format_mean(groups[group], peer)}" for peer in peers))
    return "\n".join(lines)


def _format_mean(rows: list[Row], peer: str) -> str:
    ratios = [row.ratio[peer].median for row in rows if peer in row.ratio]
    if not ratios:
        return f"{peer} -"
    return f"{peer} {statistics.geometric_mean(ratios):5.2f} (worst {min(ratios):5.2f})"


# Two files compared


@dataclass(frozen=True)
class Change:
    """One case in two files: above 1 the second is slower."""

    case: Case
    slowdown: float


def slowdown_in_time(before: Row, after: Row) -> float:
    """How much longer we take; only for files of one idle machine."""
    return after.milliseconds[OURS].median / before.milliseconds[OURS].median


def slowdown_against_torch(before: Row, after: Row) -> float:
    """How much we lost against torch.nn, which was measured beside us in both runs."""
    return before.ratio[TORCH].median / after.ratio[TORCH].median


MEASURES: dict[str, Callable[[Row, Row], float]] = {
    "ratio": slowdown_against_torch,
    "time": slowdown_in_time,
}


def compare(before: Results, after: Results, measure: str) -> list[Change]:
    """All cases that both files have, the worst change first."""
    old = {row.case: row for row in before.rows}
    changes = [
        Change(row.case, MEASURES[measure](old[row.case], row))
        for row in after.rows
        if row.case in old
    ]
    if not changes:
        raise ValueError("the two files have no case in common: nothing to compare")
    return sorted(changes, key=lambda change: change.slowdown, reverse=True)


def format_changes(changes: list[Change], threshold: float) -> str:
    """One line for each change; those above the threshold are marked."""
    lines = [f"{'':9} {'':9} {'':8} {'L':>4} {'N':>3} {'H':>4}  after / before"]
    for change in changes:
        case = change.case
        mark = "  SLOWER" if change.slowdown > threshold else ""
        lines.append(
            f"{case.op + ' x' + str(case.threads):9} {case.kind:9} {case.dtype:8} {case.length:4} "
            f"{case.batch:3} {case.hidden:4}  {change.slowdown:14.3f}{mark}"
        )
    return "\n".join(lines)
