"""The simple methods' exact small truths in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hybridfl import params as P
from hybridfl.methods.fedavg_server_finetune import FedAvgServerFinetune
from hybridfl.methods.fedbuff import FedBuff
from hybridfl.optimizers import SGD, batches
from hybridfl.plan import Plan
from hybridfl.rng import stream
from hybridfl.snapshot import Snapshot
from hybridfl.types import SERVER, Model, Result, Results, Round

FULL_BATCH = ("client_optimizer.batch_size=1000", "client_optimizer.epochs=1", "client_optimizer.lr=0.3")


# -- FedAvg ----------------------------------------------------------------------------------------------------------


def global_params(plan: Plan) -> P.Params:
    params: P.Params = helpers.snapshots(plan.engine())[-1].state["global"].params
    return params


def gradient(plan: Plan, params: P.Params, rows: np.ndarray) -> P.Params:
    """Of the mean loss over these examples, by plain PyTorch."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in params.items()}
    bench, index = plan.federation.bench, torch.from_numpy(rows)
    out = torch.func.functional_call(bench.net, leaves, (bench.x[index],))
    grads = torch.autograd.grad(F.cross_entropy(out, bench.y[index]), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


ALONE = ("clients.number=1", "clients.per_round=1", "server_data=none")


def test_fedavg_with_one_client_is_central_training() -> None:
    plan = helpers.plan("baseline=fedavg", *ALONE)
    federation = plan.federation
    central = helpers.Central(federation, federation.start, lr=0.1)
    rows, seen = federation.owned(0), helpers.snapshots(plan.engine())
    assert len(rows) == 120
    for t in range(3):
        expected = central.train(helpers.job_batches(federation, federation.work, rows, t, 0))
        assert helpers.close(seen[t + 1].state["global"].params, expected)


@pytest.mark.parametrize("server", ["server_data=none", "server_data=share"])
def test_one_full_batch_of_everybody_is_a_gradient_step_on_the_union(server: str) -> None:
    plan = helpers.plan("baseline=fedavg", server, "clients.per_round=1.0", "rounds=1", *FULL_BATCH)
    federation = plan.federation
    union = np.concatenate([federation.owned(k) for k in range(5)])
    start = federation.start.params
    assert helpers.close(global_params(plan), P.add(start, gradient(plan, start, union), -0.3))


def test_fedavg_weighs_by_examples() -> None:
    method = helpers.plan("baseline=fedavg").method
    (new,) = conversation(method, {"global": point(0.0)}, [results((0, 1.0, 30, 0), (1, 5.0, 10, 0))])
    assert value(new["global"]) == 2.0


def point(value: float) -> Model:
    return Model({"w": torch.tensor([value], dtype=torch.float64)}, {})


def value(model: Model) -> float:
    return float(model.params["w"])


def results(*arrived: tuple[int, float, int, int], start: float = 0.0) -> Results:
    """``(client, end, examples, birth)`` each, all from the same start."""
    return Results(Result(k, "", point(start), point(end), n, 1, 0.0, birth=birth) for k, end, n, birth in arrived)


def conversation(method: Any, state: Any, answers: list[Results], index: int = 3) -> tuple[Any]:
    now = Round(index, 9, [0, 1], 2, SGD(), 0)
    generator = method.round(state, now)
    next(generator)
    try:
        for answer in answers:
            generator.send(answer)
    except StopIteration as stop:
        return (stop.value,)
    raise AssertionError("the method wants more results")


# -- FedProx ---------------------------------------------------------------------------------------------------------


def test_fedprox_without_its_term_is_fedavg() -> None:
    # Lock-step adds FedAvg's gradients at once, and rounds otherwise.
    lines = ["baseline=fedprox", "baseline.mu=0"], ["baseline=fedavg"]
    plans = [helpers.plan(*line, "executor=sequential") for line in lines]
    assert helpers.identical(*map(global_params, plans))


def test_fedprox_by_its_formula() -> None:
    """Two full-batch steps: the second is pulled back to the received model."""
    full = [*FULL_BATCH, "client_optimizer.epochs=2"]
    plan = helpers.plan("baseline=fedprox", "baseline.mu=0.7", "rounds=1", *ALONE, *full[:1], *full[2:])
    rows, received = plan.federation.owned(0), plan.federation.start.params
    one = P.add(received, gradient(plan, received, rows), -0.3)
    pull = P.add(gradient(plan, one, rows), P.subtract(one, received), 0.7)
    assert helpers.close(global_params(plan), P.add(one, pull, -0.3))


def test_a_strong_proximal_term_holds_the_clients_back() -> None:
    plans = [helpers.plan("baseline=fedprox", f"baseline.mu={mu}", "rounds=1") for mu in (0, 1, 5)]
    moved = [float(P.norm(P.subtract(global_params(p), p.federation.start.params))) for p in plans]
    assert moved[0] > moved[1] > moved[2] > 0


# -- FedBuff ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server_lr", "weighted", "expected"),
    [(1.0, False, 1.5), (0.5, False, 0.75), (1.0, True, (1 * 1 + 2 * 0.5) / 2), (0.5, True, 0.5)],
)
def test_fedbuff_by_hand(server_lr: float, weighted: bool, expected: float) -> None:
    """Updates 1 and 2, stale by 0 and 3 rounds, weigh 1 and 1/√4 and are divided by their number, sizes unread."""
    method = FedBuff(server_lr=server_lr, staleness_weight=weighted)
    arrived = results((0, 11.0, 30, 3), (1, 12.0, 10, 0), start=10.0)
    (new,) = conversation(method, {"global": point(100.0)}, [arrived])
    assert value(new["global"]) == pytest.approx(100 + expected, abs=1e-12)


def test_fedbuff_with_equal_sizes_is_fedavg() -> None:
    equal = ("partitioning=iid", "server_data=none", "clients.number=5")
    one, other = (helpers.plan(f"baseline={name}", *equal) for name in ("fedbuff", "fedavg"))
    assert {one.federation.examples(k) for k in range(5)} == {24}
    assert helpers.close(global_params(one), global_params(other))


def test_fedbuff_with_unequal_sizes_is_not() -> None:
    one, other = (helpers.plan(f"baseline={name}", "rounds=1") for name in ("fedbuff", "fedavg"))
    assert not helpers.close(global_params(one), global_params(other), 1e-4)


# -- the server's own steps ------------------------------------------------------------------------------------------


def test_server_finetuning_is_fedavg_then_the_servers_steps() -> None:
    plan = helpers.plan("baseline=fedavg_server_finetune", "baseline.steps=5", "baseline.batch_size=4", "rounds=2")
    federation = plan.federation
    work = SGD(steps=5, batch_size=4, lr=0.03)
    seen = helpers.snapshots(plan.engine())
    for t in range(2):
        start = seen[t].state["global"]
        fedavg = helpers.plan("baseline=fedavg", "rounds=2").engine()
        merged = fedavg.step(Snapshot(t, {"global": start}))[0].state["global"]
        central = helpers.Central(federation, merged, lr=0.03)
        expected = central.train(helpers.job_batches(federation, work, federation.split.server_train, t, SERVER))
        assert helpers.close(seen[t + 1].state["global"].params, expected)


def test_server_finetuning_moves_by_the_mean_update_when_updates_are_late() -> None:
    state, arrived = {"global": point(100.0)}, results((0, 11.0, 30, 3), (1, 15.0, 10, 0), start=10.0)
    generator = FedAvgServerFinetune().round(state, Round(3, 9, [0, 1], 2, SGD(), 0))
    next(generator)
    (job,) = generator.send(arrived)
    assert job.participant == SERVER
    assert value(job.start) == 102.0


def test_server_only_is_plain_sgd_with_momentum_kept() -> None:
    plan = helpers.plan("baseline=server_only", "baseline.steps=7", "baseline.batch_size=5", "baseline.momentum=0.9")
    federation = plan.federation
    central = helpers.Central(federation, federation.start, lr=0.1, momentum=0.9)
    work = SGD(steps=7, batch_size=5, lr=0.1, momentum=0.9)
    seen = helpers.snapshots(plan.engine())
    for t in range(3):
        expected = central.train(helpers.job_batches(federation, work, federation.split.server_train, t, SERVER))
        assert helpers.close(seen[t + 1].state["global"].params, expected)


def test_server_only_refuses_a_momentum_that_cannot_be() -> None:
    with pytest.raises(Exception, match=r"^baseline\.momentum: got 1\.5: must be below 1"):
        helpers.plan("baseline=server_only", "baseline.momentum=1.5")


# -- pooled data -----------------------------------------------------------------------------------------------------


def test_the_oracle_is_central_training_on_the_pool() -> None:
    plan = helpers.plan("baseline=oracle", "client_optimizer.momentum=0.9", "clients.validation=0.2")
    federation = plan.federation
    owners = [*range(5), SERVER]
    pool = np.concatenate([federation.owned(k) for k in owners])
    steps = 3 * 2 * math.ceil(round(len(pool) / 6) / 8)
    work = dataclasses.replace(federation.work, steps=steps)
    central = helpers.Central(federation, federation.start, lr=0.1, momentum=0.9)
    seen = helpers.snapshots(plan.engine())
    for t in range(3):
        expected = central.train(helpers.job_batches(federation, work, pool, t, SERVER))
        assert helpers.close(seen[t + 1].state["global"].params, expected)
    assert not set(pool) & set(np.concatenate(federation.split.clients_val))


def test_the_oracle_is_fedavg_of_everybody_on_full_batches() -> None:
    full = ("clients.number=1", "clients.per_round=1", "server_data=none", *FULL_BATCH)
    oracle, fedavg = (helpers.plan(f"baseline={name}", *full) for name in ("oracle", "fedavg"))
    assert helpers.close(global_params(oracle), global_params(fedavg))


def test_data_sharing_trains_on_the_servers_examples_too() -> None:
    plan = helpers.plan("baseline=data_sharing", "clients.per_round=1.0", "rounds=1", *FULL_BATCH)
    federation, start = plan.federation, plan.federation.start.params
    copies = [np.concatenate([federation.owned(k), federation.owned(SERVER)]) for k in range(5)]
    ends = [P.add(start, gradient(plan, start, rows), -0.3) for rows in copies]
    assert helpers.close(global_params(plan), P.mean(ends, [len(rows) for rows in copies]))
    assert not helpers.close(global_params(plan), global_params(_as_fedavg()), 1e-4)


def _as_fedavg() -> Plan:
    return helpers.plan("baseline=fedavg", "clients.per_round=1.0", "rounds=1", *FULL_BATCH)


# -- alone -----------------------------------------------------------------------------------------------------------


def test_local_only_is_each_clients_own_training() -> None:
    plan = helpers.plan("baseline=local_only", "clients.per_round=2")
    federation, engine = plan.federation, plan.engine()
    models = helpers.snapshots(engine)[-1].state
    visits = [[arrival.client for arrival in engine.schedule.born(t)] for t in range(3)]
    counts = [sum(k in round for round in visits) for k in range(5)]
    assert {0, 2} <= set(counts)  # somebody never, somebody twice
    for k in range(5):
        central = helpers.Central(federation, federation.start, lr=0.1)
        expected = central.train([])
        for t in range(3):
            if k in visits[t]:
                expected = central.train(helpers.job_batches(federation, federation.work, federation.owned(k), t, k))
        (served,) = plan.method.serve(models, k)
        assert helpers.close(served.model.params, expected)
    assert plan.method.serve(models, SERVER) == []


def test_the_learning_rate_decays_over_rounds() -> None:
    plan = helpers.plan("baseline=fedavg", "client_optimizer.lr_decay=0.5", *ALONE, "rounds=2")
    federation = plan.federation
    expected = federation.start
    for t, lr in enumerate((0.1, 0.05)):
        central = helpers.Central(federation, expected, lr=lr)
        index = helpers.job_batches(federation, federation.work, federation.owned(0), t, 0)
        expected = Model(central.train(index), {})
    assert helpers.close(global_params(plan), expected.params)


def test_batches_of_the_reference_are_those_of_the_package() -> None:
    """What the identities above rest on: a stream of batches for each round and participant."""
    federation = helpers.plan("baseline=fedavg").federation
    rows = federation.owned(0)
    index = helpers.job_batches(federation, federation.work, rows, 0, 0)
    assert np.array_equal(np.sort(np.concatenate(index)), np.sort(np.concatenate([rows, rows])))
    direct = [rows[p] for p in batches(len(rows), federation.work, stream(0, "local", 0, 0, "", 0), len(index))]
    assert all(map(np.array_equal, index, direct))
    other = helpers.job_batches(federation, federation.work, rows, 1, 0)
    assert not np.array_equal(np.concatenate(index), np.concatenate(other))
