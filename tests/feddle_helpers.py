"""Feddle on a tiny federation, with everything that was computed kept for a test to look at."""

from __future__ import annotations

import copy
import functools
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import helpers
import torch
import yaml
from helpers import identical
from torch import Tensor

from hybridfl import params as P
from hybridfl.config import GROUPS, Composed, Composer
from hybridfl.engine import Engine, Record
from hybridfl.local import Outcome, Task, Workbench, run_task
from hybridfl.params import Layout
from hybridfl.plan import Plan, make_plan
from hybridfl.types import SERVER, Model, State, View

TINY = [
    "dataset=synthetic",
    "dataset.train=400",
    "dataset.test=100",
    "dataset.classes=4",
    "dataset.shape=[1,3,3]",
    "dataset.separation=3",
    "model.hidden=[8]",
    "clients.number=6",
    "clients.per_round=3",
    "client_optimizer.steps=4",
    "server_data.examples=40",
    "server_data.validation=0.25",
    "rounds=4",
    "dtype=float64",
    "device=cpu",
    "merging.search.steps=8",
]
PURE = ["merging.norm=none", "merging.search.prox=0", "merging.search.batch=1000"]
"""The bare search: full batches, no pull, anchors as they are."""
FREE = "merging.coef.constraint=free"
Alter = Callable[[Task, Outcome], Outcome]


@functools.cache
def composed(*overrides: str) -> Composed:
    with Composer() as composer:
        return composer.compose([*TINY, *overrides])


def planned(*overrides: str) -> Plan:
    """The plan of a tiny run. Values of single keys are set after Hydra composed the groups, which takes it 0.2 s."""
    is_group = {text: text.split("=")[0] in GROUPS for text in overrides}
    base = composed(*(text for text in overrides if is_group[text]))
    config = copy.deepcopy(base.config)
    for text in overrides:
        if not is_group[text]:
            (*path, last), value = text.split("=")[0].split("."), yaml.safe_load(text.split("=")[1])
            node = functools.reduce(dict.__getitem__, path, config)
            assert last in node
            node[last] = value
    return make_plan(replace(base, config=config), helpers.CACHE)


@dataclass
class Watched:
    """Runs tasks in order, lets a test change what comes back, and remembers it."""

    alter: Alter | None = None
    threads: int = 1
    seen: list[tuple[Task, Outcome]] = field(default_factory=list)

    def run(self, bench: Workbench, tasks: Sequence[Task]) -> list[Outcome]:
        outcomes = [run_task(bench, task) for task in tasks]
        if self.alter is not None:
            outcomes = [self.alter(task, outcome) for task, outcome in zip(tasks, outcomes, strict=True)]
        self.seen += zip(tasks, outcomes, strict=True)
        return outcomes


@dataclass
class Run:
    """States 0 … rounds, and the reports and the clients' results of each round."""

    plan: Plan
    states: list[State]
    records: list[Record]
    seen: list[tuple[Task, Outcome]]

    @property
    def flat(self) -> Tensor:
        return P.flatten(self.states[-1]["global"].params)

    def reported(self, name: str) -> list[list[float]]:
        """The values of a report, round by round."""
        return [[value for n, _, value in record.reports if n == name] for record in self.records]

    def trained(self, round: int) -> list[Outcome]:
        """What clients of this birth round returned."""
        return [out for task, out in self.seen if task.round == round and task.job.participant != SERVER]


def play(
    *overrides: str,
    rounds: int = 2,
    alter: Alter | None = None,
    between: Callable[[State], State] = lambda state: state,
) -> Run:
    return run(planned(*overrides), rounds, alter, between)


def run(
    plan: Plan, rounds: int = 2, alter: Alter | None = None, between: Callable[[State], State] = lambda state: state
) -> Run:
    """Some rounds in which nothing may go wrong and no state may be changed in place."""
    executor = Watched(alter)
    engine = Engine(plan.federation, plan.method, executor, plan.settings.rounds, max_bad_rounds=1)
    snapshot = engine.begin()
    states, records = [snapshot.state], []
    for _ in range(rounds):
        snapshot = replace(snapshot, state=between(snapshot.state))
        before = copy.deepcopy(snapshot.state)
        after, record = engine.step(snapshot)
        assert identical(before, snapshot.state)
        assert all("lost on the way" in note for note in record.notes)
        snapshot = after
        states.append(snapshot.state)
        records.append(record)
    return Run(plan, states, records, executor.seen)


def coefficients(state: State) -> Tensor:
    """``(K, G)`` of the last merge."""
    return torch.stack([entry["coefficients"] for entry in state["atlas"]])


def server_data(played: Run) -> tuple[Tensor, Tensor]:
    """What the search sees."""
    rows, bench = played.plan.federation.rows(SERVER, View()), played.plan.federation.bench
    return bench.x[rows], bench.y[rows]


def forward(played: Run, flat: Tensor, x: Tensor) -> Tensor:
    params = Layout.of(played.states[0]["global"].params).unflatten(flat)
    return typing.cast(Tensor, torch.func.functional_call(played.plan.federation.net, params, (x,)))


def searched_c(change: Callable[[Tensor], Tensor]) -> Alter:
    """Replaces the coefficients that the search returns."""

    def alter(task: Task, outcome: Outcome) -> Outcome:
        if task.job.tag != "search":
            return outcome
        model = outcome.result.model
        params = model.params | {"c": change(model.params["c"])}
        return replace(outcome, result=replace(outcome.result, model=Model(params, model.buffers)))

    return alter
