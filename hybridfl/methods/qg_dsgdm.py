"""Quasi-global momentum. Lin, Karimireddy, Stich, Jaggi, ICML 2021, arXiv 2102.04761."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from hybridfl import params as P
from hybridfl.build import PositiveInt
from hybridfl.errors import ConfigError
from hybridfl.federation import Federation
from hybridfl.methods.peer_average import PeerAverage
from hybridfl.optimizers import SGD, Beta, learning_rates
from hybridfl.params import Params
from hybridfl.types import Job, Model, Results, Round, State


@dataclass(frozen=True)
class QuasiGlobalStep:
    """The direction of a step, ``ctx["momentum"]`` being m, which the step leaves: g + β m, Nesterov's g + β (g + β m).

    Weight decay is part of g.
    """

    beta: float
    nesterov: bool
    weight_decay: float

    def __call__(self, gradients: Params, theta: Params, ctx: Mapping[str, Any]) -> Params:
        g = P.add(gradients, theta, self.weight_decay)
        ahead = P.add(g, ctx["momentum"], self.beta)
        return P.add(g, ahead, self.beta) if self.nesterov else ahead


class QGDSGDm(PeerAverage):
    """Decentralised SGD whose momentum follows how an agent's model moved, local work and mixing together.

    m ← μ m + (1 - μ) (x - x⁺) / η for every agent, x its model before the round and x⁺ after mixing, η the sum of the
    round's learning rates: of one step in the paper, of all of them with more local steps. Nothing is sent beside models.

    Args:
        local_steps: as in :class:`PeerAverage`.
        beta: weight of the momentum in a step.
        mu: how much of the momentum is left after a round.
        nesterov: look ahead (QG-DSGDm-N).
    """

    def __init__(
        self,
        local_steps: PositiveInt | None = 1,
        beta: Beta = 0.9,
        mu: Beta = 0.9,
        nesterov: bool = False,
    ) -> None:
        super().__init__(local_steps)
        self.beta, self.mu, self.nesterov = beta, mu, nesterov

    def init(self, federation: Federation) -> State:
        work = federation.work
        if not isinstance(work, SGD):
            problem = f"got {type(work).__name__}, but the momentum between peers is that of SGD's steps"
            raise ConfigError("client_optimizer._target_", f"{problem}; nearest valid choice: hybridfl.optimizers.SGD.")
        if work.momentum:
            problem = f"got {work.momentum:g} beside the momentum between peers; nearest valid value: 0"
            raise ConfigError("client_optimizer.momentum", f"{problem}.")
        state = super().init(federation)
        momenta = [{name: torch.zeros_like(t) for name, t in model.params.items()} for model in state["models"]]
        return state | {"momenta": momenta}

    def job(self, agent: int, state: State, now: Round) -> Job:
        return replace(
            super().job(agent, state, now),
            work=replace(now.work, weight_decay=0.0),
            grad=QuasiGlobalStep(self.beta, self.nesterov, now.work.weight_decay),
            ctx={"momentum": state["momenta"][agent]},
            held=frozenset({"momentum"}),
        )

    def updated(self, state: State, models: list[Model], results: Results, now: Round) -> State:
        momenta: list[Params] = list(state["momenta"])
        for result in results:
            k, x = result.participant, result.start.params
            rates = learning_rates(now.work, x, now.index, now.total)
            moved = P.subtract(x, models[k].params)
            momenta[k] = {
                name: self.mu * m + (1 - self.mu) / (rates[name] * result.steps) * moved[name] if rates[name] else m
                for name, m in momenta[k].items()
            }
        return super().updated(state, models, results, now) | {"momenta": momenta}
