"""Results of the boundary benchmark: the rows as data, the table, and the picture."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from boundary_cases import BoundaryCase, Comparison
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator
from plots import machine_in_short, plt
from results import Spread

COLORS = {"met": "tab:green", "missed": "tab:red", "": "tab:gray"}


@dataclass(frozen=True)
class Finding:
    """A comparison and the ratio that was measured."""

    comparison: Comparison
    ratio: Spread

    @property
    def verdict(self) -> str:
        """``met`` or ``missed``, or nothing where there is no target."""
        target = self.comparison.target
        if target is None:
            return ""
        return "met" if target.met_by(self.ratio.median) else "missed"

    @property
    def title(self) -> str:
        """What is divided by what."""
        saved = "bytes of " if self.comparison.quantity == "bytes" else ""
        return f"{saved}{self.comparison.over} / {self.comparison.under}"


@dataclass(frozen=True)
class Difference:
    """How far the results of two contenders are from each other, relative to their size."""

    names: tuple[str, str]
    distance: float


@dataclass(frozen=True)
class BoundaryRow:
    """What was measured for one case."""

    case: BoundaryCase
    milliseconds: dict[str, Spread]  # by contender
    saved_bytes: dict[str, int]
    findings: list[Finding]
    differences: list[Difference]
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """Everything, for readers without this program."""
        return {
            "case": {"topic": self.case.topic} | asdict(self.case.sizes),
            "milliseconds": {name: asdict(spread) for name, spread in self.milliseconds.items()},
            "saved_bytes": self.saved_bytes,
            "findings": [asdict(f) | {"verdict": f.verdict} for f in self.findings],
            "differences": [asdict(difference) for difference in self.differences],
            "rounds": self.rounds,
        }


# The table


def format_rows(rows: list[BoundaryRow]) -> str:
    """A line for each comparison under the name of its row, and the number of targets met."""
    lines = []
    for row in rows:
        lines.append(f"{row.case}  ({row.rounds} rounds)")
        lines += [format_finding(row, finding) for finding in row.findings]
    verdicts = [finding.verdict for row in rows for finding in row.findings]
    lines.append(f"targets: {verdicts.count('met')} met, {verdicts.count('missed')} missed")
    return "\n".join(lines)


def format_finding(row: BoundaryRow, finding: Finding) -> str:
    """One line of the table."""
    over, under = finding.comparison.over, finding.comparison.under
    if finding.comparison.quantity == "bytes":
        values = f"{row.saved_bytes[over] / 1e6:8.2f} / {row.saved_bytes[under] / 1e6:8.2f} MB"
    else:
        times = row.milliseconds
        values = f"{times[over].median:8.2f} / {times[under].median:8.2f} ms"
    target = finding.comparison.target or ""
    line = f"  {finding.title:48} {values}  {finding.ratio!s:>22}  {target!s:13} {finding.verdict}"
    return line.rstrip()


# The picture


def draw(machine: dict[str, Any], rows: list[BoundaryRow], path: Path) -> None:
    """Save a picture: all ratios as bars with their targets; a panel for each operator and threads."""
    panels: dict[str, dict[str, Finding]] = defaultdict(dict)
    for row in rows:
        sizes = row.case.sizes
        size = f"L={sizes.length} N={sizes.batch} H={sizes.hidden}"
        for finding in row.findings:
            label = f"{row.case.topic}, {size}: {finding.title}"
            panels[f"{sizes.op} x{sizes.threads}"][label] = finding
    labels = list(dict.fromkeys(label for panel in panels.values() for label in panel))

    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(5 + 2.6 * len(panels), 1.4 + 0.2 * len(labels)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(
        "Boundaries: ratios (log scale) and their targets (black); green: met, red: missed, "
        f"gray: no target\n{machine_in_short(machine)}",
        fontsize=10,
    )
    for axes, (title, panel) in zip(grid[0], panels.items(), strict=True):
        axes.set_title(title, fontsize=10)
        _draw_panel(axes, panel, labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_panel(axes: Axes, panel: dict[str, Finding], labels: list[str]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=7)
    for label, finding in panel.items():
        y, ratio, target = labels.index(label), finding.ratio.median, finding.comparison.target
        axes.barh(y, ratio - 1, left=1, color=COLORS[finding.verdict], height=0.7)
        if target:
            axes.plot(target.ratio, y, "|", color="black", markersize=9, markeredgewidth=2)
        axes.annotate(
            f"{ratio:.2f}",
            (max(ratio, 1, target.ratio if target else 1), y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=6,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.margins(x=0.15)
