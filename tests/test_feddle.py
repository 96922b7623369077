"""Feddle: identities with known methods, the fallback, statistics of BatchNorm, determinism, and its options."""

from __future__ import annotations

import copy
import functools
import typing
from collections import Counter
from typing import Literal

import helpers
import pytest
import torch
import torch.nn.functional as F
from feddle_helpers import (
    FREE,
    PURE,
    TINY,
    Run,
    coefficients,
    composed,
    forward,
    planned,
    play,
    searched_c,
    server_data,
)
from helpers import identical
from torch import Tensor, nn

from hybridfl import params as P
from hybridfl.build import build, signature_of
from hybridfl.config import Composer
from hybridfl.errors import ConfigError
from hybridfl.merging.acceptance import Fallback
from hybridfl.merging.atlas import Atlas
from hybridfl.merging.coefficients import Coef
from hybridfl.merging.search import Residual, Search, ServerAxis
from hybridfl.methods.feddle import Feddle
from hybridfl.models.mlp import MLP
from hybridfl.models.width import scaled
from hybridfl.plan import make_plan
from hybridfl.types import SERVER, State, View

# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["merging.search.steps=0", "merging.fallback.damp=0"])
@pytest.mark.parametrize("delay", [0, 2])
def test_default_coefficients_are_fedbuff_and_with_equal_shares_fedavg(delay, steps) -> None:
    case = ["partitioning=iid", f"clients.delay={delay}"]
    ours = play(*case, "merging.norm=none", steps, rounds=4)
    fedbuff = play(*case, "baseline=fedbuff", rounds=4)
    torch.testing.assert_close(ours.flat, fedbuff.flat, atol=1e-12, rtol=0)
    assert len(ours.states[-1]["atlas"]) > 3
    assert ours.reported("server_loss") == ours.reported("server_loss_default")
    if not delay:
        fedavg = play(*case, "baseline=fedavg", rounds=4)
        torch.testing.assert_close(ours.flat, fedavg.flat, atol=1e-12, rtol=0)


def test_an_atlas_of_one_round_with_shares_as_coefficients_is_fedavg() -> None:
    case = ["merging.atlas.size=3", "merging.norm=none", "merging.search.steps=0", "merging.fallback.damp=1"]
    ours = play(*case, "merging.coef.init=examples", rounds=4)
    fedavg = play("baseline=fedavg", rounds=4)
    torch.testing.assert_close(ours.flat, fedavg.flat, atol=1e-12, rtol=0)
    assert len({outcome.result.examples for _, outcome in ours.seen if outcome.result.steps}) > 2
    plain = play(*case, rounds=4)
    assert (plain.flat - fedavg.flat).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "constraint"),
    [*((kind, "affine") for kind in ("adam", "sgd", "es", "closed_form")), ("adam", "box"), ("adam", "simplex")],
)
def test_unit_length_is_mean_length_in_another_unit(kind, constraint) -> None:
    case = [f"merging.search.kind={kind}", f"merging.coef.constraint={constraint}", "merging.coef.c_max=0.4"]
    unit, mean = (play(*case, f"merging.norm={norm}", rounds=3) for norm in ("unit", "mean"))
    torch.testing.assert_close(unit.flat, mean.flat, atol=1e-6, rtol=0)
    assert (coefficients(unit.states[-1]) - coefficients(mean.states[-1])).abs().max() > 1e-2


# -- the fallback -----------------------------------------------------------------------------------------------------


FAR = searched_c(lambda c: torch.linspace(-1e3, 2e3, c.numel(), dtype=c.dtype).view_as(c))


@pytest.mark.parametrize(
    ("objective", "action"), [*((o, "default") for o in ("ce", "kd", "mix", "head")), ("ce", "halve")]
)
@pytest.mark.parametrize("accept", ["train", "heldout"])
def test_a_sabotaged_search_falls_back_to_the_default(accept, objective, action) -> None:
    case = [FREE, f"merging.objective={objective}", f"merging.fallback.action={action}"]
    guarded = play(*case, f"merging.fallback.accept={accept}", alter=FAR)
    default = play("merging.search.steps=0")
    assert torch.equal(guarded.flat, default.flat)
    assert guarded.reported("fallback") == [[1], [1]]


def test_without_acceptance_a_sabotaged_search_goes_through() -> None:
    unguarded = play(FREE, "merging.fallback.accept=none", alter=FAR)
    assert unguarded.flat.abs().max() > 100
    assert unguarded.reported("fallback") == [[0], [0]]


@pytest.mark.parametrize("accept", ["train", "heldout"])
def test_skip_leaves_the_model_with_its_buffers(accept) -> None:
    case = [f"model._target_={__name__}.Normed", FREE, f"merging.fallback.accept={accept}"]
    played = play(*case, "merging.fallback.action=skip", alter=FAR)
    assert identical(played.states[2]["global"], played.states[0]["global"])
    assert torch.equal(coefficients(played.states[2]), torch.zeros_like(coefficients(played.states[2])))
    assert len(played.states[2]["atlas"]) > 3


def test_halve_stops_at_the_first_point_accepted() -> None:
    good = play(FREE, *PURE, rounds=1)
    default = torch.full((3, 1), 1 / 3, dtype=torch.float64)
    start = default + 20 * (coefficients(good.states[1]) - default)
    case = [FREE, *PURE, "merging.fallback.accept=train", "merging.fallback.action=halve"]
    played = play(*case, rounds=1, alter=searched_c(lambda c: start))
    c = coefficients(played.states[1])
    ratio = float(((start - default) / (c - default)).mean())
    assert round(ratio) in (2, 4, 8, 16)
    torch.testing.assert_close(c, default + (start - default) / round(ratio))
    x, y = server_data(played)
    updates = torch.stack([entry["update"] for entry in played.states[1]["atlas"]])
    origin = P.flatten(played.states[0]["global"].params)

    def loss(at: Tensor) -> Tensor:
        return F.cross_entropy(forward(played, origin + at.squeeze(1) @ updates, x), y)

    assert loss(c) <= loss(default) < loss(default + 2 * (c - default))
    assert played.reported("fallback") == [[1]]


@pytest.mark.parametrize("slack", [0.0, 1e9])
def test_slack_lets_a_higher_loss_pass(slack) -> None:
    case = [FREE, "merging.fallback.accept=train", f"merging.fallback.slack={slack}"]
    assert play(*case, alter=FAR).reported("fallback") == [[slack == 0]] * 2


def test_damping_goes_part_of_the_way() -> None:
    (whole, half), default = (play(f"merging.fallback.damp={d}", rounds=1) for d in (1, 0.5)), 1 / 3
    wanted = (coefficients(whole.states[1]) + default) / 2
    torch.testing.assert_close(coefficients(half.states[1]), wanted)
    assert (wanted - default).abs().max() > 0.01


@pytest.mark.parametrize("objective", ["kd", "mix"])
def test_the_heldout_examples_are_measured_with_a_teacher_of_their_own(objective) -> None:
    """A teacher that is the merged model itself: its divergence is 0 on whatever it is measured."""
    case = [f"merging.objective={objective}", "merging.fallback.accept=heldout", "merging.search.steps=0"]
    played = play(*case, "clients.per_round=1", "merging.atlas.size=1", rounds=1)
    rows, bench = played.plan.federation.rows(SERVER, View(split="val")), played.plan.federation.bench
    logits = forward(played, played.flat, bench.x[rows])
    wanted = F.cross_entropy(logits, bench.y[rows]).item() / 2 if objective == "mix" else 0.0
    assert played.reported("server_loss")[0][0] == pytest.approx(wanted, abs=1e-12)


# -- BatchNorm --------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """An MLP with BatchNorm."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, hidden: tuple[int, ...], width: float) -> None:
        super().__init__()
        features = scaled(hidden[0], width)
        self.body = MLP(input_shape, features, ())
        self.norm = nn.BatchNorm1d(features)
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.body(x)).relu())
        return logits


def test_running_statistics_are_the_arrivals_mean_and_never_merged_with_signs() -> None:
    wild = searched_c(lambda c: torch.linspace(-30, 31, c.numel(), dtype=c.dtype).view_as(c))
    played = play(f"model._target_={__name__}.Normed", FREE, rounds=3, alter=wild)
    for round, state in enumerate(played.states[1:]):
        buffers = state["global"].buffers
        returned = [outcome.result.model.buffers for outcome in played.trained(round)]
        assert len(returned) == 3
        for name in ("norm.running_mean", "norm.running_var"):
            torch.testing.assert_close(buffers[name], torch.stack([b[name] for b in returned]).mean(0))
        assert P.all_finite(buffers)
        assert (buffers["norm.running_var"] > 0).all()
    assert coefficients(played.states[-1]).min() < 0


def test_the_fallback_judges_the_model_with_the_statistics_it_will_have() -> None:
    played = play(f"model._target_={__name__}.Normed", "merging.search.steps=0", rounds=2)
    x, y = server_data(played)
    model = played.states[-1]["global"]
    played.plan.federation.net.eval()
    logits = torch.func.functional_call(played.plan.federation.net, {**model.params, **model.buffers}, (x,))
    assert played.reported("server_loss")[-1][0] == pytest.approx(F.cross_entropy(logits, y).item())


# -- determinism ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adam", "es"])
def test_the_same_seed_gives_the_same_state(kind) -> None:
    case = [f"merging.search.kind={kind}", "clients.delay=1", "merging.search.batch=8"]
    first, second, other = (play(*case, f"seed={seed}", rounds=3) for seed in (0, 0, 1))
    assert identical(first.states, second.states)
    assert not identical(first.states[-1], other.states[-1])


@pytest.mark.parametrize(
    ("kind", "granularity"), [("adam", "scalar"), ("adam", "block"), ("sgd", "scalar"), ("closed_form", "scalar")]
)
def test_the_order_of_the_atlas_does_not_matter(kind, granularity) -> None:
    case = [f"merging.search.kind={kind}", f"merging.coef.granularity={granularity}", "merging.atlas.size=4"]

    def turned(state: State) -> State:
        return state | {"atlas": state["atlas"][::-1]}

    straight, reverse = (play(*case, rounds=4, between=between) for between in (turned, lambda state: state))
    torch.testing.assert_close(straight.flat, reverse.flat, atol=1e-9, rtol=0)
    by_client = [{e["client"]: e["coefficients"] for e in played.states[-1]["atlas"]} for played in (straight, reverse)]
    torch.testing.assert_close(*by_client, atol=1e-6, rtol=0)
    assert [e["client"] for e in straight.states[1]["atlas"]] == [e["client"] for e in reverse.states[1]["atlas"]]


# -- options ----------------------------------------------------------------------------------------------------------


PARTS = {"": Feddle, "atlas.": Atlas, "coef.": Coef, "search.": Search, "fallback.": Fallback}
PARTS |= {"residual.": Residual, "server_axis.": ServerAxis}
CHOICES = [
    f"merging.{prefix}{name}={value}"
    for prefix, part in PARTS.items()
    for name, hint in signature_of(part)[1].items()
    for value in (typing.get_args(hint) if typing.get_origin(hint) is Literal else ())
]
NUMBERS = [
    "merging.atlas.drop_below=0.5",
    "merging.coef.c_max=0.2 merging.coef.constraint=box",
    "merging.search.batch=3",
    "merging.search.head_lr=0.5 merging.objective=head",
    "merging.search.prox=3",
    "merging.fallback.damp=0.3",
    "clients.delay=1.5",
    "clients.delay=1.5 merging.anchor=model merging.atlas.evict=cosine",
    "merging.objective=head merging.atlas.evict=cosine",
    "merging.coef.granularity=block merging.search.kind=closed_form merging.norm=layer",
    "merging.coef.granularity=block merging.search.kind=es merging.coef.init=examples",
    f"model._target_={__name__}.Normed merging.search.kind=closed_form",
    "model=cnn model.channels=[4,8] model.hidden=8 dataset.shape=[1,8,8] merging.search.kind=closed_form",
]


def test_the_table_of_choices_covers_the_surface() -> None:
    keys = Counter(choice.split("=")[0].removeprefix("merging.") for choice in CHOICES)
    assert keys == {
        "anchor": 2,
        "origin": 2,
        "norm": 5,
        "objective": 6,
        "teacher": 2,
        "server_axis.examples": 3,
        "atlas.evict": 4,
        "atlas.per_client": 2,
        "atlas.storage": 3,
        "coef.granularity": 2,
        "coef.constraint": 5,
        "coef.init": 5,
        "search.kind": 4,
        "fallback.accept": 3,
        "fallback.action": 3,
    }


def check_reports(played: Run) -> None:
    method = typing.cast(Feddle, played.plan.method)
    for state, record in zip(played.states[1:], played.records, strict=True):
        names = Counter(name for name, _, _ in record.reports)
        coefficient = names.pop("coefficient")
        told = ["server_loss", "server_loss_default", "fallback", "atlas", "dropped"]
        told += ["cached"] * ("cache" in state) + ["server_axis"] * (method.server_axis.examples != "none")
        assert names == dict.fromkeys(told, 1)
        assert coefficient >= len(state["atlas"]) >= 3
        values = Counter((client, value) for name, client, value in record.reports if name == "coefficient")
        assert values >= Counter((e["client"], e["coefficients"].mean().item()) for e in state["atlas"])
    assert [len(state["atlas"]) for state in played.states[1:]] == [n for (n,) in played.reported("atlas")]
    assert P.all_finite(played.states[-1]["global"].params)


@pytest.mark.parametrize("case", NUMBERS)
def test_combinations_run(case) -> None:
    played = play("merging.atlas.size=4", *case.split())
    check_reports(played)
    assert not torch.equal(played.flat, P.flatten(played.states[0]["global"].params))


@functools.cache
def crowded(*overrides: str) -> Run:
    """A federation in which every option matters: a small atlas, stale updates, steps that are long."""
    case = ["merging.search.steps=6", "merging.search.lr=0.2", "merging.search.batch=8", "merging.atlas.size=4"]
    return play(*case, "clients.delay=1.5", *overrides, rounds=4)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_runs_and_has_an_effect(choice) -> None:
    more = ["merging.search.lr=2"] * choice.startswith("merging.fallback")
    more += ["merging.fallback.accept=train"] * choice.startswith("merging.fallback.action")
    more += ["merging.objective=mix"] * choice.startswith("merging.teacher")
    base, changed = crowded(*more), crowded(*more, choice)
    check_reports(changed)
    key, value = choice.split("=")
    is_default = functools.reduce(dict.__getitem__, key.split("."), base.plan.composed.config) == value
    differs = bool((base.flat - changed.flat).abs().max() > 1e-6)
    # Unit length is the mean length in another unit.
    assert differs == (not is_default and choice != "merging.norm=unit")


def test_the_shipped_config_holds_the_signatures_defaults() -> None:
    config = copy.deepcopy(composed().config["merging"]) | {"atlas": {}, "search": {}}
    assert config["fallback"] == vars(Fallback())
    assert config["coef"] == vars(Coef())
    assert vars(build(config, "merging")) == vars(Feddle())


@pytest.mark.parametrize(
    ("case", "key"),
    [
        (["merging.atlas.size=2"], "merging.atlas.size"),
        (["merging.fallback.accept=heldout", "server_data.validation=0"], "merging.fallback.accept"),
        *(
            (["merging.search.kind=closed_form", f"merging.coef.constraint={c}"], "merging.coef.constraint")
            for c in ("nonneg", "simplex", "box")
        ),
        *(
            (["merging.objective=head", f"merging.search.kind={kind}"], "merging.search.kind")
            for kind in ("es", "closed_form")
        ),
        (["merging.objective=head", f"model._target_={__name__}.Headless"], "merging.objective"),
        (["merging.objective=entropy", "merging.search.kind=closed_form"], "merging.search.kind"),
        (["merging.search.kind=cma"], "merging.search.kind"),
        (["merging.fallback.damp=1.5"], "merging.fallback.damp"),
        (["merging.search.lr=0"], "merging.search.lr"),
        (["merging.atlas=4"], "merging.atlas"),
    ],
)
def test_impossible_combinations_name_their_key(case, key) -> None:
    with pytest.raises(ConfigError) as error:
        planned(*case)
    assert error.value.key == key


def test_the_server_must_own_examples() -> None:
    with Composer() as composer, pytest.raises(ConfigError) as error:
        make_plan(composer.compose([*(t for t in TINY if "server_data" not in t), "server_data=none"]), helpers.CACHE)
    assert error.value.key == "server_data"


class Headless(nn.Sequential):
    """A net whose classifier is not called ``head``."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, hidden: tuple[int, ...], width: float) -> None:
        super().__init__(MLP(input_shape, classes, hidden, width))
