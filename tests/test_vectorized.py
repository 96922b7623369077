"""The executor that works in lock-step: what it does together, what it does not, and what it does without memory.

That all methods give the numbers of the sequential executor is in tests/test_executors.py; the passes it has
for dense and for convolutional nets are in tests/test_stacked.py and tests/test_grouped.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl import params as P
from hybridfl.assignment import task_of
from hybridfl.executors import lock_step, vectorized
from hybridfl.executors.sequential import Sequential
from hybridfl.executors.vectorized import Vectorized
from hybridfl.local import Outcome, Task
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


def test_a_rule_of_ones_own_is_not_taken_for_plain_descent() -> None:
    class Signs(SGD):
        def update(self, theta: Params, grads: Params, state: Any, lrs: Mapping[str, float]) -> None:
            super().update(theta, {name: grad.sign() for name, grad in grads.items()}, state, lrs)

    assert SGD(weight_decay=0.1).is_plain
    assert not (Signs().is_plain or SGD(momentum=0.5).is_plain or Adam().is_plain)
    check(work=Signs(lr=0.01))


def test_such_nets_are_not_run_under_vmap(alone: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutional ones, see tests/test_grouped.py."""
    monkeypatch.setattr(torch.func, "vmap", None)
    line = ("model=cnn", "model.channels=[4,4]", "client_optimizer.momentum=0.9", "augmentation=mixup")
    once, again = check(*line), check(*line)
    assert not alone
    assert all(
        helpers.identical(a.result.model.params, b.result.model.params) for a, b in zip(once, again, strict=True)
    )
