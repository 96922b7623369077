"""When to mix a local with a global model, and how much: closed forms for scalar mean estimation.

Grimberg, Hartley, Karimireddy, Jaggi 2021, arXiv 2110.12946, claim that some positive weight on the global model
lowers the expected squared error of a local one whose variance is not zero (C1), that the benefit is a function of the
weight used and the optimal weight (C2), and leave vectors to future work (C3). Only abstract and first page were at
hand: every formula here is derived from what these claims require, none is a theorem of the paper by number.

Symbols. Client i has n_i independent samples of mean μ_i and finite variance s_i². L is their mean, unbiased, with
v_L = Var L = s_i²/n_i. G is any estimator with finite variance v_G = Var G, c = Cov(L, G) and bias d = E[G] - μ_i for
this client. D = E[(L - G)²]. The mixture is T(a) = (1 - a) L + a G: the weight a is on the global model. Nothing is
assumed about shapes, equal variances or where the clients come from. v_L is the variance over redrawn data sets, not
over the noise of an optimiser.

Arguments are numbers or arrays that broadcast; the result has the broadcast shape. Impossible values are a ValueError
that names the argument. Where L and G never differ every weight is as good as any other; the optimal one is given as 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Real = float | Array


class Moments(NamedTuple):
    """What is asked of a global estimator: variance ``v_G``, bias ``d`` for the client, covariance ``c`` with its L."""

    v_G: Real
    d: Real
    c: Real


def squared_distance(v_L: Real, v_G: Real, d: Real = 0.0, c: Real = 0.0) -> Real:
    """D = E[(L - G)²] = v_L + v_G - 2c + d². Assumes E[L] = μ_i and finite second moments."""
    v_L, v_G, d, c = _moments(v_L, v_G, d, c)
    return v_L + v_G - 2 * c + d**2


def risk(a: Real, v_L: Real, v_G: Real, d: Real = 0.0, c: Real = 0.0) -> Real:
    """F1: E[(T(a) - μ_i)²] = (1 - a)² v_L + a² (v_G + d²) + 2a(1 - a) c, a parabola of curvature D.

    Assumes E[L] = μ_i and finite second moments; G may contain the client's own data, with their c.
    """
    a = _real("a", a)
    v_L, v_G, d, c = _moments(v_L, v_G, d, c)
    return (1 - a) ** 2 * v_L + a**2 * (v_G + d**2) + 2 * a * (1 - a) * c


def optimal_weight(v_L: Real, v_G: Real, d: Real = 0.0, c: Real = 0.0) -> Real:
    """F2: a* = (v_L - c) / D, where :func:`risk` is least.

    Assumes E[L] = μ_i and finite second moments. With c = 0, that is G independent of the client's samples, it is
    v_L / (v_L + v_G + d²): within [0, 1], and positive exactly if v_L is (C1). With c it may leave [0, 1].

    For vectors with a diagonal curvature it holds for each coordinate (extension M2): give arrays of the diagonals.
    """
    v_L, v_G, d, c = _moments(v_L, v_G, d, c)
    return _ratio(v_L - c, v_L + v_G - 2 * c + d**2)


def with_own_data(w: Real, v_L: Real, v_O: Real, d_O: Real = 0.0) -> Moments:
    """F3: the moments of G = w L + (1 - w) O, a global estimator that contains the client's own data.

    Assumes O, of variance v_O and bias d_O, independent of the client's samples. Then c = w v_L.

    Args:
        w: weight of the client's own mean in G, 0 ≤ w < 1.
    """
    w = _weight_of_own_data(w)
    v_L, v_O, d_O = _real("v_L", v_L, 0), _real("v_O", v_O, 0), _real("d_O", d_O)
    return Moments(w**2 * v_L + (1 - w) ** 2 * v_O, (1 - w) * d_O, w * v_L)


def own_data_weight(a: Real, w: Real) -> Real:
    """F3: the weight a / (1 - w) on G = w L + (1 - w) O gives the same mixture as the weight a on O.

    So a*_incl = a*_loo / (1 - w), at the same risk. It exceeds 1 where the client deserves less than the weight w.
    """
    return _real("a", a) / (1 - _weight_of_own_data(w))


def benefit(a: Real, a_star: Real, D: Real) -> Real:
    """F4 (C2): risk(0) - risk(a) = D a (2a* - a).

    Positive exactly for a between 0 and 2a*, largest at a*: D a*². Assumptions are those of :func:`optimal_weight`.

    Args:
        a_star: the optimal weight.
        D: E[(L - G)²], of :func:`squared_distance`.
    """
    a, a_star, D = _real("a", a), _real("a_star", a_star), _real("D", D, 0)
    return D * a * (2 * a_star - a)


def relative_benefit(a: Real, a_star: Real) -> Real:
    """F5: benefit / v_L = 2a - a²/a*, the share of the local error that mixing removes.

    Assumes c = 0: G is independent of the client's samples, so 0 ≤ a* ≤ 1. At a* it is a*, at 1 it is 2 - 1/a*. A
    local model without variance (a* = 0) can only lose: -∞, and 0 at a = 0.
    """
    a, a_star = _real("a", a), _real("a_star", a_star, 0, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = np.where(a == 0, 0.0, a**2 / a_star)
    return 2 * a - lost


def benefit_fraction(k: Real) -> Real:
    """F6: the weight k a* brings k (2 - k) of the largest benefit, with or without own data in G.

    Any positive weight below a* helps, so a lower bound of a* is safe; beyond 2a* mixing does harm.
    """
    k = _real("k", k)
    return k * (2 - k)


def expected_benefit_fraction(relative_rmse: Real) -> Real:
    """F6: an estimated weight â brings 1 - E[(â/a* - 1)²] of the largest benefit on average.

    Assumes â independent of L and G, which estimates from the same data are not.

    Args:
        relative_rmse: sqrt(E[(â/a* - 1)²]).
    """
    return 1 - _real("relative_rmse", relative_rmse, 0) ** 2


def others_mean(n: Array, mu: Array, s2: Array) -> Moments:
    """F7: for every client, the moments of the n-weighted mean of the others' samples, which leaves its own out.

    v_G = Σ_{j≠i} n_j s_j² / N_-i², d = Σ_{j≠i} n_j (μ_j - μ_i) / N_-i with N_-i = Σ_{j≠i} n_j, and c = 0. Assumes
    samples that are independent between clients and finite variances. For the mean over all clients, own data inside,
    pass the result on to :func:`with_own_data` with w = n_i / N.

    Args:
        n, mu, s2: samples, means and variances of the clients' data, ``(K,)``, K ≥ 2.
    """
    shares = _others(n) / _others(n).sum(1, keepdims=True)
    mu, s2 = _real("mu", mu), _real("s2", s2, 0)
    return Moments(shares**2 @ (s2 / n), shares @ mu - mu, np.zeros(len(shares)))


def random_effects_weight(n: Array, t2: float, m: float) -> Array:
    """F8: for every client, the optimal weight on the n-weighted mean over all clients, its own data inside.

    Clients' means are independent draws of variance t², noise is m = E[s²] a sample; the risk is averaged over both.
    a* = 1 - w*, where w* = b / (b + m (N - n_i) / (n_i N)) is the weight on the local mean and
    b = t² (Σ_{j≠i} n_j² + (N - n_i)²) / N²: the coarse-grained weights of Donahue and Kleinberg 2021, arXiv 2010.00753,
    recalled, not looked up; they agree with F2.

    Args:
        n: samples of the clients, ``(K,)``, K ≥ 2.
    """
    others = _others(n)
    total, rest = float(np.sum(n)), others.sum(1)
    b = _real("t2", t2, 0) * ((others**2).sum(1) + rest**2) / total**2
    noise = _real("m", m, 0) * rest / (np.asarray(n) * total)
    return np.asarray(_ratio(noise, b + noise))


def raw_weight(v_L: Real, delta: Real) -> Real:
    """min(1, v_L / (L - G)²): F2 with the squared distance of one draw, which is unbiased for D.

    Assumes G without the client's own data. C1 does not survive it in one dimension: one distance cannot tell bias
    from noise. Next to a precise G the mixture is worse than L from about d = 1.2 standard deviations of L on.

    Args:
        v_L: an unbiased estimate of Var L, the sample variance over n.
        delta: L - G.
    """
    return moment_weight(v_L, 0.0, delta)


def moment_weight(v_L: Real, v_G: Real, delta: Real) -> Real:
    """v_L / max((L - G)², v_L + v_G): d² is estimated as the positive part of (L - G)² - v_L - v_G.

    At most v_L / (v_L + v_G). Assumptions and warning as for :func:`raw_weight`.
    """
    v_L, v_G, delta = _real("v_L", v_L, 0), _real("v_G", v_G, 0), _real("delta", delta)
    return _ratio(v_L, np.maximum(delta**2, v_L + v_G))


def pooled_weight(v: Array, L: Array) -> Array:
    """For every client, v_i / (v_i + v_G + t² (1 + 1/(K - 1))) with one t² for all, v_G = Σ_{j≠i} v_j / (K - 1)².

    t² = max(0, Var_k(L_k) - mean_k v_k), the moment estimate of the variance between clients (analysis of variance;
    DerSimonian and Laird 1986 for equal n). Assumes clients' means that are independent draws of one distribution,
    about equal n, and for G the plain mean of the other clients' L.

    Args:
        v: estimates of Var L_k, ``(…, K)``; their mean over k for all where variances are alike.
        L: the clients' means, ``(…, K)``, K ≥ 2.
    """
    v, L = np.broadcast_arrays(_real("v", v, 0), _real("L", L))
    others = v.shape[-1] - 1 if v.ndim else 0
    if others < 1:
        raise ValueError(f"L: got shape {v.shape}: needs at least two clients in the last dimension")
    t2 = np.maximum(0, L.var(-1, ddof=1, keepdims=True) - v.mean(-1, keepdims=True))
    v_G = (v.sum(-1, keepdims=True) - v) / others**2
    return np.asarray(_ratio(v, v + v_G + t2 * (1 + 1 / others)))


def block_weight(V: Array, V_G: Array, d: Array, C: Array | None = None, H: Array | None = None) -> tuple[float, float]:
    """Extension M1: one weight for vectors, a* = tr[H (V - C)] / D with D = E[Δ'HΔ], Δ = L - G; gives a* and D.

    The excess risk is E[(T(a) - μ)' H (T(a) - μ)], its benefit :func:`benefit` of a* and D. Assumes E[L] = μ and finite
    second moments.

    Args:
        V, V_G: covariances of L and G, ``(p, p)``.
        d: bias of G, ``(p,)``.
        C: Cov(L, G), ``(p, p)``; None is 0: G without the client's own data.
        H: curvature of the loss, ``(p, p)``, symmetric and positive semidefinite; None is the identity.
    """
    V, V_G, d = _covariance("V", V), _covariance("V_G", V_G), _real("d", d)
    C = np.zeros_like(V) if C is None else _real("C", C)
    H = np.eye(len(V)) if H is None else _covariance("H", H)
    D = np.trace(H @ (V + V_G - C - C.T)) + d @ H @ d
    return float(_ratio(np.trace(H @ (V - C)), D)), float(D)


def _real(name: str, value: Real, low: float | None = None, high: float | None = None) -> Array:
    array = np.asarray(value, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: got {value}: must be finite")
    if low is not None and (array < low).any():
        raise ValueError(f"{name}: got {array.min():g}: must be at least {low:g}")
    if high is not None and (array > high).any():
        raise ValueError(f"{name}: got {array.max():g}: must be at most {high:g}")
    return array


def _moments(v_L: Real, v_G: Real, d: Real, c: Real) -> tuple[Array, Array, Array, Array]:
    v_L, v_G, d, c = _real("v_L", v_L, 0), _real("v_G", v_G, 0), _real("d", d), _real("c", c)
    if (c**2 > v_L * v_G * (1 + 1e-9)).any():  # Cauchy and Schwarz, up to rounding
        raise ValueError(f"c: got {c}: a covariance is at most sqrt(v_L v_G) in modulus")
    return v_L, v_G, d, c


def _weight_of_own_data(w: Real) -> Array:
    array = _real("w", w, 0)
    if (array >= 1).any():
        raise ValueError(f"w: got {array.max():g}: must be below 1, or G is the client's own mean")
    return array


def _others(n: Array) -> Array:
    """``(K, K)``: row i holds everybody's number of samples but client i's. Subtracting from sums would cancel."""
    n = _real("n", n)
    if n.ndim != 1 or len(n) < 2 or (n <= 0).any():
        raise ValueError(f"n: got {n}: needs positive numbers of samples of at least two clients")
    return np.where(np.eye(len(n), dtype=bool), 0, n)


def _covariance(name: str, value: Array) -> Array:
    matrix = _real(name, value)
    if (
        matrix.ndim != 2
        or not np.allclose(matrix, matrix.T)
        or np.linalg.eigvalsh(matrix)[0] < -1e-9 * np.abs(matrix).max()
    ):
        raise ValueError(f"{name}: must be a symmetric, positive semidefinite matrix")
    return matrix


def _ratio(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is 0."""
    x, y = np.broadcast_arrays(x, y)
    quotient: Array = np.divide(x, y, out=np.zeros(y.shape), where=y > 0)
    return quotient[()]
