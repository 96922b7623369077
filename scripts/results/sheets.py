"""Tables of a grid: accuracy, accuracy at equal bytes, and costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from hybridfl.formats import Sheet, short
from hybridfl.runs import Run
from hybridfl.statistics import MISSING, WINDOW, mean_sd, tail_mean
from hybridfl.tabulate import DAGGER, moves_raw_data, read_at
from results.cells import Cell, Grid

SCOPE = "global"
Reading = Callable[[Run], float]


def accuracy(run: Run) -> float:
    """Mean of the last ten evaluations of the global model."""
    return read_at(run, SCOPE, "accuracy", "mean10")


def within(budget: float) -> Reading:
    """Mean of the last ten evaluations that cost no more bytes than the budget."""

    def read(run: Run) -> float:
        curve = run.curves[SCOPE]
        points = zip(curve.bytes, curve.column("accuracy"), strict=True)
        affordable = [value for spent, value in points if spent <= budget * (1 + 1e-9)]
        return tail_mean(affordable, WINDOW) if affordable else MISSING

    return read


def least_bytes(cells: Sequence[Cell]) -> float:
    """What the cheapest run moved in all: the budget that every method can keep to."""
    return min(
        (run.curves[SCOPE].bytes[-1] for runs in cells for run in runs if run.curves[SCOPE].bytes[-1] > 0),
        default=math.inf,
    )


def accuracy_sheet(grid: Grid, read: Reading = accuracy, caption: str = "") -> Sheet:
    """Mean and standard deviation over seeds, the best mean of a column bold; upper bounds stand outside the contest."""
    body, means = [], {}
    for r, row in enumerate(grid.rows):
        runs = [run for column in grid.columns for run in grid.cells.get((row, column), ())]
        line = [row + (DAGGER if moves_raw_data(runs) else "")]
        for c, column in enumerate(grid.columns):
            values = [read(run) for run in grid.cells.get((row, column), ())]
            line.append(_shown(values, grid.planned.get((row, column), 0)))
            if values and not moves_raw_data(runs):
                means[r, c] = mean_sd(values)[0]
        body.append(line)
    best = {
        c: max((mean for (_, at), mean in means.items() if at == c), default=MISSING) for c in range(len(grid.columns))
    }
    bold = {(r, c + 1) for (r, c), mean in means.items() if mean >= best[c] - 5e-4} if len(grid.rows) > 1 else set()
    return Sheet([grid.corner, *grid.columns], body, bold, [caption] if caption else [], 1)


def _shown(values: Sequence[float], planned: int) -> str:
    if not planned:
        return ""
    if not values:
        return "–"
    mean, sd = mean_sd(values)
    text = f"{100 * mean:.1f}" + (f" ± {100 * sd:.1f}" if math.isfinite(sd) else "")
    return text if len(values) == planned else f"{text} ({len(values)}/{planned})"


COSTS: dict[str, Reading] = {
    "MB": lambda run: run.curves[SCOPE].bytes[-1] / 1e6,
    "GMAC": lambda run: run.curves[SCOPE].column("macs")[-1] / 1e9,
    "GMAC on the server": lambda run: run.curves[SCOPE].column("server_macs")[-1] / 1e9,
    "seconds": lambda run: run.curves[SCOPE].column("seconds")[-1],
}


def cost_sheet(grid: Grid, column: str) -> Sheet:
    """What the runs of one column cost in the mean."""
    rows = [row for row in grid.rows if grid.cells.get((row, column))]
    body = [
        [row, *(short(mean_sd([read(run) for run in grid.cells[row, column]])[0]) for read in COSTS.values())]
        for row in rows
    ]
    return Sheet([grid.corner, *COSTS], body, set(), [], 1)
