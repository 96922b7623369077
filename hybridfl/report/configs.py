"""What the runs are: the settings that all share, those in which they differ, and digests."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from hybridfl.keys import NOT_RESULTS, label, token
from hybridfl.report.rows import Shown
from hybridfl.report.splits import Splits
from hybridfl.runs import ABSENT, Run

MACHINE = ("version", "torch", "device", "executor", "threads")
"""Facts of ``status.json`` about what computed a run."""


def configs(of: Shown, splits: Splits) -> dict[str, Any]:
    """Shared settings once; the others of each row as pairs of places in the lists of keys and values.

    What is not part of a run's identity, such as folders of this machine, is not told.
    """
    keys = [
        key
        for key in dict.fromkeys(key for run in of.runs for key in run.flat)
        if key.partition(".")[0] not in NOT_RESULTS
    ]
    shared = {key: of.runs[0].value(key) for key in keys if len({token(run.value(key)) for run in of.runs}) == 1}
    own = [key for key in keys if key not in shared]
    values: dict[str, int] = {}
    differing = []
    for row in of.rows:
        told = [(place, _told(key, row.all_runs)) for place, key in enumerate(own)]
        differing.append([[place, values.setdefault(text, len(values))] for place, text in told if text])
    return {
        "shared": [[key, label(value)] for key, value in shared.items()],
        "keys": own,
        "values": list(values),
        "rows": differing,
        "runs": [_run(run, splits) for run in of.runs],
    }


def _told(key: str, runs: Sequence[Run]) -> str:
    """The value of a key in a row, those of its seeds where they differ; empty if it has none."""
    return ", ".join(dict.fromkeys(label(run.value(key)) for run in runs if run.value(key) is not ABSENT))


def _run(run: Run, splits: Splits) -> dict[str, Any]:
    return {
        "name": run.folder.name,
        "overrides": _overrides(str(run.config.get("overrides") or "")),
        "split": str(run.status.get("split") or ""),
        "data": splits.of(run).get("data") or "",
        "machine": " ".join(f"{name} {run.status[name]}" for name in MACHINE if name in run.status),
    }


def _overrides(typed: str) -> str:
    """What was typed, less what only says where files are and what is shown."""
    try:
        parts = shlex.split(typed)
    except ValueError:
        return typed
    kept = [part for part in parts if part.partition("=")[0] not in HIDDEN]
    return shlex.join(kept) if len(kept) < len(parts) else typed


HIDDEN = NOT_RESULTS - {"baseline", "merging", "experiment", "seed"}
