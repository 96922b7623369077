"""Averages of models whose hidden units have been brought into one order, as the server's merge.

Weight matching: Git Re-Basin, Ainsworth, Hayase, Srinivasa, ICLR 2023, arXiv 2209.04836. Activation matching: Li et al. 2015,
arXiv 1511.07543, as DIMAT uses it, arXiv 2404.08079.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from hybridfl import params as P
from hybridfl.build import PositiveInt
from hybridfl.errors import ConfigError
from hybridfl.federation import Federation
from hybridfl.merging.alignment import Alignment, Sample, specification
from hybridfl.methods.fedavg import FedAvg
from hybridfl.types import SERVER, Job, Model, Results, Round, State


class Rebasin(FedAvg):
    """The clients' models, their units permuted into the order of the present global model's, then averaged.

    A permuted model is the same function. ``method.csv`` tells the share of units that stayed where they were; where all
    did, as after little local work, this is FedAvg.

    Args:
        match: by weights, or by activations on the server's examples, which need no labels.
        examples: at most so many of them.
        weights: n_k/n or equal.
    """

    def __init__(
        self,
        match: Literal["weight", "activation"] = "weight",
        examples: PositiveInt = 500,
        weights: Literal["examples", "uniform"] = "examples",
    ) -> None:
        self.match: Literal["weight", "activation"] = match
        self.examples = examples
        self.weights: Literal["examples", "uniform"] = weights
        if match == "activation":
            self.requires = frozenset({"server_data"})

    def init(self, federation: Federation) -> State:
        if federation.kept_names:
            problem = "got local, but then layers are not all there to be permuted; nearest valid choice: average"
            raise ConfigError("model.batch_norm", f"{problem}.")
        specification(federation.net, tuple(federation.dataset.train.x.shape[1:]))
        return super().init(federation)

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        model: Model = state["global"]
        results = yield [Job(client, model) for client in now.clients]
        job = Job(
            SERVER,
            model,
            steps=0,
            source=None,
            ctx={"own": model, "others": {str(k): result.model for k, result in enumerate(results)}},
            probes={"aligned": Alignment(self.match, Sample(self.examples, now.seed, now.index))},
        )
        (measured,) = yield [job]
        aligned = measured.probes["aligned"].values()
        for result, found in zip(results, aligned, strict=True):
            now.report("fixed_points", found["fixed_points"], result.participant)
        weights = results.weights(self.weights)
        parts = ([found[part] for found in aligned] for part in ("params", "buffers"))
        return {"global": Model(*(P.mean(part, weights) for part in parts))}
