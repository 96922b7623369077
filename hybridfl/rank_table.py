"""``hybridfl compare --ranks``: a table's methods ranked over its columns, as text, CSV and critical-difference diagram."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters
from typing import Any

from hybridfl.captions import of_budget
from hybridfl.errors import HybridflError
from hybridfl.formats import Sheet, p_value, shown
from hybridfl.keys import label, name_of
from hybridfl.ranking import (
    ALPHA,
    Friedman,
    average_ranks,
    block_ranks,
    critical_difference,
    friedman,
    groups,
)
from hybridfl.statistics import mean_sd
from hybridfl.table_csv import raw_name
from hybridfl.tabulate import AT, FRACTIONS, HIGHER_IS_BETTER, Row, Table, moves_raw_data

NUMBERS = ("mean", "rank", "average_rank", "group", "friedman_chi2", "friedman_f", "p", "critical_difference")


@dataclass(frozen=True)
class Ranked:
    """One method.

    Attributes:
        values: of the table's row keys.
        means: in each block, over seeds.
        ranks: in each block.
        group: a letter for each group of :func:`hybridfl.ranking.groups`; methods that share one do not differ.
    """

    values: tuple[Any, ...]
    means: list[float]
    ranks: list[float]
    average: float
    group: str


@dataclass(frozen=True)
class Ranking:
    """The methods that are in all blocks, best first.

    Attributes:
        bars: groups of two or more, by places in ``methods``.
        absent: what was not ranked, with why.
    """

    table: Table
    methods: list[Ranked]
    test: Friedman
    difference: float
    bars: list[list[int]]
    absent: list[str]


def rank(table: Table) -> Ranking:
    """Ranks the rows that have a mean in every column; upper bounds that move raw data are no rivals.

    Raises:
        HybridflError: fewer than two blocks, or fewer than two methods in all of them.
    """
    rivals: list[tuple[Row, list[float]]] = []
    absent = []
    for row in table.rows:
        means = [row.summaries[col].mean if col in row.summaries else math.nan for col in table.cols]
        there = sum(map(math.isfinite, means))
        if moves_raw_data(row.all_runs):
            absent.append(f"{name_of(row.values)} (moves raw data)")
        elif there < len(means):
            absent.append(f"{name_of(row.values)} (in {there} of {len(means)} blocks)")
        else:
            rivals.append((row, means))
    blocks = f"{len(table.cols)} block{'' if len(table.cols) == 1 else 's'} ({' / '.join(table.options.columns)})"
    if len(table.cols) < 2 or len(rivals) < 2:
        problem = (
            f"Ranks take two blocks, and two methods that are in all of them; there are {blocks} and {len(rivals)}"
        )
        why = f". Not ranked: {'; '.join(absent)}" if absent else ""
        raise HybridflError(f"{problem} such methods{why}. --where and --pivot choose methods and blocks.")
    higher = table.options.metric in HIGHER_IS_BETTER
    ranks = [block_ranks(values, higher) for values in zip(*(found for _, found in rivals), strict=True)]
    averages, difference = average_ranks(ranks), critical_difference(len(rivals), len(ranks))
    found = groups(averages, difference)
    order = sorted(range(len(rivals)), key=averages.__getitem__)
    methods = []
    for place in order:
        row, means = rivals[place]
        letters = [ascii_letters[n % len(ascii_letters)] for n, members in enumerate(found) if place in members]
        methods.append(Ranked(row.values, means, [of[place] for of in ranks], averages[place], "".join(letters)))
    bars = [[order.index(place) for place in members] for members in found if len(members) > 1]
    return Ranking(table, methods, friedman(ranks), difference, bars, absent)


def as_sheet(ranking: Ranking) -> Sheet:
    """The methods by average rank; those of the best group are bold."""
    table, options = ranking.table, ranking.table.options
    header = [*table.keys, "average rank", "group", "first in", f"{options.metric} {options.scope}"]
    first = [min(ranks) for ranks in zip(*(method.ranks for method in ranking.methods), strict=True)]
    body = [
        [
            *map(label, method.values),
            f"{method.average:.2f}",
            method.group,
            str(sum(rank == best for rank, best in zip(method.ranks, first, strict=True))),
            shown(mean_sd(method.means)[0], options.metric),
        ]
        for method in ranking.methods
    ]
    left = len(table.keys)
    bold = {(i, left) for i, method in enumerate(ranking.methods) if ranking.methods[0].group[0] in method.group}
    return Sheet(header, body, bold, _caption(ranking), left)


def _caption(ranking: Ranking) -> list[str]:
    options, test = ranking.table.options, ranking.test
    unit = " in %" if options.metric in FRACTIONS else ""
    keys, count = " / ".join(options.columns), len(ranking.table.cols)
    f = "infinite" if math.isinf(test.f) else f"{test.f:.3g}"
    lines = [
        f"{options.metric}{unit}, scope {options.scope}, {AT[options.at]}; means over seeds, then over {count} blocks.",
        *of_budget(options),
        f"Blocks: {keys}. Ranks within each, 1 is best, ties share their mean rank; first in: blocks won or shared.",
        f"Friedman χ² = {test.chi2:.3g}, F({test.degrees[0]}, {test.degrees[1]}) = {f} (Iman and Davenport), "
        f"p {'< 0.001' if test.p < 0.001 else f'= {p_value(test.p)}'}{' (exact)' if test.exact else ''}.",
        f"Methods that share a letter differ by less than {ranking.difference:.3g}, "
        "Nemenyi's critical difference at 5 % (Demšar 2006).",
    ]
    if test.p > ALPHA:
        lines.append(
            "The Friedman test finds no difference between the methods, so that none between two is to be read."
        )
    if ranking.absent:
        lines.append(f"Not ranked: {'; '.join(ranking.absent)}.")
    return lines


def draw(ranking: Ranking, path: Path) -> None:
    """The critical-difference diagram, as PNG or SVG."""
    from hybridfl.comparison_figures import critical_difference_diagram

    options = ranking.table.options
    title = f"average ranks by {options.metric}, scope {options.scope}, {len(ranking.table.cols)} blocks"
    methods = [(name_of(method.values), method.average) for method in ranking.methods]
    critical_difference_diagram(methods, ranking.difference, ranking.bars, title, path)


def as_csv(ranking: Ranking) -> str:
    """Raw numbers, one line a method and block; those of the whole ranking are repeated."""
    table, options, text = ranking.table, ranking.table.options, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*table.keys, *options.columns, *NUMBERS, "metric", "scope", "at"])
    test = [ranking.test.chi2, ranking.test.f, ranking.test.p, ranking.difference]
    for method in ranking.methods:
        for block, mean, place in zip(table.cols.values(), method.means, method.ranks, strict=True):
            names = map(raw_name, (*method.values, *block))
            numbers = [mean, place, method.average, method.group, *test]
            writer.writerow([*names, *numbers, options.metric, options.scope, options.at])
    return text.getvalue().rstrip("\n")
