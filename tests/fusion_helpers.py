"""What tests of fusions at the server share: a round with all that went into it, and late results of two clients."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import helpers
import numpy as np
import torch
from run_helpers import Recorder
from torch import Tensor

from hybridfl import params as P
from hybridfl.engine import Engine
from hybridfl.optimizers import SGD, LocalWork, batches
from hybridfl.params import Params
from hybridfl.plan import Plan
from hybridfl.rng import stream
from hybridfl.snapshot import Snapshot
from hybridfl.types import SERVER, Method, Model, Result, Results, Round

CLIENTS, EXAMPLES = 3, 12


@functools.cache
def plan(*overrides: str) -> Plan:
    return helpers.plan("baseline=fedavg", *overrides)


class OneRound:
    """A round of a method, and what went into it."""

    def __init__(self, method: Method, plan: Plan) -> None:
        self.federation = federation = plan.federation
        engine: Engine = helpers.engine_of(plan, method, rounds=1)
        engine.executor = recorder = Recorder(engine.executor)
        after, record = engine.step(Snapshot(0, method.init(federation)))
        assert record.notes == []
        self.after, self.reports = after, record.reports
        self.model: Model = after.state["global"]
        self.jobs = recorder.rounds
        self.clients = [outcome.result for outcome in recorder.outcomes[:CLIENTS]]
        assert len({result.examples for result in self.clients}) > 1
        self.models = [result.model.params for result in self.clients]
        self.sizes = [float(result.examples) for result in self.clients]
        self.rows = torch.from_numpy(federation.split.server_train)
        self.x, self.y = federation.bench.x[self.rows], federation.bench.y[self.rows]

    def logits(self, params: Params, x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(self.federation.net, params, (x,))
        return out

    def mean(self) -> Params:
        return P.mean(self.models, self.sizes)

    def batches(self, work: LocalWork, tag: str, occurrence: int = 0) -> Iterator[np.ndarray]:
        """Positions in the server's examples, as the engine draws them for the server's n-th job of this tag."""
        shuffle = stream(self.federation.seed, "local", 0, SERVER, tag, occurrence)
        return batches(EXAMPLES, work, shuffle, work.count(EXAMPLES))

    def reported(self, name: str) -> list[float]:
        return [number for told, _, number in self.reports if told == name]

    @property
    def passes(self) -> float:
        """Examples that went through the net at the server, mapping left out."""
        return self.after.costs.server_macs / self.federation.forward_macs


def point(value: float) -> Model:
    return Model({"w": torch.tensor([value], dtype=torch.float64)}, {})


def late() -> Results:
    """Updates 1 of 30 examples and 5 of 10, from 10 and 20: their mean is 2."""
    ends = [(0, 10.0, 11.0, 30), (1, 20.0, 25.0, 10)]
    return Results(Result(k, "", point(start), point(end), n, 1, 0.0) for k, start, end, n in ends)


def asked(method: Any) -> list[Any]:
    """What it does with late results around the global model 100."""
    generator = method.round({"global": point(100.0)}, Round(3, 9, [0, 1], 2, SGD(), 0))
    next(generator)
    jobs: list[Any] = generator.send(late())
    return jobs
