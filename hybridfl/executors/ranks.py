"""The processes that ``torchrun`` starts, on one machine or on several: each does its share of every list of tasks.

Every rank plans the same run and drives the same method. A task is computed by one rank, and what came of it is sent to all,
so they all go on from the same numbers. What tasks start from is never sent: every rank has it.
"""

from __future__ import annotations

import os
import traceback
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl.build import PositiveFloat
from hybridfl.errors import ConfigError, HybridflError
from hybridfl.executors import Executor, told
from hybridfl.executors.sequential import Sequential
from hybridfl.group import Group
from hybridfl.local import TRAINING_PASSES, Outcome, Task, Workbench
from hybridfl.parcels import pack, unpack
from hybridfl.rendezvous import TIMEOUT_SECONDS, RankFailed, RanksLost
from hybridfl.types import SERVER, Job
from hybridfl.world import world_of


@dataclass(eq=False)
class Ranks:
    """Shares tasks among the ranks, by a fixed rule; a process by itself does all of them.

    Numbers are those of the inner executor, to the last bit if that is ``sequential``.

    Attributes:
        inner: how a rank does its share.
        backend: of the exchange; ``auto`` is ``nccl`` where every rank has a GPU of its own, else ``gloo``.
        timeout_seconds: without a sign of life from a rank, after which the others give up; not a limit on their work.
        group: this process among the ranks.
    """

    inner: Executor = field(default_factory=Sequential)
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    timeout_seconds: PositiveFloat = TIMEOUT_SECONDS
    group: Group = field(default_factory=Group, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.inner, Ranks):
            raise ConfigError("inner", "got ranks within ranks; nearest valid choice: sequential.")

    @property
    def threads(self) -> int:
        return self.inner.threads

    def device(self, name: str) -> str:
        """The device of this rank, of those on its machine: ``cuda`` and ``auto`` give each a GPU of its own.

        Raises:
            ConfigError: there are not as many.
        """
        world = world_of(os.environ)
        if world is None or not (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
            return name
        if world.local >= (there := torch.cuda.device_count()):
            problem = f"got {name}, but this machine has {there} GPUs and at least {world.local + 1} ranks"
            raise ConfigError("device", f"{problem}; nearest valid choice: cpu, or cuda:0 for all ranks on one GPU.")
        return f"cuda:{world.local}" if world.local else "cuda"

    def backend_for(self, device: torch.device, name: str) -> str:
        """``gloo`` or ``nccl``.

        Args:
            device: of this rank. name: of the device in the config.

        Raises:
            ConfigError: nccl without a GPU for every rank.
        """
        able = device.type == "cuda" and name in ("auto", "cuda") and torch.distributed.is_nccl_available()
        if self.backend == "nccl" and not able:
            problem = "got nccl, which needs a GPU for every rank; nearest valid choice: gloo."
            raise ConfigError("executor.backend", problem)
        return "nccl" if able and self.backend != "gloo" else "gloo"

    def join(self, group: Group, device: torch.device, backend: str) -> None:
        """Become a rank of the group, with the run's tensors on this device."""
        group.start(backend, device, self.timeout_seconds)
        self.group = group

    def run(self, bench: Workbench, tasks: Sequence[Task]) -> list[Outcome]:
        if self.group.size == 1:
            return self.inner.run(bench, tasks)
        group, shares = self.group, shared_out(tasks, self.group.size)
        own = shares[group.rank]
        done = [_light(outcome) for outcome in self._own(bench, [tasks[i] for i in own])]
        parcel = pack(done, group.wire, _known(tasks, own)) if own else None
        outcomes: dict[int, Outcome] = {}
        for share, sent in zip(shares, group.exchange(parcel, _about(tasks)), strict=True):
            if sent is not None:
                for i, outcome in zip(share, unpack(sent, bench.x.device, _known(tasks, share)), strict=True):
                    outcomes[i] = replace(outcome, result=replace(outcome.result, start=tasks[i].job.start))
        return [outcomes[i] for i in range(len(tasks))]

    def told(self) -> list[str]:
        return told(self.inner)

    def about(self, bench: Workbench) -> str:
        about = getattr(self.inner, "about", None)
        within = about(bench) if about else type(self.inner).__name__.lower()
        return f"ranks ({self.group.size}) with {within}"

    def check(self, device: torch.device) -> None:
        if check := getattr(self.inner, "check", None):
            check(device)

    def __enter__(self) -> Ranks:
        if isinstance(self.inner, AbstractContextManager):
            self.inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self.inner, AbstractContextManager):
            self.inner.__exit__(kind, error, trace)

    def _own(self, bench: Workbench, tasks: Sequence[Task]) -> list[Outcome]:
        """This rank's share; one by one if that is how it is done, so that others need not wait for it to hear of them."""
        alone = isinstance(self.inner, Sequential)
        outcomes: list[Outcome] = []
        for part in [[task] for task in tasks] if alone else [tasks] if tasks else []:
            self.group.look()
            try:
                outcomes += self.inner.run(bench, part)
            except (RankFailed, RanksLost):
                raise
            except Exception as error:
                foreseen = isinstance(error, HybridflError)
                reason = str(error) if foreseen else f"{type(error).__name__}: {error}"
                where = f"{self.group.name(self.group.rank)}, {_who(part)} in round {part[0].round + 1}"
                detail = "" if foreseen else f"{where}: {traceback.format_exc()}"
                raise RankFailed(f"{where}: {reason}", detail, getattr(error, "exit_status", 1)) from error
        return outcomes


def shared_out(tasks: Sequence[Task], ranks: int) -> list[list[int]]:
    """Positions of the tasks of every rank: the dearest first, each to whoever has least to do (Graham 1969)."""
    costs = [_cost(task) for task in tasks]
    loads, shares = [0.0] * ranks, [list[int]() for _ in range(ranks)]
    for i in sorted(range(len(tasks)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += costs[i]
        shares[rank].append(i)
    return [sorted(share) for share in shares]


def _cost(task: Task) -> float:
    """Examples that go through the net, by the net's size."""
    examples = task.examples
    trained = TRAINING_PASSES * task.steps * min(task.work.batch_size, examples)
    return (trained + examples * len(task.job.probes)) * task.job.width**2


def _light(outcome: Outcome) -> Outcome:
    """Without the start, which everybody has."""
    return replace(outcome, result=replace(outcome.result, start=None))  # type: ignore[arg-type]


def _known(tasks: Sequence[Task], share: Sequence[int]) -> list[Tensor]:
    """What every rank has of the jobs; a measurement returns it as it was."""
    jobs: list[Job] = [tasks[i].job for i in share]
    return list(P.tensors([[job.start, job.frozen, job.ctx, job.optimizer_state] for job in jobs]))


def _about(tasks: Sequence[Task]) -> str:
    """What ranks must have the same of."""
    jobs = [(task.job.participant, task.job.tag, task.steps, task.examples) for task in tasks]
    return f"{len(tasks)} jobs ({zlib.crc32(repr(jobs).encode()):08x})"


def _who(tasks: Sequence[Task]) -> str:
    people = ["the server" if who == SERVER else f"client {who}" for who in (task.job.participant for task in tasks)]
    return people[0] if len(people) == 1 else f"one of {len(people)} participants from {people[0]} to {people[-1]}"
