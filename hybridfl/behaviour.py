"""What clients get wrong: noise in their examples, and attacks.

Examples are spoilt once, before the first round, those for validation like those for training: they are what the client
holds. A result is spoilt after the client's honest work, on its way to the server.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl.data.dataset import IntArray
from hybridfl.params import Layout
from hybridfl.types import Model, Result

Role = Literal["held_out", "noisy_labels", "flipped_labels", "noisy_inputs", "random_updates"]
SHARES: Final[tuple[Role, ...]] = ("noisy_labels", "flipped_labels", "noisy_inputs", "random_updates")
"""Roles given to a share of the clients, named as the options, in the order in which they are dealt out."""

SPOILT: Final[tuple[Role, ...]] = ("noisy_labels", "flipped_labels", "noisy_inputs")
"""Roles of clients whose examples are changed."""


def spoil(
    role: Role, x: Tensor, y: IntArray, owned: IntArray, classes: int, input_noise: float, rng: np.random.Generator
) -> None:
    """Change a client's examples in place.

    ``noisy_labels`` are uniform over all classes; ``flipped_labels`` are classes - 1 - y (Tolpegin, Truex, Gursoy, Liu
    2020, arXiv 2007.08432; Fang, Cao, Jia, Gong 2020, arXiv 1911.11815); ``noisy_inputs`` get Gaussian noise that is drawn
    once for each example. Clients with another role keep theirs.

    Args:
        x: the pool's inputs ``(N, …)``, standardised. y: its labels ``(N,)``.
        owned: positions of the client's examples ``(n,)``.
        input_noise: standard deviation of the noise on inputs.
        rng: the client's own stream.
    """
    if role == "noisy_labels":
        y[owned] = rng.integers(classes, size=len(owned))
    elif role == "flipped_labels":
        y[owned] = classes - 1 - y[owned]
    elif role == "noisy_inputs":
        noise = torch.from_numpy(input_noise * rng.standard_normal((len(owned), *x.shape[1:])))
        x[torch.from_numpy(owned).to(x.device)] += noise.to(x.device, x.dtype)


def random_update(result: Result, scale: float, rng: np.random.Generator) -> Result:
    """The result with noise for an update: Gaussian, ``scale`` times as long as the honest one; buffers stay honest.

    The Gaussian attack (Blanchard, El Mhamdi, Guerraoui, Stainer 2017, arXiv 1703.02757; Fang, Cao, Jia, Gong 2020,
    arXiv 1911.11815), with a length tied to that of the honest update so that ``scale=1`` passes any bound on norms.
    """
    honest = P.flatten(result.delta)
    noise = torch.from_numpy(rng.standard_normal(len(honest))).to(honest.device, honest.dtype)
    noise *= scale * honest.norm() / noise.norm()
    update = Layout.of(result.start.params).unflatten(noise)
    return replace(result, model=Model(P.add(result.start.params, update), result.model.buffers))
