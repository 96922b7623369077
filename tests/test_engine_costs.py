"""Who pays for what the engine moves and computes."""

from __future__ import annotations

from typing import Any

import engine_helpers
import helpers
import pytest
import torch
from engine_helpers import Diary, Script, model_bytes

from hybridfl import probes
from hybridfl.errors import HybridflError
from hybridfl.types import SERVER, Job, Model, Round, View

punctual = engine_helpers.punctual


# -- who pays --------------------------------------------------------------------------------------------------------


def test_what_a_client_gets_for_two_jobs_is_sent_once(punctual: Any) -> None:
    extra = torch.zeros(7, dtype=torch.float64)

    def jobs(model: Model, now: Round) -> list[Job]:
        # Contexts of their own, with the same tensors inside.
        return [Job(0, model, tag=tag, ctx={"extra": extra, "received": model.params}) for tag in "ab"]

    engine = helpers.engine_of(punctual, Script(jobs))
    costs = engine.step(engine.begin())[0].costs
    assert costs.bytes_down == model_bytes(punctual) + 56
    assert costs.bytes_up == 2 * model_bytes(punctual)


def test_what_stays_at_its_owner_and_what_the_server_does_is_free(punctual: Any) -> None:
    def jobs(model: Model, now: Round) -> list[Job]:
        return [Job(0, model, source=None, returns="nothing"), Job(SERVER, model, probes={"loss": probes.mean_loss})]

    engine = helpers.engine_of(punctual, Script(jobs))
    costs = engine.step(engine.begin())[0].costs
    assert (costs.bytes_up, costs.bytes_down, costs.bytes_peer) == (0, 0, 0)
    assert costs.macs > costs.server_macs > 0


def test_a_measurement_sends_the_model_down_and_its_statistics_up(punctual: Any) -> None:
    def jobs(model: Model, now: Round) -> list[Job]:
        return [Job(0, model, steps=0, probes={"loss": probes.mean_loss, "logits": probes.logits})]

    engine = helpers.engine_of(punctual, Script(jobs))
    costs, federation = engine.step(engine.begin())[0].costs, punctual.federation
    assert costs.bytes_down == model_bytes(punctual)
    assert costs.bytes_up == 8 * (1 + 3 * federation.examples(0))
    assert costs.macs == 2 * federation.examples(0) * federation.forward_macs  # a pass for each of the two
    assert costs.local_steps == 0


def test_optimiser_state_is_paid_both_ways(punctual: Any) -> None:
    state = {"momentum": {"w": torch.zeros(5, dtype=torch.float64)}}

    def jobs(model: Model, now: Round) -> list[Job]:
        job = Job(0, model, optimizer_state=state, keep_optimizer=True)
        return [job]

    engine = helpers.engine_of(punctual, Script(jobs))
    costs = engine.step(engine.begin())[0].costs
    assert costs.bytes_down - model_bytes(punctual) == 40
    assert costs.bytes_up - model_bytes(punctual) == 40


@pytest.mark.parametrize("reader", [0, SERVER])
def test_raw_data_do_not_move_unless_the_method_says_so(punctual: Any, reader: int) -> None:
    def jobs(model: Model, now: Round) -> list[Job]:
        return [Job(reader, model, view=View(owners=(reader, 1)))]

    engine = helpers.engine_of(punctual, Script(jobs))
    with pytest.raises(HybridflError, match="reads others' data without moves_raw_data"):
        engine.step(engine.begin())


@pytest.mark.parametrize(
    ("reader", "owner", "channel"), [(0, 1, "bytes_peer"), (0, SERVER, "bytes_down"), (SERVER, 1, "bytes_up")]
)
def test_raw_data_are_booked_once_for_the_whole_run(punctual: Any, reader: int, owner: int, channel: str) -> None:
    def jobs(model: Model, now: Round) -> list[Job]:
        return [Job(reader, model, view=View(owners=(reader, owner)), source=None, returns="nothing") for _ in range(2)]

    engine = helpers.engine_of(punctual, Script(jobs, moves_raw_data=True))
    seen, federation = helpers.snapshots(engine), punctual.federation
    for snapshot in seen[1:]:
        size = federation.examples(owner) * (16 * 4 + 8)  # 16 pixels of float32 and a label of int64
        expected = dict.fromkeys(("bytes_up", "bytes_down", "bytes_peer"), 0) | {channel: size}
        assert {name: getattr(snapshot.costs, name) for name in expected} == expected
        assert snapshot.moved == ((owner, reader, "train"),)


def test_work_without_examples_is_refused(punctual: Any) -> None:
    def jobs(model: Model, now: Round) -> list[Job]:
        return [Job(0, model, view=View(split="val"))]

    engine = helpers.engine_of(punctual, Script(jobs))
    with pytest.raises(HybridflError, match="client 0 has no examples in its 'val' part"):
        engine.step(engine.begin())


# -- who sends what --------------------------------------------------------------------------------------------------


def test_only_what_moves_is_booked(punctual: Any) -> None:
    size, base = model_bytes(punctual), torch.zeros(100)

    def cost(**options: Any) -> tuple[int, int, int]:
        def jobs(model: Model, now: Round) -> list[Job]:
            return [Job(0, model, ctx={"base": base}, probes={"loss": probes.mean_loss}, **options)]

        engine = helpers.engine_of(punctual, Script(jobs))
        costs = engine.step(engine.begin())[0].costs
        return costs.bytes_down, costs.bytes_up, costs.bytes_peer

    assert cost() == (size + 400, size + 8, 0)
    assert cost(held=frozenset({"base"})) == (size, size + 8, 0)
    assert cost(source=None) == (400, size + 8, 0)
    assert cost(source=1) == (0, size + 8, size + 400)
    assert cost(returns="probes") == (size + 400, 8, 0)
    assert cost(source=None, held=frozenset({"base"}), returns="nothing") == (0, 0, 0)


def test_a_methods_streams_are_not_the_engines(punctual: Any) -> None:
    engine = helpers.engine_of(punctual, Diary())
    number, cohort = punctual.settings.clients.number, punctual.settings.clients.cohort
    now = Round(0, 1, [], cohort, punctual.federation.work, punctual.federation.seed)
    drawn = [a.client for a in engine.schedule.born(0)]
    assert sorted(drawn) == sorted(helpers.stream(0, "cohort", 0).choice(number, cohort, replace=False).tolist())
    assert now.rng("cohort").integers(2**60) != helpers.stream(0, "cohort", 0).integers(2**60)


def test_the_atlas_costs_its_map(punctual: Any) -> None:
    """A step of the search costs K·d forward and K·d backward beside the passes of the net."""
    line = ("merging.search.steps=1", "merging.search.batch=4", "merging.fallback.accept=none")
    federation = helpers.plan(*line).federation
    engine = helpers.plan(*line).engine()
    costs = engine.step(engine.begin())[0].costs
    width = sum(t.numel() for t in federation.start.params.values())
    anchors, examples = federation.clients.cohort, federation.examples(SERVER)
    passes = 3 * 4 + 2 * examples
    assert costs.server_macs == passes * federation.forward_macs + (2 + 2) * anchors * width
