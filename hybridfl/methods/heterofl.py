"""HeteroFL. Diao, Ding, Tarokh, ICLR 2021, arXiv 2010.01264; and its slimmable variant of Split-Mix's experiments.

One net, of which a client trains the slice its device can run. HeteroFL's scaler, which divides the outputs of layers by
their width during training, is left out: before a normalisation by the batch or by groups it has no effect.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from hybridfl.build import Range
from hybridfl.errors import ConfigError
from hybridfl.federation import Federation
from hybridfl.local import cross_entropy
from hybridfl.merging.slices import overlap_mean, sliced
from hybridfl.methods.base import Facts
from hybridfl.methods.split_mix import masked_cross_entropy
from hybridfl.params import Params
from hybridfl.types import SERVER, Apply, Batch, Job, Model, Results, Round, Served, State

Width = Annotated[float, Range(above=0, high=1)]


class HeteroFL(Facts):
    """Slices of nested widths: clients train the slice of their budget, entries are averaged over those who have them.

    Args:
        serve_widths: widths that are evaluated beside each client's own.
        masked_loss: logits of classes that a batch does not have are 0; the paper's are those that the client lacks.
    """

    def __init__(self, serve_widths: tuple[Width, ...] = (0.125, 0.25, 0.5, 1.0), masked_loss: bool = False) -> None:
        self.widths, self.masked_loss = tuple(serve_widths), masked_loss

    def init(self, federation: Federation) -> State:
        model, shapes = federation.fresh_model(), {}
        for width in sorted({*federation.widths, *self.widths, 1.0}):
            net = federation.net_at(width)
            shapes[_key(width)] = {n: list(t.shape) for n, t in (*net.named_parameters(), *net.named_buffers())}
            if shapes[_key(width)].keys() != {*model.params, *model.buffers}:
                raise ConfigError("serve_widths", f"the model has other tensors at width {width:g}.")
        return {"global": model, "shapes": shapes, "budgets": list(federation.widths)}

    def round(self, state: State, now: Round) -> Generator[list[Job], Results, State]:
        results = yield [self._job(state, client) for client in now.clients]
        weights = [result.examples * self._copies(state, result.participant) for result in results]
        model = state["global"]
        params = overlap_mean(model.params, [result.model.params for result in results], weights)
        buffers = overlap_mean(model.buffers, [result.model.buffers for result in results], weights)
        return state | {"global": Model(params, buffers)}

    def serve(self, state: State, participant: int, width: float | None = None) -> list[Served]:
        if width is None:
            width = 1.0 if participant == SERVER else state["budgets"][participant]
        return [Served(_narrow(state, width), 1.0, width)]

    def _job(self, state: State, client: int) -> Job:
        budget = state["budgets"][client]
        loss = masked_cross_entropy if self.masked_loss else None
        return Job(client, _narrow(state, budget), width=budget, loss=loss)

    def _copies(self, state: State, client: int) -> int:
        """How often a client's part counts in the mean."""
        return 1


class SlimmableHeteroFL(HeteroFL):
    """HeteroFL whose clients train every narrower width of the federation within their slice too, in one step.

    The loss is the sum of the cross-entropies at all widths up to the budget (Yu et al. 2019, arXiv 1812.08928); Split-Mix
    compares itself with it as SHeteroFL.

    Args:
        duplicate_weights: count a client once for each width it trains, as the official code of Split-Mix does, seemingly
            by mistake. Other options as in :class:`HeteroFL`.
    """

    def __init__(
        self,
        serve_widths: tuple[Width, ...] = (0.125, 0.25, 0.5, 1.0),
        masked_loss: bool = False,
        duplicate_weights: bool = False,
    ) -> None:
        super().__init__(serve_widths, masked_loss)
        self.duplicate_weights = duplicate_weights

    def init(self, federation: Federation) -> State:
        state, policy = super().init(federation), federation.model_options.batch_norm
        narrow = state["shapes"][_key(min(federation.widths))]
        shared = any(list(t.shape) != narrow[name] for name, t in state["global"].buffers.items())
        if shared and policy in ("average", "local"):
            # Yu et al. 2019, section 3.3
            problem = f"got {policy}: several widths trained together cannot share running statistics"
            raise ConfigError("model.batch_norm", f"{problem}; nearest valid choice: batch (or reestimate).")
        return state

    def _job(self, state: State, client: int) -> Job:
        budget = state["budgets"][client]
        inner = _up_to(state, budget)
        shapes = [state["shapes"][_key(width)] for width in inner]
        ctx = {"widths": inner, "shapes": shapes, "masked": self.masked_loss}
        model = _narrow(state, budget)
        return Job(client, model, width=budget, loss=slimmable_loss, ctx=ctx, inner_widths=tuple(inner))

    def _copies(self, state: State, client: int) -> int:
        return len(_up_to(state, state["budgets"][client])) if self.duplicate_weights else 1


def slimmable_loss(apply: Apply, theta: Params, params: Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
    """Sum over the widths in ``ctx`` of the loss of the slice of that width."""
    rule = masked_cross_entropy if ctx["masked"] else cross_entropy
    losses = [
        rule(partial(apply, width=width), theta, sliced(params, shapes), batch, ctx)
        for width, shapes in zip(ctx["widths"], ctx["shapes"], strict=True)
    ]
    return torch.stack(losses).sum()


def _narrow(state: State, width: float) -> Model:
    shapes = state["shapes"][_key(width)]
    return Model(*(sliced(part, {name: shapes[name] for name in part}) for part in state["global"]))


def _up_to(state: State, budget: float) -> list[float]:
    """Widths of the federation's clients that a budget can run, the narrowest first."""
    return sorted({width for width in state["budgets"] if width <= budget})


def _key(width: float) -> str:
    return f"{width:.6g}"
