"""DARE: drop and rescale. Yu, Yu, Yu, Huang, Li, ICML 2024, arXiv 2311.03099."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl.build import NonNegativeInt, Range
from hybridfl.merging.task_arithmetic import Scale, moved, task_vectors
from hybridfl.params import Layout, Params
from hybridfl.rng import stream

DropRate = Annotated[float, Range(low=0, below=1)]


def dare(
    base: Params,
    models: Sequence[Params],
    weights: Sequence[float] | None = None,
    drop: DropRate = 0.5,
    scale: Scale = 1.0,
    seed: NonNegativeInt = 0,
) -> Params:
    """Task arithmetic on updates thinned at random: ``θ = θ₀ + λ Σ wₖ mₖ ⊙ τₖ / (1 - p)``, mₖ ~ Bernoulli(1 - p).

    Dropped coordinates are 0 and the others rescaled, so that the expectation of an update stays.

    Args:
        base: θ₀, what all models were trained from.
        weights: as in :func:`~hybridfl.merging.task_arithmetic.task_arithmetic`.
        drop: p. The paper goes to 0.9 and beyond for fine-tuned language models, whose updates are small.
        scale: λ.
        seed: with the place of the model, it decides what is dropped.

    Raises:
        ValueError: as many weights as models are needed.
    """
    layout = Layout.of(base)
    thinned = [
        layout.unflatten(_thinned(P.flatten(vector), drop, stream(seed, "drop and rescale", k)))
        for k, vector in enumerate(task_vectors(base, models))
    ]
    return moved(base, thinned, weights, scale)


def _thinned(vector: Tensor, drop: float, rng: np.random.Generator) -> Tensor:
    kept = torch.from_numpy(rng.random(len(vector)) >= drop).to(vector.device)
    return torch.where(kept, vector / (1 - drop), 0.0)
