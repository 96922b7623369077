"""Who takes part: executors of the engine at so many threads, references in plain torch, programs of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmark.workloads import Workload

KNOBS = ("threads", "number")
"""Options of an executor that say how many cores it uses."""


@dataclass(frozen=True)
class Contender:
    """Attributes:
    kind: an executor, a reference, or the dotted path of a class of the user's.
    threads: how many cores it may use; of an executor with worker processes, their number.
    overrides: of an executor.
    """

    kind: str
    threads: int
    overrides: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.kind} {self.threads}"

    @property
    def processes(self) -> bool:
        """Whether it has processes of one thread each instead of threads."""
        return any(text.startswith("executor.number=") for text in self.overrides)


def contender(executor: str, threads: int) -> Contender:
    """An executor with so many threads, or so many processes, whatever it has."""
    import yaml

    from hybridfl.config import choices

    node = yaml.safe_load(choices("executor")[executor].read_text(encoding="utf-8"))
    knobs = [f"executor.{knob}={threads}" for knob in KNOBS if knob in node]
    return Contender(executor, threads, (f"executor={executor}", *knobs))


def references(workload: Workload, threads: Sequence[int]) -> list[Contender]:
    if workload.net != "mlp":
        return [Contender(kind, 1) for kind in ("plain", "central", "channels_last")]
    return [Contender(kind, t) for t in threads for kind in ("plain", "central", "by_hand")]


class Runner(Protocol):
    """What does a contender's rounds, in a process of its own."""

    def round(self, number: int) -> None: ...


class Hybridfl:
    """The engine's rounds without evaluation."""

    def __init__(self, line: Sequence[str]) -> None:
        from hybridfl.config import Composer
        from hybridfl.plan import make_plan

        with Composer() as composer:
            composed = composer.compose(line)
        self.plan = make_plan(composed)
        torch.set_num_threads(self.plan.settings.executor.threads)
        self.engine = self.plan.engine()
        self.snapshot = self.engine.begin()

    def round(self, number: int) -> None:
        assert self.snapshot.round == number
        self.snapshot, _ = self.engine.step(self.snapshot)


def write_given(runner: Hybridfl, rounds: int, file: Path) -> None:
    """What the references need to train the same clients from the same weights."""
    federation, schedule = runner.plan.federation, runner.engine.schedule
    shares = [federation.owned(client) for client in range(federation.clients.number)]
    starts: dict[str, Any] = {f"start {i}": tensor.numpy() for i, tensor in enumerate(federation.start.params.values())}
    np.savez(
        file,
        rows=np.concatenate(shares),
        sizes=np.array([len(share) for share in shares]),
        cohorts=np.array([[arrival.client for arrival in schedule.born(r)] for r in range(rounds)]),
        **starts,
    )
