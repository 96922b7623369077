"""Executors run a list of tasks; a method never knows which one does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hybridfl.local import Outcome, Task, Workbench


class Executor(Protocol):
    """Runs tasks and returns their outcomes in the same order.

    One that keeps something between rounds, such as processes, is a context manager too, which a run enters and leaves. One
    that suits some devices only has a function ``check(device)`` that raises ConfigError before the first round; one that has
    something to say has ``told()``: sentences for the user about the runs since the last call; one that chooses has
    ``about(bench)``: what it does with the run, for its log.

    Attributes:
        threads: threads of a CPU operation in this process.
    """

    @property
    def threads(self) -> int: ...

    def run(self, bench: Workbench, tasks: Sequence[Task]) -> list[Outcome]: ...


def told(executor: Executor) -> list[str]:
    """What the executor has to say."""
    say = getattr(executor, "told", None)
    return list(say()) if say else []
