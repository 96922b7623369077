"""Mixing matrices: made from a graph of peers, and measured by how fast they bring models together.

W is ``(agents, agents)``; W[i, j] is the weight of agent j's model in agent i's mean, θ_i ← Σ_j W[i, j] θ_j. A matrix
that is doubly stochastic keeps the mean of all models; one that is symmetric, too, has one weight for each pair.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]
Adjacency = NDArray[np.bool_]
"""``(agents, agents)``, symmetric, nothing on the diagonal: who talks to whom."""


def metropolis(adjacency: Adjacency) -> Matrix:
    """Metropolis weights, W[i, j] = 1 / (1 + max(d_i, d_j)) on edges, d the degrees; an agent keeps what is left.

    Symmetric and doubly stochastic on every undirected graph, at least 1 / (1 + d_i) on the diagonal, and known to an
    agent from its neighbours' degrees alone. Xiao, Boyd, Lall 2005 (IPSN), after the local-degree weights
    1 / max(d_i, d_j) of Xiao, Boyd 2004 (Systems & Control Letters 53), which may leave an agent nothing of its own.

    Raises:
        ValueError: no undirected graph without loops.
    """
    graph = np.asarray(adjacency, dtype=bool)
    if graph.ndim != 2 or not graph.size or graph.shape[0] != graph.shape[1]:
        raise ValueError(f"adjacency has shape {graph.shape}, expected (agents, agents)")
    if (graph != graph.T).any() or graph.diagonal().any():
        raise ValueError("adjacency must be symmetric with nothing on the diagonal")
    degrees = graph.sum(1)
    weights: Matrix = np.where(graph, 1 / (1 + np.maximum.outer(degrees, degrees)), 0.0)
    np.fill_diagonal(weights, 1 - weights.sum(1))
    return weights


def connected(adjacency: Adjacency) -> bool:
    """Whether there is a path between any two agents."""
    reached = np.arange(len(adjacency)) == 0
    while True:
        wider = reached | adjacency[reached].any(0)
        if (wider == reached).all():
            return bool(reached.all())
        reached = wider


def neighbours(matrix: Matrix, agent: int) -> list[int]:
    """The others whose models the agent mixes into its own, in order."""
    return [other for other in np.flatnonzero(matrix[agent]).tolist() if other != agent]


def among(matrix: Matrix, present: Collection[int]) -> Matrix:
    """The matrix of a round in which only these agents mix, and only with each other.

    An agent's weights for those that are away go to its own model, and those keep theirs: what was symmetric and doubly
    stochastic stays so.
    """
    there = np.zeros(len(matrix), dtype=bool)
    there[list(present)] = True
    if there.all():
        return matrix
    left: Matrix = np.where(np.outer(there, there), matrix, 0.0)
    left[np.diag_indices(len(matrix))] += 1 - left.sum(1)
    return left


def spectral_gap(matrix: Matrix) -> float:
    """1 - |λ₂|, λ₂ the second largest eigenvalue in modulus; 1 for a single agent.

    Each mixing by a symmetric W shrinks the models' distance from their mean at least by |λ₂|: 1 is exact consensus
    in one step, 0 says that some agents never agree.

    Raises:
        ValueError: the matrix is not square, or a row does not sum to 1.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.allclose(matrix.sum(1), 1):
        raise ValueError("a mixing matrix is square and its rows sum to 1")
    moduli = np.sort(np.abs(np.linalg.eigvals(matrix)))
    return float(1 - moduli[-2]) if len(moduli) > 1 else 1.0


def consensus_distance(models: Sequence[Mapping[str, Tensor]]) -> float:
    """How far N models are apart: sqrt(1/N Σ_i ‖θ_i - θ̄‖²), θ̄ their mean, norms Euclidean over all tensors.

    Integer tensors (counters such as BatchNorm's ``num_batches_tracked``) are left out. Exactly 0 for equal models.

    Raises:
        ValueError: no models, or models of different tensors.
    """
    if not models or any(model.keys() != models[0].keys() for model in models):
        raise ValueError("the distance of no models, or of models with different tensors, is not defined")
    squares = []
    for name, first in models[0].items():
        if first.is_floating_point():
            # From the first model on, as the mean of equal numbers is not always that number.
            apart = torch.stack([model[name].detach().double() - first.detach().double() for model in models])
            squares.append((apart - apart.mean(0)).square().sum())
    return math.sqrt(float(torch.stack(squares).sum()) / len(models)) if squares else 0.0
