"""Clients shared out to one-thread processes on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch

from hybridfl.build import PositiveFloat, PositiveInt
from hybridfl.errors import ConfigError
from hybridfl.executors.pool import Pool, template
from hybridfl.local import Outcome, Task, Workbench, run_task
from hybridfl.types import SERVER


@dataclass(frozen=True)
class Workers:
    """Clients' tasks in worker processes, those of the server in this one.

    The numbers are those of ``sequential`` with one thread, to the bit, whatever the number of workers. Models and examples
    are put into shared memory once and not copied for each process. A task whose worker dies or hangs is done again by
    another; if that one fails too, the run stops with its last complete round in a checkpoint.

    Attributes:
        number: of processes; ``None`` takes one for every core that this process may use.
        hang_seconds: a busy worker that has used no processor time for so long counts as hanging; ``None`` waits for ever.
            Where the system cannot tell processor times it does so too. A loop that never ends is work like any other.
    """

    number: PositiveInt | None = None
    hang_seconds: PositiveFloat | None = 300.0
    _pool: list[Pool] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def threads(self) -> int:
        return 1

    def check(self, device: torch.device) -> None:
        """Refuse a device that several processes cannot share.

        Raises:
            ConfigError: it is not the CPU.
        """
        if device.type != "cpu":
            problem = f"got workers, which share the cores of a CPU, with device={device}"
            raise ConfigError("executor", f"{problem}; nearest valid choice: sequential, or device=cpu.")

    def run(self, bench: Workbench, tasks: Sequence[Task]) -> list[Outcome]:
        self.check(bench.x.device)
        ours = [i for i, task in enumerate(tasks) if task.job.participant == SERVER]
        theirs = [i for i, task in enumerate(tasks) if task.job.participant != SERVER]
        outcomes: dict[int, Outcome] = {}

        def meanwhile() -> None:
            outcomes.update((i, run_task(bench, tasks[i])) for i in ours)

        if theirs:
            found = self._workers().run(bench, [tasks[i] for i in theirs], meanwhile)
            outcomes.update(zip(theirs, found, strict=True))
        else:
            meanwhile()
        return [outcomes[i] for i in range(len(tasks))]

    def __enter__(self) -> Workers:
        template()  # which starts while the run prepares
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; a further ``run`` starts others."""
        while self._pool:
            self._pool.pop().close()

    def _workers(self) -> Pool:
        if not self._pool:
            self._pool.append(Pool(self.number or cores(), self.hang_seconds))
        return self._pool[0]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
