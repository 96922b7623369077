"""Mixtures of local and global models: the weights by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybridfl import theory
from hybridfl.merging.averaging import blocks, jackknife, mixed, parabola, plug_in, pooled, squared

# -- weights ---------------------------------------------------------------------------------------------------------


def test_the_plug_in_weight_by_hand() -> None:
    """v = 2, D = 8: a = v / D, the bias is what of D is left, and the benefit D a². A distance below v gives 1."""
    found = plug_in(np.array([2.0, 2.0, 0.0, 3.0]), np.array([8.0, 1.0, 0.0, 0.0]), own=0.0)
    assert found.a.tolist() == [0.25, 1.0, 0.0, 1.0]
    assert found.bias.tolist() == [6.0, 0.0, 0.0, 0.0]
    assert found.benefit.tolist() == [8 * 0.25**2, 2.0, 0.0, 3.0]


def test_own_data_in_the_global_model_ask_for_more_of_it() -> None:
    """F3: a = (1 - w) v / D, at the same benefit as on the others' model, whose distance is D / (1 - w)²."""
    v, D, w = np.array([2.0]), np.array([8.0]), 0.25
    with_own, without = plug_in(v, D, w), plug_in(v, D / (1 - w) ** 2, 0.0)
    assert with_own.a[0] == pytest.approx(0.75 * 2 / 8)
    assert with_own.a[0] == pytest.approx(theory.own_data_weight(without.a[0], w))
    assert with_own.benefit[0] == pytest.approx(without.benefit[0])


def test_a_largest_weight_and_what_it_costs() -> None:
    """a* = 1/2 and D = 4; at a = 1/4 the benefit is D a (2 a* - a) = 4 · 1/4 · 3/4."""
    found = plug_in(np.array([2.0]), np.array([4.0]), 0.0, a_max=0.25)
    assert (found.a[0], found.benefit[0]) == (0.25, 0.75)


def test_pooled_weights_by_hand() -> None:
    """Two clients of equal n: O is the other, v_O its v, and the factor of t² is 2.

    D - v - v_O is 7 and 3, so t² = 5 / 2 and E D = 1 + 2 + 5 = 8 for both.
    """
    first, second = pooled(np.array([[1.0], [2.0]]), np.array([[10.0], [6.0]]), [5, 5], [0.0, 0.0])
    assert first.a[0] == pytest.approx(1 / 8)
    assert second.a[0] == pytest.approx(2 / 8)
    assert first.bias[0] == second.bias[0] == pytest.approx(5.0)
    assert first.benefit[0] == pytest.approx(8 * (1 / 8) ** 2)


def test_pooled_weights_of_unequal_clients_by_hand() -> None:
    """n = 1, 1, 2. Shares of the others: (1/3, 2/3), (1/3, 2/3), (1/2, 1/2); t² is 0, so a = v / (v + Σ s² v)."""
    v = np.array([[9.0], [9.0], [9.0]])
    found = pooled(v, np.ones((3, 1)), [1, 1, 2], [0.0, 0.0, 0.0])
    expected = [9 / (9 + 5), 9 / (9 + 5), 9 / (9 + 4.5)]
    assert [w.a[0] for w in found] == pytest.approx(expected)


def test_the_variance_between_unequal_clients_by_hand() -> None:
    """As above with D - v - Σ s² v = 16, 16, 14, whose mean is t² times the mean of 14/9, 14/9 and 3/2."""
    found = pooled(np.full((3, 1), 9.0), np.array([[30.0], [30.0], [27.5]]), [1, 1, 2], [0.0, 0.0, 0.0])
    t2 = (46 / 3) / (83 / 54)
    assert [w.bias[0] for w in found] == pytest.approx([t2 * 14 / 9, t2 * 14 / 9, t2 * 3 / 2])
    assert found[2].a[0] == pytest.approx(9 / (13.5 + t2 * 3 / 2))


def test_pooled_weights_of_means_are_those_of_the_theory() -> None:
    """Blocks of one number, equal n, and for G the mean of all, own data in it with w = 1/K."""
    rng = np.random.default_rng(0)
    for scale in (0.1, 1.0, 3.0):
        L, v = scale * rng.normal(size=6), rng.uniform(0.5, 1.5, size=6)
        G = L.mean()
        found = pooled(v[:, None], ((L - G) ** 2)[:, None], [7] * 6, [1 / 6] * 6)
        on_others = theory.pooled_weight(v, L)
        expected = np.minimum(theory.own_data_weight(on_others, 1 / 6), 1)
        assert np.array([w.a[0] for w in found]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [1, 3])
def test_the_jackknife_of_a_mean_is_its_variance(size: int) -> None:
    """Of n/size groups left out one at a time: the variance of the groups' means over their number, without bias."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 2)))
    groups = x.reshape(12 // size, size, 2)
    without = [torch.cat([groups[:i], groups[i + 1 :]]).mean((0, 1)) for i in range(len(groups))]
    found = sum(squared(vector, None, [["m"]])[0] for vector in jackknife([{"m": mean} for mean in without]))
    assert found == pytest.approx(float(groups.mean(1).var(0).sum()) / len(groups))


def test_the_jackknife_of_two_parts_is_a_quarter_of_their_squared_distance() -> None:
    one, other = {"a": torch.tensor([1.0, 5.0])}, {"a": torch.tensor([3.0, 2.0])}
    found = [float(squared(vector, None, [["a"]])[0]) for vector in jackknife([one, other])]
    assert found == pytest.approx([13 / 8, 13 / 8])


def test_the_parabola_through_three_losses() -> None:
    def f(a: float) -> float:
        return 3 * (a - 0.3) ** 2 + 1

    a, gain = parabola(f(0), f(0.5), f(1))
    assert (a, gain) == (pytest.approx(0.3), pytest.approx(f(0) - f(0.3)))
    a, gain = parabola(f(0), f(0.5), f(1), a_max=0.2)
    assert (a, gain) == (0.2, pytest.approx(f(0) - f(0.2)))
    assert parabola(0.0, 1.0, 4.0)[0] == 0.0  # least at 0
    assert parabola(9.0, 4.0, 1.0)[0] == 1.0  # and beyond 1
    assert parabola(1.0, 2.0, 1.5) == (0.0, 0.0)  # opens downwards
    assert parabola(1.5, 2.0, 1.0) == (1.0, pytest.approx(0.5))


def test_blocks_are_modules() -> None:
    names = ("a.weight", "a.bias", "head.weight", "head.bias")
    params = {name: torch.zeros(2) for name in names}
    assert blocks(params, "model") == [list(names)]
    assert blocks(params, "layer") == [list(names[:2]), list(names[2:])]


def test_squared_lengths_and_mixtures_by_block() -> None:
    delta = {"a.weight": torch.tensor([1.0, 2.0]), "a.bias": torch.tensor([3.0]), "b.weight": torch.tensor([4.0])}
    groups = blocks(delta, "layer")
    metric = {"a.weight": torch.tensor([1.0, 10.0]), "a.bias": torch.tensor([0.0]), "b.weight": torch.tensor([0.5])}
    assert squared(delta, None, groups).tolist() == [14.0, 16.0]
    assert squared(delta, metric, groups).tolist() == [41.0, 8.0]
    zero = {name: torch.zeros_like(tensor) for name, tensor in delta.items()}
    half = mixed(delta, zero, np.array([0.25, 1.0]), groups)
    assert [half[name].tolist() for name in delta] == [[0.75, 1.5], [2.25], [0.0]]
