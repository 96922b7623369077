"""Scores of models on a fixed set of examples: each distinct model is run over it once and scored by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridfl.federation import Federation
from hybridfl.local import only, predict
from hybridfl.rng import stream
from hybridfl.types import Served

Index = np.ndarray | slice


@dataclass(frozen=True, eq=False)
class Scored:
    """Right or wrong, and loss, of every example of a set, both ``(n,)``."""

    correct: np.ndarray
    loss: np.ndarray

    def at(self, index: Index) -> tuple[float, float]:
        """Mean accuracy and loss at these positions."""
        return float(self.correct[index].mean()), float(self.loss[index].mean())


class ScoredSet:
    """A set of examples and the scores of the models that were run over it.

    Args:
        x: ``(n, …)`` standardised inputs. y: ``(n,)`` labels.
        classes: the only ones that can be predicted; ``None`` is all.
    """

    def __init__(self, federation: Federation, x: Tensor, y: Tensor, classes: Sequence[int] | None = None) -> None:
        self.federation, self.x, self.y = federation, x, y
        self.classes = None if classes is None else torch.tensor(classes, device=x.device)
        self.size = len(y)
        # With statistics of the batch an example's logits depend on the others: those it is deployed among.
        self.transductive = federation.model_options.batch_norm == "batch"
        self._whole: dict[tuple[Any, ...], Scored] = {}
        # Identities are addresses: keeping what was scored alive keeps them unique.
        self._kept: list[list[Served]] = []

    def scored(self, ensemble: list[Served]) -> Scored:
        """Scores by position, computed once for each distinct model."""
        key = identity(ensemble)
        if key not in self._whole:
            self._whole[key] = self._shuffled(ensemble) if self.transductive else self._run(ensemble, self.x, self.y)
            self._kept.append(ensemble)
        return self._whole[key]

    def some(self, ensemble: list[Served], index: np.ndarray, alone: bool) -> Scored:
        """Scores at these positions; with ``alone`` no other position is run."""
        if self.transductive or (alone and identity(ensemble) not in self._whole):
            rows = torch.from_numpy(index).to(self.x.device)
            return self._run(ensemble, self.x[rows], self.y[rows])
        whole = self.scored(ensemble)
        return Scored(whole.correct[index], whole.loss[index])

    def count(self, index: Index) -> int:
        return self.size if isinstance(index, slice) else len(index)

    def _shuffled(self, ensemble: Sequence[Served]) -> Scored:
        """Scores of all examples in random batches; in their own order a batch may be of one class."""
        order = torch.from_numpy(stream(self.federation.seed, "test batches", self.size).permutation(self.size))
        found = self._run(ensemble, self.x[order.to(self.x.device)], self.y[order.to(self.x.device)])
        back = np.argsort(order.numpy())
        return Scored(found.correct[back], found.loss[back])

    def _run(self, ensemble: Sequence[Served], x: Tensor, y: Tensor) -> Scored:
        total = sum(served.weight for served in ensemble)
        mixed = torch.zeros((), device=x.device, dtype=x.dtype)
        chunk = self.federation.chunk
        # With statistics of the batch a short last one would be scored by those of a few examples.
        parts = x.tensor_split(-(-len(x) // chunk)) if self.transductive else x.split(chunk)
        for served in ensemble:
            net = self.federation.net_at(served.width)
            logits = torch.cat([predict(net, served.model, part, len(part)) for part in parts])
            mixed = mixed + logits * (served.weight / total)
        if self.classes is not None:
            mixed = only(mixed, self.classes)
        correct = (mixed.argmax(1) == y).double()
        loss = F.cross_entropy(mixed.double(), y, reduction="none")
        return Scored(correct.cpu().numpy(), loss.cpu().numpy())


def identity(ensemble: Sequence[Served]) -> tuple[Any, ...]:
    """Equal for ensembles of the same tensors."""
    # Of the tensors, not of the dicts that hold them: a checkpoint keeps shared tensors shared, but not the dicts, and
    # a run that continues must find the same models distinct.
    return tuple(
        (*(tensor.data_ptr() for part in served.model for tensor in part.values()), served.weight, served.width)
        for served in ensemble
    )


def size(federation: Federation, ensemble: Sequence[Served]) -> tuple[int, int]:
    """Parameters of an ensemble, and multiply–accumulates of a forward pass of one example."""
    parameters = sum(tensor.numel() for served in ensemble for tensor in served.model.params.values())
    return parameters, sum(federation.macs_at(served.width) for served in ensemble)
