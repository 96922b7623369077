"""The oracle: all examples of all participants pooled at the server. An upper bound, not a federated method."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from hybridfl.federation import Federation
from hybridfl.methods.base import Facts
from hybridfl.types import SERVER, Job, Results, Round, Served, State, View


class Oracle(Facts):
    """Centralised training on the union of all labelled examples, noisy labels included, optimiser state kept.

    A round does as many steps as a round's cohort does together on its task (``clients.per_round`` times the local steps
    of a client of mean size), with the clients' optimiser. So too where a round reads more than its own task: a stream
    then takes as many steps in all as a federation's, and with ``all`` as many passes over each example, spread over all
    rounds instead of those of one task.

    Args:
        tasks: whose examples a round reads: the task's own, those of all tasks so far, or of all there will be, which is
            joint training, the upper bound of a stream. The loss sees the classes of these tasks. All are the same
            without a stream.
    """

    asynchronous = True
    moves_raw_data = True

    def __init__(self, tasks: Literal["current", "seen", "all"] = "current") -> None:
        self.tasks: Literal["current", "seen", "all"] = tasks

    def init(self, federation: Federation) -> State:
        everybody = federation.labelled
        sizes = zip(*(federation.by_task(k) for k in everybody), strict=True)
        mean_sizes = [max(1, round(sum(task) / len(everybody))) for task in sizes]
        steps = [federation.clients.cohort * federation.work.count(size) for size in mean_sizes]
        return {"global": federation.fresh_model(), "optimizer": {}, "everybody": everybody, "steps": steps}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        job = Job(
            SERVER,
            state["global"],
            view=View(owners=tuple(state["everybody"]), tasks=self.tasks),
            steps=state["steps"][now.task],
            optimizer_state=state["optimizer"],
            keep_optimizer=True,
        )
        (result,) = yield [job]
        return state | {"global": result.model, "optimizer": result.optimizer_state}

    def serve(self, state: State, participant: int, width: float | None = None) -> list[Served]:
        return [Served(state["global"])]
