"""From a launcher to those who do a sweep's jobs: how many at a time, with how many cores each, on which devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridfl.config import Composed
from hybridfl.launchers import Joblib, Launcher, SubmititLocal, SubmititSlurm
from hybridfl.plan import DataCache, Settings
from hybridfl.sweep_jobs import Board, Queue, cores_of, work


@dataclass(frozen=True)
class Workforce:
    """Those who do the jobs.

    Attributes:
        number: of jobs at a time.
        work: does all of them.
        notes: what the user should know before.
    """

    number: int
    work: Callable[[Queue, Board], None]
    notes: tuple[str, ...] = ()


def workforce(
    launcher: Launcher, todo: Sequence[Composed], settings: Settings, folder: Path, cache: DataCache
) -> Workforce:
    """Cores are shared without handing out any twice: jobs at a time × cores of a job ≤ cores.

    Args:
        todo: the runs that are not finished.
        folder: of the sweep.
        cache: data sets that this process has read.
    """
    if not todo:
        return Workforce(1, lambda jobs, board: None)
    each = max(map(cores_of, todo))
    if isinstance(launcher, SubmititLocal):
        from hybridfl.sweep_submitit import Submitted

        if isinstance(launcher, SubmititSlurm):
            number = launcher.array_parallelism
        else:
            number = max(1, _cores() // (launcher.cpus_per_task or each))
        number = max(1, min(number, len(todo)))
        submitted = Submitted(launcher, folder / "submitit", number, len(_gpus()))
        return Workforce(number, submitted.work)
    if isinstance(launcher, Joblib):
        from hybridfl.sweep_pool import Pool

        cores = _cores()
        # As joblib reads negative numbers.
        free = cores if launcher.n_jobs > 0 else max(1, cores + 1 + launcher.n_jobs)
        fit = max(1, free // each)
        number = fit if launcher.n_jobs < 0 else min(launcher.n_jobs, fit)
        notes = []
        if launcher.n_jobs > fit:
            why = f"{cores} cores" + (f", and a run takes {each}" if each > 1 else "")
            notes.append(f"hydra.launcher.n_jobs={launcher.n_jobs}: {number} at a time, as there are {why}.")
        number = max(1, min(number, len(todo)))
        devices = _gpus() if settings.device in ("auto", "cuda") else []
        pool = Pool(number, max(each, free // number), devices)
        return Workforce(number, pool.work, tuple(notes))
    return Workforce(1, lambda jobs, board: in_order(jobs, board, cache))


def in_order(jobs: Queue, board: Board, cache: DataCache) -> None:
    """One job after the other in this process.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    while not jobs.stopped and (job := jobs.take()) is not None:
        board.begin(0, job)
        outcome = work(job, cache, board.progress(0))
        jobs.finish(job, outcome)  # stored first: what was said must hold after an interrupt
        board.end(0, job, outcome)


def _cores() -> int:
    """Cores that this process may use: joblib knows of limits of containers and batch systems too."""
    from joblib import cpu_count

    return int(cpu_count())


def _gpus() -> list[str]:
    """The names of this machine's GPUs as in CUDA_VISIBLE_DEVICES."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = torch.cuda.device_count()
    names = visible.split(",") if visible else [str(index) for index in range(number)]
    return names[:number]
