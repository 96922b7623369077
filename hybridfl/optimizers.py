"""How a participant works: its optimiser, its batches and how many.

The optimisers keep their state in plain dicts of tensors, so that it can be sent, returned and checkpointed; they are
tested to agree with ``torch.optim``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl.build import NonNegativeFloat, PositiveFloat, PositiveInt, Range
from hybridfl.errors import ConfigError
from hybridfl.params import Params
from hybridfl.schedules import Schedule

Beta = Annotated[float, Range(low=0, below=1)]


@dataclass(frozen=True, kw_only=True)
class LocalWork:
    """How much a participant works and with which optimiser; subclasses say how a step is made.

    Attributes:
        lr: learning rate in round 0, but for a schedule that warms up.
        batch_size: examples a step; a participant with fewer uses all of them.
        steps: number of steps; given, it replaces ``epochs``.
        epochs: passes over the participant's examples, the last batch of each may be short.
        lr_decay: the rate of round t is ``lr · lr_decay ** t``, times what the schedule says.
        schedule: the rate over the rounds of the run.
        weight_decay: of the optimiser.
        clip_norm: the gradient is scaled down to this Euclidean length; null leaves it.
        lr_factors: name pattern → factor on the rate of the matching entries of θ.
    """

    lr: PositiveFloat = 0.1
    batch_size: PositiveInt = 16
    steps: PositiveInt | None = None
    epochs: PositiveInt = 1
    lr_decay: Annotated[float, Range(above=0, high=1)] = 1.0
    schedule: Schedule = field(default_factory=Schedule)
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat | None = None
    lr_factors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self) is LocalWork:
            raise ConfigError("_target_", "is required: an optimiser such as hybridfl.optimizers.SGD.")

    def count(self, examples: int) -> int:
        """Steps of a participant that holds this many examples."""
        if self.steps is not None:
            return self.steps
        return self.epochs * math.ceil(examples / self.batch_size)

    @property
    def is_plain(self) -> bool:
        """Whether a step is ``θ ← (1 - lr · weight_decay) θ - lr · gradient``, and there is no state."""
        return False

    def update(self, theta: Params, grads: Params, state: dict[str, Any], lrs: Mapping[str, float]) -> None:
        """One step in place on θ and on the optimiser's state (empty before the first step)."""
        raise NotImplementedError("choose an optimiser: SGD, Adam, AdamW or NAdam")


@dataclass(frozen=True, kw_only=True)
class SGD(LocalWork):
    """Stochastic gradient descent with momentum, as ``torch.optim.SGD`` (Sutskever et al. 2013)."""

    momentum: Beta = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov", "got true with momentum 0: give a momentum, such as momentum=0.9.")

    @property
    def is_plain(self) -> bool:
        # A subclass may have a step of its own.
        return self.momentum == 0 and type(self).update is SGD.update

    def update(self, theta: Params, grads: Params, state: dict[str, Any], lrs: Mapping[str, float]) -> None:
        if self.weight_decay:
            grads = P.add(grads, theta, self.weight_decay)
        if self.momentum:
            velocity = state.setdefault("momentum", {})
            for name, grad in grads.items():
                if name in velocity:
                    velocity[name].mul_(self.momentum).add_(grad)
                else:
                    velocity[name] = grad.clone()
            grads = P.add(grads, velocity, self.momentum) if self.nesterov else velocity
        for name, tensor in theta.items():
            tensor.add_(grads[name], alpha=-lrs[name])


@dataclass(frozen=True, kw_only=True)
class Adam(LocalWork):
    """Adam (Kingma, Ba 2015, arXiv 1412.6980), as ``torch.optim.Adam``."""

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: PositiveFloat = 1e-8

    def decay(self, theta: Params, grads: Params, lrs: Mapping[str, float]) -> Params:
        return P.add(grads, theta, self.weight_decay) if self.weight_decay else grads

    def moments(self, grads: Params, state: dict[str, Any]) -> tuple[int, Params, Params]:
        """The number of this step, and the running means of gradients and of their squares with this one in them."""
        step = state["step"] = state.get("step", 0) + 1
        first, second = state.setdefault("mean", {}), state.setdefault("square", {})
        for name, grad in grads.items():
            if name not in first:
                first[name], second[name] = torch.zeros_like(grad), torch.zeros_like(grad)
            first[name].lerp_(grad, 1 - self.beta1)
            second[name].mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        return step, first, second

    def scale(self, square: Tensor, step: int) -> Tensor:
        """The root of a mean of squares, freed of its start at zero."""
        return square.sqrt().div_(math.sqrt(1 - self.beta2**step)).add_(self.eps)

    def update(self, theta: Params, grads: Params, state: dict[str, Any], lrs: Mapping[str, float]) -> None:
        grads = self.decay(theta, grads, lrs)
        step, first, second = self.moments(grads, state)
        correction = 1 - self.beta1**step
        for name, tensor in theta.items():
            tensor.addcdiv_(first[name], self.scale(second[name], step), value=-lrs[name] / correction)


@dataclass(frozen=True, kw_only=True)
class NAdam(Adam):
    """Adam with Nesterov's momentum (Dozat 2016, *Incorporating Nesterov Momentum into Adam*), as ``torch.optim.NAdam``.

    Weight decay is part of the gradient, torch's ``decoupled_weight_decay=False``.

    Attributes:
        momentum_decay: ψ; step i has the momentum ``beta1 · (1 - 0.96 ** (i ψ) / 2)``, and 0 is constant, half of beta1.
    """

    momentum_decay: NonNegativeFloat = 0.004

    def momentum(self, step: int) -> float:
        return self.beta1 * (1 - 0.5 * math.pow(0.96, step * self.momentum_decay))

    def update(self, theta: Params, grads: Params, state: dict[str, Any], lrs: Mapping[str, float]) -> None:
        grads = self.decay(theta, grads, lrs)
        step, first, second = self.moments(grads, state)
        now, ahead = self.momentum(step), self.momentum(step + 1)
        product = state["momentum_product"] = state.get("momentum_product", 1.0) * now
        for name, tensor in theta.items():
            scale = self.scale(second[name], step)
            tensor.addcdiv_(grads[name], scale, value=-lrs[name] * (1 - now) / (1 - product))
            tensor.addcdiv_(first[name], scale, value=-lrs[name] * ahead / (1 - product * ahead))


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov, Hutter 2019, arXiv 1711.05101), as ``torch.optim.AdamW``."""

    def decay(self, theta: Params, grads: Params, lrs: Mapping[str, float]) -> Params:
        for name, tensor in theta.items():
            tensor.mul_(1 - lrs[name] * self.weight_decay)
        return grads


def batches(examples: int, work: LocalWork, rng: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
    """Positions of the examples of each step.

    Epochs are reshuffled passes cut into batches, the last one short. With ``work.steps`` the passes form one endless
    stream cut into full batches, so that every step sees ``min(batch_size, examples)`` examples.
    """
    size = min(work.batch_size, examples)
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(order) == 0:
            order = rng.permutation(examples)
        elif work.steps is not None and len(order) < size:
            order = np.concatenate([order, rng.permutation(examples)])
        yield order[:size]
        order = order[size:]


def learning_rates(work: LocalWork, theta: Mapping[str, Tensor], round: int, rounds: int) -> dict[str, float]:
    """The rate of every entry of θ in this round of a run of so many."""
    rate = work.lr * work.lr_decay**round * work.schedule.factor(round, rounds)
    return {
        name: rate * math.prod(f for pattern, f in work.lr_factors.items() if fnmatchcase(name, pattern))
        for name in theta
    }


def clipped(grads: Params, limit: float) -> Params:
    """Gradients scaled down to a joint Euclidean length of at most ``limit``."""
    factor = (limit / (P.norm(grads) + 1e-6)).clamp(max=1.0)
    return {name: grad * factor for name, grad in grads.items()}
