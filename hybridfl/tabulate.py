"""From runs to rows and columns of numbers: which runs share a cell, and what is read of each.

Nothing is averaged but seeds. Which keys make rows is decided in ``keys.py``, the numbers are made in ``statistics.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hybridfl import significance, statistics
from hybridfl.errors import ConfigError, HybridflError, nearest
from hybridfl.forgetting import forgetting, forgetting_learned
from hybridfl.keys import block_keys, check_key, label, rows_of, token
from hybridfl.runs import ABSENT, Curve, Run, to_stderr
from hybridfl.statistics import MISSING, WINDOW, Observation, Summary, summarise

AT = {
    "last": "last evaluation",
    "mean10": f"mean of the last {WINDOW} evaluations",
    "best": "evaluation with the best validation accuracy",
}
"""In a stream of tasks all of them are about evaluations during the last task: before it, fewer classes were told apart."""
AUTO = "auto"
SCOPES = ("global", "clients", "served")
"""The first that there is, is shown."""
OF_STREAMS = {"forgetting": forgetting, "forgetting_learned": forgetting_learned}
"""Metrics of a stream's matrix of accuracies, which no single row of ``metrics.csv`` has."""
FRACTIONS = ("accuracy", "worst10", "spread", *OF_STREAMS)
HIGHER_IS_BETTER = ("accuracy", "worst10", "examples")
OTHERS = (
    *(("global", "accuracy"), ("global/tasks", "accuracy"), ("global", "forgetting")),
    *(("clients", "accuracy"), ("clients", "worst10")),
    *(("served", "accuracy"), ("served/tasks", "accuracy"), ("served", "forgetting")),
)
DAGGER = "†"
CSV_NUMBERS = (
    *("seeds", "mean", "sd", "difference", "low", "high"),
    *("rounds_to_target", "reached", "bytes_to_target", "bytes", "runs", "pairs"),
)
CSV_CONTEXT = ("target", "metric", "scope", "at", "moves_raw_data")


SETUP = ("dataset", "clients", "model", "start", "start_steps", "rounds", "dtype")
"""Groups and keys that make start, schedule and data; runs that differ in them are no pair."""


@dataclass(frozen=True)
class Options:
    """What the table shows; the fields are the options of the command line. ``scope`` and ``at`` may be ``auto`` until there are runs."""

    metric: str = "accuracy"
    scope: str = AUTO
    at: str = AUTO
    rows: str = "method"
    cols: str | None = None
    format: str = "terminal"
    reference: str | None = None
    target: float | None = None
    where: Sequence[str] = ()
    pivot: Sequence[str] = ()
    interval: str | None = None
    correct: str | None = None
    ranks: bool = False
    plot: Path | None = None
    budget: Sequence[str] = ()
    pareto: str | None = None

    @property
    def tested(self) -> bool:
        """Whether p values stand beside the differences."""
        return self.interval is not None or self.correct is not None

    @property
    def columns(self) -> list[str]:
        """The config keys that make columns."""
        return [self.cols] if self.cols else listed(*self.pivot)


Column = tuple[str, ...]
"""A column by the tokens of its values, one for each of the keys that make columns; ``()`` where none does."""


def listed(*given: str) -> list[str]:
    """The keys of options that take several, parted by commas."""
    keys = [part.strip() for text in given for part in text.split(",") if part.strip()]
    return list(dict.fromkeys("method" if key == "method.name" else key for key in keys))


@dataclass
class Row:
    """One row: the values of its keys, its runs by column, and what the statistics say about them."""

    values: tuple[Any, ...]
    runs: dict[Column, list[Run]]
    observations: dict[Column, list[Observation]] = field(default_factory=dict)
    summaries: dict[Column, Summary] = field(default_factory=dict)
    reference: Row | None = None

    @property
    def all_runs(self) -> list[Run]:
        """The runs of all columns."""
        return [run for cell in self.runs.values() for run in cell]


@dataclass(frozen=True)
class Table:
    """All numbers, before any format.

    Attributes:
        cols: the columns, with the values they stand for.
        stream: whether a run has several tasks.
    """

    options: Options
    keys: list[str]
    cols: dict[Column, tuple[Any, ...]]
    rows: list[Row]
    target: float
    reference: str
    stream: bool


def tabulate(runs: Sequence[Run], options: Options, warn: Callable[[str], None] = to_stderr) -> Table:
    """Runs → rows and columns of numbers.

    Raises:
        ConfigError: unknown key, metric, scope or reference; ``--at best`` without validation rows.
    """
    options = replace(options, scope=scope_of(runs, options.scope))
    stream = any(len(run.tasks) > 1 for run in runs)
    if options.at == AUTO:
        options = replace(options, at="last" if stream or options.budget else "mean10")
    asked = listed(options.rows) or ["method"]
    if options.ranks and not options.columns:
        if not (blocks := block_keys(runs, asked)):
            problem = "the runs differ in no setting beside the rows that ranks could be over"
            raise ConfigError("--ranks", f"{problem}; nearest valid choice: runs of several settings, or --pivot KEY.")
        options = replace(options, pivot=blocks)
    columns = options.columns
    for option, given in (("--rows", asked), ("--cols" if options.cols else "--pivot", columns)):
        for key in given:
            check_key(option, key, runs)
    if options.pivot and options.cols:
        raise ConfigError("--cols", f"got {options.cols} beside --pivot; nearest valid choice: --pivot {options.cols}.")
    if options.pivot and (both := [key for key in columns if key in asked]):
        raise ConfigError("--pivot", f"got {both[0]}, which makes the rows; name another, or other rows with --rows.")
    check_columns(runs, options)
    keys = rows_of(runs, asked, columns, warn)
    rows = group(runs, keys, columns, warn)
    for row in rows:
        row.observations = {col: [observe(run, options) for run in cell] for col, cell in row.runs.items()}
    # An upper bound that moves raw data is no rival: it must not set the others' target, unless there is nothing else.
    rivals = [row for row in rows if not moves_raw_data(row.all_runs)] or rows
    cells = [cell for row in rivals for cell in row.observations.values()]
    target = statistics.default_target(cells) if options.target is None else options.target
    reference = pick_references(rows, keys, options.reference)
    for row in rows:
        other = row.reference.observations if row.reference and row.reference is not row else {}
        row.summaries = {col: summarise(cell, other.get(col, ()), target) for col, cell in row.observations.items()}
    if options.tested:
        decide_differences(rows, options)
    warn_of_gaps(rows, options, warn)
    values = sorted((values_of(run, columns) for run in runs), key=lambda values: list(map(_natural, values)))
    cols = {tuple(map(token, found)): found for found in values}
    return Table(options, keys, cols, rows, target, reference, stream)


def decide_differences(rows: Sequence[Row], options: Options) -> None:
    """Intervals and p values of all differences to the reference, which are one family."""
    cells = [(row, col) for row in rows for col in row.summaries]
    samples = []
    for row, col in cells:
        other = row.reference.observations.get(col, []) if row.reference and row.reference is not row else []
        samples.append(statistics.paired_differences(row.observations[col], other))
    found = significance.paired_tests(samples, options.interval or "t", options.correct or "none")
    for (row, col), test in zip(cells, found, strict=True):
        row.summaries[col] = replace(row.summaries[col], p=test.p, low=test.low, high=test.high)


def scope_of(runs: Sequence[Run], asked: str = AUTO) -> str:
    """The scope that is meant: where no run has a global model, as between peers, what its clients run."""
    found = {scope for run in runs for scope in run.curves}
    return (
        asked if asked != AUTO else next((scope for scope in SCOPES if scope in found), min(found, default=SCOPES[0]))
    )


def check_columns(runs: Sequence[Run], options: Options) -> None:
    """Metric and scope exist, and validation rows where they are needed."""
    scopes = {scope for run in runs for scope in run.curves}
    if not scopes:
        raise HybridflError("None of the finished runs has an evaluation in its metrics.csv.")
    if options.scope not in scopes:
        raise ConfigError("--scope", f"no run has the scope '{options.scope}'. {nearest(options.scope, scopes)}")
    metrics = {name for run in runs for curve in run.curves.values() for name in curve.header} - {"round", "scope"}
    if any(run.matrix(options.scope) for run in runs):
        metrics |= OF_STREAMS.keys()
    if options.metric not in metrics:
        raise ConfigError("--metric", f"no run has the metric '{options.metric}'. {nearest(options.metric, metrics)}")
    if options.metric in OF_STREAMS and options.at != "last":
        problem = f"got {options.at}: {options.metric} is defined after the last task"
        raise ConfigError("--at", f"{problem}; nearest valid value: last.")
    if options.at == "best" and "validation" not in scopes:
        raise ConfigError(
            "--at",
            "'best' is the evaluation with the best validation accuracy, and these runs have no validation rows. "
            "server_data.validation=0.2 adds them to new runs; 'last' and 'mean10' need none.",
        )


def group(runs: Sequence[Run], keys: Sequence[str], cols: Sequence[str], warn: Callable[[str], None]) -> list[Row]:
    """The rows with their runs, one run a seed: in the order of a sweep's jobs, or else by name."""
    rows: dict[tuple[str, ...], Row] = {}
    repeated = 0
    for run in runs:
        values = values_of(run, keys)
        row = rows.setdefault(tuple(map(token, values)), Row(values, {}))
        row.runs.setdefault(tuple(map(token, values_of(run, cols))), []).append(run)
    for row in rows.values():
        for col, cell in row.runs.items():
            row.runs[col] = one_a_seed(cell)
            repeated += len(cell) - len(row.runs[col])
    if repeated:
        warn(f"{_runs(repeated)} left out: same config and seed as a newer one, but other data, code or version.")

    def place(row: Row) -> tuple[Any, ...]:
        jobs = [run.job for run in row.all_runs if run.job is not None]
        return (min(jobs, default=math.inf), *map(_natural, row.values))

    return sorted(rows.values(), key=place)


def values_of(run: Run, keys: Sequence[str]) -> tuple[Any, ...]:
    """What a run has for each key."""
    return tuple(run.value(key) for key in keys)


def one_a_seed(runs: Iterable[Run]) -> list[Run]:
    """The newest run of each seed."""
    return list({token(run.value("seed")): run for run in sorted(runs, key=_age)}.values())


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
    if metric in OF_STREAMS:
        matrix = run.matrix(scope)
        return OF_STREAMS[metric](matrix) if len(matrix) == len(run.tasks) else MISSING
    curve = run.curves.get(scope)
    if curve is None:
        return MISSING
    window = 1 if at == "last" else statistics.WINDOW
    if at != "best" and len(run.tasks) == 1:
        return statistics.tail_mean(curve.column(metric, window), window)
    values = in_last_task(run, curve, metric)
    if at == "best":
        personal = scope.partition("/")[0] in ("clients", "served")
        validation = (run.curves.get("validation/clients") if personal else None) or run.curves.get("validation")
        told = in_last_task(run, validation, "accuracy") if validation else {}
        best = statistics.best_round(list(told), list(told.values()))
        return MISSING if best is None else values.get(best, MISSING)
    return statistics.tail_mean(list(values.values()), window)


def in_last_task(run: Run, curve: Curve, metric: str) -> dict[int, float]:
    """Round → number, of the evaluations during the last task; of all where there is one task."""
    last = len(run.tasks) - 1
    if not last:
        return dict(zip(curve.rounds, curve.column(metric), strict=True))
    columns = zip(curve.rounds, curve.column(metric), strict=True)
    return {round: value for round, value in columns if run.tasks.at(round - 1) == last}


def observe(run: Run, options: Options, apart: Iterable[str] = ()) -> Observation:
    """What the statistics need to know of a run.

    Args:
        apart: keys and groups in which two runs may differ and still be a pair, as they are what is compared.
    """
    curve = run.curves.get(options.scope)
    split, seed = run.status.get("split"), token(run.value("seed"))
    points = zip(curve.rounds, curve.column("accuracy"), curve.bytes, strict=True) if curve else ()
    counting = in_last_task(run, curve, "accuracy") if curve else {}
    return Observation(
        seed=seed,
        pair=None if split is None else (seed, split, _setup(run, frozenset(apart))),
        value=read_at(run, options.scope, options.metric, options.at),
        accuracy=read_at(run, options.scope, "accuracy", options.at),
        curve=[point for point in points if point[0] in counting],
        bytes=run.bytes,
    )


def _setup(run: Run, apart: Collection[str]) -> tuple[tuple[str, str], ...]:
    """What two runs must share, beside seed and split, to differ by their methods alone."""
    return tuple(
        (key, token(value))
        for key, value in sorted(run.flat.items())
        if (group := key.partition(".")[0]) in SETUP and not {key, group} & {*apart}
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
