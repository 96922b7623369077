"""Models brought into one basin of the loss: their hidden units take the order of the first model's, then they are averaged.

The functions here give the models in that order, each still the function it was; what merges them is up to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hybridfl.activations import activations
from hybridfl.build import NonNegativeInt
from hybridfl.merging.matching import ActivationStatistics, activation_matching, weight_matching
from hybridfl.merging.permutation import Permutations, PermutationSpec, permutation_spec, permuted_tensors
from hybridfl.params import Params
from hybridfl.types import Model

BATCH = 100
"""Most examples that go through the net at once."""


def by_weights(models: Sequence[Params], net: nn.Module, example: Tensor, seed: NonNegativeInt = 0) -> list[Params]:
    """Units that have the largest inner product of weights take each other's places.

    Git Re-Basin's weight matching: Ainsworth, Hayase, Srinivasa 2023, arXiv 2209.04836, algorithm 1.

    Args:
        models: parameters and buffers of ``net`` by name; the first is the reference.
        net: a template; its own tensors are not used.
        example: inputs ``(b, …)``, for their shape.
        seed: of the order in which layers are matched.

    Raises:
        ConfigError: key ``model``: the net's units cannot be permuted.
    """
    spec = permutation_spec(net, example)
    reference, *others = [{name: model[name] for name, _ in net.named_parameters()} for model in models]
    return _ordered(models, spec, [weight_matching(spec, reference, other, seed) for other in others])


def by_activations(models: Sequence[Params], net: nn.Module, examples: Tensor) -> list[Params]:
    """Units that have the largest correlation of activations take each other's places.

    Li, Yosinski, Clune, Lipson, Hopcroft 2015, arXiv 1511.07543; as DIMAT uses it, Saadati et al. 2024, arXiv 2404.08079.

    Args:
        models, net: as in :func:`by_weights`.
        examples: inputs ``(n, …)`` on which the activations are compared, on the net's device.

    Raises:
        ConfigError: key ``model``: the net's units cannot be permuted.
    """
    spec = permutation_spec(net, examples)
    if not spec.groups or len(models) < 2:
        return list(models)
    whole = [fitted(net, model) for model in models]
    statistics = ActivationStatistics(spec)
    for x in examples.split(BATCH):
        statistics.add([activations(net, model, x, spec.modules) for model in whole])
    return _ordered(models, spec, [activation_matching(spec, found) for found in statistics.correlations()])


def fitted(net: nn.Module, tensors: Params) -> Model:
    """Tensors by name as a model of ``net``, in its types and on its device."""
    parts = dict(net.named_parameters()), dict(net.named_buffers())
    return Model(*({name: tensors[name].to(like.device, like.dtype) for name, like in part.items()} for part in parts))


def _ordered(models: Sequence[Params], spec: PermutationSpec, found: Sequence[Permutations]) -> list[Params]:
    pairs = zip(models[1:], found, strict=True)
    return [models[0], *(permuted_tensors(model, spec, permutations) for model, permutations in pairs)]
