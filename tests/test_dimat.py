"""Peers that average and DIMAT: what mixing, alignment and momentum are."""

from __future__ import annotations

import copy
from collections.abc import Generator

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dimat_helpers import NARROW, STILL, WITH_BATCH_NORM, mixed_by_hand, reported, starts, step

from hybridfl import params as P
from hybridfl.merging.alignment import specification
from hybridfl.merging.permutation import permuted, random_permutations
from hybridfl.methods.dimat import Dimat
from hybridfl.methods.peer_average import Rows
from hybridfl.mixing import consensus_distance, spectral_gap
from hybridfl.models import batch_norm
from hybridfl.params import Params
from hybridfl.plan import Plan
from hybridfl.topology import Ring
from hybridfl.types import Job, Model, Results, Round, State

FULL_BATCH = ("client_optimizer.batch_size=1000", "client_optimizer.lr=0.3")


def logits(plan: Plan, model: Model) -> torch.Tensor:
    net = copy.deepcopy(plan.federation.net).eval()
    with torch.no_grad():
        return torch.func.functional_call(net, {**model.params, **model.buffers}, (plan.federation.test[0],))


# -- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", ["activation", "weight"])
@pytest.mark.parametrize("model", [("model.hidden=[9,7]",), ("model=cnn", "model.channels=[4,8]", "model.hidden=9")])
def test_a_permuted_clone_merges_to_the_function_it_was(match: str, model: tuple[str, ...]) -> None:
    plan = helpers.plan(
        "merging=dimat", f"merging.match={match}", "clients.number=2", "clients.per_round=1", STILL, *model
    )
    net, start = plan.federation.net, plan.federation.start
    spec = specification(net, (1, 4, 4))
    clone = permuted(start, spec, random_permutations(spec, np.random.default_rng(0)))
    after, record = step(plan, [start, clone])
    for before, merged in zip([start, clone], after.state["models"], strict=True):
        torch.testing.assert_close(logits(plan, merged), logits(plan, before), rtol=0, atol=1e-6)
    assert max(reported(record, "fixed_points")) < 0.9
    unaligned, _ = step(plan, [start, clone], Dimat(match="identity"))
    assert (logits(plan, unaligned.state["models"][0]) - logits(plan, start)).abs().max() > 1e-2


def test_a_permuted_clone_with_batch_norm() -> None:
    """Its running statistics move with its units."""
    line = ("merging=dimat", "clients.number=2", "clients.per_round=1", STILL)
    plan = helpers.plan(*line, *WITH_BATCH_NORM, "model.batch_norm=frozen")
    spec = specification(plan.federation.net, (1, 8, 8))
    random = torch.Generator().manual_seed(0)
    params, buffers = plan.federation.start
    moved = {n: t + 0.3 * torch.randn(t.shape, generator=random, dtype=t.dtype) for n, t in params.items()}
    free = helpers.plan("merging=dimat", *WITH_BATCH_NORM).federation
    start = batch_norm.reestimated(free.net, Model(moved, buffers), [free.bench.x])
    clone = permuted(start, spec, random_permutations(spec, np.random.default_rng(0)))
    after, record = step(plan, [start, clone])
    assert after.state["resets"] is False
    assert logits(plan, start).std(0).min() > 1e-2  # not all units are dead
    assert max(reported(record, "fixed_points")) < 0.9
    for before, merged in zip([start, clone], after.state["models"], strict=True):
        torch.testing.assert_close(logits(plan, merged), logits(plan, before), rtol=0, atol=1e-6)


@pytest.mark.parametrize("match", ["activation", "weight", "identity"])
def test_identical_models_are_a_fixed_point(match: str) -> None:
    plan = helpers.plan("merging=dimat", f"merging.match={match}", STILL)
    after, record = step(plan)
    assert all(helpers.close(m.params, plan.federation.start.params, 1e-15) for m in after.state["models"])
    assert reported(record, "consensus_distance")[0] < 1e-14
    assert reported(record, "fixed_points") == ([] if match == "identity" else [1.0] * 5)


def test_without_alignment_it_is_averaging() -> None:
    plan = helpers.plan("merging=dimat", "merging.match=identity", *NARROW)
    averaged = helpers.plan("baseline=peer_average", *NARROW)
    ends = [helpers.snapshots(p.engine())[-1] for p in (plan, averaged)]
    assert helpers.identical(*(end.state["models"] for end in ends))
    still = helpers.plan("merging=dimat", "merging.match=identity", STILL, *NARROW)
    expected = mixed_by_hand(Ring().mixing(5, 0), [model.params for model in starts(still)])
    after, record = step(still)
    for model, by_hand in zip(after.state["models"], expected, strict=True):
        assert helpers.close(model.params, by_hand)
    assert reported(record, "spectral_gap") == [spectral_gap(Ring().mixing(5, 0))]
    assert reported(record, "consensus_distance") == [pytest.approx(consensus_distance(expected))]


def test_alignment_brings_different_agents_nearer() -> None:
    distances = []
    for match in ("activation", "weight", "identity"):
        plan = helpers.plan("merging=dimat", f"merging.match={match}", STILL, "topology=complete", *NARROW)
        after, _ = step(plan)
        first = after.state["models"][0].params
        distances.append(float(P.norm(P.subtract(first, starts(plan)[0].params))))
    assert distances[1] < distances[2]  # agreeing in weights is what it maximises
    assert len(set(distances)) == 3


class Backwards(Dimat):
    """Agents and neighbours in reversed order."""

    def mixed(
        self, models: list[Model], rows: Rows, state: State, now: Round
    ) -> Generator[list[Job], Results, dict[int, Model]]:
        turned = {i: dict(reversed(row.items())) for i, row in reversed(rows.items())}
        return (yield from super().mixed(models, turned, state, now))


@pytest.mark.parametrize("match", ["activation", "weight", "identity"])
def test_the_order_of_neighbours_does_not_matter(match: str) -> None:
    plan = helpers.plan("merging=dimat", f"merging.match={match}", "topology=complete", *NARROW)
    states = [step(plan, method=method)[0].state for method in (Dimat(match), Backwards(match))]  # type: ignore[arg-type]
    assert helpers.identical(*states)


def test_in_the_order_of_the_first_agent() -> None:
    plan = helpers.plan("merging=dimat", "merging.anchor=agent0", "topology=complete", STILL, *NARROW)
    after, record = step(plan)
    models = after.state["models"]
    alone, _ = step(helpers.plan("merging=dimat", "topology=complete", STILL, *NARROW))
    assert helpers.close(models[0].params, alone.state["models"][0].params)
    assert all(helpers.identical(model, models[0]) for model in models)
    assert reported(record, "consensus_distance") == [0.0]
    assert after.costs.bytes_peer == 8 * P.nbytes(P.tensors(models[0]))


# -- steps and momentum ----------------------------------------------------------------------------------------------


def gradients(plan: Plan, models: list[Params]) -> list[Params]:
    """Of every agent's mean loss at its own model, by plain PyTorch."""
    found, bench = [], plan.federation.bench
    for k, model in enumerate(models):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in model.items()}
        index = torch.from_numpy(plan.federation.owned(k))
        out = torch.func.functional_call(bench.net, leaves, (bench.x[index],))
        grads = torch.autograd.grad(F.cross_entropy(out, bench.y[index]), list(leaves.values()))
        found.append(dict(zip(leaves, grads, strict=True)))
    return found


def test_decentralised_sgd_by_its_formula() -> None:
    plan = helpers.plan("baseline=dsgd", "rounds=2", *FULL_BATCH, *NARROW)
    W = Ring().mixing(5, 0)
    models = [model.params for model in starts(plan)]
    for snapshot in helpers.snapshots(plan.engine())[1:]:
        moved = [P.add(x, g, -0.3) for x, g in zip(models, gradients(plan, models), strict=True)]
        models = mixed_by_hand(W, moved)
        assert snapshot.costs.local_steps == 5 * snapshot.round
        for model, expected in zip(snapshot.state["models"], models, strict=True):
            assert helpers.close(model.params, expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_quasi_global_momentum_by_its_formula(nesterov: bool) -> None:
    options = ("baseline.beta=0.8", "baseline.mu=0.7", f"baseline.nesterov={str(nesterov).lower()}")
    rates = ("client_optimizer.lr_decay=0.5", "client_optimizer.weight_decay=0.01")
    plan = helpers.plan("baseline=qg_dsgdm", *options, *rates, *FULL_BATCH, *NARROW)
    W = Ring().mixing(5, 0)
    models = [model.params for model in starts(plan)]
    momenta = [P.subtract(x, x) for x in models]
    for t, snapshot in enumerate(helpers.snapshots(plan.engine())[1:]):
        lr, moved = 0.3 * 0.5**t, []
        for x, g, m in zip(models, gradients(plan, models), momenta, strict=True):
            g = P.add(g, x, 0.01)
            ahead = P.add(g, m, 0.8)
            moved.append(P.add(x, P.add(g, ahead, 0.8) if nesterov else ahead, -lr))
        mixed = mixed_by_hand(W, moved)
        momenta = [
            {name: 0.7 * m[name] + 0.3 * (x[name] - new[name]) / lr for name in m}
            for m, x, new in zip(momenta, models, mixed, strict=True)
        ]
        models = mixed
        for model, expected in zip(snapshot.state["models"], models, strict=True):
            assert helpers.close(model.params, expected)
        for found, momentum in zip(snapshot.state["momenta"], momenta, strict=True):
            assert helpers.close(found, momentum)


def test_with_more_steps_the_momentum_is_the_mean_displacement_of_one() -> None:
    plan = helpers.plan("baseline=qg_dsgdm", "baseline.local_steps=3", "baseline.mu=0", "rounds=1", *NARROW)
    (after,) = helpers.snapshots(plan.engine())[1:]
    for start, model, momentum in zip(starts(plan), after.state["models"], after.state["momenta"], strict=True):
        displacement = P.subtract(start.params, model.params)
        assert helpers.close(momentum, {name: t / (3 * 0.1) for name, t in displacement.items()})


def test_without_momentum_it_is_decentralised_sgd() -> None:
    line = ("rounds=3", *NARROW)
    plans = helpers.plan("baseline=qg_dsgdm", "baseline.beta=0", *line), helpers.plan("baseline=dsgd", *line)
    ends = [helpers.snapshots(plan.engine())[-1].state["models"] for plan in plans]
    assert all(helpers.close(a.params, b.params) for a, b in zip(*ends, strict=True))
