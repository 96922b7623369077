"""What is trained is θ; what runs is ``parametrization(θ, frozen)``.

Every map is a pure function (or a frozen dataclass of plain numbers that is called like one): tensors it needs beside θ
travel in ``frozen``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridfl.params import Layout, Params

Constraint = Literal["affine", "free", "nonneg", "simplex", "box"]
Segment = tuple[int, int, int]
PIECE = 2**17
"""Numbers that stay in a core's cache while all anchors are added to them, or multiplied with them."""
COORDINATES = ("c", "axis", "residual")
"""Entries of θ that say where a merged model lies; all others are parameters of the net."""


class Parametrization(Protocol):
    """The map θ → params. One that costs multiply–accumulates also has ``macs(frozen)``, those of one application."""

    def __call__(self, theta: Params, frozen: Mapping[str, Any], /) -> Params: ...


def full(theta: Params, frozen: Mapping[str, Any]) -> Params:
    """Every parameter is trained."""
    return theta


def project(u: Tensor, constraint: Constraint, total: Tensor, c_max: float) -> Tensor:
    """Unconstrained coordinates → coefficients that obey the constraint, Euclidean projection along the anchors.

    Args:
        u: ``(K, G)``, G = 1 (one coefficient an anchor) or the number of blocks.
        constraint: ``affine`` keeps each column's sum at ``total``; ``simplex`` also keeps every entry ≥ 0; ``nonneg``
            and ``box`` (``|c| ≤ c_max``) bound entries only; ``free`` leaves ``u``.
        total: required sum over the anchors, 0-d.

    For ``affine`` the gradient is the projected one, so an optimiser on ``u`` moves ``c`` by its own step minus the
    step's mean. The others pass the gradient straight through (dual averaging): at a bound the true gradient would be
    zero and an entry that starts there, such as an old anchor's 0, could never leave it.
    """
    if constraint == "free":
        return u
    if constraint == "affine":
        return u + (total - u.sum(0)) / u.shape[0]
    with torch.no_grad():
        if constraint == "nonneg":
            inside = u.clamp_min(0)
        elif constraint == "box":
            inside = u.clamp(-c_max, c_max)
        else:
            inside = _onto_simplex(u, total)
    # Not u + (inside - u), which misses the bounds by a rounding error.
    return inside + (u - u.detach())


def _onto_simplex(u: Tensor, total: Tensor) -> Tensor:
    # Held, Wolfe, Crowder 1974: shift all entries by the one threshold that leaves the positive part with the sum.
    ordered = u.sort(dim=0, descending=True).values
    excess = ordered.cumsum(0) - total
    counts = torch.arange(1, u.shape[0] + 1, dtype=u.dtype, device=u.device).unsqueeze(1)
    support = (ordered * counts > excess).sum(0, keepdim=True).clamp_min(1)
    threshold = excess.gather(0, support - 1) / support
    return (u - threshold).clamp_min(0)


class _Span(torch.autograd.Function):
    """W = origin + Σ cₖ aₖ + z in one buffer; the gradient of c is K inner products with that of W, which is z's own.

    Anchors may be kept in a shorter type than W's; each is widened piece by piece. The outputs are W's tensors, views of the
    buffer. Their gradients are put together there, as all that read W has gone backward by then: so the gradient is taken once,
    and there are K + 3 copies of the weights at most.
    """

    @staticmethod
    def forward(
        ctx: Any,
        c: Tensor,
        origin: Tensor,
        residual: Tensor | None,
        segments: Sequence[Segment],
        layout: Layout,
        *anchors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*anchors)
        ctx.set_materialize_grads(False)
        merged = origin.clone() if residual is None else origin + residual
        # 0-d tensors, not Python numbers: no synchronisation on a GPU.
        factors = [column.unbind() for column in c.unbind(1)]
        for start, end, block in _pieces(segments, merged):
            piece = merged[start:end]
            for factor, anchor in zip(factors[block], anchors, strict=True):
                piece.addcmul_(anchor[start:end].to(piece.dtype), factor)
        ctx.segments, ctx.layout, ctx.shape, ctx.shifted = segments, layout, c.shape, residual is not None
        ctx.buffer = merged
        return tuple(layout.unflatten(merged).values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g, anchors = ctx.buffer, ctx.saved_tensors
        for place, grad in zip(ctx.layout.unflatten(g).values(), grads, strict=True):
            place.zero_() if grad is None else place.copy_(grad)
        gradient = g.new_zeros(ctx.shape)
        for start, end, block in _pieces(ctx.segments, g):
            piece = g[start:end]
            products = [torch.dot(anchor[start:end].to(piece.dtype), piece) for anchor in anchors]
            gradient[:, block] += torch.stack(products)
        return gradient, None, g if ctx.shifted else None, None, None, *(None for _ in anchors)


def _pieces(segments: Sequence[Segment], vector: Tensor) -> Iterator[Segment]:
    """On a CPU the segments cut up, so that the vector is read from memory once and not once for each anchor."""
    for start, end, block in segments:
        size = PIECE if vector.device.type == "cpu" else max(1, end - start)
        for begin in range(start, end, size):
            yield begin, min(begin + size, end), block


@dataclass(frozen=True)
class AtlasSpan:
    """Signed coordinates over a model atlas: ``W = ω + Σₖ cₖ sₖ aₖ`` with ``c = project(θ["c"])``.

    Frozen tensors: ``origin`` ω as a flat vector ``(d,)``; ``anchors``, a list of K flat vectors; ``scales`` s, ``(K, 1)``
    or ``(K, blocks)``; ``total``, the sum that affine coefficients keep, 0-d; ``axis`` ``(d,)``, one more axis, if θ has a
    coordinate for it.

    θ may also have ``residual`` z ``(d,)``, which is added, and ``axis`` ``(1, 1)``, a coefficient ≥ 0 outside the sum.
    Entries other than these replace the parameter of the same name (a head the server trains along).

    Attributes:
        layout: of ω.
        segments: ``(start, end, block)``, which piece of the flat vector takes which column of c · s; with one column
            it is one piece of block 0.
    """

    layout: Layout
    segments: tuple[Segment, ...]
    constraint: Constraint = "affine"
    c_max: float = 1.0

    def macs(self, frozen: Mapping[str, Any]) -> int:
        """Multiply–accumulates of one application; its gradient takes as many."""
        return (len(frozen["anchors"]) + ("axis" in frozen)) * int(frozen["origin"].numel())

    def coefficients(self, theta: Params, frozen: Mapping[str, Any]) -> Tensor:
        """The coefficients c, ``(K, 1)`` or ``(K, blocks)``, without the scales."""
        return project(theta["c"], self.constraint, frozen["total"], self.c_max)

    def __call__(self, theta: Params, frozen: Mapping[str, Any]) -> Params:
        c, anchors = self.coefficients(theta, frozen) * frozen["scales"], frozen["anchors"]
        if "axis" in theta:
            own = project(theta["axis"], "nonneg", frozen["total"], self.c_max)
            c, anchors = torch.cat([c, own.expand(1, c.shape[1])]), [*anchors, frozen["axis"]]
        fixed = (frozen["origin"], theta.get("residual"), self.segments, self.layout)
        merged = _Span.apply(c, *fixed, *anchors)  # type: ignore[no-untyped-call]
        return dict(zip(self.layout.names, merged, strict=True)) | {
            name: t for name, t in theta.items() if name not in COORDINATES
        }


@dataclass(frozen=True)
class Shift:
    """``W = ω + z`` with z = θ["residual"] and ω the frozen ``origin``, flat vectors ``(d,)``; no other coordinates.

    Other entries of θ replace the parameter of the same name.
    """

    layout: Layout

    def __call__(self, theta: Params, frozen: Mapping[str, Any]) -> Params:
        params = self.layout.unflatten(frozen["origin"] + theta["residual"])
        return params | {name: t for name, t in theta.items() if name not in COORDINATES}
