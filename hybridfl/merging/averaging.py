"""How much of a global model to mix into a local one: weights by block, from estimates of variance and distance.

Grimberg, Hartley, Karimireddy, Jaggi 2021, arXiv 2110.12946, treat means of numbers and leave vectors to future work.
What is here is the extension to blocks of parameters: of a block, v is the expected squared error of the local model L
(over redrawn training data), D = ‖L - G‖² in the same metric, and the weight a is on G; see :mod:`hybridfl.theory`.

G contains the client's own data with a weight w. F3: had the others' model O the rest, G = w L + (1 - w) O, then
L - O = (L - G) / (1 - w), and the weight a on O is the weight a / (1 - w) on G.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hybridfl import params as P
from hybridfl.params import Layout, Params

Array = NDArray[np.float64]
Granularity = Literal["model", "layer"]


class Weights(NamedTuple):
    """Weights on the global model and what they were made of, one entry a block each.

    Attributes:
        a: the weight, within [0, a_max].
        bias: estimated squared bias of the others' model.
        benefit: predicted decrease of the squared error, D a (2 a* - a) of extension M1.
    """

    a: Array
    bias: Array
    benefit: Array


def plug_in(v: Array, D: Array, own: float, a_max: float = 1.0) -> Weights:
    """a = (1 - w) v / max(D, (1 - w)² v), by what a client knows alone; the error of O's own training data is neglected.

    Args:
        v, D: of one client's blocks, ``(blocks,)``.
        own: w, below 1.
    """
    return _weights(v, np.maximum(D / (1 - own) ** 2, v), v, own, a_max)


def pooled(v: Array, D: Array, sizes: Sequence[float], own: Sequence[float], a_max: float = 1.0) -> list[Weights]:
    """One variance t² between clients for all, by moments (DerSimonian, Laird 1986), and every client's weights with it.

    The others' model O of client i is the mean with shares s_j = n_j / Σ_{j≠i} n_j. Then E‖L_i - O‖² =
    v_i + Σ s_j² v_j + t² (1 + Σ s_j²), of which the means over clients give t² ≥ 0. For equal n and blocks of one number
    the weights on O are those of :func:`hybridfl.theory.pooled_weight`.

    Args:
        v, D: ``(clients, blocks)``.
        sizes: n, examples of the clients.
        own: w of the clients, each below 1.
    """
    n, w = np.asarray(sizes, dtype=np.float64), np.asarray(own, dtype=np.float64)[:, None]
    others = np.where(np.eye(len(n), dtype=bool), 0, n)
    squares = (others / np.maximum(others.sum(1, keepdims=True), 1)) ** 2
    noise = v + squares @ v
    spread = 1 + squares.sum(1, keepdims=True)
    t2 = np.maximum(0, (D / (1 - w) ** 2 - noise).mean(0)) / spread.mean()
    expected = noise + t2 * spread
    return [_weights(v[i], expected[i], noise[i], float(w[i, 0]), a_max) for i in range(len(n))]


def _weights(v: Array, expected: Array, noise: Array, own: float, a_max: float) -> Weights:
    # A block that never differs may have any weight; 0 leaves the local one.
    best = np.divide(v, expected, out=np.zeros_like(expected), where=expected > 0)
    a = np.clip(best / (1 - own), 0, a_max)
    used = (1 - own) * a
    return Weights(a, expected - noise, expected * used * (2 * best - used))


def parabola(f0: float, half: float, f1: float, a_max: float = 1.0) -> tuple[float, float]:
    """The weight at which the parabola through the losses at 0, 1/2 and 1 is least, and what it gains over 0.

    Within [0, a_max]; of a parabola that opens downwards the better end.
    """
    curvature = 2 * (f0 + f1 - 2 * half)
    slope = f1 - f0 - curvature

    def gain(a: float) -> float:
        return -(curvature * a + slope) * a

    a = min(max(-slope / (2 * curvature), 0.0), a_max) if curvature > 0 else max((0.0, a_max), key=gain)
    return a, gain(a)


def jackknife(models: Sequence[Params]) -> list[Params]:
    """Vectors of which the squared lengths, in any metric, add up to the variance of a model trained on all examples.

    The delete-a-group jackknife, (K - 1)/K Σ ‖θ_j - mean θ‖² for models trained without one of K parts each (Quenouille
    1956; Tukey 1958). With two parts it is a quarter of the squared distance of the halves' models. Exact for means and
    what is linear in them. It only asks what a few examples less would change: halves would have to have twice the
    variance, and nets that fit all their examples have nearly the same on half as many.
    """
    middle, scale = P.mean(models), (1 - 1 / len(models)) ** 0.5
    return [{name: (tensor - middle[name]) * scale for name, tensor in model.items()} for model in models]


def blocks(params: Mapping[str, torch.Tensor], granularity: Granularity) -> list[list[str]]:
    """Names of the tensors of each block: all, or those of one module (its weight and bias)."""
    layout = Layout.of(params)
    if granularity == "model":
        return [list(layout.names)]
    found: dict[int, list[str]] = {}
    for name, (_, _, block) in zip(layout.names, layout.blocks(), strict=True):
        found.setdefault(block, []).append(name)
    return list(found.values())


def squared(delta: Params, metric: Params | None, groups: Sequence[Sequence[str]]) -> Array:
    """Δ'MΔ of every block, ``(blocks,)``, for a diagonal M; ``None`` is the identity."""
    whole = {n: d.double().square() if metric is None else d.double().square() * metric[n] for n, d in delta.items()}
    return np.array([sum(float(whole[name].sum()) for name in names) for names in groups])


def mixed(local: Params, other: Params, a: Array, groups: Sequence[Sequence[str]]) -> Params:
    """(1 - a) local + a other, block by block; exactly the local one at 0 and the other at 1."""
    weight = {name: float(share) for share, names in zip(a, groups, strict=True) for name in names}
    return {name: torch.lerp(tensor, other[name], weight[name]) for name, tensor in local.items()}
