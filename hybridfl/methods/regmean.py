"""RegMean as the server's merge. Jin, Ren, Preotiuc-Pietro, Cheng, ICLR 2023, arXiv 2212.09849.

Late models are carried over to the present global model: the layers are those of the updates around it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from hybridfl.build import Fraction
from hybridfl.merging.regmean import regmean
from hybridfl.methods.fedavg import FedAvg
from hybridfl.probes import Gram
from hybridfl.types import Job, Model, Results, Round, State


class RegMean(FedAvg):
    """Clients also send the Gram matrices of their layers' inputs; merged layers keep the clients' outputs on them.

    Args:
        alpha: factor of the Grams' off-diagonal entries.
        diagonal: clients send the diagonals only, d numbers a layer instead of d².
        weights: of what is no linear or convolutional weight: n_k/n or equal.
    """

    asynchronous = True

    def __init__(
        self,
        alpha: Fraction = 0.9,
        diagonal: bool = False,
        weights: Literal["examples", "uniform"] = "examples",
    ) -> None:
        self.alpha = alpha
        self.diagonal = diagonal
        self.weights: Literal["examples", "uniform"] = weights

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        probes = {"gram": Gram(diagonal=self.diagonal)}
        results = yield [Job(client, state["global"], probes=probes) for client in now.clients]
        grams = [result.probes["gram"] for result in results]
        models, shares = results.around(state["global"].params), results.shares(self.weights)
        return {"global": Model(regmean(models, grams, shares, self.alpha), results.mean_buffers(self.weights))}
