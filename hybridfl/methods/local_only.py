"""Every client trains alone: the purely decentralised baseline without any communication."""

from __future__ import annotations

from collections.abc import Generator

from hybridfl.federation import Federation
from hybridfl.methods.base import Facts
from hybridfl.types import SERVER, Job, Results, Round, Served, State


class LocalOnly(Facts):
    """Each client continues its own model whenever it is sampled; there is no global model and nothing is sent."""

    def init(self, federation: Federation) -> State:
        return {"models": [federation.fresh_model(k) for k in range(federation.clients.number)]}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        models = list(state["models"])
        results = yield [Job(k, models[k], source=None, returns="nothing") for k in now.clients]
        for result in results:
            models[result.participant] = result.model
        return {"models": models}

    def serve(self, state: State, participant: int, width: float | None = None) -> list[Served]:
        return [] if participant == SERVER else [Served(state["models"][participant])]
