"""FedAvg of LoRA factors. Zhang et al. 2024 (FedIT), ICASSP, arXiv 2305.05644; with one factor, FFA-LoRA.

FFA-LoRA: Sun, Li, Li, Ding, ICLR 2024, arXiv 2403.12313. A stays as it was drawn and only B is trained, so that the mean of
the products is the product of the means. Both papers were not at hand.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from hybridfl.federation import Federation
from hybridfl.lora import DEFAULT, Lora
from hybridfl.methods.base import Facts
from hybridfl.rng import stream
from hybridfl.types import Job, Model, Results, Round, Served, State


class LoraFedAvg(Facts):
    """The backbone is frozen; factors of low-rank updates of its layers, and the head, are trained and averaged.

    Averages have weights n_k. In a stream of tasks one pair of factors is trained through all of them.

    Args:
        lora: what is adapted.
        train: both factors, or only one, beside the other as it was drawn.
    """

    def __init__(self, lora: Lora = DEFAULT, train: Literal["both", "A", "B"] = "both") -> None:
        self.lora = lora
        self.train = train

    def init(self, federation: Federation) -> State:
        start, adapters = federation.fresh_model(), self.lora.fitted(federation)
        rng = stream(federation.seed, "method: factors")
        factors = adapters.fresh(start.params, rng, zero="A" if self.train == "A" else "B")
        fixed = {"A": adapters.names("B"), "B": adapters.names("A"), "both": []}[self.train]
        return {
            "layers": list(adapters.layers),
            "full": list(adapters.full),
            "base": {name: tensor for name, tensor in start.params.items() if name not in adapters.full},
            "fixed": {name: factors[name] for name in fixed},
            "theta": {name: tensor for name, tensor in factors.items() if name not in fixed}
            | {name: start.params[name] for name in adapters.full},
            "holders": [],
            "global": start,
        }

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        adapters = self.lora.stored(state["layers"], state["full"])
        frozen = {"base": state["base"], "factors": state["fixed"]}
        # What never changes is sent to a client once.
        held = {client: frozenset(frozen if client in state["holders"] else ()) for client in now.clients}
        start = Model(state["theta"], state["global"].buffers)
        work = self.lora.work(now.work)
        results = yield [Job(k, start, adapters.map, frozen, work=work, held=held[k]) for k in now.clients]
        mean = results.mean("examples")
        params = adapters.map(mean.params, frozen)
        return state | {
            "theta": mean.params,
            "holders": sorted({*state["holders"], *now.clients}),
            "global": Model({name: params[name] for name in state["global"].params}, mean.buffers),
        }

    def serve(self, state: State, participant: int, width: float | None = None) -> list[Served]:
        return [Served(state["global"])]
