"""Figures of a comparison, as PNG or SVG. Only here does ``compare`` import matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    # an SVG would hold the time at which it was written
    figure.savefig(
        path, dpi=150, bbox_inches="tight", pad_inches=0.1, metadata={"Date": None} if path.suffix == ".svg" else None
    )
