"""Optimal averaging in closed form against simulated data, and the identities between the formulas."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from hybridfl import theory as T
from hybridfl.theory import Array, Moments

DRAWS = 200_000
N = np.array([5, 8, 12, 6])
MU = np.array([0.0, 0.3, -0.2, 0.5])
SD = np.array([1.0, 0.7, 1.3, 0.4])
RATES = np.array([0.3, 0.45, 0.2, 0.6])
WEIGHTS = np.array([0, 0.15, 0.3, 0.5, 0.7, 1.0, 1.3, 1.7])

Draw = Callable[[np.random.Generator, int], Array]
"""Samples ``(DRAWS, n_i)`` of client i."""
SAMPLES: dict[str, tuple[Draw, Array, Array]] = {
    "gaussian": (lambda rng, i: MU[i] + SD[i] * rng.standard_normal((DRAWS, N[i])), MU, SD**2),
    "shifted exponential": (
        lambda rng, i: MU[i] - SD[i] + SD[i] * rng.standard_exponential((DRAWS, N[i])),
        MU,
        SD**2,
    ),
    "t5": (lambda rng, i: MU[i] + SD[i] * rng.standard_t(5, (DRAWS, N[i])), MU, SD**2 * 5 / 3),
    "bernoulli": (lambda rng, i: rng.random((DRAWS, N[i])) < RATES[i], RATES, RATES * (1 - RATES)),
}


@pytest.fixture(scope="module", params=SAMPLES)
def simulated(request: pytest.FixtureRequest) -> tuple[Array, Array, Array]:
    """The four clients' means ``(DRAWS, 4)``, and the true means and variances of their data."""
    draw, mu, s2 = SAMPLES[request.param]
    rng = np.random.default_rng(list(SAMPLES).index(request.param))
    return np.stack([draw(rng, i).mean(1) for i in range(4)], axis=1), mu, s2


def setting(simulated: tuple[Array, Array, Array], i: int, own: bool) -> tuple[Array, Array, Array, float, Moments]:
    """L - μ_i, G - μ_i and a of T by plain simulation; v_L and the moments of G by formula."""
    means, mu, s2 = simulated
    weights = N / N.sum() if own else np.where(np.arange(4) == i, 0, N) / (N.sum() - N[i])
    v_L, others = s2[i] / N[i], T.others_mean(N, mu, s2)
    v_O, d_O = others.v_G[i], others.d[i]
    moments = T.with_own_data(N[i] / N.sum(), v_L, v_O, d_O) if own else Moments(v_O, d_O, 0.0)
    return means[:, i] - mu[i], means @ weights - mu[i], WEIGHTS, v_L, moments


# -- F1 to F4, F7 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["others", "own data inside"])
@pytest.mark.parametrize("i", range(4))
def test_the_risk_is_what_simulation_gives(simulated: tuple[Array, Array, Array], i: int, own: bool) -> None:
    L, G, a, v_L, moments = setting(simulated, i, own)
    expected = T.risk(a, v_L, *moments)
    seen = np.array([np.mean(((1 - weight) * L + weight * G) ** 2) for weight in a])
    assert np.abs(seen - expected).max() < 0.01 * expected.max()
    assert T.squared_distance(v_L, *moments) == pytest.approx(np.mean((L - G) ** 2), rel=0.01)


@pytest.mark.parametrize("own", [False, True], ids=["others", "own data inside"])
@pytest.mark.parametrize("i", range(4))
def test_the_optimum_and_the_sign_change(simulated: tuple[Array, Array, Array], i: int, own: bool) -> None:
    L, G, _, v_L, moments = setting(simulated, i, own)
    a_star = T.optimal_weight(v_L, *moments)
    fine = np.linspace(0, 2.5, 2501)
    A, B = np.mean((G - L) ** 2), np.mean(L * (G - L))  # the simulated risk is mean(L²) + 2aB + a²A
    assert fine[np.argmin(2 * fine * B + fine**2 * A)] == pytest.approx(a_star, abs=0.006)

    def gain(a: float) -> float:
        return float(np.mean(L**2 - ((1 - a) * L + a * G) ** 2))

    D = T.squared_distance(v_L, *moments)
    assert gain(0.95 * 2 * a_star) > 0 > gain(1.05 * 2 * a_star)
    assert gain(a_star) == pytest.approx(T.benefit(a_star, a_star, D), abs=0.01 * v_L)
    assert T.benefit(2 * a_star, a_star, D) == 0
    assert T.benefit(1.99 * a_star, a_star, D) > 0 > T.benefit(2.01 * a_star, a_star, D)


def test_moments_of_the_mean_of_others_by_hand() -> None:
    moments = T.others_mean(np.array([1, 2, 3]), np.array([0.0, 6.0, 12.0]), np.array([1.0, 4.0, 9.0]))
    assert moments.v_G == pytest.approx([(2 * 4 + 3 * 9) / 25, (1 * 1 + 3 * 9) / 16, (1 * 1 + 2 * 4) / 9])
    assert moments.d == pytest.approx([(2 * 6 + 3 * 12) / 5, (3 * 12) / 4 - 6, (2 * 6) / 3 - 12])
    assert np.array_equal(moments.c, np.zeros(3))


# -- identities ------------------------------------------------------------------------------------------------------

GRID = np.random.default_rng(0).uniform(0.1, 2, (4, 200)) * np.array([[1], [1], [1], [0.45]])


def test_benefit_is_the_difference_of_two_risks() -> None:
    v_L, v_G, d, a = GRID
    c = 0.6 * np.sqrt(v_L * v_G)
    a_star, D = T.optimal_weight(v_L, v_G, d, c), T.squared_distance(v_L, v_G, d, c)
    expected = T.risk(0.0, v_L, v_G, d, c) - T.risk(a, v_L, v_G, d, c)
    assert T.benefit(a, a_star, D) == pytest.approx(expected, abs=1e-12)
    assert T.benefit(a_star, a_star, D) == pytest.approx((v_L - c) * a_star)
    assert T.benefit_fraction(a / a_star) == pytest.approx(T.benefit(a, a_star, D) / T.benefit(a_star, a_star, D))


def test_own_data_inside_change_the_weight_and_not_the_best_risk() -> None:
    v_L, v_O, d_O, w = GRID
    loo, moments = T.optimal_weight(v_L, v_O, d_O), T.with_own_data(w, v_L, v_O, d_O)
    inclusive = T.optimal_weight(v_L, *moments)
    assert inclusive == pytest.approx(loo / (1 - w))
    assert T.own_data_weight(loo, w) == pytest.approx(inclusive)
    assert inclusive == pytest.approx((1 - w) * v_L / T.squared_distance(v_L, *moments))
    assert T.risk(inclusive, v_L, *moments) == pytest.approx(T.risk(loo, v_L, v_O, d_O))
    assert (inclusive > 1).any()  # where the client deserves less than w


def test_relative_benefit_is_benefit_over_the_local_variance() -> None:
    v_L, v_G, d, a = GRID
    a_star, D = T.optimal_weight(v_L, v_G, d), T.squared_distance(v_L, v_G, d)
    assert T.relative_benefit(a, a_star) == pytest.approx(T.benefit(a, a_star, D) / v_L, abs=1e-12)
    assert T.relative_benefit(a_star, a_star) == pytest.approx(a_star)
    assert T.relative_benefit(1.0, a_star) == pytest.approx(2 - 1 / a_star)
    assert T.risk(a_star, v_L, v_G, d) == pytest.approx((1 - a_star) * v_L)


def test_global_beats_local_exactly_above_one_half() -> None:
    assert T.optimal_weight(3.0, 1.0, np.sqrt(2)) == pytest.approx(0.5)
    assert T.benefit(1.0, 0.5, 6.0) == 0
    assert T.relative_benefit(1.0, 0.51) > 0 > T.relative_benefit(1.0, 0.49)


def test_the_optimal_weight_is_positive_exactly_with_local_variance() -> None:
    assert T.optimal_weight(1e-12, 1.0, 100.0) > 0
    assert T.optimal_weight(0.0, 1.0, 1.0) == 0
    assert T.optimal_weight(2.0, 0.0, 0.0) == 1
    assert T.optimal_weight(2.0, 1.0, 1.0) == 0.5


def test_the_best_risk_of_a_precise_estimator_with_and_without_bias() -> None:
    for d, share in ((0.0, 0.05), (3.0, 0.99)):
        assert T.risk(T.optimal_weight(0.1, 0.005, d), 0.1, 0.005, d) / 0.1 == pytest.approx(share, abs=0.003)


def test_no_variance_anywhere_gives_the_weight_zero() -> None:
    assert T.optimal_weight(0.0, 0.0) == 0
    assert T.optimal_weight(1.0, 1.0, 0.0, 1.0) == 0  # G is L
    assert T.raw_weight(0.0, 0.0) == T.moment_weight(0.0, 0.0, 0.0) == 0
    assert np.array_equal(T.pooled_weight(np.zeros(3), np.ones(3)), np.zeros(3))
    assert np.array_equal(T.random_effects_weight(np.array([1, 2]), 0.0, 0.0), np.zeros(2))
    assert T.block_weight(np.zeros((2, 2)), np.zeros((2, 2)), np.zeros(2)) == (0, 0)
    assert T.relative_benefit(0.0, 0.0) == 0
    assert T.relative_benefit(np.array([0.0, 0.5]), 0.0).tolist() == [0, -np.inf]


def test_numbers_give_numbers_and_arrays_arrays() -> None:
    numbers = [
        T.optimal_weight(1.0, 1.0),
        T.risk(0.5, 1.0, 1.0),
        T.relative_benefit(0.5, 0.5),
        T.moment_weight(1.0, 1.0, 1.0),
        T.block_weight(np.eye(1), np.eye(1), np.zeros(1))[0],
    ]
    assert all(isinstance(number, float) for number in numbers)
    assert T.risk(WEIGHTS[:, None], 1.0, np.ones(3)).shape == (8, 3)
    assert T.optimal_weight(np.ones((2, 1)), np.ones(3)).shape == (2, 3)


# -- F6 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "fraction"), [(0.25, 0.4375), (0.5, 0.75), (1, 1), (1.5, 0.75), (2, 0), (2.5, -1.25)])
def test_a_wrong_weight_costs_a_known_fraction(k: float, fraction: float) -> None:
    assert T.benefit_fraction(k) == fraction


def test_an_independent_estimate_of_the_weight(simulated: tuple[Array, Array, Array]) -> None:
    L, G, _, v_L, moments = setting(simulated, 0, own=False)
    a_star, D = T.optimal_weight(v_L, *moments), T.squared_distance(v_L, *moments)
    estimate = a_star * np.random.default_rng(7).gamma(4, 0.3, DRAWS)  # biased, standard deviation 0.6
    gained = np.mean(L**2 - ((1 - estimate) * L + estimate * G) ** 2) / T.benefit(a_star, a_star, D)
    rmse = np.sqrt(0.2**2 + 0.6**2)
    assert gained == pytest.approx(T.expected_benefit_fraction(rmse), abs=0.03)
    assert T.expected_benefit_fraction(1.0) == 0


# -- F8 --------------------------------------------------------------------------------------------------------------


def test_random_effects_agree_with_the_optimal_weight() -> None:
    t2, m = 0.3, 1.7
    for i, seen in enumerate(T.random_effects_weight(N, t2, m)):
        rest = np.delete(N, i)
        d2 = t2 * (1 + (rest**2).sum() / rest.sum() ** 2)  # E[d_O²] over the draws of the means
        moments = T.with_own_data(N[i] / N.sum(), m / N[i], m / rest.sum(), np.sqrt(d2))
        assert seen == pytest.approx(T.optimal_weight(m / N[i], *moments))


def test_random_effects_by_simulation() -> None:
    rng, t, m = np.random.default_rng(5), 0.4, 1.0
    mu = rng.normal(0, t, (DRAWS, 4))
    means = mu + rng.normal(0, np.sqrt(m / N), (DRAWS, 4))
    G = means @ (N / N.sum())
    for i, a in enumerate(T.random_effects_weight(N, t**2, m)):
        delta = G - means[:, i]
        assert -np.mean((means[:, i] - mu[:, i]) * delta) / np.mean(delta**2) == pytest.approx(a, abs=0.006)


def test_equal_clients_without_differences_all_take_the_mean() -> None:
    assert T.random_effects_weight(np.array([7, 7, 7]), 0.0, 2.0) == pytest.approx(np.ones(3))
    assert T.random_effects_weight(np.array([7, 7, 7]), 1e12, 2.0) == pytest.approx(np.zeros(3), abs=1e-9)


# -- estimators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "expected"), [(0, 0.37), (0.2, 0.59), (0.5, 1.25), (1, 1.39), (3, 1.04)])
def test_one_distance_cannot_tell_bias_from_noise(d: float, expected: float) -> None:
    """Risk over local risk of the moment estimator at v_L = 0.1, v_G = 0.005, with v_L estimated from 30 samples."""
    rng, v_L, v_G = np.random.default_rng(3), 0.1, 0.005
    L, G = np.sqrt(v_L) * rng.standard_normal(500_000), d + np.sqrt(v_G) * rng.standard_normal(500_000)
    v_hat = v_L * rng.chisquare(29, 500_000) / 29

    def ratio(a: Array) -> float:
        return float(np.mean(((1 - a) * L + a * G) ** 2) / v_L)

    moment, raw = T.moment_weight(v_hat, v_G, L - G), T.raw_weight(v_hat, L - G)
    assert ratio(moment) == pytest.approx(expected, abs=0.012)
    assert ratio(moment) < ratio(raw) + 0.001
    assert T.risk(T.optimal_weight(v_L, v_G, d), v_L, v_G, d) < v_L  # known moments help all the same


@pytest.mark.parametrize(
    ("t2", "pooled", "alone"),
    [(0, 0.09, 0.40), (0.02, 0.25, 0.50), (0.1, 0.58, 0.75), (0.5, 0.86, 1.04), (2, 0.96, 1.11)],
)
def test_pooling_over_clients_is_never_worse_than_local(t2: float, pooled: float, alone: float) -> None:
    """Risk over local risk of 20 clients with 10 samples each of variance 1, clients' means of variance t²."""
    rng, K = np.random.default_rng(4), 20
    mu = rng.normal(0, np.sqrt(t2), (10_000, K))
    L = mu + np.sqrt(0.1) * rng.standard_normal((10_000, K))
    v = 0.1 * rng.chisquare(9, (10_000, K)) / 9
    G = (L.sum(1, keepdims=True) - L) / (K - 1)

    def ratio(a: Array) -> float:
        return float(np.mean(((1 - a) * L + a * G - mu) ** 2) / 0.1)

    shared = T.pooled_weight(v.mean(1, keepdims=True), L)
    assert ratio(shared) == pytest.approx(pooled, abs=0.012)
    assert ratio(T.moment_weight(v, v / (K - 1), L - G)) == pytest.approx(alone, abs=0.015)


def test_estimates_by_hand() -> None:
    assert T.raw_weight(1.0, 2.0) == 0.25
    assert T.raw_weight(1.0, 0.0) == T.raw_weight(1.0, 0.5) == 1
    assert T.moment_weight(1.0, 1.0, 0.0) == 0.5
    assert T.moment_weight(1.0, 1.0, 4.0) == 1 / 16
    # Var(0, 2, 4) = 4, less the mean variance 1: t² = 3. Client 0: v_G = 2/4, weight 1 / (1 + 1/2 + 3 · 3/2).
    assert T.pooled_weight(np.ones(3), np.array([0.0, 2.0, 4.0])) == pytest.approx(np.full(3, 1 / 6))
    # t² = 0; client 1: v_G = (1 + 3) / 4.
    assert T.pooled_weight(np.array([1.0, 2.0, 3.0]), np.zeros(3)) == pytest.approx([1 / 2.25, 2 / 3, 3 / 3.75])


# -- vectors ---------------------------------------------------------------------------------------------------------


def random_covariance(rng: np.random.Generator, size: int) -> Array:
    root = rng.normal(size=(size, size))
    return root @ root.T


def test_a_block_by_simulation() -> None:
    rng, p = np.random.default_rng(6), 6
    joint, H, d = random_covariance(rng, 2 * p), random_covariance(rng, p), rng.normal(size=p)
    noise = rng.multivariate_normal(np.zeros(2 * p), joint, 100_000)
    L, G = noise[:, :p], noise[:, p:] + d
    V, V_G, C = joint[:p, :p], joint[p:, p:], joint[:p, p:]
    a, D = T.block_weight(V, V_G, d, C, H)
    delta = L - G
    assert np.mean(np.sum(delta @ H * delta, axis=1)) == pytest.approx(D, rel=0.01)
    assert np.mean(np.sum(L @ H * delta, axis=1)) / np.mean(np.sum(delta @ H * delta, axis=1)) == pytest.approx(
        a, abs=0.01
    )


def test_a_block_of_one_and_a_block_of_equal_coordinates_are_the_scalar_case() -> None:
    one, D = T.block_weight(np.array([[2.0]]), np.array([[1.0]]), np.array([0.5]), np.array([[0.3]]))
    assert one == pytest.approx(T.optimal_weight(2.0, 1.0, 0.5, 0.3))
    assert pytest.approx(T.squared_distance(2.0, 1.0, 0.5, 0.3)) == D
    many, _ = T.block_weight(2 * np.eye(5), np.eye(5), np.full(5, 0.5), 0.3 * np.eye(5), 7 * np.eye(5))
    assert many == pytest.approx(one)


def test_coordinate_weights_are_better_than_one_for_all_and_this_better_than_none() -> None:
    v_L, v_G, d = np.array([1.0, 2.0, 0.1]), np.array([0.5, 0.1, 3.0]), np.array([0.0, 1.0, 2.0])
    a, D = T.block_weight(np.diag(v_L), np.diag(v_G), d)
    each = T.risk(T.optimal_weight(v_L, v_G, d), v_L, v_G, d).sum()
    together = T.risk(a, v_L, v_G, d).sum()
    assert each < together < v_L.sum()
    assert v_L.sum() - together == pytest.approx(T.benefit(a, a, D))


# -- impossible input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: T.risk(0.5, -1.0, 1.0), "v_L: got -1: must be at least 0"),
        (lambda: T.optimal_weight(1.0, np.array([1.0, -2.0])), "v_G: got -2: must be at least 0"),
        (lambda: T.squared_distance(1.0, 1.0, c=-1.001), "c: got -1.001: a covariance is at most"),
        (lambda: T.optimal_weight(1.0, 1.0, np.array([0.0, np.nan])), "d: got .*nan.*: must be finite"),
        (lambda: T.risk(np.inf, 1.0, 1.0), "a: got inf: must be finite"),
        (lambda: T.with_own_data(1.0, 1.0, 1.0), "w: got 1: must be below 1"),
        (lambda: T.own_data_weight(0.5, -0.1), "w: got -0.1: must be at least 0"),
        (lambda: T.with_own_data(0.5, 1.0, -1.0), "v_O: got -1"),
        (lambda: T.benefit(0.5, 0.5, -1.0), "D: got -1"),
        (lambda: T.relative_benefit(0.5, 1.5), "a_star: got 1.5: must be at most 1"),
        (lambda: T.expected_benefit_fraction(-1.0), "relative_rmse: got -1"),
        (lambda: T.others_mean(np.array([3]), np.zeros(1), np.ones(1)), "n: .* at least two clients"),
        (lambda: T.others_mean(np.array([3, 0]), np.zeros(2), np.ones(2)), "n: .* positive"),
        (lambda: T.others_mean(np.array([3, 4]), np.zeros(2), -np.ones(2)), "s2: got -1"),
        (lambda: T.random_effects_weight(np.array([3, 4]), -1.0, 1.0), "t2: got -1"),
        (lambda: T.random_effects_weight(np.array([3, 4]), 1.0, -1.0), "m: got -1"),
        (lambda: T.raw_weight(-1.0, 1.0), "v_L: got -1"),
        (lambda: T.moment_weight(1.0, -1.0, 1.0), "v_G: got -1"),
        (lambda: T.pooled_weight(np.ones(1), np.ones(1)), "L: .* at least two clients"),
        (lambda: T.pooled_weight(-np.ones(2), np.ones(2)), "v: got -1"),
        (lambda: T.block_weight(-np.eye(2), np.eye(2), np.zeros(2)), "V: must be a symmetric"),
        (lambda: T.block_weight(np.eye(2), np.eye(2), np.zeros(2), H=np.array([[1.0, 1.0], [0.0, 1.0]])), "H: must be"),
    ],
)
def test_impossible_input_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_the_formulas_need_no_torch() -> None:
    code = "import sys, hybridfl.theory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
