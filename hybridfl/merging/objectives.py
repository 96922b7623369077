"""What a merge is searched for: losses on the server's examples as functions of the merged net.

Cross-entropy is for a server in the clients' domain. The surrogates for a server out of domain are inferred (the paper
names one without showing its form): ``kd`` distils the mean prediction of the clients (Lin et al. 2020,
arXiv 2006.07242), ``entropy`` is AdaMerging's (Yang et al. 2024, arXiv 2310.02575) with a term against collapse,
``gradmatch`` asks that the merged step points down the server's gradient in the layers before the head (no paper).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridfl.parametrization import AtlasSpan
from hybridfl.params import Params
from hybridfl.types import Apply, Batch

Objective = Literal["ce", "kd", "head", "entropy", "mix", "gradmatch"]
NEEDS_LABELS: frozenset[str] = frozenset({"ce", "head", "mix", "gradmatch"})
NEEDS_TEACHER: frozenset[str] = frozenset({"kd", "mix"})


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence from the teacher's prediction to the net's, mean over the batch; logits ``(b, classes)`` both."""
    divergence: Tensor = F.kl_div(
        F.log_softmax(logits, 1), F.log_softmax(teacher, 1), reduction="batchmean", log_target=True
    )
    return divergence


def confident_and_diverse(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions minus entropy of the mean prediction; labels are not used."""
    log_q = F.log_softmax(logits, 1)
    each = -(log_q.exp() * log_q).sum(1).mean()
    # In logarithms: a class that nobody predicts has probability 0, where the slope of x log x is infinite.
    log_mean = log_q.logsumexp(0) - math.log(len(logits))
    spread: Tensor = (log_mean.exp() * log_mean).sum()
    return each + spread


def misdirection(params: Params, omega: Params, downhill: Params) -> Tensor:
    """One minus the cosine between the step from ``omega`` to ``params`` and ``downhill``, in the tensors that the last has."""
    step = torch.cat([(params[name] - omega[name]).reshape(-1) for name in downhill])
    return 1 - F.cosine_similarity(step, torch.cat([tensor.reshape(-1) for tensor in downhill.values()]), dim=0)


@dataclass(frozen=True)
class ServerLoss:
    """The objective of a net on the server's examples.

    Reads from ctx, for kd and mix: ``teacher`` ``(n, classes)``, logits of the view's examples in order; ``ce_weight``,
    cross-entropy's share of mix, a half if it is not there. For gradmatch, where the net does not run: ``omega`` and
    ``downhill``, as in :func:`misdirection`.
    """

    objective: Objective

    def __call__(self, apply: Apply, theta: Params, params: Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
        if self.objective == "gradmatch":
            return misdirection(params, ctx["omega"], ctx["downhill"])
        return self.value(apply(params, batch.x), batch, ctx)

    def value(self, logits: Tensor, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
        if self.objective == "entropy":
            return confident_and_diverse(logits)
        if self.objective == "kd":
            return distillation(logits, ctx["teacher"][batch.positions])
        labelled: Tensor = F.cross_entropy(logits, batch.y)
        if self.objective == "mix":
            share = ctx.get("ce_weight", 0.5)
            mixed: Tensor = share * labelled + (1 - share) * distillation(logits, ctx["teacher"][batch.positions])
            return mixed
        return labelled


@dataclass(frozen=True)
class SearchLoss(ServerLoss):
    """``objective(W(c)) + prox ‖c - c_default‖²``, the norm's square averaged over blocks.

    Reads from ctx, beside the teacher: ``default`` ``(K, G)``, ``prox``, ``span_frozen`` (the span's frozen tensors).
    """

    span: AtlasSpan

    def __call__(self, apply: Apply, theta: Params, params: Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
        loss = super().__call__(apply, theta, params, batch, ctx)
        if ctx["prox"]:
            distance = self.span.coefficients(theta, ctx["span_frozen"]) - ctx["default"]
            loss = loss + ctx["prox"] * distance.square().sum(0).mean()
        return loss


def disagreement(apply: Apply, theta: Params, params: Params, batch: Batch, ctx: Mapping[str, Any]) -> Tensor:
    """Share of a batch whose label is not what the teacher predicts; the net does not run.

    Reads from ctx: ``teacher``, as :class:`ServerLoss` does.
    """
    teacher: Tensor = ctx["teacher"][batch.positions]
    return (teacher.argmax(1) != batch.y).to(teacher.dtype).mean()
