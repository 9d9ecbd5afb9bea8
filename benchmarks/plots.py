"""Pictures of the results: heat maps of ratios; the latency of a step, and time over length."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from jax_peer import JAX
from onnx_peers import ONNX_RUNTIME, OPENVINO
from peers import LIGHT, OURS, TORCH, TORCH_WITHOUT_ONEDNN
from results import Results, Row, peer_names

matplotlib.use("Agg")  # write a file; no display is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

# Okabe and Ito's colors, which most color-blind people can tell apart; the markers differ too.
STYLES = {
    OURS: ("#d55e00", "o"),
    LIGHT: ("#f0e442", "*"),
    TORCH: ("#0072b2", "s"),
    TORCH_WITHOUT_ONEDNN: ("#56b4e9", "D"),
    ONNX_RUNTIME.name: ("#009e73", "^"),
    OPENVINO.name: ("#cc79a7", "v"),
    JAX.name: ("#e69f00", "P"),
}
OTHER_STYLE = ("#000000", "x")
RATIO_COLORS = LogNorm(1 / 4, 4)  # pale where equal, blue where we are faster, red where slower
LINE_SIZE = (16, 256)  # N and H of the panels over L, or the nearest that there is

Panel = tuple[str, int]  # kind, length


def draw(results: Results, path: Path) -> list[Path]:
    """Save two pictures for each data type and thread count beside ``path``."""
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in results.rows:
        groups[row.case.dtype, row.case.threads].append(row)
    pictures = []
    for (dtype, threads), rows in groups.items():
        of_threads = f"{threads} thread{'s' if threads > 1 else ''}"
        title = f"{dtype}, {of_threads}, input size = H\n{machine_in_short(results.machine)}"
        stem = f"{path.stem}-{of_threads.replace(' ', '-')}-{dtype}"
        for name, draw_rows in (("ratios", draw_ratios), ("times", draw_times)):
            if figure := draw_rows(rows, title):
                pictures.append(path.with_name(f"{stem}-{name}.png"))
                figure.savefig(pictures[-1], dpi=110)
                plt.close(figure)
    return pictures


def machine_in_short(machine: dict[str, Any]) -> str:
    """The line about the machine under a picture's title."""
    return (
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"{machine['date'][:10]}"
    )


# Heat maps


def draw_ratios(rows: list[Row], title: str) -> Any:
    """A map over H and N for each kind and length; lines for torch.nn and for the best peer."""
    against: dict[str, Callable[[Row], float | None]] = {
        TORCH: lambda row: row.ratio[TORCH].median if TORCH in row.ratio else None,
        "best peer": lambda row: min((r.median for p, r in row.ratio.items() if p != LIGHT), default=None),
    }
    mapped = [row for row in rows if row.case.kind != "step"]
    columns: list[Panel] = list(dict.fromkeys((r.case.kind, r.case.length) for r in mapped))
    if not columns:
        return None
    lines = [(op, peer) for op in dict.fromkeys(r.case.op for r in mapped) for peer in against]
    figure, grid = plt.subplots(
        len(lines),
        len(columns),
        figsize=(max(2.7 * len(columns), 5), 1.9 * len(lines) + 0.8),
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(f"peer time / {OURS} time (blue: we are faster)\n{title}", fontsize=10)
    for axes_line, (op, peer) in zip(grid, lines, strict=True):
        for axes, panel in zip(axes_line, columns, strict=True):
            chosen = [r for r in mapped if (r.case.op, r.case.kind, r.case.length) == (op, *panel)]
            kind, length = panel
            axes.set_title(f"{op} {kind}, L={length}\nvs {peer}", fontsize=9)
            _draw_map(axes, chosen, against[peer])
    return figure


def _draw_map(axes: Axes, rows: list[Row], value: Callable[[Row], float | None]) -> None:
    """The ratios over H and N, with the number in each cell; empty where nothing was measured."""
    sizes = sorted({row.case.hidden for row in rows})
    batches = sorted({row.case.batch for row in rows})
    if not rows:
        axes.set_axis_off()
        return
    ratios = [[float("nan")] * len(sizes) for _ in batches]
    for row in rows:
        y, x = batches.index(row.case.batch), sizes.index(row.case.hidden)
        ratio = value(row)
        if ratio is not None:
            ratios[y][x] = ratio
            color = "black" if 1 / 2.5 < ratio < 2.5 else "white"
            text = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
            axes.text(x, y, text, ha="center", va="center", color=color, fontsize=9)
    axes.imshow(ratios, cmap="RdBu", norm=RATIO_COLORS, aspect="auto")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes], fontsize=8)
    axes.set_yticks(range(len(batches)), [str(batch) for batch in batches], fontsize=8)
    axes.set_xlabel("H", fontsize=8, labelpad=0)
    axes.set_ylabel("N", fontsize=8, labelpad=0)


# Times


def draw_times(rows: list[Row], title: str) -> Any:
    """For each operator the latency of a step, and the time over L where two lengths were measured."""
    operators = list(dict.fromkeys(row.case.op for row in rows))
    panels = {op: list(_time_panels([row for row in rows if row.case.op == op])) for op in operators}
    columns = max(len(found) for found in panels.values())
    if not columns:
        return None
    figure, grid = plt.subplots(
        len(operators),
        columns,
        figsize=(max(3.6 * columns, 7), 2.8 * len(operators) + 1),
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(f"Time of a call (log scale)\n{title}", fontsize=10)
    for axes_line, (op, found) in zip(grid, panels.items(), strict=True):
        for axes in axes_line[len(found) :]:
            axes.set_axis_off()
        for axes, (name, draw_panel, chosen) in zip(axes_line, found, strict=False):
            axes.set_title(f"{op} {name}", fontsize=9)
            draw_panel(axes, chosen)
    handles = {}
    for axes in grid.flat:
        found_handles, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found_handles, strict=True))
    names = sorted(handles, key=lambda name: name == "limit")  # last
    columns = min(4, len(names))
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center", ncols=columns, fontsize=8
    )
    return figure


def _time_panels(
    rows: list[Row],
) -> Iterator[tuple[str, Callable[[Axes, list[Row]], None], list[Row]]]:
    steps = [row for row in rows if row.case.kind == "step"]
    if steps:
        yield "step, N=1", _draw_steps, steps
    for kind in ("inference", "training"):
        sizes: dict[tuple[int, int], list[Row]] = defaultdict(list)
        for row in rows:
            if row.case.kind == kind:
                sizes[row.case.batch, row.case.hidden].append(row)
        lines = {size: found for size, found in sizes.items() if len(found) > 1}
        if lines:
            batch, hidden = min(lines, key=_distance_from_line_size)
            yield f"{kind}, N={batch} H={hidden}", _draw_lengths, lines[batch, hidden]


def _distance_from_line_size(size: tuple[int, int]) -> float:
    return sum(abs(max(a, b) / min(a, b) - 1) for a, b in zip(size, LINE_SIZE, strict=True))


def contenders(rows: list[Row]) -> list[str]:
    """Us, and all peers of some rows."""
    return [OURS, *peer_names(rows)]


def _draw_steps(axes: Axes, rows: list[Row]) -> None:
    """A bar for each contender at each H."""
    names = contenders(rows)
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        color, _ = STYLES.get(name, OTHER_STYLE)
        timed = [(x, row) for x, row in enumerate(rows) if name in row.milliseconds]
        places = [x + (i - (len(names) - 1) / 2) * width for x, _ in timed]
        medians = [1e3 * row.milliseconds[name].median for _, row in timed]
        axes.bar(places, medians, width, label=name, color=color, edgecolor="white", linewidth=0.5)
    limits = [1e3 * row.limit.milliseconds for row in rows]
    axes.hlines(
        limits,
        [x - 0.45 for x in range(len(rows))],
        [x + 0.45 for x in range(len(rows))],
        color="black",
        linestyles="dotted",
        label="limit",
    )
    axes.set_yscale("log")
    axes.set_xticks(range(len(rows)), [str(row.case.hidden) for row in rows], fontsize=8)
    axes.set_xlabel("H", fontsize=8)
    axes.set_ylabel("µs", fontsize=8)
    axes.grid(axis="y", alpha=0.3)


def _draw_lengths(axes: Axes, rows: list[Row]) -> None:
    """A line over L for each contender."""
    rows = sorted(rows, key=lambda row: row.case.length)
    for name in contenders(rows):
        color, marker = STYLES.get(name, OTHER_STYLE)
        timed = [row for row in rows if name in row.milliseconds]
        axes.plot(
            [row.case.length for row in timed],
            [row.milliseconds[name].median for row in timed],
            marker=marker,
            color=color,
            label=name,
        )
    lengths = [row.case.length for row in rows]
    axes.plot(lengths, [row.limit.milliseconds for row in rows], "k:", label="limit")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(lengths, [str(length) for length in lengths], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("L", fontsize=8)
    axes.set_ylabel("ms", fontsize=8)
    axes.grid(alpha=0.3)
