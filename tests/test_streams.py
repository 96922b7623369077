"""Streams of tasks: who has examples of every task, what is refused otherwise, joint training, personal models."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import run_helpers
from partition_helpers import unread

from hybridfl.data.dataset import Dataset, Examples
from hybridfl.data.partition_domains import Domains
from hybridfl.data.partitioning import IID
from hybridfl.data.server_data import NoServerData
from hybridfl.data.split import Drawn, draw_split
from hybridfl.engine import Unsuitable
from hybridfl.errors import ConfigError
from hybridfl.evaluation import Evaluation, Evaluator
from hybridfl.tasks import Tasks
from hybridfl.types import SERVER, View

TASKS = ("tasks.number=3", "rounds=6", "dataset.classes=6")
STREAM = (*TASKS, "server_data.examples=24")


# -- who has what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "partitioning",
    [
        *(("dirichlet", "partitioning.alpha=0.05"), ("dirichlet_mix", "partitioning.alpha=0.05"), ("quantity",)),
        *(("iid",), ("shards",), ("classes", "partitioning.per_client=1")),
    ],
)
def test_every_client_has_examples_of_each_of_ten_tasks(partitioning: tuple[str, ...]) -> None:
    name, *options = partitioning
    data = ("dataset.classes=20", "dataset.train=600", "tasks.number=10", "rounds=10", "clients.number=10")
    plan = helpers.plan(*data, "baseline=fedavg", "clients.validation=0.4", f"partitioning={name}", *options)
    sizes = np.array([plan.federation.by_task(client) for client in range(10)])
    assert sizes.shape == (10, 10)
    assert sizes.min() >= 1
    assert sizes.sum(1).tolist() == [plan.federation.examples(client) for client in range(10)]


def refused(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        helpers.plan(*TASKS, *overrides)
    return caught.value


def test_a_file_that_leaves_a_client_without_a_task_is_refused(tmp_path: Path) -> None:
    y = helpers.plan(*STREAM, "baseline=fedavg").drawn.dataset.train.y
    file = tmp_path / "split.json"
    line = ("baseline=fedavg", "partitioning=file", f"partitioning.path={file}", "partitioning.complete=false")
    more = ("clients.number=2", "clients.per_round=2", "server_data=none")
    file.write_text(json.dumps([np.flatnonzero(y < 4).tolist(), np.flatnonzero(y > 4).tolist()]))
    error = refused(*line, *more)
    assert str(error) == (
        "tasks.number: got 3, but task 0 (classes 0, 1) has no training example of client 1, and each needs one or more; "
        "choose fewer tasks (1 always fits) or another partitioning."
    )
    helpers.plan("dataset.classes=6", *line, *more)
    positions = np.arange(len(y))
    file.write_text(json.dumps([positions[positions // 6 % 2 == part].tolist() for part in range(2)]))
    helpers.plan(*TASKS, *line, *more)


def domains(shares: dict[str, list[int]], classes: int = 4) -> Dataset:
    """A data set whose domains have so many examples of each class."""
    y = np.concatenate([np.repeat(np.arange(classes), sizes) for sizes in shares.values()])
    domain = np.concatenate([np.full(sum(sizes), d) for d, sizes in enumerate(shares.values())])
    part = Examples(np.zeros((len(y), 1, 1, 1), np.uint8), y, domain)
    return Dataset("several", part, part, classes, (0.0,), (1.0,), tuple(shares))


def draw(data: Dataset, partitioning: Any, number: int = 2) -> Drawn:
    stream = Tasks(number).stream(data.classes, 4, 0)
    return draw_split(data, partitioning, NoServerData(), 6, 0.0, 1, 0, unread, stream)


@pytest.mark.parametrize("clients", ["equal", "proportional", (1, 5)])
def test_a_client_has_the_same_domain_in_every_task(clients: Any) -> None:
    # By proportions, five of six clients would belong to the first domain in one task and one in the other.
    drawn = draw(domains({"a": [50, 50, 10, 10], "b": [10, 10, 50, 50]}), Domains(IID(), clients))
    owners = np.array(drawn.split.domain_counts)
    assert ((owners > 0).sum(1) == 1).all()
    assert np.count_nonzero(owners[:, 0]) == (1 if clients == (1, 5) else 3)
    assert owners.sum() == 240


def test_a_domain_without_examples_of_a_task_is_refused() -> None:
    data = domains({"a": [9, 9, 9, 9], "b": [9, 9, 0, 0]})
    with pytest.raises(ConfigError, match=r"task 1 \(classes 2, 3\) has no training example of domain 1") as caught:
        draw(data, Domains(IID()))
    assert caught.value.key == "tasks.number"
    draw(data, Domains(IID()), number=1)
    draw(data, IID())
    with pytest.raises(ConfigError, match="expected 2 numbers with sum 6") as caught:
        draw(domains({"a": [9] * 4, "b": [9] * 4}), Domains(IID(), (1, 2)))
    assert caught.value.key == "partitioning.clients"


SERVERS_FIRST = "server_data.classes=[0,1]"


def test_a_server_without_examples_of_a_task_is_refused_where_it_works() -> None:
    for method in ("merging=feddle", "baseline=server_only", "baseline=fedavg_server_finetune"):
        error = refused(method, SERVERS_FIRST)
        assert isinstance(error, Unsuitable)
        assert str(error) == (
            f"server_data: the server has no training example of task 1 (classes 2, 3), and {method} needs some of every "
            "task; give it more examples or classes."
        )
    helpers.plan(*STREAM, "baseline=oracle", SERVERS_FIRST)
    helpers.plan(*STREAM, "baseline=fedavg", "start=server", SERVERS_FIRST)
    assert str(refused("baseline=fedavg", "start=server", "server_data.classes=[4,5]")) == (
        "start: got server, but the server has no training example of the first task; try random."
    )


def test_validation_examples_must_be_of_every_task() -> None:
    # The server has 4, 4 and 2 examples of the tasks; a fifth of 2 is rounded to none.
    heldout = (
        "dataset.classes=5",
        "server_data.examples=10",
        "merging.fallback.accept=heldout",
        "server_data.validation=0.2",
    )
    with pytest.raises(ConfigError) as caught:
        helpers.plan(*TASKS[:2], *heldout)
    error = caught.value
    assert str(error).startswith(
        "merging.fallback.accept: got heldout, but the server has no validation examples of a task"
    )
    helpers.plan(*heldout)
    grid = (
        "merging=optimal_averaging",
        "merging.estimator=grid",
        "clients.validation=0.05",
        "partitioning=iid",
        "server_data.examples=24",
    )
    error = refused(*grid)
    assert "a client has no examples in its 'val' part of a task; try estimator=pooled" in str(error)
    helpers.plan("dataset.classes=6", *grid)


# -- joint training --------------------------------------------------------------------------------------------------


def test_a_round_of_the_oracle_has_the_steps_of_a_cohort_on_its_task() -> None:
    for baseline in ("oracle", "joint"):
        # Tasks of two classes, two and one.
        line = ("dataset.classes=5", "tasks.number=3", "rounds=6", "dataset.train=150")
        plan = helpers.plan(*line, f"baseline={baseline}", "client_optimizer.epochs=2")
        federation = plan.federation
        engine, recorder = run_helpers.recorded(plan, 6)
        helpers.snapshots(engine)
        steps = [outcome.result.steps for outcome in recorder.outcomes]
        owners = [*range(5), SERVER]
        sizes = [sum(federation.by_task(k)[task] for k in owners) / 6 for task in range(3)]
        assert round(sizes[0]) > round(sizes[2])
        assert steps == [3 * 2 * math.ceil(round(sizes[task]) / 8) for task in (0, 0, 1, 1, 2, 2)]
        pool = np.concatenate([federation.owned(k) for k in owners])
        read = [outcome.result.examples for outcome in recorder.outcomes]
        whole = [len(pool)] * 6
        parts = [sum(federation.by_task(k)[task] for k in owners) for task in (0, 0, 1, 1, 2, 2)]
        assert read == (whole if baseline == "joint" else parts)


@pytest.mark.parametrize("tasks", ["seen", "all"])
def test_joint_training_is_central_training_with_all_its_classes(tasks: str) -> None:
    """Only classes of tasks that are not read are masked."""
    plan = helpers.plan(*STREAM, "baseline=joint", f"baseline.tasks={tasks}", "client_optimizer.momentum=0.9")
    federation = plan.federation
    pool = np.concatenate([federation.owned(k) for k in (*range(5), SERVER)])
    seen = helpers.snapshots(plan.engine())
    central = helpers.Central(federation, federation.start, lr=0.1, momentum=0.9)
    for t in range(6 if tasks == "all" else 0):
        work = dataclasses.replace(federation.work, steps=seen[t].state["steps"][t // 2])
        expected = central.train(helpers.job_batches(federation, work, pool, t, SERVER))
        assert helpers.close(seen[t + 1].state["global"].params, expected)
    # Of the first task nothing is known of other classes, unless all are read.
    moved = seen[2].state["global"].params["head.weight"] - federation.start.params["head.weight"]
    assert bool(moved[2:].any()) == (tasks == "all")
    assert moved[:2].any()
    later = seen[4].state["global"].params["head.weight"] - seen[2].state["global"].params["head.weight"]
    assert [bool(later[k : k + 2].any()) for k in (0, 2, 4)] == [True, True, tasks == "all"]


def test_without_a_stream_joint_training_is_the_oracle() -> None:
    oracle, joint = (helpers.snapshots(helpers.plan(f"baseline={name}").engine())[-1] for name in ("oracle", "joint"))
    assert helpers.identical(oracle.state, joint.state)
    assert oracle.costs == joint.costs


# -- personal models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, 5])
def test_personal_models_are_made_at_the_end_of_every_task(every: int | None) -> None:
    line = ("baseline=fedavg_local_finetune", *([f"baseline.every={every}"] if every else []))
    plan = helpers.plan(*STREAM, *line)
    seen = helpers.snapshots(plan.engine())
    made = [t for t, snapshot in enumerate(seen) if t and snapshot.state["personal"]]
    assert made == ([2, 4, 5, 6] if every else [2, 4, 6])
    alone = helpers.snapshots(helpers.plan("baseline=fedavg_local_finetune", "rounds=3").engine())
    assert [bool(snapshot.state["personal"]) for snapshot in alone[1:]] == [False, False, True]
    evaluator = Evaluator(plan.federation, plan.method, Evaluation())
    found = {row["scope"]: row["accuracy"] for row in evaluator.score(seen[2].state, 2, True).rows}
    assert "clients/model=global" in found


def test_mixing_weights_are_of_the_tasks_examples() -> None:
    plan = helpers.plan(*STREAM, "merging=optimal_averaging", "partitioning.alpha=0.3", "partitioning.min_examples=3")
    federation, state = plan.federation, plan.method.init(plan.federation)
    for task in range(3):
        sizes = [len(federation.rows(k, View(tasks=task))) for k in range(5)]
        assert state["sizes"][task] == sizes
        assert state["shares"][task] == pytest.approx([size / sum(sizes) for size in sizes])
    engine, recorder = run_helpers.recorded(plan, 2)
    helpers.snapshots(engine)
    jobs = [job for jobs in recorder.rounds for job in jobs if "kept" in job.ctx]
    assert jobs
    assert all(len(job.ctx["kept"]) == state["sizes"][0][job.participant] for job in jobs)
