"""Permutation symmetry of nets: hidden units can change places without a change of the function.

Hecht-Nielsen 1990 for layers of units; as a specification of axes that share a permutation, Ainsworth, Hayase,
Srinivasa 2023 (arXiv 2209.04836). Here the specification is not written for each net but derived: the units are followed
through one forward pass (:mod:`hybridfl.merging.tracing`), units that occur in the same axes of the same tensors are
interchangeable, and the result is tried on random weights before it is given out.

A permutation is a tensor of whole numbers ``(units,)``: unit u of the permuted net is unit ``permutation[u]`` of the net.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hybridfl.errors import ConfigError
from hybridfl.merging.groups import Group, groups_of
from hybridfl.merging.tracing import Trace
from hybridfl.params import Params
from hybridfl.rng import stream, torch_seed
from hybridfl.types import Model

Permutations = list[Tensor]
"""One permutation for every group of a specification, in its order."""


@dataclass(frozen=True, eq=False)
class PermutationSpec:
    """The groups of a net, in the order in which a pass meets them."""

    groups: tuple[Group, ...]

    @property
    def modules(self) -> list[str]:
        """Names of the modules whose inputs are the groups' features, without repetition."""
        return list(dict.fromkeys(group.features.module for group in self.groups))


def permutation_spec(net: nn.Module, example: Tensor) -> PermutationSpec:
    """The permutation symmetry of a net in evaluation mode.

    Inputs and logits keep their places. Handled are linear layers, convolutions (plain and depthwise), batch, group,
    layer and instance norm, activations, additions and products element by element, concatenations, slices, padding,
    pooling, means over positions and flattening, as modules or functions. A residual stream is one group; where a
    stream is padded with zero channels (ResNet's shortcut A), the channels it comes with and those that are new are a
    group each. Under a GroupNorm the channels of a group stay together.

    Args:
        net: left as it is; a copy runs in float64 on the CPU with random weights.
        example: inputs ``(b, …)``, of which two at most are used.

    Raises:
        ConfigError: key ``model``, naming the layer: attention, convolutions in groups, matrix products of activations,
            reductions over channels, weights that are computed, embeddings of positions, and whatever else is not
            known to keep units apart.
    """
    net = _generic(net)
    x = example[:2].detach().cpu()
    x = x.double() if x.is_floating_point() else x
    spec = PermutationSpec(groups_of(Trace(net, x.clone())))
    _try(net, x, spec)
    return spec


def identity(spec: PermutationSpec) -> Permutations:
    return [torch.arange(group.size) for group in spec.groups]


def inverse(permutations: Sequence[Tensor]) -> Permutations:
    """The permutations that undo these."""
    return [permutation.argsort() for permutation in permutations]


def random_permutations(spec: PermutationSpec, rng: np.random.Generator) -> Permutations:
    """Uniform over what the groups allow."""
    drawn = []
    for group in spec.groups:
        if group.blocks is None:
            drawn.append(torch.from_numpy(rng.permutation(group.size)))
            continue
        permutation = torch.empty(group.size, dtype=torch.int64)
        for target, source in zip(group.blocks, rng.permutation(len(group.blocks)), strict=True):
            permutation[target] = group.blocks[source][torch.from_numpy(rng.permutation(len(target)))]
        drawn.append(permutation)
    return drawn


def permuted(model: Model, spec: PermutationSpec, permutations: Sequence[Tensor]) -> Model:
    """The same function with its units in other places, running statistics too. The model given is left as it is."""
    return Model(
        permuted_tensors(model.params, spec, permutations), permuted_tensors(model.buffers, spec, permutations)
    )


def permuted_tensors(tensors: Params, spec: PermutationSpec, permutations: Sequence[Tensor]) -> Params:
    """:func:`permuted` of some of a model's tensors; those in which no unit occurs are shared, not copied."""
    order: dict[tuple[str, int], Tensor] = {}
    for group, permutation in zip(spec.groups, permutations, strict=True):
        for entry in group.entries:
            if entry.name in tensors:
                key = entry.name, entry.axis
                order.setdefault(key, torch.arange(tensors[entry.name].shape[entry.axis]))
                order[key][entry.index] = entry.index[permutation.cpu()]
    out = dict(tensors)
    for (name, axis), index in order.items():
        out[name] = out[name].index_select(axis, index.to(out[name].device))
    return out


def _generic(net: nn.Module) -> nn.Module:
    """A copy in which no two units are alike: at the start norms are all ones, and a missing entry would not show."""
    net = copy.deepcopy(net).cpu().double().eval()
    random = torch.Generator().manual_seed(torch_seed(0, "generic weights"))
    with torch.no_grad():
        for tensor in filter(torch.is_floating_point, itertools.chain(net.parameters(), net.buffers())):
            if tensor.dim() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5, generator=random)
            else:
                tensor.uniform_(0.5, 1.5, generator=random)  # running variances are positive
    return net


def _try(net: nn.Module, x: Tensor, spec: PermutationSpec) -> None:
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    rng = stream(0, "permutation trial")
    with torch.no_grad():
        expected = net(x.clone())
        for _ in range(2):
            moved = permuted_tensors(tensors, spec, random_permutations(spec, rng))
            off = float((torch.func.functional_call(net, moved, (x.clone(),)) - expected).abs().max())
            if not off <= 1e-8 * float(expected.abs().max()):
                raise ConfigError(
                    "model",
                    f"its logits change by {off:.1e} when hidden units are permuted, so they cannot be permuted.",
                )
