"""Which rows of a column are the best, and which of the others cannot be told from it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from hybridfl.significance import ALPHA, paired_tests
from hybridfl.statistics import paired_differences
from hybridfl.tabulate import HIGHER_IS_BETTER, Column, Table, moves_raw_data

Cell = tuple[int, Column]
"""The place of a row, and a column."""


def best_rows(table: Table, col: Column) -> list[int]:
    """The rows with the best mean of a column; none if there is nothing to choose from."""
    sign = 1 if table.options.metric in HIGHER_IS_BETTER else -1
    means = {i: sign * table.rows[i].summaries[col].mean for i in rivals(table, col)}
    return [i for i, mean in means.items() if mean == max(means.values())] if len(means) > 1 else []


def rivals(table: Table, col: Column) -> list[int]:
    """The rows with a mean in a column, save those that move raw data."""
    there = [i for i, row in enumerate(table.rows) if col in row.summaries and not moves_raw_data(row.runs[col])]
    return [i for i in there if math.isfinite(table.rows[i].summaries[col].mean)]


def against_best(table: Table) -> dict[Cell, float]:
    """The p value of every rival that is not the best of its column, against the best; NaN with fewer than two pairs.

    The comparisons of all columns are one family for ``--correct``.
    """
    cells, samples = [], []
    for col in table.cols:
        best = best_rows(table, col)
        for i in rivals(table, col) if best else []:
            if i not in best:
                theirs = table.rows[best[0]].observations[col]
                cells.append((i, col))
                samples.append(paired_differences(table.rows[i].observations[col], theirs))
    found = paired_tests(samples, table.options.interval or "t", table.options.correct or "none")
    return {cell: test.p for cell, test in zip(cells, found, strict=True)}


def marked(table: Table, against: Mapping[Cell, float]) -> set[Cell]:
    """The best of each column, and those not significantly different from it by what :func:`against_best` says."""
    best = {(i, col) for col in table.cols for i in best_rows(table, col)}
    return best | {cell for cell, p in against.items() if p > ALPHA}


def usual_seeds(table: Table) -> int:
    """How many seeds most cells have; of equally many, the larger number."""
    counts = Counter(cell.seeds for row in table.rows for cell in row.summaries.values())
    return max(counts, key=lambda seeds: (counts[seeds], seeds))
