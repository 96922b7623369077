"""Clients that drop out or fail, results that are not finite, and mistakes of a method."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import engine_helpers
import helpers
import pytest
import torch
from engine_helpers import Diary, Script, _filled, model_bytes, poisoned

from hybridfl import params as P
from hybridfl.costs import Costs
from hybridfl.engine import Unsuitable
from hybridfl.errors import HybridflError
from hybridfl.methods.fedbuff import FedBuff
from hybridfl.types import SERVER, Job, Model, Results, Round, State

late = engine_helpers.late
punctual = engine_helpers.punctual


# -- failures --------------------------------------------------------------------------------------------------------


class Looking(Diary):
    """A diary that looks at everybody's data before the clients start."""

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        if now.clients:
            yield [Job(SERVER, state["global"], tag="trained"), Job(0, state["global"], steps=0, tag="measured")]
            yield [Job(SERVER, state["global"], steps=0)]
        return (yield from super().round(state, now))


@pytest.mark.parametrize("option", ["clients.delay=1.5", "clients.concurrency=4", "clients.failure=0.3"])
def test_what_is_looked_at_before_the_clients_start_changes_no_arrival(option: str) -> None:
    plan = helpers.plan("baseline=fedbuff", "rounds=8", "clients.dropout=0.3", option)
    plain, looking = (helpers.snapshots(helpers.engine_of(plan, method))[-1] for method in (Diary(), Looking()))
    assert looking.state["rounds"] == plain.state["rounds"] != []
    assert looking.costs.server_macs > 0
    assert (looking.costs.local_steps, looking.costs.bytes_up) == (plain.costs.local_steps, plain.costs.bytes_up)


class Blinded(FedBuff):
    """FedBuff after a look of the server at its data, which fails in one round before any client has started."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        self.bad = bad

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        if now.clients:
            yield [Job(SERVER, state["global"], grad=poisoned if now.index == self.bad else None)]
        return (yield from super().round(state, now))


def test_a_round_that_waits_for_clients_who_never_started_is_missed() -> None:
    plan = helpers.plan("baseline=fedbuff", "rounds=12", "clients.per_round=1", "clients.delay=3")
    schedule = plan.engine().schedule
    alone = [(t, a.round) for t in range(12) for a in schedule.born(t) if a.round > t and len(schedule.born(t)) == 1]
    idle = [due for _, due in alone if not schedule.born(due)]
    busy = [due for _, due in alone if schedule.born(due)]
    assert idle and busy
    for due in (idle[0], busy[0]):
        bad = next(t for t, arrival in alone if arrival == due)
        engine = helpers.engine_of(plan, Blinded(bad))
        seen = helpers.snapshots(engine)
        missed = {t for t in range(12) if seen[t + 1].state is seen[t].state}
        assert due in missed
        assert {a.round for a in schedule.born(bad)} | {bad} == missed


def test_the_servers_work_receives_what_is_due_in_a_round_in_which_nobody_starts() -> None:
    plan = helpers.plan("baseline=fedbuff", "rounds=12", "clients.per_round=1", "clients.delay=3")
    alone, beside = (helpers.engine_of(plan, Diary(server=server)) for server in (False, True))
    idle = [t for t in range(12) if not alone.schedule.born(t)]
    assert idle
    ends = [helpers.snapshots(engine)[-1].state["rounds"] for engine in (alone, beside)]
    assert [seen[:-1] for seen in ends[1]] == ends[0]
    assert {len(ends[1][t]) for t in idle} == {2}


def test_a_result_that_is_not_finite_is_dropped_and_said_so(punctual: Any) -> None:
    engine = helpers.engine_of(punctual)
    chosen = [[arrival.client for arrival in engine.schedule.born(t)] for t in range(3)]
    victim = chosen[1][1]
    engine = helpers.engine_of(punctual, Diary(bad={1: (victim,)}))
    snapshot, notes, bad = engine.begin(), [], []
    for _ in range(3):
        snapshot, record = engine.step(snapshot)
        notes.append(record.notes)
        bad.append(snapshot.bad_rounds)
    assert bad == [0, 1, 0]
    assert notes == [[], [f"round 2: client {victim} returned a non-finite loss, update or statistic; dropped"], []]
    assert [[client for client, _, _ in seen] for seen in snapshot.state["rounds"]] == [
        chosen[0],
        [k for k in chosen[1] if k != victim],
        chosen[2],
    ]
    assert snapshot.costs.bytes_up == 8 * model_bytes(punctual)
    assert snapshot.costs.bytes_down == 9 * model_bytes(punctual)


def test_too_many_bad_rounds_stop_the_run(punctual: Any) -> None:
    everybody = tuple(range(5))
    engine = helpers.engine_of(punctual, Diary(bad={0: everybody, 1: everybody}), max_bad_rounds=2)
    first, record = engine.step(engine.begin())
    assert first.bad_rounds == 1
    assert "the state stays as it was" in record.notes[-1]
    with pytest.raises(HybridflError, match=r"(?s)round 2: client \d.*stopped after 2 bad rounds in a row"):
        engine.step(first)


def test_if_everybody_drops_out_the_state_stays_and_time_goes_on(punctual: Any) -> None:
    engine = helpers.engine_of(punctual, Diary(bad={0: tuple(range(5))}))
    begun = engine.begin()
    after, record = engine.step(begun)
    assert after.round == 1
    assert after.state is begun.state
    assert record.reports == []
    assert record.notes[-1] == "round 1: no client's result came back; the state stays as it was"
    assert (after.costs.bytes_up, after.costs.bytes_down) == (0, 3 * model_bytes(punctual))
    assert after.costs.local_steps > 0
    again, record = engine.step(after)
    assert len(again.state["rounds"]) == 1
    assert record.reports == [("sent", None, 3.0), ("arrived", None, 3.0)]


def test_a_late_result_that_was_dropped_is_missed_when_it_is_due(late: Any) -> None:
    engine = helpers.engine_of(late)
    due, client = next((a.round, a.client) for a in engine.schedule.born(0) if a.round > 0)
    lost = sum(a.client == client and a.round == due for a in engine.schedule.born(0))
    engine = helpers.engine_of(late, Diary(bad={0: (client,)}))
    end = helpers.snapshots(engine)[-1]
    assert len(end.state["rounds"][due]) == 3 - lost
    assert not any(k == client and born == 0 for k, born, _ in end.state["rounds"][due])


def test_a_useless_server_ends_the_round_but_not_the_work_under_way(late: Any) -> None:
    sane, broken = (helpers.engine_of(late, Diary(server=True, bad=bad)) for bad in ({}, {0: (SERVER,)}))
    expected, _ = sane.step(sane.begin())
    begun = broken.begin()
    after, record = broken.step(begun)
    assert record.notes[-1] == "round 1: the server returned nothing usable; the state stays as it was"
    assert after.state is begun.state
    flights = [[(f.arrival, f.slot, f.result.participant) for f in s.in_flight] for s in (after, expected)]
    assert flights[0] == flights[1] != []
    end = after
    for _ in range(7):
        end, _ = broken.step(end)
    # The later rounds miss nobody: three clients and the server each.
    assert [len(seen) for seen in end.state["rounds"]] == [4] * 7


def test_a_dropped_client_of_a_later_yield_is_missed_there(punctual: Any) -> None:
    def work(model: Model, now: Round) -> list[Job]:
        return [Job(k, model, grad=poisoned if k == 1 else None) for k in range(3)]

    def nobody(model: Model, now: Round) -> list[Job]:
        return [Job(1, model, grad=poisoned)]

    engine = helpers.engine_of(punctual, Script(lambda model, now: [], work))
    assert engine.step(engine.begin())[0].state["counts"] == [[], [[0, ""], [2, ""]]]
    engine = helpers.engine_of(punctual, Script(lambda model, now: [], nobody))
    after, record = engine.step(engine.begin())
    assert after.state["counts"] == []
    assert "no client's result came back" in record.notes[-1]


# -- clients that drop out or fail -------------------------------------------------------------------------------------


def totals(costs: Costs) -> tuple[int, int, int]:
    return costs.bytes_down, costs.local_steps, costs.bytes_up


def test_who_drops_out_costs_nothing() -> None:
    plan = helpers.plan("baseline=fedbuff", "clients.dropout=0.4", "clients.per_round=5", "rounds=8")
    engine = helpers.engine_of(plan, Diary())
    seen, size = helpers.snapshots(engine), model_bytes(plan)
    counts = [len(engine.schedule.born(t)) for t in range(8)]
    assert 0 < min(counts) < max(counts) <= 5
    for t, arrived in enumerate(seen[-1].state["rounds"]):
        assert [client for client, _, _ in arrived] == [a.client for a in engine.schedule.born(t)]
        steps = sum(plan.federation.work.count(plan.federation.examples(a.client)) for a in engine.schedule.born(t))
        before, after = totals(seen[t].costs), totals(seen[t + 1].costs)
        assert [b - a for a, b in zip(before, after, strict=True)] == [counts[t] * size, steps, counts[t] * size]


@pytest.mark.parametrize("method", ["fedavg", "local_only", "fedavg_server_finetune"])
def test_if_everybody_drops_out_before_the_round_the_state_stays(method: str) -> None:
    plan = helpers.plan(f"baseline={method}", "clients.dropout=1", "rounds=5")
    engine = helpers.engine_of(plan)
    snapshot = begun = engine.begin()
    for t in range(5):  # more often than max_bad_rounds: nothing has diverged
        snapshot, record = engine.step(snapshot)
        assert record.notes == [f"round {t + 1}: no client's result came back; the state stays as it was"]
    assert helpers.identical(snapshot.state, begun.state)
    assert (snapshot.bad_rounds, snapshot.costs) == (0, begun.costs)


def test_a_round_that_nobody_reaches_keeps_those_on_their_way_to_others() -> None:
    plan = helpers.plan(
        "baseline=fedbuff", "clients.dropout=0.5", "clients.per_round=1", "clients.delay=2", "rounds=30"
    )
    engine = helpers.engine_of(plan, Diary())
    seen = helpers.snapshots(engine)
    reached = {arrival.round for t in range(30) for arrival in engine.schedule.born(t)}
    missed = [t for t in range(30) if t not in reached]
    assert 5 < len(missed) < 25
    assert any(engine.schedule.born(t) for t in missed)
    assert len(seen[-1].state["rounds"]) == 30 - len(missed)
    for t in range(30):
        assert (seen[t + 1].state is seen[t].state) == (t in missed)


@pytest.mark.parametrize("method", ["server_only", "oracle"])
def test_who_needs_no_client_goes_on(method: str) -> None:
    with_clients, alone = (
        helpers.snapshots(helpers.plan(f"baseline={method}", f"clients.dropout={p}").engine())[-1] for p in (0, 1)
    )
    assert helpers.identical(with_clients.state, alone.state)


def test_the_server_goes_on_alone_where_it_was_given_work(punctual: Any) -> None:
    plan = helpers.plan("baseline=fedavg", "clients.dropout=1")
    after, record = (engine := helpers.engine_of(plan, Diary(server=True))).step(engine.begin())
    assert [client for client, _, _ in after.state["rounds"][0]] == [SERVER]
    assert record.notes == []


@pytest.mark.parametrize("kind", ["clients.delay=0", "clients.delay=2", "clients.concurrency=4"])
def test_a_lost_result_costs_all_but_the_upload_and_is_never_seen(kind: str) -> None:
    line = ("baseline=fedbuff", "rounds=8", "clients.per_round=3", kind)
    plan = helpers.plan(*line, "clients.failure=0.4")
    engine = helpers.engine_of(plan, Diary())
    whole = helpers.snapshots(helpers.engine_of(helpers.plan(*line), Diary()))
    begun, seen = engine.begin(), []
    snapshot, size, told = begun, model_bytes(plan), 0
    for t in range(8):
        snapshot, record = engine.step(snapshot)
        seen.append(snapshot)
        lost = sum(arrival.lost for arrival in engine.schedule.born(t))
        told += lost
        assert ([f"round {t + 1}: results lost on the way: {lost}"] if lost else []) == record.notes[: lost > 0]
    due = [a for t in range(8) for a in engine.schedule.born(t)]
    assert told == sum(arrival.lost for arrival in due) > 3
    for mine, theirs in zip(seen, whole[1:], strict=True):
        assert totals(mine.costs)[:2] == totals(theirs.costs)[:2]
        assert mine.costs.macs == theirs.costs.macs
        arrived = sum(not arrival.lost and arrival.round < mine.round for arrival in due)
        assert mine.costs.bytes_up == arrived * size
    empty = {t for t in range(8) if all(a.lost for a in due if a.round == t)}
    expected = [[a.client for a in sorted(due) if a.round == t and not a.lost] for t in range(8) if t not in empty]
    assert [[client for client, _, _ in arrived] for arrived in seen[-1].state["rounds"]] == expected
    assert seen[-1].bad_rounds == 0


# -- methods that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["baseline=fedavg", "clients.delay=1"], "clients.delay"),
        (["baseline=fedavg", "clients.concurrency=1"], "clients.concurrency"),
        (["baseline=server_only", "server_data=none"], "server_data"),
    ],
)
def test_a_method_that_does_not_fit_is_refused_before_any_work(overrides: list[str], key: str) -> None:
    with pytest.raises(Unsuitable) as caught:
        helpers.plan(*overrides)
    assert caught.value.key == key
    assert overrides[0] in caught.value.problem


# -- mistakes of a method --------------------------------------------------------------------------------------------


class NoYield(Diary):
    def round(self, state: State, now: Round) -> Any:
        return state


class NoReturn(Diary):
    def round(self, state: State, now: Round) -> Any:
        yield [Job(k, state["global"]) for k in now.clients]


class NoList(Diary):
    def round(self, state: State, now: Round) -> Any:
        yield Job(now.clients[0], state["global"])


class NoModel(Diary):
    def serve(self, state: State, participant: int) -> Any:
        return [state["global"]]


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (NoYield, "NoYield.round must yield lists of jobs; it returned dict at once"),
        (NoReturn, "NoReturn.round must return its new state, a dict; got NoneType"),
        (NoList, r"NoList.round must yield lists of Job\(participant, Model\); it yielded Job"),
        (NoModel, r"NoModel.serve must return a list of Served\(Model\); got list of Model"),
    ],
)
def test_what_a_method_does_wrong_is_said(punctual: Any, method: type[Diary], text: str) -> None:
    engine = helpers.engine_of(punctual, method())
    with pytest.raises(HybridflError, match=text):
        engine.step(engine.begin())


class Diverging(Diary):
    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        yield [Job(k, state["global"]) for k in now.clients]
        return state | {"global": _filled(state["global"], math.inf)}


def test_a_state_that_serves_no_finite_model_is_not_taken(punctual: Any) -> None:
    engine = helpers.engine_of(punctual, Diverging(), max_bad_rounds=2)
    first, record = engine.step(engine.begin())
    assert P.all_finite(first.state)
    assert record.notes == ["round 1: the method's new global model is not finite; the state stays as it was"]
    with pytest.raises(HybridflError, match="2 bad rounds in a row"):
        engine.step(first)


def test_a_statistic_that_is_not_finite_is_no_result(punctual: Any) -> None:
    def jobs(model: Model, now: Round) -> list[Job]:
        return [Job(SERVER, model, steps=0, probes={"bad": lambda seen: torch.tensor(math.nan)})]

    engine = helpers.engine_of(punctual, Script(jobs))
    _, record = engine.step(engine.begin())
    assert "the server returned a non-finite loss, update or statistic" in record.notes[0]
