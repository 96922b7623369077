"""The oracle: all examples of all participants pooled at the server. An upper bound, not a federated method."""

from __future__ import annotations

from collections.abc import Generator

from hybridfl.federation import Federation
from hybridfl.methods.base import Facts
from hybridfl.types import SERVER, Job, Results, Round, Served, State, View


class Oracle(Facts):
    """Centralised training on the union of all labelled examples, noisy labels included, optimiser state kept.

    A round does as many steps as a round's cohort does together (``clients.per_round`` times the local steps of a
    client of mean size), with the clients' optimiser.
    """

    asynchronous = True
    moves_raw_data = True

    def init(self, federation: Federation) -> State:
        everybody = federation.labelled
        mean_size = max(1, round(sum(federation.examples(k) for k in everybody) / len(everybody)))
        steps = federation.clients.cohort * federation.work.count(mean_size)
        return {"global": federation.fresh_model(), "optimizer": {}, "everybody": everybody, "steps": steps}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        job = Job(
            SERVER,
            state["global"],
            view=View(owners=tuple(state["everybody"])),
            steps=state["steps"],
            optimizer_state=state["optimizer"],
            keep_optimizer=True,
        )
        (result,) = yield [job]
        return state | {"global": result.model, "optimizer": result.optimizer_state}

    def serve(self, state: State, participant: int, width: float | None = None) -> list[Served]:
        return [Served(state["global"])]
