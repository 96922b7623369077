"""FedProx. Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, MLSys 2020, arXiv 1812.06127, equation 2."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

from hybridfl.build import NonNegativeFloat
from hybridfl.methods.fedavg import FedAvg
from hybridfl.params import Params
from hybridfl.types import Job, Results, Round, State


def proximal(gradients: Params, theta: Params, ctx: Mapping[str, Any]) -> Params:
    """Gradient of the loss plus μ/2 ‖θ - θ_received‖²."""
    return {name: grad + ctx["mu"] * (theta[name] - ctx["received"][name]) for name, grad in gradients.items()}


class FedProx(FedAvg):
    """FedAvg whose clients are held near the model they received.

    Args:
        mu: strength of the proximal term; 0 is FedAvg.
    """

    def __init__(self, mu: NonNegativeFloat = 0.01) -> None:
        self.mu = mu

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        model = state["global"]
        ctx = {"mu": self.mu, "received": model.params}
        results = yield [Job(client, model, grad=proximal, ctx=ctx) for client in now.clients]
        return {"global": results.mean("examples")}
