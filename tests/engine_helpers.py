"""Methods that note what the engine tells them, on a tiny federation."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Any

import helpers
import pytest
import torch

from hybridfl import params as P
from hybridfl.federation import Federation
from hybridfl.methods.base import Facts
from hybridfl.params import nbytes
from hybridfl.types import SERVER, Job, Model, Results, Round, Served, State


def poisoned(grads: P.Params, theta: P.Params, ctx: Mapping[str, Any]) -> P.Params:
    return {name: grad * math.nan for name, grad in grads.items()}


class Diary(Facts):
    """Keeps who arrived, from which model; the model of round t is filled with t."""

    asynchronous = True

    def __init__(self, bad: Mapping[int, tuple[int, ...]] | None = None, server: bool = False) -> None:
        self.bad = bad or {}
        self.server = server

    def init(self, federation: Federation) -> State:
        return {"global": _filled(federation.fresh_model(), 0.0), "rounds": []}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        bad = self.bad.get(now.index, ())
        jobs = [Job(k, state["global"], grad=poisoned if k in bad else None) for k in now.clients]
        if self.server:
            jobs.insert(0, Job(SERVER, state["global"], grad=poisoned if SERVER in bad else None))
        now.report("sent", len(jobs))
        results = yield jobs
        now.report("arrived", len(results))
        seen = [[r.participant, r.birth, float(next(iter(r.start.params.values())).reshape(-1)[0])] for r in results]
        return {"global": _filled(state["global"], now.index + 1.0), "rounds": [*state["rounds"], seen]}

    def serve(self, state: State, participant: int) -> list[Served]:
        return [Served(state["global"])]


class Script(Facts):
    """Yields the given job lists once a round and keeps how many results came."""

    def __init__(self, *yields: Any, moves_raw_data: bool = False) -> None:
        self.yields = yields
        self.moves_raw_data = moves_raw_data

    def init(self, federation: Federation) -> State:
        return {"global": federation.fresh_model(), "counts": []}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        counts = []
        for jobs in self.yields:
            results = yield jobs(state["global"], now)
            counts.append([[r.participant, r.tag] for r in results])
        return state | {"counts": counts}

    def serve(self, state: State, participant: int) -> list[Served]:
        return [Served(state["global"])]


def _filled(model: Model, value: float) -> Model:
    return Model({name: torch.full_like(t, value) for name, t in model.params.items()}, model.buffers)


@pytest.fixture(scope="module")
def late() -> Any:
    return helpers.plan("clients.delay=1.5", "rounds=8", "baseline=fedbuff", "client_optimizer.lr=1e-6")


@pytest.fixture(scope="module")
def punctual() -> Any:
    return helpers.plan("baseline=fedavg")


def model_bytes(plan: Any) -> int:
    return nbytes(plan.federation.start.params.values())
