"""A global model that every client trains on its own examples before it deploys it.

Among others Yu, Bagdasaryan, Shmatikov 2020, arXiv 2002.04758, and as FedAvg's usual baseline of personalisation.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping

from hybridfl.methods.personalised import Personal, Personalised
from hybridfl.types import Job, Model, Results, Round, State


class FedAvgLocalFinetune(Personalised):
    """Every client deploys its model after the local work: merging=optimal_averaging with a weight of 0."""

    alternatives = ("global",)

    def personalise(
        self, state: State, shared: Model, now: Round
    ) -> Generator[list[Job], Results, Mapping[int, Personal]]:
        results = yield [self.job(client, shared, now) for client in state["trainers"]]
        return {result.participant: Personal(result.model, result.model) for result in results}
