"""Split-Mix. Hong, Wang, Wang, Zhou, ICLR 2022, arXiv 2203.09747, algorithms 1 to 3.

The full-width net is split into independent narrow base nets. A client trains as many of them as its device can run; any
width is later served by mixing the first so many: the mean of their logits.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor

from hybridfl.build import Range
from hybridfl.errors import ConfigError
from hybridfl.federation import Federation
from hybridfl.methods.base import Facts
from hybridfl.params import Params
from hybridfl.types import SERVER, Apply, Batch, Job, Model, Results, Round, Served, State

Width = Annotated[float, Range(above=0, high=1)]


def masked_cross_entropy(apply: Apply, theta: Params, params: Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
    """Cross-entropy in which the logits of classes absent from the batch are 0.

    HeteroFL (arXiv 2010.01264) masks the classes that a client lacks, the code of Split-Mix those that a batch lacks.
    """
    logits = apply(params, batch.x)
    present = F.one_hot(batch.y, logits.shape[1]).amax(0)
    return F.cross_entropy(logits * present, batch.y)


class SplitMix(Facts):
    """Base nets in a cyclic order that all clients share and that is carried over the rounds.

    In a round, client k with budget R trains floor(R / r) bases: the next one of the order, and others drawn without
    replacement. Each is trained on its own, in batches of its own. A base that nobody trained keeps its weights.

    Args:
        base_width: r; there are floor(1 / r) bases.
        serve_widths: widths that are evaluated beside each client's own; each is served by its first floor(R / r) bases.
        rescale_init: initial weights of all layers but the first are those of the full-width net in scale: times √r.
        masked_loss: logits of classes that a batch does not have are 0, see :func:`masked_cross_entropy`.
    """

    def __init__(
        self,
        base_width: Width = 0.125,
        serve_widths: tuple[Width, ...] = (0.125, 0.25, 0.5, 1.0),
        rescale_init: bool = False,
        masked_loss: bool = False,
    ) -> None:
        self.base_width, self.rescale_init, self.masked_loss = base_width, rescale_init, masked_loss
        for number, width in enumerate(serve_widths):
            if bases(width, base_width) < 1:
                problem = f"got {width:g}: narrower than a base; nearest valid value: {base_width:g}."
                raise ConfigError(f"serve_widths[{number}]", problem)
        self.widths = tuple(serve_widths)

    def init(self, federation: Federation) -> State:
        number = bases(1.0, self.base_width)
        budgets = list(federation.widths)
        if bases(min(budgets), self.base_width) < 1:
            problem = f"got {self.base_width:g}, but a client can only run a width of {min(budgets):g}"
            raise ConfigError("base_width", f"{problem}; nearest valid value: {min(budgets):g}.")
        models = [federation.fresh_model(width=self.base_width, name=f"base {i}" if i else "") for i in range(number)]
        if self.rescale_init:
            models = [Model(_rescaled(model.params, math.sqrt(self.base_width)), model.buffers) for model in models]
        return {"bases": models, "order": [], "budgets": budgets}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        models, order, rng = state["bases"], list(state["order"]), now.rng("bases")
        jobs = []
        for client in now.clients:
            if not order:
                order = rng.permutation(len(models)).tolist()
            first = order.pop(0)
            others = [i for i in range(len(models)) if i != first]
            further = rng.choice(others, bases(state["budgets"][client], self.base_width) - 1, replace=False).tolist()
            jobs += [self._job(client, i, models[i]) for i in (first, *further)]
        results = yield jobs
        trained = [Results(r for r in results if r.tag == _tag(i)) for i in range(len(models))]
        after = [own.mean("examples") if own else model for own, model in zip(trained, models, strict=True)]
        return state | {"bases": after, "order": order}

    def serve(self, state: State, participant: int, width: float | None = None) -> list[Served]:
        if width is None:
            width = 1.0 if participant == SERVER else state["budgets"][participant]
        first = state["bases"][: bases(width, self.base_width)]
        return [Served(model, 1.0, self.base_width, _tag(i)) for i, model in enumerate(first)]

    def _job(self, client: int, number: int, model: Model) -> Job:
        loss = masked_cross_entropy if self.masked_loss else None
        return Job(client, model, width=self.base_width, tag=_tag(number), loss=loss)


def bases(width: float, base_width: float) -> int:
    """How many bases of a width fit into another: floor(R / r), safe against rounding errors of the quotient."""
    return math.floor(width / base_width + 1e-6)


def _tag(number: int) -> str:
    # The first base of a federation with only one is its ordinary model, in every stream of random numbers too.
    return f"base {number}" if number else ""


def _rescaled(params: Params, factor: float) -> Params:
    inner = [name for name, tensor in params.items() if tensor.dim() > 1 and name.endswith("weight")][1:]
    return {name: tensor * factor if name in inner else tensor for name, tensor in params.items()}
