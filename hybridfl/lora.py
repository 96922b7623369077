"""LoRA: low-rank updates of layers chosen by name. Hu et al., ICLR 2022, arXiv 2106.09685, equation 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hybridfl.build import PositiveFloat, PositiveInt
from hybridfl.errors import ConfigError, nearest
from hybridfl.federation import Federation
from hybridfl.optimizers import LocalWork
from hybridfl.params import Params

Factor = Literal["A", "B"]


def key(layer: str, factor: Factor) -> str:
    """Name of a layer's factor among the trained tensors."""
    return f"{layer}.lora_{factor}"


@dataclass(frozen=True)
class LowRank:
    """The map ``W = W₀ + scale · B A`` for every adapted layer, with ``B`` (out, r) and ``A`` (r, in).

    A convolution is the layer that multiplies its patches: in = channels · k · k. Frozen tensors: ``base``, the net's
    parameters that are not trained, W₀ among them; ``factors``, those factors that are not trained. Other entries of θ
    are parameters of the net, trained as they are.

    Attributes:
        layers: names of the adapted modules.
        rank: r; at most the smaller side of a layer.
        scale: α / r in the paper.
    """

    layers: tuple[str, ...]
    rank: int
    scale: float = 1.0

    def macs(self, frozen: Mapping[str, Any]) -> int:
        """Multiply–accumulates of all products B A."""
        base: Params = frozen["base"]
        weights = [base[f"{layer}.weight"] for layer in self.layers]
        return sum(rank_of(weight, self.rank) * int(weight.numel()) for weight in weights)

    def __call__(self, theta: Params, frozen: Mapping[str, Any]) -> Params:
        base: Params = frozen["base"]
        factors = {**frozen.get("factors", {}), **theta}
        adapted = {
            f"{layer}.weight": torch.addmm(
                base[f"{layer}.weight"].flatten(1), factors[key(layer, "B")], factors[key(layer, "A")], alpha=self.scale
            ).view_as(base[f"{layer}.weight"])
            for layer in self.layers
        }
        return base | adapted | {name: tensor for name, tensor in theta.items() if not is_factor(name)}


def is_factor(name: str) -> bool:
    """Whether an entry of θ is a factor and no parameter of the net."""
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


def rank_of(weight: Tensor, rank: int) -> int:
    """The rank of a layer's factors: more than its smaller side could not say more."""
    out, into = weight.flatten(1).shape
    return min(rank, out, into)


@dataclass(frozen=True)
class Rates:
    """Factors on the learning rate of what is trained."""

    A: PositiveFloat = 1.0
    B: PositiveFloat = 1.0
    full: PositiveFloat = 1.0


@dataclass(frozen=True)
class Lora:
    """What is adapted, and what is trained beside it.

    Attributes:
        rank: of the factors.
        targets: patterns of the names of linear and convolutional modules that are adapted, ``*`` for any text.
        full: patterns of the names of parameters that are trained in full, such as the head; their modules are not
            adapted.
        scale: factor on B A; in the paper α / r.
        rates: factors on the learning rate of A, B and what is trained in full.
    """

    rank: PositiveInt = 4
    targets: tuple[str, ...] = ("*",)
    full: tuple[str, ...] = ("head.*",)
    scale: float = 1.0
    rates: Rates = Rates()

    def work(self, work: LocalWork) -> LocalWork:
        """The local work with these rates."""
        if self.rates == Rates():
            return work
        factors = {"*.lora_A": self.rates.A, "*.lora_B": self.rates.B}
        factors |= {pattern: self.rates.full for pattern in self.full}
        return replace(work, lr_factors={**work.lr_factors, **factors})

    def fitted(self, federation: Federation) -> Adapters:
        """The layers and parameters of the federation's net that are meant.

        Raises:
            ConfigError: a pattern fits nothing, or nothing is left to adapt; under the key ``lora``.
        """
        params = list(federation.start.params)
        full = [name for name in params if _fits(name, self.full)]
        layers = [
            name
            for name, module in federation.net.named_modules()
            if isinstance(module, nn.Linear | _ConvNd) and f"{name}.weight" in params and f"{name}.weight" not in full
        ]
        _check("lora.full", self.full, params, "parameter")
        _check("lora.targets", self.targets, layers, "linear or convolutional layer that is not trained in full")
        return Adapters(tuple(name for name in layers if _fits(name, self.targets)), tuple(full), self.rank, self.scale)

    def stored(self, layers: Sequence[str], full: Sequence[str]) -> Adapters:
        """Those of a method's state."""
        return Adapters(tuple(layers), tuple(full), self.rank, self.scale)


DEFAULT = Lora()


@dataclass(frozen=True)
class Adapters:
    """LoRA fitted to a net.

    Attributes:
        layers: names of the adapted modules.
        full: names of the parameters that are trained in full.
        rank, scale: as in :class:`Lora`.
    """

    layers: tuple[str, ...]
    full: tuple[str, ...]
    rank: int
    scale: float

    @property
    def map(self) -> LowRank:
        return LowRank(self.layers, self.rank, self.scale)

    def names(self, factor: Factor) -> list[str]:
        """Entries of θ for this factor of all layers."""
        return [key(layer, factor) for layer in self.layers]

    def fresh(self, params: Params, rng: np.random.Generator, zero: Factor = "B") -> Params:
        """First factors of every layer: one is 0, so that nothing changes, the other random.

        The random one is Kaiming-uniform with a = √5, as in the authors' code: within ±1/√in for A, ±1/√r for B.
        """
        factors: Params = {}
        for layer in self.layers:
            weight = params[f"{layer}.weight"].flatten(1)
            out, into = weight.shape
            r = rank_of(weight, self.rank)
            for factor, shape in (("A", (r, into)), ("B", (out, r))):
                bound = 0.0 if factor == zero else shape[1] ** -0.5
                factors[f"{layer}.lora_{factor}"] = torch.from_numpy(rng.uniform(-bound, bound, shape)).to(weight)
        return factors

    def residual(self, layer: str, factors: Mapping[str, Tensor]) -> Tensor:
        """``scale · B A`` of a layer in float64, ``(out, in)``."""
        return self.scale * (factors[key(layer, "B")].double() @ factors[key(layer, "A")].double())


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check(option: str, patterns: Sequence[str], names: Sequence[str], what: str) -> None:
    if not patterns and option == "lora.targets":
        raise ConfigError(option, f"got []: nothing to adapt. {nearest('', names, names[:8])}")
    for number, pattern in enumerate(patterns):
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = nearest(pattern, names, names[:8]) or "There is none."
            raise ConfigError(f"{option}[{number}]", f"got '{pattern}': no {what} has such a name. {hint}")
