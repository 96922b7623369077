"""``hybridfl compare``: many runs as one table.

In four steps: find the run folders (``finding.py``), decide which config keys tell the rows apart (``keys.py``), put the
runs into cells (``tabulate.py``, the numbers: ``statistics.py``), write the table (``formats.py``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from hybridfl import pareto
from hybridfl.budgets import UNITS as COSTS
from hybridfl.budgets import cut
from hybridfl.errors import ConfigError, nearest
from hybridfl.finding import find_runs
from hybridfl.formats import FORMATS, SHEETS
from hybridfl.pareto import UNITS
from hybridfl.runs import to_stderr
from hybridfl.significance import CORRECTIONS, INTERVALS
from hybridfl.tabulate import AT, AUTO, OF_STREAMS, SCOPES, Options, Table, scope_of, tabulate
from hybridfl.where import chosen

PLOTS = (".png", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl compare``."""
    default = Options()
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="run, sweep or output folders (default: outputs)")
    add(
        "--metric",
        default=default.metric,
        help=f"a column of metrics.csv, or {', '.join(OF_STREAMS)} (default: %(default)s)",
    )
    add("--scope", default=default.scope, help=f"{', '.join(SCOPES)}, … (default: the first of these that a run has)")
    add(
        "--at",
        default=default.at,
        metavar="|".join(AT),
        help="point of the run to read (default: mean10; streams, and with --budget: last)",
    )
    add("--rows", default=default.rows, metavar="KEY[,KEY]", help="config keys, one row a value (default: %(default)s)")
    add("--cols", default=default.cols, metavar="KEY", help="config key, one column a value")
    add("--format", default=default.format, metavar="|".join(FORMATS), help="default: %(default)s")
    add("--reference", metavar="NAME", help="row to take differences to (default: fedavg, else the first row)")
    add("--target", type=float, metavar="ACCURACY", help="in (0, 1] (default: 90 %% of the best row's accuracy)")
    add_analyses(parser)


def add_analyses(parser: argparse.ArgumentParser) -> None:
    """The options of docs/compare.md."""
    add = parser.add_argument_group("analyses (docs/compare.md; the first three can be repeated)").add_argument

    def several(name: str, metavar: str, help: str) -> None:
        add(name, action="append", default=[], metavar=metavar, help=help)

    several(
        "--where",
        "CONDITION",
        "only runs with key=value[,value], or a condition with !=, >=, <=, > or <; all must hold",
    )
    several("--pivot", "KEY", "one column a combination of values; marks the best and what does not differ from it")
    several("--budget", "COST=AMOUNT", f"read runs at equal cost, as bytes=10MB; also {', '.join([*COSTS][1:])}")
    add("--interval", metavar="|".join(INTERVALS), help="of differences, with p values (default: t, without)")
    add(
        "--correct",
        metavar="|".join(CORRECTIONS),
        help="p values and intervals for all differences of the table together",
    )
    add("--ranks", action="store_true", help="average ranks over all settings, with critical difference")
    add("--pareto", metavar="|".join(UNITS), help="which rows are on the front of the metric against this cost")
    add("--plot", type=Path, metavar="FILE", help="with --ranks or --pareto: a figure, .png or .svg")


def run(args: argparse.Namespace) -> int:
    """Prints the table and returns the exit status."""
    options = Options(**{option.name: getattr(args, option.name) for option in fields(Options)})
    print(render([Path(path) for path in args.paths] or [Path("outputs")], options))
    return 0


def render(paths: Sequence[Path | str], options: Options | None = None, warn: Callable[[str], None] = to_stderr) -> str:
    """The table of all finished runs under ``paths``, without a newline at the end.

    Args:
        paths: run folders, sweep folders and output folders, in any mix.
        options: what to show; the defaults if None.
        warn: takes the lines that belong beside the table: what was left out, what was split.

    Raises:
        ConfigError: a path, key, metric, scope or reference that does not exist.
        HybridflError: no run is finished.
    """
    options = options or Options()
    choices = {"at": (*AT, AUTO), "format": FORMATS, "interval": INTERVALS, "correct": CORRECTIONS, "pareto": UNITS}
    for name, valid in choices.items():
        if (given := getattr(options, name)) not in (None, *valid):
            raise ConfigError(f"--{name}", f"'{given}' is unknown. {nearest(given, valid)}")
    if options.target is not None and not 0 < options.target <= 1:
        raise ConfigError("--target", f"{options.target:g} is not an accuracy in (0, 1], such as 0.85.")
    check_together(options)
    runs = chosen(find_runs([Path(path) for path in paths], warn), options.where, warn)
    options = replace(options, scope=scope_of(runs, options.scope))
    runs = cut(runs, options.budget, options.scope, warn)
    table = tabulate(runs, options, warn)
    if options.ranks:
        return ranked(table, warn)
    if options.pareto and options.plot:
        pareto.draw(table, pareto.fronts(table, options.pareto), options.plot)
        warn(f"figure: {options.plot}")
    return FORMATS[options.format](table)


def ranked(table: Table, warn: Callable[[str], None]) -> str:
    """The table's rows by their average rank; the diagram too, if asked for."""
    from hybridfl import rank_table

    ranking, options = rank_table.rank(table), table.options
    if options.plot:
        rank_table.draw(ranking, options.plot)
        warn(f"figure: {options.plot}")
    if options.format == "csv":
        return rank_table.as_csv(ranking)
    return SHEETS[options.format](rank_table.as_sheet(ranking))


def check_together(options: Options) -> None:
    """Raises ConfigError if options do not go together, or a figure has no place to be written to."""
    for name in ("interval", "correct"):
        if options.ranks and (given := getattr(options, name)) is not None:
            problem = f"got {given} beside --ranks, whose tests are its own"
            raise ConfigError(f"--{name}", f"{problem}; leave one of them out.")
    beside = [name for name in ("ranks", "pivot", "cols") if getattr(options, name)]
    if options.pareto and beside:
        problem = f"got {options.pareto} beside --{beside[0]}"
        raise ConfigError("--pareto", f"{problem}; leave one of them out: every setting has a front of its own.")
    if options.plot is None:
        return
    if not options.ranks and not options.pareto:
        raise ConfigError("--plot", f"got {options.plot}, and this table has no figure; --ranks and --pareto have one.")
    if options.plot.suffix not in PLOTS:
        problem = f"got {options.plot}: not a {' or '.join(PLOTS)}"
        raise ConfigError("--plot", f"{problem}; nearest valid value: {options.plot.with_suffix('.png')}.")
    if not options.plot.parent.is_dir():
        raise ConfigError("--plot", f"got {options.plot}: there is no folder {options.plot.parent}.")
