"""Finished runs as one pandas table, for notebooks and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridfl.errors import ConfigError, nearest
from hybridfl.finding import find_runs
from hybridfl.runs import ABSENT

TABLES = ("metrics", "method", "clients")

if TYPE_CHECKING:
    from pandas import DataFrame


def frame(*paths: Path | str, keys: Sequence[str] | str = ("method", "seed"), table: str = "metrics") -> DataFrame:
    """Rows of every finished run's ``metrics.csv``, with config values beside them.

    Args:
        paths: run folders, sweep folders or output folders; none is ``outputs``.
        keys: config keys that become columns, such as ``"partitioning.alpha"``; a run without it has a missing value.
        table: ``metrics``, ``method`` or ``clients``: which of the run's tables.

    Returns:
        Columns ``run``, the keys, then those of the table; one row a round and scope.

    Raises:
        ConfigError: a path holds no runs, no run has the key, or there is no such table. HybridflError: none of them is finished.
    """
    import pandas as pd

    if isinstance(keys, str):
        keys = (keys,)
    if table not in TABLES:
        raise ConfigError("table", f"got '{table}'. {nearest(table, TABLES)}")
    runs = find_runs([Path(path) for path in paths] or [Path("outputs")])
    for key in keys:
        if all(run.value(key) is ABSENT for run in runs):
            raise ConfigError("keys", f"no run has '{key}'. {nearest(key, {k for run in runs for k in run.flat})}")
    found = []
    for run in runs:
        rows = pd.read_csv(run.folder / f"{table}.csv")
        values = {key: None if run.value(key) is ABSENT else run.value(key) for key in keys}
        for place, (name, value) in enumerate({"run": run.folder.name, **values}.items()):
            rows.insert(place, name, value)
        found.append(rows)
    return pd.concat(found, ignore_index=True)
