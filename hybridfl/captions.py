"""What stands below a table of ``hybridfl compare``: all that a reader must know to read its numbers."""

from __future__ import annotations

import math

from hybridfl.pareto import UNITS, fronts
from hybridfl.pivots import against_best, usual_seeds
from hybridfl.significance import CORRECTIONS, FEW
from hybridfl.tabulate import AT, DAGGER, FRACTIONS, Options, Table, moves_raw_data

MEGABYTES = "MB: 10⁶ bytes up, down and between peers."


def caption(table: Table) -> list[str]:
    """What a reader must know to read the numbers."""
    options = table.options
    unit = " in %" if options.metric in FRACTIONS else ""
    lines = [f"{options.metric}{unit}, scope {options.scope}, {AT[options.at]}; mean ± sd over seeds."]
    lines += of_budget(options)
    if options.pivot:
        lines += of_pivot(table)
    elif options.cols:
        seeds = sorted({cell.seeds for row in table.rows for cell in row.summaries.values()})
        lines.append(f"Columns: {options.cols}. Seeds a cell: {'–'.join(map(str, sorted({seeds[0], seeds[-1]})))}.")
    else:
        if len(table.rows) > 1:
            pairs = "pairs with the same seed, split, start and clients"
            lines.append(f"− {table.reference}: mean difference over {pairs}, {how_tested(table)}.")
            fewest = min(
                (cell.pairs for row in table.rows for cell in row.summaries.values() if cell.pairs), default=FEW
            )
            if options.interval == "bootstrap" and fewest < FEW:
                lines.append(f"A bootstrap of {fewest} pairs is too narrow, and its p values too small: t is safer.")
        if math.isfinite(table.target) and has_goal(table):
            whose = " = 90 % of the best mean" if options.target is None else ""
            goal = f"Target: accuracy {100 * table.target:.4g} %{whose}"
            lines.append(f"{goal}; (k/n): k of n runs reach it. {MEGABYTES}")
        elif table.stream:
            lines.append(MEGABYTES)
    if options.pareto:
        lines.append(of_fronts(table, options.pareto))
    if table.stream:
        lines += of_streams(options)
    if any(moves_raw_data(row.all_runs) for row in table.rows):
        lines.append(f"{DAGGER} moves raw data to another owner.")
    return lines


def of_budget(options: Options) -> list[str]:
    """What a reader must know of runs that are not read at their end."""
    return [f"Equal budgets: only evaluations within {' '.join(options.budget)} count."] if options.budget else []


def of_pivot(table: Table) -> list[str]:
    """What a reader must know of the columns of a pivot, and of what is bold there."""
    options, tests = table.options, against_best(table)
    usual, differ = usual_seeds(table), len({cell.seeds for row in table.rows for cell in row.summaries.values()}) > 1
    seeds = f"{usual} seed{'' if usual == 1 else 's'} a cell{', or n' if differ else ''}"
    lines = [f"Columns: {' / '.join(options.columns)}. {seeds}."]
    tested = sum(math.isfinite(p) for p in tests.values())
    how = f"paired {options.interval or 't'} test, 5 %"
    if options.correct not in (None, "none"):
        how += f", {CORRECTIONS[options.correct or 'none']} over the {tested} comparisons of this table"
    if tested:
        lines.append(f"Bold: the best of a column, and those not significantly different from it ({how}).")
    elif tests:
        lines.append("Bold: the best of a column; without two pairs nothing is tested.")
    return lines


def of_fronts(table: Table, cost: str) -> str:
    """What the front is, and of what."""
    settings = fronts(table, cost).settings
    where = f" with the same {', '.join(settings)}" if settings else ""
    means = f"front ●: no rival{where} has as good a mean {table.options.metric} for as few {UNITS[cost][0]}"
    return f"{means}, and one of them better. Costs are those until the last evaluation that counts."


def how_tested(table: Table) -> str:
    """What the intervals and p values of the differences are."""
    options = table.options
    kind = options.interval or "t"
    if not options.tested:
        return "95 % t interval"
    family = sum(math.isfinite(cell.p) for row in table.rows for cell in row.summaries.values())
    all_of_them = f"the {family} differences of this table" if family > 1 else "the one difference of this table"
    return {
        "none": f"95 % {kind} interval and two-sided p value, each by itself",
        "holm": f"{kind} intervals and p values that hold for {all_of_them} together at 95 % (Holm)",
        "bh": f"{kind} intervals and p values with at most 5 % false findings expected among {all_of_them} "
        "that are significant (Benjamini–Hochberg)",
    }[options.correct or "none"]


def of_streams(options: Options) -> list[str]:
    """What a reader must know of a table of runs with several tasks."""
    lines = []
    if options.at != "last":
        lines.append("Stream of tasks: only evaluations during the last task count.")
    elif options.metric == "accuracy":
        lines.append(
            "Stream of tasks: final average accuracies over all examples; global/tasks and served/tasks: over the tasks."
        )
    if options.metric == "forgetting_learned":
        lines.append(
            "forgetting_learned: accuracy just after learning a task minus the last, mean over all tasks but the last."
        )
    elif options.metric in ("accuracy", "forgetting"):
        lines.append("forgetting: best earlier accuracy on a task minus the last, mean over all tasks but the last.")
    return lines


def has_goal(table: Table) -> bool:
    """In a stream, in which accuracy need not rise, rounds are counted to a target that somebody asks for only."""
    return not table.stream or table.options.target is not None
