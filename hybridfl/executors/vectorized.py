"""Clients in lock-step: one batched step of a whole group of clients instead of a step of each.

Their tensors are stacked along a first axis, the job's own loss runs under ``torch.func.vmap``, and the optimiser, which works
entry by entry, steps all of them at once. Clients with the same kind of job form a group, sorted by their steps, so that
those who are done are the end of the stack and nothing is computed for them any more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from hybridfl import params as P
from hybridfl.build import PositiveInt
from hybridfl.executors.stacked import stacked
from hybridfl.local import TRAINING_PASSES, Outcome, Task, Workbench, finished, loss_of, only, run_net, run_task
from hybridfl.merging.slices import sliced
from hybridfl.optimizers import batches, learning_rates
from hybridfl.parametrization import full
from hybridfl.params import Params
from hybridfl.types import Apply, Batch, State

Selection = slice | Tensor
"""Which clients of a stack: a part of it in one piece, or positions."""
MIB = 2**20
MEMORY_MB = {"cpu": 64, "gpu": 2048}
HELD = 4
"""Of every trained number: itself, its gradient, and up to two of the optimiser."""


class _NotInLockStep(Exception):
    """These tasks cannot be done together; they are done one after the other."""


@dataclass(frozen=True)
class Vectorized:
    """Runs tasks of the same kind in lock-step, others one after the other.

    Numbers agree with those of the sequential executor up to rounding. One after the other are: measurements, single jobs,
    jobs that continue with or return an optimiser's state, nets with dropout, and rules that ``torch.func.vmap`` cannot run.

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
        for group in _groups(bench, tasks):
            # Many steps first: at any step those who still work are the beginning of the stack.
            ordered = sorted(group, key=lambda i: -tasks[i].steps)
            size = self._together(bench, tasks[ordered[0]]) if len(ordered) > 1 else 1
            for part in _parts(ordered, size):
                outcomes |= zip(part, self._done(bench, [tasks[i] for i in part]), strict=True)
        return [outcomes[i] for i in range(len(tasks))]

    def told(self) -> list[str]:
        """What the user should know of the runs since the last call."""
        said, self._told[:] = list(self._told), []
        return said

    def _done(self, bench: Workbench, tasks: Sequence[Task]) -> list[Outcome]:
        if len(tasks) == 1:
            return [run_task(bench, tasks[0])]
        try:
            with _streams_put_back(tasks):
                return _lock_step(bench, tasks)
        except _NotInLockStep:
            return [run_task(bench, task) for task in tasks]
        except (RuntimeError, MemoryError) as error:
            if _of_vmap(error):
                return [run_task(bench, task) for task in tasks]
            if not _of_memory(error):
                raise
        half = math.ceil(len(tasks) / 2)
        self._told.append(f"no memory for {len(tasks)} clients at once; trying {half}; see executor.memory_mb")
        if bench.x.device.type == "cuda":
            torch.cuda.empty_cache()
        return [outcome for part in _parts(tasks, half) for outcome in self._done(bench, part)]

    def _together(self, bench: Workbench, task: Task) -> int:
        """How many clients with this kind of job fit into the memory."""
        trained = sum(tensor.numel() for tensor in task.job.start.params.values())
        batch = min(task.work.batch_size, len(task.rows))
        # Activations are kept for the pass backward, which makes as many gradients.
        passing = batch * (bench.x[0].numel() + 2 * _activations(bench, task))
        budget = self.memory_mb or MEMORY_MB["cpu" if bench.x.device.type == "cpu" else "gpu"]
        return max(1, int(budget * MIB / (bench.x.element_size() * (HELD * trained + passing))))


def _of_vmap(error: Exception) -> bool:
    return "vmap" in str(error) or "functorch" in str(error)


def _of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def _streams_put_back(tasks: Sequence[Task]) -> Iterator[None]:
    """Random streams that were used by an attempt that failed are as before, for the next one."""
    streams = [stream.bit_generator for task in tasks for stream in (task.shuffle, task.noise) if stream]
    before = [stream.state for stream in streams]
    try:
        yield
    except BaseException:
        for stream, state in zip(streams, before, strict=True):
            stream.state = state
        raise


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _groups(bench: Workbench, tasks: Sequence[Task]) -> list[list[int]]:
    """Positions of tasks of the same kind; those that cannot be done in lock-step are groups of their own."""
    groups: list[list[int]] = []
    alone: list[list[int]] = []
    random: dict[float, bool] = {}
    for i, task in enumerate(tasks):
        for width in (task.job.width, *task.job.inner_widths):
            if width not in random:
                random[width] = _is_random(bench.net_at(width))
        if not _able(task) or any(random[width] for width in (task.job.width, *task.job.inner_widths)):
            alone.append([i])
            continue
        home = next((group for group in groups if _alike(tasks[group[0]], task)), None)
        if home is None:
            groups.append([i])
        else:
            home.append(i)
    return [*groups, *alone]


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
        and one.work == other.work
    )
    return same and all(_shapes(part) == _shapes(twin) for part, twin in zip(a.start, b.start, strict=True))


def _shapes(params: Params) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in params.items()]


def _activations(bench: Workbench, task: Task) -> int:
    """Numbers that all modules of the net give for one example."""
    net, total = bench.net_at(task.job.width), 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total
        total += sum(tensor.numel() for tensor in P.tensors(output))

    hooks = [module.register_forward_hook(count) for module in net.modules() if not list(module.children())]
    net.eval()
    with torch.no_grad():
        net(bench.x[:1])
    for hook in hooks:
        hook.remove()
    return total


class _Merged(NamedTuple):
    """What rules read beside θ, of all clients: tensors that differ are stacked; ``dims`` is as ``vmap`` wants it."""

    value: Any
    dims: Any


def _merged(values: Sequence[Any]) -> _Merged:
    first = values[0]
    if all(value is first for value in values):
        return _Merged(first, None)
    if isinstance(first, Mapping):
        if any(not isinstance(value, Mapping) or value.keys() != first.keys() for value in values):
            raise _NotInLockStep
        entries = {key: _merged([value[key] for value in values]) for key in first}
        return _Merged({k: e.value for k, e in entries.items()}, {k: e.dims for k, e in entries.items()})
    if isinstance(first, list) and all(isinstance(value, list) and len(value) == len(first) for value in values):
        items = [_merged(entry) for entry in zip(*values, strict=True)]
        return _Merged([e.value for e in items], [e.dims for e in items])
    if isinstance(first, Tensor):
        if any(not isinstance(value, Tensor) or value.shape != first.shape for value in values):
            raise _NotInLockStep
        return _Merged(torch.stack(list(values)), 0)
    if any(type(value) is not type(first) or value != first for value in values):
        raise _NotInLockStep
    return _Merged(first, None)


def _selected(value: Any, dims: Any, chosen: Selection) -> Any:
    """What was merged, of the chosen clients."""
    if dims is None:
        return value
    if isinstance(value, dict):
        return {key: _selected(entry, dims[key], chosen) for key, entry in value.items()}
    if isinstance(value, list):
        return [_selected(entry, dim, chosen) for entry, dim in zip(value, dims, strict=True)]
    return value[chosen]


class _Share(NamedTuple):
    """Clients that make a step together.

    Attributes:
        chosen: which.
        picked: for each, positions of its batch in its view.
    """

    chosen: Selection
    picked: list[np.ndarray]


class _Fed(NamedTuple):
    """A step's batches of b examples, first axis the clients.

    Attributes:
        real: 1 for examples, 0 for what only fills up a short batch.
        partners, share: of mixup.
    """

    x: Tensor
    y: Tensor
    positions: Tensor
    real: Tensor
    partners: Tensor | None
    share: Tensor | None


def _lock_step(bench: Workbench, tasks: Sequence[Task]) -> list[Outcome]:
    """All steps of tasks of one kind, those with many steps first."""
    return _LockStep(bench, tasks).run()


class _LockStep:
    """Tasks under way."""

    def __init__(self, bench: Workbench, tasks: Sequence[Task]) -> None:
        self.bench, self.tasks, self.first = bench, tasks, tasks[0]
        starts = [task.job.start for task in tasks]
        self.theta, self.buffers = (
            {name: _stack([part[name].detach() for part in parts]) for name in parts[0]}
            for parts in ([start.params for start in starts], [start.buffers for start in starts])
        )
        self.frozen = _merged([task.job.frozen for task in tasks])
        self.ctx = _merged([task.job.ctx for task in tasks])
        self.state: State = {}
        self.rows = [task.rows.cpu().numpy() for task in tasks]
        self.passes: list[Counter[float]] = [Counter() for _ in tasks]
        self.total = torch.zeros(len(tasks), device=bench.x.device, dtype=torch.float64)
        nets = [bench.net_at(width) for width in (self.first.job.width, *self.first.job.inner_widths)]
        for net in nets:
            net.train()
        # What fills up a short batch must not show in the loss, nor in a statistic of the batch.
        by_batch = any(isinstance(module, _NormBase) for net in nets for module in net.modules())
        self.fills = self.first.job.loss is None and not by_batch
        self.net = stacked(nets[0])
        classes = self.first.classes
        self.classes = None if classes is None else torch.tensor(classes, device=bench.x.device)

    def run(self) -> list[Outcome]:
        tasks, work = self.tasks, self.first.work
        lrs = learning_rates(work, self.theta, self.first.round, self.first.rounds)
        feeds = [batches(len(task.rows), work, task.shuffle, task.steps) for task in tasks]
        working = len(tasks)
        for number in range(self.first.steps):
            while tasks[working - 1].steps <= number:
                working -= 1
            shares = self.shares([next(feed) for feed in feeds[:working]])
            # All before the first of them, which changes what is counted in steps.
            states = [_of_clients(self.state, share.chosen) for share in shares]
            for share, state in zip(shares, states, strict=True):
                self.step(share, state, lrs)
        finite = self.finite()
        losses = (self.total / torch.tensor([task.steps for task in tasks], device=self.total.device)).tolist()
        return [
            finished(
                self.bench,
                task,
                {name: stack[i] for name, stack in self.theta.items()},
                {name: stack[i] for name, stack in self.buffers.items()},
                {},
                losses[i],
                self.passes[i],
                finite[i],
            )
            for i, task in enumerate(tasks)
        ]

    def finite(self) -> list[bool]:
        """Of every client, whether all its tensors are; False may also be one whose sum is too large."""
        stacks = [*self.theta.values(), *(stack for stack in self.buffers.values() if stack.is_floating_point())]
        sums = torch.stack([stack.reshape(len(stack), -1).sum(1).double() for stack in stacks])
        found: list[bool] = torch.isfinite(sums).all(0).tolist()
        return found

    def shares(self, picked: list[np.ndarray]) -> list[_Share]:
        """Everybody, or apart those whose batches differ in size."""
        sizes = np.array([len(batch) for batch in picked])
        if self.fills or (sizes == sizes[0]).all():
            return [_Share(slice(0, len(picked)), picked)]
        shares = []
        for size in np.unique(sizes):
            (who,) = np.nonzero(sizes == size)
            shares.append(_Share(torch.from_numpy(who).to(self.bench.x.device), [picked[i] for i in who]))
        return shares

    def step(self, share: _Share, state: State, lrs: Mapping[str, float]) -> None:
        job, work, chosen = self.first.job, self.first.work, share.chosen
        who = range(chosen.stop) if isinstance(chosen, slice) else chosen.tolist()
        fed = self.fed(share, who)
        theta = {name: stack[chosen].detach().requires_grad_() for name, stack in self.theta.items()}
        buffers = {name: stack[chosen] for name, stack in self.buffers.items()}
        frozen, ctx = (_selected(*part, chosen) for part in (self.frozen, self.ctx))
        losses, calls = self.losses(fed, theta, buffers, frozen, ctx)
        for i, batch in zip(who, share.picked, strict=True):
            for width, times in calls.items():
                self.passes[i][width] += len(batch) * times
        found = torch.autograd.grad(losses.sum(), list(theta.values()), allow_unused=True)
        theta = P.detach(theta)
        grads = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(theta.items(), found, strict=True)}
        if job.grad is not None:
            grads = torch.func.vmap(job.grad, in_dims=(0, 0, self.ctx.dims))(grads, theta, ctx)
        if work.clip_norm is not None:
            grads = _clipped(grads, work.clip_norm)
        with torch.no_grad():
            work.update(theta, grads, state, lrs)
        self.total[chosen] += losses.detach()
        _put_back(self.theta, theta, chosen, len(self.tasks))
        _put_back(self.buffers, buffers, chosen, len(self.tasks))
        _put_back(self.state, state, chosen, len(self.tasks))

    def losses(self, fed: _Fed, theta: Params, buffers: Params, frozen: Any, ctx: Any) -> tuple[Tensor, Counter[float]]:
        """Of every client, ``(clients,)``, and how often each of its examples goes through the net, by width."""
        job = self.first.job
        if job.loss is None:
            return self.cross_entropies(fed, theta, buffers, frozen), Counter({job.width: TRAINING_PASSES})
        calls: Counter[float] = Counter()

        def one(fed: _Fed, theta: Params, buffers: Params, frozen: Any, ctx: Any) -> Tensor:
            batch, apply = Batch(fed.x, fed.y, fed.positions), self.applier(buffers, calls)
            return loss_of(replace(job, frozen=frozen, ctx=ctx), apply, theta, batch, fed.partners, fed.share)

        dims = (_in_dims(fed), 0, 0, self.frozen.dims, self.ctx.dims)
        losses: Tensor = torch.func.vmap(one, in_dims=dims)(fed, theta, buffers, frozen, ctx)
        return losses, calls

    def cross_entropies(self, fed: _Fed, theta: Params, buffers: Params, frozen: Any) -> Tensor:
        """The loss of jobs that name none, over the real examples."""
        net, mapped = self.bench.net_at(self.first.job.width), self.first.job.parametrization
        if mapped is full:
            logits = self.net(theta, buffers, fed.x)
        else:
            # In one go, so that what all clients share stays one tensor.
            logits = torch.func.vmap(
                lambda theta, frozen, buffers, x: run_net(net, mapped(theta, frozen), buffers, x),
                in_dims=(0, self.frozen.dims, 0, 0),
            )(theta, frozen, buffers, fed.x)
        logits = logits.flatten(0, 1)
        if self.classes is not None:
            logits = only(logits, self.classes)
        losses = F.cross_entropy(logits, fed.y.flatten(), reduction="none").view(fed.y.shape)
        if fed.partners is not None and fed.share is not None:
            others = fed.y.gather(1, fed.partners).flatten()
            share = fed.share.unsqueeze(1)
            losses = share * losses
            losses = losses + (1 - share) * F.cross_entropy(logits, others, reduction="none").view(fed.y.shape)
        return (losses * fed.real).sum(1) / fed.real.sum(1)

    def applier(self, buffers: Params, calls: Counter[float]) -> Apply:
        """The net as a function of one client's tensors, which counts its passes."""
        own_width, classes = self.first.job.width, self.classes

        def apply(params: Params, x: Tensor, /, width: float | None = None) -> Tensor:
            width = own_width if width is None else width
            calls[width] += TRAINING_PASSES if torch.is_grad_enabled() else 1
            net, own = self.bench.net_at(width), buffers
            if width != own_width:
                own = sliced(buffers, {name: tensor.shape for name, tensor in net.named_buffers()})
            logits = run_net(net, params, own, x)
            return logits if classes is None else only(logits, classes)

        return apply

    def fed(self, share: _Share, who: Iterable[int]) -> _Fed:
        """The batches, short ones filled up with their own examples again, augmented if the run says so."""
        size = max(len(batch) for batch in share.picked)
        # np.resize repeats a short batch.
        picked = np.stack([batch if len(batch) == size else np.resize(batch, size) for batch in share.picked])
        rows = np.stack([self.rows[i][batch] for i, batch in zip(who, picked, strict=True)])
        device = self.bench.x.device
        index = torch.from_numpy(rows).to(device, non_blocking=True)
        x, y = (part[index.flatten()].unflatten(0, index.shape) for part in (self.bench.x, self.bench.y))
        sizes = torch.tensor([len(batch) for batch in share.picked], device=device)
        real = (torch.arange(size, device=device) < sizes.unsqueeze(1)).to(x.dtype)
        positions = torch.from_numpy(picked).to(device, non_blocking=True)
        if self.first.augment is None:
            return _Fed(x, y, positions, real, None, None)
        partners, shares = torch.arange(size, device=device).repeat(len(picked), 1), []
        for k, (i, batch) in enumerate(zip(who, share.picked, strict=True)):
            noise = self.tasks[i].noise
            assert noise is not None
            seen = self.first.augment(x[k, : len(batch)], noise)
            x[k, : len(batch)] = seen.x
            shares.append(seen.share)
            if seen.partners is not None:
                partners[k, : len(batch)] = seen.partners
        if seen.partners is None:
            return _Fed(x, y, positions, real, None, None)
        return _Fed(x, y, positions, real, partners, torch.tensor(shares, device=device, dtype=x.dtype))


def _in_dims(fed: _Fed) -> Any:
    return _Fed._make(None if part is None else 0 for part in fed)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """A new tensor of all of them; most often they are one."""
    if all(tensor.data_ptr() == tensors[0].data_ptr() for tensor in tensors):
        return tensors[0].expand(len(tensors), *tensors[0].shape).clone(memory_format=torch.contiguous_format)
    return torch.stack(list(tensors))


def _clipped(grads: Params, limit: float) -> Params:
    """Each client's gradients scaled down to a joint Euclidean length of at most ``limit``."""
    norms = torch.stack([grad.reshape(len(grad), -1).square().sum(1) for grad in grads.values()]).sum(0).sqrt()
    factor = (limit / (norms + 1e-6)).clamp(max=1.0)
    return {name: grad * factor.reshape(-1, *[1] * (grad.dim() - 1)) for name, grad in grads.items()}


def _of_clients(state: State, chosen: Selection) -> State:
    """An optimiser's state, its tensors of the chosen clients; numbers are the same for all who still work."""
    return {
        key: _of_clients(value, chosen)
        if isinstance(value, dict)
        else value[chosen]
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }


def _put_back(whole: State, part: State, chosen: Selection, clients: int) -> None:
    """What a step has made of the chosen clients' tensors, in place of what they were."""
    for key, value in part.items():
        if isinstance(value, dict):
            _put_back(whole.setdefault(key, {}), value, chosen, clients)
        elif not isinstance(value, Tensor) or len(value) == clients:
            whole[key] = value
        else:
            if key not in whole:
                whole[key] = value.new_zeros(clients, *value.shape[1:])
            # A part in one piece was changed in place.
            if not isinstance(chosen, slice) or whole[key].data_ptr() != value.data_ptr():
                whole[key][chosen] = value
