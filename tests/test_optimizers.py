"""Optimisers carried over rounds are torch's, and the learning rate has the schedule's value in every round."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from local_helpers import N, bench, model_of, task
from torch import nn

from hybridfl import params as P
from hybridfl.build import build
from hybridfl.checkpoints import pack, unpack
from hybridfl.config import choices
from hybridfl.errors import ConfigError
from hybridfl.federation import Federation
from hybridfl.local import run_task
from hybridfl.methods.base import Facts
from hybridfl.optimizers import SGD, Adam, LocalWork, NAdam, batches, learning_rates
from hybridfl.rng import stream
from hybridfl.schedules import Schedule
from hybridfl.types import SERVER, Job, Model, Results, Round, Served, State

# -- optimisers ------------------------------------------------------------------------------------------------------

FACTORS = {"2.*": 0.25, "*.bias": 0.5}
OPTIONS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "adam": ("adam", {}, torch.optim.Adam),
    "adam with decay": ("adam", {"weight_decay": 0.3, "eps": 1e-3}, torch.optim.Adam),
    "adamw": ("adamw", {"weight_decay": 0.3}, torch.optim.AdamW),
    "nesterov": ("nesterov", {}, lambda p, **o: torch.optim.SGD(p, momentum=0.9, nesterov=True, **o)),
    "nesterov with decay": (
        "nesterov",
        {"weight_decay": 0.3},
        lambda p, **o: torch.optim.SGD(p, momentum=0.9, nesterov=True, **o),
    ),
    "nadam": ("nadam", {}, torch.optim.NAdam),
    "nadam with decay": ("nadam", {"weight_decay": 0.3, "beta1": 0.7, "beta2": 0.95}, torch.optim.NAdam),
    "nadam whose momentum rises": ("nadam", {"momentum_decay": 2.0, "weight_decay": 0.01}, torch.optim.NAdam),
}


def built(name: str, **options: Any) -> LocalWork:
    """The optimiser of a shipped file with some options changed."""
    work = build(yaml.safe_load(choices("client_optimizer")[name].read_text()) | options, "client_optimizer")
    assert isinstance(work, LocalWork)
    return work


@pytest.fixture
def _double() -> Iterator[None]:
    """torch keeps NAdam's product of momenta in the default type, whatever the type of the parameters."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("name", OPTIONS)
def test_an_optimiser_kept_over_rounds_is_torchs(name: str) -> None:
    """Four rounds of 25 steps with a falling rate, factors on it, and the state through a checkpoint in between."""
    file, options, reference = OPTIONS[name]
    work = built(file, lr=0.02, lr_decay=0.8, steps=25, batch_size=4, lr_factors=FACTORS, **options)
    table = bench()
    start = model_of(table.net)
    named = dict(table.net.named_parameters())
    betas = {"betas": (options["beta1"], options["beta2"])} if "beta1" in options else {}
    others = {key: value for key, value in options.items() if key in ("weight_decay", "eps", "momentum_decay")}
    groups = [
        {"params": [p], "factor": math.prod(f for pattern, f in FACTORS.items() if fnmatchcase(n, pattern))}
        for n, p in named.items()
    ]
    optimiser = reference(groups, lr=0.02, **betas, **({"weight_decay": work.weight_decay} | others))
    state: State | None = None
    for round in range(4):
        given = task(table, work, round, seed=round, start=start, optimizer_state=state, keep_optimizer=True)
        result = run_task(table, given).result
        start, state = result.model, unpack(pack(result.optimizer_state))
        for group in optimiser.param_groups:
            group["lr"] = 0.02 * 0.8**round * group["factor"]
        for picked in batches(N - 1, work, stream(round, "local"), 25):
            rows = torch.arange(N - 1, 0, -1)[torch.from_numpy(picked)]
            optimiser.zero_grad()
            F.cross_entropy(table.net(table.x[rows]), table.y[rows]).backward()
            optimiser.step()
        assert helpers.close(start.params, P.detach(named), 1e-12), round
    assert not helpers.close(start.params, model_of(bench().net).params, 0.05)


def test_two_steps_of_nadam_by_hand() -> None:
    """Dozat's formulas for one weight, gradients 1 and then -2."""
    work, state = NAdam(beta1=0.8, beta2=0.5, eps=1e-9, momentum_decay=1.0), dict[str, Any]()
    theta = {"w": torch.zeros(1, dtype=torch.float64)}
    mu = [0.8 * (1 - 0.5 * 0.96**i) for i in range(4)]
    work.update(theta, {"w": torch.ones(1, dtype=torch.float64)}, state, {"w": 0.5})
    m, v = 0.2, 0.5
    expected = -0.5 * (mu[2] * m / (1 - mu[1] * mu[2]) + (1 - mu[1]) / (1 - mu[1])) / (math.sqrt(v / 0.5) + 1e-9)
    assert theta["w"].item() == pytest.approx(expected, rel=1e-12)
    work.update(theta, {"w": torch.full((1,), -2.0, dtype=torch.float64)}, state, {"w": 0.5})
    m, v = 0.8 * m + 0.2 * -2, 0.5 * v + 0.5 * 4
    product = mu[1] * mu[2]
    ahead = mu[3] * m / (1 - product * mu[3]) + (1 - mu[2]) * -2 / (1 - product)
    expected -= 0.5 * ahead / (math.sqrt(v / 0.75) + 1e-9)
    assert theta["w"].item() == pytest.approx(expected, rel=1e-12)
    assert state["momentum_product"] == pytest.approx(product)


def test_nesterovs_preset_is_sgd_with_momentum() -> None:
    assert built("nesterov") == SGD(lr=0.01, momentum=0.9, nesterov=True, epochs=5)
    assert type(built("adam")) is Adam


# -- schedules -------------------------------------------------------------------------------------------------------


def factors(rounds: int, **options: Any) -> list[float]:
    return [Schedule(**options).factor(t, rounds) for t in range(rounds)]


def test_a_constant_rate_is_multiplied_with_exactly_one() -> None:
    assert factors(50) == [1.0] * 50
    assert factors(3, final=0.5, gamma=0.5, milestones=(1,)) == [1.0] * 3
    theta = {"w": torch.zeros(1)}
    assert learning_rates(SGD(lr=0.1, lr_decay=0.9), theta, 7, 9) == {"w": 0.1 * 0.9**7}


def test_cosine_falls_from_one_towards_its_end_after_the_last_round() -> None:
    r = math.sqrt(0.5)
    assert factors(4, kind="cosine") == pytest.approx([1, (1 + r) / 2, 0.5, (1 - r) / 2])
    assert factors(4, kind="cosine", final=0.2) == pytest.approx([1, 0.6 + 0.4 * r, 0.6, 0.6 - 0.4 * r])
    assert factors(2, kind="cosine", final=1.0) == [1, 1]
    assert factors(1, kind="cosine") == [1]
    assert Schedule(kind="cosine", final=0.2).factor(4, 4) == pytest.approx(0.2)


def test_steps_are_taken_in_their_rounds() -> None:
    assert factors(5, kind="step", milestones=(1, 4), gamma=0.5) == [1, 0.5, 0.5, 0.5, 0.25]
    assert factors(6, kind="step", milestones=(0.5,), gamma=0.5) == [1, 1, 1, 0.5, 0.5, 0.5]
    assert factors(5, kind="step", milestones=(0.5, 0.99), gamma=0.5) == [1, 1, 0.5, 0.5, 0.25]
    # 0.29 · 100 is 28.999… in floating point.
    assert factors(100, kind="step", milestones=(0.29,), gamma=0.5) == [1] * 29 + [0.5] * 71


def test_warming_up_is_linear_and_the_cosine_waits_for_it() -> None:
    assert factors(5, warmup=3) == [0.25, 0.5, 0.75, 1, 1]
    r = math.sqrt(0.5)
    expected = [1 / 3, 2 / 3, 1, (1 + r) / 2, 0.5, (1 - r) / 2]
    assert factors(6, warmup=2, kind="cosine") == pytest.approx(expected)
    assert factors(4, warmup=1, kind="step", milestones=(1,), gamma=0.5) == [0.5, 0.5, 0.5, 0.5]


@given(st.integers(2, 40), st.data())
@settings(max_examples=30, deadline=None)
def test_schedules_are_torchs(rounds: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, rounds - 1))
    final, gamma = data.draw(st.floats(0, 1)), data.draw(st.floats(0.01, 1))
    milestones = sorted(data.draw(st.sets(st.integers(1, rounds - 1), min_size=1, max_size=4)))
    torchs = torch.optim.lr_scheduler
    # One after the other, rather than by SequentialLR, which calls what torch warns of.
    rise = _rates(lambda optimiser: torchs.LinearLR(optimiser, 1 / (warmup + 1), total_iters=max(1, warmup)), warmup)
    fall = _rates(lambda optimiser: torchs.CosineAnnealingLR(optimiser, rounds - warmup, final), rounds - warmup)
    assert factors(rounds, kind="cosine", warmup=warmup, final=final) == pytest.approx([*rise, *fall], abs=1e-12)
    steps = _rates(lambda optimiser: torchs.MultiStepLR(optimiser, milestones, gamma), rounds)
    assert factors(rounds, kind="step", milestones=tuple(milestones), gamma=gamma) == pytest.approx(steps, rel=1e-12)


def _rates(scheduled: Callable[[torch.optim.Optimizer], Any], rounds: int) -> list[float]:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = scheduled(optimiser), []
    for _ in range(rounds):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return rates


def test_schedule_decay_and_factors_multiply() -> None:
    schedule = Schedule(kind="step", milestones=(2,), gamma=0.5, warmup=1)
    work = SGD(lr=0.8, lr_decay=0.5, schedule=schedule, lr_factors={"b": 0.25})
    theta = dict.fromkeys("ab", torch.zeros(1))
    rates = [learning_rates(work, theta, t, 4) for t in range(4)]
    assert [rate["a"] for rate in rates] == pytest.approx([0.4, 0.4, 0.1, 0.05])
    assert all(rate["b"] == pytest.approx(rate["a"] / 4) for rate in rates)


WRONG = [
    ("kind=cos", "kind", "got 'cos'. Did you mean 'cosine'?"),
    ("kind=step", "milestones", r"got \[\]: kind=step needs rounds such as"),
    ("milestones=[2,1]", "milestones", r"got \[2, 1\]: they must increase; nearest valid value: \[1, 2\]"),
    ("milestones=[1,1]", "milestones", r"got \[1, 1\]: they must increase; nearest valid value: \[1\]"),
    ("milestones=[1,0.5]", "milestones", r"got \[1, 0.5\]: rounds and fractions of the run are mixed"),
    ("milestones=[1.5]", r"milestones\[0\]", "got 1.5: must be below 1"),
    ("milestones=[0]", r"milestones\[0\]", "got 0: must be at least 1; nearest valid value: 1"),
    ("milestones=[0.0]", r"milestones\[0\]", "got 0.0: must be above 0"),
    ("milestones=0.5", "milestones", "got 0.5: expected a list"),
    ("gamma=0", "gamma", "got 0: must be above 0"),
    ("gamma=2", "gamma", "got 2: must be at most 1; nearest valid value: 1"),
    ("final=-0.1", "final", "got -0.1: must be at least 0; nearest valid value: 0"),
    ("warmup=-1", "warmup", "got -1: must be at least 0; nearest valid value: 0"),
    ("warmup=3", "warmup", "got 3, but the run has rounds=3; nearest valid value: 2"),
    ("={kind:step,milestones:[1,3]}", "milestones", "got 3, but the last round of rounds=3 is 2; take less"),
]


@pytest.mark.parametrize(("typed", "key", "text"), WRONG, ids=[typed for typed, _, _ in WRONG])
def test_wrong_schedules_are_refused(typed: str, key: str, text: str) -> None:
    override = f"client_optimizer.schedule{typed if typed[0] == '=' else '.' + typed}"
    with pytest.raises(ConfigError, match=rf"^client_optimizer\.schedule\.{key}: {text}"):
        helpers.plan(override)


def test_milestones_that_are_not_used_may_lie_beyond_the_run() -> None:
    """So that a sweep over kinds needs no other milestones for each."""
    assert helpers.plan("client_optimizer.schedule.milestones=[7]").federation.work.schedule.milestones == (7,)


# -- in the engine ---------------------------------------------------------------------------------------------------


def total(apply: Any, theta: Any, params: Any, batch: Any, ctx: Mapping[str, Any]) -> torch.Tensor:
    """A loss whose gradient is 1 everywhere: after one step of SGD the rate can be read off any weight."""
    return torch.stack([tensor.sum() for tensor in theta.values()]).sum()


class Rates(Facts):
    """Reads off the rate of one step of a client, the server, a later yield, and of work of the method's own."""

    asynchronous = True

    def init(self, federation: Federation) -> State:
        return {"global": federation.fresh_model(), "seen": []}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        start = Model({name: torch.zeros_like(t) for name, t in state["global"].params.items()}, {})
        clients = yield [Job(k, start, steps=1, loss=total) for k in now.clients]
        server = yield [
            Job(SERVER, start, steps=1, loss=total),
            Job(SERVER, start, work=SGD(lr=0.3), steps=1, loss=total),
        ]
        rates = [[r.birth, *sorted({-t.max().item() for t in r.delta.values()})] for r in [*clients, *server]]
        return state | {"seen": [*state["seen"], rates]}

    def serve(self, state: State, participant: int) -> list[Served]:
        return [Served(state["global"])]


COSINE = ("client_optimizer.lr=0.5", "client_optimizer.schedule={kind:cosine,final:0.1,warmup:1}")


def test_every_job_of_a_run_has_the_rate_of_its_round() -> None:
    plan = helpers.plan("clients.delay=1.5", "rounds=6", *COSINE)
    end = helpers.snapshots(helpers.engine_of(plan, Rates()))[-1].state
    expected = [0.25, *(0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * t / 5)) / 2) for t in range(5))]
    assert expected[-1] == pytest.approx(0.5 * (0.1 + 0.9 * (1 - math.cos(math.pi / 5)) / 2))
    for t, seen in enumerate(end["seen"]):
        for birth, rate in seen[:-1]:
            assert rate == pytest.approx(expected[birth], rel=1e-12)
        assert seen[-2] == [t, pytest.approx(expected[t], rel=1e-12)]
        assert seen[-1] == [t, pytest.approx(0.3)]
    assert any(birth < t for t, seen in enumerate(end["seen"]) for birth, _ in seen)


def test_the_schedule_spans_the_rounds_of_the_engine() -> None:
    plan = helpers.plan("client_optimizer.lr=0.5", "client_optimizer.schedule.kind=cosine", "baseline=fedavg")
    end = helpers.snapshots(helpers.engine_of(plan, Rates(), rounds=2))[-1].state
    assert [seen[-2][1] for seen in end["seen"]] == pytest.approx([0.5, 0.25])


def test_start_server_works_at_the_rate_of_round_0() -> None:
    line = ("baseline=fedavg", "start=server", "start_steps=4")
    warming = helpers.plan(*line, "client_optimizer.lr=0.5", "client_optimizer.schedule.warmup=1")
    plain = helpers.plan(*line, "client_optimizer.lr=0.25")
    assert helpers.identical(warming.engine().begin().state, plain.engine().begin().state)


def test_a_step_at_every_round_is_a_decay() -> None:
    """lr_decay=0.5 and gamma=0.5 at rounds 1 and 2 are the same run, for methods that train and methods that search."""
    for method in ("baseline=fedavg", "baseline=none", "baseline=oracle"):
        step = helpers.plan(method, "client_optimizer.schedule={kind:step,milestones:[1,2],gamma:0.5}")
        decay = helpers.plan(method, "client_optimizer.lr_decay=0.5")
        ends = [helpers.snapshots(plan.engine())[-1].state["global"] for plan in (step, decay)]
        assert helpers.identical(*ends)
        assert not helpers.identical(ends[0], helpers.snapshots(helpers.plan(method).engine())[-1].state["global"])
