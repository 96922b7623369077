"""Peers that average and DIMAT: statistics of BatchNorm, costs, agents that are away, and what is refused."""

from __future__ import annotations

import copy

import helpers
import numpy as np
import pytest
import torch
from dimat_helpers import NARROW, STILL, WITH_BATCH_NORM, mixed_by_hand, reported, starts, step
from torch import nn

from hybridfl import params as P
from hybridfl.activations import activations
from hybridfl.errors import ConfigError
from hybridfl.merging.alignment import specification
from hybridfl.merging.matching import ActivationStatistics, activation_matching, align_and_mix
from hybridfl.methods.dimat import Dimat
from hybridfl.methods.peer_average import mean_of
from hybridfl.mixing import among, neighbours
from hybridfl.models import batch_norm
from hybridfl.topology import Complete, Ring
from hybridfl.types import SERVER, Model

# -- statistics of BatchNorm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "whose"),
    [
        ("merging=dimat", "own"),
        ("merging=dimat merging.reset_batch_norm=proxy", "proxy"),
        ("baseline=peer_average baseline.reset_batch_norm=own", "own"),
        ("baseline=peer_average baseline.reset_batch_norm=proxy", "proxy"),
    ],
)
def test_running_statistics_are_those_of_the_agents_own_examples_or_of_the_servers(method: str, whose: str) -> None:
    plan = helpers.plan(*method.split(), "clients.number=3", "client_optimizer.epochs=1", *WITH_BATCH_NORM)
    federation = plan.federation
    after, _ = step(plan)
    layers = [module for module in federation.net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {layer.momentum for layer in layers} == {0.1}
    for k, model in enumerate(after.state["models"]):
        x = federation.bench.x[torch.from_numpy(federation.owned(SERVER if whose == "proxy" else k))]
        assert 0 < len(x) <= 100  # one batch
        net = copy.deepcopy(federation.net).train()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        buffers = P.clone(model.buffers)
        with torch.no_grad():
            torch.func.functional_call(net, {**model.params, **buffers}, (x,))
        floating = [name for name, t in buffers.items() if t.is_floating_point()]
        assert helpers.close({n: buffers[n] for n in floating}, {n: model.buffers[n] for n in floating}, 1e-10)


def test_without_a_reset_running_statistics_are_averaged() -> None:
    line = ("clients.number=3", "client_optimizer.epochs=1", *WITH_BATCH_NORM)
    averaged, _ = step(helpers.plan("baseline=peer_average", *line))
    reset, _ = step(helpers.plan("baseline=peer_average", "baseline.reset_batch_norm=own", *line))
    one, two = averaged.state["models"][0], reset.state["models"][0]
    name = next(name for name in one.buffers if name.endswith("running_mean"))
    assert helpers.identical(one.params, two.params)
    assert not torch.equal(one.buffers[name], two.buffers[name])
    # On three agents a ring is complete: averages are all the same, estimates are not.
    assert helpers.close(one.params, averaged.state["models"][1].params)
    assert torch.equal(one.buffers[name], averaged.state["models"][1].buffers[name])
    other = reset.state["models"][1].buffers[name]
    assert not torch.equal(two.buffers[name], other)


@pytest.mark.parametrize("policy", ["batch", "frozen", "local", "average", "reestimate"])
def test_statistics_that_the_policy_leaves_alone(policy: str) -> None:
    plan = helpers.plan("merging=dimat", "merging.match=identity", f"model.batch_norm={policy}", *WITH_BATCH_NORM)
    assert plan.method.init(plan.federation)["resets"] is (policy in ("average", "reestimate"))
    assert batch_norm.has_statistics(plan.federation.net) is (policy != "batch")


# -- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["merging=dimat", "merging=dimat merging.match=identity", "baseline=dsgd", "baseline=qg_dsgdm"]
)
@pytest.mark.parametrize(("graph", "sent"), [("ring", 10), ("complete", 20)])
def test_what_a_round_sends(line: str, graph: str, sent: int) -> None:
    plan = helpers.plan(*line.split(), f"topology={graph}", *NARROW)
    costs = [snapshot.costs for snapshot in helpers.snapshots(plan.engine())]
    size = P.nbytes(P.tensors(plan.federation.start))
    assert [c.bytes_peer for c in costs] == [t * sent * size for t in range(4)]
    assert {(c.bytes_up, c.bytes_down, c.server_macs) for c in costs} == {(0, 0, 0)}


def test_what_a_round_computes() -> None:
    plan = helpers.plan("merging=dimat", "merging.stats_examples=7", "rounds=1", *NARROW)
    federation = plan.federation
    examples = sum(federation.examples(k) for k in range(5))
    sampled = sum(min(7, federation.examples(k)) for k in range(5))
    after, _ = step(plan)
    assert after.costs.macs == (3 * 2 * examples + 3 * sampled) * federation.forward_macs


def test_what_a_round_with_batch_norm_computes() -> None:
    """On a ring: three models' statistics, three models' activations, the merged model's statistics."""
    options = ("merging.stats_examples=7", "client_optimizer.epochs=1", "partitioning=iid")
    plan = helpers.plan("merging=dimat", *options, *WITH_BATCH_NORM)
    after, _ = step(plan)
    assert min(plan.federation.examples(k) for k in range(5)) >= 7
    examples = sum(plan.federation.examples(k) for k in range(5))
    assert after.costs.macs == (3 * examples + 5 * 7 * 7) * plan.federation.forward_macs


@pytest.mark.parametrize(("stats", "owners"), [("own", 1), ("neighbours", 3), ("all", 5)])
def test_whose_examples_are_looked_at(stats: str, owners: int) -> None:
    plan = helpers.plan("merging=dimat", f"merging.stats={stats}", *NARROW)
    assert plan.method.moves_raw_data is (owners > 1)
    after, _ = step(plan)
    assert len(after.moved) == 5 * (owners - 1)
    model = P.nbytes(P.tensors(plan.federation.start))
    raw = sum(plan.federation.examples(owner) for owner, *_ in after.moved) * plan.federation.example_bytes
    assert after.costs.bytes_peer == 10 * model + raw


@pytest.mark.parametrize("line", ["merging.stats=proxy", "merging.match=weight merging.reset_batch_norm=proxy"])
def test_the_servers_examples_are_copied_to_every_agent_once(line: str) -> None:
    few = ("clients.number=3", "client_optimizer.epochs=1", "server_data.labelled=false")
    plan = helpers.plan("merging=dimat", *line.split(), *few, *WITH_BATCH_NORM)
    assert plan.method.moves_raw_data
    assert plan.method.requires == {"server_data"}
    engine = helpers.engine_of(plan, rounds=2)
    first = engine.step(engine.begin())[0]
    after = engine.step(first)[0]
    assert first.moved == after.moved == tuple((SERVER, k, "train") for k in range(3))
    assert plan.federation.examples(SERVER) == 12
    assert first.costs.bytes_down == after.costs.bytes_down == 3 * 12 * plan.federation.example_bytes
    assert after.costs.bytes_peer == 2 * 6 * P.nbytes(P.tensors(plan.federation.start))


def test_activations_on_the_servers_examples_by_hand() -> None:
    plan = helpers.plan(
        "merging=dimat", "merging.stats=proxy", "clients.number=2", "clients.per_round=1", STILL, *NARROW
    )
    own, other = models = starts(plan)
    net, x = plan.federation.net, plan.federation.bench.x[torch.from_numpy(plan.federation.owned(SERVER))]
    spec = specification(net, (1, 4, 4))
    statistics = ActivationStatistics(spec)
    statistics.add([activations(net, model, x, spec.modules) for model in models])
    (correlations,) = statistics.correlations()
    expected = align_and_mix(own, [other], [1, 1], spec, [activation_matching(spec, correlations)])
    after, _ = step(plan)
    assert helpers.close(after.state["models"][0].params, expected.params)
    elsewhere, _ = step(plan, method=Dimat(stats="own"))
    assert not helpers.close(elsewhere.state["models"][0].params, expected.params)


def test_weights_are_matched_without_anybodys_examples() -> None:
    method = Dimat("weight", stats="proxy", reset_batch_norm="none")
    assert not method.moves_raw_data
    assert not method.requires


def test_agents_that_were_trained_alone() -> None:
    plan = helpers.plan("merging=dimat", "start=solo", "start_steps=4", *NARROW)
    drawn = starts(plan)
    begun = plan.engine().begin()
    assert begun.costs.local_steps == 20
    assert begun.costs.bytes_peer == begun.costs.bytes_up == begun.costs.bytes_down == 0
    for k, (model, untrained) in enumerate(zip(begun.state["models"], drawn, strict=True)):
        assert not helpers.close(model.params, untrained.params, 1e-6)
        assert all(not helpers.close(model.params, begun.state["models"][j].params, 1e-2) for j in range(k))


def test_there_is_no_global_model() -> None:
    plan = helpers.plan("merging=dimat")
    state = plan.engine().begin().state
    assert plan.method.serve(state, SERVER) == []
    assert [plan.method.serve(state, k)[0].model for k in range(5)] == state["models"]


# -- agents that are away --------------------------------------------------------------------------------------------


def test_agents_that_are_away_neither_send_nor_receive() -> None:
    plan = helpers.plan("merging=dimat", "merging.match=identity", "clients.held_out=[2]", STILL, *NARROW)
    models = [model.params for model in starts(plan)]
    after, _ = step(plan)
    third = 1 / 3
    W = np.array(
        [
            [third, third, 0, 0, third],
            [third, 2 * third, 0, 0, 0],
            [0, 0, 1, 0, 0],
            [0, 0, 0, 2 * third, third],
            [third, 0, 0, third, third],
        ]
    )
    for model, expected in zip(after.state["models"], mixed_by_hand(W, models), strict=True):
        assert helpers.close(model.params, expected)
    assert after.costs.bytes_peer == 6 * P.nbytes(P.tensors(plan.federation.start))


def test_the_first_that_is_there_merges_for_all() -> None:
    options = ("merging.anchor=agent0", "topology=complete", "clients.held_out=[0]")
    plan = helpers.plan("merging=dimat", *options, STILL, *NARROW)
    after, _ = step(plan)
    untouched, *models = after.state["models"]
    assert helpers.identical(untouched, starts(plan)[0])
    assert all(helpers.identical(model, models[0]) for model in models)


@pytest.mark.parametrize("present", [[0], [1, 3], [0, 2, 3], [0, 1, 2, 3, 4]])
def test_a_matrix_among_those_present(present: list[int]) -> None:
    for graph in (Ring(), Complete()):
        full = graph.mixing(5, 0)
        W = among(full, present)
        assert W.sum(1) == pytest.approx(np.ones(5))
        assert np.array_equal(W, W.T)
        away = [k for k in range(5) if k not in present]
        assert all(W[k, k] == 1 for k in away)
        assert all(neighbours(W, k) == [j for j in neighbours(full, k) if j in present] for k in present)
        off = ~np.eye(5, dtype=bool)[np.ix_(present, present)]
        inside = np.ix_(present, present)
        assert np.array_equal(W[inside][off], full[inside][off])


def test_a_mean_in_the_order_of_the_agents() -> None:
    models = {k: Model({"w": torch.tensor([0.1 * k])}, {}) for k in range(3)}
    weights = {0: 0.5, 1: 0.3, 2: 0.2}
    assert float(mean_of(models, weights).params["w"]) == pytest.approx(0.07)
    turned = mean_of(dict(reversed(models.items())), dict(reversed(weights.items())))
    assert helpers.identical(turned, mean_of(models, weights))


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("merging=dimat model=vit", r"^model: the net uses 'positions', .*, so its hidden units cannot be permuted"),
        ("merging=dimat merging.anchor=agent0", r"merging\.anchor: got agent0.*: self, or topology=complete\."),
        (
            "merging=dimat model.batch_norm=local " + " ".join(WITH_BATCH_NORM),
            r"merging\.match: got activation, but under model\.batch_norm=local .*: identity\.",
        ),
        ("merging=dimat topology=star", r"topology: got star, but merging=dimat needs peers; valid: auto, bipartite"),
        (
            "merging=dimat merging.stats=proxy server_data=none",
            r"server_data: merging=dimat requires server_data.*=share",
        ),
        (
            "baseline=peer_average baseline.reset_batch_norm=proxy server_data=none",
            r"server_data: baseline=peer_average requires server_data, which is not there; try server_data=share",
        ),
        ("merging=dimat merging.stats=mine", r"merging\.stats: got 'mine'.*own"),
        ("baseline=qg_dsgdm client_optimizer=adam", r"client_optimizer\._target_: got Adam.*optimizers\.SGD\."),
        ("baseline=qg_dsgdm client_optimizer.momentum=0.9", r"client_optimizer\.momentum: got 0\.9.*value: 0\."),
        ("merging=dimat topology=torus", r"topology: got 5 agents: a torus"),
    ],
)
def test_what_is_refused_before_the_first_round(line: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        helpers.plan(*line.split())


def test_a_net_that_cannot_be_permuted_can_be_averaged() -> None:
    assert helpers.plan("merging=dimat", "merging.match=identity", "model=vit").method
    linear = helpers.plan("merging=dimat", "model.hidden=[]", "initial=different", STILL)
    after, record = step(linear)
    assert reported(record, "fixed_points") == [1.0] * 5
    expected = mixed_by_hand(Ring().mixing(5, 0), [model.params for model in starts(linear)])
    assert all(helpers.close(m.params, e) for m, e in zip(after.state["models"], expected, strict=True))
