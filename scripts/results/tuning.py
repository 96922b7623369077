"""Which setting of each method scored best on the server's own validation examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hybridfl.formats import Sheet
from hybridfl.runs import Run
from hybridfl.statistics import mean_sd
from hybridfl.tabulate import read_at
from results.cells import Grid


@dataclass(frozen=True)
class Trial:
    """One setting of a method: validation accuracy and loss, means over seeds of the last ten evaluations."""

    setting: str
    seeds: int
    accuracy: float
    loss: float

    @property
    def merit(self) -> tuple[float, float]:
        """Accuracy, and with equal accuracies, of which few examples give many, the lower loss."""
        return round(self.accuracy, 9), -self.loss


def trials(grid: Grid) -> Iterator[tuple[str, list[Trial]]]:
    """The finished trials of every cell, in the order in which they were tried."""
    for row in grid.rows:
        found = [
            Trial(column, len(runs), _mean(runs, "accuracy"), _mean(runs, "loss"))
            for at, column in grid.planned
            if at == row and (runs := grid.cells.get((row, column)))
        ]
        if found:
            yield row, found


def _mean(runs: Sequence[Run], metric: str) -> float:
    return mean_sd([read_at(run, "validation", metric, "mean10") for run in runs])[0]


def sheet(grid: Grid) -> Sheet:
    """A line for each method: what was tried, with its accuracy in percent, the chosen one last."""
    body = []
    for row, found in trials(grid):
        best = max(found, key=lambda trial: trial.merit)
        told = ", ".join(f"{trial.setting} {100 * trial.accuracy:.1f}" for trial in found)
        body.append([row, str(min(trial.seeds for trial in found)), told, best.setting])
    return Sheet(["method", "seeds", "validation accuracy, %", "chosen"], body, set(), [], 4)


def block(grid: Grid, merging: str) -> str:
    """The choices as the ``tuned`` of a preset; ``none`` is the method ``merging``."""
    lines = ["tuned:"]
    for row, found in trials(grid):
        best = max(found, key=lambda trial: trial.merit)
        group = "merging" if row == "none" else "baseline"
        settings = []
        for part in best.setting.split(", "):
            key, _, value = part.partition("=")
            settings.append(f"{key if key.startswith('client_optimizer.') else f'{group}.{key}'}: {value}")
        lines.append(f"  {merging if row == 'none' else row}: {{{', '.join(settings)}}}")
    return "\n".join(lines)
