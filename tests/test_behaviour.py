"""Noise and attacks: exactly the examples and results of the clients that have the role, by exactly so much."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from hybridfl import params as P
from hybridfl.availability import Clients
from hybridfl.behaviour import SHARES, random_update, spoil
from hybridfl.executors import Executor
from hybridfl.federation import Federation
from hybridfl.methods.base import Facts
from hybridfl.rng import stream
from hybridfl.types import Job, Model, Result, Results, Round, Served, State

# -- who -------------------------------------------------------------------------------------------------------------


def test_the_noisy_clients_of_before_there_were_other_roles() -> None:
    for clients, seed, expected in [
        (Clients(noisy_labels=0.1), 0, [8, 9, 16, 18, 21]),
        (Clients(number=10, noisy_labels=0.3), 4, [2, 6, 7]),
        (Clients(number=10, noisy_labels=0.3, flipped_labels=0.5), 4, [2, 6, 7]),
    ]:
        roles = clients.roles(seed)
        assert [client for client, role in roles.items() if role == "noisy_labels"] == expected


def test_shares_are_disjoint_and_rounded_one_by_one() -> None:
    clients = Clients(number=20, noisy_labels=0.1, flipped_labels=0.2, noisy_inputs=0.26, random_updates=0.44)
    roles = clients.roles(0)
    assert Counter(roles.values()) == {
        "noisy_labels": 2,
        "flipped_labels": 4,
        "noisy_inputs": 5,
        "random_updates": 9,
    }
    assert list(roles) == sorted(roles) == list(range(20))
    assert roles == clients.roles(0) != clients.roles(1)
    assert Clients(number=20).roles(0) == {}
    # 3 of 5 twice would be too many.
    half = Clients(number=3, per_round=1, noisy_labels=0.5, random_updates=0.5).roles(0)
    assert Counter(half.values()) == {"noisy_labels": 2, "random_updates": 1}


def test_those_held_out_are_nothing_else() -> None:
    clients = Clients(number=10, held_out=0.4, random_updates=0.5, noisy_labels=0.5)
    for seed in range(5):
        roles = clients.roles(seed)
        held_out = [client for client, role in roles.items() if role == "held_out"]
        assert held_out == clients.held_out_clients(seed)
        assert Counter(roles.values()) == {"held_out": 4, "noisy_labels": 3, "random_updates": 3}


# -- examples --------------------------------------------------------------------------------------------------------


def pool() -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.standard_normal((4000, 1, 2, 2))), rng.integers(3, size=4000)


@pytest.mark.parametrize("role", ["held_out", *SHARES])
def test_only_the_clients_own_examples_change(role: Any) -> None:
    (x, y), (clean_x, clean_y) = pool(), pool()
    owned = np.arange(100, 4000, 2)
    spoil(role, x, y, owned, 3, 0.5, stream(0, "test"))
    others = np.setdiff1d(np.arange(4000), owned)
    assert torch.equal(x[others], clean_x[others])
    assert (y[others] == clean_y[others]).all()
    assert torch.equal(x, clean_x) == (role != "noisy_inputs")
    assert (y == clean_y).all() == (role not in ("noisy_labels", "flipped_labels"))
    if role == "flipped_labels":
        assert (y[owned] == 2 - clean_y[owned]).all()
    if role == "noisy_labels":
        assert (y[owned] == stream(0, "test").integers(3, size=len(owned))).all()
    if role == "noisy_inputs":
        noise = (x - clean_x)[owned].numpy()
        assert abs(noise.mean()) < 4 * 0.5 / math.sqrt(noise.size)
        assert abs(noise.std() / 0.5 - 1) < 4 / math.sqrt(2 * noise.size)
        assert len(np.unique(noise)) == noise.size


def test_the_pool_of_a_run_is_spoilt_where_the_roles_say() -> None:
    line = ("clients.noisy_inputs=0.4", "clients.flipped_labels=0.2", "clients.validation=0.3")
    federation = helpers.plan("baseline=fedavg", *line).federation
    clean = helpers.plan("baseline=fedavg", "clients.validation=0.3").federation
    assert Counter(federation.roles.values()) == {"noisy_inputs": 2, "flipped_labels": 1}
    for owner in federation.participants:
        for part in ("train", "val"):
            owned = federation.owned(owner, part)  # type: ignore[arg-type]
            role = federation.roles.get(owner)
            labels, honest = federation.bench.y[owned], clean.bench.y[owned]
            assert torch.equal(labels, 2 - honest if role == "flipped_labels" else honest)
            same = federation.bench.x[owned] == clean.bench.x[owned]
            assert not same.any() if role == "noisy_inputs" else same.all()
    again = helpers.plan("baseline=fedavg", *line).federation
    assert torch.equal(federation.bench.x, again.bench.x)
    louder = helpers.plan("baseline=fedavg", *line, "clients.input_noise=3").federation
    assert torch.allclose(louder.bench.x - clean.bench.x, 3 * (federation.bench.x - clean.bench.x))


# -- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_a_random_update_is_as_long_as_the_honest_one_times_the_scale(scale: float) -> None:
    def params(*values: float) -> P.Params:
        tensor = torch.tensor(values, dtype=torch.float64)
        return {"a.weight": tensor[:4].reshape(2, 2), "a.bias": tensor[4:]}

    start = Model(params(1, 2, 3, 4, 5, 6), {"mean": torch.zeros(2)})
    honest = Model(params(1, 2, 3, 4, 8, 10), {"mean": torch.ones(2)})  # 5 long
    result = Result(3, "", start, honest, examples=7, steps=2, loss=0.5)
    sent = random_update(result, scale, stream(0, "a"))
    assert math.isclose(float(P.norm(sent.delta)), 5 * scale)
    assert sent.model.buffers is honest.buffers
    assert vars(replace(sent, model=honest)) == vars(result)
    assert helpers.identical(random_update(result, scale, stream(0, "a")).model.params, sent.model.params)
    assert helpers.identical(random_update(result, scale, stream(0, "b")).model.params, sent.model.params) == (
        not scale
    )


class Updates(Facts):
    """Two jobs of the given kind for each client; the state keeps the lengths of their updates, and what was sent."""

    asynchronous = True

    def __init__(self, **options: Any) -> None:
        self.options = options

    def init(self, federation: Federation) -> State:
        return {"global": federation.fresh_model(), "found": []}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        first = yield [Job(k, state["global"], **self.options) for k in now.clients for _ in range(2)]
        second = yield [Job(k, state["global"], **self.options) for k in now.clients]
        found = [[r.participant, r.loss, P.flatten(r.delta)] for r in [*first, *second]]
        return state | {"found": found}

    def serve(self, state: State, participant: int) -> list[Served]:
        return [Served(state["global"])]


def found(executor: Executor | None = None, *line: str, **options: Any) -> list[list[Any]]:
    plan = helpers.plan("baseline=fedbuff", "clients.per_round=5", *line)
    engine = helpers.engine_of(plan, Updates(**options))
    engine.executor = executor or engine.executor
    seen: list[list[Any]] = engine.step(engine.step(engine.begin())[0])[0].state["found"]
    return seen


def test_what_hostile_clients_send() -> None:
    plan = helpers.plan("baseline=fedbuff", "clients.random_updates=0.4")
    hostile = set(plan.federation.roles)
    assert len(hostile) == 2
    honest, sent = found(), found(None, "clients.random_updates=0.4", "clients.random_scale=3")
    assert [entry[0] for entry in honest] == [entry[0] for entry in sent]
    directions = []
    for (client, loss, update), (_, same, told) in zip(honest, sent, strict=True):
        assert same == loss  # the client's work was honest
        if client not in hostile:
            assert torch.equal(told, update)
            continue
        assert math.isclose(float(told.norm()), 3 * float(update.norm()), rel_tol=1e-9)
        directions.append(told / told.norm())
    # Each job has noise of its own, nearly at right angles to the others of some hundred entries.
    assert len(directions) == 6
    cosines = torch.stack(directions) @ torch.stack(directions).T - torch.eye(6)
    assert cosines.abs().max() < 6 / math.sqrt(len(directions[0]))


class Backwards:
    """An executor that works in the opposite order."""

    threads = 1

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

    def run(self, bench: Any, tasks: Any) -> list[Any]:
        return self.executor.run(bench, tasks[::-1])[::-1]


def test_attacks_do_not_depend_on_the_executor() -> None:
    line = "clients.random_updates=0.4"
    executor = helpers.plan(line).settings.executor
    assert helpers.identical(found(executor, line), found(Backwards(executor), line))


@pytest.mark.parametrize("options", [{"returns": "nothing"}, {"returns": "probes"}])
def test_what_is_not_sent_is_not_attacked(options: dict[str, Any]) -> None:
    assert helpers.identical(found(None, "clients.random_updates=0.4", **options), found(None, **options))


def test_a_measurement_is_not_attacked() -> None:
    (_, _, update), *_ = found(None, "clients.random_updates=1", steps=0)
    assert not update.any()


@pytest.mark.parametrize("role", SHARES)
def test_every_role_changes_what_is_learnt(role: str) -> None:
    clean, spoilt = (
        helpers.snapshots(helpers.plan("baseline=fedavg", f"clients.{role}={share}").engine())[-1].state
        for share in (0, 0.4)
    )
    assert not helpers.identical(spoilt, clean)
