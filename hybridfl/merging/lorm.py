"""LoRM's closed forms. Salami, Buzzega, Mosconi, Bonato, Sabetta, Calderara, ICLR 2025, arXiv 2410.17961.

The paper was at hand as an abstract only; the formulas are those of the authors' code. The objective is RegMean's,
``Σ ‖W Xₖ - Wₖ Xₖ‖²`` with ``Wₖ = W₀ + Bₖ Aₖ``: free factors have no unique minimiser, one factor that all clients share makes it
unique. Where the inputs leave a minimiser open, the code takes the one of least norm, here it is the one nearest to the
weighted mean of the clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from hybridfl import params as P
from hybridfl.merging.regmean import nearest_layer, over, times

TaskMerge = Literal["regmean", "mean", "sum"]


def merged_layer(layers: Sequence[Tensor], grams: Sequence[Tensor], start: Tensor, weights: Sequence[float]) -> Tensor:
    """``W* = (Σ Wₖ Gₖ) (Σ Gₖ)⁺``: of A where the clients share B (which then has no part in it), and of the head.

    Rows that no client has changed stay the same to the bit.

    Args:
        layers: Wₖ, ``(out, in)``; all trained from ``start``.
        grams: Gₖ of the layer's inputs, ``(in, in)`` or diagonals ``(in,)``; their type is that of the solution.
        weights: of the mean that directions without input keep.
    """
    moves = [(layer - start).to(grams[0]) for layer in layers]
    mean = P.mean([{"": move} for move in moves], weights)[""]
    return start + nearest_layer(moves, grams, mean).to(start)


def merged_b(
    factors: Sequence[Tensor], a: Tensor, grams: Sequence[Tensor], start: Tensor, weights: Sequence[float]
) -> Tensor:
    """``B* = (Σ Bₖ A Gₖ) Aᵀ (A (Σ Gₖ) Aᵀ)⁺`` where the clients share A: the layer B on the inputs A x, ``(out, r)``.

    Args:
        factors: Bₖ, ``(out, r)``; all trained from ``start``.
        a: A, ``(r, in)``.
        grams, weights: as in :func:`merged_layer`.
    """
    a = a.to(grams[0])
    return merged_layer(factors, [times(a, gram) @ a.T for gram in grams], start, weights)


class Memory(NamedTuple):
    """What is kept of a layer's finished tasks, as much as of one of them.

    Attributes:
        tasks: how many.
        residuals: Σ ΔW, ``(out, in)``, with ΔW = B A of a task.
        pulled: Σ ΔW G; ``None`` without Grams.
        gram: Σ G, of the tasks' inputs, ``(in, in)`` or a diagonal ``(in,)``.
    """

    tasks: int
    residuals: Tensor
    pulled: Tensor | None
    gram: Tensor | None


def remembered(memory: Memory | None, residual: Tensor, gram: Tensor | None) -> Memory:
    """The memory with one more task in it."""
    pulled = None if gram is None else times(residual, gram)
    if memory is None:
        return Memory(1, residual, pulled, gram)
    return Memory(memory.tasks + 1, memory.residuals + residual, _plus(memory.pulled, pulled), _plus(memory.gram, gram))


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b


def merged_tasks(memory: Memory, how: TaskMerge = "regmean") -> Tensor:
    """The update of all tasks, ``(out, in)``: ``(Σ ΔW G) (Σ G)⁺``, or their mean or sum.

    Of one task it is ΔW in every way; of a layer without Grams the mean.
    """
    if how == "sum":
        return memory.residuals
    mean = memory.residuals / memory.tasks
    if how == "mean" or memory.tasks == 1 or memory.pulled is None or memory.gram is None:
        return mean
    return mean + over(memory.pulled - times(mean, memory.gram), memory.gram)
