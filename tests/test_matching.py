"""Which unit does the work of which: recovered exactly where there is a true answer, and optimal where there is none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import helpers
import numpy as np
import permutation_helpers as nets
import pytest
import torch
from torch import Tensor, nn

from hybridfl.activations import activations
from hybridfl.merging.matching import (
    ActivationStatistics,
    CrossMoments,
    activation_matching,
    align_and_mix,
    assign,
    fixed_points,
    weight_matching,
)
from hybridfl.merging.permutation import (
    Permutations,
    PermutationSpec,
    identity,
    inverse,
    permutation_spec,
    permuted,
    random_permutations,
)
from hybridfl.params import flatten
from hybridfl.types import Model


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_activations(net: nn.Module, spec: PermutationSpec, models: Sequence[Model], x: Tensor) -> list[Permutations]:
    """Permutations of all models but the first, from batches of unequal size."""
    statistics = ActivationStatistics(spec)
    for batch in x.split(17):
        statistics.add([activations(net, model, batch, spec.modules) for model in models])
    return [activation_matching(spec, correlations) for correlations in statistics.correlations()]


def setting(name: str, seed: int = 0) -> tuple[nn.Module, PermutationSpec, Model, Model, Permutations]:
    """A net, its groups, a model, a permuted clone of it, and how it was permuted."""
    net = nets.NETS[name]()
    spec = permutation_spec(net, nets.inputs(number=2))
    model = nets.model(net, seed)
    hidden = random_permutations(spec, np.random.default_rng(seed))
    return net, spec, model, permuted(model, spec, hidden), hidden


# -- a permuted clone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(nets.NETS) - {"padded"}))  # which has constant units
@pytest.mark.parametrize("way", ["activations", "weights"])
def test_a_permuted_clone_is_recovered_and_mixes_to_the_function_it_was(name: str, way: str) -> None:
    net, spec, model, clone, hidden = setting(name)
    x = nets.inputs(1, 60)
    if way == "activations":
        (found,) = by_activations(net, spec, [model, clone], x)
    else:
        found = weight_matching(spec, model.params, clone.params, seed=0)
    for group, p, q in zip(spec.groups, found, inverse(hidden), strict=True):
        assert torch.equal(p, q), group.name
    merged = align_and_mix(model, [clone], [0.5, 0.5], spec, [found])
    torch.testing.assert_close(nets.run(net, merged, x), nets.run(net, model, x), rtol=0, atol=1e-6)
    unaligned = align_and_mix(model, [clone], [0.5, 0.5], spec, [identity(spec)])
    assert (nets.run(net, unaligned, x) - nets.run(net, model, x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["cnn", "plain, group norm", "resnet, group norm", "resnet A, group norm", "odd"])
@pytest.mark.parametrize("way", ["activations", "weights"])
def test_what_is_found_for_another_model_leaves_its_function_as_it_is(name: str, way: str) -> None:
    net, spec, model, _, _ = setting(name)
    x, other = nets.inputs(1, 30), nets.model(net, 7)
    if way == "activations":
        (found,) = by_activations(net, spec, [model, other], x)
    else:
        found = weight_matching(spec, model.params, other.params, seed=0)
    assert not helpers.identical(found, identity(spec))
    aligned = permuted(other, spec, found)
    torch.testing.assert_close(nets.run(net, aligned, x), nets.run(net, other, x), rtol=0, atol=1e-10)


# -- fixed points and order --------------------------------------------------------------------------------------------


def with_idle_units(model: Model) -> Model:
    """An MLP in which units 1 and 2 of the first hidden layer are dead, 4 and 5 are twins, and unit 0 is constant."""
    params = {name: tensor.clone() for name, tensor in model.params.items()}
    params["body.1.weight"][:3] = 0
    params["body.1.bias"][:3] = torch.tensor([2.0, -1.0, -1.0])
    for name, axis in [("body.1.weight", 0), ("body.1.bias", 0), ("body.3.weight", 1)]:
        params[name].select(axis, 5).copy_(params[name].select(axis, 4))
    params["body.3.weight"][:, 2] = params["body.3.weight"][:, 1]
    return model._replace(params=params)


@pytest.mark.parametrize(("name", "idle"), [("mlp", False), ("cnn", False), ("resnet B", False), ("mlp", True)])
def test_identical_models_are_a_fixed_point(name: str, idle: bool) -> None:
    net, spec, model, _, _ = setting(name)
    model = with_idle_units(model) if idle else model
    (found,) = by_activations(net, spec, [model, model], nets.inputs(1, 30))
    assert helpers.identical(found, identity(spec))
    assert helpers.identical(weight_matching(spec, model.params, model.params, seed=3), identity(spec))
    merged = align_and_mix(model, [model, model], [0.5, 0.25, 0.25], spec, [found, found])
    for mixed, original in zip(merged, model, strict=True):
        assert helpers.close(mixed, original)


def test_neighbours_are_matched_whatever_their_order() -> None:
    net, spec, model, _, _ = setting("resnet B")
    others = [nets.model(net, seed) for seed in (1, 2, 3)]
    x = nets.inputs(1, 30)
    found = by_activations(net, spec, [model, *others], x)
    turned = by_activations(net, spec, [model, *others[::-1]], x)
    assert helpers.identical(found, turned[::-1])
    assert not helpers.identical(found[0], found[1])
    weights = [0.4, 0.3, 0.2, 0.1]
    mixed = align_and_mix(model, others, weights, spec, found)
    again = align_and_mix(model, others[::-1], [0.4, 0.1, 0.2, 0.3], spec, turned)
    for part, same in zip(mixed, again, strict=True):
        assert helpers.close(part, same)
    alone = by_activations(net, spec, [model, others[1]], x)
    assert helpers.identical(alone[0], found[1])


def test_a_mix_of_clones_is_one_function_with_the_weights_given() -> None:
    _, spec, model, _, _ = setting("resnet B")
    other = nets.model(nets.NETS["resnet B"](), 5)
    drawn = [random_permutations(spec, np.random.default_rng(seed)) for seed in (1, 2)]
    clones = [permuted(of, spec, p) for of, p in zip((other, model), drawn, strict=True)]
    mixed = align_and_mix(model, clones, [0.2, 0.5, 0.3], spec, [inverse(p) for p in drawn])
    for part in range(2):
        for name, tensor in mixed[part].items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, 0.5 * model[part][name] + 0.5 * other[part][name])
    with pytest.raises(ValueError, match="2 weights for 3 models"):
        align_and_mix(model, clones, [0.5, 0.5], spec, drawn)


# -- statistics --------------------------------------------------------------------------------------------------------


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of the units of a (rows) with those of b, from ``(units, observations)`` each."""
    moments = CrossMoments()
    moments.add([a, b])
    return moments.correlations()[0]


def test_correlations_are_numpys() -> None:
    a, b = random(0, 5, 60), random(1, 5, 60) + 0.5 * random(0, 5, 60)
    expected = np.corrcoef(a.numpy(), b.numpy())[:5, 5:]
    np.testing.assert_allclose(correlation(a, b).numpy(), expected, atol=1e-13)
    covariance = np.cov(a.numpy(), b.numpy(), bias=True)[:5, 5:]
    moments = CrossMoments()
    moments.add([a, b])
    np.testing.assert_allclose(moments.covariances()[0].numpy(), covariance, atol=1e-13)


def test_batches_add_up_even_far_from_zero() -> None:
    models = [random(m, 4, 90) + 1e6 * (m + 1) for m in range(3)]
    moments = CrossMoments()
    for start, end in itertools.pairwise([0, 1, 40, 90]):
        moments.add([features[:, start:end] for features in models])
    assert moments.count == 90
    for m in (1, 2):
        expected = np.corrcoef((models[0] - 1e6).numpy(), (models[m] - 1e6 * (m + 1)).numpy())[:4, 4:]
        np.testing.assert_allclose(moments.correlations()[m - 1].numpy(), expected, atol=1e-9)


def test_statistics_are_of_float64_whatever_the_features_are() -> None:
    a = random(0, 3, 20).float() + 1000
    assert correlation(a, a).dtype == torch.float64
    torch.testing.assert_close(correlation(a, a).diagonal(), torch.ones(3, dtype=torch.float64))


def test_units_that_do_not_vary_correlate_with_nothing() -> None:
    a, b = random(0, 3, 20), random(1, 3, 20)
    a[0], b[2] = 7.0, 0.0
    b[1] = 1e-9 * a[1]
    found = correlation(a, b)
    assert torch.equal(found[0], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(found[:, 2], torch.zeros(3, dtype=torch.float64))
    # The denominator is 1e-9 times the variance of a, clamped to 1e-7.
    torch.testing.assert_close(found[1, 1], 1e-9 * a[1].var(correction=0) / 1e-7)


def test_features_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="invalid numeric entries"):
        assign(correlation(torch.full((2, 3), torch.nan), torch.zeros(2, 3)))


def test_features_are_channels_over_the_batch_and_all_positions() -> None:
    net, spec, model, _, _ = setting("cnn")
    seen = activations(net, model, nets.inputs(0, 3), spec.modules)
    first, _, third = spec.groups
    x = seen[first.features.module]
    assert x.shape == (3, 4, 8, 8)
    assert torch.equal(first.features.of(x), x.transpose(0, 1).reshape(4, -1))
    assert (x >= 0).all()  # after the ReLU
    assert third.features.of(seen["head"]).shape == (9, 3)
    flat = setting("plain, batch norm")[1].groups[1].features
    x = random(0, 3, 8 * 4)
    assert (flat.module, flat.axis) == ("9", 1)
    assert torch.equal(flat.of(x)[2], x[:, 8:12].T.flatten())


# -- assignments -------------------------------------------------------------------------------------------------------


def value(score: Tensor, permutation: Sequence[int]) -> float:
    return sum(float(score[u, p]) for u, p in enumerate(permutation))


@pytest.mark.parametrize("seed", range(10))
def test_the_assignment_is_the_best_of_all_24(seed: int) -> None:
    score = random(seed, 4, 4)
    best = max(itertools.permutations(range(4)), key=lambda p: value(score, p))
    assert assign(score).tolist() == list(best)


@pytest.mark.parametrize("seed", range(10))
def test_with_blocks_it_is_the_best_of_those_that_keep_them_together(seed: int) -> None:
    score, blocks = random(seed, 6, 6), torch.tensor([[0, 3], [1, 2], [5, 4]])
    together = {frozenset(block) for block in blocks.tolist()}
    allowed = [
        p for p in itertools.permutations(range(6)) if {frozenset((p[a], p[b])) for a, b in together} == together
    ]
    assert len(allowed) == 6 * 2**3
    best = max(allowed, key=lambda p: value(score, p))
    assert assign(score, blocks).tolist() == list(best)


def test_the_best_assignment_is_that_of_the_nearest_standardised_activations() -> None:
    a, b = random(0, 4, 30), random(1, 4, 30)
    a, b = ((f - f.mean(1, keepdim=True)) / f.std(1, correction=0, keepdim=True) for f in (a, b))
    nearest = min(itertools.permutations(range(4)), key=lambda p: float((a - b[list(p)]).square().sum()))
    assert assign(correlation(a, b)).tolist() == list(nearest)


@pytest.mark.parametrize("blocks", [None, torch.arange(6).view(3, 2)])
@pytest.mark.parametrize("score", [torch.zeros(6, 6), torch.ones(6, 6), -torch.ones(6, 6), 1e8 * torch.ones(6, 6)])
def test_of_equals_units_stay_where_they_are(score: Tensor, blocks: Tensor | None) -> None:
    assert assign(score, blocks).tolist() == list(range(6))
    rounding = 1e-13 * random(0, 6, 6)
    assert assign(score.double() * (1 + rounding), blocks).tolist() == list(range(6))


def test_fixed_points() -> None:
    assert fixed_points([]) == 1
    assert fixed_points([torch.arange(4)]) == 1
    assert fixed_points([torch.tensor([1, 0, 2, 3])]) == 0.5
    assert fixed_points([torch.tensor([1, 2, 3, 0]), torch.arange(12)]) == 0.75


# -- weights -----------------------------------------------------------------------------------------------------------


def agreement(spec: PermutationSpec, a: Model, b: Model, permutations: Permutations) -> float:
    return float(flatten(a.params) @ flatten(permuted(b, spec, permutations).params))


def test_weight_matching_of_one_hidden_layer_is_the_best_of_all_24() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 5))
    spec = permutation_spec(net, nets.inputs(number=2))
    a, b = nets.model(net, 1), nets.model(net, 2)
    every = [[torch.tensor(p)] for p in itertools.permutations(range(4))]
    best = max(every, key=lambda p: agreement(spec, a, b, p))
    assert helpers.identical(weight_matching(spec, a.params, b.params, seed=0), best)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet A", "resnet, group norm"])
def test_weight_matching_ends_where_no_group_alone_can_be_better(name: str) -> None:
    net = nets.NETS[name]()
    spec = permutation_spec(net, nets.inputs(number=2))
    a, b = nets.model(net, 1), nets.model(net, 2)
    found = weight_matching(spec, a.params, b.params, seed=0)
    reached = agreement(spec, a, b, found)
    assert reached > agreement(spec, a, b, identity(spec)) + 0.1
    for g, group in enumerate(spec.groups):
        for u, v in itertools.combinations(range(group.size), 2):
            if group.blocks is not None and not any({u, v} <= set(block.tolist()) for block in group.blocks):
                continue
            swapped = found[g].clone()
            swapped[[u, v]] = found[g][[v, u]]
            assert agreement(spec, a, b, [*found[:g], swapped, *found[g + 1 :]]) <= reached + 1e-9
    assert helpers.identical(weight_matching(spec, a.params, b.params, seed=0), found)


class Loop(nn.Module):
    """A branch of one layer, from the stream to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.turn, self.head = nn.Linear(192, 5), nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        return self.head(torch.relu(x + self.turn(torch.relu(x))))


@pytest.mark.parametrize("seed", range(5))
def test_weight_matching_never_loses_where_a_group_is_on_both_sides_of_a_layer(seed: int) -> None:
    net = Loop()
    spec = permutation_spec(net, nets.inputs(number=2))
    (group,) = spec.groups
    assert {("turn.weight", 0), ("turn.weight", 1)} <= {(entry.name, entry.axis) for entry in group.entries}
    a, b = nets.model(net, 1), nets.model(net, seed + 2)
    # The layer's own weights outweigh the others, so that assignments from a linear score can mislead.
    for model in (a, b):
        model.params["turn.weight"].mul_(20)
    found = weight_matching(spec, a.params, b.params, seed)
    assert agreement(spec, a, b, found) >= agreement(spec, a, b, identity(spec))
