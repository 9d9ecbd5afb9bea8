"""Draws ``edges.svg``, the picture of ``boundaries.md``: what crosses each edge between the steps of one sequence.

    python docs/draw_edges.py                # writes edges.svg beside this file
    python docs/draw_edges.py picture.png    # or another file, in the format of its name

Text becomes paths, so that it looks alike everywhere; every arrow carries an id that says what it is.
"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

STEPS, LENGTH, RESET, DETACH = 6, 4, 2, 3

PITCH, HALF_BOX = 2.0, 0.42  # distance of two steps; half the width of a step
TOP, BOTTOM, MIDDLE = 4.3, 0.7, 2.5
# Heights of the arrows. The reverse direction is the forward direction turned by half a circle about MIDDLE.
FORWARD_VALUE, FORWARD_GRADIENT = 3.75, 3.3
REVERSE_VALUE, REVERSE_GRADIENT = 1.25, 1.7
MASK_ROWS = {"reset_mask": 0.0, "detach_mask": -0.55}

VALUE, GRADIENT, GREY = "#1a1a1a", "#c62828", "#6e6e6e"
RESET_COLOR, DETACH_COLOR = "#cfe3f7", "#fde3bf"
MASK_OF_EDGE = {RESET: ("reset_mask", RESET_COLOR), DETACH: ("detach_mask", DETACH_COLOR)}


def main(arguments: list[str]) -> None:
    """Draw the picture into the file that is named, or into edges.svg."""
    path = Path(arguments[0]) if arguments else Path(__file__).with_name("edges.svg")
    # The salt and the missing date make the file the same at every run.
    metadata = {"Date": None, "Title": "Edges between the steps of a sequence"} if path.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "edges", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        draw().savefig(path, facecolor="white", metadata=metadata)


def draw() -> Figure:
    """The whole picture."""
    figure = Figure(figsize=(11.5, 5.5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-3.75, 11.9)
    axes.set_ylim(-1.85, 5.55)
    axes.set_axis_off()
    for edge in range(STEPS):
        _draw_edge(axes, edge)
    for step in range(STEPS):
        _draw_step(axes, step)
    for name, height in MASK_ROWS.items():
        _text(axes, -1.65, height, f"{name}[:, n]", ha="right", size=10, family="DejaVu Sans Mono")
        for edge in range(STEPS):
            _draw_mask_cell(axes, name, edge, height)
    _text(axes, -1.65, (FORWARD_VALUE + FORWARD_GRADIENT) / 2, "forward\ndirection", ha="right")
    _text(axes, -1.65, (REVERSE_VALUE + REVERSE_GRADIENT) / 2, "reverse\ndirection", ha="right")
    _text(axes, _edge_x(STEPS), TOP + 0.45, f"no edge {STEPS}", color=GREY)
    end = (PITCH * LENGTH - HALF_BOX, PITCH * (STEPS - 1) + HALF_BOX)
    _text(axes, sum(end) / 2, TOP + 0.95, f"padding: t ≥ lengths[n] = {LENGTH}", color=GREY)
    _draw_legend(axes)
    return figure


def _edge_x(edge: int) -> float:
    return PITCH * edge - PITCH / 2


def _gap(edge: int) -> tuple[float, float]:
    """Where the step before an edge ends and where the step after it begins."""
    return PITCH * (edge - 1) + HALF_BOX, PITCH * edge - HALF_BOX


def _draw_edge(axes: Axes, edge: int) -> None:
    left, right = _gap(edge)
    color = MASK_OF_EDGE[edge][1] if edge in MASK_OF_EDGE else "#f4f4f4"
    bottom = min(MASK_ROWS.values()) - 0.3
    axes.add_patch(
        Rectangle((left + 0.08, bottom), right - left - 0.16, TOP + 0.75 - bottom, color=color, lw=0, zorder=0)
    )
    _text(axes, _edge_x(edge), TOP + 0.45, f"edge {edge}", color=GREY if edge > LENGTH else VALUE, weight="bold")
    if edge == 0:
        _draw_end(axes, edge, right, -1, "h$_n$", "hx")
    elif edge == LENGTH:
        _draw_end(axes, edge, left, +1, "hx", "h$_n$")
    elif edge == RESET:
        _draw_reset(axes, edge)
    elif edge < LENGTH:
        _draw_crossing(axes, edge, detached=edge == DETACH)


def _draw_crossing(axes: Axes, edge: int, detached: bool) -> None:
    """The value crosses; so does the gradient, unless it is detached."""
    left, right = _gap(edge)
    middle = _edge_x(edge)
    for name, value_y, gradient_y, start, stop in (
        ("forward", FORWARD_VALUE, FORWARD_GRADIENT, left, right),
        ("reverse", REVERSE_VALUE, REVERSE_GRADIENT, right, left),
    ):
        _arrow(axes, f"edge {edge} {name} value", (start, value_y), (stop, value_y))
        if detached:
            _stop(axes, f"edge {edge} {name} gradient", (stop, gradient_y), middle, GRADIENT)
            _text(axes, (start + middle) / 2, gradient_y, "0", color=GRADIENT)
        else:
            _arrow(axes, f"edge {edge} {name} gradient", (stop, gradient_y), (start, gradient_y), gradient=True)


def _draw_reset(axes: Axes, edge: int) -> None:
    """The value stops, and reset_hx takes its place; the gradient goes to reset_hx."""
    left, right = _gap(edge)
    middle = _edge_x(edge)
    _text(axes, middle, MIDDLE, "reset_hx", weight="bold", size=10.5)
    for name, sign, start, stop, value_y, gradient_y in (
        ("forward", +1, left, right, FORWARD_VALUE, FORWARD_GRADIENT),
        ("reverse", -1, right, left, REVERSE_VALUE, REVERSE_GRADIENT),
    ):
        _stop(axes, f"edge {edge} {name} value", (start, value_y), middle - 0.22 * sign, VALUE)
        _text(axes, (start + middle - 0.1 * sign) / 2, gradient_y, "0", color=GRADIENT)
        near = MIDDLE + 0.25 * sign
        value_x, gradient_x = middle + 0.02 * sign, middle + 0.3 * sign
        bend = "angle,angleA=90,angleB=180,rad=6"
        _arrow(axes, f"edge {edge} {name} reset_hx value", (value_x, near), (stop, value_y), bend=bend)
        bend = "angle,angleA=180,angleB=90,rad=6"
        _arrow(
            axes, f"edge {edge} {name} reset_hx gradient", (stop, gradient_y), (gradient_x, near), True, bend
        )


def _draw_end(axes: Axes, edge: int, side: float, sign: int, reverse_label: str, forward_label: str) -> None:
    """Where hx enters one direction and h_n leaves the other: before the first step, and after the last valid one."""
    far = side + 0.62 * sign
    for name, label, value_y, gradient_y in (
        ("forward", forward_label, FORWARD_VALUE, FORWARD_GRADIENT),
        ("reverse", reverse_label, REVERSE_VALUE, REVERSE_GRADIENT),
    ):
        _text(axes, side + 0.86 * sign, (value_y + gradient_y) / 2, label, weight="bold")
        start, stop = (far, side) if label == "hx" else (side, far)
        _arrow(axes, f"edge {edge} {name} {label} value", (start, value_y), (stop, value_y))
        _arrow(axes, f"edge {edge} {name} {label} gradient", (stop, gradient_y), (start, gradient_y), gradient=True)


def _draw_step(axes: Axes, step: int) -> None:
    valid = step < LENGTH
    axes.add_patch(
        FancyBboxPatch(
            (PITCH * step - HALF_BOX, BOTTOM),
            2 * HALF_BOX,
            TOP - BOTTOM,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor="#e9eef2" if valid else "white",
            edgecolor=VALUE if valid else GREY,
            linestyle="-" if valid else ":",
            linewidth=1.3,
            gid=f"step {step}",
        )
    )
    label = f"step\n{step}" if valid else f"step\n{step}\n\noutput\n0"
    _text(axes, PITCH * step, MIDDLE, label, color=VALUE if valid else GREY)


def _draw_mask_cell(axes: Axes, name: str, edge: int, height: float) -> None:
    left, right = _gap(edge)
    is_set = edge in MASK_OF_EDGE and MASK_OF_EDGE[edge][0] == name
    axes.add_patch(
        Rectangle(
            (left + 0.08, height - 0.22),
            right - left - 0.16,
            0.44,
            facecolor=VALUE if is_set else "white",
            edgecolor=GREY,
            linewidth=0.8,
            gid=f"{name} {edge}",
        )
    )
    label = "ignored" if edge >= LENGTH else str(is_set)
    _text(axes, _edge_x(edge), height, label, color="white" if is_set else GREY, size=10)


def _draw_legend(axes: Axes) -> None:
    height = -1.45
    _arrow(axes, "legend value", (-1.5, height), (-0.6, height))
    _text(axes, -0.45, height, "value of the state", ha="left")
    _arrow(axes, "legend gradient", (3.3, height), (2.4, height), gradient=True)
    _text(axes, 3.45, height, "its gradient", ha="left")
    _stop(axes, "legend stop", (5.5, height), 6.1, VALUE)
    _text(axes, 6.25, height, "stops here", ha="left")
    _text(axes, 8.3, height, "0", color=GRADIENT)
    _text(axes, 8.5, height, "no gradient arrives", ha="left")


def _arrow(
    axes: Axes,
    name: str,
    start: tuple[float, float],
    stop: tuple[float, float],
    gradient: bool = False,
    bend: str = "arc3",
) -> None:
    color, style = (GRADIENT, (0, (3, 2))) if gradient else (VALUE, "-")
    # The head in a solid line, and over it the tail in its own.
    for part, line in (("-|>", "-"), ("-", style)):
        shaft = part == "-"
        axes.add_patch(
            FancyArrowPatch(
                start,
                stop,
                arrowstyle="-" if shaft else "-|>,head_length=0.5,head_width=0.25",
                connectionstyle=bend,
                mutation_scale=14,
                shrinkA=0,
                shrinkB=6 if shaft else 0,
                color=color,
                linestyle=line,
                linewidth=1.6 if shaft else 0,
                gid=name if shaft else f"{name} head",
            )
        )


def _stop(axes: Axes, name: str, start: tuple[float, float], end: float, color: str) -> None:
    """A line that ends at a bar."""
    x, y = start
    style = (0, (3, 2)) if color == GRADIENT else "-"
    axes.plot([x, end], [y, y], color=color, linestyle=style, linewidth=1.6, gid=name)
    axes.plot([end, end], [y - 0.16, y + 0.16], color=color, linewidth=3, solid_capstyle="butt", gid=f"{name} bar")


def _text(axes: Axes, x: float, y: float, text: str, **style: object) -> None:
    axes.text(x, y, text, **({"ha": "center", "va": "center", "size": 11.5, "color": VALUE} | style))


if __name__ == "__main__":
    main(sys.argv[1:])
