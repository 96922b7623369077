"""One task after the other in this process: the reference every other executor must agree with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridfl.build import PositiveInt
from hybridfl.local import Outcome, Task, Workbench, run_task


@dataclass(frozen=True)
class Sequential:
    """Runs tasks in order.

    Attributes:
        threads: threads of a CPU operation. Results are byte-identical for the same number of threads; small nets are
            fastest with one.
    """

    threads: PositiveInt = 1

    def run(self, bench: Workbench, tasks: Sequence[Task]) -> list[Outcome]:
        return [run_task(bench, task) for task in tasks]
