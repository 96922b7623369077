"""Feddle's search for coefficients: its constraints, exact solutions, and the labels and the head that it reads."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from feddle_helpers import PURE, Run, coefficients, forward, planned, play, run, server_data
from helpers import identical
from torch import Tensor

from hybridfl import params as P
from hybridfl.local import Outcome, Task
from hybridfl.merging.objectives import ServerLoss
from hybridfl.plan import Plan
from hybridfl.types import SERVER, Model, View

# -- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "granularity"), [("mean", "block"), ("unit", "scalar")])
@pytest.mark.parametrize("kind", ["adam", "sgd", "es", "closed_form"])
def test_affine_coefficients_keep_their_sum_through_a_search(kind, norm, granularity) -> None:
    case = [f"merging.search.kind={kind}", f"merging.norm={norm}", f"merging.coef.granularity={granularity}"]
    played = play(*case, "merging.search.lr=0.1", "merging.search.steps=10", "dtype=float32", rounds=3)
    state = played.states[-1]
    updates = [entry["update"] for entry in state["atlas"]]
    wanted = float(torch.stack([u.norm() for u in updates]).mean()) if norm == "unit" else 1.0
    c = coefficients(state)
    assert c.shape == (len(updates), 2 if granularity == "block" else 1)
    torch.testing.assert_close(c.sum(0), torch.full_like(c[0], wanted), atol=1e-6, rtol=1e-6)
    default = torch.tensor([wanted / 3 if entry["added"] == 2 else 0.0 for entry in state["atlas"]])
    assert (c - default.unsqueeze(1)).abs().max() > 1e-3 * wanted


@pytest.mark.parametrize("kind", ["adam", "sgd", "es"])
@pytest.mark.parametrize("constraint", ["nonneg", "simplex", "box"])
def test_bounds_hold_through_a_search_and_are_met(constraint, kind) -> None:
    case = [f"merging.coef.constraint={constraint}", f"merging.search.kind={kind}", "merging.coef.c_max=0.4"]
    lr = {"adam": 0.5, "sgd": 10, "es": 1.5}[kind]
    played = play(*case, *PURE, f"merging.search.lr={lr}", "merging.search.steps=15", rounds=3)
    c = torch.cat([coefficients(state) for state in played.states[1:]])
    if constraint == "box":
        assert c.abs().max() == 0.4
    else:
        assert c.min() == 0
    if constraint == "simplex":
        assert coefficients(played.states[-1]).sum() == pytest.approx(1, abs=1e-9)


def normal_equations(played: Run, of_logits: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of round 0's merge at its start, gradient and Hessian there, through a stack of the updates."""
    x, y = server_data(played)
    origin = P.flatten(played.states[0]["global"].params)
    updates = torch.stack([entry["update"] for entry in played.states[1]["atlas"]])

    def loss(c: Tensor) -> Tensor:
        return of_logits(forward(played, origin + c @ updates, x), y)

    start = torch.full((len(updates),), 1 / len(updates), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(start), start)
    return start.detach(), gradient, torch.autograd.functional.hessian(loss, start.detach())


def newton(start: Tensor, gradient: Tensor, hessian: Tensor, is_affine: bool) -> Tensor:
    """``start - H⁻¹ g``, or with the sum kept (the equations of Karush, Kuhn and Tucker)."""
    if not is_affine:
        return start - torch.linalg.solve(hessian, gradient)
    k = len(start)
    system = torch.zeros(k + 1, k + 1, dtype=start.dtype)
    system[:k, :k], system[:k, k], system[k, :k] = hessian, 1, 1
    return start - torch.linalg.solve(system, torch.cat([gradient, gradient.new_zeros(1)]))[:k]


def squared_error(logits: Tensor, y: Tensor) -> Tensor:
    return (logits - F.one_hot(y, 4)).square().sum(1).mean()


@pytest.mark.parametrize("constraint", ["free", "affine"])
@pytest.mark.parametrize(
    "search",
    [
        ["merging.search.kind=adam", "merging.search.steps=500", "merging.search.lr=0.05"],
        ["merging.search.kind=sgd", "merging.search.steps=500", "merging.search.lr=0.5"],
        ["merging.search.kind=es", "merging.search.steps=500", "merging.search.lr=0.1"],
    ],
    ids=["adam", "sgd", "es"],
)
def test_a_quadratic_is_solved(monkeypatch, search, constraint) -> None:
    monkeypatch.setattr(ServerLoss, "value", lambda self, logits, batch, ctx: squared_error(logits, batch.y))
    case = [*PURE, f"merging.coef.constraint={constraint}", "model.hidden=[]"]
    played = play(*case, *search, rounds=1)
    start, gradient, hessian = normal_equations(played, squared_error)
    best = newton(start, gradient, hessian, constraint == "affine")
    assert (best - start).abs().max() > 0.1
    torch.testing.assert_close(coefficients(played.states[1]).squeeze(1), best, atol=2e-3, rtol=0)


@pytest.mark.parametrize("constraint", ["free", "affine"])
@pytest.mark.parametrize("prox", [0, 0.5])
def test_the_closed_form_is_a_newton_step_for_a_linear_net(prox, constraint) -> None:
    case = [*PURE, f"merging.coef.constraint={constraint}", f"merging.search.prox={prox}", "model.hidden=[]"]
    played = play(*case, "merging.search.kind=closed_form", rounds=1)
    start, gradient, hessian = normal_equations(played, lambda logits, y: F.cross_entropy(logits, y))
    hessian += 2 * prox * torch.eye(len(start), dtype=hessian.dtype)
    best = newton(start, gradient, hessian, constraint == "affine")
    assert (best - start).abs().max() > 1e-2
    torch.testing.assert_close(coefficients(played.states[1]).squeeze(1), best, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        (objective, kind)
        for objective in ("ce", "kd", "entropy", "mix")
        for kind in ("adam", "sgd", "es", "closed_form")
        if (objective, kind) != ("entropy", "closed_form")
    ],
)
def test_the_search_lowers_the_loss_it_searches(objective, kind) -> None:
    case = [f"merging.objective={objective}", f"merging.search.kind={kind}", *PURE]
    case += [f"merging.search.lr={0.1 if kind == 'sgd' else 0.005}"]
    played = play(*case, "merging.search.steps=10", rounds=3)
    for (found,), (default,) in zip(
        played.reported("server_loss"), played.reported("server_loss_default"), strict=True
    ):
        assert found < default


def test_the_pull_holds_the_coefficients_at_the_default() -> None:
    free, held = (play(*PURE, "merging.search.kind=closed_form", f"merging.search.prox={prox}") for prox in (0, 1e6))
    default = torch.tensor([1 / 3 if e["added"] == 1 else 0.0 for e in held.states[-1]["atlas"]], dtype=torch.float64)
    assert (coefficients(held.states[-1]).squeeze(1) - default).abs().max() < 1e-5
    assert (coefficients(free.states[-1]).squeeze(1) - default[: len(free.states[-1]["atlas"])]).abs().max() > 1e-2


@pytest.mark.parametrize("constraint", ["free", "affine"])
def test_noise_in_the_atlas_gets_small_coefficients(constraint) -> None:
    def spoil(task: Task, outcome: Outcome) -> Outcome:
        result = outcome.result
        if task.job.participant in (SERVER, good):
            return outcome
        rng = torch.Generator().manual_seed(task.job.participant)
        noise = {n: torch.randn(t.shape, generator=rng, dtype=t.dtype) for n, t in result.model.params.items()}
        params = P.add(result.start.params, noise, 5 * float(P.norm(result.delta) / P.norm(noise)))
        return replace(outcome, result=replace(result, model=Model(params, {})))

    case = ["partitioning=iid", "model.hidden=[]", "client_optimizer.steps=30", f"merging.coef.constraint={constraint}"]
    # Many directions, so that random ones are nearly at right angles with what the server's examples ask for.
    case += ["dataset.train=2000", "dataset.shape=[1,8,8]", "dataset.classes=10", "server_data.examples=300"]
    good = planned(*case).engine().schedule.born(0)[0].client
    played = play(*case, "merging.search.steps=200", rounds=1, alter=spoil)
    by_client = {client: abs(value) for name, client, value in played.records[0].reports if name == "coefficient"}
    best = by_client.pop(good)
    assert len(by_client) == 2
    assert max(by_client.values()) < 0.15 * best


# -- labels and the server's head -------------------------------------------------------------------------------------


def poisoned(plan: Plan, label: int | None) -> Plan:
    """The plan with all the server's labels replaced; none is out of range if ``label`` is not."""
    if label is not None:
        for split in typing.get_args(Literal["train", "val"]):
            plan.federation.bench.y[plan.federation.rows(SERVER, View(split=split))] = label
    return plan


@pytest.mark.parametrize(
    ("objective", "kind", "evict", "accept"),
    [
        *((objective, "adam", "cosine", "heldout") for objective in ("kd", "entropy")),
        *((objective, "sgd", "coef", "train") for objective in ("kd", "entropy")),
        *((objective, "es", "coef", "none") for objective in ("kd", "entropy")),
        ("kd", "closed_form", "cosine", "none"),
    ],
)
def test_surrogates_never_read_the_servers_labels(objective, kind, evict, accept) -> None:
    case = [f"merging.objective={objective}", f"merging.search.kind={kind}", f"merging.atlas.evict={evict}"]
    case += [f"merging.fallback.accept={accept}", "merging.atlas.size=3"]
    clean, blind = (run(poisoned(planned(*case), label), rounds=2) for label in (None, 10**6))
    assert identical(clean.states, blind.states)
    assert identical([r.reports for r in clean.records], [r.reports for r in blind.records])
    assert "server_labels" not in clean.plan.method.requires


@pytest.mark.parametrize("objective", ["ce", "head", "mix", "gradmatch"])
def test_the_others_read_them_and_say_so(objective) -> None:
    case = [f"merging.objective={objective}"]
    clean, wrong = (run(poisoned(planned(*case), label), rounds=1) for label in (None, 0))
    assert not torch.equal(clean.flat, wrong.flat)
    assert "server_labels" in clean.plan.method.requires


def test_the_head_objective_trains_the_servers_own_head_and_coefficients_only() -> None:
    played = play("merging.objective=head", "merging.norm=none", rounds=3)
    for before, after in zip(played.states, played.states[1:], strict=False):
        assert set(after["head"]) == {"head.weight", "head.bias"}
        assert all(not torch.equal(after["head"][name], before["head"][name]) for name in after["head"])
        updates = torch.stack([entry["update"] for entry in after["atlas"]])
        merged = P.flatten(before["global"].params) + coefficients(after).squeeze(1) @ updates
        torch.testing.assert_close(P.flatten(after["global"].params), merged, atol=1e-12, rtol=0)
    # The clients' head is merged like everything else; it is not the server's.
    assert not torch.equal(played.states[-1]["global"].params["head.bias"], played.states[-1]["head"]["head.bias"])
    for task, _ in played.seen:
        if task.job.tag == "search":
            assert set(task.job.start.params) == {"c", "head.weight", "head.bias"}


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_the_heads_learning_rate_is_its_own_whatever_that_of_the_coefficients(kind) -> None:
    case = ["merging.objective=head", f"merging.search.kind={kind}", "merging.search.steps=1"]

    def moved(*more: str) -> Tensor:
        before, after = (P.flatten(state["head"]) for state in play(*case, *more, rounds=1).states)
        return after - before

    base = moved("merging.search.head_lr=0.05")
    longer = moved("merging.search.head_lr=0.1", "merging.search.lr=0.7", "merging.norm=unit")
    torch.testing.assert_close(longer, 2 * base)


def test_no_head_is_kept_where_none_is_asked_for() -> None:
    assert play().states[-1]["head"] == {}
