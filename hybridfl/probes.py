"""Statistics on request: what a job may report about a model on its participant's examples.

A probe reads a :class:`~hybridfl.types.ProbeInput` (the net in evaluation mode) and returns a tensor or a dict of them.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridfl.params import Params
from hybridfl.types import Batch, ProbeInput


def mean_loss(seen: ProbeInput) -> Tensor:
    """The job's own loss over the whole view, 0-d."""
    params = seen.to_params(seen.theta)
    with torch.no_grad():
        losses = [seen.loss(seen.apply, seen.theta, params, b, seen.ctx) * len(b.y) for b in seen.batches]
    return torch.stack(losses).sum() / _examples(seen)


def logits(seen: ProbeInput) -> Tensor:
    """Logits of every example of the view in order, ``(n, classes)``; labels are not read."""
    params = seen.to_params(seen.theta)
    with torch.no_grad():
        return torch.cat([seen.apply(params, batch.x) for batch in seen.batches])


def gradient(seen: ProbeInput) -> Params:
    """Gradient of the job's mean loss with respect to θ over the whole view; 0 for what the loss does not use."""
    theta = {name: t.detach().requires_grad_() for name, t in seen.theta.items()}
    total = {name: torch.zeros_like(t) for name, t in theta.items()}
    for batch in seen.batches:
        loss = seen.loss(seen.apply, theta, seen.to_params(theta), batch, seen.ctx)
        share = len(batch.y) / _examples(seen)
        grads = torch.autograd.grad(loss * share, list(theta.values()), materialize_grads=True)
        for name, grad in zip(theta, grads, strict=True):
            total[name] += grad
    return total


def gauss_newton(seen: ProbeInput) -> dict[str, Tensor]:
    """Gradient and Gauss–Newton matrix of the mean loss in the coordinates ``θ["c"]``, flattened to length p.

    The map θ → params must be affine in ``c``. With J the Jacobian of an example's logits and S the softmax curvature
    ``diag(q) − q qᵀ``, the matrix is the mean of ``Jᵀ S J`` (Schraudolph 2002): exact curvature of the loss for a net
    that is linear along the coordinates.

    Returns:
        ``gradient`` ``(p,)`` and ``matrix`` ``(p, p)``.
    """
    theta = {name: t.detach() for name, t in seen.theta.items()}
    origin = {name: t.detach() for name, t in seen.to_params(theta).items()}
    directions = [_direction(seen, theta, origin, i) for i in range(theta["c"].numel())]
    matrix = theta["c"].new_zeros(len(directions), len(directions))
    for batch in seen.batches:
        jacobian = torch.stack([_slope(seen, origin, direction, batch) for direction in directions], dim=-1)
        with torch.no_grad():
            q = F.softmax(seen.apply(origin, batch.x), dim=-1)
            centred = jacobian - (q.unsqueeze(-1) * jacobian).sum(1, keepdim=True)
            matrix += torch.einsum("nc,nci,ncj->ij", q, centred, centred)
    return {"gradient": gradient(seen)["c"].reshape(-1), "matrix": matrix / _examples(seen)}


def _direction(seen: ProbeInput, theta: Params, origin: Params, i: int) -> Params:
    moved = theta["c"].clone()
    moved.view(-1)[i] += 1.0
    with torch.no_grad():
        ahead = seen.to_params(theta | {"c": moved})
    return {name: tensor - origin[name] for name, tensor in ahead.items()}


def _slope(seen: ProbeInput, origin: Params, direction: Params, batch: Batch) -> Tensor:
    with warnings.catch_warnings():
        # On its first use torch's forward mode warns of a deprecated function that it calls itself.
        warnings.simplefilter("ignore", DeprecationWarning)
        slope: Tensor = torch.func.jvp(lambda params: seen.apply(params, batch.x), (origin,), (direction,))[1]
    return slope.detach()


def _examples(seen: ProbeInput) -> int:
    return sum(len(batch.y) for batch in seen.batches)
