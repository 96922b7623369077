"""FedAvg. McMahan, Moore, Ramage, Hampson, Agüera y Arcas, AISTATS 2017, arXiv 1602.05629, algorithm 1."""

from __future__ import annotations

from collections.abc import Generator

from hybridfl.federation import Federation
from hybridfl.methods.base import Facts
from hybridfl.types import Job, Results, Round, Served, State


class FedAvg(Facts):
    """The cohort's models, averaged with weights n_k."""

    def init(self, federation: Federation) -> State:
        return {"global": federation.fresh_model()}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        results = yield [Job(client, state["global"]) for client in now.clients]
        return {"global": results.mean("examples")}

    def serve(self, state: State, participant: int, width: float | None = None) -> list[Served]:
        return [Served(state["global"])]
