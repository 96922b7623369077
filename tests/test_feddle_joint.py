"""Feddle's extensions: the joint search by hand, identities, calibration, fallback and teacher, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import helpers
import pytest
import torch
import torch.nn.functional as F
from feddle_helpers import Run, coefficients, composed, forward, planned, play, run, searched_c, server_data
from feddle_joint_helpers import CLEAN, GUIDED, LATE, adam, arrivals
from helpers import identical
from torch import Tensor

from hybridfl import params as P
from hybridfl.engine import Unsuitable
from hybridfl.errors import ConfigError
from hybridfl.local import Outcome, Task
from hybridfl.merging.search import Residual
from hybridfl.methods.ca2fl import CA2FL
from hybridfl.methods.calibrated_finetune import CalibratedFinetune
from hybridfl.methods.feddle import Feddle
from hybridfl.optimizers import SGD, batches
from hybridfl.parametrization import Shift
from hybridfl.plan import make_plan
from hybridfl.rng import stream
from hybridfl.types import SERVER, Model, View

LABELFREE = (GUIDED, "merging.objective=kd")
"""What feddle_joint_clean and feddle_joint_labelfree are, without another composition."""


def calibration(cache: dict[int, Tensor], new: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """v of CA²FL over the clients seen, whose cache it brings up to date."""
    h = torch.stack(list(cache.values())).mean(0) if cache else torch.zeros_like(new[0][1])
    v = h + torch.stack([update - cache.get(client, h) for client, update, _ in new]).mean(0)
    cache |= {client: update for client, update, _ in new}
    return v


def by_hand(
    played: Run, rounds: int, batch: int, prox: float | None, share: float, bound: float | None, lr: float = 0.02
) -> list[Tensor]:
    """Global models of the joint search: coefficients by Adam, the residual by plain descent."""
    x, y = server_data(played)
    omega, cache, logits, atlas = P.flatten(played.states[0]["global"].params), {}, {}, {}
    found = []
    for t in range(rounds):
        new = arrivals(played, t)
        v = calibration(cache, new)
        for client, update, model in new:
            atlas.pop(client, None)
            atlas[client] = update
            logits[client] = forward(played, model, x).detach()
        teacher = torch.stack(list(logits.values())).mean(0)
        lengths = torch.stack([update.norm() for update in atlas.values()])
        axes = torch.stack(list(atlas.values())) * (lengths.mean() / lengths).unsqueeze(1)
        pull = 0.2 * len(axes) / len(x) if prox is None else prox
        u, z = (torch.zeros(n, dtype=x.dtype, requires_grad=True) for n in (len(axes), len(omega)))
        moments: list[Tensor] = []
        order = stream(played.plan.federation.seed, "local", t, SERVER, "search", 0)
        for picked in batches(len(x), SGD(steps=8, batch_size=batch), order, 8):
            c = u - u.mean()
            output = forward(played, omega + v + c @ axes + z, x[picked])
            kd = F.kl_div(output.log_softmax(1), teacher[picked].softmax(1), reduction="batchmean")
            loss = share * F.cross_entropy(output, y[picked]) + (1 - share) * kd + pull * c.square().sum()
            slope, downhill = torch.autograd.grad(loss, (u, z))
            with torch.no_grad():
                u -= adam(moments, slope, lr)
                z -= 0.05 * downhill
                if bound is not None and z.norm() > bound * lengths.mean():
                    z *= bound * lengths.mean() / z.norm()
        omega = (omega + v + (u - u.mean()) @ axes + z).detach()
        found.append(omega)
    return found


@pytest.mark.parametrize(
    ("case", "numbers"),
    [
        ([*CLEAN], (32, None, 1.0, None)),
        ([*CLEAN, *LATE, "merging.search.batch=7", "merging.search.prox=0.3"], (7, 0.3, 1.0, None)),
        ([*CLEAN, "merging.residual.max_ratio=50"], (32, None, 1.0, 50.0)),
        ([GUIDED, "merging.coef.frozen=true"], (32, None, 0.5, None, 0.0)),
        ([GUIDED, *LATE, "merging.search.batch=7", "merging.residual.max_ratio=0.02"], (7, None, 0.5, 0.02)),
        ([GUIDED, "clients.delay=1", "merging.mix_weight=0.2"], (32, None, 0.2, None)),
        ([*LABELFREE, *LATE], (32, None, 0.0, None)),
    ],
)
def test_the_joint_search_by_hand(case, numbers) -> None:
    played = play(*case, "merging.residual.lr=0.05", rounds=4)
    expected = by_hand(played, 4, *numbers)
    for state, omega in zip(played.states[1:], expected, strict=True):
        torch.testing.assert_close(P.flatten(state["global"].params), omega, atol=1e-10, rtol=0)
    c = coefficients(played.states[-1])
    assert (c.abs().max() > 1e-3) == (numbers[4:] != (0.0,))
    assert c.sum().abs() < 1e-12
    if numbers[3] == 0.02:
        assert played.reported("residual")[-1][0] == pytest.approx(0.02)
    assert len(played.states[-1]["atlas"]) > 3


# -- identities -------------------------------------------------------------------------------------------------------


def test_without_a_search_the_calibrated_origin_is_ca2fls_step() -> None:
    ours = play(GUIDED, *LATE, "merging.search.steps=0", rounds=4)
    ca2fl = run(replace(planned(*LATE), method=CA2FL(unseen="mean")), rounds=4)
    torch.testing.assert_close(ours.flat, ca2fl.flat, atol=1e-12, rtol=0)
    fresh = play(GUIDED, *LATE, "merging.search.steps=0", "merging.origin=fresh", rounds=4)
    assert (fresh.flat - ours.flat).abs().max() > 1e-3


def test_with_frozen_coefficients_it_is_calibrated_finetuning() -> None:
    case = [*LATE, "rounds=4"]
    ours = play(*CLEAN, *case, "merging.coef.frozen=true", "merging.search.batch=1000", rounds=4)
    finetuned = run(replace(planned(*case), method=CalibratedFinetune(steps=8, batch_size=1000)), rounds=4)
    torch.testing.assert_close(ours.flat, finetuned.flat, atol=1e-12, rtol=0)
    searched = play(*CLEAN, *case, "merging.search.batch=1000", rounds=4)
    assert (searched.flat - ours.flat).abs().max() > 1e-3
    assert not coefficients(ours.states[-1]).any()


def test_frozen_coefficients_without_a_residual_are_their_start() -> None:
    frozen, still = play("merging.coef.frozen=true"), play("merging.search.steps=0")
    assert torch.equal(frozen.flat, still.flat)
    assert not [task for task, _ in frozen.seen if task.job.tag == "search"]


def test_without_the_extensions_it_is_feddle_to_the_bit() -> None:
    off = ["origin=fresh", "residual.lr=0", "atlas.cohorts=6", "search.prox=0.1", "teacher=arrivals", "objective=ce"]
    case = ["clients.delay=1.5", "dtype=float32"]
    plain, ours = play(*case, rounds=3), play(GUIDED, *case, *(f"merging.{option}" for option in off), rounds=3)
    assert identical(plain.states, ours.states)
    assert [r.reports for r in plain.records] == [r.reports for r in ours.records]


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_residual_that_cannot_move_changes_no_coefficient(kind) -> None:
    case = [f"merging.search.kind={kind}", "merging.search.batch=5"]
    bare, held = play(*case), play(*case, "merging.residual.lr=1.0e-300")
    assert torch.equal(bare.flat, held.flat)
    assert torch.equal(coefficients(bare.states[-1]), coefficients(held.states[-1]))
    moved = play(*case, "merging.residual.lr=0.05")
    assert (moved.flat - bare.flat).abs().max() > 1e-3


# -- the calibration --------------------------------------------------------------------------------------------------


def test_the_cache_is_of_those_that_arrived_and_shares_the_atlas_tensors_values() -> None:
    played = play(GUIDED, *LATE, rounds=4)
    newest: dict[int, Tensor] = {}
    for t in range(4):
        newest |= {client: update for client, update, _ in arrivals(played, t)}
        cache = played.states[t + 1]["cache"]
        assert {client for client, update in enumerate(cache) if update is not None} == newest.keys()
        assert all(torch.equal(P.flatten(cache[client]), update) for client, update in newest.items())
    assert played.reported("cached")[-1] == [len(newest)]
    assert len(newest) > 3


def test_a_client_with_negative_offsets_leaves_the_calibration_until_one_is_not_negative() -> None:
    """Client 2's offset is negative in the first three merges and in the last; all clients arrive in every round."""
    case = [*CLEAN, "clients.per_round=6", "merging.origin_drop=2", "merging.coef.constraint=free", "merging.norm=none"]
    plan = planned(*case, "merging.residual.lr=0", "rounds=5")
    born, signs = plan.engine().schedule.born, [-1, -1, -1, 1, -1]

    def offsets(t: int) -> Tensor:
        c = [signs[t] if arrival.client == 2 else 0.5 for arrival in born(t)]
        return 1e-3 * torch.tensor(c, dtype=torch.float64).unsqueeze(1)

    def alter(task: Task, outcome: Outcome) -> Outcome:
        return searched_c(lambda old: offsets(task.round))(task, outcome)

    played = run(plan, rounds=5, alter=alter)
    cached = [state["cache"][2] is not None for state in played.states[1:]]
    assert cached == [True, False, False, True, True]
    assert [n for (n,) in played.reported("left_out")] == [0, 1, 1, 0, 0]
    omega, cache = P.flatten(played.states[0]["global"].params), {}
    for t, state in enumerate(played.states[1:]):
        new = arrivals(played, t)
        omega = omega + calibration(cache, new) + offsets(t).squeeze(1) @ torch.stack([update for _, update, _ in new])
        torch.testing.assert_close(P.flatten(state["global"].params), omega, atol=1e-12, rtol=0)
        if not cached[t]:
            del cache[2]


def test_after_a_fallback_offsets_are_not_counted() -> None:
    """The second search goes far astray; its default's offsets, all 0, would set the counts back."""

    def astray(task: Task, outcome: Outcome) -> Outcome:
        far = 1e3 if task.round else 1e-6
        return searched_c(lambda c: far * torch.linspace(-1, 1, c.numel(), dtype=c.dtype).view_as(c))(task, outcome)

    case = [*CLEAN, "merging.origin_drop=9", "merging.fallback.accept=train", "merging.fallback.slack=10"]
    played = play(*case, "merging.residual.lr=1.0e-9", alter=astray)
    assert played.reported("fallback") == [[0], [1]]
    assert sum(played.states[1]["negative"]) == 1
    assert played.states[2]["negative"] == played.states[1]["negative"]


# -- the fallback -----------------------------------------------------------------------------------------------------


LOST = ["merging.residual.lr=1000", "merging.fallback.accept=train"]
"""Steps so long that no point is accepted."""


def test_a_step_too_far_falls_back_to_the_calibrated_mean() -> None:
    ca2fl = run(replace(planned(), method=CA2FL(unseen="mean")))
    for action in ("default", "halve"):
        played = play(GUIDED, *LOST, f"merging.fallback.action={action}")
        assert played.reported("fallback") == [[1], [1]]
        torch.testing.assert_close(played.flat, ca2fl.flat, atol=1e-12, rtol=0)
    skipped = play(GUIDED, *LOST, "merging.fallback.action=skip")
    assert identical(skipped.states[2]["global"], skipped.states[0]["global"])


def test_halving_goes_back_along_coefficients_and_residual_alike() -> None:
    def further(task: Task, outcome: Outcome) -> Outcome:
        if task.job.tag != "search":
            return outcome
        result = outcome.result
        params = {name: 40 * tensor for name, tensor in result.model.params.items()}
        return replace(outcome, result=replace(result, model=Model(params, {})))

    halve = ["merging.fallback.accept=train", "merging.fallback.action=halve"]
    far, halved = (play(GUIDED, *more, rounds=1, alter=further) for more in ([], halve))
    start = play(GUIDED, "merging.search.steps=0", rounds=1).flat
    assert halved.reported("fallback") == [[1]]
    ratio = float((far.flat - start).norm() / (halved.flat - start).norm())
    assert round(ratio) in (2, 4, 8, 16)
    torch.testing.assert_close(halved.flat - start, (far.flat - start) / round(ratio))


def test_damping_goes_part_of_the_way_of_the_residual_too() -> None:
    whole, half, none = (play(GUIDED, f"merging.fallback.damp={damp}", rounds=1).flat for damp in (1, 0.25, 0))
    torch.testing.assert_close(half - none, (whole - none) / 4)
    torch.testing.assert_close(none, play(GUIDED, "merging.search.steps=0", rounds=1).flat)
    assert (whole - none).abs().max() > 1e-3


# -- the teacher ------------------------------------------------------------------------------------------------------


def test_the_share_of_labels_in_the_mix_follows_how_often_the_teacher_is_right() -> None:
    played = play(GUIDED, "merging.mix_weight=agreement", rounds=3)
    x, y = server_data(played)
    logits: dict[int, Tensor] = {}
    for t, (told,) in enumerate(played.reported("agreement")):
        logits |= {client: forward(played, model, x) for client, _, model in arrivals(played, t)}
        agreed = (torch.stack(list(logits.values())).mean(0).argmax(1) == y).double().mean().item()
        assert told == pytest.approx(agreed)
        (search,) = (task for task, _ in played.seen if task.job.tag == "search" and task.round == t)
        assert search.job.ctx["ce_weight"] == told
    assert 0.2 < agreed < 1
    # The same weight given as a number leads to the same model.
    (first,) = played.reported("agreement")[0]
    fixed = play(GUIDED, f"merging.mix_weight={first}", rounds=1)
    assert torch.equal(fixed.flat, P.flatten(played.states[1]["global"].params))


def test_the_heldout_examples_have_a_cached_teacher_of_their_own() -> None:
    played = play(*LABELFREE, "merging.fallback.accept=heldout", *LATE, rounds=3)
    x = played.plan.federation.bench.x[played.plan.federation.rows(SERVER, View(split="val"))]
    logits: dict[int, Tensor] = {}
    for t in range(3):
        logits |= {client: forward(played, model, x) for client, _, model in arrivals(played, t)}
    teacher = torch.stack(list(logits.values())).mean(0)
    measured = [task.job for task, _ in played.seen if task.round == 2 and task.job.view.split == "val"][-2:]
    for job in measured:
        torch.testing.assert_close(job.ctx["teacher"], teacher)
    assert len(teacher) == 10


def test_in_another_task_of_a_stream_logits_are_forgotten() -> None:
    line = ["tasks.number=2", "server_data.examples=48", "rounds=6"]
    played = play(GUIDED, *line, rounds=4)
    for t, state in enumerate(played.states[1:]):
        known = {client for client, row in enumerate(state["logits"]["train"]) if row is not None}
        since = range(t + 1) if t < 3 else range(3, t + 1)
        assert known == {client for round in since for client, _, _ in arrivals(played, round)}
        assert state["task"] == (t >= 3)


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [GUIDED, "baseline=feddle_joint"], ids=["merging", "baseline"])
def test_without_labels_the_choice_that_does_without_is_named(choice) -> None:
    group = choice.partition("=")[0]
    with pytest.raises(Unsuitable) as error:
        planned(choice, "server_data.labelled=false")
    assert error.value.key == "server_data"
    assert f"or {group}=feddle_joint_labelfree, which does without" in error.value.problem


def test_only_extensions_that_read_labels_name_it() -> None:
    for option in ({"origin": "calibrated"}, {"teacher": "cached"}, {"residual": Residual(0.1)}):
        assert set(Feddle(objective="mix", **option).instead) == {"server_labels"}
        assert Feddle(objective="kd", **option).instead == {}
    assert Feddle(objective="mix").instead == {}


def test_the_choice_that_does_without_labels_never_reads_them() -> None:
    blind = planned(*LABELFREE, "server_data.labelled=false", *LATE)
    assert (blind.federation.bench.y[blind.federation.rows(SERVER, View())] == -1).all()
    assert blind.method.requires == {"server_data"}
    clean = play(*LABELFREE, *LATE, rounds=3)
    assert identical(run(blind, rounds=3).states, clean.states)


def test_plain_feddle_and_a_server_without_data_are_refused_as_before() -> None:
    with pytest.raises(Unsuitable) as error:
        planned("server_data.labelled=false")
    assert "labelfree" not in error.value.problem
    nothing = {"_target_": "hybridfl.data.server_data.NoServerData"}
    guided = composed(GUIDED)
    with pytest.raises(Unsuitable) as error:
        make_plan(replace(guided, config=guided.config | {"server_data": nothing}), helpers.CACHE)
    assert "labelfree" not in error.value.problem


def test_a_servers_own_head_goes_along_with_the_residual() -> None:
    played = play(GUIDED, "merging.objective=head", rounds=2)
    frozen = play(GUIDED, "merging.objective=head", "merging.coef.frozen=true", rounds=2)
    for one in (played, frozen):
        assert all(not torch.equal(one.states[2]["head"][n], one.states[1]["head"][n]) for n in one.states[2]["head"])
    # What the clients share as their head has no gradient, and the residual none there.
    (job,) = (o.result for t, o in frozen.seen if t.job.tag == "search" and t.round == 1)
    z = P.Layout.of(frozen.states[0]["global"].params).unflatten(job.model.params["residual"])
    assert not z["head.weight"].any()
    assert next(iter(z.values())).any()


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ([GUIDED, "merging.search.kind=es"], "search.kind"),
        ([GUIDED, "merging.search.kind=closed_form"], "search.kind"),
        (["merging.server_axis.examples=same", "merging.search.kind=es"], "search.kind"),
        (["merging.server_axis.examples=same", "merging.search.steps=1"], "search.steps"),
        (["merging.server_axis.examples=halves", "merging.coef.frozen=true"], "server_axis.examples"),
        (
            ["merging.server_axis.examples=halves", "server_data.examples=1", "server_data.validation=0"],
            "server_axis.examples",
        ),
        ([GUIDED, "merging.coef.constraint=simplex"], "coef.constraint"),
        ([GUIDED, "merging.coef.init=examples"], "coef.init"),
        ([GUIDED, "merging.coef.init=uniform"], "coef.init"),
        (["merging.origin_drop=3"], "origin_drop"),
        ([GUIDED, "merging.objective=gradmatch"], "objective"),
        (["merging.objective=gradmatch", "merging.server_axis.examples=same"], "objective"),
        (["merging.objective=gradmatch", "merging.search.kind=closed_form"], "search.kind"),
        ([GUIDED, "merging.mix_weight=often"], "mix_weight"),
        ([GUIDED, "merging.mix_weight=1.5"], "mix_weight"),
        ([GUIDED, "merging.search.prox=-1"], "search.prox"),
        ([GUIDED, "merging.ema=1"], "ema"),
        ([GUIDED, "merging.residual.lr=-0.1"], "residual.lr"),
    ],
)
def test_impossible_combinations_name_their_key(case, key) -> None:
    with pytest.raises(ConfigError) as error:
        planned(*case)
    assert error.value.key == f"merging.{key}"


def test_a_shift_adds_and_hands_other_parameters_through() -> None:
    layout = P.Layout(("w", "head.bias"), (torch.Size([2]), torch.Size([1])))
    frozen = {"origin": torch.tensor([1.0, 2.0, 3.0])}
    theta = {"residual": torch.tensor([0.5, -2.0, 1.0]), "head.bias": torch.tensor([9.0])}
    params = Shift(layout)(theta, frozen)
    assert {name: t.tolist() for name, t in params.items()} == {"w": [1.5, 0.0], "head.bias": [9.0]}
