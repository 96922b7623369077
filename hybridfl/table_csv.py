"""A table of ``hybridfl compare`` as CSV: raw numbers, one line a row and column."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping

from hybridfl.keys import label
from hybridfl.pareto import fronts
from hybridfl.pivots import against_best, marked
from hybridfl.runs import ABSENT
from hybridfl.tabulate import CSV_CONTEXT, CSV_NUMBERS, Column, Table, moves_raw_data

Cell = Callable[[int, Column], object]
"""What stands in a cell, by the place of its row and its column."""


def as_csv(table: Table) -> str:
    """Raw numbers, one line a row and column; empty where a number is not defined."""
    options, text, more = table.options, io.StringIO(), asked_for(table)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*table.keys, *options.columns, *CSV_NUMBERS, *CSV_CONTEXT, *more])
    context = [raw_number(table.target), options.metric, options.scope, options.at]
    for place, row in enumerate(table.rows):
        for col, values in table.cols.items():
            if col in row.summaries:
                numbers = [raw_number(getattr(row.summaries[col], name)) for name in CSV_NUMBERS]
                raw = raw_truth(moves_raw_data(row.runs[col]))
                names = map(raw_name, (*row.values, *values))
                writer.writerow([*names, *numbers, *context, raw, *(cell(place, col) for cell in more.values())])
    return text.getvalue().rstrip("\n")


def asked_for(table: Table) -> Mapping[str, Cell]:
    """The columns that options bring, after those that are always there."""
    options, columns = table.options, dict[str, Cell]()
    if options.tested:
        columns["p"] = lambda place, col: raw_number(table.rows[place].summaries[col].p)
        columns["interval"] = lambda place, col: options.interval or "t"
        columns["correct"] = lambda place, col: options.correct or "none"
    if options.pivot:
        against = against_best(table)
        best = marked(table, against)
        columns["best"] = lambda place, col: raw_truth((place, col) in best)
        columns["p_to_best"] = lambda place, col: raw_number(against.get((place, col), math.nan))
    if options.budget:
        columns["budget"] = lambda place, col: " ".join(options.budget)
    if kind := options.pareto:
        points = fronts(table, kind).points
        columns["paid"] = lambda place, col: kind
        columns["cost"] = lambda place, col: raw_number(points[place].cost)
        columns["front"] = lambda place, col: raw_truth(points[place].front)
    return columns


def raw_number(value: float | int) -> float | int | str:
    """A number; empty where it is not defined."""
    return "" if isinstance(value, float) and math.isnan(value) else value


def raw_name(value: object) -> str:
    """A config value; empty where a run has no such key."""
    return "" if value is ABSENT else label(value)


def raw_truth(value: bool) -> str:
    """Whether something is so."""
    return str(value).lower()
