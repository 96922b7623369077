"""APFL. Deng, Kamani, Mahdavi 2020, arXiv 2003.13461, algorithm 1 as commonly stated; the paper was not at hand."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from torch import Tensor

from hybridfl import params as P
from hybridfl.build import Fraction
from hybridfl.errors import ConfigError
from hybridfl.federation import Federation
from hybridfl.local import cross_entropy
from hybridfl.methods.base import Facts
from hybridfl.params import Params
from hybridfl.types import SERVER, Apply, Batch, Job, Model, ProbeInput, Results, Round, Served, State

OWN = "own."
"""Before the names of the client's own model among what a client trains."""
ALPHA = "alpha"


def apfl_loss(apply: Apply, theta: Params, params: Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
    """f(w) + f(α v + (1 - α) w) in which the second w is constant: the gradients are those of the algorithm.

    ∇f(w) for the global model, α ∇f(v̄) for the own one, and ⟨v - w, ∇f(v̄)⟩ for α.
    """
    shared, own = _parts(theta)
    alpha = theta.get(ALPHA, ctx[ALPHA])
    mixture = {name: alpha * own[name] + (1 - alpha) * tensor.detach() for name, tensor in shared.items()}
    return cross_entropy(apply, theta, shared, batch, ctx) + cross_entropy(apply, theta, mixture, batch, ctx)


def shared_part(seen: ProbeInput) -> Params:
    """The client's copy of the global model, all that it returns."""
    return _parts(seen.theta)[0]


class APFL(Facts):
    """Every client has a model of its own, trained so that its mixture with the global model is good.

    A client of the cohort does steps on its copy w of the global model, which is averaged as in FedAvg, and at the same time on v
    along the gradient of the loss of v̄ = α v + (1 - α) w, which it deploys. v and α stay with it. Here α is the weight of
    the own model; the weight on the global one is 1 - α.

    Args:
        alpha: of all clients, at first.
        adaptive: α is trained too, at the rate of the weights in every step; after a round it is put back into [0, 1].
    """

    alternatives = ("local", "global")
    client_columns = ("alpha",)

    def __init__(self, alpha: Fraction = 0.5, adaptive: bool = True) -> None:
        self.alpha, self.adaptive = alpha, adaptive

    def init(self, federation: Federation) -> State:
        if federation.start.buffers:
            problem = (
                "the two models of an APFL client cannot share the buffers of a net, such as BatchNorm's statistics."
            )
            raise ConfigError("", f"{problem} Try model=mlp or model.norm=group.")
        number = federation.clients.number
        start = federation.fresh_model()
        alpha = next(iter(start.params.values())).new_tensor(self.alpha)
        models = [federation.fresh_model(k).params for k in range(number)]
        # The copy of the global model that a client mixes with is the one it trained last.
        return {"global": start, "own": models, "copy": [start.params] * number, "alpha": [alpha] * number}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        results = yield [self._job(state, client) for client in now.clients]
        after: dict[str, list[Any]] = {name: list(state[name]) for name in ("own", "copy", "alpha")}
        for result in results:
            k = result.participant
            after["copy"][k], after["own"][k] = _parts(result.model.params)
            after["alpha"][k] = result.model.params.get(ALPHA, after["alpha"][k]).clamp(0, 1)
        for k, alpha in enumerate(after["alpha"]):
            now.report("alpha", alpha, k)
        merged = P.mean([result.probes["model"] for result in results], results.weights())
        return state | after | {"global": Model(merged, {})}

    def serve(self, state: State, participant: int, width: float | None = None) -> list[Served]:
        if participant == SERVER:
            return [Served(state["global"])]
        own, copy, alpha = (state[name][participant] for name in ("own", "copy", "alpha"))
        return [Served(Model({name: alpha * own[name] + (1 - alpha) * copy[name] for name in copy}, {}))]

    def alternative(self, name: str, state: State, participant: int) -> list[Served]:
        return [Served(state["global"] if name == "global" else Model(state["own"][participant], {}))]

    def _job(self, state: State, client: int) -> Job:
        model, alpha = state["global"], state["alpha"][client]
        theta = {**model.params, **{OWN + name: tensor for name, tensor in state["own"][client].items()}}
        if self.adaptive:
            theta[ALPHA] = alpha
        ctx = {ALPHA: alpha, "received": model.params}
        return Job(
            client,
            Model(theta, {}),
            source=None,
            loss=apfl_loss,
            ctx=ctx,
            held=frozenset({ALPHA}),
            probes={"model": shared_part},
            returns="probes",
        )


def _parts(theta: Params) -> tuple[Params, Params]:
    """The copy of the global model and the own model, under the names of the net."""
    own = {name.removeprefix(OWN): tensor for name, tensor in theta.items() if name.startswith(OWN)}
    return {name: theta[name] for name in own}, own
