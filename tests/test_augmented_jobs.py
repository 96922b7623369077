"""Who sees an augmentation, and from which stream its numbers come."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from augmentation_helpers import images
from torch import Tensor

from hybridfl import params as P
from hybridfl import probes
from hybridfl.data.augmentation import Augmentation, Augmented
from hybridfl.evaluation import Evaluator
from hybridfl.federation import Federation
from hybridfl.methods.base import Facts
from hybridfl.rng import stream
from hybridfl.types import SERVER, Job, ProbeInput, Results, Round, Served, State


class Witness:
    """An augmentation of one's own that changes nothing and keeps what it was given and what it drew."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, int]] = []

    def __call__(self, x: Tensor, rng: np.random.Generator, /) -> Augmented:
        self.seen.append((x.clone(), int(rng.integers(2**60))))
        return Augmented(x)

    @property
    def drawn(self) -> list[int]:
        return [number for _, number in self.seen]


class Order(Facts):
    """Gives work to these participants and tags in this order, in one yield or in one each."""

    def __init__(self, *who: tuple[int, str], apart: bool = False, **options: Any) -> None:
        self.who, self.apart, self.options = who, apart, options

    def init(self, federation: Federation) -> State:
        return {"global": federation.fresh_model()}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        jobs = [Job(k, state["global"], tag=tag, **self.options) for k, tag in self.who]
        if self.apart:
            results: list[Any] = []
            yield []
            for job in jobs:
                results += yield [job]
        else:
            results = yield jobs
        ends = {f"{r.participant}{r.tag}": r.model.params for r in results}
        return state | {"ends": ends}

    def serve(self, state: State, participant: int) -> list[Served]:
        return [Served(state["global"])]


EVERYTHING = ("augmentation.crop=1", "augmentation.flip=0.5", "augmentation.erase=0.5", "augmentation.mixup=0.5")


def ends(plan: Any, method: Order, rounds: int = 1) -> Any:
    engine = helpers.engine_of(plan, method)
    snapshot = engine.begin()
    for _ in range(rounds):
        snapshot, _ = engine.step(snapshot)
    return snapshot.state["ends"]


def test_the_numbers_do_not_depend_on_the_order_of_jobs() -> None:
    plan = helpers.plan(*EVERYTHING, "executor=sequential")
    who = [(0, ""), (1, ""), (1, "b"), (SERVER, "")]
    forward, backward = ends(plan, Order(*who)), ends(plan, Order(*reversed(who)))
    apart = ends(plan, Order(*who, apart=True))
    assert forward.keys() == backward.keys() == apart.keys()
    for key, params in forward.items():
        assert helpers.identical(params, backward[key])
        assert helpers.identical(params, apart[key])
    assert not helpers.close(forward["1"], forward["1b"])
    alone = ends(plan, Order((1, "")))
    assert helpers.identical(alone["1"], forward["1"])


def drawn(plan: Any, method: Order, rounds: int = 1) -> list[int]:
    """The first number of each job."""
    plan.federation.augment = witness = Witness()
    ends(plan, method, rounds)
    return witness.drawn


def test_every_job_has_numbers_of_its_own_from_the_stream_of_its_key() -> None:
    plan = helpers.plan("seed=3")
    who = ((0, ""), (0, ""), (0, "b"), (1, ""), (SERVER, ""))
    numbers = drawn(plan, Order(*who, steps=1), rounds=2)
    keys = [(t, *key) for t in range(2) for key in ((0, "", 0), (0, "", 1), (0, "b", 0), (1, "", 0), (SERVER, "", 0))]
    assert numbers == [int(stream(3, "augmentation", *key).integers(2**60)) for key in keys]
    assert len(set(numbers)) == 10


def test_steps_see_it_and_nothing_else_does() -> None:
    """Steps of clients and server, also before round 0; no measurement, no statistic after steps, no evaluation."""
    plan = helpers.plan("start=server", "start_steps=4", "baseline=fedavg")
    federation = plan.federation
    federation.augment = witness = Witness()
    begun = plan.engine().begin()
    assert len(witness.seen) == 4
    engine = helpers.engine_of(plan, Order((0, ""), (SERVER, ""), steps=3, probes={"loss": probes.mean_loss}))
    engine.step(begun)
    assert len(witness.seen) == 4 + 3 + 3
    assert all(x.shape[1:] == (1, 4, 4) and len(x) <= 8 for x, _ in witness.seen)
    engine = helpers.engine_of(plan, Order((0, ""), (SERVER, ""), steps=0, probes={"loss": probes.mean_loss}))
    engine.step(begun)
    Evaluator(federation, plan.method, plan.settings.evaluation).score(begun.state, 0, True)
    assert len(witness.seen) == 10


def test_statistics_are_of_the_examples_themselves() -> None:
    plan = helpers.plan(*EVERYTHING, "executor=sequential")
    federation = plan.federation

    def inputs(seen: ProbeInput) -> Tensor:
        return torch.cat([batch.x for batch in seen.batches])

    class Asking(Order):
        def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
            (result,) = yield [Job(0, state["global"], probes={"x": inputs, "loss": probes.mean_loss})]
            (again,) = yield [Job(0, result.model, steps=0, probes={"loss": probes.mean_loss})]
            assert torch.equal(result.probes["x"], federation.bench.x[torch.from_numpy(federation.owned(0))])
            assert torch.equal(result.probes["loss"], again.probes["loss"])
            return state | {"ends": {}}

    pool = federation.bench.x.clone()
    ends(plan, Asking())
    assert torch.equal(federation.bench.x, pool)


def test_a_step_sees_exactly_what_the_augmentation_gave() -> None:
    """Training on examples that are all halved is training of a net whose inputs are halved."""
    plan = helpers.plan("baseline=fedavg", "rounds=1")
    federation = plan.federation
    plain = helpers.snapshots(plan.engine())[-1].state["global"].params
    federation.augment = lambda x, rng: Augmented(x / 2)
    halved = helpers.snapshots(plan.engine())[-1].state["global"].params
    federation.augment = None
    federation.bench.x.div_(2)
    assert helpers.identical(helpers.snapshots(plan.engine())[-1].state["global"].params, halved)
    assert not helpers.close(halved, plain, 1e-3)


def test_a_pass_is_booked_once() -> None:
    costs = [
        helpers.snapshots(helpers.plan("baseline=fedavg", *options).engine())[-1].costs for options in ((), EVERYTHING)
    ]
    assert costs[0] == costs[1]


def test_without_augmentation_nothing_is_built() -> None:
    assert Augmentation().fitted(images(3)) is None
    assert helpers.plan("augmentation=none").federation.augment is None
    assert helpers.plan("augmentation=mixup").federation.augment is not None


@pytest.mark.parametrize("method", ["merging.objective=mix", "merging.search.kind=es", "baseline=oracle"])
def test_methods_run_with_everything_on(method: str) -> None:
    """Teachers' logits are found by position, so the search with a teacher mixes them too."""
    on, off = (helpers.plan(method, *options) for options in (EVERYTHING, ()))
    ends = [helpers.snapshots(plan.engine())[-1].state["global"].params for plan in (on, off)]
    assert P.all_finite(ends[0])
    assert not helpers.close(*ends, 1e-6)
