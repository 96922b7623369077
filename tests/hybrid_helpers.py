"""Federated rounds written out, and methods talked to by hand."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hybridfl import params as P
from hybridfl.methods.fedclg import FedCLG
from hybridfl.methods.feddu import FedDU
from hybridfl.methods.fltrust import FLTrust
from hybridfl.methods.hfcl import HFCL
from hybridfl.methods.mixed_fl import MixedFL
from hybridfl.methods.zeno_plus_plus import ZenoPlusPlus
from hybridfl.optimizers import SGD
from hybridfl.params import Params
from hybridfl.plan import Plan
from hybridfl.types import SERVER, Job, Model, Result, Results, Round, State

OWN: dict[str, Any] = {"steps": 4, "batch_size": 5, "lr": 0.07}
WORK = SGD(**OWN)
"""The server's work in the runs here."""
ALL = {"per_round": 5}
UNRELIABLE = {"dropout": 0.3, "failure": 0.4}
ONE_STEP = {"batch_size": 1000, "epochs": 1, "lr": 0.3}
METHODS = {
    "fltrust": FLTrust(),
    "zeno_plus_plus": ZenoPlusPlus(),
    "hfcl": HFCL(),
    "feddu": FedDU(),
    "fedclg_c": FedCLG("clients"),
    "fedclg_s": FedCLG("server"),
    "mixed_fl_parallel": MixedFL("parallel"),
    "mixed_fl_one_way": MixedFL("one_way"),
    "mixed_fl_two_way": MixedFL("two_way", merge_lr=0.5),
}


def gradient(plan: Plan, params: Params, rows: np.ndarray) -> Params:
    """Of the mean loss over these examples."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in params.items()}
    bench, index = plan.federation.bench, torch.from_numpy(rows)
    out = torch.func.functional_call(bench.net, leaves, (bench.x[index],))
    grads = torch.autograd.grad(F.cross_entropy(out, bench.y[index]), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def whole(plan: Plan, params: Params, who: int) -> Params:
    """Gradient on all examples of a participant."""
    return gradient(plan, params, plan.federation.owned(who))


def trained(
    plan: Plan,
    params: Params,
    t: int,
    who: int,
    add: Params | None = None,
    weight: float = 1.0,
    work: SGD | None = None,
) -> Params:
    """The local work of round t, its gradients times ``weight`` and with ``add`` to each."""
    local: Any = work or (WORK if who == SERVER else plan.federation.work)
    for rows in helpers.job_batches(plan.federation, local, plan.federation.owned(who), t, who):
        grads = gradient(plan, params, rows)
        steps = {n: weight * grad + (0 if add is None else add[n]) for n, grad in grads.items()}
        params = P.add(params, steps, -local.lr)
    return params


def cohorts(plan: Plan) -> list[list[int]]:
    schedule = plan.engine().schedule
    return [[arrival.client for arrival in schedule.born(t)] for t in range(3)]


def sizes(plan: Plan, clients: Sequence[int]) -> list[float]:
    return [float(len(plan.federation.owned(k))) for k in clients]


def averaged(plan: Plan, params: Params, t: int, clients: Sequence[int], **options: Any) -> Params:
    """FedAvg's model."""
    return P.mean([trained(plan, params, t, k, **options) for k in clients], sizes(plan, clients))


composed = functools.cache(helpers.plan)


def plan_of(*overrides: str, clients: Mapping[str, Any] | None = None, work: Mapping[str, Any] | None = None) -> Plan:
    """A federation; what can be set on it, and the methods, are, because to compose a config takes longer than to run it."""
    plan = composed("baseline=fedavg", *overrides)
    federation = plan.federation
    behaviour, local = replace(federation.clients, **(clients or {})), replace(federation.work, **(work or {}))
    return replace(plan, federation=replace(federation, clients=behaviour, work=local))


def states(plan: Plan, method: Any, rounds: int = 2) -> list[State]:
    return [snapshot.state for snapshot in helpers.snapshots(helpers.engine_of(plan, method, rounds=rounds))]


def end(plan: Plan, method: Any, rounds: int = 2) -> Params:
    params: Params = states(plan, method, rounds)[-1]["global"].params
    return params


def point(*values: float, buffer: float = 0.0) -> Model:
    return Model({"w": torch.tensor(values, dtype=torch.float64)}, {"b": torch.tensor([buffer], dtype=torch.float64)})


def update(who: int, *values: float, examples: int = 10, buffer: float = 0.0, birth: int = 3, **probes: Any) -> Result:
    """A result whose model has moved by these values, from a start that is not the global model."""
    start = point(*[7.0] * len(values))
    moved = Model(P.add(start.params, point(*values).params), point(buffer=buffer).buffers)
    return Result(who, "", start, moved, examples, 2, 0.5, probes=probes, birth=birth)


def talk(method: Any, state: State, *answers: list[Result]) -> tuple[State, list[list[Job]], Round]:
    """A round in which these answers are given; the new state, and what was yielded."""
    now = Round(3, 9, [0, 1], 2, SGD(lr=0.5), 0)
    generator = method.round(state, now)
    yielded = [next(generator)]
    for answer in answers[:-1]:
        yielded.append(generator.send(Results(answer)))
    with pytest.raises(StopIteration) as stop:
        generator.send(Results(answers[-1]))
    return stop.value.value, yielded, now


def values(model: Model) -> list[float]:
    found: list[float] = model.params["w"].tolist()
    return found


def near(*expected: float) -> Any:
    return pytest.approx(list(expected), abs=1e-12)
