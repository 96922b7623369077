"""Streams of tasks: the accuracies on each task after each task, as means over seeds, and what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hybridfl.formats import spread
from hybridfl.report.rows import Shown, rounded
from hybridfl.runs import Run
from hybridfl.statistics import mean_sd
from hybridfl.tabulate import OF_STREAMS

SCOPES = ("global", "served")


def streams(of: Shown) -> list[dict[str, Any]]:
    """For every scope with a matrix: rows with means and deviations after each task (outer) on each task (inner)."""
    found = []
    for scope in SCOPES:
        runs = [[run for run in row.all_runs if run.matrix(scope)] for row in of.rows]
        if not any(runs):
            continue
        views = [of.view(replace(of.table.options, scope=scope, metric=name, at="last")) for name in OF_STREAMS]
        rows = []
        for place, having in enumerate(runs):
            if having:
                told = [spread(view.rows[place].summaries[()], view.options.metric) for view in views]
                rows.append({"row": place, **_matrix(having, scope), "forgetting": told})
        found.append({"scope": scope, "metrics": list(OF_STREAMS), "rows": rows})
    return found


def _matrix(runs: Sequence[Run], scope: str) -> dict[str, Any]:
    """Entry by entry over the runs; of runs with other numbers of tasks, what all of them have."""
    matrices = [run.matrix(scope) for run in runs]
    after = range(min(map(len, matrices)))
    entries = [[mean_sd([matrix[t][i] for matrix in matrices]) for i in range(t + 1)] for t in after]
    return {
        "mean": [[rounded(mean, 4) for mean, _ in line] for line in entries],
        "sd": [[rounded(sd, 2) for _, sd in line] for line in entries],
    }
