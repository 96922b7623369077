"""Clients in lock-step: one batched step of a whole group of clients instead of a step of each.

Their tensors are stacked along a first axis and one step is made of all of them. Clients with the same kind of job form a
group, sorted by their steps, so that those who are done are the end of the stack and nothing is computed for them any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from hybridfl import params as P
from hybridfl.build import PositiveInt
from hybridfl.executors.lock_step import NotInLockStep, by_hand, is_plain, lock_step
from hybridfl.local import Outcome, Task, Workbench, run_task
from hybridfl.params import Params

MIB = 2**20
MEMORY_MB = {"cpu": 64, "gpu": 2048}
HELD = 4
"""Of every trained number: itself, its gradient, and up to two of the optimiser."""


@dataclass(frozen=True)
class Vectorized:
    """Runs tasks of the same kind in lock-step, others one after the other.

    Numbers agree with those of the sequential executor up to rounding. Chains of dense layers on the usual loss go through
    batched products that are written out, a single one too; convolutions, GroupNorm and pooling before dense layers, on a
    CPU and the usual loss, run with all clients' channels side by side; all else runs under ``torch.func.vmap``. Which of
    them it is depends on the net, the job and the device; nothing is timed. One after the other are: measurements, jobs that
    continue with or return an optimiser's state, nets with dropout, and rules that ``vmap`` cannot run.

    Attributes:
        threads: threads of a CPU operation.
        memory_mb: clients whose tensors take more than this, in MiB, are done in several groups; ``None`` is 64 on a CPU,
            where groups near the size of its cache are the fastest, and 2048 on a GPU.
    """

    threads: PositiveInt = 1
    memory_mb: PositiveInt | None = None
    _told: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def run(self, bench: Workbench, tasks: Sequence[Task]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        groups, alone = _groups(bench, tasks)
        for group in groups:
            # Many steps first: at any step those who still work are the beginning of the stack.
            ordered = sorted(group, key=lambda i: -tasks[i].steps)
            for part in _parts(ordered, self._together(bench, tasks[ordered[0]])):
                outcomes |= zip(part, self._done(bench, [tasks[i] for i in part]), strict=True)
        outcomes |= {i: run_task(bench, tasks[i]) for i in alone}
        return [outcomes[i] for i in range(len(tasks))]

    def told(self) -> list[str]:
        """What the user should know of the runs since the last call."""
        said, self._told[:] = list(self._told), []
        return said

    def _done(self, bench: Workbench, tasks: Sequence[Task]) -> list[Outcome]:
        if len(tasks) == 1 and by_hand(bench, tasks[0]) is None:
            return [run_task(bench, tasks[0])]
        try:
            with _streams_put_back(tasks):
                return lock_step(bench, tasks)
        except NotInLockStep:
            return [run_task(bench, task) for task in tasks]
        except (RuntimeError, MemoryError) as error:
            if _of_vmap(error):
                return [run_task(bench, task) for task in tasks]
            if not _of_memory(error) or len(tasks) == 1:
                raise
        half = math.ceil(len(tasks) / 2)
        self._told.append(f"no memory for {len(tasks)} clients at once; trying {half}; see executor.memory_mb")
        if bench.x.device.type == "cuda":
            torch.cuda.empty_cache()
        return [outcome for part in _parts(tasks, half) for outcome in self._done(bench, part)]

    def _together(self, bench: Workbench, task: Task) -> int:
        """How many clients with this kind of job fit into the memory."""
        trained = sum(tensor.numel() for tensor in task.job.start.params.values())
        held = 1 if by_hand(bench, task) and is_plain(task) else HELD
        batch = min(task.work.batch_size, task.examples)
        # Activations are kept for the pass backward, which makes as many gradients.
        passing = batch * (bench.x[0].numel() + 2 * _activations(bench, task))
        budget = self.memory_mb or MEMORY_MB["cpu" if bench.x.device.type == "cpu" else "gpu"]
        return max(1, int(budget * MIB / (bench.x.element_size() * (held * trained + passing))))


def _of_vmap(error: Exception) -> bool:
    return "vmap" in str(error) or "functorch" in str(error)


def _of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def _streams_put_back(tasks: Sequence[Task]) -> Iterator[None]:
    """Random streams that were used by an attempt that failed are as before, for the next one."""
    try:
        yield
    except BaseException:
        for task in tasks:
            task.rewind()
        raise


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _groups(bench: Workbench, tasks: Sequence[Task]) -> tuple[list[list[int]], list[int]]:
    """Positions of tasks of the same kind, and of those that cannot be done in lock-step."""
    groups: list[list[int]] = []
    alone: list[int] = []
    random: dict[float, bool] = {}
    for i, task in enumerate(tasks):
        for width in (task.job.width, *task.job.inner_widths):
            if width not in random:
                random[width] = _is_random(bench.net_at(width))
        if not _able(task) or any(random[width] for width in (task.job.width, *task.job.inner_widths)):
            alone.append(i)
            continue
        home = next((group for group in groups if _alike(tasks[group[0]], task)), None)
        if home is None:
            groups.append([i])
        else:
            home.append(i)
    return groups, alone


def _able(task: Task) -> bool:
    job = task.job
    return task.steps > 0 and not job.keep_optimizer and not job.optimizer_state


def _is_random(net: nn.Module) -> bool:
    """Whether it has dropout, whose masks would be others than those of a client alone."""
    return any(isinstance(module, _DropoutNd) and module.p > 0 for module in net.modules())


def _alike(one: Task, other: Task) -> bool:
    """Whether two tasks differ in their tensors and examples only."""
    a, b = one.job, other.job
    same = (
        (a.width, a.inner_widths, one.classes, one.round, one.rounds)
        == (b.width, b.inner_widths, other.classes, other.round, other.rounds)
        and a.parametrization == b.parametrization
        and (a.loss, a.grad, one.augment) == (b.loss, b.grad, other.augment)
        and (one.work is other.work or one.work == other.work)
    )
    if not same or a.start is b.start:
        return same
    return all(_shapes(part) == _shapes(twin) for part, twin in zip(a.start, b.start, strict=True))


def _shapes(params: Params) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in params.items()]


def _activations(bench: Workbench, task: Task) -> int:
    """Numbers that all modules of the net give for one example; found once."""
    net = bench.net_at(task.job.width)
    if net not in _ACTIVATIONS:
        _ACTIVATIONS[net] = _counted(net, bench.x[:1])
    return _ACTIVATIONS[net]


_ACTIVATIONS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def _counted(net: nn.Module, example: Tensor) -> int:
    total = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total
        total += sum(tensor.numel() for tensor in P.tensors(output))

    hooks = [module.register_forward_hook(count) for module in net.modules() if not list(module.children())]
    net.eval()
    with torch.no_grad():
        net(example)
    for hook in hooks:
        hook.remove()
    return total
