"""Merging operators: exact small truths and independent implementations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import helpers
import numpy as np
import pytest
import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl.merging.coordinatewise import median, trimmed_mean
from hybridfl.merging.dare import dare
from hybridfl.merging.fisher_mean import fisher_mean
from hybridfl.merging.geometric_median import geometric_median
from hybridfl.merging.krum import krum
from hybridfl.merging.regmean import regmean
from hybridfl.merging.slerp import slerp
from hybridfl.merging.soup import greedy_soup
from hybridfl.merging.task_arithmetic import task_arithmetic
from hybridfl.merging.ties import ties
from hybridfl.merging.weighted_mean import weighted_mean
from hybridfl.params import Params

WEIGHTS = [0.5, 2.0, 1.5]


def vector(*values: float) -> Params:
    return {"w": torch.tensor(values, dtype=torch.float64)}


def values(params: Params) -> list[float]:
    return P.flatten(params).tolist()


def some(seed: int) -> Params:
    """A model with two layers, one a convolution, and no two numbers alike."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (3, 2, 2, 2), "conv.bias": (3,), "head.weight": (4, 5), "head.bias": (4,)}
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


BASE, MODELS = some(0), [some(1), some(2), some(3)]


def psd(seed: int, size: int, rank: int | None = None) -> Tensor:
    x = torch.randn(size, rank or 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.T


GRAMS = [{"conv": psd(10 + k, 8), "head": psd(20 + k, 5)} for k in range(3)]
FISHERS = [{name: t.square() for name, t in some(30 + k).items()} for k in range(3)]

OPERATORS: dict[str, Callable[[], Params]] = {
    "mean": lambda: weighted_mean(MODELS, WEIGHTS),
    "task_arithmetic": lambda: task_arithmetic(BASE, MODELS, WEIGHTS, 0.7),
    "ties": lambda: ties(BASE, MODELS, WEIGHTS, 0.4, 0.7),
    "dare": lambda: dare(BASE, MODELS, WEIGHTS, 0.4, 0.7),
    "fisher": lambda: fisher_mean(MODELS, FISHERS, WEIGHTS),
    "regmean": lambda: regmean(MODELS, GRAMS, WEIGHTS),
    "slerp": lambda: slerp(MODELS[:2], 0.3),
    "median": lambda: median(MODELS[:1]),
    "trimmed_mean": lambda: trimmed_mean(MODELS, 0.4),
    "krum": lambda: krum(MODELS),
    "geometric_median": lambda: geometric_median(MODELS, WEIGHTS),
    "greedy_soup": lambda: greedy_soup(MODELS, lambda model: float(P.norm(model))),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_leave_their_inputs_and_share_nothing_with_them(name: str) -> None:
    inputs = [BASE, *MODELS, *GRAMS, *FISHERS]
    before = copy.deepcopy(inputs)
    merged = OPERATORS[name]()
    assert P.Layout.of(merged) == P.Layout.of(BASE)
    for tensor in merged.values():
        tensor.zero_()
    assert helpers.identical(inputs, before)


# -- mean and task arithmetic ----------------------------------------------------------------------------------------


def test_the_mean_by_hand() -> None:
    assert values(weighted_mean([vector(0, 4), vector(4, 8)], [3, 1])) == [1, 5]
    assert values(weighted_mean([vector(0, 4), vector(4, 8)])) == [2, 6]


def test_task_arithmetic_by_hand() -> None:
    """Updates (1, -2) and (3, 0) around (10, 10)."""
    models = [vector(11, 8), vector(13, 10)]
    assert values(task_arithmetic(vector(10, 10), models)) == [14, 8]
    assert values(task_arithmetic(vector(10, 10), models, scale=0.5)) == [12, 9]
    assert values(task_arithmetic(vector(10, 10), models, [2, -1])) == [9, 6]


def test_task_arithmetic_with_shares_is_the_mean() -> None:
    shares = [w / sum(WEIGHTS) for w in WEIGHTS]
    assert helpers.close(task_arithmetic(BASE, MODELS, shares), weighted_mean(MODELS, WEIGHTS))


@pytest.mark.parametrize("operator", [task_arithmetic, ties, dare])
def test_there_are_as_many_weights_as_models(operator: Callable[..., Params]) -> None:
    with pytest.raises(ValueError, match="argument"):
        operator(BASE, MODELS, [1.0, 1.0])


# -- TIES ------------------------------------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    """Two of four coordinates are kept, (5, -4, 0, 0), (-6, -2, 0, 2) and (2, 8, 0, 0): -2 and 2 are equally large."""
    base = vector(1, 1, 1, 1)
    models = [P.add(base, vector(*update)) for update in [(5, -4, 1, 3), (-6, -2, 0.5, 2), (2, 8, 1, 0)]]
    # Signs of the sums: 5 - 6 + 2 = 1, -4 - 2 + 8 = 2, 0, 2. Those that agree: (5, 2), (8), none, (2).
    assert values(ties(base, models, density=0.5)) == [1 + 3.5, 1 + 8, 1, 1 + 2]
    assert values(ties(base, models, density=0.5, scale=0.5)) == [1 + 1.75, 1 + 4, 1, 1 + 1]
    # With weights 1, 2, 1: 5 - 12 + 2 < 0, -4 - 4 + 8 = 0: no sign is elected and the base stays.
    assert values(ties(base, models, [1, 2, 1], density=0.5)) == [1 - 6, 1, 1, 1 + 2]
    # With weights 3, 1, 1: 15 - 6 + 2 > 0 and (3 · 5 + 2) / 4; -12 - 2 + 8 < 0 and (3 · -4 - 2) / 4.
    assert values(ties(base, models, [3, 1, 1], density=0.5)) == [1 + 4.25, 1 - 3.5, 1, 1 + 2]


def ties_in_loops(base: np.ndarray, models: list[np.ndarray], weights: list[float], kept: int) -> np.ndarray:
    """Algorithm 1 coordinate by coordinate; no two magnitudes of a model are alike."""
    updates = [model - base for model in models]
    for update in updates:
        update[np.argsort(-np.abs(update))[kept:]] = 0
    merged = base.copy()
    for p in range(len(base)):
        column = [update[p] for update in updates]
        sign = np.sign(np.dot(weights, column))
        agreeing = [
            (w, value) for w, value in zip(weights, column, strict=True) if value != 0 and np.sign(value) == sign
        ]
        if agreeing:
            merged[p] += sum(w * value for w, value in agreeing) / sum(w for w, _ in agreeing)
    return merged


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_ties_agrees_with_loops_over_the_whole_vector(density: float) -> None:
    flat = [P.flatten(model).numpy() for model in [BASE, *MODELS]]
    expected = ties_in_loops(flat[0], flat[1:], WEIGHTS, max(1, round(density * len(flat[0]))))
    assert np.allclose(P.flatten(ties(BASE, MODELS, WEIGHTS, density)).numpy(), expected, rtol=0, atol=1e-13)


def test_ties_of_everything_with_agreeing_signs_is_the_mean() -> None:
    models = [{n: BASE[n] + model[n].abs() * BASE[n].sign() for n in BASE} for model in MODELS]
    assert helpers.close(ties(BASE, models, WEIGHTS, density=1.0), weighted_mean(models, WEIGHTS))


def test_ties_does_not_depend_on_the_order_of_a_models_names() -> None:
    shuffled = [dict(reversed(model.items())) for model in MODELS]
    assert helpers.identical(ties(BASE, shuffled, WEIGHTS, 0.4), ties(BASE, MODELS, WEIGHTS, 0.4))


def test_a_model_without_weight_has_no_vote() -> None:
    assert helpers.close(ties(BASE, MODELS, [1, 0, 1], 0.4), ties(BASE, [MODELS[0], MODELS[2]], density=0.4))
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        ties(BASE, MODELS, [1, -1, 1])


# -- DARE ------------------------------------------------------------------------------------------------------------


def test_dare_that_drops_nothing_is_task_arithmetic() -> None:
    expected = task_arithmetic(BASE, MODELS, WEIGHTS, 0.7)
    assert helpers.identical(dare(BASE, MODELS, WEIGHTS, 0.0, 0.7), expected)


def test_dare_drops_or_rescales_every_coordinate() -> None:
    size, drop = 20_000, 0.75
    base, model = {"w": torch.zeros(size).double()}, {"w": torch.arange(1, size + 1).double()}
    factors = dare(base, [model], drop=drop)["w"] / model["w"]
    assert set(factors.tolist()) == {0.0, 4.0}
    assert abs(float(factors.mean()) - 1) < 4 * math.sqrt(3 / size)  # the variance of a factor is p / (1 - p)
    one, other = (dare(base, [model], drop=drop, seed=seed)["w"] for seed in (0, 1))
    assert torch.equal(one, model["w"] * factors)
    assert abs(float(((one > 0) & (other > 0)).double().mean()) - 1 / 16) < 0.01


def test_models_are_thinned_independently_and_added() -> None:
    base, model = {"w": torch.zeros(5000).double()}, {"w": torch.ones(5000).double()}
    counts = torch.bincount(dare(base, [model, model], drop=0.5)["w"].long(), minlength=5) / 5000
    assert torch.allclose(counts, torch.tensor([0.25, 0.0, 0.5, 0.0, 0.25]), atol=0.03)
    assert torch.equal(dare(base, [model], drop=0.5)["w"] * 3, dare(base, [model], [3.0], drop=0.5)["w"])


# -- Fisher ----------------------------------------------------------------------------------------------------------


def test_fisher_means_by_hand() -> None:
    models, fishers = [vector(0, 0, 0), vector(4, 4, 4)], [vector(1, 3, 0), vector(3, 1, 0)]
    assert values(fisher_mean(models, fishers)) == [3, 1, 2]
    assert values(fisher_mean(models, fishers, [3, 1], floor=0)) == [2, 0.4, 1]
    assert values(fisher_mean(models, fishers, [3, 1], floor=2)) == [4 * 3 / 9, 4 * 2 / 11, 1]


def test_equal_fishers_give_the_mean() -> None:
    assert helpers.close(fisher_mean(MODELS, [FISHERS[0]] * 3, WEIGHTS), weighted_mean(MODELS, WEIGHTS))


def test_tensors_without_fishers_take_the_mean() -> None:
    part = [{"head.bias": fisher["head.bias"]} for fisher in FISHERS]
    merged, mean, all_of_it = fisher_mean(MODELS, part), weighted_mean(MODELS), fisher_mean(MODELS, FISHERS)
    assert torch.equal(merged["head.bias"], all_of_it["head.bias"])
    assert torch.equal(merged["conv.weight"], mean["conv.weight"])
    with pytest.raises(ValueError, match="must not be negative"):
        fisher_mean(MODELS, FISHERS, [2, 2, -1])


# -- RegMean ---------------------------------------------------------------------------------------------------------


def objective(merged: Params, layer: str, alpha: float) -> float:
    """``Σ tr (W - Wₖ) Gₖ (W - Wₖ)ᵀ`` with shrunk Grams."""
    total = 0.0
    for model, gram in zip(MODELS, GRAMS, strict=True):
        shrunk = torch.where(torch.eye(len(gram[layer])).bool(), gram[layer], alpha * gram[layer])
        apart = (merged[f"{layer}.weight"] - model[f"{layer}.weight"]).flatten(1)
        total += float((apart @ shrunk @ apart.T).trace())
    return total


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("layer", ["conv", "head"])
def test_no_perturbation_of_regmean_lowers_its_objective(layer: str, alpha: float) -> None:
    merged = regmean(MODELS, GRAMS, alpha=alpha)
    least = objective(merged, layer, alpha)
    generator = torch.Generator().manual_seed(4)
    for size in (1e-3, 1e-1, 10.0):
        for _ in range(50):
            step = torch.randn(merged[f"{layer}.weight"].shape, generator=generator, dtype=torch.float64) * size
            moved = merged | {f"{layer}.weight": merged[f"{layer}.weight"] + step}
            assert objective(moved, layer, alpha) > least


def test_regmean_is_least_squares_on_the_inputs() -> None:
    """``W X = Wₖ Xₖ`` over all inputs of all models, solved by numpy."""
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((5, n)) for n in (7, 9, 4)]
    grams = [{"head": torch.from_numpy(x @ x.T)} for x in xs]
    outputs = [model["head.weight"].numpy() @ x for model, x in zip(MODELS, xs, strict=True)]
    expected = np.linalg.lstsq(np.hstack(xs).T, np.hstack(outputs).T, rcond=None)[0].T
    assert np.allclose(regmean(MODELS, grams, alpha=1.0)["head.weight"].numpy(), expected, rtol=0, atol=1e-12)


def test_identity_grams_give_the_mean_and_scaled_ones_a_weighted_one() -> None:
    eye = [{"conv": torch.eye(8).double() * w, "head": torch.eye(5).double() * w} for w in WEIGHTS]
    assert helpers.close(regmean(MODELS, [eye[0]] * 3), weighted_mean(MODELS))
    assert helpers.close(regmean(MODELS, eye, WEIGHTS), weighted_mean(MODELS, WEIGHTS))


def test_what_has_no_gram_takes_the_weighted_mean() -> None:
    merged, mean = regmean(MODELS, GRAMS, WEIGHTS), weighted_mean(MODELS, WEIGHTS)
    assert [name for name in merged if torch.equal(merged[name], mean[name])] == ["conv.bias", "head.bias"]
    assert torch.allclose(merged["head.weight"], regmean(MODELS, GRAMS)["head.weight"], rtol=0, atol=1e-12)


def test_directions_that_no_input_has_keep_the_mean() -> None:
    """Inputs in a plane: on it the objective is at its minimum, across it the merge is the mean."""
    plane = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    grams = [{"head": plane[:, :2] @ psd(40 + k, 2) @ plane[:, :2].T} for k in range(3)]
    merged = regmean(MODELS, grams, WEIGHTS, alpha=1.0)["head.weight"]
    mean = weighted_mean(MODELS, WEIGHTS)["head.weight"]
    assert torch.allclose(merged @ plane[:, 2:], mean @ plane[:, 2:], rtol=0, atol=1e-10)
    total = sum((merged - m["head.weight"]) @ g["head"] for m, g in zip(MODELS, grams, strict=True))
    assert float(total.abs().max()) < 1e-9
    assert not torch.allclose(merged, mean, atol=1e-2)


def test_diagonal_grams_are_grams_without_the_rest() -> None:
    diagonal = [{layer: gram.diagonal() for layer, gram in grams.items()} for grams in GRAMS]
    assert helpers.close(regmean(MODELS, diagonal, WEIGHTS), regmean(MODELS, GRAMS, WEIGHTS, alpha=0.0))
    dead = [{layer: torch.zeros_like(gram) for layer, gram in grams.items()} for grams in diagonal]
    assert helpers.close(regmean(MODELS, dead, WEIGHTS), weighted_mean(MODELS, WEIGHTS))


# -- SLERP -----------------------------------------------------------------------------------------------------------


def test_slerp_turns_evenly_and_keeps_the_length() -> None:
    a, b = vector(2, 0), vector(2 * math.cos(2.1), 2 * math.sin(2.1))
    for t in (0.0, 0.25, 0.5, 1.0):
        x, y = values(slerp([a, b], t))
        assert math.hypot(x, y) == pytest.approx(2, abs=1e-14)
        assert math.atan2(y, x) == pytest.approx(2.1 * t, abs=1e-14)


def test_slerp_agrees_with_scipy_on_unit_vectors() -> None:
    from scipy.spatial import geometric_slerp

    a, b = (t / t.norm() for t in (MODELS[0]["head.weight"].flatten(), MODELS[1]["head.weight"].flatten()))
    expected = geometric_slerp(a.numpy(), b.numpy(), 0.3)
    assert np.allclose(slerp([{"w": a}, {"w": b}], 0.3)["w"].numpy(), expected, rtol=0, atol=1e-14)


def test_slerp_ends_at_the_models_and_reads_each_tensor_alone() -> None:
    assert helpers.close(slerp(MODELS[:2], 0.0), MODELS[0], 1e-15)
    assert helpers.close(slerp(MODELS[:2], 1.0), MODELS[1], 1e-15)
    one = slerp([{"head.bias": model["head.bias"]} for model in MODELS[:2]], 0.3)
    assert torch.equal(one["head.bias"], slerp(MODELS[:2], 0.3)["head.bias"])


@pytest.mark.parametrize(
    ("a", "b"), [((1, 0), (3, 0.01)), ((1, 0), (-1, 0)), ((0, 0), (3, 4)), ((1, 2), (0, 0)), ((0, 0), (0, 0))]
)
def test_slerp_is_linear_where_there_is_no_angle_to_speak_of(a: tuple[float, ...], b: tuple[float, ...]) -> None:
    expected = [0.75 * one + 0.25 * other for one, other in zip(a, b, strict=True)]
    assert values(slerp([vector(*a), vector(*b)], 0.25)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("number", [1, 3])
def test_slerp_takes_two_models(number: int) -> None:
    with pytest.raises(ValueError, match=f"got {number}"):
        slerp(MODELS[:number])
