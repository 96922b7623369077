"""``hybridfl compare``: many runs as one table.

In four steps: find the run folders (``runs.py``), decide which config keys tell the rows apart (``keys.py``), put the
runs into cells (``tabulate.py``, the numbers: ``statistics.py``), write the table (``formats.py``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from hybridfl import pareto
from hybridfl.budgets import UNITS, cut
from hybridfl.errors import ConfigError, nearest
from hybridfl.formats import FORMATS, SHEETS
from hybridfl.pareto import UNITS as PAID
from hybridfl.runs import find_runs, to_stderr
from hybridfl.significance import CORRECTIONS, INTERVALS
from hybridfl.tabulate import AT, AUTO, OF_STREAMS, Options, tabulate
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
    add("--scope", default=default.scope, help="global, clients, served, … (default: %(default)s)")
    add(
        "--at",
        default=default.at,
        metavar="|".join(AT),
        help="point of the run to read (default: mean10; streams, and with --budget: last)",
    )
    add("--rows", default=default.rows, metavar="KEY[,KEY]", help="config keys, one row a value (default: %(default)s)")
    add("--cols", default=default.cols, metavar="KEY", help="config key, one column a value")
    add(
        "--pivot",
        action="append",
        default=[],
        metavar="KEY",
        help="as --cols, one column a combination of values if repeated; what is not worse than the best is marked too",
    )
    add(
        "--budget",
        action="append",
        default=[],
        metavar="COST=AMOUNT",
        help=f"read every run at its last evaluation within it, as bytes=10MB; {', '.join(UNITS)}; repeatable",
    )
    add(
        "--pareto",
        metavar="|".join(PAID),
        help="which rows are on the front of the metric against this cost",
    )
    add("--ranks", action="store_true", help="average ranks of the rows over all settings, with critical difference")
    add("--plot", type=Path, metavar="FILE", help="with --ranks or --pareto: a figure, as .png or .svg")
    add("--format", default=default.format, metavar="|".join(FORMATS), help="default: %(default)s")
    add(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="only runs with key=value[,value], or a condition with !=, >=, <=, >, <; repeatable, all must hold",
    )
    add(
        "--interval",
        metavar="|".join(INTERVALS),
        help="of the paired differences to the reference, with p values (default: t, without)",
    )
    add(
        "--correct",
        metavar="|".join(CORRECTIONS),
        help="intervals and p values for all differences of the table together (default: none, each by itself)",
    )
    add("--reference", metavar="NAME", help="row to take differences to (default: fedavg, else the first row)")
    add("--target", type=float, metavar="ACCURACY", help="in (0, 1] (default: 90 %% of the best row's accuracy)")


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
    choices = {"at": (*AT, AUTO), "format": FORMATS, "interval": INTERVALS, "correct": CORRECTIONS, "pareto": PAID}
    for name, valid in choices.items():
        if (given := getattr(options, name)) not in (None, *valid):
            raise ConfigError(f"--{name}", f"'{given}' is unknown. {nearest(given, valid)}")
    if options.target is not None and not 0 < options.target <= 1:
        raise ConfigError("--target", f"{options.target:g} is not an accuracy in (0, 1], such as 0.85.")
    check_together(options)
    runs = chosen(find_runs([Path(path) for path in paths], warn), options.where, warn)
    runs = cut(runs, options.budget, options.scope, warn)
    table = tabulate(runs, options, warn)
    if options.ranks:
        from hybridfl import rank_table

        ranking = rank_table.rank(table)
        if options.plot:
            rank_table.draw(ranking, options.plot)
            warn(f"figure: {options.plot}")
        return (
            rank_table.as_csv(ranking)
            if options.format == "csv"
            else SHEETS[options.format](rank_table.as_sheet(ranking))
        )
    if options.pareto and options.plot:
        pareto.draw(table, pareto.fronts(table, options.pareto), options.plot)
        warn(f"figure: {options.plot}")
    return FORMATS[options.format](table)


def check_together(options: Options) -> None:
    """Raises ConfigError if options do not go together, or a figure has no place to be written to."""
    for name in ("interval", "correct"):
        if options.ranks and (given := getattr(options, name)) is not None:
            raise ConfigError(
                f"--{name}", f"got {given} beside --ranks, whose tests are its own; leave one of them out."
            )
    if options.pareto and (options.ranks or options.columns):
        problem = (
            f"got {options.pareto} beside {'--ranks' if options.ranks else '--pivot' if options.pivot else '--cols'}"
        )
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
