"""Three accuracies by hand: nets that always say the same class, and whose test set that is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from hybridfl import scoring
from hybridfl.checkpoints import pack, unpack
from hybridfl.data.dataset import Examples
from hybridfl.evaluation import Evaluation, Evaluator, Scores
from hybridfl.federation import Federation
from hybridfl.methods.base import Facts
from hybridfl.plan import Plan
from hybridfl.types import SERVER, Job, Model, Results, Round, Served, State


def logits(federation: Federation, *values: float) -> Model:
    """A linear net that gives these logits whatever it sees."""
    weight = torch.zeros_like(federation.start.params["head.weight"])
    return Model({"head.weight": weight, "head.bias": torch.tensor(values, dtype=torch.float64)}, {})


class Deployed(Facts):
    """Serves what it is told, by participant."""

    def __init__(self, served: dict[int, list[Served]]) -> None:
        self.served = served

    def init(self, federation: Federation) -> State:
        return {}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        raise NotImplementedError
        yield

    def serve(self, state: State, participant: int) -> list[Served]:
        return self.served.get(participant, [])


@pytest.fixture(scope="module")
def plan() -> Plan:
    return helpers.plan("baseline=fedavg", "model.hidden=[]", "clients.validation=0.3", "server_data.validation=0.5")


def score(plan: Plan, served: dict[int, list[Served]], last: bool = True, **options: int) -> Scores:
    return Evaluator(plan.federation, Deployed(served), Evaluation(**options)).score({}, 1, last)


def rows(scores: Scores) -> dict[str, dict[str, Any]]:
    return {row["scope"]: row for row in scores.rows}


def one_hot(federation: Federation, label: int) -> Model:
    return logits(federation, *(float(c == label) for c in range(3)))


def share(labels: np.ndarray, label: int) -> float:
    return float((labels == label).mean())


def test_a_global_model_by_hand(plan: Plan) -> None:
    """Accuracies are class shares; the loss of logits (1, 0, 0) is log(e + 2) less 1 where the class is right."""
    federation = plan.federation
    model = [Served(one_hot(federation, 0))]
    found = score(plan, {k: model for k in (SERVER, *range(5))})
    by_scope = rows(found)
    assert list(by_scope) == ["global", "clients", "served", "validation"]
    y, own = federation.dataset.test.y, federation.split.clients_test
    assert by_scope["global"]["accuracy"] == pytest.approx(share(y, 0))
    assert by_scope["global"]["loss"] == pytest.approx(math.log(math.e + 2) - share(y, 0))
    assert by_scope["global"]["examples"] == by_scope["served"]["examples"] == 60
    each = [share(y[index], 0) for index in own]
    assert by_scope["clients"]["accuracy"] == pytest.approx(np.mean(each))
    assert by_scope["clients"]["loss"] == pytest.approx(math.log(math.e + 2) - np.mean(each))
    assert by_scope["clients"]["worst10"] == pytest.approx(min(each))
    assert by_scope["clients"]["spread"] == pytest.approx(np.std(each))
    assert by_scope["clients"]["examples"] == sum(map(len, own))
    assert by_scope["served"]["accuracy"] == pytest.approx(share(y, 0))
    assert by_scope["served"]["spread"] == 0
    assert [row["client"] for row in found.clients] == list(range(5))
    assert [row["accuracy"] for row in found.clients] == pytest.approx(each)
    assert [row["examples"] for row in found.clients] == [len(index) for index in own]
    assert found.accuracy() == by_scope["global"]["accuracy"]


def test_the_worst_tenth_is_rounded_up() -> None:
    plan = helpers.plan("baseline=fedavg", "model.hidden=[]", "clients.number=11")
    federation = plan.federation
    model = [Served(one_hot(federation, 2))]
    found = rows(score(plan, dict.fromkeys(range(11), model)))["clients"]
    y = federation.dataset.test.y
    each = sorted(share(y[index], 2) for index in federation.split.clients_test)
    assert each[0] < each[1]
    assert found["worst10"] == pytest.approx(np.mean(each[:2]))


def test_personal_models_by_hand(plan: Plan) -> None:
    federation = plan.federation
    weights = [[(1 + k) * (c == k % 3) for c in range(3)] for k in range(4)]
    served = {k: [Served(logits(federation, *weights[k]))] for k in range(4)}  # client 4 has none, nor has the server
    found = score(plan, served)
    by_scope = rows(found)
    y = federation.dataset.test.y
    each = [share(y[federation.split.clients_test[k]], k % 3) for k in range(4)]
    assert "global" not in by_scope
    assert by_scope["clients"]["accuracy"] == pytest.approx(np.mean(each))
    assert by_scope["served"]["accuracy"] == pytest.approx(np.mean([share(y, k % 3) for k in range(4)]))
    assert by_scope["served"]["spread"] == pytest.approx(np.std([share(y, k % 3) for k in range(4)]))
    # The classes of the test part are equally frequent, so it is the loss that tells the models apart.
    losses = [[math.log(np.exp(weights[k]).sum()) - weights[k][label] for label in y] for k in range(4)]
    assert by_scope["served"]["loss"] == pytest.approx(np.mean(losses))
    own = [np.mean(np.array(losses[k])[federation.split.clients_test[k]]) for k in range(4)]
    assert by_scope["clients"]["loss"] == pytest.approx(np.mean(own))
    assert [row["loss"] for row in found.clients] == pytest.approx(own)
    val = [federation.bench.y.numpy()[federation.owned(k, "val")] for k in range(4)]
    right = sum((labels == k % 3).sum() for k, labels in enumerate(val))
    assert by_scope["validation"]["accuracy"] == pytest.approx(right / sum(map(len, val)))
    assert by_scope["validation"]["examples"] == sum(map(len, val))
    assert [row["client"] for row in found.clients] == [0, 1, 2, 3]
    assert found.accuracy() == by_scope["clients"]["accuracy"]


def test_nothing_served_gives_no_rows(plan: Plan) -> None:
    found = score(plan, {})
    assert (found.rows, found.clients, found.accuracy()) == ([], [], None)


def test_an_ensemble_is_the_weighted_mean_of_logits(plan: Plan) -> None:
    federation = plan.federation
    a, b = logits(federation, 3.0, 0.0, 0.0), logits(federation, 0.0, 2.0, 0.0)
    y = federation.dataset.test.y
    for weights, winner in [((1.0, 1.0), 0), ((1.0, 3.0), 1), ((2.0, 6.0), 1)]:
        served = [Served(model, weight) for model, weight in zip((a, b), weights, strict=True)]
        found = rows(score(plan, {SERVER: served}))["global"]
        mixed = np.array([3 * weights[0], 2 * weights[1], 0]) / sum(weights)
        assert found["accuracy"] == pytest.approx(share(y, winner))
        expected = np.mean([math.log(np.exp(mixed).sum()) - mixed[label] for label in y])
        assert found["loss"] == pytest.approx(expected)


# -- validation ------------------------------------------------------------------------------------------------------


def test_validation_is_the_servers_and_else_the_clients(plan: Plan) -> None:
    federation = plan.federation
    labels = federation.bench.y.numpy()
    model = {k: [Served(one_hot(federation, 2))] for k in (SERVER, *range(5))}
    found = rows(score(plan, model))["validation"]
    server = federation.split.server_val
    assert (found["examples"], found["accuracy"]) == (6, pytest.approx(share(labels[server], 2)))
    other = helpers.plan("baseline=fedavg", "model.hidden=[]", "clients.validation=0.3")
    union = np.concatenate([other.federation.owned(k, "val") for k in range(5)])
    found = rows(score(other, model))["validation"]
    expected = share(other.federation.bench.y.numpy()[union], 2)
    assert (found["examples"], found["accuracy"]) == (len(union), pytest.approx(expected))
    assert "validation" not in rows(score(helpers.plan("baseline=fedavg", "model.hidden=[]"), model))


def test_validation_examples_are_not_trained_on(plan: Plan) -> None:
    split = plan.federation.split
    trained = np.concatenate([*split.clients_train, split.server_train])
    held = np.concatenate([*split.clients_val, split.server_val])
    assert sorted([*trained, *held]) == list(range(120))
    assert len(held) > 6


# -- what is run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def examples_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    predict = scoring.predict

    def counted(net: Any, model: Model, x: torch.Tensor, chunk: int) -> torch.Tensor:
        seen.append(len(x))
        return predict(net, model, x, chunk)

    monkeypatch.setattr(scoring, "predict", counted)
    return seen


def test_a_shared_model_is_run_once_over_the_test_part(plan: Plan, examples_run: list[int]) -> None:
    shared = logits(plan.federation, 1, 2, 3)
    # Equal tensors in dicts of their own are one model, as after a checkpoint was read.
    score(plan, {k: [Served(Model(dict(shared.params), {}))] for k in (SERVER, *range(5))})
    assert examples_run == [60, 6]  # the test part and the server's validation examples


def test_personal_models_are_run_where_they_are_needed(plan: Plan, examples_run: list[int]) -> None:
    federation = plan.federation
    own = [len(index) for index in federation.split.clients_test]
    held = [federation.examples(k, "val") for k in range(5)]
    personal = {k: [Served(logits(federation, k, 1, 0))] for k in range(5)}
    score(plan, personal, last=False, sample=2)
    assert examples_run == [*own, 60, 60, *held]
    examples_run.clear()
    score(plan, personal, last=False, sample=0)
    assert examples_run == [*own, *held]
    examples_run.clear()
    score(plan, personal, last=True, sample=2)
    assert examples_run == [*own, *[60] * 5, *held]


def test_models_that_only_differ_in_buffers_or_weight_are_two(plan: Plan, examples_run: list[int]) -> None:
    model = logits(plan.federation, 1, 0, 0)
    other = model._replace(params=model.params | {"head.bias": model.params["head.bias"].clone()})
    score(plan, {0: [Served(model), Served(other)], 1: [Served(model), Served(other, 2.0)]}, last=False, sample=0)
    own = [len(plan.federation.split.clients_test[k]) for k in (0, 1)]
    assert examples_run[:4] == [own[0]] * 2 + [own[1]] * 2


def test_a_sample_of_the_personal_models_is_keyed_by_the_round(plan: Plan) -> None:
    federation = plan.federation
    personal = {k: [Served(logits(federation, float(k), 1.5, 0))] for k in range(5)}
    evaluator = Evaluator(federation, Deployed(personal), Evaluation(sample=1))
    by_round = [rows(evaluator.score({}, t, False))["served"]["loss"] for t in range(20)]
    assert by_round == [rows(evaluator.score({}, t, False))["served"]["loss"] for t in range(20)]
    alone = [rows(score(plan, {k: personal[k]}))["served"]["loss"] for k in range(5)]
    assert set(by_round) <= set(alone)
    assert len(set(by_round)) > 2


def test_scores_are_the_same_after_a_checkpoint() -> None:
    """Three of 5 clients have trained; the others still share the first model."""
    plan = helpers.plan("baseline=local_only", "evaluation.sample=4", "clients.per_round=2")
    state = helpers.snapshots(plan.engine())[1].state
    evaluator = Evaluator(plan.federation, plan.method, plan.settings.evaluation)
    assert evaluator.score(unpack(pack(state)), 1, False) == evaluator.score(state, 1, False)


def test_chunks_do_not_matter() -> None:
    whole, pieces = (helpers.plan("baseline=fedavg", f"evaluation.chunk={n}") for n in (1000, 7))
    state = whole.method.init(whole.federation)
    found = [Evaluator(p.federation, p.method, Evaluation()).score(state, 1, True) for p in (whole, pieces)]
    for one, two in zip(found[0].rows, found[1].rows, strict=True):
        assert one == pytest.approx(two)


# -- test data -------------------------------------------------------------------------------------------------------


def test_training_shares_lie_in_the_train_part_and_test_sets_in_the_test_part(plan: Plan) -> None:
    federation = plan.federation
    assert len(federation.bench.y) == len(federation.dataset.train) == 120
    for owner in federation.participants:
        assert federation.rows(owner, Job(owner, federation.start).view).max() < 120
    for index in federation.split.clients_test:
        assert 10 <= len(set(index.tolist())) == len(index)
        assert index.max() < 60


def test_labels_of_the_test_part_change_scores_and_nothing_else() -> None:
    plan = helpers.plan("baseline=fedavg", "clients.noisy_labels=0.4")
    federation = plan.federation
    test = federation.dataset.test
    shuffled = dataclasses.replace(federation.dataset, test=Examples(test.x, (test.y + 1) % 3))
    other = dataclasses.replace(plan, federation=dataclasses.replace(federation, dataset=shuffled))
    states = [helpers.snapshots(p.engine())[-1].state for p in (plan, other)]
    assert helpers.identical(*states)
    scores = [Evaluator(p.federation, p.method, Evaluation()).score(states[0], 3, True) for p in (plan, other)]
    assert scores[0].accuracy() != scores[1].accuracy()
    assert torch.equal(federation.test[1], torch.from_numpy(test.y))  # noisy labels are for training only
    noisy = federation.noisy_clients
    clean = torch.from_numpy(federation.dataset.train.y)
    changed = {k for k in range(5) if (federation.bench.y != clean)[federation.owned(k)].any()}
    assert changed == set(noisy)
    assert len(noisy) == 2
