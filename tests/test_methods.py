"""Every method of ``conf/`` through one matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from hybridfl import params as P
from hybridfl.checkpoints import pack, unpack
from hybridfl.config import choices
from hybridfl.data.dataset import Examples
from hybridfl.engine import Record, Unsuitable
from hybridfl.experiment import packed, unpacked
from hybridfl.plan import Plan
from hybridfl.snapshot import Snapshot
from hybridfl.types import SERVER, Served

# A baseline that has the name of a merging method is that one; tests/test_merging_rounds.py sees to it.
TWICE = {"none", *choices("merging")}
METHODS = [f"baseline={name}" for name in choices("baseline") if name not in TWICE]
METHODS += [f"merging={name}" for name in choices("merging")]
ROOMY = ("clients.validation=0.2", "clients.number=6", "client_optimizer.epochs=1")


# Of the module, so that all tests of a method follow each other and share its runs.
@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclasses.dataclass
class Ran:
    """A run of three rounds: its plan, all snapshots and records, and what was changed in place."""

    line: tuple[str, ...]
    plan: Plan
    seen: list[Snapshot]
    records: list[Record]
    untouched: list[bool]


def run(*line: str) -> Ran:
    plan = helpers.plan(*line, *ROOMY)
    engine = plan.engine()
    ran = Ran(line, plan, [engine.begin()], [], [])
    for _ in range(3):
        before = [tensor.clone() for tensor in _tensors(packed(ran.seen[-1]))]
        after, record = engine.step(ran.seen[-1])
        ran.untouched.append(helpers.identical([*_tensors(packed(ran.seen[-1]))], before))
        ran.seen.append(after)
        ran.records.append(record)
    return ran


@pytest.fixture(scope="module")
def punctual(method: str) -> Ran:
    return run(method, "clients.delay=0.0")


@pytest.fixture(scope="module")
def late(method: str) -> Ran | None:
    """None where the method waits for everybody."""
    try:
        return run(method, "clients.delay=1.5")
    except Unsuitable as refusal:
        assert refusal.key == "clients.delay"
        return None


@pytest.fixture(params=["punctual", "late"])
def ran(punctual: Ran, late: Ran | None, request: pytest.FixtureRequest) -> Ran:
    if request.param == "late" and late is None:
        pytest.skip("synchronous")
    return punctual if request.param == "punctual" or late is None else late


def owned(plan: Plan) -> list[list[int]]:
    return [rows.tolist() for rows in plan.federation.split.clients_train]


def facts(snapshot: Snapshot) -> Any:
    """All of a snapshot but the time it took."""
    return pack(packed(snapshot) | {"seconds": 0.0})


def deployed(plan: Plan, snapshot: Snapshot) -> Iterator[list[Served]]:
    for participant in (SERVER, *range(plan.federation.clients.number)):
        yield plan.method.serve(snapshot.state, participant)


# -- the matrix ------------------------------------------------------------------------------------------------------


def test_a_run_is_reproducible_pure_and_continues_to_the_bit(ran: Ran) -> None:
    assert all(ran.untouched), "the state was changed in place"
    assert [s.round for s in ran.seen] == [0, 1, 2, 3]
    for record in ran.records:
        assert record.notes == []
        assert all(math.isfinite(value) for _, _, value in record.reports)
    # Again with a method object that has seen nothing, torch's own stream elsewhere, from a checkpoint of the start and a late one.
    torch.manual_seed(99)
    engine = helpers.plan(*ran.line, *ROOMY).engine()
    assert helpers.identical(facts(engine.begin()), facts(ran.seen[0]))
    for t in (0, 2):
        after, _ = engine.step(unpacked(unpack(pack(packed(ran.seen[t])))))
        assert helpers.identical(facts(after), facts(ran.seen[t + 1]))


def _tensors(node: Any) -> Iterator[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, dict):
        yield from _tensors(list(node.values()))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _tensors(value)


def test_what_is_served_is_finite_and_has_moved(ran: Ran) -> None:
    plan, seen = ran.plan, ran.seen
    start = P.flatten(plan.federation.start.params)
    ensembles = [ensemble for ensemble in deployed(plan, seen[-1]) if ensemble]
    assert ensembles
    for ensemble in ensembles:
        assert sum(served.weight for served in ensemble) > 0
        for served in ensemble:
            net = plan.federation.net_at(served.width)
            assert P.Layout.of(served.model.params) == P.Layout.of(dict(net.named_parameters()))
            assert P.all_finite(served.model.params)
    assert any(
        s.width < 1 or not torch.equal(P.flatten(s.model.params), start) for ensemble in ensembles for s in ensemble
    )
    assert any(deployed(plan, seen[0]))  # before round 0 too


def test_another_seed_gives_other_numbers(method: str, punctual: Ran) -> None:
    other = helpers.plan(method, "clients.delay=0.0", *ROOMY, "seed=1", "partitioning.seed=0")
    assert helpers.identical(owned(other), owned(punctual.plan))
    engine = other.engine()
    ends = [(punctual.plan, punctual.seen[1]), (other, engine.step(engine.begin())[0])]
    first, second = (next(e for e in deployed(*end) if e)[0].model.params for end in ends)
    assert not helpers.close(first, second, 1e-6)


def test_the_test_part_is_never_read(punctual: Ran) -> None:
    """Its inputs are not numbers, and the run does not see it."""
    plan = punctual.plan
    test = plan.federation.dataset.test
    blank = Examples(np.full_like(test.x, np.nan), (test.y + 1) % 3)
    dataset = dataclasses.replace(plan.federation.dataset, test=blank)
    other = dataclasses.replace(plan, federation=dataclasses.replace(plan.federation, dataset=dataset))
    engine = other.engine()
    end = engine.begin()
    for _ in range(2):
        end, _ = engine.step(end)
    assert helpers.identical(facts(end), facts(punctual.seen[2]))


def test_the_method_says_what_it_needs(method: str, punctual: Ran) -> None:
    needs_server = bool(punctual.plan.method.requires & {"server_data", "server_labels"})
    try:
        plan = helpers.plan(method, "server_data=none", "rounds=1")
    except Unsuitable as refusal:
        assert needs_server
        assert refusal.key == "server_data"
    else:
        assert not needs_server
        assert plan.engine().step(plan.engine().begin())[0].round == 1


def test_raw_data_move_only_where_it_is_said(punctual: Ran) -> None:
    assert bool(punctual.seen[-1].moved) == punctual.plan.method.moves_raw_data
