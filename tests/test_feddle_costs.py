"""What Feddle and its extensions keep, and what they cost."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
from feddle_helpers import planned, play
from feddle_joint_helpers import CLEAN, GUIDED, LATE
from helpers import identical

from hybridfl import params as P
from hybridfl.checkpoints import pack, unpack
from hybridfl.types import SERVER

# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
@pytest.mark.parametrize("anchor", ["delta", "model"])
def test_a_stored_atlas_is_short_and_near_the_exact_one(storage, anchor) -> None:
    case = [GUIDED, f"merging.anchor={anchor}", "clients.delay=1"]
    exact, short = play(*case, rounds=3), play(*case, f"merging.atlas.storage={storage}", rounds=3)
    assert {e["update"].dtype for e in short.states[-1]["atlas"]} == {getattr(torch, storage)}
    assert short.flat.dtype == torch.float64
    distance = float(
        (short.flat - exact.flat).norm() / (exact.flat - P.flatten(exact.states[0]["global"].params)).norm()
    )
    assert 0 < distance < (0.02 if storage == "float16" else 0.1)


def test_the_served_model_is_a_mean_of_the_global_ones() -> None:
    played = play(GUIDED, "merging.ema=0.75", rounds=3)
    plain = play(GUIDED, rounds=3)
    models = [P.flatten(state["global"].params) for state in played.states]
    assert torch.equal(models[-1], plain.flat)
    mean = models[1]
    for state, model in zip(played.states[2:], models[2:], strict=True):
        mean = 0.75 * mean + 0.25 * model
        ((served, *_),) = played.plan.method.serve(state, SERVER)
        torch.testing.assert_close(P.flatten(served.params), mean)
    ((first, *_),) = played.plan.method.serve(played.states[1], SERVER)
    assert torch.equal(P.flatten(first.params), models[1])
    assert played.plan.method.serve(played.states[0], SERVER)[0].model is played.states[0]["ema"]


EVERYTHING = [GUIDED, *LATE, "merging.ema=0.9", "merging.origin_drop=2", "merging.server_axis.examples=halves"]
EVERYTHING += ["merging.atlas.storage=bfloat16", "merging.mix_weight=agreement", "merging.residual.max_ratio=0.5"]


def test_a_run_that_continues_from_what_is_stored_is_the_run_that_was_not_stopped() -> None:
    whole = play(*EVERYTHING, rounds=4)
    stored = play(*EVERYTHING, rounds=4, between=lambda state: unpack(copy.deepcopy(pack(state))))
    assert identical(whole.states[-1], stored.states[-1])
    assert [r.reports for r in whole.records] == [r.reports for r in stored.records]


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_every_pass_and_every_map_is_booked() -> None:
    plan = planned(GUIDED, "merging.search.batch=10", "merging.mix_weight=agreement", "rounds=2")
    engine = plan.engine()
    costs = [snapshot.costs.server_macs for snapshot in helpers.snapshots(engine)]
    pass_, d = plan.federation.forward_macs, plan.federation.start.params
    size, n = sum(t.numel() for t in d.values()), 30
    # All six clients have arrived by then, or some twice.
    atlas = len({arrival.client for t in range(2) for arrival in engine.schedule.born(t)})
    teachers, measures = 3 * n * pass_, 2 * (n * pass_ + atlas * size)
    search = 8 * (3 * 10 * pass_ + 2 * atlas * size)
    assert costs[2] - costs[1] == teachers + search + measures


def test_frozen_coefficients_cost_no_map_and_the_axis_is_one_more() -> None:
    frozen = planned(*CLEAN, "merging.coef.frozen=true", "merging.search.batch=10", "rounds=1")
    pass_, size, n = frozen.federation.forward_macs, sum(t.numel() for t in frozen.federation.start.params.values()), 30
    measures = 2 * (n * pass_ + 3 * size)
    assert helpers.snapshots(frozen.engine())[-1].costs.server_macs == 8 * 3 * 10 * pass_ + measures
    axis = planned(*CLEAN, "merging.server_axis.examples=same", "merging.search.batch=10", "rounds=1")
    search = 8 * 3 * 10 * pass_ + 4 * 2 * 4 * size
    assert helpers.snapshots(axis.engine())[-1].costs.server_macs == search + measures + 2 * size


def test_the_pull_follows_the_number_of_anchors() -> None:
    played = play("merging.search.prox=auto", "clients.delay=1", rounds=3)
    for t in range(3):
        (search,) = (task for task, _ in played.seen if task.job.tag == "search" and task.round == t)
        assert search.job.ctx["prox"] == pytest.approx(0.2 * len(search.job.frozen["anchors"]) / 30)
