"""What merging functions ask beside the models, by the names of their arguments: a config's net and training examples,
and what the models' statistics on them are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from hybridfl.federation import Federation
from hybridfl.local import Task, predict, run_task
from hybridfl.merging.rebasin import fitted
from hybridfl.params import Params
from hybridfl.probes import DiagonalFisher, Gram
from hybridfl.rng import stream
from hybridfl.types import SERVER, Job, Probe


@dataclass(frozen=True, eq=False)
class Measured:
    """Statistics of models on training examples of a federation, pooled over their owners.

    Attributes:
        models: parameters and buffers of the federation's net by name.
        most: at most so many examples are looked at.
    """

    federation: Federation
    models: Sequence[Params]
    most: int

    @property
    def net(self) -> nn.Module:
        return self.federation.net

    @property
    def example(self) -> Tensor:
        return self.examples[:2]

    @property
    def examples(self) -> Tensor:
        return self.federation.bench.x[self._rows]

    @property
    def grams(self) -> list[Params]:
        return [self._of(model, Gram()) for model in self.models]

    @property
    def fishers(self) -> list[Params]:
        return [self._of(model, DiagonalFisher()) for model in self.models]

    @property
    def score(self) -> Callable[[Params], float]:
        """A model's accuracy; counters, which no merge has, are the first model's."""
        y = self.federation.bench.y[self._rows]

        def accuracy(model: Params) -> float:
            whole = fitted(self.net, {**self.models[0], **model})
            logits = predict(self.net, whole, self.examples, self.federation.chunk)
            return float((logits.argmax(1) == y).double().mean())

        return accuracy

    @cached_property
    def _rows(self) -> Tensor:
        # Examples of other data sets, which only the server has, come after the training part.
        known = (self.federation.bench.y[: len(self.federation.dataset.train)] >= 0).nonzero().squeeze(1)
        order = stream(self.federation.seed, "examples of merging").permutation(len(known))[: self.most]
        return known[torch.from_numpy(order).to(known.device)]

    def _of(self, model: Params, probe: Probe) -> Params:
        """As a participant of a run would measure it that owns these examples."""
        job = Job(SERVER, fitted(self.net, model), steps=0, probes={"found": probe})
        task = Task(job, self.federation.work, 0, self._rows, 0, 1, self.federation.seed, ("merging",))
        found: Params = run_task(self.federation.bench, task).result.probes["found"]
        return {name: tensor.cpu().double() for name, tensor in found.items()}
