"""Results as data: the machine, the rows, JSON files, the printed table, and two files compared."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from agreement import Error
from cases import Case
from limits import Limit, Limits
from peers import OURS, TORCH
from torch.utils.benchmark import Measurement

import hsm_kernels as hsm

FORMAT = 2
NOISY = 0.2  # quartiles so far apart, relative to the median


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """The median, and the quartiles in brackets."""
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"

    @property
    def noisy(self) -> bool:
        """Whether the quartiles are far from each other."""
        return self.high - self.low > NOISY * self.median


def spread_of(measurement: Measurement, scale: float = 1.0) -> Spread:
    """Median and quartiles of a measurement."""
    quartiles = torch.tensor(measurement.times, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.75], dtype=torch.float64)
    )
    low, high = (scale * quartiles).tolist()
    return Spread(scale * measurement.median, low, high)


@dataclass(frozen=True)
class Row:
    """What was measured for one case; ``milliseconds`` and ``ratio`` lack the peers in ``skipped``."""

    case: Case
    milliseconds: dict[str, Spread]  # by contender
    ratio: dict[str, Spread]  # peer time / our time, by peer
    skipped: dict[str, str]  # peers that can do the case, and why they were not timed
    difference: dict[str, float]  # relative distance of a peer's results from ours
    error: dict[str, Error]  # from float64, by contender
    limit: Limit
    rounds: int

    @property
    def share_of_limit(self) -> float:
        """The limit's time over ours; 1 is all that the machine can do."""
        return self.limit.milliseconds / self.milliseconds[OURS].median

    @property
    def share_of_peak(self) -> float:
        """The part of the GEMM peak that our multiplications reach."""
        return self.limit.products_ms / self.milliseconds[OURS].median

    def to_json(self) -> dict[str, Any]:
        """Everything, derived figures too, for readers without this program."""
        return asdict(self) | {
            "flops": self.case.flops,
            "streamed_bytes": self.case.streamed_bytes,
            "limit_ms": self.limit.milliseconds,
            "share_of_limit": self.share_of_limit,
            "share_of_peak": self.share_of_peak,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Row":
        """The row that ``to_json`` wrote."""
        known = {field.name: data[field.name] for field in fields(cls)}
        known["case"] = Case(**data["case"])
        known["limit"] = Limit(**data["limit"])
        known["error"] = {name: Error(**error) for name, error in data["error"].items()}
        for name in ("milliseconds", "ratio"):
            known[name] = {key: Spread(**spread) for key, spread in data[name].items()}
        return cls(**known)


@dataclass(frozen=True)
class Results:
    """One run of the benchmark."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    limits: list[Limits] = field(default_factory=list)  # one for each thread count

    def save(self, path: Path, **more: Any) -> None:
        """Write a JSON file, with ``more`` at its top level."""
        more["limits"] = [asdict(limits) for limits in self.limits]
        save(path, self.machine, [row.to_json() for row in self.rows], format=FORMAT, **more)

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a JSON file that ``save`` wrote."""
        data = json.loads(path.read_text())
        if data.get("format") != FORMAT:
            raise ValueError(
                f"{path}: a results file of format {FORMAT} is wanted, got {data.get('format')}; "
                "measure again with this version"
            )
        rows = [Row.from_json(row) for row in data["rows"]]
        return cls(data["machine"], rows, [Limits(**limits) for limits in data["limits"]])

    @classmethod
    def resume(cls, path: Path, machine: dict[str, Any]) -> "Results":
        """The file at ``path`` to add rows to, or a new one if there is none.

        Raises ValueError where its rows are of another machine, or of other versions.
        """
        if not path.exists():
            return cls(machine)
        results = cls.load(path)
        for name in machine.keys() - {"date", "load_at_start"}:
            before, now = (_without_dirty(each.get(name)) for each in (results.machine, machine))
            if before != now:
                raise ValueError(
                    f"--resume: the rows in {path} were measured with {name} = {before}, now it is "
                    f"{now}; measure all rows again"
                )
        return results


def _without_dirty(fact: Any) -> Any:
    """A commit without git's mark, which a results file that is being written may cause."""
    return fact.removesuffix("-dirty") if isinstance(fact, str) else fact


def save(
    path: Path, machine: dict[str, Any], rows: list[dict[str, Any]], *, format: int = 1, **more: Any
) -> None:
    """Write the rows of any benchmark to a JSON file; a run that is cut off leaves the file whole."""
    data = {"format": format, "machine": machine, **more, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.new")
    written.write_text(json.dumps(data, indent=1) + "\n")
    written.replace(path)


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
    """One line for each row: our time, the share of the limit, the ratio to each peer."""
    peers = peer_names(rows)
    head = f"{'':9} {'':9} {'':8} {'L':>4} {'N':>3} {'H':>4} {'ms':>9} {'limit ms':>9} {'of limit':>9}"
    lines = [
        "Peer time / our time (above 1 we are faster); ~: quartiles over 20% apart",
        head + "".join(f"  {'vs ' + peer:>12}" for peer in peers),
    ]
    lines += [format_row(row, peers) for row in rows]
    lines += [
        f"{row.case}: {peer} is left out: {reason}"
        for row in rows
        for peer, reason in row.skipped.items()
    ]
    return "\n".join(lines)


def format_row(row: Row, peers: list[str]) -> str:
    """One line of the table."""
    case = row.case
    line = (
        f"{case.op + ' x' + str(case.threads):9} {case.kind:9} {case.dtype:8} {case.length:4} "
        f"{case.batch:3} {case.hidden:4} {row.milliseconds[OURS].median:9.4f} "
        f"{row.limit.milliseconds:9.4f} {row.share_of_limit:9.1%}"
    )
    return line + "".join(
        f"  {_format_ratio(row.ratio.get(peer)):>{max(12, len(peer) + 3)}}" for peer in peers
    )


def _format_ratio(ratio: Spread | None) -> str:
    return f"{'~' if ratio.noisy else ''}{ratio.median:.2f}" if ratio else "-"


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
    lines = [
        "Geometric means of peer time / our time, and the worst row:",
        f"{'':33} {'rows':>4}" + "".join(f"  {'vs ' + peer:>14}" for peer in peers),
    ]
    for group in sorted(groups, key=lambda group: group[:3]):
        threads, dtype, op, kind = group
        line = f"{op + ' x' + str(threads):9} {kind:9} {dtype:13} {len(groups[group]):4}"
        for peer in peers:
            line += f"  {_format_mean(groups[group], peer):>{max(14, len(peer) + 3)}}"
        lines.append(line)
    return "\n".join(lines)


def _format_mean(rows: list[Row], peer: str) -> str:
    ratios = [row.ratio[peer].median for row in rows if peer in row.ratio]
    return f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else "-"


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
