"""Figures of a comparison, as PNG or SVG. Only here does ``compare`` import matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LINE = 0.24
"""Inches between two names or two bars."""
HEAD = 0.95
"""Inches above the line of ranks."""
MARK = "#c44e1f"


def critical_difference_diagram(
    methods: Sequence[tuple[str, float]], difference: float, bars: Sequence[Sequence[int]], title: str, path: Path
) -> None:
    """Average ranks on a line, the best on the left; a thick bar joins methods that do not differ (Demšar 2006, figure 1).

    Args:
        methods: names and average ranks, the best first.
        difference: the critical one, drawn to scale.
        bars: places of the methods of each group, the best first.
    """
    count, half, below = len(methods), (len(methods) + 1) // 2, LINE * (len(bars) + 1)
    foot = below + LINE * (half - 0.5)
    figure = _figure(8, HEAD + foot)
    axes = figure.add_axes((0.25, 0.0, 0.5, 1.0))
    axes.set(xlim=(1, count), ylim=(-foot, HEAD))  # y in inches
    axes.axis("off")
    axes.text((1 + count) / 2, HEAD - 0.05, title, ha="center", va="top", fontsize=10)
    line: dict[str, Any] = {"color": "black", "linewidth": 1, "clip_on": False}
    axes.plot([1, count], [0, 0], **line)
    for rank in range(1, count + 1):
        axes.plot([rank, rank], [0, 0.06], **line)
        axes.text(rank, 0.08, str(rank), ha="center", va="bottom", fontsize=9)
    axes.plot([1, 1, 1, 1 + difference, 1 + difference, 1 + difference], [0.38, 0.46, 0.42, 0.42, 0.38, 0.46], **line)
    text = f"critical difference {difference:.3g}"
    axes.text(1 + difference / 2, 0.48, text, ha="center", va="bottom", fontsize=9)
    for place, (name, average) in enumerate(methods):
        left = place < half
        depth = -below - LINE * (place if left else count - 1 - place)
        edge, side = (1, "right") if left else (count, "left")
        axes.plot([average, average, edge], [0, depth, depth], color="0.4", linewidth=0.8, clip_on=False)
        text, shift = (f"{name}  {average:.2f}", -4) if left else (f"{average:.2f}  {name}", 4)
        away: dict[str, Any] = {"textcoords": "offset points", "ha": side, "va": "center", "fontsize": 9}
        axes.annotate(text, (edge, depth), (shift, 0), annotation_clip=False, **away)
    for level, members in enumerate(bars, 1):
        ends = [methods[members[0]][1], methods[members[-1]][1]]
        axes.plot(ends, [-LINE * level] * 2, color=MARK, linewidth=3.5, solid_capstyle="round", clip_on=False)
    _save(figure, path)


@dataclass(frozen=True)
class Mark:
    """A method in a panel: its cost, its metric with the deviation over seeds, and whether it is on the front.

    ``apart``: no rival, drawn hollow.
    """

    name: str
    x: float
    y: float
    sd: float
    front: bool
    apart: bool


def pareto_figure(panels: Mapping[str, Sequence[Mark]], cost: str, metric: str, path: Path) -> None:
    """Metric over cost, one panel a setting under its name; methods on the front are joined by steps."""
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = _figure(4.6 * across + 0.6, 3.5 * down + 0.4)
    figure.set_layout_engine("constrained")
    for place, (title, marks) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, place + 1)
        front = sorted((mark for mark in marks if mark.front), key=lambda mark: (mark.x, mark.y))
        axes.step([m.x for m in front], [m.y for m in front], where="post", color=MARK, linewidth=1.2, zorder=1)
        for mark in marks:
            colour = MARK if mark.front else "0.35"
            style: dict[str, Any] = {"color": colour, "markerfacecolor": "white" if mark.apart else colour}
            axes.errorbar(mark.x, mark.y, yerr=mark.sd, fmt="o", markersize=5, elinewidth=0.8, **style)
        axes.set(title=title, xlabel=cost, ylabel=metric)
        axes.title.set_fontsize(10)
        axes.margins(x=0.12)
        _cost_scale(axes, [mark.x for mark in marks])
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.canvas.draw()  # only now is it known where a point lies on the page
    for axes, marks in zip(figure.axes, panels.values(), strict=True):
        _name(axes, marks)
    _save(figure, path)


def _cost_scale(axes: Axes, costs: Sequence[float]) -> None:
    """Logarithmic where costs differ much, save about a zero."""
    positive = [cost for cost in costs if cost > 0]
    if len(positive) > 1 and max(positive) > 20 * min(positive):
        if min(costs) > 0:
            axes.set_xscale("log")
        else:
            least = 10.0 ** math.floor(math.log10(min(positive)))
            axes.set_xscale("symlog", linthresh=least)
            axes.set_xlim(left=-least / 4)


def _name(axes: Axes, marks: Sequence[Mark]) -> None:
    """Names beside the points, moved up where they would lie on each other."""
    pixels = axes.figure.dpi / 72
    taken: list[tuple[float, float]] = []
    for mark in sorted(marks, key=lambda mark: mark.y):
        x, y = axes.transData.transform((mark.x, mark.y))
        height = y
        while any(abs(x - other) < 90 * pixels and abs(height - level) < 9 * pixels for other, level in taken):
            height += pixels
        taken.append((x, height))
        style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8}
        style["bbox"] = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}  # the front passes below
        axes.annotate(mark.name, (mark.x, mark.y), (6, (height - y) / pixels), **style)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    # an SVG would hold the time at which it was written
    figure.savefig(
        path, dpi=150, bbox_inches="tight", pad_inches=0.1, metadata={"Date": None} if path.suffix == ".svg" else None
    )
