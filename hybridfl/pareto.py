"""What accuracy costs: which rows are on the Pareto front, as a column and as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybridfl.errors import ConfigError
from hybridfl.keys import block_keys, label, name_of, token
from hybridfl.statistics import mean_sd
from hybridfl.tabulate import DAGGER, FRACTIONS, HIGHER_IS_BETTER, Row, Table, listed, moves_raw_data

UNITS: Mapping[str, tuple[str, float]] = {
    "bytes": ("MB", 1e6),
    "macs": ("GMAC", 1e9),
    "local_steps": ("local steps", 1),
    "seconds": ("s", 1),
    "sim_seconds": ("simulated s", 1),
}
"""What can be paid, with the unit that tables show it in."""
DIGITS = 12
"""Numbers that agree to so many decimals are equal."""
PANELS = 12
"""Settings that a figure has room for."""


@dataclass(frozen=True)
class Point:
    """A row as the means of what it costs and what it gains.

    Attributes:
        cost: until the run's last evaluation; NaN if it was not counted.
        gain: the metric, and its deviation over seeds.
        front: no rival of the same setting has as good a metric at as low a cost, and one of them better. What moves raw data
            is no rival.
    """

    row: Row
    setting: tuple[Any, ...]
    cost: float
    gain: float
    sd: float
    front: bool = False

    @property
    def dagger(self) -> str:
        return DAGGER if moves_raw_data(self.row.all_runs) else ""


@dataclass(frozen=True)
class Costs:
    """Costs and fronts of a table's rows, in their order; ``settings`` are the keys whose values part the fronts."""

    kind: str
    settings: list[str]
    points: list[Point]


def fronts(table: Table, kind: str) -> Costs:
    """Every row's cost, and whether it is on the front of its setting."""
    runs = [run for row in table.rows for run in row.all_runs]
    among = block_keys(runs, listed(table.options.rows) or ["method"])
    places = [i for i, key in enumerate(table.keys) if key in among]
    sign = 1 if table.options.metric in HIGHER_IS_BETTER else -1
    points = []
    for row in table.rows:
        spent = [run.spent(kind) for run in row.all_runs]
        cost = mean_sd([value for value in spent if math.isfinite(value)])[0]
        cell = row.summaries[()]
        points.append(Point(row, tuple(row.values[i] for i in places), cost, cell.mean, cell.sd))
    by_setting: dict[tuple[str, ...], list[int]] = {}
    for i, point in enumerate(points):
        if not point.dagger and math.isfinite(point.cost) and math.isfinite(point.gain):
            by_setting.setdefault(tuple(map(token, point.setting)), []).append(i)
    for rivals in by_setting.values():
        on = unbeaten([(sign * points[i].gain, points[i].cost) for i in rivals])
        for i, front in zip(rivals, on, strict=True):
            points[i] = replace(points[i], front=front)
    return Costs(kind, [table.keys[i] for i in places], points)


def unbeaten(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (gain, cost), whether no other has at least the gain at no higher cost, and one of them better."""
    known = [(round(gain, DIGITS), round(cost, DIGITS)) for gain, cost in points]
    return [not any(other != own and other[0] >= own[0] and other[1] <= own[1] for other in known) for own in known]


def draw(table: Table, costs: Costs, path: Path) -> None:
    """Metric over cost, one panel a setting, as PNG or SVG.

    Raises:
        ConfigError: there are more settings than panels.
    """
    by_setting: dict[str, list[Point]] = {}
    for point in costs.points:
        texts = [f"{key}={label(value)}" for key, value in zip(costs.settings, point.setting, strict=True)]
        if math.isfinite(point.cost) and math.isfinite(point.gain):
            by_setting.setdefault(", ".join(texts), []).append(point)
    if len(by_setting) > PANELS:
        problem = f"got {len(by_setting)} settings, and a figure has room for {PANELS}"
        raise ConfigError("--plot", f"{problem}; nearest valid choice: fewer of them by --where.")
    from hybridfl.comparison_figures import Mark, pareto_figure

    options = table.options
    scale = 100 if options.metric in FRACTIONS else 1
    own = [i for i, key in enumerate(table.keys) if key not in costs.settings]
    panels = {
        setting: [
            Mark(
                name_of([p.row.values[i] for i in own]) + p.dagger,
                p.cost / UNITS[costs.kind][1],
                scale * p.gain,
                scale * p.sd if math.isfinite(p.sd) else 0.0,
                p.front,
                bool(p.dagger),
            )
            for p in points
        ]
        for setting, points in by_setting.items()
    }
    unit = f"{options.metric}{' in %' if scale > 1 else ''}, {options.scope}"
    pareto_figure(panels, UNITS[costs.kind][0], unit, path)
