"""A job of a sweep, wherever it is done: from a composed config to how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from hybridfl.config import Composed
from hybridfl.experiment import RunFailed, run
from hybridfl.plan import DataCache, make_plan
from hybridfl.progress import Progress


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        place: among the jobs of the sweep.
        digest: names the run.
    """

    place: int
    composed: Composed
    digest: str

    @property
    def line(self) -> str:
        return self.composed.line

    @property
    def title(self) -> str:
        return f"{self.composed.method_name} seed={self.composed.config.get('seed')} {self.digest}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: ``done``, ``failed``, or ``pending`` if it was stopped and has to go on later.
        run: the name of the run's folder.
    """

    status: str
    run: str
    error: str = ""


class Queue(Protocol):
    """Where a launcher gets jobs from, and says how they ended."""

    def take(self) -> Job | None:
        """The next job to start; None if there is none, for now or at all."""

    def finish(self, job: Job, outcome: Outcome) -> None:
        """Told once for every job that was taken, unless the sweep is stopped."""

    @property
    def stopped(self) -> bool:
        """Whether the jobs under way are to be stopped, and no further one started."""


class Board(Protocol):
    """What a person sees of a sweep."""

    def progress(self, slot: int) -> Progress:
        """That of the jobs of one worker; workers count from 0."""

    def begin(self, slot: int, job: Job) -> None:
        """A worker begins a job."""

    def end(self, slot: int, job: Job, outcome: Outcome) -> None:
        """It is over."""

    def note(self, text: str) -> None:
        """A line for the user."""


def work(job: Job, cache: DataCache, progress: Progress) -> Outcome:
    """Do a job in this process.

    Raises:
        KeyboardInterrupt: it was stopped; the run's last complete round is in a checkpoint.
    """
    try:
        # The plan is made again rather than kept: a thousand federations would not fit into memory.
        path = run(make_plan(job.composed, cache), progress)
    except Exception as error:
        name = error.path.name if isinstance(error, RunFailed) else job.digest
        return Outcome("failed", name, str(error) or type(error).__name__)
    return Outcome("done", path.name)


def cores_of(composed: Composed) -> int:
    """Cores that a run keeps busy: threads of an operation, times its worker processes if their number is given."""
    executor: Mapping[str, Any] = composed.config["executor"]
    return int(executor.get("threads") or 1) * int(executor.get("number") or 1)


def with_cores(composed: Composed, cores: int) -> Composed:
    """A run that is one of several on the machine: an executor that would take every core takes these.

    Neither the executor nor its options decide a run's numbers, so its digest stays.
    """
    executor = composed.config["executor"]
    if "number" not in executor or executor["number"] is not None:
        return composed
    share = {**executor, "number": max(1, cores // int(executor.get("threads") or 1))}
    return replace(composed, config={**composed.config, "executor": share})
