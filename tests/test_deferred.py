"""Models that lock-step leaves as a start and products: what reads them, what does not, and when they are not left so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import helpers
import local_helpers
import pytest
import torch
from torch import Tensor, nn

from hybridfl import params as P
from hybridfl.assignment import task_of
from hybridfl.checkpoints import pack, unpack
from hybridfl.costs import returned
from hybridfl.deferred import Product, Stack, pieces, written
from hybridfl.executors.sequential import Sequential
from hybridfl.executors.vectorized import Vectorized
from hybridfl.experiment import packed, unpacked
from hybridfl.local import Outcome, Task
from hybridfl.methods.fedavg import FedAvg
from hybridfl.optimizers import SGD
from hybridfl.probes import mean_loss
from hybridfl.types import Job, Model, Results

WIDE = ("clients.number=6", "partitioning.alpha=0.5", "dataset.train=80", "dataset.shape=[1,8,8]")
WIDE += ("client_optimizer.epochs=1", "model.hidden=[24]", "client_optimizer.batch_size=7")
"""A first layer with room for three batches, and clients with up to as many."""


def tasks_of(*overrides: str, **job: Any) -> tuple[Any, list[Task]]:
    federation = helpers.plan("baseline=fedavg", *WIDE, *overrides).federation
    start = federation.fresh_model()
    jobs = [Job(k, start, **job) for k in range(6)]
    return federation.bench, [task_of(federation, one, 0, 3, 0) for one in jobs]


def outcomes(*overrides: str, **job: Any) -> list[Outcome]:
    return Vectorized().run(*tasks_of(*overrides, **job))


def results(found: Sequence[Outcome]) -> Results:
    return Results(outcome.result for outcome in found)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_stack_of_products_has_the_sums_and_the_mean_of_what_is_written_out() -> None:
    start, bias = random(5, 7), random(3, 5)
    products = [Product(random(3, 5, 2), random(3, 2, 7), -0.1), Product(random(2, 5, 4), random(2, 4, 7), 0.3)]
    expected = start + torch.zeros(3, 5, 7, dtype=torch.float64)
    for left, right, rate in products:
        expected[: len(left)] += rate * left @ right
    assert torch.allclose(written(start, products, 3), expected, rtol=0, atol=1e-14)
    stack = Stack({"w": start.expand(3, 5, 7), "b": bias}, {"w": products})
    merged = stack.weighted([0.5, 0.0, 0.25])
    assert not stack.is_written
    assert torch.allclose(merged["w"], (expected * torch.tensor([0.5, 0, 0.25]).view(-1, 1, 1)).sum(0), atol=1e-14)
    assert torch.allclose(merged["b"], 0.5 * bias[0] + 0.25 * bias[2], atol=1e-14)
    models = stack.models()
    assert stack.is_written
    assert all(torch.equal(models[k]["b"], bias[k]) for k in range(3))
    assert torch.allclose(torch.stack([model["w"] for model in models]), expected, atol=1e-14)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_two_threads_share_a_product_in_two_pieces() -> None:
    assert [pieces(rows, torch.device("cpu")) for rows in (42, 7)] == [2, 1]
    assert pieces(42, torch.device("meta")) == 1
    expected = results(Sequential().run(*tasks_of()))
    assert helpers.close(results(outcomes()).mean().params, expected.mean().params)


@pytest.mark.parametrize("stacks", [1, 2])
def test_a_mean_writes_nothing_out_and_is_that_of_the_models(stacks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vectorized, "_together", lambda *_: 6 // stacks)
    bench, tasks = tasks_of()
    assert {task.steps for task in tasks} == {1, 2, 3}
    expected, found = results(Sequential().run(bench, tasks)), results(outcomes())
    uploads = [returned(task.job, result) for task, result in zip(tasks, found, strict=True)]
    for chosen in (slice(0, 6), slice(1, 5)):  # some are lost on their way
        merged = Results(found[chosen]).mean()
        assert helpers.close(merged.params, Results(expected[chosen]).mean().params)
        assert helpers.close(
            Results(found[chosen]).mean("uniform").params, Results(expected[chosen]).mean("uniform").params
        )
        assert merged.buffers == {}
    assert all(result.deferred for result in found)
    assert uploads == [returned(task.job, result) for task, result in zip(tasks, expected, strict=True)]
    for one, other in zip(expected, found, strict=True):
        assert helpers.close(one.model.params, other.model.params)
        assert helpers.close(one.delta, other.delta)
        assert other.deferred is None
    assert helpers.close(found.mean().params, expected.mean().params)


def test_results_of_which_one_has_been_read_are_averaged_as_tensors() -> None:
    found = results(outcomes())
    assert found[0].model.params["body.1.weight"].shape == (24, 64)
    merged = found.mean().params
    assert not any(result.deferred for result in found)
    assert helpers.identical(merged, P.mean([r.model.params for r in found], found.weights()))


@pytest.mark.parametrize(
    ("line", "job"),
    [
        (["model.hidden=[6]"], {"steps": 1}),  # more rows than outputs
        (["client_optimizer.epochs=3"], {}),
        (["client_optimizer.momentum=0.9"], {}),
        (["client_optimizer.weight_decay=0.1"], {}),
        (["client_optimizer.clip_norm=0.1"], {}),
        (["client_optimizer=adam"], {}),
        ([], {"probes": {"loss": mean_loss}}),
        ([], {"grad": lambda grads, theta, ctx: grads}),
    ],
)
def test_what_is_written_out_at_once(line: list[str], job: Any) -> None:
    found = outcomes(*line, **job)
    assert not any(outcome.result.deferred for outcome in found)
    for one, other in zip(Sequential().run(*tasks_of(*line, **job)), found, strict=True):
        assert helpers.close(one.result.model.params, other.result.model.params, 1e-10)


def test_clients_that_start_from_models_of_their_own_are_written_out() -> None:
    bench, tasks = tasks_of()
    other = Model(P.clone(tasks[0].job.start.params), {})
    tasks[3] = replace(tasks[3], job=replace(tasks[3].job, start=other))
    assert not any(outcome.result.deferred for outcome in Vectorized().run(bench, tasks))


@pytest.mark.parametrize("augmented", [False, True])
def test_of_a_stack_with_a_client_that_diverged_the_others_are_whole(augmented: bool) -> None:
    line = ["augmentation=standard", "augmentation.crop=0", "augmentation.flip=0.0"] if augmented else []
    bench, tasks = tasks_of(*line)
    sick = replace(bench, x=bench.x.clone())
    sick.x[tasks[2].rows[0]] = torch.inf
    found = Vectorized().run(sick, tasks)
    assert [outcome.finite for outcome in found] == [k != 2 for k in range(6)]
    kept = Results(outcome.result for k, outcome in enumerate(found) if k != 2)
    assert P.all_finite(kept.mean())
    healthy = [outcome.result for k, outcome in enumerate(outcomes(*line)) if k != 2]
    assert helpers.close(kept.mean().params, Results(healthy).mean().params)


class Late(FedAvg):
    """Averages whatever arrives."""

    asynchronous = True


def test_late_results_are_written_out_as_a_checkpoint_would_have_them() -> None:
    line = ("baseline=fedbuff", "clients.per_round=3", "clients.delay=2", "rounds=6", "executor=vectorized")
    played = helpers.plan(*WIDE, *line)
    seen = helpers.snapshots(helpers.engine_of(played, Late()))
    flights = [flight.result for snapshot in seen for flight in snapshot.in_flight if flight.result]
    assert flights
    assert not any(result.deferred for result in flights)
    again = helpers.engine_of(played, Late())
    whole = unpack(pack(packed(seen[3])))
    assert helpers.identical(again.step(unpacked(whole))[0].state, seen[4].state)


def test_a_net_of_one_layer_without_bias_can_be_nothing_but_products() -> None:
    bench = local_helpers.bench(nn.Sequential(nn.Flatten(), nn.Linear(4, 12, bias=False)))
    tasks = [local_helpers.task(bench, SGD(lr=0.1, batch_size=10, epochs=1), seed=k) for k in range(3)]
    tasks = [replace(task, job=replace(task.job, start=tasks[0].job.start)) for task in tasks]
    expected = [local_helpers.task(bench, SGD(lr=0.1, batch_size=10, epochs=1), seed=k) for k in range(3)]
    found = results(Vectorized().run(bench, tasks))
    assert all(result.deferred for result in found)
    for one, other in zip(results(Sequential().run(bench, expected)), found, strict=True):
        assert helpers.close(one.model.params, other.model.params)
