"""FedCLG and Mixed FL by their formulas."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import helpers
import hybrid_helpers as hybrid
import numpy as np
import pytest
import torch

from hybridfl import params as P
from hybridfl.errors import ConfigError
from hybridfl.methods.fedavg import FedAvg
from hybridfl.methods.fedclg import FedCLG
from hybridfl.methods.mixed_fl import MixedFL
from hybridfl.optimizers import SGD, Adam, LocalWork
from hybridfl.types import SERVER, Results, Round

# -- FedCLG ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrects", ["clients", "server"])
def test_fedclg_by_its_formula(corrects: Any) -> None:
    plan = hybrid.plan_of(work={"lr_decay": 0.5})
    params = plan.federation.start.params
    for t, state in enumerate(hybrid.states(plan, FedCLG(corrects, **hybrid.OWN))[1:]):
        clients, g_s, ends = hybrid.cohorts(plan)[t], hybrid.whole(plan, params, SERVER), []
        work = SGD(lr=0.1 * 0.5**t, batch_size=8, epochs=2)
        for k in clients:
            lead = P.subtract(g_s, hybrid.whole(plan, params, k))
            if corrects == "clients":
                ends.append(hybrid.trained(plan, params, t, k, add=lead, work=work))
            else:
                steps = 2 * math.ceil(len(plan.federation.owned(k)) / 8)
                ends.append(P.add(hybrid.trained(plan, params, t, k, work=work), lead, -steps * work.lr))
        params = hybrid.trained(plan, P.mean(ends, hybrid.sizes(plan, clients)), t, SERVER)
        assert helpers.close(state["global"].params, params)


@pytest.mark.parametrize("corrects", ["clients", "server"])
def test_fedclg_after_one_full_batch_is_a_step_of_the_server(corrects: Any) -> None:
    plan = hybrid.plan_of(clients=hybrid.ALL, work=hybrid.ONE_STEP)
    start = plan.federation.start.params
    led = P.add(start, hybrid.whole(plan, start, SERVER), -0.3)
    assert helpers.close(hybrid.end(plan, FedCLG(corrects, **hybrid.OWN), 1), hybrid.trained(plan, led, 0, SERVER))


def test_fedclg_with_one_minibatch_is_the_same_in_both_forms() -> None:
    plan = hybrid.plan_of(work={"steps": 1})
    assert helpers.close(hybrid.end(plan, FedCLG("clients")), hybrid.end(plan, FedCLG("server")))
    assert not helpers.close(
        hybrid.end(hybrid.plan_of(), FedCLG("clients")), hybrid.end(hybrid.plan_of(), FedCLG("server")), 1e-3
    )


@pytest.mark.parametrize(("name", "down", "up"), [("fedclg_c", 2, 1), ("fedclg_s", 1, 2), ("mixed_fl_one_way", 2, 1)])
def test_a_gradient_that_is_sent_is_booked(name: str, down: int, up: int) -> None:
    plan = hybrid.plan_of()
    costs = helpers.snapshots(helpers.engine_of(plan, hybrid.METHODS[name], rounds=1))[-1].costs
    size = P.nbytes(plan.federation.start.params.values())
    assert (costs.bytes_down, costs.bytes_up) == (3 * down * size, 3 * up * size)
    assert costs.server_macs > 0


@pytest.mark.parametrize("name", ["fedclg_s", "mixed_fl_two_way"])
@pytest.mark.parametrize(
    ("work", "message"),
    [
        (SGD(momentum=0.9), r"^client_optimizer\.momentum: got 0\.9, .*nearest valid value: 0\."),
        (SGD(clip_norm=2.5), r"^client_optimizer\.clip_norm: got 2\.5, .*nearest valid value: null\."),
        (Adam(), r"^client_optimizer\._target_: got Adam, .*: hybridfl\.optimizers\.SGD\."),
    ],
)
def test_steps_that_the_server_cannot_reckon_with_are_refused(name: str, work: LocalWork, message: str) -> None:
    federation = replace(hybrid.plan_of().federation, work=work)
    with pytest.raises(ConfigError, match=message):
        hybrid.METHODS[name].init(federation)
    hybrid.METHODS["fedclg_c"].init(federation)


# -- Mixed FL ----------------------------------------------------------------------------------------------------------


def test_parallel_training_by_its_formula() -> None:
    plan, method = hybrid.plan_of(), MixedFL("parallel", weight=0.6, merge_lr=0.8, **hybrid.OWN)
    params = plan.federation.start.params
    for t, state in enumerate(hybrid.states(plan, method)[1:]):
        clients = P.subtract(hybrid.averaged(plan, params, t, hybrid.cohorts(plan)[t]), params)
        own = P.subtract(hybrid.trained(plan, params, t, SERVER, weight=0.6), params)
        params = P.add(P.add(params, clients, 0.8), own, 0.8)
        assert helpers.close(state["global"].params, params)


def test_one_way_by_its_formula() -> None:
    plan, method = hybrid.plan_of(), MixedFL("one_way", weight=0.6, merge_lr=0.8)
    params = plan.federation.start.params
    for t, state in enumerate(hybrid.states(plan, method)[1:]):
        lead = {n: 0.6 * g for n, g in hybrid.whole(plan, params, SERVER).items()}
        clients = hybrid.cohorts(plan)[t]
        params = P.add(params, P.subtract(hybrid.averaged(plan, params, t, clients, add=lead), params), 0.8)
        assert helpers.close(state["global"].params, params)


def test_two_way_by_its_formula() -> None:
    plan, method = hybrid.plan_of(), MixedFL("two_way", weight=0.6, merge_lr=0.5, **hybrid.OWN)
    params = plan.federation.start.params
    of_clients = of_server = {n: torch.zeros_like(t) for n, t in params.items()}
    for t, state in enumerate(hybrid.states(plan, method, 3)[1:]):
        clients, start = hybrid.cohorts(plan)[t], params
        ends = [hybrid.trained(plan, params, t, k, add=of_server) for k in clients]
        own = hybrid.trained(plan, params, t, SERVER, add=of_clients, weight=0.6)
        mean = P.mean(ends, hybrid.sizes(plan, clients))
        params = {n: (mean[n] + own[n]) / 2 for n in start}
        assert helpers.close(state["global"].params, params)
        counts = [2 * math.ceil(n / 8) for n in hybrid.sizes(plan, clients)]
        slopes = [
            {n: (start[n] - done[n]) / (0.1 * s) - of_server[n] for n in start}
            for done, s in zip(ends, counts, strict=True)
        ]
        of_server = {n: (start[n] - own[n]) / (0.07 * 4) - of_clients[n] for n in start}
        of_clients = P.mean(slopes, hybrid.sizes(plan, clients))
        assert helpers.close(state["of_clients"], of_clients)
        assert helpers.close(state["of_server"], of_server)


def test_the_estimated_gradients_of_one_full_batch_are_exact() -> None:
    plan, method = (
        hybrid.plan_of(clients=hybrid.ALL, work=hybrid.ONE_STEP),
        MixedFL("two_way", weight=0.6, steps=1, batch_size=1000),
    )
    seen = hybrid.states(plan, method)
    for before, after in itertools.pairwise(seen):
        params = before["global"].params
        union = np.concatenate([plan.federation.owned(k) for k in range(5)])
        assert helpers.close(after["of_clients"], hybrid.gradient(plan, params, union), 1e-10)
        assert helpers.close(
            after["of_server"], {n: 0.6 * g for n, g in hybrid.whole(plan, params, SERVER).items()}, 1e-10
        )


@pytest.mark.parametrize("form", ["parallel", "one_way"])
def test_mixed_fl_without_the_servers_loss_is_fedavg(form: Any) -> None:
    assert helpers.close(
        hybrid.end(hybrid.plan_of(), MixedFL(form, weight=0.0)), hybrid.end(hybrid.plan_of(), FedAvg())
    )


def test_what_the_clients_wait_for_makes_nobody_late() -> None:
    plan = hybrid.plan_of(clients={**hybrid.UNRELIABLE, "delay": 3.0})
    assert helpers.close(*(hybrid.end(plan, MixedFL(form, weight=0.0), 4) for form in ("parallel", "one_way")))


def test_what_the_clients_wait_for_is_not_asked_where_nobody_starts() -> None:
    """Late results alone: nothing is measured, and they are applied at the present model."""
    state = {"global": hybrid.point(100)}
    now = Round(3, 9, [], 2, SGD(), 0)
    generator = MixedFL("one_way").round(state, now)
    assert next(generator) == []
    with pytest.raises(StopIteration) as stop:
        generator.send(Results([hybrid.update(0, 1, examples=30), hybrid.update(1, 5, examples=10)]))
    assert hybrid.values(stop.value.value["global"]) == hybrid.near(102)
