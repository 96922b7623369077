"""What a sweep will take on disk, before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from hybridfl.params import nbytes, tensors
from hybridfl.plan import Plan
from hybridfl.progress import megabytes

KEPT = 2
"""Checkpoints that a run keeps."""
METRICS_ROW, CLIENTS_ROW, INDEX, FIXED = 130, 60, 6, 8000
"""Bytes of a row, of an index in ``split.json``, and of the other files."""
SCOPES = 4
"""Rows of an evaluation in ``metrics.csv``."""


def run_bytes(plan: Plan) -> int:
    """About what a run's folder will take: the newest checkpoints with the method's state, tables and the split.

    A state that grows, such as an atlas of updates, is counted as a round's updates.
    """
    federation, settings = plan.federation, plan.settings
    model = nbytes([*federation.start.params.values(), *federation.start.buffers.values()])
    state = max(model, nbytes(tensors(plan.method.init(federation))))
    in_flight = model * federation.clients.cohort_of(0)
    evaluations = settings.rounds // settings.evaluate_every + 1
    scored = min(settings.evaluation.sample, federation.clients.number)
    rows = evaluations * (SCOPES * METRICS_ROW + scored * CLIENTS_ROW) + federation.clients.number * CLIENTS_ROW
    split = plan.drawn.split
    owned = [*split.clients_train, *split.clients_val, *split.clients_test, split.server_train, split.server_val]
    return min(KEPT, settings.rounds) * (state + in_flight) + rows + INDEX * sum(map(len, owned)) + FIXED


def disk_notes(folder: Path, runs: int, needed: int) -> tuple[str, str]:
    """What ``runs`` runs will take, and a warning, which is empty where the disk has enough."""
    free = shutil.disk_usage(folder).free
    told = f"{runs} runs to do, about {megabytes(needed)} on disk."
    if needed <= free:
        return told, ""
    way_out = "hybridfl clean --checkpoints frees that of finished runs"
    return (
        told,
        f"warning: the disk of '{folder}' has {megabytes(free)} left, and the runs need {megabytes(needed)}; {way_out}.",
    )
