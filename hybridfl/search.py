"""``hydra/sweeper=optuna``: a sweep whose jobs are chosen one after the other, from how those before have done.

The search is a study of Optuna's, in a file in the sweep's folder. Its trials are runs like all others. A killed search goes on
with the trials that were under way, from their checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import warnings
from collections import deque
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from hybridfl.config import Composer
from hybridfl.engine import Unsuitable
from hybridfl.errors import ConfigError, HybridflError, nearest
from hybridfl.experiment import METRICS
from hybridfl.plan import DataCache, Plan, Settings, make_plan, settings_of
from hybridfl.rng import torch_seed
from hybridfl.runs import read_run
from hybridfl.search_space import Space, space_of
from hybridfl.statistics import WINDOW
from hybridfl.store import readable_errors
from hybridfl.sweep_board import make_board
from hybridfl.sweep_entry import Entry, Finished, checked
from hybridfl.sweep_jobs import Board, Job, Outcome
from hybridfl.sweep_line import SweepLine
from hybridfl.sweep_table import Row, read_rows, write_line, write_rows
from hybridfl.sweep_work import workforce
from hybridfl.sweepers import Optuna

SCOPES = ("validation", "global", "clients", "served", "held_out")
STARTUP = 10
"""Trials drawn at random before any is chosen."""


def search(line: SweepLine, sweeper: Optuna, config_dir: Path | None) -> Finished:
    """All trials of a search.

    Raises:
        ConfigError: the space, the metric or the config is wrong; nothing has been started.
        HybridflError: another process does this search.
        KeyboardInterrupt: stopped; the same line goes on where it was.
    """
    metric = Metric.of(sweeper)
    cache = DataCache()
    with Composer(config_dir) as composer:
        space = space_of(line.overrides)
        plan = _first_plan(composer, space, cache)
        metric.check(plan)
        settings = plan.settings
        folder = Path(settings.output_dir) / "sweeps" / _digest(space, metric, sweeper)
        with readable_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise HybridflError(f"Another process does this search, in {folder}.") from None
        try:
            write_line(folder, line.typed, config_dir)
            return _searched(line, sweeper, space, metric, composer, cache, plan, folder)
        finally:
            lock.release()


def _searched(
    line: SweepLine,
    sweeper: Optuna,
    space: Space,
    metric: Metric,
    composer: Composer,
    cache: DataCache,
    plan: Plan,
    folder: Path,
) -> Finished:
    # As many stand-ins as there may be jobs at a time: which they are is not known yet.
    force = workforce(line.launcher, [plan.composed] * sweeper.n_trials, plan.settings, folder, cache)
    study = _study(folder, metric)
    over = sum(trial.state.is_finished() for trial in study.trials)
    with make_board(plan.settings.ui, max(0, sweeper.n_trials - over), force.number) as board:
        for note in force.notes:
            board.note(note)
        trials = Trials(study, space, metric, sweeper, composer, cache, plan.settings, folder, board)
        board.say(f"{over} of the search's {sweeper.n_trials} trials are finished already.")
        force.work(trials, board)
    left = max(0, sweeper.n_trials - trials.told)
    failed = sum(row.status == "failed" for row in trials.rows.values())
    return Finished(folder, failed, left, tuple(_best(study, space, metric, composer.extra)))


class Metric:
    """What is to be as good as it can: a column of ``metrics.csv`` in one scope, the mean of the last ten evaluations."""

    def __init__(self, scope: str, column: str, direction: Literal["maximize", "minimize"]) -> None:
        self.scope, self.column, self.direction = scope, column, direction

    @classmethod
    def of(cls, sweeper: Optuna) -> Metric:
        """The one that is typed, or the accuracy on validation examples.

        Raises:
            ConfigError: an unknown scope or column.
        """
        scope, _, column = (sweeper.metric or "validation").partition(".")
        column = column or "accuracy"
        if scope.partition("/")[0] not in SCOPES:
            raise ConfigError("hydra.sweeper.metric", f"got '{sweeper.metric}'. {nearest(scope, SCOPES)}")
        columns = [name for name in METRICS if name not in ("round", "scope")]
        if column not in columns:
            raise ConfigError("hydra.sweeper.metric", f"got '{sweeper.metric}'. {nearest(column, columns)}")
        better_high = column in ("accuracy", "worst10")
        direction = sweeper.direction or ("maximize" if better_high else "minimize")
        return cls(scope, column, direction)

    def __str__(self) -> str:
        return f"{self.scope} {self.column}"

    def check(self, plan: Plan) -> None:
        """Refuse a search that would have nothing to choose by.

        Raises:
            ConfigError: nobody keeps validation examples, and no other metric is typed.
        """
        split, provides = plan.drawn.split, plan.drawn.provides
        server = len(split.server_val) > 0 and "server_labels" in provides
        if self.scope.startswith("validation") and not server and not any(len(view) for view in split.clients_val):
            problem = "got no validation examples, which a search chooses by; try server_data.validation=0.2"
            raise ConfigError("server_data.validation", f"{problem}, or name another: hydra.sweeper.metric=global.")

    def value(self, folder: Path) -> float | None:
        """That of a finished run; None if it has none."""
        curve = read_run(folder).curves.get(self.scope)
        found = [value for value in (curve.column(self.column)[-WINDOW:] if curve else []) if value == value]
        return sum(found) / len(found) if found else None


class Trials:
    """Where the launcher gets trials from; see :class:`~hybridfl.sweep_jobs.Queue`.

    Attributes:
        rows: of the sweep's table, by the line of the run.
    """

    def __init__(
        self,
        study: Any,
        space: Space,
        metric: Metric,
        sweeper: Optuna,
        composer: Composer,
        cache: DataCache,
        settings: Settings,
        folder: Path,
        board: Board,
    ) -> None:
        from optuna.trial import TrialState

        self._study, self._space, self._metric, self._sweeper = study, space, metric, sweeper
        self._composer, self._cache, self._board = composer, cache, board
        self._folder, self._runs = folder, Path(settings.output_dir) / "runs"
        self._fail_fast = settings.fail_fast
        # Trials of a process that was killed go on.
        self._stale = deque(trial for trial in study.trials if trial.state == TrialState.RUNNING)
        self.rows = {row.overrides: row for row in read_rows(folder)} if (folder / "runs.csv").is_file() else {}
        self.stopped = False
        self._write()

    @property
    def told(self) -> int:
        """Trials that are over."""
        return sum(trial.state.is_finished() for trial in self._study.trials)

    def take(self) -> Job | None:
        while (asked := self._asked()) is not None:
            number, params = asked
            line = self._space.line(params)
            try:
                entry = checked(self._composer.compose(line), self._cache)
            except ConfigError as error:
                self._tell(number, Row("", "failed", "", " ".join(line), str(error)), None)
                self._board.note(f"failed: {' '.join(line)}: {error}")
                continue
            if entry.status == "pending":
                self.rows[entry.composed.line] = entry.row
                self._write()
                return Job(number, entry.composed, entry.digest)
            self._over(number, entry)
        return None

    def finish(self, job: Job, outcome: Outcome) -> None:
        entry = Entry(job.composed, job.digest, run=outcome.run, status=outcome.status, error=outcome.error)
        if outcome.status != "pending":  # a stopped one goes on when the line is typed again
            self._over(job.place, entry)
        self.stopped |= outcome.status == "failed" and self._fail_fast

    def _asked(self) -> tuple[int, dict[str, Any]] | None:
        """Number and values of the next trial."""
        if self._stale:
            trial = self._stale.popleft()
            return trial.number, trial.params
        number = len(self._study.trials)
        if number >= self._sweeper.n_trials:
            return None
        # Anew for each, so that a search that was stopped goes on as if it had not been.
        self._study.sampler = _sampler(self._sweeper.seed, number)
        trial = self._study.ask(self._space.distributions)
        return trial.number, trial.params

    def _over(self, number: int, entry: Entry) -> None:
        value = self._metric.value(self._runs / entry.run) if entry.status == "done" else None
        if entry.status == "done" and value is None:
            self._board.note(f"trial {number}: the run has no {self._metric}.")
        self._tell(number, entry.row, value)

    def _tell(self, number: int, row: Row, value: float | None) -> None:
        from optuna.trial import TrialState

        self.rows[row.overrides] = row
        self._write()
        if value is None:
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, value)

    def _write(self) -> None:
        write_rows(self._folder, self.rows.values())


def _first_plan(composer: Composer, space: Space, cache: DataCache) -> Plan:
    """The plan of one end of the space, after the values at both ends of every dimension were checked.

    Raises:
        ConfigError: some value is refused.
    """
    low, high = ({key: dimension.ends[end] for key, dimension in space.dimensions.items()} for end in (0, 1))
    for key, value in high.items():
        settings_of(composer.compose(space.line({**low, key: value})))
    try:
        return make_plan(composer.compose(space.line(low)), cache)
    except Unsuitable:  # one of the methods that are searched over, maybe
        return make_plan(composer.compose(space.line(high)), cache)


def _study(folder: Path, metric: Metric) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{(folder / 'study.db').resolve()}"
    return optuna.create_study(storage=storage, study_name="hybridfl", direction=metric.direction, load_if_exists=True)


def _sampler(seed: int, number: int) -> Any:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Trials under way count as bad ones, so that the next does not try the same.
        return optuna.samplers.TPESampler(
            seed=torch_seed(seed, "trial", number) % 2**32, n_startup_trials=STARTUP, constant_liar=True
        )


def _best(study: Any, space: Space, metric: Metric, config_dir: Path | None) -> list[str]:
    try:
        best = study.best_trial
    except ValueError:  # none is complete
        return ["no trial has finished"]
    own = ["--config-dir", str(config_dir)] if config_dir else []
    value = f"{100 * best.value:.1f} %" if metric.column in ("accuracy", "worst10") else f"{best.value:.6g}"
    return [
        f"best: trial {best.number} of {len(study.trials)}, {metric} {value}:",
        f"  {shlex.join(['hybridfl', 'train', *own, *space.line(best.params)])}",
    ]


def _digest(space: Space, metric: Metric, sweeper: Optuna) -> str:
    """Of the search, whatever number of trials."""
    dimensions = {key: str(dimension.distribution) for key, dimension in space.dimensions.items()}
    told = [space.fixed, dimensions, str(metric), metric.direction, sweeper.seed]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
