"""The server's own update as an axis of the search, and its gradient as the search's objective."""

from __future__ import annotations

from dataclasses import replace

import helpers
import pytest
import torch
import torch.nn.functional as F
from feddle_helpers import coefficients, forward, planned, play, server_data
from feddle_joint_helpers import GUIDED, adam, arrivals
from torch import Tensor

from hybridfl import params as P
from hybridfl.local import Outcome, Task
from hybridfl.types import SERVER, Model, View

# -- the server's axis ------------------------------------------------------------------------------------------------


def test_the_servers_axis_by_hand() -> None:
    """Four steps of fine-tuning from the mean, then four of Adam along seven axes, of which the server's is the last."""
    case = ["merging.server_axis.examples=same", "merging.search.batch=1000", "merging.search.prox=0"]
    played = play(*case, "merging.server_axis.lr=0.2", rounds=1)
    x, y = server_data(played)
    omega = P.flatten(played.states[0]["global"].params)
    updates = torch.stack([update for _, update, _ in arrivals(played, 0)])
    lengths = updates.norm(dim=1)
    axes = updates * (lengths.mean() / lengths).unsqueeze(1)
    start = w = omega + axes.mean(0)
    for _ in range(4):
        w = w.detach().requires_grad_()
        F.cross_entropy(forward(played, w, x), y).backward()
        w = w - 0.2 * w.grad  # type: ignore[operator]
    own = (w - start).detach()
    first = own.norm() / lengths.mean()
    u = torch.tensor([1 / 3] * 3 + [float(first)], dtype=torch.float64, requires_grad=True)
    moments: list[Tensor] = []
    for _ in range(4):
        c = torch.cat([u[:3] + (1 - u[:3].sum()) / 3, u[3:]])
        w = omega + c @ torch.cat([axes, (own / first).unsqueeze(0)])
        (slope,) = torch.autograd.grad(F.cross_entropy(forward(played, w, x), y), u)
        with torch.no_grad():
            u -= adam(moments, slope)
    c = torch.cat([u[:3] + (1 - u[:3].sum()) / 3, u[3:]]).detach()
    torch.testing.assert_close(
        played.flat, omega + c @ torch.cat([axes, (own / first).unsqueeze(0)]), atol=1e-10, rtol=0
    )
    assert played.reported("server_axis")[0][0] == pytest.approx(float(c[3] / first))
    assert abs(c[3] - first) > 1e-2


def test_the_servers_axis_keeps_a_coefficient_that_is_not_negative() -> None:
    """A search that goes uphill."""

    def backwards(task: Task, outcome: Outcome) -> Outcome:
        if "axis" not in task.job.start.params:
            return outcome
        result = outcome.result
        params = result.model.params | {"axis": torch.full((1, 1), -3.0, dtype=torch.float64)}
        return replace(outcome, result=replace(result, model=Model(params, {})))

    played = play("merging.server_axis.examples=same", rounds=1, alter=backwards)
    assert played.reported("server_axis") == [[0]]
    axes = torch.stack([e["update"] for e in played.states[1]["atlas"]])
    axes = axes * (axes.norm(dim=1).mean() / axes.norm(dim=1)).unsqueeze(1)
    merged = P.flatten(played.states[0]["global"].params) + coefficients(played.states[1]).squeeze(1) @ axes
    torch.testing.assert_close(played.flat, merged, atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", ["unit", "layer"])
def test_the_servers_axis_in_other_units(norm) -> None:
    axis = ["merging.server_axis.examples=same", "merging.search.batch=1000"]
    played, mean = (play(*axis, f"merging.norm={n}", rounds=1) for n in (norm, "mean"))
    (frozen,) = (task.job.frozen for task, _ in played.seen if task.job.tag == "search")
    updates = torch.stack([e["update"] for e in played.states[1]["atlas"]])
    assert float(frozen["axis"].norm()) == pytest.approx(1 if norm == "unit" else float(updates.norm(dim=1).mean()))
    if norm == "unit":
        torch.testing.assert_close(played.flat, mean.flat, atol=1e-6, rtol=0)


def test_halves_are_disjoint_complete_and_drawn_anew() -> None:
    played = play(GUIDED, "merging.server_axis.examples=halves", rounds=3)
    every = played.plan.federation.rows(SERVER, View()).tolist()
    seen = []
    for t in range(3):
        by_tag = {task.job.tag: task for task, _ in played.seen if task.round == t and task.steps and task.job.tag}
        first, second = (by_tag[tag].rows.tolist() for tag in ("axis", "search"))
        assert len(first) == len(second) == 15
        assert sorted(first + second) == sorted(every)
        seen.append(first)
        for task in by_tag.values():
            whole = [o.result for k, o in played.seen if k.round == t and k.job.tag == "teacher"]
            assert len(whole) == 3
            teacher = torch.stack([row for row in played.states[t + 1]["logits"]["train"] if row is not None]).mean(0)
            picked = [every.index(row) for row in task.rows.tolist()]
            torch.testing.assert_close(task.job.ctx["teacher"], teacher[picked])
    assert seen[0] != seen[1] != seen[2]


# -- the server's gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adam", "es"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_gradmatch_turns_the_step_towards_the_servers_gradient_in_the_body(split, kind) -> None:
    case = [
        "merging.objective=gradmatch",
        "merging.search.prox=0",
        "merging.atlas.evict=cosine",
        "merging.atlas.size=4",
    ]
    accept = {"train": "none", "val": "heldout"}[split]
    slack = ["merging.fallback.slack=2", f"merging.search.kind={kind}"]
    played = play(*case, f"merging.fallback.accept={accept}", *slack, rounds=3)
    rows, bench = played.plan.federation.rows(SERVER, View(split=split)), played.plan.federation.bench
    layout = P.Layout.of(played.states[0]["global"].params)
    sizes = zip(layout.names, layout.sizes, strict=True)
    body = torch.cat([torch.full((size,), not name.startswith("head.")) for name, size in sizes])
    for t, (found,) in enumerate(played.reported("server_loss")):
        before, after = (P.flatten(state["global"].params) for state in played.states[t : t + 2])
        w = before.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(forward(played, w, bench.x[rows]), bench.y[rows]), w)
        cosine = F.cosine_similarity((after - before)[body], -slope[body], dim=0)
        assert found == pytest.approx(1 - float(cosine))
        (default,) = played.reported("server_loss_default")[t]
        assert split == "val" or found < default


def test_gradmatch_runs_the_net_for_one_gradient_and_no_more() -> None:
    plan = planned("merging.objective=gradmatch", "rounds=1")
    size = sum(tensor.numel() for tensor in plan.federation.start.params.values())
    maps = 8 * 2 * 3 * size + 2 * 3 * size
    assert helpers.snapshots(plan.engine())[-1].costs.server_macs == 3 * 30 * plan.federation.forward_macs + maps
