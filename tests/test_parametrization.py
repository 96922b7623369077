"""Coefficients and their constraints, and the span of an atlas with its hand-written gradient."""

from __future__ import annotations

import itertools

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridfl import parametrization
from hybridfl.merging.atlas import segments
from hybridfl.parametrization import AtlasSpan, full, project
from hybridfl.params import Layout, flatten

torch.set_num_threads(1)  # several threads on a shared machine are slower

CONSTRAINTS = ("affine", "free", "nonneg", "simplex", "box")
C_MAX = 0.7


@st.composite
def coordinates(draw: st.DrawFn) -> Tensor:
    """``(K, G)`` in double precision, with ties and large entries."""
    size, columns = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    values = st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.floats(-50, 50))
    numbers = draw(st.lists(values, min_size=size * columns, max_size=size * columns))
    return torch.tensor(numbers, dtype=torch.float64).view(size, columns)


totals = st.floats(0.05, 20)


def projected(u: Tensor, constraint: str, total: float) -> Tensor:
    return project(u, constraint, u.new_tensor(total), C_MAX)  # type: ignore[arg-type]


@given(u=coordinates(), total=totals)
@settings(deadline=None, max_examples=50)
def test_what_is_projected_obeys_the_constraint_and_stays_when_projected_again(u, total) -> None:
    for constraint in CONSTRAINTS:
        c = projected(u, constraint, total)
        torch.testing.assert_close(projected(c, constraint, total), c, atol=1e-11, rtol=0)
        if constraint in ("affine", "simplex"):
            torch.testing.assert_close(c.sum(0), torch.full_like(c[0], total), atol=1e-11, rtol=1e-12)
        if constraint in ("nonneg", "simplex"):
            assert (c >= 0).all()
        if constraint == "box":
            assert (c.abs() <= C_MAX).all()
        if constraint == "free":
            assert torch.equal(c, u)


@given(u=coordinates(), total=totals)
@settings(deadline=None, max_examples=30)
def test_the_projection_is_the_nearest_point(u, total) -> None:
    """u - P(u) makes no acute angle with any move to an extreme point: the variational inequality of a projection."""
    for constraint in ("affine", "simplex"):
        c = projected(u, constraint, total)
        for corner in torch.eye(len(u), dtype=u.dtype) * total:
            move = corner.unsqueeze(1) - c
            angle = ((u - c) * move).sum(0)
            assert (angle <= 1e-9).all()
            if constraint == "affine":
                assert (angle.abs() <= 1e-9).all()
    assert torch.equal(projected(u, "nonneg", total), u.relu())
    assert torch.equal(projected(u, "box", total), u.clamp(-C_MAX, C_MAX))


@given(u=st.lists(st.floats(-3, 3), min_size=2, max_size=5), total=st.floats(0.1, 3))
@settings(deadline=None, max_examples=30)
def test_the_simplex_projection_is_the_best_of_all_supports(u, total) -> None:
    point = torch.tensor(u, dtype=torch.float64)
    best = None
    for size in range(1, len(u) + 1):
        for support in itertools.combinations(range(len(u)), size):
            candidate = torch.zeros_like(point)
            chosen = list(support)
            candidate[chosen] = point[chosen] + (total - point[chosen].sum()) / size
            inside = bool((candidate >= 0).all())
            if inside and (best is None or (candidate - point).norm() < (best - point).norm()):
                best = candidate
    assert best is not None
    # Distances to two candidates this close to each other are equal up to rounding.
    torch.testing.assert_close(projected(point.unsqueeze(1), "simplex", total).squeeze(1), best, atol=1e-6, rtol=0)


def test_the_simplex_projection_agrees_with_a_general_solver() -> None:
    u = torch.tensor([1.3, -0.4, 0.9, 0.1], dtype=torch.float64)
    solved = scipy.optimize.minimize(
        lambda c: ((c - u.numpy()) ** 2).sum(),
        torch.full((4,), 0.25).numpy(),
        bounds=[(0, None)] * 4,
        constraints={"type": "eq", "fun": lambda c: c.sum() - 1},
        tol=1e-12,
    )
    assert solved.success
    ours = projected(u.unsqueeze(1), "simplex", 1.0).squeeze(1)
    torch.testing.assert_close(ours, torch.from_numpy(solved.x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("constraint", ["nonneg", "simplex", "box"])
def test_bounds_hold_exactly_in_single_precision(constraint) -> None:
    u = torch.linspace(-40, 40, 4001).unsqueeze(1)
    c = projected(u, constraint, 1.0)
    assert c.min() >= (-C_MAX if constraint == "box" else 0)
    assert constraint != "box" or c.max() <= torch.tensor(C_MAX)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_gradient_is_projected_for_affine_and_passes_straight_through_otherwise(constraint) -> None:
    u = torch.tensor([[-2.0, 0.0], [0.0, 3.0], [5.0, 0.2]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, -1.0], [2.0, 0.5], [4.0, 3.0]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((projected(u, constraint, 1.0) * weights).sum(), u)
    expected = weights - weights.mean(0) if constraint == "affine" else weights
    torch.testing.assert_close(gradient, expected)


# -- the span ---------------------------------------------------------------------------------------------------------

ORIGIN = {
    "body.0.weight": torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "body.0.bias": torch.zeros(4, dtype=torch.float64),
    "head.weight": torch.ones(2, 4, dtype=torch.float64),
    "head.bias": torch.full((2,), 0.5, dtype=torch.float64),
}
LAYOUT = Layout.of(ORIGIN)
BLOCK_OF = torch.tensor([0] * 16 + [1] * 10)
K = 5


def span(columns: int, scale_columns: int, constraint: str = "affine") -> tuple[AtlasSpan, dict[str, object], Tensor]:
    """A span of random anchors, its frozen tensors, and coefficients."""
    rng = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    frozen = {
        "origin": flatten(ORIGIN),
        "anchors": list(random(K, 26)),
        "scales": random(K, scale_columns).exp(),
        "total": torch.tensor(1.0, dtype=torch.float64),
    }
    map_ = AtlasSpan(LAYOUT, segments(LAYOUT, max(columns, scale_columns)), constraint)  # type: ignore[arg-type]
    return map_, frozen, random(K, columns).requires_grad_()


def naive(map_: AtlasSpan, frozen: dict[str, object], c: Tensor) -> Tensor:
    """The flat merged model the obvious way, through a stack of the anchors."""
    factors = map_.coefficients({"c": c}, frozen) * frozen["scales"]
    each = factors[:, BLOCK_OF] if factors.shape[1] > 1 else factors
    return frozen["origin"] + (each * torch.stack(frozen["anchors"])).sum(0)


def loss_of(params: dict[str, Tensor]) -> Tensor:
    """A small net's loss, so that the weight gradient is nowhere constant."""
    x = torch.linspace(-1, 1, 21, dtype=torch.float64).view(7, 3)
    hidden = torch.tanh(x @ params["body.0.weight"].T + params["body.0.bias"])
    logits = hidden @ params["head.weight"].T + params["head.bias"]
    return torch.nn.functional.cross_entropy(logits, torch.arange(7) % 2)


@pytest.mark.parametrize("constraint", ["affine", "free"])
@pytest.mark.parametrize(("columns", "scale_columns"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_k_inner_products_are_the_gradient_of_the_loss(columns, scale_columns, constraint) -> None:
    map_, frozen, c = span(columns, scale_columns, constraint)
    params = map_({"c": c}, frozen)
    torch.testing.assert_close(flatten(params), naive(map_, frozen, c).detach(), rtol=1e-12, atol=1e-12)
    (ours,) = torch.autograd.grad(loss_of(params), c)
    (theirs,) = torch.autograd.grad(loss_of(LAYOUT.unflatten(naive(map_, frozen, c))), c)
    assert ours.shape == (K, columns)
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 3])
def test_in_pieces_the_weights_are_the_same_and_the_gradient_up_to_rounding(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for size in (2**17, 4):
        monkeypatch.setattr(parametrization, "PIECE", size)
        map_, frozen, c = span(columns, columns)
        params = map_({"c": c}, frozen)
        found.append((flatten(params), torch.autograd.grad(loss_of(params), c)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].abs().max() > 1e-3
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=1e-14)


def test_the_span_leaves_the_origin_and_the_anchors_as_they_were() -> None:
    map_, frozen, c = span(2, 2)
    before = [frozen["origin"].clone(), *(anchor.clone() for anchor in frozen["anchors"])]
    loss_of(map_({"c": c}, frozen)).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, [frozen["origin"], *frozen["anchors"]], strict=True))


def test_tensors_that_a_loss_does_not_use_have_no_part_in_the_gradient() -> None:
    map_, frozen, c = span(1, 1, "free")
    params = map_({"c": c}, frozen)
    wanted = {name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()}
    used = list(wanted.values())[:-1]
    grads = torch.autograd.grad(loss_of(wanted | {"head.bias": ORIGIN["head.bias"]}), used)
    flat = torch.cat([*(grad.reshape(-1) for grad in grads), torch.zeros(2).double()])
    (for_c,) = torch.autograd.grad(loss_of(params | {"head.bias": ORIGIN["head.bias"]}), c)
    torch.testing.assert_close(for_c, (torch.stack(frozen["anchors"]) @ flat).unsqueeze(1) * frozen["scales"])


def test_weights_that_are_read_after_they_gave_way_to_their_gradient_are_refused() -> None:
    map_, frozen, c = span(1, 1)
    total = torch.stack([tensor.square().sum() for tensor in map_({"c": c}, frozen).values()]).sum()
    torch.autograd.grad(total, c, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        torch.autograd.grad(total, c)


def test_other_entries_of_theta_replace_parameters_and_take_their_gradient_from_c() -> None:
    map_, frozen, c = span(1, 1, "free")
    own = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    theta = {"c": c, "head.weight": own}
    params = map_(theta, frozen)
    assert params["head.weight"] is own
    assert list(params) == list(ORIGIN)
    assert "c" not in params
    (for_own, for_c) = torch.autograd.grad(loss_of(params), [own, c])
    assert for_own.abs().max() > 0
    # With a head of zeros nothing of the body shows, and the merged head's weight is not used.
    bias_only = torch.stack([anchor[24:] for anchor in frozen["anchors"]]) * frozen["scales"]
    shown = naive(map_, frozen, c)[24:].detach().requires_grad_()
    logits = shown.expand(7, 2)
    (g,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.arange(7) % 2), shown)
    torch.testing.assert_close(for_c, bias_only @ g.unsqueeze(1))


def test_the_full_parametrization_is_theta_itself() -> None:
    assert full(ORIGIN, {}) is ORIGIN
