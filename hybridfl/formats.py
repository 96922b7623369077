"""A table of ``hybridfl compare`` as text: for a terminal, Markdown, LaTeX; as CSV in ``table_csv.py``."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hybridfl import statistics
from hybridfl.captions import caption, has_goal
from hybridfl.keys import label
from hybridfl.pareto import UNITS as PAID
from hybridfl.pareto import fronts
from hybridfl.pivots import against_best, best_rows, marked, usual_seeds
from hybridfl.significance import CORRECTIONS
from hybridfl.statistics import Summary
from hybridfl.table_csv import as_csv
from hybridfl.tabulate import (
    DAGGER,
    FRACTIONS,
    OF_STREAMS,
    OTHERS,
    Column,
    Options,
    Table,
    moves_raw_data,
    read_at,
)


@dataclass(frozen=True)
class Sheet:
    """The table as text: cells, which of them are bold, and lines that explain it. ``left`` columns hold names."""

    header: list[str]
    body: list[list[str]]
    bold: set[tuple[int, int]]
    caption: list[str]
    left: int


def as_sheet(table: Table) -> Sheet:
    """What the three formats for people have in common."""
    columns = pivot_columns(table) if table.options.columns else summary_columns(table)
    names = [[label(value) for value in row.values] for row in table.rows]
    named = table.keys.index("method") if "method" in table.keys else 0
    for row, cells in zip(table.rows, names, strict=True):
        cells[named] += DAGGER if "method" not in table.options.columns and moves_raw_data(row.all_runs) else ""
    body = [cells + [column[i] for _, column in columns] for i, cells in enumerate(names)]
    left = len(table.keys)
    # the means stand in all columns of a pivot, else in the second one, after the seeds
    places: dict[Column, int] = (
        {col: left + i for i, col in enumerate(table.cols)} if table.options.columns else {(): left + 1}
    )
    best = (
        marked(table, against_best(table))
        if table.options.pivot
        else [(i, col) for col in table.cols for i in best_rows(table, col)]
    )
    bold = {(row, places[col]) for row, col in best}
    return Sheet([*table.keys, *(name for name, _ in columns)], body, bold, caption(table), left)


def pivot_columns(table: Table) -> list[tuple[str, list[str]]]:
    """One column a value of the column key, or a combination of several; a cell holds mean ± sd."""
    options = table.options
    usual = usual_seeds(table) if options.pivot else None

    def cell(found: Summary) -> str:
        number = f" (n={found.seeds})" if usual is not None and found.seeds != usual else ""
        return spread(found, options.metric) + number

    raw = {col for row in table.rows for col, cell in row.runs.items() if moves_raw_data(cell)}
    return [
        (
            " / ".join(map(label, values)) + (DAGGER if "method" in options.columns and col in raw else ""),
            [cell(row.summaries[col]) if col in row.summaries else "" for row in table.rows],
        )
        for col, values in table.cols.items()
    ]


def summary_columns(table: Table) -> list[tuple[str, list[str]]]:
    """Everything about one column: the chosen number, its neighbours, the difference, what it cost to get there."""
    options = table.options
    cells = [row.summaries[()] for row in table.rows]
    columns = [
        ("seeds", [str(cell.seeds) for cell in cells]),
        (f"{options.metric} {options.scope}", [spread(cell, options.metric) for cell in cells]),
    ]
    if options.metric == "accuracy":
        columns += other_scopes(table)
    goal = "target" if math.isnan(table.target) else f"{100 * table.target:.4g} %"
    if len(cells) > 1:
        columns.append((f"− {table.reference} [95 %]", [difference(cell, options.metric) for cell in cells]))
        if options.tested:
            columns.append((p_name(options), [p_value(cell.p) for cell in cells]))
    if has_goal(table):
        columns += [
            (f"rounds to {goal}", [reached(cell) for cell in cells]),
            (f"MB to {goal}", [short(cell.bytes_to_target / 1e6) for cell in cells]),
        ]
    columns.append(("MB", [short(cell.bytes / 1e6) for cell in cells]))
    if options.pareto:
        points = fronts(table, options.pareto).points
        if options.pareto != "bytes":
            unit, size = PAID[options.pareto]
            columns.append((unit, [short(point.cost / size) for point in points]))
        columns.append(("front", ["●" if point.front else "" for point in points]))
    return columns


def p_name(options: Options) -> str:
    """What the p values are called, with the correction if there is one."""
    how = CORRECTIONS[options.correct or "none"]
    return f"p ({how})" if how else "p"


def p_value(value: float) -> str:
    """To three decimals; blank where there was nothing to test."""
    if not math.isfinite(value):
        return ""
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def other_scopes(table: Table) -> list[tuple[str, list[str]]]:
    """The means of the other standard scopes at the same point, where any run has them."""
    columns = []
    for scope, metric in OTHERS:
        if (scope, metric) != (table.options.scope, "accuracy"):
            values = [[read_at(run, scope, metric, table.options.at) for run in row.runs[()]] for row in table.rows]
            means = [statistics.mean_sd([v for v in row if math.isfinite(v)])[0] for row in values]
            if any(map(math.isfinite, means)):
                columns.append((other_name(scope, metric), [shown(mean, metric) for mean in means]))
    return columns


def other_name(scope: str, metric: str) -> str:
    if metric in OF_STREAMS:
        return f"{metric} {scope}"
    return scope if metric == "accuracy" else metric


def shown(value: float, metric: str, sign: str = "") -> str:
    """A value of ``metric``: fractions in percent."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:{sign}.1f}" if metric in FRACTIONS else f"{value:{sign}.4g}"


def spread(cell: Summary, metric: str) -> str:
    """mean ± sd, the latter where it is defined."""
    return shown(cell.mean, metric) + (f" ± {shown(cell.sd, metric)}" if math.isfinite(cell.sd) else "")


def difference(cell: Summary, metric: str) -> str:
    """Mean paired difference with its interval; blank without pairs."""
    if not cell.pairs:
        return ""
    interval = f" [{shown(cell.low, metric, '+')}, {shown(cell.high, metric, '+')}]" if math.isfinite(cell.low) else ""
    return shown(cell.difference, metric, "+") + interval


def reached(cell: Summary) -> str:
    """Mean rounds to the target, and how many runs got there where some did not."""
    some = f" ({cell.reached}/{cell.runs})" if cell.reached < cell.runs else ""
    return short(cell.rounds_to_target) + some


def short(value: float) -> str:
    """Three digits, more only before the point."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def terminal(sheet: Sheet) -> str:
    """A table as wide as its numbers need, whatever the terminal: a line may wrap there, but no digit is hidden."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(sheet.header):
        grid.add_column(Text(name), justify="left" if place < sheet.left else "right", no_wrap=True)
    for r, cells in enumerate(sheet.body):
        grid.add_row(*(Text(cell, style="bold" if (r, c) in sheet.bold else "") for c, cell in enumerate(cells)))
    text = io.StringIO()
    Console(file=text, width=10_000, force_terminal=sys.stdout.isatty(), legacy_windows=False).print(grid)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join([*filter(None, lines), *sheet.caption])


def markdown(sheet: Sheet) -> str:
    """A GitHub table."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rules = [":---" if place < sheet.left else "---:" for place in range(len(sheet.header))]
    header = line(cell.replace("|", "\\|") for cell in sheet.header)
    body = [line(_marked(sheet, r, lambda text: text.replace("|", "\\|"), "**{}**")) for r in range(len(sheet.body))]
    return "\n".join([header, line(rules), *body, "", *(f"{text}  " for text in sheet.caption)]).rstrip()


def _marked(sheet: Sheet, row: int, escape: Callable[[str], str], bold: str) -> list[str]:
    cells = enumerate(map(escape, sheet.body[row]))
    return [bold.replace("{}", cell) if (row, place) in sheet.bold else cell for place, cell in cells]


LATEX = {char: "\\" + char for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "≥": r"$\ge$",
    "≤": r"$\le$",
    ">": r"$>$",
    "<": r"$<$",
    "−": r"$-$",
    "–": "--",
    "…": r"\dots{}",
    "⁶": "$^6$",
    "²": "$^2$",
    "χ": r"$\chi$",
    "●": r"$\bullet$",
    "š": r"\v{s}",
    DAGGER: r"$^\dagger$",
}


def latex_escape(text: str) -> str:
    """Plain text as LaTeX shows it."""
    text = re.sub(r"(?<!\w)-(?=\d)", "−", text)  # a minus, not a hyphen
    return "".join(LATEX.get(char, char) for char in text)


def latex(sheet: Sheet) -> str:
    """A ``table`` for the booktabs package."""
    align = "l" * sheet.left + "r" * (len(sheet.header) - sheet.left)
    body = [" & ".join(_marked(sheet, r, latex_escape, r"\textbf{{}}")) + r" \\" for r in range(len(sheet.body))]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{latex_escape(' '.join(sheet.caption))}}}",
            rf"  \begin{{tabular}}{{{align}}}",
            r"    \toprule",
            "    " + " & ".join(map(latex_escape, sheet.header)) + r" \\",
            r"    \midrule",
            *("    " + line for line in body),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )


SHEETS: Mapping[str, Callable[[Sheet], str]] = {"terminal": terminal, "markdown": markdown, "latex": latex}
FORMATS: Mapping[str, Callable[[Table], str]] = {
    "terminal": lambda table: terminal(as_sheet(table)),
    "csv": as_csv,
    "markdown": lambda table: markdown(as_sheet(table)),
    "latex": lambda table: latex(as_sheet(table)),
}
