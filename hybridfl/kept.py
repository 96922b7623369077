"""Tensors that a participant keeps to itself from round to round: those of BatchNorm layers under ``batch_norm=local``.

Li, Jiang, Zhang, Kamp, Dou 2021 (FedBN), arXiv 2102.07623: they are neither sent nor averaged. No method knows of it: a job
starts from the participant's own, and the result that the method sees has those of the start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from hybridfl.params import Params
from hybridfl.types import Model, Result

Kept = Mapping[str, Mapping[str, Params]]
"""Participant (a number as text) → tag of the job → tensors by name."""


def own(model: Model, kept: Kept, participant: int, tag: str) -> Model:
    """The model with the tensors that the participant has kept, if it has any.

    Of a nested net at another width than the participant trains, the entries that both widths have.
    """
    mine = kept.get(str(participant), {}).get(tag)
    if not mine:
        return model
    return Model(*({n: _over(t, mine[n]) if n in mine else t for n, t in part.items()} for part in model))


def _over(served: Tensor, mine: Tensor) -> Tensor:
    if served.shape == mine.shape:
        return mine
    both = tuple(slice(0, min(sizes)) for sizes in zip(served.shape, mine.shape, strict=True))
    out = served.clone()
    out[both] = mine[both]
    return out


def without(model: Model, names: Collection[str]) -> Model:
    """What of the model is sent: everything but these names."""
    return Model(*({name: tensor for name, tensor in part.items() if name not in names} for part in model))


def picked(model: Model, names: Collection[str]) -> Params:
    """The tensors of these names."""
    return {name: tensor for part in model for name, tensor in part.items() if name in names}


def keeping(kept: Kept, participant: int, tag: str, tensors: Params) -> Kept:
    """A new memory in which the participant has these tensors."""
    mine = {**kept.get(str(participant), {}), tag: tensors}
    return {**kept, str(participant): mine}


def as_seen(start: Model, result: Result, names: Collection[str]) -> Result:
    """The result as a method sees it: begun from ``start``, whose tensors of these names it still has."""
    before = {**start.params, **start.buffers}
    model = Model(
        *({n: before[n] if n in names and n in before else t for n, t in part.items()} for part in result.model)
    )
    return replace(result, start=start, model=model)
