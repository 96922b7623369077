"""A picture of a grid: one panel a column, a dot with its deviation for each row."""

from __future__ import annotations

import math
from pathlib import Path

from hybridfl.statistics import mean_sd
from results.cells import Grid
from results.sheets import accuracy

PANELS = 3
"""Side by side."""


def draw(grid: Grid, file: Path) -> None:
    """Write a PNG; the best of a panel is blue."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(PANELS, len(grid.columns))
    down = -(-len(grid.columns) // across)
    height = 0.8 + 0.17 * len(grid.rows)
    figure, axes = pyplot.subplots(
        down,
        across,
        figsize=(2.2 + 2.6 * across, down * height),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for place, axis in enumerate(axes.flat):
        if place >= len(grid.columns):
            axis.set_visible(False)
            continue
        column = grid.columns[place]
        values = {row: [100 * accuracy(run) for run in grid.cells.get((row, column), ())] for row in grid.rows}
        stats = {row: mean_sd(found) for row, found in values.items() if found}
        best = max((mean for mean, _ in stats.values()), default=math.nan)
        for height_of, row in enumerate(reversed(grid.rows)):
            if row in stats:
                mean, sd = stats[row]
                colour = "tab:blue" if mean == best else "0.35"
                axis.errorbar(mean, height_of, xerr=0 if math.isnan(sd) else sd, fmt="o", markersize=4, color=colour)
        axis.set_title(column, fontsize=9)
        axis.set_yticks(range(len(grid.rows)), list(reversed(grid.rows)), fontsize=7)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(axis="x", linewidth=0.4)
    figure.supxlabel("test accuracy, %", fontsize=8)
    figure.savefig(file, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
