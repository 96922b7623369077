"""The executor that works in lock-step: what it does together, what it does not, and what it does without memory.

That all methods give the numbers of the sequential executor is in tests/test_executors.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl import params as P
from hybridfl.assignment import task_of
from hybridfl.executors import lock_step, vectorized
from hybridfl.executors.grouped import grouped
from hybridfl.executors.sequential import Sequential
from hybridfl.executors.stacked import chain
from hybridfl.executors.vectorized import Vectorized
from hybridfl.local import Outcome, Task, run_net
from hybridfl.optimizers import SGD, Adam
from hybridfl.params import Params
from hybridfl.probes import mean_loss
from hybridfl.types import Apply, Batch, Job

UNEVEN = ("clients.number=6", "partitioning.alpha=0.3", "client_optimizer.batch_size=7")


def tasks_of(*overrides: str, **job: Any) -> tuple[Any, list[Task]]:
    """The workbench, and a task of every client with streams of its own at each call."""
    federation = helpers.plan("baseline=fedavg", *UNEVEN, *overrides).federation
    jobs = [Job(k, federation.fresh_model(), **job) for k in range(6)]
    return federation.bench, [task_of(federation, one, 0, 3, 0) for one in jobs]


def check(*overrides: str, executor: Vectorized | None = None, **job: Any) -> list[Outcome]:
    """Both executors' outcomes agree; the vectorised ones."""
    bench, tasks = tasks_of(*overrides, **job)
    expected = Sequential().run(bench, tasks)
    found = (executor or Vectorized()).run(*tasks_of(*overrides, **job))
    for one, other in zip(expected, found, strict=True):
        a, b = one.result, other.result
        assert (a.participant, a.steps, a.examples, a.start is not None) == (b.participant, b.steps, b.examples, True)
        assert helpers.close(a.model.params, b.model.params, 1e-10)
        assert helpers.close(a.model.buffers, b.model.buffers, 1e-10)
        assert a.loss == pytest.approx(b.loss, abs=1e-10, nan_ok=True)
        assert helpers.close(dict(a.probes), dict(b.probes), 1e-10)
        assert (dict(one.passes), one.mapped) == (dict(other.passes), other.mapped)
    return found


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Clients that were trained by themselves."""
    seen: list[int] = []
    run_task = vectorized.run_task

    def spied(bench: Any, task: Task) -> Outcome:
        seen.append(task.job.participant)
        return run_task(bench, task)

    monkeypatch.setattr(vectorized, "run_task", spied)
    return seen


def test_clients_of_different_sizes_work_together(alone: list[int]) -> None:
    sizes = {len(task.rows) for task in tasks_of()[1]}
    assert len(sizes) == 6
    check(probes={"loss": mean_loss})
    assert not alone


@pytest.mark.parametrize(
    "line",
    [
        ["client_optimizer.momentum=0.9", "client_optimizer.weight_decay=0.1", "client_optimizer.clip_norm=0.1"],
        ["client_optimizer=nadam", "client_optimizer.epochs=3", "client_optimizer.lr=0.1"],
        ["model=cnn", "model.channels=[4,4]", "augmentation=standard", "augmentation.crop=1"],
        ["augmentation=mixup", "client_optimizer=adam"],
        ["model=resnet20", "model.norm=batch", "model.width=0.25", "dataset.shape=[1,8,8]"],
        ["dataset.classes=4", "tasks.number=2"],
    ],
)
def test_every_kind_of_work(line: list[str], alone: list[int]) -> None:
    check(*line)
    assert not alone


def test_a_batch_norm_net_sees_no_example_that_only_fills_up() -> None:
    line = ["model=resnet20", "model.norm=batch", "model.width=0.25", "dataset.shape=[1,8,8]"]
    outcomes = check(*line)
    counted = [int(next(t for n, t in o.result.model.buffers.items() if n.endswith("tracked"))) for o in outcomes]
    assert counted == [outcome.result.steps for outcome in outcomes]


@pytest.mark.parametrize(
    ("line", "job"),
    [
        (["model=vit", "model.patch=2", "model.depth=1", "model.dim=8", "model.heads=2", "model.dropout=0.3"], {}),
        ([], {"keep_optimizer": True}),
        ([], {"steps": 0, "probes": {"loss": mean_loss}}),
    ],
)
def test_what_cannot_be_done_together_is_done_alone(line: list[str], job: Any, alone: list[int]) -> None:
    check(*line, **job)
    assert sorted(alone) == list(range(6))


def by_value(apply: Apply, theta: Params, params: Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
    """A rule that looks at numbers, which ``vmap`` cannot."""
    logits = apply(params, batch.x)
    return (
        F.cross_entropy(logits, batch.y)
        if float(logits.detach().sum()) > 0
        else F.mse_loss(logits, logits.detach() * 0)
    )


def test_a_rule_that_looks_at_numbers_is_run_alone_with_the_same_batches(alone: list[int]) -> None:
    check(loss=by_value)
    assert sorted(alone) == list(range(6))


def half_squares(apply: Apply, theta: Params, params: Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
    """A rule with a pass that is not trained through, a shared tensor and numbers."""
    logits = apply(params, batch.x)
    with torch.no_grad():
        other = apply({name: tensor * ctx["shrink"] for name, tensor in params.items()}, batch.x)
    return (logits - other + ctx["pull"][batch.y]).square().mean() + batch.positions.double().mean() * 0


def test_a_rule_of_its_own(alone: list[int]) -> None:
    check(loss=half_squares, ctx={"shrink": 0.5, "pull": torch.ones(3, 3, dtype=torch.float64)})
    assert not alone


def test_tensors_that_differ_between_clients(alone: list[int]) -> None:
    bench, tasks = tasks_of()
    start = tasks[0].job.start

    def own(task: Task, k: int) -> Task:
        pulled = {
            "received": {n: t + k for n, t in start.params.items()},
            "scale": [torch.tensor(float(k)).double(), 2.0],
        }
        return replace(task, job=replace(task.job, ctx=pulled, grad=towards))

    expected = Sequential().run(bench, [own(task, k) for k, task in enumerate(tasks)])
    found = Vectorized().run(bench, [own(task, k) for k, task in enumerate(tasks_of()[1])])
    for a, b in zip(expected, found, strict=True):
        assert helpers.close(a.result.model.params, b.result.model.params, 1e-10)
    assert not alone


def towards(gradients: Params, theta: Params, ctx: Mapping[str, Any]) -> Params:
    scale, factor = ctx["scale"]
    length = P.norm(gradients)  # of one client, not of all
    return {n: g / length + factor * scale * (theta[n] - ctx["received"][n]) for n, g in gradients.items()}


def test_numbers_that_differ_between_clients_keep_them_apart(alone: list[int]) -> None:
    bench, tasks = tasks_of()
    found = [replace(task, job=replace(task.job, loss=scaled, ctx={"by": float(k)})) for k, task in enumerate(tasks)]
    Vectorized().run(bench, found)
    assert sorted(alone) == list(range(6))


def scaled(apply: Apply, theta: Params, params: Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
    return F.cross_entropy(apply(params, batch.x), batch.y) * ctx["by"]


def test_jobs_of_different_kinds_are_different_groups(alone: list[int]) -> None:
    bench, tasks = tasks_of()
    other = SGD(lr=0.01, batch_size=5)
    mixed = [
        replace(task, work=other, steps=other.count(len(task.rows))) if k % 2 else task for k, task in enumerate(tasks)
    ]
    expected = Sequential().run(bench, mixed)
    found = Vectorized().run(bench, [replace(task) for task in mixed])
    assert [o.result.participant for o in found] == list(range(6))
    for a, b in zip(expected, found, strict=True):
        assert helpers.close(a.result.model.params, b.result.model.params, 1e-10)
    assert not alone


def test_little_memory_makes_several_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    together = vectorized.lock_step

    def spied(bench: Any, tasks: Any) -> list[Outcome]:
        sizes.append(len(tasks))
        return together(bench, tasks)

    monkeypatch.setattr(vectorized, "lock_step", spied)
    monkeypatch.setattr(vectorized, "MIB", 2**14)
    check(executor=Vectorized(memory_mb=10))
    assert sum(sizes) >= 5
    assert 1 < max(sizes) < 6


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_without_memory_the_group_is_halved_and_it_says_so(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    step = lock_step.LockStep.step

    def greedy(self: Any, share: Any, *rest: Any) -> None:
        step(self, share, *rest)
        if len(self.tasks) > 3:
            raise error

    monkeypatch.setattr(lock_step.LockStep, "step", greedy)
    executor = Vectorized()
    check(executor=executor)
    assert executor.told() == ["no memory for 6 clients at once; trying 3; see executor.memory_mb"]
    assert executor.told() == []


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("a mistake of the user's")

    with pytest.raises(RuntimeError, match="a mistake of the user's"):
        check(loss=broken)


class Scaled(nn.Module):
    """With a single number among its parameters and its buffers."""

    def __init__(self, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(16, classes), nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.layer(x.flatten(1)) + self.shift
        return logits


def test_single_numbers_are_tensors_too(alone: list[int]) -> None:
    check("~model", f"+model={{_target_: {__name__}.Scaled}}", "client_optimizer.clip_norm=0.1")
    assert not alone


def test_a_client_that_diverges_is_seen_among_others() -> None:
    bench, tasks = tasks_of()
    start = tasks[0].job.start
    broken = start._replace(params={name: tensor * torch.inf for name, tensor in start.params.items()})
    tasks[2] = replace(tasks[2], job=replace(tasks[2].job, start=broken))
    outcomes = Vectorized().run(bench, tasks)
    assert [outcome.finite for outcome in outcomes] == [True, True, False, True, True, True]
    assert outcomes[0].result.model.params.keys() == start.params.keys()


# -- dense nets ------------------------------------------------------------------------------------------------------


class Written(nn.Module):
    """With functions and methods in place of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(torch.tanh(F.relu(self.first(x.flatten(1)))).sigmoid())
        return logits


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return x + self.layer(x)


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1))
        return logits if x.shape[1] == 1 else logits * 2


def tied() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 8))
    net[2].weight = net[1].weight
    return net


def with_a_spare() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    net.register_parameter("spare", nn.Parameter(torch.zeros(2)))
    return net


class Trains(nn.Module):
    """Does something else in training, and is looked at when it was last evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1))
        return 2 * logits if self.training else logits


def with_a_hook() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    net[1].register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))
    return net


def one_layer_twice() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)


CHAINS = {
    "relu": nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),
    "others": nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(8, 5), nn.GELU(), nn.Identity(), nn.Linear(5, 3)),
    "in place, no bias": nn.Sequential(
        nn.Flatten(), nn.Linear(8, 5, bias=False), nn.ReLU(inplace=True), nn.Linear(5, 3)
    ),
    "several rows an example": nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)),
    "functions": Written(),
}
OTHERS = {
    "used twice": Twice(),
    "one layer twice": one_layer_twice(),
    "tied weights": tied(),
    "a parameter that no layer has": with_a_spare(),
    "traceable but unknown": nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)),
    "flattens otherwise": nn.Sequential(nn.Flatten(2), nn.Linear(8, 3), nn.Flatten(), nn.Linear(3, 3)),
    "looks at shapes": Looks(),
    "other in training": Trains(),
    "a hook before a layer": with_a_hook(),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_written_out_passes_of_a_chain_of_dense_layers(name: str) -> None:
    net = CHAINS[name].double()
    layers = chain(net)
    assert layers is not None
    rng = np.random.default_rng(0)
    params = {n: torch.from_numpy(rng.standard_normal((3, *p.shape))) for n, p in net.named_parameters()}
    x = torch.from_numpy(rng.standard_normal((3, 5, 1, 2, 4)))
    upstream = torch.from_numpy(rng.standard_normal((3, 5, 3)))
    tape = layers.forward(params, x)
    found = layers.gradients(params, tape, upstream)
    stepped = P.clone(params)
    rates = {n: 0.1 * (i + 1) for i, n in enumerate(params)}
    layers.descend(stepped, layers.forward(stepped, x), upstream, rates, weight_decay=0.2)
    for k in range(3):
        own = {n: tensor[k].clone().requires_grad_() for n, tensor in params.items()}
        logits = run_net(net, own, {}, x[k].clone())
        assert torch.allclose(tape[-1].after[k], logits, rtol=0, atol=1e-12)
        expected = torch.autograd.grad((logits * upstream[k]).sum(), list(own.values()))
        for (n, tensor), grad in zip(own.items(), expected, strict=True):
            assert torch.allclose(found[n][k], grad, rtol=0, atol=1e-12)
            after = (1 - rates[n] * 0.2) * tensor - rates[n] * grad
            assert torch.allclose(stepped[n][k], after, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_more_than_a_chain_of_dense_layers_is_left_to_autograd(name: str) -> None:
    training = OTHERS[name].training
    assert chain(OTHERS[name]) is None
    assert OTHERS[name].training == training


def test_a_rule_of_ones_own_is_not_taken_for_plain_descent() -> None:
    class Signs(SGD):
        def update(self, theta: Params, grads: Params, state: Any, lrs: Mapping[str, float]) -> None:
            super().update(theta, {name: grad.sign() for name, grad in grads.items()}, state, lrs)

    assert SGD(weight_decay=0.1).is_plain
    assert not (Signs().is_plain or SGD(momentum=0.5).is_plain or Adam().is_plain)
    check(work=Signs(lr=0.01))


# -- convolutional nets ----------------------------------------------------------------------------------------------


def pooled(*stages: nn.Module, dense: tuple[nn.Module, ...]) -> nn.Module:
    return nn.Sequential(*stages, nn.Flatten(), *dense)


CONVOLUTIONAL = {
    "pooling and a hidden layer": pooled(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), dense=(nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3))
    ),
    "normalised, no bias": pooled(
        nn.Conv2d(2, 4, 3, padding="same", bias=False),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        dense=(nn.Linear(4, 3, bias=False),),
    ),
    "groups, strides and gaps": pooled(
        nn.Conv2d(2, 4, (2, 3), stride=(1, 2), groups=2),
        nn.GroupNorm(4, 4, affine=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 2, 2, dilation=(2, 1)),
        nn.AvgPool2d(1),
        dense=(nn.Linear(2, 3),),
    ),
}
LEFT_TO_VMAP = {
    "dense alone": nn.Sequential(nn.Flatten(), nn.Linear(48, 3)),
    "pooling alone": pooled(nn.MaxPool2d(2), dense=(nn.Linear(12, 3),)),
    "pads with itself": pooled(nn.Conv2d(2, 1, 3, padding=1, padding_mode="circular"), dense=(nn.Linear(24, 3),)),
    "batch norm": pooled(nn.Conv2d(2, 1, 1), nn.BatchNorm2d(1), dense=(nn.Linear(24, 3),)),
    "dense over columns": pooled(nn.Conv2d(2, 1, 1), nn.Linear(6, 6), dense=(nn.Linear(24, 3),)),
    "not flattened": nn.Sequential(nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1)),
    "one convolution twice": pooled(*[nn.Conv2d(2, 2, 1)] * 2, dense=(nn.Linear(48, 3),)),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_channels_of_all_clients_side_by_side(name: str) -> None:
    net = CONVOLUTIONAL[name].double()
    layers = grouped(net)
    assert layers is not None
    rng = np.random.default_rng(0)
    params = {
        n: torch.from_numpy(rng.standard_normal((3, *p.shape))).requires_grad_() for n, p in net.named_parameters()
    }
    x = torch.from_numpy(rng.standard_normal((3, 5, 2, 4, 6)))
    upstream = torch.from_numpy(rng.standard_normal((3, 5, 3)))
    logits = layers.forward(params, x)
    found = dict(zip(params, torch.autograd.grad(logits, list(params.values()), upstream), strict=True))
    for k in range(3):
        own = {n: tensor[k].detach().clone().requires_grad_() for n, tensor in params.items()}
        expected = run_net(net, own, {}, x[k].clone())
        assert torch.allclose(logits[k], expected, rtol=0, atol=1e-12)
        grads = torch.autograd.grad(expected, list(own.values()), upstream[k])
        for (n, _), grad in zip(own.items(), grads, strict=True):
            assert torch.allclose(found[n][k], grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LEFT_TO_VMAP)
def test_what_is_more_than_convolutions_and_dense_layers_is_left_to_vmap(name: str) -> None:
    assert grouped(LEFT_TO_VMAP[name]) is None


def test_such_nets_are_not_run_under_vmap(alone: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.func, "vmap", None)
    line = ("model=cnn", "model.channels=[4,4]", "client_optimizer.momentum=0.9", "augmentation=mixup")
    once, again = check(*line), check(*line)
    assert not alone
    assert all(
        helpers.identical(a.result.model.params, b.result.model.params) for a, b in zip(once, again, strict=True)
    )
