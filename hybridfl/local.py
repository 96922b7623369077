"""Local work: one participant, its examples, a number of optimiser steps on θ.

Everything here is a function of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl import params as P
from hybridfl.activations import inputs_of
from hybridfl.data.augmentation import Augment
from hybridfl.deferred import Deferred
from hybridfl.merging.slices import sliced
from hybridfl.optimizers import LocalWork, batches, clipped, learning_rates
from hybridfl.params import Params
from hybridfl.rng import stream, torch_seed
from hybridfl.stateless import run_net
from hybridfl.types import Apply, Batch, Job, Model, ProbeInput, Result, State

TRAINING_PASSES = 3
"""A step costs one forward and about two forward passes backward (Kaplan et al. 2020, arXiv 2001.08361)."""
TRAINING_MAPS = 2
"""A map linear in θ costs as much backward as forward."""


def cross_entropy(apply: Apply, theta: Params, params: Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
    """Mean cross-entropy, the loss of a job that names none."""
    return F.cross_entropy(apply(params, batch.x), batch.y)


@dataclass(frozen=True, eq=False)
class Task:
    """A job with everything the engine decided about it.

    Attributes:
        rows: positions of the view's examples in the pool, on the pool's device.
        round, rounds: round of birth, and how many the run has; they set the learning rate.
        seed, keys: of the run, and what no other of its jobs has; random streams are made from them by whoever does the work.
        augment: what changes the inputs of every step; ``None`` leaves them.
        classes: the only ones whose logits count; ``None`` is all.
    """

    job: Job
    work: LocalWork
    steps: int
    rows: Tensor
    round: int
    rounds: int
    seed: int
    keys: tuple[int | str, ...]
    augment: Augment | None = None
    classes: tuple[int, ...] | None = None

    @property
    def examples(self) -> int:
        return self.rows.shape[0]  # len of a tensor takes ten times as long

    @cached_property
    def shuffle(self) -> np.random.Generator:
        """Stream of the batches."""
        return stream(self.seed, "local", *self.keys)

    @cached_property
    def noise(self) -> np.random.Generator:
        """Stream of the augmentation."""
        return stream(self.seed, "augmentation", *self.keys)

    @property
    def torch_seed(self) -> int:
        """Of anything random inside the net (dropout)."""
        return torch_seed(self.seed, "net", *self.keys)

    def rewind(self) -> None:
        """Random streams as if nothing had been drawn from them."""
        for name in ("shuffle", "noise"):
            vars(self).pop(name, None)


@dataclass(frozen=True, eq=False)
class Workbench:
    """What every task of a run shares: the net, and one pool of all training examples.

    Attributes:
        net: a template module; its own tensors are never used.
        x: ``(N, …)`` inputs, standardised, images as :func:`laid_out`. y: ``(N,)`` labels.
        chunk: examples a forward pass without gradient takes at once.
        other_widths: the net at the other widths that jobs ask for.
    """

    net: nn.Module
    x: Tensor
    y: Tensor
    chunk: int
    other_widths: Mapping[float, nn.Module] = field(default_factory=dict)

    @cached_property
    def largest(self) -> Tensor:
        """Absolute value of the largest number of all inputs, 0-d; NaN if one of them is that."""
        return P.greatest(self.x)

    def net_at(self, width: float) -> nn.Module:
        return self.net if width == 1 else self.other_widths[width]


@dataclass(frozen=True, eq=False)
class Outcome:
    """A result and what it cost.

    Attributes:
        passes: examples that went through the net, by its width; one that went forward and backward counts three times.
        mapped: multiply–accumulates of the parametrization.
        finite: whether the model's tensors are, if the executor has looked.
    """

    result: Result
    passes: Mapping[float, int]
    mapped: int = 0
    finite: bool | None = None


@contextmanager
def torch_random(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global randomness set to ``seed`` within the block, and put back after it.

    ``torch.manual_seed`` does the same for all devices, but imports the compiler, 2 s at the start of every run.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def laid_out(tensor: Tensor) -> Tensor:
    """A copy of images or kernels on a CPU with channels last, which its convolutions are faster with; others as they are."""
    if tensor.dim() == 4 and tensor.device.type == "cpu":
        # Not contiguous(), which leaves a single channel as it is, and with it the layers after it.
        return tensor.clone(memory_format=torch.channels_last)
    return tensor


def run_task(bench: Workbench, task: Task) -> Outcome:
    """Do the job: ``task.steps`` optimiser steps on θ, then the probes."""
    passes: dict[float, int] = {}
    with torch_random(task.torch_seed, bench.x.device):
        theta, buffers, state, loss = _train(bench, task, passes)
    return finished(bench, task, Model(theta, buffers), state, loss, passes)


def finished(
    bench: Workbench,
    task: Task,
    model: Model | Deferred,
    state: State,
    loss: float,
    passes: dict[float, int],
    finite: bool | None = None,
) -> Outcome:
    """What is reported of a task whose steps are done, after its probes.

    Args:
        model: θ and the buffers; deferred only without probes.
        state: of the optimiser.
        loss: mean over the steps.
        passes: examples by width up to now; probes add to it.
        finite: as in :class:`Outcome`.
    """
    job = task.job
    statistics = _measure(bench, task, *model, passes) if job.probes and isinstance(model, Model) else {}
    result = Result(
        participant=job.participant,
        tag=job.tag,
        start=job.start,
        model=cast(Model, model),  # which writes it out when it is read
        examples=task.examples,
        steps=task.steps,
        loss=loss,
        probes=statistics,
        optimizer_state=state if job.keep_optimizer else None,
        birth=task.round,
    )
    return Outcome(result, passes, _mapped(task), finite)


def _train(bench: Workbench, task: Task, passes: dict[float, int]) -> tuple[Params, Params, State, float]:
    job, work = task.job, task.work
    if task.steps == 0:
        return job.start.params, job.start.buffers, job.optimizer_state or {}, math.nan
    theta = {name: laid_out(t.detach().clone()).requires_grad_() for name, t in job.start.params.items()}
    buffers = P.clone(job.start.buffers)
    state = _copied(job.optimizer_state or {})
    lrs = learning_rates(work, theta, task.round, task.rounds)
    for width in (job.width, *job.inner_widths):
        bench.net_at(width).train()
    apply = _applier(bench, task, buffers, passes)
    total = torch.zeros((), device=bench.x.device, dtype=torch.float64)
    for picked in batches(task.examples, work, task.shuffle, task.steps):
        index = torch.from_numpy(picked).to(bench.x.device, non_blocking=True)
        rows = task.rows[index]
        batch = Batch(bench.x[rows], bench.y[rows], index)
        loss = _loss(task, apply, theta, batch)
        grads = _gradients(loss, theta)
        if job.grad is not None:
            grads = job.grad(grads, P.detach(theta), job.ctx)
        if work.clip_norm is not None:
            grads = clipped(grads, work.clip_norm)
        with torch.no_grad():
            work.update(theta, grads, state, lrs)
        total += loss.detach()
    return {name: t.detach().contiguous() for name, t in theta.items()}, buffers, state, (total / task.steps).item()


def _loss(task: Task, apply: Apply, theta: Params, batch: Batch) -> Tensor:
    """The job's loss on a batch, augmented if the run says so."""
    if task.augment is None:
        return loss_of(task.job, apply, theta, batch)
    x, partners, share = task.augment(batch.x, task.noise)
    return loss_of(task.job, apply, theta, batch._replace(x=x), partners, share)


def loss_of(
    job: Job, apply: Apply, theta: Params, batch: Batch, partners: Tensor | None = None, share: Any = 1.0
) -> Tensor:
    """The job's loss on a batch as its step sees it.

    Args:
        partners, share: of mixup, as in :class:`~hybridfl.data.augmentation.Augmented`.
    """
    rule, params = job.loss or cross_entropy, job.parametrization(theta, job.frozen)
    if partners is None:
        return rule(apply, theta, params, batch, job.ctx)
    # Positions too, for a rule that finds targets by them, such as a teacher's logits.
    others = Batch(batch.x, batch.y[partners], batch.positions[partners])
    first, again = _recorded(apply)
    loss: Tensor = share * rule(first, theta, params, batch, job.ctx)
    loss = loss + (1 - share) * rule(again, theta, params, others, job.ctx)
    return loss


def _recorded(apply: Apply) -> tuple[Apply, Apply]:
    """``apply``, and a second one that gives the first one's answers to the same tensors again, in their order.

    The net runs once for a loss that is taken twice: a second pass would cost as much again, and move the statistics of
    normalisation layers twice.
    """
    passes: list[tuple[Params, Tensor, float | None, Tensor]] = []

    def first(params: Params, x: Tensor, /, width: float | None = None) -> Tensor:
        logits = apply(params, x, width)
        passes.append((params, x, width, logits))
        return logits

    def again(params: Params, x: Tensor, /, width: float | None = None) -> Tensor:
        for i, (seen, *how, _) in enumerate(passes):
            same = how[0] is x and how[1] == width and seen.keys() == params.keys()
            if same and all(seen[name] is params[name] for name in seen):
                return passes.pop(i)[3]
        return apply(params, x, width)

    return first, again


def _gradients(loss: Tensor, theta: Params) -> Params:
    grads = torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(theta.items(), grads, strict=True)
    }


def _mapped(task: Task) -> int:
    """A step applies the map and sends a gradient back through it; a probe applies it once."""
    cost = getattr(task.job.parametrization, "macs", None)
    applications = TRAINING_MAPS * task.steps + len(task.job.probes)
    return applications * int(cost(task.job.frozen)) if cost else 0


def _measure(bench: Workbench, task: Task, theta: Params, buffers: Params, passes: dict[float, int]) -> dict[str, Any]:
    """Statistics by name."""
    job = task.job
    for width in (job.width, *job.inner_widths):
        bench.net_at(width).eval()
    apply, net = _applier(bench, task, buffers, passes), bench.net_at(job.width)

    def inputs(params: Params, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        seen = inputs_of(lambda: apply(params, x), net, names)
        return {name: torch.cat(found) for name, found in seen.items() if found}

    seen = ProbeInput(
        apply=apply,
        theta=theta,
        to_params=lambda t: job.parametrization(t, job.frozen),
        batches=_measured(bench, task),
        loss=job.loss or cross_entropy,
        ctx=job.ctx,
        net=net,
        inputs=inputs,
    )
    return {name: probe(seen) for name, probe in job.probes.items()}


def _measured(bench: Workbench, task: Task) -> list[Batch]:
    """What probes see: the view once as it is, or several times with the run's augmentation."""
    positions = torch.arange(task.examples, device=bench.x.device).split(bench.chunk)
    plain = [Batch(bench.x[task.rows[p]], bench.y[task.rows[p]], p) for p in positions]
    if task.augment is None or not task.job.augmented_passes:
        return plain
    passes = [batch for _ in range(task.job.augmented_passes) for batch in plain]
    return [batch._replace(x=task.augment(batch.x, task.noise)[0]) for batch in passes]


def _applier(bench: Workbench, task: Task, buffers: Params, passes: dict[float, int]) -> Apply:
    """The task's net as a function, which counts what goes through it; a narrower one has slices of the buffers."""
    classes = None if task.classes is None else torch.tensor(task.classes, device=bench.x.device)

    def apply(params: Params, x: Tensor, /, width: float | None = None) -> Tensor:
        width = task.job.width if width is None else width
        # With derivatives wanted, a pass backward is on its way.
        passes[width] = passes.get(width, 0) + len(x) * (TRAINING_PASSES if torch.is_grad_enabled() else 1)
        net, own = bench.net_at(width), buffers
        if width != task.job.width:
            own = sliced(buffers, {name: tensor.shape for name, tensor in net.named_buffers()})
        logits = run_net(net, params, own, x)
        return logits if classes is None else only(logits, classes)

    return apply


def only(logits: Tensor, classes: Tensor) -> Tensor:
    """Logits ``(b, classes)`` of which all but the given ones, by number, are so low that they have no probability."""
    # Finite, because minus infinity makes a Kullback-Leibler divergence NaN.
    lowest = torch.full_like(logits, torch.finfo(logits.dtype).min / 2)
    return lowest.index_copy(1, classes, logits[:, classes])


def _copied(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return state.clone() if isinstance(state, Tensor) else state


def predict(net: nn.Module, model: Model, x: Tensor, chunk: int) -> Tensor:
    """Logits ``(n, classes)`` in evaluation mode, without gradient."""
    net.eval()
    params = {name: laid_out(tensor) for name, tensor in model.params.items()}
    with torch.no_grad():
        return torch.cat([run_net(net, params, model.buffers, piece) for piece in x.split(chunk)])
