"""What is wanted of the rows, and whether it is so."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cases import Kind, Operator
from onnx_peers import ONNX_RUNTIME, OPENVINO
from peers import OURS, TORCH
from results import Row

LARGEST_ERROR = 1.5  # our error from float64 over torch.nn's

Value = Callable[[Row], float | None]  # None: not measured in this row


@dataclass(frozen=True)
class Target:
    """A bound for the worst row, or for the geometric mean, of the rows that ``concerns`` picks."""

    title: str
    concerns: Callable[[Row], bool]
    value: Value
    wanted: float
    kind: Literal["at least", "at most"] = "at least"
    over: Literal["each row", "geometric mean"] = "each row"


@dataclass(frozen=True)
class Verdict:
    """A target and what was found on so many threads."""

    target: str
    threads: int
    wanted: str
    found: float | None  # None where no row tells
    worst_row: str | None
    rows: int

    verdict: Literal["met", "MISSED", "not measured"]


def against(*peers: str) -> Value:
    """The ratio to the fastest of some peers."""

    def value(row: Row) -> float | None:
        return min((row.ratio[peer].median for peer in peers if peer in row.ratio), default=None)

    return value


def relative_error(part: Literal["output", "gradients"]) -> Value:
    """Our error from float64 over that of torch.nn."""

    def value(row: Row) -> float | None:
        ours, theirs = (getattr(row.error[name], part) for name in (OURS, TORCH))
        if ours is None or theirs is None:
            return None
        if theirs == 0:
            return 0.0 if ours == 0 else math.inf
        return float(ours / theirs)

    return value


def rows_of(
    kind: Kind, op: Operator | None = None, *, batch: int = 1, hidden: int = 1
) -> Callable[[Row], bool]:
    """Rows in float32, of one operator or both, from some sizes on."""

    def concerns(row: Row) -> bool:
        case = row.case
        return (
            case.dtype == "float32"
            and case.kind == kind
            and case.op in (op or case.op)
            and case.batch >= batch
            and case.hidden >= hidden
        )

    return concerns


def any_row(_: Row) -> bool:
    """Rows of both data types."""
    return True


INFERENCE_PEERS = (TORCH, ONNX_RUNTIME.name, OPENVINO.name)
MEAN: Literal["geometric mean"] = "geometric mean"

TARGETS = (
    Target("LSTM step vs torch.nn", rows_of("step", "LSTM"), against(TORCH), 4),
    Target("GRU step vs torch.nn", rows_of("step", "GRU"), against(TORCH), 2),
    Target(
        "step, H >= 256, vs ONNX Runtime",
        rows_of("step", hidden=256),
        against(ONNX_RUNTIME.name),
        1,
    ),
    Target(
        "inference vs the best of torch.nn, ONNX Runtime, OpenVINO",
        rows_of("inference"),
        against(*INFERENCE_PEERS),
        0.95,
    ),
    Target(
        "LSTM inference vs torch.nn", rows_of("inference", "LSTM"), against(TORCH), 1.3, over=MEAN
    ),
    Target("GRU inference vs torch.nn", rows_of("inference", "GRU"), against(TORCH), 3, over=MEAN),
    Target("LSTM training vs torch.nn", rows_of("training", "LSTM"), against(TORCH), 1.3, over=MEAN),
    Target("LSTM training vs torch.nn", rows_of("training", "LSTM"), against(TORCH), 1),
    Target("GRU training vs torch.nn", rows_of("training", "GRU"), against(TORCH), 3, over=MEAN),
    Target("GRU training vs torch.nn", rows_of("training", "GRU"), against(TORCH), 1.15),
    Target(
        "training, N >= 16, H >= 256: share of the GEMM peak",
        rows_of("training", batch=16, hidden=256),
        lambda row: row.share_of_peak,
        0.8,
    ),
    Target(
        "error of the output / torch.nn's",
        any_row,
        relative_error("output"),
        LARGEST_ERROR,
        "at most",
    ),
    Target(
        "error of the gradients / torch.nn's",
        any_row,
        relative_error("gradients"),
        LARGEST_ERROR,
        "at most",
    ),
)


def verdicts(rows: list[Row]) -> list[Verdict]:
    """All targets for each thread count."""
    counts = sorted({row.case.threads for row in rows})
    return [
        verdict(target, threads, [row for row in rows if row.case.threads == threads])
        for threads in counts
        for target in TARGETS
    ]


def verdict(target: Target, threads: int, rows: list[Row]) -> Verdict:
    """Whether ``target`` is met by the rows that it concerns."""
    values = {}
    for row in rows:
        if target.concerns(row) and (value := target.value(row)) is not None:
            values[str(row.case)] = value
    wanted = f"{target.kind} {target.wanted:g} ({target.over})"
    if not values:
        return Verdict(target.title, threads, wanted, None, None, 0, "not measured")
    least = target.kind == "at least"
    worst = (min if least else max)(values, key=lambda name: values[name])
    found = values[worst]
    if target.over == MEAN:
        found = statistics.geometric_mean(values.values())
    met = found >= target.wanted if least else found <= target.wanted
    return Verdict(
        target.title, threads, wanted, found, worst, len(values), "met" if met else "MISSED"
    )


def format_verdicts(found: list[Verdict]) -> str:
    """One line for each verdict, with the worst row."""
    lines = ["Targets (a ratio is peer time / our time; float32 but for the errors):"]
    for v in found:
        value = "-" if v.found is None else f"{v.found:.2f}"
        worst = f"  worst of {v.rows}: {v.worst_row}" if v.worst_row else ""
        lines.append(f"  {v.verdict:12} x{v.threads}  {v.target:57} {v.wanted:28} {value:>6}{worst}")
    counts = {name: sum(v.verdict == name for v in found) for name in ("met", "MISSED", "not measured")}
    lines.append("  " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return "\n".join(lines)
