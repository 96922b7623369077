"""``hybridfl compare``: many runs as one table.

In four steps: find the run folders (``show.py``), decide which config keys tell the rows apart, put the runs into
cells (the numbers: ``statistics.py``), write the table. Nothing is averaged but seeds.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hybridfl import statistics
from hybridfl.errors import ConfigError, HybridflError, nearest
from hybridfl.show import ABSENT, Run, find_runs, to_stderr
from hybridfl.statistics import MISSING, WINDOW, Observation, Summary, summarise

AT = {
    "last": "last evaluation",
    "mean10": f"mean of the last {WINDOW} evaluations",
    "best": "evaluation with the best validation accuracy",
}
FRACTIONS = ("accuracy", "worst10", "spread")
HIGHER_IS_BETTER = ("accuracy", "worst10", "examples")
OTHERS = (("global", "accuracy"), ("clients", "accuracy"), ("clients", "worst10"), ("served", "accuracy"))
DAGGER = "†"
CSV_NUMBERS = (
    *("seeds", "mean", "sd", "difference", "low", "high"),
    *("rounds_to_target", "reached", "bytes_to_target", "bytes", "runs", "pairs"),
)
CSV_CONTEXT = ("target", "metric", "scope", "at", "moves_raw_data")

NOT_RESULTS = frozenset(
    [
        *("seed", "overrides", "digest", "baseline", "merging", "experiment", "claims", "tuned", "tracker", "executor"),
        *("device", "output_dir", "data_root", "ui", "rerun", "fail_fast", "checkpoint_seconds", "max_bad_rounds"),
    ]
)
"""Top-level config keys that may differ between runs of one cell: ``plan.NOT_IDENTITY``, whose import takes seconds,
the seed, and what is written beside the config."""


@dataclass(frozen=True)
class Options:
    """What the table shows; the fields are the options of the command line."""

    metric: str = "accuracy"
    scope: str = "global"
    at: str = "mean10"
    rows: str = "method"
    cols: str | None = None
    format: str = "terminal"
    reference: str | None = None
    target: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl compare``."""
    default = Options()
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="run, sweep or output folders (default: outputs)")
    add("--metric", default=default.metric, help="a column of metrics.csv (default: %(default)s)")
    add("--scope", default=default.scope, help="global, clients, served, … (default: %(default)s)")
    add("--at", default=default.at, metavar="|".join(AT), help="point of the run to read (default: %(default)s)")
    add("--rows", default=default.rows, metavar="KEY[,KEY]", help="config keys, one row a value (default: %(default)s)")
    add("--cols", default=default.cols, metavar="KEY", help="config key, one column a value")
    add("--format", default=default.format, metavar="|".join(FORMATS), help="default: %(default)s")
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
    for name, valid in (("at", tuple(AT)), ("format", tuple(FORMATS))):
        if (given := getattr(options, name)) not in valid:
            raise ConfigError(f"--{name}", f"'{given}' is unknown. {nearest(given, valid)}")
    if options.target is not None and not 0 < options.target <= 1:
        raise ConfigError("--target", f"{options.target:g} is not an accuracy in (0, 1], such as 0.85.")
    table = tabulate(find_runs([Path(path) for path in paths], warn), options, warn)
    return FORMATS[options.format](table)


# --- which config keys tell the rows apart ----------------------------------------------------------------------------


def token(value: Any) -> str:
    """A value as something to compare by: 1 and 1.0 are the same setting, 1 and "1" are not."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(float(value))
    return "ABSENT" if value is ABSENT else repr(value)


def check_key(option: str, key: str, runs: Sequence[Run]) -> None:
    """Raises ConfigError with the nearest valid key if no run has ``key``."""
    if all(run.value(key) is ABSENT for run in runs):
        every = {key for run in runs for key in run.flat}
        groups = {key.rpartition(".")[0] for key in every if key.endswith((".name", "._target_"))}
        raise ConfigError(option, f"no run has the config key '{key}'. {nearest(key, every | groups)}")


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The config keys that decide results and differ between runs; those of the method within one method only.

    Names come before the settings they imply. Seeds of parts that merely follow the run's own seed are no difference.
    """
    seen: dict[str, dict[str, set[str]]] = {}  # key → method, or "" for keys outside of it → values
    for key in {key: None for run in runs for key in run.flat}:
        if key.partition(".")[0] in NOT_RESULTS or key == "method.name" or _follows_seed(key, runs):
            continue
        values = seen.setdefault(key, {})
        for run in runs:
            method = str(run.value("method")) if key.startswith("method.") else ""
            values.setdefault(method, set()).add(token(run.value(key)))
    keys = [key for key, values in seen.items() if any(len(found) > 1 for found in values.values())]
    keys = list(dict.fromkeys(_short(key, runs) for key in keys))
    methods = [] if len({token(run.value("method")) for run in runs}) < 2 else ["method"]
    names = {key for key in keys if key.endswith((".name", "._target_")) or any(key not in run.flat for run in runs)}
    return methods + sorted(keys, key=lambda key: key not in names)


def _short(key: str, runs: Sequence[Run]) -> str:
    """``partitioning`` for ``partitioning._target_``, where the class name alone tells the same runs apart."""
    group = key.removesuffix("._target_")
    if group in (key, "method") or any(f"{group}.name" in run.flat for run in runs):
        return key
    return group if _decided(key, [group], runs) else key


def _follows_seed(key: str, runs: Sequence[Run]) -> bool:
    return key.endswith("seed") and all(run.value(key) in (None, run.value("seed")) for run in runs)


def rows_of(runs: Sequence[Run], rows: Sequence[str], cols: str | None, warn: Callable[[str], None]) -> list[str]:
    """The row keys: those asked for, and every other key in which the runs differ.

    A key is not added if it is a member of a group whose name is already in the table (``dataset.classes`` of
    ``dataset``), or if it belongs to the column and would only tear the rows apart.
    """
    chosen, added, untold = list(rows), [], []
    for key in differing_keys(runs):
        shown = [*chosen, *([cols] if cols else [])]
        if key in shown or any(_implied(key, by, runs) for by in shown):
            continue
        if cols and _decided(key, shown, runs) and (_decided(key, [cols], runs) or not _decided(key, chosen, runs)):
            untold.append(key)
            continue
        chosen.append(key)
        added.append(key)
    if added:
        warn(f"The runs differ in {', '.join(added)}: added to the rows.")
    if untold:
        warn(f"The runs of different columns differ in {', '.join(untold)} as well.")
    return chosen


def _implied(key: str, by: str, runs: Sequence[Run]) -> bool:
    """Whether ``key`` lies in the group that ``by`` names and follows from that name."""
    group = re.sub(r"\.(name|_target_)$", "", by)
    names = by != group or any(run.value(f"{by}.name") is not ABSENT or f"{by}._target_" in run.flat for run in runs)
    return names and key.startswith(f"{group}.") and _decided(key, [by], runs)


def _decided(key: str, by: Sequence[str], runs: Sequence[Run]) -> bool:
    """Whether runs that agree in all of ``by`` agree in ``key``."""
    first: dict[tuple[str, ...], str] = {}
    return all(
        first.setdefault(tuple(token(run.value(k)) for k in by), token(run.value(key))) == token(run.value(key))
        for run in runs
    )


# --- put the runs into cells ------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One row: the values of its keys, its runs by column, and what the statistics say about them."""

    values: tuple[Any, ...]
    runs: dict[str, list[Run]]
    observations: dict[str, list[Observation]] = field(default_factory=dict)
    summaries: dict[str, Summary] = field(default_factory=dict)
    reference: Row | None = None

    @property
    def all_runs(self) -> list[Run]:
        """The runs of all columns."""
        return [run for cell in self.runs.values() for run in cell]


@dataclass(frozen=True)
class Table:
    """All numbers, before any format; ``cols`` maps the token of a column to its value, ``""`` where there is one."""

    options: Options
    keys: list[str]
    cols: dict[str, Any]
    rows: list[Row]
    target: float
    reference: str


def tabulate(runs: Sequence[Run], options: Options, warn: Callable[[str], None] = to_stderr) -> Table:
    """Runs → rows and columns of numbers.

    Raises:
        ConfigError: unknown key, metric, scope or reference; ``--at best`` without validation rows.
    """
    asked = [re.sub(r"^method\.name$", "method", key.strip()) for key in options.rows.split(",") if key.strip()]
    asked = asked or ["method"]
    for option, key in [*(("--rows", key) for key in asked), *([("--cols", options.cols)] if options.cols else [])]:
        check_key(option, key, runs)
    check_columns(runs, options)
    keys = rows_of(runs, asked, options.cols, warn)
    rows = group(runs, keys, options.cols, warn)
    for row in rows:
        row.observations = {col: [observe(run, options) for run in cell] for col, cell in row.runs.items()}
    every_cell = [cell for row in rows for cell in row.observations.values()]
    target = statistics.default_target(every_cell) if options.target is None else options.target
    reference = pick_references(rows, keys, options.reference)
    for row in rows:
        other = row.reference.observations if row.reference and row.reference is not row else {}
        row.summaries = {col: summarise(cell, other.get(col, ()), target) for col, cell in row.observations.items()}
    warn_of_gaps(rows, options, warn)
    values = [run.value(options.cols) for run in runs] if options.cols else []
    cols = {token(value): value for value in sorted(values, key=_natural)} or {"": None}
    return Table(options, keys, cols, rows, target, reference)


def check_columns(runs: Sequence[Run], options: Options) -> None:
    """Metric and scope exist, and validation rows where they are needed."""
    scopes = {scope for run in runs for scope in run.curves}
    if not scopes:
        raise HybridflError("None of the finished runs has an evaluation in its metrics.csv.")
    if options.scope not in scopes:
        raise ConfigError("--scope", f"no run has the scope '{options.scope}'. {nearest(options.scope, scopes)}")
    metrics = {name for run in runs for curve in run.curves.values() for name in curve.cells} - {"round", "scope"}
    if options.metric not in metrics:
        raise ConfigError("--metric", f"no run has the metric '{options.metric}'. {nearest(options.metric, metrics)}")
    if options.at == "best" and "validation" not in scopes:
        raise ConfigError(
            "--at",
            "'best' is the evaluation with the best validation accuracy, and these runs have no validation rows. "
            "server_data.validation=0.2 adds them to new runs; 'last' and 'mean10' need none.",
        )


def group(runs: Sequence[Run], keys: Sequence[str], cols: str | None, warn: Callable[[str], None]) -> list[Row]:
    """The rows with their runs, one run a seed: in the order of a sweep's jobs, or else by name."""
    rows: dict[tuple[str, ...], Row] = {}
    repeated = 0
    for run in runs:
        values = tuple(run.value(key) for key in keys)
        row = rows.setdefault(tuple(map(token, values)), Row(values, {}))
        row.runs.setdefault(token(run.value(cols)) if cols else "", []).append(run)
    for row in rows.values():
        for col, cell in row.runs.items():
            row.runs[col] = list({token(run.value("seed")): run for run in sorted(cell, key=_age)}.values())
            repeated += len(cell) - len(row.runs[col])
    if repeated:
        warn(f"{_runs(repeated)} left out: same config and seed as a newer one, but other data, code or version.")

    def place(row: Row) -> tuple[Any, ...]:
        jobs = [run.job for run in row.all_runs if run.job is not None]
        return (min(jobs, default=math.inf), *map(_natural, row.values))

    return sorted(rows.values(), key=place)


def moves_raw_data(runs: Iterable[Run]) -> bool:
    """Whether a method among the runs moves raw data to another owner."""
    return any(run.value("method.moves_raw_data") is True for run in runs)


def _age(run: Run) -> float:
    return (run.folder / "status.json").stat().st_mtime


def _natural(value: Any) -> tuple[int, float, str]:
    """Sorts numbers as numbers, before text; what is missing comes first."""
    if isinstance(value, (int, float)):
        return 1, value, ""
    return (0, 0, "") if value is None or value is ABSENT else (2, 0, str(value))


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def read_at(run: Run, scope: str, metric: str, at: str) -> float:
    """One number of a run: ``metric`` in ``scope`` at the chosen point; NaN if it is not defined there."""
    curve = run.curves.get(scope)
    if curve is None:
        return MISSING
    values = curve.column(metric)
    if at == "best":
        validation = run.curves.get("validation")
        best = validation and statistics.best_round(validation.rounds, validation.column("accuracy"))
        return dict(zip(curve.rounds, values, strict=True)).get(best, MISSING) if isinstance(best, int) else MISSING
    return statistics.tail_mean(values, 1 if at == "last" else statistics.WINDOW)


def observe(run: Run, options: Options) -> Observation:
    """What the statistics need to know of a run."""
    curve = run.curves.get(options.scope)
    split, seed = run.status.get("split"), token(run.value("seed"))
    last = max(run.curves.values(), key=lambda curve: curve.rounds[-1], default=None)
    return Observation(
        seed=seed,
        pair=None if split is None else (seed, split),
        value=read_at(run, options.scope, options.metric, options.at),
        accuracy=read_at(run, options.scope, "accuracy", options.at),
        curve=list(zip(curve.rounds, curve.column("accuracy"), curve.bytes, strict=True)) if curve else [],
        bytes=last.bytes[-1] if last else MISSING,
    )


def pick_references(rows: Sequence[Row], keys: Sequence[str], name: str | None) -> str:
    """Gives every row the row it is compared with and returns what that is called.

    The reference is a method (with its settings). Where the rows differ in other keys too, such as the number of
    clients, a row is compared with the reference row that agrees with it in most of them, and with none if two do.
    """
    own = [i for i, key in enumerate(keys) if key.partition(".")[0] == "method"] or list(range(len(keys)))
    others = [i for i in range(len(keys)) if i not in own]
    wanted = {part.strip() for part in (name or "fedavg").split(",")}
    found = [row for row in rows if wanted <= set(map(label, row.values))]
    # fedavg itself before a method that only contains it, such as fine-tuning after fedavg
    first = next((row for row in found if label(row.values[own[0]]) in wanted), found[0] if found else None)
    if first is None and name is not None:
        raise ConfigError(
            "--reference", f"no row '{name}'. {nearest(name, {label(v) for r in rows for v in r.values})}"
        )
    first = first or rows[0]
    identity = [first.values[i] for i in own]
    candidates = [row for row in rows if [row.values[i] for i in own] == identity]
    for row in rows:
        agreeing = [sum(token(row.values[i]) == token(other.values[i]) for i in others) for other in candidates]
        if agreeing.count(max(agreeing)) == 1:
            row.reference = candidates[agreeing.index(max(agreeing))]
    return ", ".join(label(value) for value in identity if value is not ABSENT)


def warn_of_gaps(rows: Sequence[Row], options: Options, warn: Callable[[str], None]) -> None:
    """Runs without a number are never left out of a mean in silence."""
    gaps = []
    for row in rows:
        observations = [o for cell in row.observations.values() for o in cell]
        missing = sum(not math.isfinite(o.value) for o in observations)
        if missing:
            gaps.append(f"{', '.join(map(label, row.values))} ({missing} of {_runs(len(observations))})")
    if gaps:
        warn(f"{options.metric} in scope {options.scope} is not defined for {'; '.join(gaps)}: left out of the means.")


# --- write the table --------------------------------------------------------------------------------------------------


def label(value: Any) -> str:
    """A config value as the user would type it."""
    if value is ABSENT:
        return "–"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def as_csv(table: Table) -> str:
    """Raw numbers, one line a row and column; empty where a number is not defined."""
    options, text = table.options, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*table.keys, *([options.cols] if options.cols else []), *CSV_NUMBERS, *CSV_CONTEXT])
    context = ["" if math.isnan(table.target) else table.target, options.metric, options.scope, options.at]
    for row in table.rows:
        for col, value in table.cols.items():
            if col in row.summaries:
                names = [*row.values, *([value] if options.cols else [])]
                numbers = [getattr(row.summaries[col], name) for name in CSV_NUMBERS]
                line = ["" if isinstance(number, float) and math.isnan(number) else number for number in numbers]
                raw = str(moves_raw_data(row.runs[col])).lower()
                writer.writerow(["" if name is ABSENT else label(name) for name in names] + line + context + [raw])
    return text.getvalue().rstrip("\n")


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
    columns = pivot_columns(table) if table.options.cols else summary_columns(table)
    names = [[label(value) for value in row.values] for row in table.rows]
    marked = table.keys.index("method") if "method" in table.keys else 0
    for row, cells in zip(table.rows, names, strict=True):
        cells[marked] += DAGGER if table.options.cols != "method" and moves_raw_data(row.all_runs) else ""
    body = [cells + [column[i] for _, column in columns] for i, cells in enumerate(names)]
    left = len(table.keys)
    # the means stand in all columns of a pivot, else in the second one, after the seeds
    places = {col: left + i for i, col in enumerate(table.cols)} if table.options.cols else {"": left + 1}
    bold = {(row, place) for col, place in places.items() for row in best_rows(table, col)}
    return Sheet([*table.keys, *(name for name, _ in columns)], body, bold, caption(table), left)


def best_rows(table: Table, col: str) -> list[int]:
    """The rows with the best mean of a column; none if there is nothing to choose from."""
    sign = 1 if table.options.metric in HIGHER_IS_BETTER else -1
    means = {i: sign * row.summaries[col].mean for i, row in enumerate(table.rows) if col in row.summaries}
    means = {i: mean for i, mean in means.items() if math.isfinite(mean)}
    return [i for i, mean in means.items() if mean == max(means.values())] if len(means) > 1 else []


def pivot_columns(table: Table) -> list[tuple[str, list[str]]]:
    """One column a value of the column key; a cell holds mean ± sd."""
    metric = table.options.metric
    raw = {col for row in table.rows for col, cell in row.runs.items() if moves_raw_data(cell)}
    return [
        (
            label(value) + (DAGGER if table.options.cols == "method" and col in raw else ""),
            [spread(row.summaries[col], metric) if col in row.summaries else "" for row in table.rows],
        )
        for col, value in table.cols.items()
    ]


def summary_columns(table: Table) -> list[tuple[str, list[str]]]:
    """Everything about one column: the chosen number, its neighbours, the difference, what it cost to get there."""
    options = table.options
    cells = [row.summaries[""] for row in table.rows]
    columns = [
        ("seeds", [str(cell.seeds) for cell in cells]),
        (f"{options.metric} {options.scope}", [spread(cell, options.metric) for cell in cells]),
    ]
    if options.metric == "accuracy":
        columns += other_scopes(table)
    goal = "target" if math.isnan(table.target) else f"{100 * table.target:.4g} %"
    columns += [
        (f"− {table.reference} [95 %]", [difference(cell, options.metric) for cell in cells]),
        (f"rounds to {goal}", [reached(cell) for cell in cells]),
        (f"MB to {goal}", [short(cell.bytes_to_target / 1e6) for cell in cells]),
        ("MB", [short(cell.bytes / 1e6) for cell in cells]),
    ]
    return columns


def other_scopes(table: Table) -> list[tuple[str, list[str]]]:
    """The means of the other standard scopes at the same point, where any run has them."""
    columns = []
    for scope, metric in OTHERS:
        if (scope, metric) != (table.options.scope, "accuracy"):
            values = [[read_at(run, scope, metric, table.options.at) for run in row.runs[""]] for row in table.rows]
            means = [statistics.mean_sd([v for v in row if math.isfinite(v)])[0] for row in values]
            if any(map(math.isfinite, means)):
                columns.append((scope if metric == "accuracy" else metric, [shown(mean, metric) for mean in means]))
    return columns


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


def caption(table: Table) -> list[str]:
    """What a reader must know to read the numbers."""
    options = table.options
    unit = " in %" if options.metric in FRACTIONS else ""
    lines = [f"{options.metric}{unit}, scope {options.scope}, {AT[options.at]}; mean ± sd over seeds."]
    if options.cols:
        seeds = sorted({cell.seeds for row in table.rows for cell in row.summaries.values()})
        lines.append(f"Columns: {options.cols}. Seeds a cell: {'–'.join(map(str, sorted({seeds[0], seeds[-1]})))}.")
    else:
        lines.append(f"− {table.reference}: mean difference over pairs with the same seed and split, 95 % t interval.")
        if math.isfinite(table.target):
            whose = " = 90 % of the best row's mean" if options.target is None else ""
            goal = f"Target: accuracy {100 * table.target:.4g} %{whose}"
            lines.append(f"{goal}; (k/n): k of n runs reach it. MB: 10⁶ bytes up, down and between peers.")
    if any(moves_raw_data(row.all_runs) for row in table.rows):
        lines.append(f"{DAGGER} moves raw data to another owner.")
    return lines


def as_terminal(table: Table) -> str:
    """A table as wide as its numbers need, whatever the terminal: a line may wrap there, but no digit is hidden."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    sheet = as_sheet(table)
    grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(sheet.header):
        grid.add_column(Text(name), justify="left" if place < sheet.left else "right", no_wrap=True)
    for r, cells in enumerate(sheet.body):
        grid.add_row(*(Text(cell, style="bold" if (r, c) in sheet.bold else "") for c, cell in enumerate(cells)))
    text = io.StringIO()
    Console(file=text, width=10_000, force_terminal=sys.stdout.isatty(), legacy_windows=False).print(grid)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join([*filter(None, lines), *sheet.caption])


def as_markdown(table: Table) -> str:
    """A GitHub table; the best means are bold."""
    sheet = as_sheet(table)

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
    "−": r"$-$",
    "–": "--",
    "…": r"\dots{}",
    "⁶": "$^6$",
    DAGGER: r"$^\dagger$",
}


def latex_escape(text: str) -> str:
    """Plain text as LaTeX shows it."""
    text = re.sub(r"(?<!\w)-(?=\d)", "−", text)  # a minus, not a hyphen
    return "".join(LATEX.get(char, char) for char in text)


def as_latex(table: Table) -> str:
    """A ``table`` for the booktabs package."""
    sheet = as_sheet(table)
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


FORMATS: Mapping[str, Callable[[Table], str]] = {
    "terminal": as_terminal,
    "csv": as_csv,
    "markdown": as_markdown,
    "latex": as_latex,
}
