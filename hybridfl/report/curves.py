"""Learning curves: means over seeds with their deviations, against rounds, bytes and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hybridfl.report.rows import Shown, rounded, thinned
from hybridfl.runs import SHOWN, Run
from hybridfl.statistics import mean_sd

POINTS = 200
"""Of a curve, at most."""
FEWEST = 20
"""Of a curve in a page with very many; then scopes with details go first."""
ALL_POINTS = 100_000
AXES = {"round": "round", "bytes": "MB sent", "seconds": "seconds", "sim_seconds": "simulated seconds"}
METRICS = ("accuracy", "loss", "worst10")

ByRound = dict[int, float]


def curves(of: Shown) -> dict[str, Any]:
    """Every row's curves in every scope and metric.

    Returns:
        ``series``: what there is to choose from, scope and metric. ``axes``: of the horizontal axis. ``rows``: for each row ``x``, by
        axis, and ``y``, by series: means, deviations, and the number of runs where it is not that of all. Points are thinned out
        evenly; means are over the runs in which a number is defined. Empty if there is no number at all.
    """
    series = _series(of.runs)
    if not series:
        return {}
    plain = [one for one in series if "/" not in one[0]]
    if ALL_POINTS // (len(series) * len(of.rows)) < FEWEST and plain:
        if len(plain) < len(series):
            of.warn("Curves of scopes with details, such as one domain, are left out, as there are very many rows.")
        series = plain
    points = max(FEWEST, min(POINTS, ALL_POINTS // (len(series) * len(of.rows))))
    clocks = [axis for axis in AXES if any(_axis(run, axis) for run in of.runs)]
    rows = []
    for row in of.rows:
        runs = row.all_runs
        rounds = sorted({round for run in runs for round in _axis(run, "round")})
        rounds = [rounds[i] for i in thinned(len(rounds), points)]
        x = {axis: [m for m, _, _ in _means([_axis(run, axis) for run in runs], rounds)] for axis in clocks}
        x = {axis: values for axis, values in x.items() if any(value is not None for value in values)}
        y = [_line([_values(run, scope, metric) for run in runs], rounds) for scope, metric in series]
        rows.append({"x": x, "y": y})
    names = [{"scope": scope, "metric": metric} for scope, metric in series]
    return {"series": names, "axes": {axis: AXES[axis] for axis in clocks}, "rows": rows}


def _series(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Scopes and metrics of which a run has a number; of scopes with details the accuracy only."""
    every = {scope: None for run in runs for scope in run.curves}
    ordered = sorted(every, key=lambda scope: ("/" in scope, SHOWN.index(scope) if scope in SHOWN else len(SHOWN)))
    found = [(scope, metric) for scope in ordered for metric in METRICS if "/" not in scope or metric == "accuracy"]
    return [one for one in found if any(_values(run, *one) for run in runs)]


def _values(run: Run, scope: str, metric: str) -> ByRound:
    curve = run.curves.get(scope)
    if curve is None:
        return {}
    pairs = zip(curve.rounds, curve.column(metric), strict=True)
    return {round: value for round, value in pairs if math.isfinite(value)}


def _axis(run: Run, axis: str) -> ByRound:
    """What was spent until each evaluation, in every scope the same."""
    curve = max(run.curves.values(), key=lambda curve: len(curve.rounds), default=None)
    if curve is None:
        return {}
    if axis == "bytes":
        values = [moved / 1e6 for moved in curve.bytes]
    else:
        values = [float(round) for round in curve.rounds] if axis == "round" else curve.column(axis)
    return {round: value for round, value in zip(curve.rounds, values, strict=True) if math.isfinite(value)}


def _means(curves: Sequence[ByRound], rounds: Sequence[int]) -> list[tuple[float | None, float | None, int]]:
    """Mean, deviation and number of the values in each round."""
    found = []
    for round in rounds:
        values = [curve[round] for curve in curves if round in curve]
        mean, sd = mean_sd(values)
        found.append((rounded(mean, 4), rounded(sd, 2), len(values)))
    return found


def _line(curves: Sequence[ByRound], rounds: Sequence[int]) -> dict[str, Any] | None:
    if not any(curves):
        return None
    means, deviations, numbers = zip(*_means(curves, rounds), strict=True)
    line: dict[str, Any] = {"mean": means}
    if any(sd is not None for sd in deviations):
        line["sd"] = deviations
    if any(number not in (0, len(curves)) for number in numbers):
        line["runs"] = numbers
    return line
