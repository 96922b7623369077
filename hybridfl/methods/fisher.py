"""Fisher-weighted averaging as the server's merge. Matena, Raffel 2022, arXiv 2111.09832.

Late models are carried over to the present global model: the weighted mean is that of the updates around it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from hybridfl.build import NonNegativeFloat, PositiveInt
from hybridfl.merging.fisher_mean import fisher_mean
from hybridfl.methods.fedavg import FedAvg
from hybridfl.probes import DiagonalFisher
from hybridfl.types import Job, Model, Results, Round, State


class Fisher(FedAvg):
    """Clients also send the diagonal Fisher information of their model on their examples, by which they are averaged.

    Args:
        labels: ``given`` for the empirical Fisher, or ``sampled`` from the model's predictions.
        examples: that a client measures it on; null takes all.
        floor: least Fisher information of a coordinate.
        weights: of the clients beside it, n_k/n or equal.
    """

    asynchronous = True

    def __init__(
        self,
        labels: Literal["given", "sampled"] = "given",
        examples: PositiveInt | None = None,
        floor: NonNegativeFloat = 1e-6,
        weights: Literal["examples", "uniform"] = "examples",
    ) -> None:
        self.labels: Literal["given", "sampled"] = labels
        self.examples = examples
        self.floor = floor
        self.weights: Literal["examples", "uniform"] = weights

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        results = yield [Job(k, state["global"], probes={"fisher": self._probe(now, k)}) for k in now.clients]
        fishers = [result.probes["fisher"] for result in results]
        models, shares = results.around(state["global"].params), results.shares(self.weights)
        merged = fisher_mean(models, fishers, shares, self.floor)
        return {"global": Model(merged, results.mean_buffers(self.weights))}

    def _probe(self, now: Round, client: int) -> DiagonalFisher:
        return DiagonalFisher(self.labels, self.examples, int(now.rng("labels", client).integers(2**63)))
