"""What an agent does with its neighbours' models on its own examples: align them, and make BatchNorm statistics anew."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hybridfl.merging.matching import ActivationStatistics, activation_matching, fixed_points, weight_matching
from hybridfl.merging.permutation import Permutations, PermutationSpec, permutation_spec, permuted
from hybridfl.models.batch_norm import reestimated
from hybridfl.params import Params
from hybridfl.rng import stream, torch_seed
from hybridfl.types import Model, ProbeInput

BATCH = 100
"""Most examples that go through the net at once."""


@functools.lru_cache(maxsize=4)
def specification(net: nn.Module, shape: tuple[int, ...]) -> PermutationSpec:
    """:func:`permutation_spec` of a net for inputs of this shape, derived once for each net.

    Raises:
        ConfigError: key ``model``, naming the layer that cannot be handled.
    """
    generator = torch.Generator().manual_seed(torch_seed(0, "example of the specification"))
    return permutation_spec(net, torch.randn(2, *shape, generator=generator))


@dataclass(frozen=True)
class Sample:
    """At most so many inputs of a view, drawn by seed and round, in batches that differ by one example at most."""

    examples: int
    seed: int
    round: int

    def of(self, seen: ProbeInput) -> list[Tensor]:
        x = torch.cat([batch.x for batch in seen.batches])
        # In random order: batches of a class each would have too small variances.
        order = stream(self.seed, "examples of statistics", self.round).permutation(len(x))[: self.examples]
        return list(x[torch.from_numpy(order).to(x.device)].tensor_split(-(-len(order) // BATCH)))


@dataclass(frozen=True)
class RunningStatistics:
    """Probe: the buffers that the model ``ctx["model"]`` has with the statistics of BatchNorm of the sample."""

    sample: Sample

    def __call__(self, seen: ProbeInput) -> Params:
        return _reestimated(seen, seen.ctx["model"], self.sample.of(seen)).buffers


@dataclass(frozen=True)
class Alignment:
    """Probe: the models ``ctx["others"]``, by name, with their units in the order of those of ``ctx["own"]``.

    Attributes:
        match: by activations on the sample, or by weights.
        sample: of the view.
        reestimate: look at the activations that all models have with the sample's own statistics of BatchNorm.

    Returns:
        By name, ``params`` and ``buffers`` of the aligned model, and ``fixed_points``, the share of its units that stay
        where they are, 0-d; 1 for a net without hidden units.
    """

    match: Literal["activation", "weight"]
    sample: Sample
    reestimate: bool = False

    def __call__(self, seen: ProbeInput) -> dict[str, Any]:
        spec = specification(seen.net, tuple(seen.batches[0].x.shape[1:]))
        own: Model = seen.ctx["own"]
        others: Mapping[str, Model] = seen.ctx["others"]
        if not spec.groups:
            found: list[Permutations] = [[] for _ in others]
        elif self.match == "weight":
            found = [weight_matching(spec, own.params, other.params, self.sample.seed) for other in others.values()]
        else:
            found = self._by_activations(seen, spec, [own, *others.values()])
        return {
            name: permuted(other, spec, permutations)._asdict() | {"fixed_points": _share(permutations)}
            for (name, other), permutations in zip(others.items(), found, strict=True)
        }

    def _by_activations(self, seen: ProbeInput, spec: PermutationSpec, models: list[Model]) -> list[Permutations]:
        batches, statistics = self.sample.of(seen), ActivationStatistics(spec)
        if self.reestimate:
            models = [_reestimated(seen, model, batches) for model in models]
        with torch.no_grad():
            for x in batches:
                statistics.add([seen.inputs({**m.buffers, **m.params}, x, spec.modules) for m in models])
        return [activation_matching(spec, correlations) for correlations in statistics.correlations()]


def _reestimated(seen: ProbeInput, model: Model, batches: list[Tensor]) -> Model:
    # Through the job's own function, which counts the passes.
    return reestimated(seen.net, model, batches, seen.apply)


def _share(permutations: Permutations) -> Tensor:
    return torch.tensor(fixed_points(permutations), dtype=torch.float64)
