"""Tasks of a tiny federation for worker processes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import executor_rules
import helpers
import pytest
import torch
from cli_helpers import TINY
from torch import Tensor

from hybridfl.assignment import task_of
from hybridfl.executors.sequential import Sequential
from hybridfl.executors.workers import Workers
from hybridfl.federation import Federation
from hybridfl.local import Outcome, Task
from hybridfl.types import Job

CLIENTS = range(5)
SHARED = ("executor=workers", "executor.number=2")
DEADLY = (*TINY, "ui=none", "device=cpu", "baseline=fedavg", "baseline._target_=executor_rules.Deadly")


@functools.cache
def federation() -> Federation:
    return helpers.plan("baseline=fedavg").federation


def tasks(only: int | None = None, **options: Any) -> list[Task]:
    """One of each client; options of the jobs, ``only`` for one client's."""
    jobs = [Job(k, federation().start, **(options if only in (None, k) else {})) for k in CLIENTS]
    return [task_of(federation(), job, round=3, rounds=9, occurrence=0) for job in jobs]


def harm(kind: str, once: bool = False, only: int | None = 1) -> list[Task]:
    ctx = {"harm": kind, "once": once, "flag": str(Path("flag").absolute())}
    return tasks(only, loss=executor_rules.harmful, ctx=ctx)


@pytest.fixture(scope="module")
def executor() -> Iterator[Workers]:
    with Workers(2, hang_seconds=2.0) as found:
        yield found


def run(executor: Any, given: list[Task]) -> list[Outcome]:
    found: list[Outcome] = executor.run(federation().bench, given)
    return found


def facts(outcomes: list[Outcome]) -> list[Any]:
    return [
        [o.result.participant, o.result.model, o.result.loss, o.result.steps, o.result.examples, dict(o.passes)]
        for o in outcomes
    ]


def agree(executor: Workers, make: Callable[[], list[Task]]) -> bool:
    return helpers.identical(facts(run(executor, make())), facts(run(Sequential(), make())))


def pids(executor: Workers) -> set[int]:
    return {worker.pid for one in executor._pool for worker in one.workers}


def same(a: Tensor, b: Tensor) -> bool:
    form = (a.dtype, a.shape, a.layout, a.requires_grad, type(a)) == (
        b.dtype,
        b.shape,
        b.layout,
        b.requires_grad,
        type(b),
    )
    if a.layout != torch.strided:
        return form and same(a.to_dense(), b.to_dense())
    return form and a.stride() == b.stride() and torch.equal(a, b)


def alive(pid: int) -> bool:
    """Whether it still runs; one that waits to be asked for its status does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
