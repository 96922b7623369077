"""HFCL and FedDU by their formulas, and what holds for all methods that use the server's examples in a round."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import helpers
import hybrid_helpers as hybrid
import numpy as np
import pytest
import torch
import yaml
from scipy.spatial.distance import jensenshannon

from hybridfl import params as P
from hybridfl.build import build
from hybridfl.config import choices
from hybridfl.methods.fedavg import FedAvg
from hybridfl.methods.feddu import FedDU, divergence
from hybridfl.methods.hfcl import HFCL
from hybridfl.optimizers import SGD
from hybridfl.plan import Plan
from hybridfl.types import SERVER

SKEWED, SLOW = ("partitioning.alpha=0.1", "server_data.classes=[0,1]"), {"lr": 0.002}
"""Where FedDU has something to do: the synthetic data are easily learned."""
SYNCHRONOUS = {"fedclg_c", "fedclg_s", "mixed_fl_two_way"}


# -- HFCL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "part"), [("all", 0.2), ("present", 0.25)])
def test_hfcl_by_hand(share: Any, part: float) -> None:
    """The server has 10 of 50 examples, and of 40 with the clients that are there."""
    state = {"global": hybrid.point(100), "examples": [40]}
    arrived = [hybrid.update(0, 1, examples=10, buffer=1), hybrid.update(1, 4, examples=20, buffer=4, birth=0)]
    new, ((*_, job),), _ = hybrid.talk(HFCL(share), state, [*arrived, hybrid.update(SERVER, -8, examples=10, buffer=8)])
    assert (job.participant, job.work) == (SERVER, None)
    assert hybrid.values(new["global"]) == hybrid.near(100 - 8 * part + 3 * (1 - part))
    assert float(new["global"].buffers["b"]) == pytest.approx(8 * part + 3 * (1 - part))


def test_hfcl_moves_by_the_servers_share_alone_where_no_client_is_due() -> None:
    plan = hybrid.plan_of(clients={"dropout": 1.0})
    start, work = plan.federation.start.params, plan.federation.work
    assert isinstance(work, SGD)
    own = hybrid.trained(plan, start, 0, SERVER, work=work)
    server, *clients = hybrid.sizes(plan, (SERVER, *range(5)))
    assert helpers.close(
        hybrid.end(plan, HFCL(), 1), P.add(start, P.subtract(own, start), server / (server + sum(clients)))
    )


@pytest.mark.parametrize("share", ["all", "present"])
def test_hfcl_with_everybody_is_a_gradient_step_on_all_examples(share: Any) -> None:
    plan = hybrid.plan_of(clients=hybrid.ALL, work=hybrid.ONE_STEP)
    start = plan.federation.start.params
    union = np.concatenate([plan.federation.owned(k) for k in (*range(5), SERVER)])
    assert helpers.close(hybrid.end(plan, HFCL(share), 1), P.add(start, hybrid.gradient(plan, start, union), -0.3))


# -- FedDU -------------------------------------------------------------------------------------------------------------


def test_the_divergence_is_scipys_squared() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        p, q = rng.integers(0, 4, 6), rng.integers(0, 9, 6)
        p[0], q[1] = 1, 1
        expected = jensenshannon(p, q, base=2) ** 2
        assert divergence(torch.from_numpy(p), torch.from_numpy(q)) == pytest.approx(expected, abs=1e-12)
    assert divergence(torch.tensor([2, 0]), torch.tensor([0, 5])) == 1
    assert divergence(torch.tensor([2, 0, 6]), torch.tensor([1, 0, 3])) == 0


def labels(plan: Plan, clients: Sequence[int]) -> np.ndarray:
    rows = np.concatenate([plan.federation.owned(k) for k in clients])
    return np.bincount(plan.federation.bench.y.numpy()[rows], minlength=3)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_feddu_by_its_formula(form: Any) -> None:
    plan, method = hybrid.plan_of(*SKEWED, work=SLOW), FedDU(form, **hybrid.OWN, scale=2, decay=0.5)
    params, bench, rows = plan.federation.start.params, plan.federation.bench, plan.federation.owned(SERVER)
    everybody = labels(plan, range(5))
    for t, state in enumerate(hybrid.states(plan, method)[1:]):
        clients = hybrid.cohorts(plan)[t]
        merged = hybrid.averaged(plan, params, t, clients)
        right = torch.func.functional_call(bench.net, merged, (bench.x[rows],)).argmax(1) == bench.y[rows]
        far, near = (jensenshannon(labels(plan, who), everybody, base=2) ** 2 for who in (clients, [SERVER]))
        wanted = len(rows) * far
        alpha = (
            2
            * 0.5**t
            * (1 - float(right.double().mean()))
            * wanted
            / (wanted + sum(hybrid.sizes(plan, clients)) * near)
        )
        assert alpha > 0.01
        own = hybrid.trained(plan, merged, t, SERVER)
        params = P.add(merged, P.subtract(own, merged), alpha)
        assert helpers.close(state["global"].params, params)


@pytest.mark.parametrize("guard", [{"skip": 1.0}, {"undo": 0.001}], ids=["skip", "undo"])
def test_feddu_leaves_out_or_undoes_the_servers_work_in_the_codes_form_only(guard: dict[str, float]) -> None:
    plan = hybrid.plan_of(*SKEWED, work=SLOW)
    fedavg = hybrid.end(plan, FedAvg())
    assert helpers.close(hybrid.end(plan, FedDU(**guard)), fedavg)
    assert not helpers.close(hybrid.end(plan, FedDU("paper", **guard)), fedavg, 1e-4)


def test_feddu_with_all_clients_is_fedavg() -> None:
    """Their labels are those of all clients, and the factor of divergences is 0."""
    assert helpers.close(
        hybrid.end(hybrid.plan_of(clients=hybrid.ALL), FedDU("paper")),
        hybrid.end(hybrid.plan_of(clients=hybrid.ALL), FedAvg()),
    )


def test_feddu_undoes_what_makes_the_loss_so_many_times_as_high() -> None:
    told = {"0": torch.tensor([1, 3]), "1": torch.tensor([3, 1]), str(SERVER): torch.tensor([1, 2])}
    state = {"global": hybrid.point(0), "clients": [0, 1], "classes": 2, "task": 0, "labels": told}
    seen = {"accuracy": torch.tensor(0.0), "loss": torch.tensor(2.0)}
    ends = []
    for loss in (5.99, 6.0):
        arrived, own = hybrid.update(0, 1, buffer=3), hybrid.update(SERVER, 4, buffer=8)
        after = hybrid.update(SERVER, 0, loss=torch.tensor(loss))
        new, _, now = hybrid.talk(FedDU(), state, [arrived], [hybrid.update(SERVER, 0, **seen)], [own], [after])
        share = now.reports[0][2]
        ends.append((hybrid.values(new["global"])[0], float(new["global"].buffers["b"]), now.reports[1][2]))
    assert share > 0.1
    assert ends == [(pytest.approx(1 + 4 * share), pytest.approx(3 + 5 * share), 0), (1, 3, 1)]


def test_feddu_takes_buffers_no_further_than_the_servers() -> None:
    """Beyond its own statistics there may be a variance below 0."""
    told = {"0": torch.tensor([1, 3]), "1": torch.tensor([3, 1]), str(SERVER): torch.tensor([1, 2])}
    state = {"global": hybrid.point(0), "clients": [0, 1], "classes": 2, "task": 0, "labels": told}
    seen = [hybrid.update(SERVER, 0, accuracy=torch.tensor(0.0), loss=torch.tensor(2.0))]
    method = FedDU("paper", scale=30.0)
    new, _, now = hybrid.talk(
        method, state, [hybrid.update(0, 1, buffer=3)], seen, [hybrid.update(SERVER, 4, buffer=8)]
    )
    assert (share := now.reports[0][2]) > 2
    assert hybrid.values(new["global"]) == hybrid.near(1 + 4 * share)
    assert float(new["global"].buffers["b"]) == 8


def test_the_label_counts_are_booked_once_and_told() -> None:
    plan, method = hybrid.plan_of(), FedDU()
    assert method.notes(plan.federation) == [
        "FedDU: every client tells the server how many examples it has of each class"
    ]
    seen = helpers.snapshots(helpers.engine_of(plan, method, rounds=3))
    size = P.nbytes(plan.federation.start.params.values())
    ups = [after.costs.bytes_up - before.costs.bytes_up for before, after in itertools.pairwise(seen)]
    assert ups == [3 * size + 5 * 3 * 8, 3 * size, 3 * size]
    assert seen[-1].costs.bytes_down == 9 * size
    counts = seen[-1].state["labels"]
    assert counts.keys() == {"-1", *"01234"}
    assert all(np.array_equal(told, labels(plan, [int(who)])) for who, told in counts.items())


def test_the_labels_are_told_anew_in_every_task() -> None:
    plan = hybrid.plan_of("tasks.number=2", "dataset.classes=4", "server_data.examples=16", "rounds=2")
    first, second = (state["labels"] for state in hybrid.states(plan, FedDU())[1:])
    assert all(int(told[2:].sum()) == 0 < int(told.sum()) for told in first.values())
    assert all(int(told[:2].sum()) == 0 < int(told.sum()) for told in second.values())


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hybrid.METHODS)
def test_clients_that_drop_out_or_fail_are_missed(name: str) -> None:
    """Who is asked and whose result is lost is as with FedAvg, whatever is measured before and after."""
    plan = hybrid.plan_of(clients=hybrid.UNRELIABLE)
    told: list[list[str]] = [[], []]
    steps = []
    for notes, method in zip(told, (hybrid.METHODS[name], FedAvg()), strict=True):
        engine = helpers.engine_of(plan, method, rounds=4)
        snapshot = engine.begin()
        for _ in range(4):
            snapshot, record = engine.step(snapshot)
            notes += [note for note in record.notes if "lost" in note]
        steps.append(snapshot.costs.local_steps)
        assert P.all_finite(snapshot.state["global"].params)
    assert told[0] == told[1]
    assert len(told[0]) > 1
    assert steps[0] == steps[1]


@pytest.mark.parametrize("name", [name for name in hybrid.METHODS if name not in SYNCHRONOUS])
def test_late_updates_are_used(name: str) -> None:
    plan, method = hybrid.plan_of(clients=hybrid.UNRELIABLE), hybrid.METHODS[name]
    engine = helpers.engine_of(hybrid.plan_of(clients={**hybrid.UNRELIABLE, "delay": 3.0}), method, rounds=4)
    assert any(arrival.round > t for t in range(4) for arrival in engine.schedule.born(t))
    delayed = helpers.snapshots(engine)[-1].state["global"].params
    assert P.all_finite(delayed)
    assert not helpers.close(delayed, hybrid.end(plan, method, 4), 1e-6)


@pytest.mark.parametrize("name", hybrid.METHODS)
def test_the_file_holds_the_signatures_defaults_and_the_facts(name: str) -> None:
    built = build(yaml.safe_load(choices("baseline")[name].read_text()), "baseline")
    assert type(built) is type(hybrid.METHODS[name])
    assert vars(built) == vars(hybrid.METHODS[name])
    assert built.asynchronous == (name not in SYNCHRONOUS)
    assert built.requires == {"server_data", "server_labels"}
