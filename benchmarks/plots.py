"""A picture of the results: heat maps of the ratio to torch.nn, and the latency of one step."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from peers import OURS, TORCH, TORCH_WITHOUT_ONEDNN
from results import Results, Row

matplotlib.use("Agg")  # write a file; no display is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

Panel = tuple[str, int]  # kind, length

COLORS = {OURS: "tab:orange", TORCH: "tab:blue", TORCH_WITHOUT_ONEDNN: "tab:green"}
RATIO_COLORS = LogNorm(1 / 8, 8)  # pale where equal, green where we are faster, red where slower


def draw(results: Results, dtype: str, path: Path) -> None:
    """Save a picture of all rows of ``dtype``; a line of panels for each operator and threads."""
    lines: dict[tuple[str, int], dict[Panel, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in results.rows:
        case = row.case
        if case.dtype == dtype:
            lines[case.op, case.threads][case.kind, case.length].append(row)
    columns = list(dict.fromkeys(panel for panels in lines.values() for panel in panels))

    size = (3.4 * len(columns), 3.0 * len(lines) + 0.6)
    figure, grid = plt.subplots(
        len(lines), len(columns), figsize=size, squeeze=False, layout="constrained"
    )
    figure.suptitle(_title(results, dtype))
    for axes_line, (line, panels) in zip(grid, lines.items(), strict=True):
        for axes, panel in zip(axes_line, columns, strict=True):
            _draw_panel(axes, line, panel, panels.get(panel, []))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _title(results: Results, dtype: str) -> str:
    what = f"Maps: torch.nn time / hsm_kernels time, {dtype}, input size = H"
    return f"{what}\n{machine_in_short(results.machine)}"


def machine_in_short(machine: dict[str, Any]) -> str:
    """The line about the machine under a picture's title."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"{machine['date'][:10]}"
    )


def _draw_panel(axes: Axes, line: tuple[str, int], panel: Panel, rows: list[Row]) -> None:
    op, threads = line
    kind, length = panel
    axes.set_title(f"{op}, x{threads}: {kind}, L = {length}", fontsize=10)
    if not rows:
        axes.set_axis_off()
    elif kind == "step":
        _draw_latency(axes, rows)
    else:
        _draw_map(axes, rows)


def _draw_latency(axes: Axes, rows: list[Row]) -> None:
    """The time of one call over H for each contender, with quartiles."""
    for name in rows[0].milliseconds:
        spreads = [row.milliseconds[name] for row in rows]
        medians = [1e3 * spread.median for spread in spreads]
        below = [1e3 * (spread.median - spread.low) for spread in spreads]
        above = [1e3 * (spread.high - spread.median) for spread in spreads]
        places = range(len(rows))
        color = COLORS.get(name, "tab:gray")
        axes.errorbar(places, medians, (below, above), fmt="o-", label=name, color=color)
    axes.set_xticks(range(len(rows)), [str(row.case.hidden) for row in rows])
    axes.set(xlabel="H", ylabel="µs per step, N = 1", yscale="log")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _draw_map(axes: Axes, rows: list[Row]) -> None:
    """The ratio to torch.nn over H and N, with its number in each cell."""
    sizes = sorted({row.case.hidden for row in rows})
    batches = sorted({row.case.batch for row in rows})
    ratios = [[float("nan")] * len(sizes) for _ in batches]
    for row in rows:
        y, x = batches.index(row.case.batch), sizes.index(row.case.hidden)
        ratios[y][x] = row.ratio[TORCH].median
        dark = not 1 / 5 < ratios[y][x] < 5
        color = "white" if dark else "black"
        axes.text(x, y, f"{ratios[y][x]:.2f}", ha="center", va="center", color=color)
    axes.imshow(ratios, cmap="RdYlGn", norm=RATIO_COLORS, aspect="auto")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set(xlabel="H", ylabel="N")
