"""Peers take the mean of their neighbours' models; there is no server.

With one local step a round this is decentralised SGD, θ_i ← Σ_j W[i, j] (θ_j - lr g_j(θ_j)): Lian, Zhang, Zhang, Hsieh,
Zhang, Liu, NeurIPS 2017, arXiv 1705.09056, in the order adapt, then combine (their algorithm 1 mixes the models first and
takes the gradient at the model before mixing).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Literal

import numpy as np

from hybridfl import params as P
from hybridfl.build import PositiveInt
from hybridfl.federation import Federation
from hybridfl.merging.alignment import RunningStatistics, Sample
from hybridfl.methods.base import Facts
from hybridfl.mixing import among, consensus_distance, neighbours, spectral_gap
from hybridfl.models.batch_norm import has_statistics
from hybridfl.types import SERVER, Job, Model, Results, Round, Served, State, View

Whose = Literal["own", "neighbours", "proxy", "all"]
"""An agent's own examples, those of its neighbourhood, the server's, labelled or not, of which every agent gets a copy,
or all agents'. All but its own move raw data."""
Rows = Mapping[int, Mapping[int, float]]
"""By agent, the weights in its new model, its own model's too, by agent."""


class PeerAverage(Facts):
    """In a round every agent works on its own model, then all of them mix at once what they have then.

    So the metrics of a round are those right after mixing, before anybody works on. Agents whose work does not come back,
    such as those that are away, neither send nor receive: their weights stay with the others' own models.

    Args:
        local_steps: of an agent in a round; null is what ``client_optimizer`` says.
        reset_batch_norm: on whose training examples an agent estimates the running statistics of its BatchNorm layers
            anew after mixing; ``none`` mixes them like everything else. Under the policies ``batch``, ``frozen`` and
            ``local`` of ``model.batch_norm`` there is nothing to estimate.
        stats_examples: at most so many examples are looked at for it.
    """

    topology = "peers"

    def __init__(
        self,
        local_steps: PositiveInt | None = None,
        reset_batch_norm: Whose | Literal["none"] = "none",
        stats_examples: PositiveInt = 500,
    ) -> None:
        self.local_steps = local_steps
        self.reset_batch_norm = reset_batch_norm
        self.stats_examples = stats_examples
        self.looks_at(reset_batch_norm)

    def looks_at(self, whose: Whose | Literal["none"]) -> None:
        """The facts that follow from whose examples the agents look at."""
        self.moves_raw_data |= whose not in ("own", "none")
        if whose == "proxy":
            self.requires |= {"server_data"}

    def init(self, federation: Federation) -> State:
        estimated = federation.model_options.batch_norm in ("average", "reestimate") and has_statistics(federation.net)
        models = [federation.fresh_model(k) for k in range(federation.clients.number)]
        return {"models": models, "resets": estimated and self.reset_batch_norm != "none"}

    def serve(self, state: State, participant: int, width: float | None = None) -> list[Served]:
        return [] if participant == SERVER else [Served(state["models"][participant])]

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        models: list[Model] = list(state["models"])
        results = yield [self.job(k, state, now) for k in now.clients]
        for result in results:
            models[result.participant] = result.model
        matrix = among(_mixing(now), [result.participant for result in results])
        rows = {
            i: {j: float(matrix[i, j]) for j in sorted([i, *neighbours(matrix, i)])}
            for i in sorted({result.participant for result in results})
        }
        merged = yield from self.mixed(models, rows, state, now)
        if state["resets"]:
            merged = yield from self._reset(merged, now)
        models = [merged.get(k, model) for k, model in enumerate(models)]
        now.report("consensus_distance", consensus_distance([model.params for model in models]))
        now.report("spectral_gap", spectral_gap(matrix))
        return self.updated(state, models, results, now)

    def job(self, agent: int, state: State, now: Round) -> Job:
        """An agent's local work."""
        return Job(agent, state["models"][agent], steps=self.local_steps, source=None, returns="nothing")

    def mixed(
        self, models: list[Model], rows: Rows, state: State, now: Round
    ) -> Generator[list[Job], Results, dict[int, Model]]:
        """The new models of the agents that have rows; ``models`` are everybody's after the local work."""
        yield deliveries(models, rows)
        return {i: mean_of({j: models[j] for j in row}, row) for i, row in rows.items()}

    def updated(self, state: State, models: list[Model], results: Results, now: Round) -> State:
        """The new state, given everybody's models after mixing and the results of the local work."""
        return state | {"models": models}

    def sample(self, now: Round) -> Sample:
        return Sample(self.stats_examples, now.seed, now.index)

    def _reset(self, merged: Mapping[int, Model], now: Round) -> Generator[list[Job], Results, dict[int, Model]]:
        """The models with running statistics of BatchNorm as their agents find them."""
        probes = {"buffers": RunningStatistics(self.sample(now))}
        jobs = [
            Job(
                k,
                model,
                view=view(self.reset_batch_norm, k, now),
                steps=0,
                ctx={"model": model},
                held=frozenset({"model"}),
                probes=probes,
                source=None,
                returns="nothing",
            )
            for k, model in merged.items()
        ]
        return {r.participant: Model(r.start.params, r.probes["buffers"]) for r in (yield jobs)}


def deliveries(models: list[Model], rows: Rows) -> list[Job]:
    """Measurements of nothing, through which every agent with a row receives its neighbours' models."""
    return [Job(i, models[j], steps=0, source=j, returns="nothing") for i, row in rows.items() for j in row if j != i]


def mean_of(models: Mapping[int, Model], weights: Mapping[int, float]) -> Model:
    """Weighted mean, running statistics too, taken in the order of the agents' numbers."""
    agents = sorted(models)
    shares = [weights[j] for j in agents]
    return Model(*(P.mean([models[j][part] for j in agents], shares) for part in range(2)))


def view(whose: str, agent: int, now: Round) -> View:
    """These training examples as an agent sees them."""
    if whose in ("own", "proxy"):
        return View(owners=(SERVER,) if whose == "proxy" else None)
    mixing = _mixing(now)
    return View(owners=tuple(range(len(mixing)) if whose == "all" else sorted([agent, *neighbours(mixing, agent)])))


def _mixing(now: Round) -> np.ndarray:
    if now.mixing is None:
        raise ValueError("peers need a mixing matrix")
    return now.mixing
