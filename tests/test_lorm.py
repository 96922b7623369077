"""LoRM: the closed forms are the minimisers they should be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridfl import params as P
from hybridfl.merging.lorm import Memory, merged_b, merged_layer, merged_tasks, remembered

OUT, INTO, RANK, CLIENTS = 4, 6, 2, 3
WEIGHTS = [0.2, 0.3, 0.5]


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def inputs(examples: int = 9, seed: int = 1) -> list[Tensor]:
    """Of every client, ``(INTO, examples)``."""
    return list(some(CLIENTS, INTO, examples, seed=seed))


def full_grams(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x @ x.T for x in xs]


def diagonals(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.square().sum(1) for x in xs]


def objective(layer: Tensor, layers: Sequence[Tensor], grams: Sequence[Tensor]) -> float:
    """Σ tr (W - Wₖ) Gₖ (W - Wₖ)ᵀ."""
    matrices = [gram.diag() if gram.dim() == 1 else gram for gram in grams]
    return sum(
        float(torch.trace((layer - own) @ gram @ (layer - own).T)) for own, gram in zip(layers, matrices, strict=True)
    )


def test_perturbations_of_either_factor_only_raise_the_objective() -> None:
    for grams in (full_grams(inputs()), diagonals(inputs())):
        a, b = some(RANK, INTO, seed=2), some(OUT, RANK, seed=3)
        bs, as_ = list(some(CLIENTS, OUT, RANK, seed=4)), list(some(CLIENTS, RANK, INTO, seed=5))
        best_b = merged_b(bs, a, grams, torch.zeros(OUT, RANK).double(), WEIGHTS)
        best_a = merged_layer(as_, grams, torch.zeros(RANK, INTO).double(), WEIGHTS)
        for seed in range(40):
            step = 10.0 ** -(seed % 5)
            with_b = objective((best_b + step * some(OUT, RANK, seed=seed)) @ a, [own @ a for own in bs], grams)
            assert with_b > objective(best_b @ a, [own @ a for own in bs], grams)
            with_a = objective(b @ (best_a + step * some(RANK, INTO, seed=seed)), [b @ own for own in as_], grams)
            assert with_a > objective(b @ best_a, [b @ own for own in as_], grams)


def test_the_formulas_as_they_are_written() -> None:
    grams, a = full_grams(inputs()), some(RANK, INTO, seed=2)
    bs, as_ = list(some(CLIENTS, OUT, RANK, seed=4)), list(some(CLIENTS, RANK, INTO, seed=5))
    total = torch.stack(grams).sum(0)
    pulled = sum((own @ a @ gram for own, gram in zip(bs, grams, strict=True)), torch.zeros(OUT, INTO).double())
    expected = pulled @ a.T @ torch.linalg.pinv(a @ total @ a.T)
    found = merged_b(bs, a, grams, some(OUT, RANK, seed=9), WEIGHTS)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    pulled = sum((own @ gram for own, gram in zip(as_, grams, strict=True)), torch.zeros(RANK, INTO).double())
    found = merged_layer(as_, grams, some(RANK, INTO, seed=9), WEIGHTS)
    assert torch.allclose(found, pulled @ torch.linalg.pinv(total), rtol=0, atol=1e-10)


def test_identical_clients_are_a_fixed_point() -> None:
    b, a = some(OUT, RANK, seed=2), some(RANK, INTO, seed=3)
    for grams in (full_grams(inputs()), diagonals(inputs()), full_grams(inputs(examples=2))):
        assert torch.allclose(merged_b([b] * 3, a, grams, b + 1, WEIGHTS), b, rtol=0, atol=1e-12)
        assert torch.allclose(merged_layer([a] * 3, grams, a - 1, WEIGHTS), a, rtol=0, atol=1e-12)


def test_equal_grams_give_the_mean() -> None:
    a, bs, as_ = some(RANK, INTO), list(some(CLIENTS, OUT, RANK)), list(some(CLIENTS, RANK, INTO))
    for gram in (full_grams(inputs())[0], diagonals(inputs())[0]):
        mean = merged_b(bs, a, [gram] * 3, some(OUT, RANK, seed=7), WEIGHTS)
        assert torch.allclose(mean, torch.stack(bs).mean(0), rtol=0, atol=1e-11)
        mean = merged_layer(as_, [gram] * 3, some(RANK, INTO, seed=7), WEIGHTS)
        assert torch.allclose(mean, torch.stack(as_).mean(0), rtol=0, atol=1e-11)


def test_the_elementwise_path_is_the_matrix_path_of_diagonals() -> None:
    grams, a, start = diagonals(inputs()), some(RANK, INTO), some(OUT, RANK, seed=6)
    matrices = [gram.diag() for gram in grams]
    bs, as_ = list(some(CLIENTS, OUT, RANK)), list(some(CLIENTS, RANK, INTO))
    pairs = [(merged_b(bs, a, g, start, WEIGHTS), merged_layer(as_, g, 0 * a, WEIGHTS)) for g in (grams, matrices)]
    for elementwise, by_matrix in zip(*pairs, strict=True):
        assert torch.allclose(elementwise, by_matrix, rtol=0, atol=1e-11)
    tasks = [(some(OUT, INTO, seed=t), grams[t]) for t in range(3)]
    assert torch.allclose(
        merged_tasks(memory_of(tasks)), merged_tasks(memory_of([(r, g.diag()) for r, g in tasks])), rtol=0, atol=1e-11
    )


def test_directions_without_input_keep_the_mean_and_untouched_rows_every_bit() -> None:
    grams = diagonals(inputs())
    for gram in grams:
        gram[2] = 0
    start = some(OUT, INTO, seed=8)
    layers = [start + move for move in some(CLIENTS, OUT, INTO)]
    for layer in layers:
        layer[1] = start[1]
    found = merged_layer(layers, grams, start, WEIGHTS)
    mean = P.mean([{"": layer} for layer in layers], WEIGHTS)[""]
    assert torch.allclose(found[:, 2], mean[:, 2], rtol=0, atol=1e-12)
    assert torch.equal(found[1], start[1])
    assert not torch.allclose(found, mean, atol=1e-3)


# -- over tasks ------------------------------------------------------------------------------------------------------


def memory_of(tasks: Sequence[tuple[Tensor, Tensor | None]]) -> Memory:
    memory = None
    for residual, gram in tasks:
        memory = remembered(memory, residual, gram)
    assert memory is not None
    return memory


@pytest.mark.parametrize("how", ["regmean", "mean", "sum"])
def test_one_task_is_itself(how) -> None:
    residual, gram = some(OUT, INTO), diagonals(inputs())[0]
    gram[:3] = 0
    assert torch.equal(merged_tasks(memory_of([(residual, gram)]), how), residual)


def test_three_tasks_by_hand() -> None:
    residuals, grams = list(some(3, OUT, INTO)), full_grams(inputs())
    tasks = list(zip(residuals, grams, strict=True))
    pulled = sum((r @ g for r, g in tasks), torch.zeros(OUT, INTO).double())
    expected = pulled @ torch.linalg.inv(torch.stack(grams).sum(0))
    assert torch.allclose(merged_tasks(memory_of(tasks)), expected, rtol=0, atol=1e-10)
    assert torch.allclose(merged_tasks(memory_of(tasks), "mean"), torch.stack(residuals).mean(0), rtol=0, atol=1e-12)
    assert torch.allclose(merged_tasks(memory_of(tasks), "sum"), torch.stack(residuals).sum(0), rtol=0, atol=1e-12)
    without = merged_tasks(memory_of([(r, None) for r in residuals]))
    assert torch.allclose(without, torch.stack(residuals).mean(0), rtol=0, atol=1e-12)
