"""Graphs of peers and their mixing matrices: what all of them keep, what is known of each, what is refused."""

from __future__ import annotations

import helpers
import numpy as np
import pytest
import torch
import yaml
from scipy.sparse.csgraph import connected_components, laplacian

from hybridfl import params as P
from hybridfl.build import build
from hybridfl.config import choices
from hybridfl.engine import Unsuitable, check_method
from hybridfl.errors import ConfigError
from hybridfl.methods.fedavg import FedAvg
from hybridfl.mixing import Matrix, connected, consensus_distance, metropolis, neighbours, spectral_gap
from hybridfl.topology import CHOICES, Auto, Bipartite, Complete, ErdosRenyi, Peers, Ring, Star, Torus

GRAPHS: list[tuple[Peers, int]] = [
    *((graph, agents) for graph in (Complete(), Ring(), Auto(), ErdosRenyi(0.4)) for agents in (1, 2, 3, 5, 12)),
    *((Bipartite(), agents) for agents in (3, 4, 5, 12)),
    *((Torus(), agents) for agents in (9, 12, 24, 30)),
    (Torus(rows=5), 20),
    (Torus(columns=3), 18),
    (ErdosRenyi(0.08), 50),
    (ErdosRenyi(1.0), 7),
]
IDS = [f"{graph!r} {agents}" for graph, agents in GRAPHS]


class Gossip(FedAvg):
    topology = "peers"


# -- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("graph", "agents"), GRAPHS, ids=IDS)
def test_every_matrix_is_a_mixing_matrix(graph: Peers, agents: int) -> None:
    W = graph.mixing(agents, seed=3)
    assert W.shape == (agents, agents)
    assert W.dtype == np.float64
    assert W.sum(0) == pytest.approx(np.ones(agents), abs=1e-14)
    assert W.sum(1) == pytest.approx(np.ones(agents), abs=1e-14)
    assert np.array_equal(W, W.T)
    assert W.min() >= 0
    assert W.diagonal().min() >= 1 / agents - 1e-14
    assert connected_components(W, directed=False)[0] == 1
    assert 0 < spectral_gap(W) <= 1 + 1e-14


@pytest.mark.parametrize(("graph", "agents"), GRAPHS, ids=IDS)
def test_mixing_keeps_the_mean_and_shrinks_the_distance_by_the_gap(graph: Peers, agents: int) -> None:
    W = graph.mixing(agents, seed=3)
    models = np.random.default_rng(0).normal(size=(agents, 4))
    mixed = W @ models
    assert mixed.mean(0) == pytest.approx(models.mean(0), abs=1e-14)
    before, after = (consensus_distance([{"w": torch.from_numpy(row)} for row in m]) for m in (models, mixed))
    assert after <= (1 - spectral_gap(W)) * before + 1e-14
    apart = np.linalg.matrix_power(W, 5) - 1 / agents
    assert np.linalg.norm(apart, 2) == pytest.approx((1 - spectral_gap(W)) ** 5, abs=1e-13)


@pytest.mark.parametrize(("graph", "agents"), GRAPHS, ids=IDS)
def test_a_draw_depends_on_its_keys_alone(graph: Peers, agents: int) -> None:
    first = graph.mixing(agents, 3)
    graph.mixing(agents, 4)
    assert np.array_equal(graph.mixing(agents, 3, 5), first)  # one graph for all rounds


# -- each of them ----------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    assert Complete().mixing(4, 0) == pytest.approx(np.full((4, 4), 0.25))
    third = 1 / 3
    ring = [[third, third, 0, third], [third, third, third, 0], [0, third, third, third], [third, 0, third, third]]
    assert Ring().mixing(4, 0) == pytest.approx(np.array(ring))
    assert Ring().mixing(3, 0) == pytest.approx(np.full((3, 3), third))
    assert Ring().mixing(2, 0) == pytest.approx(np.full((2, 2), 0.5))
    assert Ring().mixing(1, 0).tolist() == Complete().mixing(1, 0).tolist() == [[1.0]]
    leaf, hub = [0.25, 0.25], [0.25, 0.25, 0.25]
    five = [[0.5, 0, 0, *leaf], [0, 0.5, 0, *leaf], [0, 0, 0.5, *leaf], [*hub, 0.25, 0], [*hub, 0, 0.25]]
    assert Bipartite().mixing(5, 0) == pytest.approx(np.array(five))
    assert Bipartite().mixing(3, 0) == pytest.approx(np.array([[1, 1, 1], [1, 2, 0], [1, 0, 2]]) / 3)


@pytest.mark.parametrize("agents", [4, 6, 10, 23])
def test_the_exact_weights_of_hubs_and_leaves(agents: int) -> None:
    W = Bipartite().mixing(agents, 0)
    assert W[0, -1] == W[-1, 0] == 1 / (agents - 1)
    assert W[0, 0] == pytest.approx((agents - 3) / (agents - 1))
    assert W[-1, -1] == W[-2, -2] == pytest.approx(1 / (agents - 1))
    assert W[-1, -2] == W[0, 1] == 0


def test_neighbours_on_a_torus() -> None:
    W = Torus(rows=3, columns=4).mixing(12, 0)
    # 0  1  2  3
    # 4  5  6  7
    # 8  9 10 11
    assert neighbours(W, 0) == [1, 3, 4, 8]
    assert neighbours(W, 6) == [2, 5, 7, 10]
    assert neighbours(W, 11) == [3, 7, 8, 10]
    assert set(W[W > 0].round(12)) == {0.2}


def test_neighbours() -> None:
    assert neighbours(Ring().mixing(5, 0), 0) == [1, 4]
    assert neighbours(Ring().mixing(1, 0), 0) == []
    assert neighbours(Bipartite().mixing(5, 0), 1) == [3, 4]
    assert neighbours(Bipartite().mixing(5, 0), 4) == [0, 1, 2]
    assert neighbours(Complete().mixing(3, 0), 1) == [0, 2]


@pytest.mark.parametrize(
    ("agents", "shape"), [(9, (3, 3)), (12, (3, 4)), (30, (5, 6)), (36, (6, 6)), (15, (3, 5)), (100, (10, 10))]
)
def test_a_torus_is_as_square_as_can_be(agents: int, shape: tuple[int, int]) -> None:
    assert Torus().shape(agents) == shape


def test_sides_of_a_torus_that_are_given() -> None:
    assert Torus(rows=3).shape(18) == (3, 6)
    assert Torus(columns=3).shape(18) == (6, 3)
    assert Torus(rows=6, columns=3).shape(18) == (6, 3)
    assert not np.array_equal(Torus(rows=3).mixing(18, 0), Torus(rows=6).mixing(18, 0))


# -- spectra ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("agents", "gap"), [(5, 0.461), (8, 0.195), (10, 0.127), (16, 0.051), (20, 0.033)])
def test_the_gap_of_a_ring(agents: int, gap: float) -> None:
    assert spectral_gap(Ring().mixing(agents, 0)) == pytest.approx(gap, abs=5e-4)
    known = [(1 + 2 * np.cos(2 * np.pi * k / agents)) / 3 for k in range(1, agents)]
    assert spectral_gap(Ring().mixing(agents, 0)) == pytest.approx(1 - np.abs(known).max())


@pytest.mark.parametrize("agents", [1, 2, 3, 10])
def test_a_complete_graph_agrees_in_one_step(agents: int) -> None:
    assert spectral_gap(Complete().mixing(agents, 0)) == pytest.approx(1)


@pytest.mark.parametrize("agents", [4, 5, 10, 23])
def test_the_gap_around_two_hubs(agents: int) -> None:
    assert spectral_gap(Bipartite().mixing(agents, 0)) == pytest.approx(2 / (agents - 1))


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (3, 4), (4, 6), (5, 5)])
def test_the_gap_of_a_torus(rows: int, columns: int) -> None:
    r, c = np.cos(2 * np.pi * np.arange(rows) / rows), np.cos(2 * np.pi * np.arange(columns) / columns)
    known = np.sort(np.abs(1 + 2 * np.add.outer(r, c)).ravel() / 5)
    assert spectral_gap(Torus(rows, columns).mixing(rows * columns, 0)) == pytest.approx(1 - known[-2])


def test_the_gap_of_agents_that_never_agree_is_zero() -> None:
    assert spectral_gap(np.eye(3)) == 0
    apart = np.kron(np.eye(2), np.full((2, 2), 0.5))
    assert spectral_gap(apart) == pytest.approx(0)
    assert spectral_gap(np.array([[0.0, 1.0], [1.0, 0.0]])) == pytest.approx(0)  # the eigenvalue -1: they swap for ever


def test_the_gap_of_a_matrix_that_is_not_symmetric() -> None:
    """A walk round a circle that stays with probability 1/2: eigenvalues (1 + exp(2πik/4)) / 2."""
    W = 0.5 * (np.eye(4) + np.roll(np.eye(4), 1, axis=1))
    assert spectral_gap(W) == pytest.approx(1 - np.sqrt(0.5))


@pytest.mark.parametrize("matrix", [np.ones((2, 3)) / 3, np.eye(2) * 0.9, np.ones(3)])
def test_what_has_no_gap(matrix: Matrix) -> None:
    with pytest.raises(ValueError, match="square and its rows sum to 1"):
        spectral_gap(matrix)


def test_the_laplacian_says_the_same() -> None:
    """On regular graphs of degree d Metropolis weights are I - L / (1 + d); L's spectrum is known."""
    for graph, agents, degree in ((Ring(), 7, 2), (Complete(), 7, 6), (Torus(), 12, 4)):
        adjacency = graph.adjacency(agents, 0)
        assert adjacency.sum(1).tolist() == [degree] * agents
        assert graph.mixing(agents, 0) == pytest.approx(
            np.eye(agents) - laplacian(adjacency.astype(float)) / (1 + degree)
        )
    hubs = np.linalg.eigvalsh(laplacian(Bipartite().adjacency(9, 0).astype(float)))
    assert hubs == pytest.approx([0, *[2] * 6, 7, 9], abs=1e-12)  # of the complete bipartite graph on 2 and 7
    for graph, agents in ((ErdosRenyi(0.15), 25), (Ring(), 25)):
        assert np.linalg.eigvalsh(laplacian(graph.adjacency(agents, 1).astype(float)))[1] > 1e-6


# -- random graphs ---------------------------------------------------------------------------------------------------


def test_random_graphs_are_keyed_by_seed_and_round() -> None:
    fixed, redrawn = ErdosRenyi(0.3), ErdosRenyi(0.3, redraw=True)
    assert not np.array_equal(fixed.mixing(12, 0), fixed.mixing(12, 1))
    assert np.array_equal(fixed.mixing(12, 0, 7), fixed.mixing(12, 0))
    assert np.array_equal(redrawn.mixing(12, 0), fixed.mixing(12, 0))
    backwards = {round: redrawn.mixing(12, 0, round) for round in (3, 2, 1, 0)}
    assert len({W.tobytes() for W in backwards.values()}) == 4
    assert all(np.array_equal(redrawn.mixing(12, 0, round), W) for round, W in backwards.items())


def test_as_many_edges_as_the_probability_says() -> None:
    graph = ErdosRenyi(0.3, redraw=True)
    edges = np.mean([graph.adjacency(60, 0, round)[np.triu_indices(60, 1)].mean() for round in range(20)])
    assert edges == pytest.approx(0.3, abs=0.01)


def test_graphs_in_pieces_are_drawn_again() -> None:
    """At this probability hardly one graph in twenty is connected."""
    graph = ErdosRenyi(0.1, redraw=True)
    assert all(connected(graph.adjacency(20, 0, round)) for round in range(20))


def test_a_probability_too_small_for_a_connected_graph() -> None:
    with pytest.raises(ConfigError) as caught:
        ErdosRenyi(0.01).mixing(20, 0)
    assert caught.value.key == "probability"
    problem = "got 0.01: none of 1000 random graphs of 20 agents is connected; nearest valid value: 0.15 or more."
    assert caught.value.problem == problem
    assert spectral_gap(ErdosRenyi(0.15).mixing(20, 0)) > 0


def test_connected() -> None:
    path = np.eye(6, k=1, dtype=bool) | np.eye(6, k=-1, dtype=bool)
    assert connected(path)
    path[2, 3] = path[3, 2] = False
    assert not connected(path)
    assert connected(np.zeros((1, 1), dtype=bool))
    assert not connected(np.zeros((2, 2), dtype=bool))
    rng = np.random.default_rng(0)
    for _ in range(200):
        upper = np.triu(rng.random((9, 9)) < 0.25, 1)
        assert connected(upper | upper.T) == (connected_components(upper, directed=False)[0] == 1)


# -- Metropolis weights ----------------------------------------------------------------------------------------------


def test_metropolis_weights_of_a_path_by_hand() -> None:
    path = np.array([[0, 1, 0, 0], [1, 0, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]], dtype=bool)
    expected = np.array([[3, 1, 0, 0], [1, 1, 1, 1], [0, 1, 3, 0], [0, 1, 0, 3]]) / 4
    assert metropolis(path) == pytest.approx(expected)
    assert metropolis(np.zeros((2, 2), dtype=bool)).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("adjacency", "problem"),
    [
        (np.zeros((2, 3), dtype=bool), "shape"),
        (np.zeros((0, 0), dtype=bool), "shape"),
        (np.eye(2, dtype=bool), "diagonal"),
        (np.array([[0, 1], [0, 0]], dtype=bool), "symmetric"),
    ],
)
def test_what_is_no_graph(adjacency: np.ndarray, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        metropolis(adjacency)


# -- distance --------------------------------------------------------------------------------------------------------


def test_consensus_distance_by_hand() -> None:
    models = [
        {"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]])},
        {"a": torch.zeros(1), "b": torch.zeros(1, 2)},
    ]
    assert consensus_distance(models) == 2.5  # both are half of the length 5 from the mean


def test_consensus_distance_is_the_root_of_the_mean_square() -> None:
    generator = torch.Generator().manual_seed(0)
    models = [
        {"a": torch.randn(3, 2, generator=generator), "b": torch.randn((), generator=generator)} for _ in range(5)
    ]
    flat = torch.stack([P.flatten(model) for model in models]).double()
    assert consensus_distance(models) == pytest.approx(float(flat.var(0, correction=0).sum().sqrt()))
    pairs = torch.cdist(flat, flat).square().sum()
    assert consensus_distance(models) == pytest.approx(float((pairs / 2 / 25).sqrt()))


def test_equal_models_are_at_distance_zero() -> None:
    model = {"a": torch.full((7,), 0.1, dtype=torch.float64), "n": torch.tensor(3)}
    assert consensus_distance([model] * 3) == consensus_distance([model]) == 0
    assert consensus_distance([model, {**model, "n": torch.tensor(9)}]) == 0  # counters are no weights
    assert consensus_distance([{"n": torch.tensor(1)}, {"n": torch.tensor(9)}]) == 0


def test_distances_that_are_not_defined() -> None:
    with pytest.raises(ValueError, match="no models"):
        consensus_distance([])
    with pytest.raises(ValueError, match="different tensors"):
        consensus_distance([{"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)}])


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "agents", "key", "problem"),
    [
        (Torus(), 10, "", "got 10 agents: a torus has at least 3 rows and 3 columns; nearest valid number: 9."),
        (Torus(), 1, "", "got 1 agents: a torus has at least 3 rows and 3 columns; nearest valid number: 9."),
        (Torus(), 14, "", "got 14 agents: a torus has at least 3 rows and 3 columns; nearest valid number: 15."),
        (
            Torus(rows=3),
            103,
            "",
            "got 103 agents: a torus has at least 3 rows and 3 columns; nearest valid number: 102.",
        ),
        (
            Torus(rows=5),
            12,
            "rows",
            "got 5: no torus of 12 agents with sides of at least 3 has rows=5 and columns=null; "
            "nearest valid: rows=4, columns=3.",
        ),
        (
            Torus(rows=3, columns=5),
            12,
            "columns",
            "got 5: no torus of 12 agents with sides of at least 3 has rows=3 and columns=5; "
            "nearest valid: rows=3, columns=4.",
        ),
        (
            Torus(columns=7),
            12,
            "columns",
            "got 7: no torus of 12 agents with sides of at least 3 has rows=null and columns=7; "
            "nearest valid: rows=3, columns=4.",
        ),
        (Bipartite(), 2, "", "got 2 agents: two hubs and at least one leaf; nearest valid number: 3."),
    ],
)
def test_numbers_of_agents_without_such_a_graph(graph: Peers, agents: int, key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        graph.mixing(agents, 0)
    assert (caught.value.key, caught.value.problem) == (key, problem)


def test_the_nearest_number_of_agents_is_valid_and_nearest() -> None:
    valid = [n for n in range(9, 130) if any(n % side == 0 and n // side >= 3 for side in range(3, n))]
    for agents in range(1, 128):
        if agents in valid:
            assert np.prod(Torus().shape(agents)) == agents
            continue
        with pytest.raises(ConfigError) as caught:
            Torus().shape(agents)
        nearest = int(caught.value.problem.split()[-1].rstrip("."))
        assert abs(nearest - agents) == min(abs(n - agents) for n in valid)


@pytest.mark.parametrize("topology", [Ring(), Torus(), Star()])
def test_a_method_on_the_wrong_topology_is_told_the_right_ones(topology: Ring | Torus | Star) -> None:
    federation = helpers.plan("baseline=fedavg").federation
    server, peers = FedAvg(), Gossip()
    right, wrong = (server, peers) if isinstance(topology, Star) else (peers, server)
    check_method(right, federation, topology.name_for(right), "baseline=right")
    check_method(server, federation, Auto().name_for(server), "baseline=fedavg")
    check_method(peers, federation, Auto().name_for(peers), "baseline=gossip")
    with pytest.raises(Unsuitable) as caught:
        check_method(wrong, federation, topology.name_for(wrong), "baseline=wrong")
    assert caught.value.key == "topology"
    assert caught.value.problem == (
        "got star, but baseline=wrong needs peers; valid: auto, bipartite, complete, erdos_renyi, ring, torus."
        if wrong is peers
        else "got peers, but baseline=wrong needs star; valid: auto, star."
    )


def test_the_valid_choices_are_the_files() -> None:
    built = {name: build(yaml.safe_load(file.read_text()), "topology") for name, file in choices("topology").items()}
    for kind, method in (("star", FedAvg()), ("peers", Gossip())):
        assert tuple(name for name, topology in built.items() if topology.name_for(method) == kind) == CHOICES[kind]
    peers = [topology for name, topology in built.items() if name != "star"]
    assert all(topology.mixing(12, 0).shape == (12, 12) for topology in peers)
    assert np.array_equal(built["auto"].mixing(6, 0), Ring().mixing(6, 0))
