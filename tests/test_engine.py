"""Time in the engine: late results, the event queue, purity of a round, and what comes before the first."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import engine_helpers
import helpers
import pytest
from engine_helpers import Diary, Script, model_bytes

from hybridfl.checkpoints import pack
from hybridfl.errors import HybridflError
from hybridfl.experiment import packed
from hybridfl.schedule import Schedule
from hybridfl.types import SERVER, Job, Model, Results, Round, State

late = engine_helpers.late
punctual = engine_helpers.punctual


# -- time ------------------------------------------------------------------------------------------------------------


def test_late_results_arrive_in_their_round_in_slot_order_with_their_birth(late: Any) -> None:
    engine = helpers.engine_of(late, Diary())
    seen = helpers.snapshots(engine)
    born = [(t, arrival) for t in range(8) for arrival in engine.schedule.born(t)]
    assert any(arrival.round > t for t, arrival in born)
    for round in range(8):
        due = sorted((arrival.slot, arrival.client, t) for t, arrival in born if arrival.round == round)
        expected = [[client, t, float(t)] for _, client, t in due]
        assert seen[-1].state["rounds"][round] == expected
    for t in range(9):
        waiting = sorted((f.arrival, f.slot) for f in seen[t].in_flight)
        assert waiting == sorted((a.round, a.slot) for born_in, a in born if born_in < t <= a.round)
    assert seen[-1].in_flight == ()
    assert seen[-1].costs.local_steps == sum(
        2 * math.ceil(late.federation.examples(arrival.client) / 8) for _, arrival in born
    )


def test_upload_is_paid_on_arrival_and_download_at_birth(late: Any) -> None:
    engine = helpers.engine_of(late, Diary())
    seen, size = helpers.snapshots(engine), model_bytes(late)
    for t in range(1, 9):
        assert seen[t].costs.bytes_up == t * 3 * size
        # Two births of one client in a round are one download of the same model.
        downloads = sum(len({arrival.client for arrival in engine.schedule.born(i)}) for i in range(t))
        assert seen[t].costs.bytes_down == downloads * size


def test_servers_jobs_and_measurements_are_never_late(late: Any) -> None:
    def first(model: Model, now: Round) -> list[Job]:
        return [Job(0, model, steps=0, tag="measure"), Job(SERVER, model, tag="work")]

    after, _ = (engine := helpers.engine_of(late, Script(first))).step(engine.begin())
    assert after.state["counts"] == [[[0, "measure"], [SERVER, "work"]]]
    assert after.in_flight == ()


# -- the event queue -------------------------------------------------------------------------------------------------


def test_the_queue_sends_the_model_of_the_round_under_way() -> None:
    line = ("clients.concurrency=4", "clients.timing.speeds=1", "clients.timing.step=0.1", "clients.per_round=2")
    plan = helpers.plan("baseline=fedbuff", "rounds=12", *line)
    engine = helpers.engine_of(plan, Diary())
    snapshot, ends = engine.begin(), []
    for _ in range(12):
        snapshot, record = engine.step(snapshot)
        ends.append(record.sim_seconds)
    federation = plan.federation
    steps = [federation.work.count(federation.examples(client)) for client in range(5)]
    schedule = Schedule(federation.clients, 12, federation.seed, steps)
    born = [(t, arrival) for t in range(12) for arrival in schedule.born(t)]
    for round in range(12):
        due = sorted((arrival.slot, arrival.client, t) for t, arrival in born if arrival.round == round)
        assert snapshot.state["rounds"][round] == [[client, t, float(t)] for _, client, t in due]
    assert ends == [schedule.time(t) for t in range(12)] == sorted(ends)
    assert len(set(steps)) > 1
    assert ends != [Schedule(federation.clients, 12, federation.seed).time(t) for t in range(12)]


def test_a_method_is_told_the_cohort_of_its_round() -> None:
    class Sizes(Diary):
        def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
            now.report("cohort", now.cohort)
            return (yield from super().round(state, now))

    plan = helpers.plan("baseline=fedavg", "clients.per_round={0:2,2:1.0}", "clients.held_out=1")
    engine = helpers.engine_of(plan, Sizes())
    snapshot, told = engine.begin(), []
    for _ in range(3):
        snapshot, record = engine.step(snapshot)
        told.append([value for name, _, value in record.reports if name in ("cohort", "arrived")])
    assert told == [[2, 2], [2, 2], [4, 4]]
    assert helpers.plan("clients.per_round={0:2,2:1.0}").method.init(plan.federation)["size"] == 6 * 4


# -- purity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["late", "punctual"])
def test_a_round_is_a_pure_function_of_the_snapshot(kind: str, request: pytest.FixtureRequest) -> None:
    plan = request.getfixturevalue(kind)
    engine = helpers.engine_of(plan)
    snapshot = engine.begin()
    for _ in range(3):
        before = pack(packed(snapshot))
        stored = {k: v.clone() for k, v in snapshot.state["global"].params.items()}
        one, first = engine.step(snapshot)
        two, second = engine.step(snapshot)
        assert helpers.identical(_timeless(one), _timeless(two))
        assert (first.reports, first.notes) == (second.reports, second.notes)
        assert helpers.identical(pack(packed(snapshot)), before)
        assert helpers.identical(snapshot.state["global"].params, stored)
        snapshot = one


def _timeless(snapshot: Any) -> Any:
    return pack(packed(snapshot) | {"seconds": 0.0})


def test_two_jobs_of_a_client_have_randomness_of_their_own(punctual: Any) -> None:
    big = max(range(5), key=punctual.federation.examples)  # more than a batch, so that the order matters

    class Twice(Diary):
        def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
            model = state["global"]
            results = yield [Job(big, model), Job(big, model), Job(big, model, tag="b")]
            again = yield [Job(big, model)]
            return {"global": model, "ends": [r.model.params for r in [*results, *again]]}

    engine = helpers.engine_of(punctual, Twice())
    ends = engine.step(engine.begin())[0].state["ends"]
    assert len(ends) == 4
    assert not any(helpers.close(a, b) for i, a in enumerate(ends) for b in ends[:i])


# -- before round 0 --------------------------------------------------------------------------------------------------


def test_start_server_trains_once_and_is_booked() -> None:
    plan = helpers.plan("baseline=fedavg", "start=server", "start_steps=4")
    federation = plan.federation
    engine = plan.engine()
    begun, again = engine.begin(), engine.begin()
    assert helpers.identical(begun.state, again.state)
    work = federation.work.__class__(lr=0.1, batch_size=8, steps=4)
    rows, reference = federation.split.server_train, helpers.Central(federation, federation.start, lr=0.1)
    index = [rows[p] for p in helpers.batches(12, work, helpers.stream(0, "local", 0, SERVER, "start", 0), 4)]
    assert helpers.close(begun.state["global"].params, reference.train(index))
    assert begun.costs.server_macs == begun.costs.macs == 3 * 4 * 8 * federation.forward_macs
    assert begun.costs.local_steps == begun.costs.bytes_down == 0


def test_a_start_that_diverges_is_said() -> None:
    plan = helpers.plan("baseline=fedavg", "start=server", "client_optimizer.lr=1e300")
    with pytest.raises(HybridflError, match="start=server diverged"):
        plan.engine().begin()
