"""Tasks of one kind under way: their tensors stacked along a first axis, a step of all of them at once.

The job's own loss runs under ``torch.func.vmap``, a chain of dense layers through products that are written out, and
convolutions in groups; the optimiser, which works entry by entry, steps the whole stack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from hybridfl.deferred import Deferred, Product, Stack, apart, written
from hybridfl.executors.batching import Fed, Feed, Selection, Share
from hybridfl.executors.grouped import Grouped, grouped
from hybridfl.executors.stacked import Chain, chain, is_shared
from hybridfl.local import TRAINING_PASSES, Outcome, Task, Workbench, finished, loss_of, only
from hybridfl.merging.slices import sliced
from hybridfl.optimizers import learning_rates
from hybridfl.parametrization import full
from hybridfl.params import Params, greatest
from hybridfl.stateless import run_net
from hybridfl.types import Apply, Batch, Model, State


class NotInLockStep(Exception):
    """These tasks cannot be done together; they are done one after the other."""


def by_hand(bench: Workbench, task: Task) -> Chain | None:
    """The task's net, if its passes are written out: a chain of dense layers, on the usual loss."""
    if task.job.loss is not None or task.job.parametrization is not full:
        return None
    return chain(bench.net_at(task.job.width))


def in_groups(bench: Workbench, task: Task) -> Grouped | None:
    """The task's net with all clients' channels side by side, on a CPU, if it is convolutions and then dense layers."""
    if task.job.loss is not None or task.job.parametrization is not full or bench.x.device.type != "cpu":
        return None
    return grouped(bench.net_at(task.job.width))


def is_plain(task: Task) -> bool:
    """Whether a gradient is only subtracted, so that it need not be there as a whole."""
    return task.work.is_plain and task.work.clip_norm is None and task.job.grad is None


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
            raise NotInLockStep
        entries = {key: _merged([value[key] for value in values]) for key in first}
        return _Merged({k: e.value for k, e in entries.items()}, {k: e.dims for k, e in entries.items()})
    if isinstance(first, list) and all(isinstance(value, list) and len(value) == len(first) for value in values):
        items = [_merged(entry) for entry in zip(*values, strict=True)]
        return _Merged([e.value for e in items], [e.dims for e in items])
    if isinstance(first, Tensor):
        if any(not isinstance(value, Tensor) or value.shape != first.shape for value in values):
            raise NotInLockStep
        return _Merged(torch.stack(list(values)), 0)
    if any(type(value) is not type(first) or value != first for value in values):
        raise NotInLockStep
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


def lock_step(bench: Workbench, tasks: Sequence[Task]) -> list[Outcome]:
    """All steps of tasks of one kind, those with many steps first."""
    return LockStep(bench, tasks).run()


class LockStep:
    """Tasks under way."""

    def __init__(self, bench: Workbench, tasks: Sequence[Task]) -> None:
        self.bench, self.tasks, self.first = bench, tasks, tasks[0]
        self.chain = by_hand(bench, self.first)
        starts = [task.job.start for task in tasks]
        self.theta = _stacks([start.params for start in starts], shared=self.chain is not None)
        self.buffers = _stacks([start.buffers for start in starts])
        self.frozen = _merged([task.job.frozen for task in tasks])
        self.ctx = _merged([task.job.ctx for task in tasks])
        # What the clients of a chain add to the first layer's weights, as long as they share them.
        self.products: list[Product] = []
        self.deferring = self.shared_weight() if self.chain else None
        self.state: State = {}
        self.passes: dict[float, np.ndarray] = {}
        self.total = torch.zeros(len(tasks), device=bench.x.device, dtype=torch.float64)
        nets = [bench.net_at(width) for width in (self.first.job.width, *self.first.job.inner_widths)]
        for net in nets:
            net.train()
        # What fills up a short batch must not show in the loss, nor in a statistic of the batch.
        by_batch = any(isinstance(module, _NormBase) for net in nets for module in net.modules())
        self.feed = Feed(bench, tasks, fills=self.first.job.loss is None and not by_batch)
        self.grouped = in_groups(bench, self.first)
        classes = self.first.classes
        self.classes = None if classes is None else torch.tensor(classes, device=bench.x.device)

    def run(self) -> list[Outcome]:
        tasks, work = self.tasks, self.first.work
        lrs = learning_rates(work, self.theta, self.first.round, self.first.rounds)
        for shares in self.feed:
            # All before the first of them, which changes what is counted in steps.
            states = [_of_clients(self.state, share.chosen) for share in shares]
            for share, state in zip(shares, states, strict=True):
                self.step(share, state, lrs)
        if self.products and (any(task.job.probes for task in tasks) or not self.surely_finite()):
            self.write_out()
        finite = self.finite()
        if not all(finite):
            self.write_out()  # what the others' mean adds up, with no share, must be finite too
        losses = (self.total / torch.tensor([task.steps for task in tasks], device=self.total.device)).tolist()
        models = self.models()
        seen = {width: examples.tolist() for width, examples in self.passes.items()}
        passes = [{width: examples[i] for width, examples in seen.items()} for i in range(len(tasks))]
        return [
            finished(self.bench, task, models[i], {}, losses[i], passes[i], finite[i]) for i, task in enumerate(tasks)
        ]

    def models(self) -> list[Model] | list[Deferred]:
        """Every client's."""
        if self.deferring and self.products:
            stack = Stack(self.theta, {self.deferring: self.products})
            return [Deferred(stack, i) for i in range(len(self.tasks))]
        theta, buffers = apart(self.theta, len(self.tasks)), apart(self.buffers, len(self.tasks))
        return [Model(*parts) for parts in zip(theta, buffers, strict=True)]

    def shared_weight(self) -> str | None:
        """The chain's first weights, if a step only adds a product to them and all clients have the same."""
        name, plain = self.chain.first_weight if self.chain else None, is_plain(self.first)
        return name if name and plain and not self.first.work.weight_decay and is_shared(self.theta[name]) else None

    def keep_products(self, fed: Fed) -> list[Product] | None:
        """Where the coming step's product goes; ``None`` once weights that are written out are faster, or smaller."""
        if self.deferring is None:
            return None
        outputs, inputs = self.theta[self.deferring].shape[1:]
        rows, more = sum(product.rows for product in self.products), fed.x[0].numel() // inputs
        if rows + more <= outputs and rows * (inputs + outputs) <= inputs * outputs:
            return self.products
        self.write_out()
        return None

    def write_out(self) -> None:
        """All clients' own weights, with the products added; from now on steps change them."""
        if self.deferring and self.products:
            start = self.theta[self.deferring][0]
            self.theta[self.deferring] = written(start, self.products, len(self.tasks))
        self.products, self.deferring = [], None

    def surely_finite(self) -> bool:
        """Whether the start and the products are so small that no sum of them is beyond the largest number."""
        assert self.deferring
        start, untouched = self.theta[self.deferring][0], self.chain and self.chain.reads_examples
        largest = self.bench.largest if untouched and self.first.augment is None else None
        bound = greatest(start).double()
        for left, right, rate in self.products:
            size = greatest(right) if largest is None else largest
            bound = bound + abs(rate) * right.shape[1] * size.double() * greatest(left)
        return bool(bound < torch.finfo(start.dtype).max / 4)

    def finite(self) -> list[bool]:
        """Of every client, whether all its tensors are, products aside; False may also be one whose sum is too large."""
        theta = [stack for name, stack in self.theta.items() if not (self.products and name == self.deferring)]
        stacks = [*theta, *(stack for stack in self.buffers.values() if stack.is_floating_point())]
        # Products with ones, which are sums in half the time.
        rows = [stack.reshape(len(stack), -1) for stack in stacks]
        if not rows:
            return [True] * len(self.tasks)
        sums = torch.stack([(own @ own.new_ones(own.shape[1])).double() for own in rows])
        found: list[bool] = torch.isfinite(sums).all(0).tolist()
        return found

    def step(self, share: Share, state: State, lrs: Mapping[str, float]) -> None:
        chosen, fed = share.chosen, share.fed
        products = self.keep_products(fed)
        theta, buffers, total = (_part(whole, chosen) for whole in (self.theta, self.buffers, self.total))
        if self.chain is None:
            losses, grads, calls = self.differentiated(fed, theta, buffers, chosen)
            self.update(theta, grads, state, lrs, chosen)
        else:
            calls = Counter({self.first.job.width: TRAINING_PASSES})
            tape = self.chain.forward(theta, fed.x, self.products)
            losses, slope = cross_entropy_and_slope(tape[-1].after, fed, self.classes)
            if is_plain(self.first):
                self.chain.descend(theta, tape, slope, lrs, self.first.work.weight_decay, products)
            else:
                grads = self.chain.gradients(theta, tape, slope)
                theta = {name: stack.contiguous() for name, stack in theta.items()}
                self.update(theta, grads, state, lrs, chosen)
        for width, times in calls.items():
            self.passes.setdefault(width, np.zeros(len(self.tasks), np.int64))[share.numbers] += share.sizes * times
        total += losses.detach()
        if not isinstance(chosen, slice):  # a part in one piece was changed in place
            self.total[chosen] = total
        for whole, part in ((self.theta, theta), (self.buffers, buffers), (self.state, state)):
            _put_back(whole, part, chosen, len(self.tasks))

    def update(self, theta: Params, grads: Params, state: State, lrs: Mapping[str, float], chosen: Selection) -> None:
        """The optimiser's step, in place."""
        job, work = self.first.job, self.first.work
        if job.grad is not None:
            ctx = _selected(*self.ctx, chosen)
            grads = torch.func.vmap(job.grad, in_dims=(0, 0, self.ctx.dims))(grads, theta, ctx)
        if work.clip_norm is not None:
            grads = _clipped(grads, work.clip_norm)
        with torch.no_grad():
            work.update(theta, grads, state, lrs)

    def differentiated(
        self, fed: Fed, theta: Params, buffers: Params, chosen: Selection
    ) -> tuple[Tensor, Params, Counter[float]]:
        """Losses ``(clients,)``, gradients, and how often each example goes through the net, by width."""
        job = self.first.job
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
        frozen, ctx = (_selected(*part, chosen) for part in (self.frozen, self.ctx))
        if job.loss is None:
            calls = Counter({job.width: TRAINING_PASSES})
            logits = self.logits(fed, leaves, buffers, frozen)
            losses, slope = cross_entropy_and_slope(logits.detach(), fed, self.classes)
            found = torch.autograd.grad(logits, list(leaves.values()), slope, allow_unused=True)
        else:
            losses, calls = self.losses(fed, leaves, buffers, frozen, ctx)
            found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        grads = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(theta.items(), found, strict=True)}
        return losses, grads, calls

    def logits(self, fed: Fed, theta: Params, buffers: Params, frozen: Any) -> Tensor:
        """``(clients, b, classes)``."""
        if self.grouped is not None:
            return self.grouped.forward(theta, fed.x)
        net, mapped = self.bench.net_at(self.first.job.width), self.first.job.parametrization
        # In one go, so that what all clients share stays one tensor.
        found: Tensor = torch.func.vmap(
            lambda theta, frozen, buffers, x: run_net(net, mapped(theta, frozen), buffers, x),
            in_dims=(0, self.frozen.dims, 0, 0),
        )(theta, frozen, buffers, fed.x)
        return found

    def losses(self, fed: Fed, theta: Params, buffers: Params, frozen: Any, ctx: Any) -> tuple[Tensor, Counter[float]]:
        """Those of the job's own rule."""
        job, calls = self.first.job, Counter[float]()

        def one(fed: Fed, theta: Params, buffers: Params, frozen: Any, ctx: Any) -> Tensor:
            batch, apply = Batch(fed.x, fed.y, fed.positions), self.applier(buffers, calls)
            return loss_of(replace(job, frozen=frozen, ctx=ctx), apply, theta, batch, fed.partners, fed.share)

        dims = (_in_dims(fed), 0, 0, self.frozen.dims, self.ctx.dims)
        losses: Tensor = torch.func.vmap(one, in_dims=dims)(fed, theta, buffers, frozen, ctx)
        return losses, calls

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


def cross_entropy_and_slope(logits: Tensor, fed: Fed, classes: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of jobs that name none, over the real examples, and the gradient of the losses' sum by the logits.

    That is softmax less the labels, one-hot. Autograd takes as long for these few numbers as the products of a small net do.

    Args:
        logits: ``(clients, b, classes)``.
        classes: the only ones that count; ``None`` is all.

    Returns:
        ``(clients,)``, ``(clients, b, classes)``.
    """
    # With examples as the last axis it takes a twentieth of the time on a CPU, which goes along them, not along few classes.
    logits = logits.transpose(1, 2)
    if classes is not None:
        logits = only(logits, classes)
    log_p, label = torch.log_softmax(logits, 1), fed.y.unsqueeze(1)
    slope, found = log_p.exp(), log_p.gather(1, label)
    if fed.partners is None or fed.share is None:
        losses = found.squeeze(1).neg()
        slope.scatter_(1, label, found.expm1_())
    else:
        share, other = fed.share.view(-1, 1, 1).expand_as(label), fed.y.gather(1, fed.partners).unsqueeze(1)
        losses = -(share * found + (1 - share) * log_p.gather(1, other)).squeeze(1)
        for column, part in ((label, share), (other, 1 - share)):
            slope.scatter_add_(1, column, -part)
    if fed.real is None:
        losses, slope = losses.mean(1), slope.div_(losses.shape[1])
    else:
        weight = fed.real / fed.real.sum(1, keepdim=True)
        losses, slope = (losses * weight).sum(1), slope.mul_(weight.unsqueeze(1))
    return losses, slope.transpose(1, 2)


def _part(whole: Any, chosen: Selection) -> Any:
    """Of a stack or of several by name: that of the chosen clients, for a part in one piece a view."""
    if isinstance(whole, dict):
        return {name: _part(stack, chosen) for name, stack in whole.items()}
    if isinstance(chosen, slice) and chosen.stop == len(whole):
        return whole
    return whole[chosen]


def _in_dims(fed: Fed) -> Any:
    return Fed._make(None if part is None else 0 for part in fed)


def _stacks(parts: Sequence[Params], shared: bool = False) -> Params:
    """New tensors of all clients' by name; with ``shared`` what is one for all of them, as most often, is expanded."""
    alike = all(part is parts[0] for part in parts)
    stacks = {}
    for name, first in parts[0].items():
        if alike or all(part[name] is first for part in parts):
            stack = first.detach().expand(len(parts), *first.shape)
            expanded = shared and len(parts) > 1  # one alone would be changed in place
            stacks[name] = stack if expanded else stack.clone(memory_format=torch.contiguous_format)
        else:
            stacks[name] = torch.stack([part[name] for part in parts]).detach()
    return stacks


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
