"""MLflow, in a local database unless a server is named."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybridfl.runs import flattened
from hybridfl.trackers import Ending, Tracked, needed
from hybridfl.tracking import LAST_NAME, readable

TAG = "hybridfl.run"
"""Of an MLflow run: the name of the run folder. MLflow chooses the ids itself."""
ENDINGS: Mapping[Ending, str] = {"done": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
MOST_METRICS, MOST_PARAMS, LONGEST_PARAM = 1000, 100, 6000
"""Limits of MLflow: of a call, and of a text."""


def _mlflow() -> Any:
    # The package would tell its makers how it is used.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    found = needed("mlflow", "mlflow")
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return found


@dataclass(frozen=True)
class MLflow:
    """An MLflow run for every run, found again by its tag ``hybridfl.run``.

    Attributes:
        uri: of the store, ``sqlite:///FILE`` or a server's address; ``None`` is ``mlflow.db`` in the output folder.
        experiment: its name in MLflow.
    """

    uri: str | None = None
    experiment: str = "hybridfl"

    def check(self) -> None:
        _mlflow()

    def open(self, run: Tracked) -> MLflowRun:
        return MLflowRun(self, run)


class MLflowRun:
    """One run under way."""

    def __init__(self, options: MLflow, run: Tracked) -> None:
        mlflow = _mlflow()
        here = run.output_dir.resolve()
        self.entities = mlflow.entities
        self.client: Any = mlflow.MlflowClient(options.uri or f"sqlite:///{here / 'mlflow.db'}")
        found = self.client.get_experiment_by_name(options.experiment)
        place = None if options.uri else (here / "mlflow").as_uri()
        experiment = found.experiment_id if found else self.client.create_experiment(options.experiment, place)
        before = self.client.search_runs([experiment], f"tags.`{TAG}` = '{run.name}'", max_results=1)
        if before:
            self.id = before[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            self.id = self.client.create_run(experiment, tags={TAG: run.name}, run_name=run.title).info.run_id
            self._describe(run)
        self.last = max((metric.step for metric in self.client.get_metric_history(self.id, LAST_NAME)), default=0)

    def _describe(self, run: Tracked) -> None:
        param = self.entities.Param
        params = [param(readable(key), str(value)[:LONGEST_PARAM]) for key, value in flattened(run.config)]
        for start in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(self.id, params=params[start : start + MOST_PARAMS])

    def log(self, round: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(name, value, now, round) for name, value in values.items()]
        for start in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(self.id, metrics=metrics[start : start + MOST_METRICS])

    def close(self, ending: Ending) -> None:
        self.client.set_terminated(self.id, ENDINGS[ending])
