"""The executor that suits the net and the machine, by a fixed rule."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from hybridfl.build import PositiveInt
from hybridfl.costs import forward_macs
from hybridfl.errors import ConfigError
from hybridfl.executors import Executor
from hybridfl.executors.sequential import Sequential
from hybridfl.executors.stacked import chain
from hybridfl.executors.vectorized import Vectorized
from hybridfl.executors.workers import Workers, cores
from hybridfl.local import TRAINING_PASSES, Outcome, Task, Workbench
from hybridfl.types import SERVER

WORTH_PROCESSES = 10**9
"""Multiply–accumulates of a round's clients, a fraction of a second on one core, from which on worker processes pay."""


class Auto:
    """Lock-step on a GPU and for chains of dense layers; else worker processes, or where they do not pay this process.

    The last two give the same numbers to the bit, so that neither the cores of a machine nor the size of a round decide
    them: only the net and the kind of device do. Nothing is timed.

    Args:
        threads: threads of a CPU operation; with more than one there are no worker processes.
        number: of worker processes; ``None`` is one for every core that this process may use.
        memory_mb: for clients in lock-step, see :class:`~hybridfl.executors.vectorized.Vectorized`.
    """

    def __init__(
        self, threads: PositiveInt = 1, number: PositiveInt | None = None, memory_mb: PositiveInt | None = None
    ) -> None:
        self.threads = threads
        self.number = (number or cores()) if threads == 1 else 1
        self.lock_step, self.workers = Vectorized(threads, memory_mb), Workers(number)
        self.alone = Sequential(threads)
        self._bench: Workbench | None = None
        self._about = ""
        self._said: list[str] = []
        self._lonely = False

    def run(self, bench: Workbench, tasks: Sequence[Task]) -> list[Outcome]:
        if bench is not self._bench:
            self._look_at(bench)
        chosen = self._for(tasks)
        try:
            return chosen.run(bench, tasks)
        except ConfigError as error:
            if chosen is not self.workers:
                raise
            # What cannot be sent to another process is found before any work on it is done.
            self._lonely = True
            self._said.append(f"no worker processes: {error.problem}")
            return self.alone.run(bench, tasks)

    def about(self, bench: Workbench) -> str:
        """Which executor the run has, and why."""
        if bench is not self._bench:
            self._look_at(bench)
        return self._about

    def told(self) -> list[str]:
        said, self._said = [*self._said, *self.lock_step.told()], []
        return said

    def __enter__(self) -> Auto:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.workers.close()

    def _look_at(self, bench: Workbench) -> None:
        """Decide for a run."""
        self._bench, self._lonely = bench, False
        dense, on_cpu = chain(bench.net) is not None, bench.x.device.type == "cpu"
        self._steps_together = dense or not on_cpu
        self._macs = 0 if self._steps_together else forward_macs(bench.net, bench.x[:2])
        if not on_cpu:
            self._about = "vectorized, as it is on a GPU"
        elif dense:
            self._about = "vectorized, as the net is a chain of dense layers"
        else:
            several = f"workers ({self.number}) in rounds that are long enough" if self.number > 1 else "sequential"
            self._about = f"{several}, as the net is not a chain of dense layers"

    def _for(self, tasks: Sequence[Task]) -> Executor:
        if self._steps_together:
            return self.lock_step
        clients = [task for task in tasks if task.job.participant != SERVER]
        work = sum(TRAINING_PASSES * task.steps * min(task.work.batch_size, task.examples) for task in clients)
        many = min(len(clients), self.number) > 1 and work * self._macs >= WORTH_PROCESSES
        return self.workers if many and not self._lonely else self.alone
