"""Who talks to whom: clients with a server (a star), or peers along the edges of a graph.

A graph of peers gives a mixing matrix; all of them have Metropolis weights, see :func:`hybridfl.mixing.metropolis`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from hybridfl.build import Range
from hybridfl.errors import ConfigError
from hybridfl.mixing import Adjacency, Matrix, connected, metropolis
from hybridfl.rng import stream
from hybridfl.types import Method

CHOICES = {
    "star": ("auto", "star"),
    "peers": ("auto", "bipartite", "complete", "erdos_renyi", "ring", "torus"),
}
"""The shipped choices that serve a method, by what it says as its ``topology``."""

DRAWS = 1000
"""Random graphs drawn in search of a connected one."""

Side = Annotated[int, Range(low=3)]


@dataclass(frozen=True)
class Star:
    """Clients that talk to a server."""

    def name_for(self, method: Method) -> str:
        return "star"


class Peers(ABC):
    """Clients that talk to each other, each mixing the models of its neighbours in a graph into its own."""

    def name_for(self, method: Method) -> str:
        return "peers"

    def mixing(self, agents: int, seed: int, round: int = 0) -> Matrix:
        """The mixing matrix ``(agents, agents)`` of a round: symmetric, doubly stochastic, positive on the diagonal.

        Args:
            agents: number of peers, at least one.
            seed: of the run; only random graphs depend on it.

        Raises:
            ConfigError: there is no such graph of so many agents. Its key is an option of the graph, or empty where
                only another number of agents helps.
        """
        return metropolis(self.adjacency(agents, seed, round))

    @abstractmethod
    def adjacency(self, agents: int, seed: int, round: int = 0) -> Adjacency:
        """The graph of a round; arguments and errors as for :meth:`mixing`."""


@dataclass(frozen=True)
class Complete(Peers):
    """Everybody talks to everybody: weights 1 / N, consensus in one step."""

    def adjacency(self, agents: int, seed: int, round: int = 0) -> Adjacency:
        return ~np.eye(agents, dtype=bool)


@dataclass(frozen=True)
class Ring(Peers):
    """Everybody talks to the next and the one before: weights 1/3; 1/2 for two agents, 1 for one."""

    def adjacency(self, agents: int, seed: int, round: int = 0) -> Adjacency:
        nobody = np.zeros((agents, agents), dtype=bool)
        index = np.arange(agents)
        return _with_edges(nobody, index, np.roll(index, 1))


@dataclass(frozen=True)
class Torus(Peers):
    """A grid whose edges meet: four neighbours each, weights 1/5.

    Args:
        rows, columns: the grid's sides, at least 3 or neighbours would coincide; ``None`` is what makes the grid
            nearest to a square. Agent r · columns + c stands in row r and column c.
    """

    rows: Side | None = None
    columns: Side | None = None

    def adjacency(self, agents: int, seed: int, round: int = 0) -> Adjacency:
        index = np.arange(agents).reshape(self.shape(agents))
        nobody = np.zeros((agents, agents), dtype=bool)
        return _with_edges(_with_edges(nobody, index, np.roll(index, 1, 0)), index, np.roll(index, 1, 1))

    def shape(self, agents: int) -> tuple[int, int]:
        """Rows and columns of the grid.

        Raises:
            ConfigError: as :meth:`mixing` says.
        """
        grids = _grids(agents)
        if not grids:
            near = min(filter(_grids, range(max(9, agents - 2), max(9, agents) + 3)), key=lambda n: abs(n - agents))
            problem = f"got {agents} agents: a torus has at least 3 rows and 3 columns; nearest valid number: {near}."
            raise ConfigError("", problem)
        fitting = [grid for grid in grids if self.rows in (None, grid[0]) and self.columns in (None, grid[1])]
        if not fitting:
            near_rows, near_columns = min(grids, key=self._misfit)
            key = "columns" if self.rows in (None, near_rows) else "rows"
            sides = f"rows={_said(self.rows)} and columns={_said(self.columns)}"
            problem = f"no torus of {agents} agents with sides of at least 3 has {sides}"
            near_sides = f"rows={near_rows}, columns={near_columns}"
            raise ConfigError(key, f"got {getattr(self, key)}: {problem}; nearest valid: {near_sides}.")
        return min(fitting, key=lambda grid: abs(grid[0] - grid[1]))

    def _misfit(self, grid: tuple[int, int]) -> int:
        return sum(abs(wanted - side) for wanted, side in zip((self.rows, self.columns), grid, strict=True) if wanted)


@dataclass(frozen=True)
class Bipartite(Peers):
    """The last two agents are hubs that talk to all others but not to each other; leaves only talk to the hubs.

    For N ≥ 4 agents every edge has weight 1/(N - 1), a leaf keeps (N - 3)/(N - 1) of its own model and a hub 1/(N - 1):
    0.25, 0.5 and 0.25 for N = 5. Saadati et al. 2024, arXiv 2404.08079, whose code (GitHub, nsaadati/DIMAT) cuts
    1/(N - 1) to two decimals and gives hub and leaf what is then left; the exact value is used here. For N = 3, where a
    leaf would keep nothing, the weights on the two edges are 1/3.
    """

    def adjacency(self, agents: int, seed: int, round: int = 0) -> Adjacency:
        if agents < 3:
            raise ConfigError("", f"got {agents} agents: two hubs and at least one leaf; nearest valid number: 3.")
        hub = np.arange(agents) >= agents - 2
        apart: Adjacency = hub[:, None] != hub
        return apart


@dataclass(frozen=True)
class ErdosRenyi(Peers):
    """Each pair talks with the same probability, drawn again until the graph is connected. Erdős, Rényi 1959.

    Args:
        probability: of an edge. Most graphs are connected above ln N / N.
        redraw: a new graph in every round, keyed by (seed, round), instead of one for the run.
    """

    probability: Annotated[float, Range(above=0, high=1)] = 0.3
    redraw: bool = False

    def adjacency(self, agents: int, seed: int, round: int = 0) -> Adjacency:
        rng = stream(seed, "erdos renyi", round if self.redraw else 0)
        for _ in range(DRAWS):
            edges = np.triu(rng.random((agents, agents)) < self.probability, 1)
            graph: Adjacency = edges | edges.T
            if connected(graph):
                return graph
        likely = math.ceil(100 * math.log(agents) / agents) / 100
        problem = (
            f"none of {DRAWS} random graphs of {agents} agents is connected; nearest valid value: {likely:g} or more."
        )
        raise ConfigError("probability", f"got {self.probability:g}: {problem}")


@dataclass(frozen=True)
class Auto(Ring):
    """The topology the method was made for: a star where there is a server, a ring between peers."""

    def name_for(self, method: Method) -> str:
        return method.topology


def _with_edges(graph: Adjacency, here: NDArray[np.int64], there: NDArray[np.int64]) -> Adjacency:
    """The graph with an edge from each agent of ``here`` to that of ``there``; an agent is no neighbour of itself."""
    wider = graph.copy()
    wider[here, there] = wider[there, here] = True
    np.fill_diagonal(wider, False)
    return wider


def _grids(agents: int) -> list[tuple[int, int]]:
    """All sides of at least 3 whose product is the number of agents, fewer rows first."""
    return [(rows, agents // rows) for rows in range(3, agents // 3 + 1) if agents % rows == 0]


def _said(side: int | None) -> str:
    return "null" if side is None else str(side)
