"""Streams of tasks: which classes are on when, who sees them, and how they are scored."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_helpers import done, rows
from hypothesis import given
from hypothesis import strategies as st

from hybridfl.data.classes import only_classes
from hybridfl.data.dataset import Dataset, Examples
from hybridfl.errors import ConfigError
from hybridfl.evaluation import Evaluation, Evaluator
from hybridfl.local import only
from hybridfl.methods.base import Facts
from hybridfl.methods.fedavg import FedAvg
from hybridfl.tasks import Tasks
from hybridfl.types import Job, Model, Served, View

STREAM = ("dataset.classes=6", "tasks.number=3", "rounds=7", "baseline=fedavg", "partitioning=iid", "server_data=none")


@given(classes=st.integers(1, 40), number=st.integers(1, 40), rounds=st.integers(1, 60), seed=st.integers(0, 9))
def test_every_class_is_in_one_task_and_every_task_has_rounds(classes, number, rounds, seed) -> None:
    if number > min(classes, rounds):
        with pytest.raises(ConfigError, match=f"nearest: {classes if number > classes else rounds}"):
            Tasks(number).stream(classes, rounds, seed)
        return
    stream = Tasks(number, order="shuffled").stream(classes, rounds, seed)
    assert sorted(label for group in stream.classes for label in group) == list(range(classes))
    sizes = [len(group) for group in stream.classes]
    assert max(sizes) - min(sizes) <= 1
    order = [stream.at(round) for round in range(rounds)]
    lengths = np.bincount(order, minlength=number)
    assert order == sorted(order)
    assert lengths.max() - lengths.min() <= 1
    assert [r for r in range(rounds) if stream.begins(r)] == np.searchsorted(order, np.arange(number)).tolist()
    assert sum(stream.ends(r) for r in range(rounds)) == number
    assert all(stream.ends(r) == (r == rounds - 1 or stream.begins(r + 1)) for r in range(rounds))


def test_what_a_view_covers() -> None:
    stream = Tasks(3).stream(6, 6, 0)
    assert stream.classes == ((0, 1), (2, 3), (4, 5))
    assert stream.labels("current", 2) == (2, 3)
    assert stream.labels("seen", 2) == (0, 1, 2, 3)
    assert stream.labels("all", 2) == (0, 1, 2, 3, 4, 5)
    assert stream.labels(0, 5) == (0, 1)
    assert stream.labels("current", 99) == (4, 5)
    with pytest.raises(ValueError, match="no task 3: they are 0 to 2"):
        stream.labels(3, 0)
    assert Tasks().stream(6, 6, 0).labels("current", 2) is None


def test_every_client_has_examples_of_every_task_and_keeps_one_for_training() -> None:
    plan = helpers.plan(
        "dataset.classes=6", "tasks.number=3", "partitioning.alpha=0.01", "clients.validation=0.9", "rounds=7"
    )
    federation, y = plan.federation, plan.federation.pool.y
    for client in range(5):
        for number, classes in enumerate(federation.tasks.classes):
            rows = federation.rows(client, View(tasks=number)).numpy()
            assert len(rows)
            assert set(y[rows]) <= set(classes)
            np.testing.assert_array_equal(rows, [i for i in federation.owned(client) if y[i] in classes])


class Watching(Facts):
    """Trains nothing; keeps what the rounds looked like."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool, bool]] = []

    def init(self, federation):
        return {"global": federation.fresh_model()}

    def round(self, state, now):
        self.seen.append((now.task, now.first_of_task, now.last_of_task))
        yield [Job(now.clients[0], state["global"], steps=0)]
        return state

    def serve(self, state, participant, width=None):
        return [Served(state["global"])]


def test_a_round_knows_its_task() -> None:
    method = Watching()
    helpers.snapshots(helpers.engine_of(helpers.plan(*STREAM), method))
    first, last, middle = (True, False), (False, True), (False, False)
    assert method.seen == [
        (0, *first), (0, *middle), (0, *last), (1, *first), (1, *last), (2, *first), (2, *last),
    ]  # fmt: skip


def test_local_work_sees_the_tasks_examples_and_logits_alone() -> None:
    """One full-batch step of a client is a step of cross-entropy over the two classes of its task."""
    plan = helpers.plan(*STREAM, "client_optimizer.steps=1", "client_optimizer.batch_size=500")
    federation, start = plan.federation, plan.federation.start
    engine = helpers.engine_of(plan, FedAvg())
    snapshot = engine.begin()
    for _ in range(4):
        before, snapshot = snapshot, engine.step(snapshot)[0]
    task = federation.tasks.at(3)
    assert task == 1
    classes = list(federation.tasks.classes[task])
    cohort = [arrival.client for arrival in engine.schedule.born(3)]
    updates, sizes = [], []
    for client in cohort:
        rows = federation.rows(client, View(), 3)
        leaves = {n: t.clone().requires_grad_() for n, t in before.state["global"].params.items()}
        out = torch.func.functional_call(federation.net, leaves, (federation.bench.x[rows],))[:, classes]
        loss = F.cross_entropy(out, federation.bench.y[rows] - classes[0])
        grads = torch.autograd.grad(loss, list(leaves.values()))
        updates.append({n: t.detach() - 0.1 * g for (n, t), g in zip(leaves.items(), grads, strict=True)})
        sizes.append(len(rows))
    expected = {n: sum(s * u[n] for s, u in zip(sizes, updates, strict=True)) / sum(sizes) for n in start.params}
    assert helpers.close(snapshot.state["global"].params, expected, 1e-12)
    old = [label for label in range(6) if label not in classes]
    moved = snapshot.state["global"].params["head.weight"] - before.state["global"].params["head.weight"]
    assert moved[old].abs().max() < 1e-15
    assert moved[classes].any()


def test_without_the_mask_other_classes_are_pushed_down() -> None:
    plan = helpers.plan(*STREAM, "tasks.mask=false", "client_optimizer.steps=1")
    snapshots = helpers.snapshots(helpers.engine_of(plan, FedAvg(), rounds=1))
    moved = snapshots[1].state["global"].params["head.bias"] - snapshots[0].state["global"].params["head.bias"]
    assert (moved[2:] < 0).all()


def test_excluded_logits_have_no_probability_and_no_gradient() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    masked = only(logits, torch.tensor([1, 3]))
    assert torch.equal(masked[:, [1, 3]], logits[:, [1, 3]])
    probabilities = masked.softmax(1)
    assert torch.allclose(probabilities[:, [1, 3]], logits[:, [1, 3]].softmax(1), atol=1e-15)
    F.kl_div(masked.log_softmax(1), probabilities.detach(), reduction="batchmean").backward()
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:, [0, 2, 4]].any()


def test_scores_over_the_classes_seen_so_far() -> None:
    plan = helpers.plan(*STREAM)
    federation = plan.federation
    x, y = federation.test
    model = federation.fresh_model()
    out = torch.func.functional_call(federation.net, model.params, (x,)).detach()
    evaluator = Evaluator(federation, Watching(), Evaluation())
    for done_rounds, number in ((3, 1), (5, 2), (7, 3)):
        found = {row["scope"]: row for row in evaluator.score({"global": model}, done_rounds, False).rows}
        seen = list(range(2 * number))
        right = (out[:, seen].argmax(1) == y) & (y < 2 * number)
        assert found["global"]["accuracy"] == pytest.approx(right.sum().item() / (y < 2 * number).sum().item())
        by_task = [(right & (y // 2 == t)).sum().item() / (y // 2 == t).sum().item() for t in range(number)]
        assert [found[f"global/task={t}"]["accuracy"] for t in range(number)] == pytest.approx(by_task)
        assert f"global/task={number}" not in found
        assert found["global/tasks"]["accuracy"] == pytest.approx(np.mean(by_task))
        assert found["clients"]["examples"] == sum(
            int((y[index] < 2 * number).sum()) for index in federation.split.clients_test
        )


def test_a_run_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = done("dataset=synthetic", "dataset.train=300", "tasks.number=5", "rounds=5", "clients.number=4",
               "clients.per_round=2", "baseline=fedavg", "client_optimizer.steps=2", "ui=none")  # fmt: skip
    scopes = [row["scope"] for row in rows(run / "metrics.csv") if row["round"] == "5"]
    assert [scope for scope in scopes if scope.startswith("global")] == [
        "global", *(f"global/task={t}" for t in range(5)), "global/tasks",
    ]  # fmt: skip
    assert len(json.loads((run / "split.json").read_text())["clients"]) == 4


def numbered(classes: int, per_class: int) -> Dataset:
    y = np.arange(classes * per_class) % classes
    part = Examples(y.astype(np.float32).reshape(-1, 1, 1, 1), y)
    return Dataset("numbered", part, part, classes, (0.0,), (1.0,))


@pytest.mark.parametrize(("chosen", "kept"), [((3, 1), [1, 3]), ("0-2", [0, 1, 2]), ("1,4-5", [1, 4, 5])])
def test_part_of_the_classes_renumbered(chosen, kept) -> None:
    found = only_classes(numbered(6, 3), chosen)
    assert found.classes == len(kept)
    for part in (found.train, found.test):
        assert len(part) == 3 * len(kept)
        np.testing.assert_array_equal(np.array(kept)[part.y], part.x.reshape(-1))
        np.testing.assert_array_equal(part.domain, 0)


@pytest.mark.parametrize(
    ("chosen", "problem"),
    [((6,), "got 6: .* 0 to 5"), ("0-9", "got 6"), ((2,), "two classes"), ("a-b", "ranges such as"), ("1-", "ranges")],
)
def test_classes_that_are_not_there(chosen, problem) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        only_classes(numbered(6, 3), chosen)
    assert caught.value.key == "classes"


def test_reading_test_data_is_refused_to_those_who_are_no_upper_bound() -> None:
    class Peeking(Watching):
        def round(self, state, now):
            (result,) = yield [Job(0, state["global"], view=View(split="test"), steps=0)]
            return {"global": Model(state["global"].params, {}), "examples": result.examples}

    plan = helpers.plan("baseline=fedavg")
    with pytest.raises(Exception, match="reads test data without upper_bound"):
        helpers.snapshots(helpers.engine_of(plan, Peeking()))
    method = Peeking()
    method.upper_bound = True
    plan.federation.reads_test = True
    after = helpers.snapshots(helpers.engine_of(plan, method))[-1]
    assert after.state["examples"] == len(plan.federation.split.clients_test[0])
    rows = plan.federation.rows(0, View(split="test"))
    assert torch.equal(plan.federation.bench.y[rows], plan.federation.test[1][plan.federation.split.clients_test[0]])
