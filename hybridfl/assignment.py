"""What is decided about a job before somebody does it: the examples, the number of steps, the keys of the random streams."""

from __future__ import annotations

from dataclasses import replace

from hybridfl.errors import HybridflError
from hybridfl.federation import Federation
from hybridfl.local import Task
from hybridfl.optimizers import LocalWork
from hybridfl.types import SERVER, Job


def task_of(federation: Federation, job: Job, round: int, rounds: int, occurrence: int) -> Task:
    """The job with its examples, its number of steps, its augmentation and its random streams.

    Args:
        round, rounds: when it starts, and how many rounds the run has.
        occurrence: how many jobs of the same participant and tag came before in the round.
    """
    work: LocalWork = job.work or federation.work
    for width in (job.width, *job.inner_widths):
        federation.net_at(width)  # so that the bench has it
    rows = federation.rows(job.participant, job.view, round)
    classes = federation.tasks.labels(job.view.tasks, round) if federation.tasks.mask else None
    examples = rows.shape[0]
    if examples == 0 and job.steps != 0:
        who = name_of(job.participant)
        raise HybridflError(f"{who} has no examples in its '{job.view.split}' part, but the method gives it work.")
    steps = job.steps if job.steps is not None else work.count(examples)
    if job.steps is not None and job.steps > 0:
        work = replace(work, steps=job.steps)
    keys = (round, job.participant, job.tag if job.random_tag is None else job.random_tag, occurrence)
    return Task(job, work, steps, rows, round, rounds, federation.seed, keys, federation.augment, classes)


def name_of(participant: int) -> str:
    return "the server" if participant == SERVER else f"client {participant}"
