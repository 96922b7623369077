"""Which unit of one net does the work of which unit of another, by activations or by weights, and the mix after it.

Activation matching as DIMAT uses it (Saadati et al. 2024, arXiv 2404.08079; Li et al. 2015, arXiv 1511.07543): for every
group of units the assignment with the largest sum of correlations. Weight matching is Git Re-Basin's Algorithm 1
(Ainsworth, Hayase, Srinivasa 2023, arXiv 2209.04836). Permutations found for a model bring its units into the order of
the reference: hand them to :func:`~hybridfl.merging.permutation.permuted`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl.merging.groups import Group
from hybridfl.merging.permutation import Permutations, PermutationSpec, identity, permuted, permuted_tensors
from hybridfl.params import Params
from hybridfl.rng import stream
from hybridfl.types import Model

CLAMP = 1e-7
"""Least denominator of a correlation: of units that hardly vary it is about 0."""
TIE = 1e-9
"""Of assignments closer than this share of the largest score, the one that leaves more units where they are is taken."""


# -- statistics of activations -----------------------------------------------------------------------------------------


class CrossMoments:
    """Covariances of a reference's units with those of M - 1 other models, over batches, in float64.

    Means and sums of squares are updated batch by batch around the running mean (Chan, Golub, LeVeque 1983), which does
    not lose digits as E[f fᵀ] - E[f] E[f]ᵀ does.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._squares = self._products = torch.zeros(())

    def add(self, features: Sequence[Tensor]) -> None:
        """Observations of all M models on the same batch, ``(units, observations)`` each; the reference comes first."""
        batch = torch.stack([f.detach().double() for f in features])
        number = batch.shape[2]
        if not self.count:
            self._mean = batch.new_zeros(batch.shape[:2])
            self._squares = batch.new_zeros(batch.shape[:2])
            self._products = batch.new_zeros(len(batch) - 1, batch.shape[1], batch.shape[1])
        mean = batch.mean(2)
        around, shift = batch - mean.unsqueeze(2), mean - self._mean
        weight = self.count * number / (self.count + number)
        self._squares = self._squares + around.square().sum(2) + weight * shift.square()
        self._products = self._products + around[0] @ around[1:].mT
        self._products += weight * shift[0].unsqueeze(1) * shift[1:].unsqueeze(1)
        self._mean = self._mean + shift * (number / (self.count + number))
        self.count += number

    def covariances(self) -> Tensor:
        """``(M - 1, units, units)``: of every unit of the reference (rows) with every unit of the other model."""
        return self._products / self.count

    def correlations(self) -> Tensor:
        """As :meth:`covariances`, divided by the standard deviations' product, which is at least ``CLAMP``."""
        deviation = (self._squares / self.count).sqrt()
        scale = deviation[0].unsqueeze(1) * deviation[1:].unsqueeze(1)
        return self.covariances() / scale.clamp_min(CLAMP)


class ActivationStatistics:
    """:class:`CrossMoments` of every group of a specification."""

    def __init__(self, spec: PermutationSpec) -> None:
        self.spec = spec
        self._moments = [CrossMoments() for _ in spec.groups]

    def add(self, activations: Sequence[Mapping[str, Tensor]]) -> None:
        """What :func:`~hybridfl.activations.activations` gives for ``spec.modules`` for each of M models, the reference
        first, on the same inputs."""
        for group, moments in zip(self.spec.groups, self._moments, strict=True):
            moments.add([group.features.of(seen[group.features.module]) for seen in activations])

    def correlations(self) -> list[list[Tensor]]:
        """For every model but the reference, one ``(units, units)`` a group."""
        by_group = [moments.correlations() for moments in self._moments]
        return [[of[m] for of in by_group] for m in range(len(by_group[0]))] if by_group else []


# -- assignments -------------------------------------------------------------------------------------------------------


def assign(score: Tensor, blocks: Tensor | None = None) -> Tensor:
    """The permutation p with the largest Σᵤ score[u, p[u]].

    Args:
        score: ``(units, units)``.
        blocks: as in a :class:`~hybridfl.merging.permutation.Group`; the best assignment within every pair of blocks
            comes first, then the best one of blocks, which together is the optimum under this constraint.

    Raises:
        ValueError: the scores are not finite.
    """
    tie = TIE * (float(score.abs().max()) or 1.0)
    score = score.double() + tie * torch.eye(len(score), dtype=torch.float64, device=score.device)
    if blocks is None:
        return _largest(score)
    inner = [[_largest(score[rows][:, columns]) for columns in blocks] for rows in blocks]
    values = [
        [score[rows, columns[inner[a][b]]].sum() for b, columns in enumerate(blocks)] for a, rows in enumerate(blocks)
    ]
    permutation = torch.empty(len(score), dtype=torch.int64)
    for a, b in enumerate(_largest(torch.tensor(values, dtype=torch.float64)).tolist()):
        permutation[blocks[a]] = blocks[b][inner[a][b]]
    return permutation


def _largest(score: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(score.cpu().numpy(), maximize=True)[1])


def activation_matching(spec: PermutationSpec, correlations: Sequence[Tensor]) -> Permutations:
    """For every group the assignment with the largest sum of correlations.

    That is the one with the smallest distance of the standardised activations. Units that are constant in a model
    correlate with nothing: they take the places that are left, their own if they can.

    Args:
        correlations: one ``(units, units)`` a group, rows of the reference, columns of the model to permute.
    """
    return [assign(score, group.blocks) for group, score in zip(spec.groups, correlations, strict=True)]


def weight_matching(spec: PermutationSpec, params_a: Params, params_b: Params, seed: int) -> Permutations:
    """Permutations of b with a large inner product of the permuted b with a, over all tensors in which units occur.

    Coordinate descent from the identity: one group after the other, in an order drawn anew for every sweep, is assigned
    optimally given the others, until a sweep changes nothing. A local optimum; running statistics are not looked at.
    """
    tensors_a, tensors_b = ({name: t.detach().double() for name, t in p.items()} for p in (params_a, params_b))
    permutations = identity(spec)
    sweep, improved = 0, True
    while improved:
        improved = False
        for g in stream(seed, "weight matching", sweep).permutation(len(spec.groups)).tolist():
            group = spec.groups[g]
            touched = {e.name: tensors_b[e.name] for e in group.entries if e.name in tensors_b}
            now = permuted_tensors(touched, spec, permutations)
            score = _inner_products(group, tensors_a, now)
            # Rows of now are in the present order already: found is relative to it.
            found = assign(score, group.blocks)
            trial = [*permutations[:g], permutations[g][found], *permutations[g + 1 :]]
            before, after = (_agreement(tensors_a, t) for t in (now, permuted_tensors(touched, spec, trial)))
            # A layer from a stream to itself has the group in two axes; then the assignment may be no improvement.
            if after > before + TIE * abs(before):
                permutations, improved = trial, True
        sweep += 1
    return permutations


def _inner_products(group: Group, a: Params, b: Params) -> Tensor:
    """Of the weights of every unit of a with those of every unit of b, ``(units, units)``."""
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    for entry in group.entries:
        if entry.name in b:
            rows = [t[entry.name].movedim(entry.axis, 0)[entry.index.to(t[entry.name].device)] for t in (a, b)]
            total = total.to(rows[0].device) + rows[0].flatten(1) @ rows[1].flatten(1).T
    return total


def _agreement(a: Params, b: Params) -> float:
    return float(sum((a[name] * tensor).sum() for name, tensor in b.items()))


def fixed_points(permutations: Permutations) -> float:
    """Share of the units of all groups that stay where they are; 1 where there are none."""
    stays = [permutation == torch.arange(len(permutation), device=permutation.device) for permutation in permutations]
    return float(torch.cat(stays).double().mean()) if stays else 1.0


def align_and_mix(
    reference: Model,
    others: Sequence[Model],
    weights: Sequence[float],
    spec: PermutationSpec,
    permutations: Sequence[Permutations],
) -> Model:
    """Σⱼ πⱼ Pⱼ(modelⱼ) in the reference's order of units, running statistics too.

    Args:
        weights: π, of the reference first; normalised to sum 1.
        permutations: Pⱼ of every other model.

    Raises:
        ValueError: weights that do not sum to a positive number, or not one for each model.
    """
    aligned = [reference]
    aligned += [permuted(model, spec, found) for model, found in zip(others, permutations, strict=True)]
    if len(weights) != len(aligned):
        raise ValueError(f"{len(weights)} weights for {len(aligned)} models")
    return Model(P.mean([m.params for m in aligned], weights), P.mean([m.buffers for m in aligned], weights))
