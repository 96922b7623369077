"""What a merge is searched for, and the statistics the searches ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl import probes
from hybridfl.local import cross_entropy
from hybridfl.merging.atlas import segments
from hybridfl.merging.objectives import SearchLoss, ServerLoss, confident_and_diverse, distillation
from hybridfl.parametrization import AtlasSpan
from hybridfl.params import Layout, Params, flatten
from hybridfl.types import Batch, LossRule, ProbeInput

torch.set_num_threads(1)  # several threads on a shared machine are slower

N, WIDTH, CLASSES, K = 23, 4, 3, 4
OBJECTIVES = ("ce", "kd", "head", "entropy", "mix")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y, TEACHER = random(0, N, WIDTH), torch.arange(N) % CLASSES, random(1, N, CLASSES)
WHOLE = Batch(X, Y, torch.arange(N))
LINEAR = {"weight": random(2, CLASSES, WIDTH), "bias": random(3, CLASSES)}


def linear(params: Params, x: Tensor) -> Tensor:
    return x @ params["weight"].T + params["bias"]


def seen(theta: Params, to_params: Callable[[Params], Params], loss: LossRule, **ctx: Any) -> ProbeInput:
    """A probe's input in chunks of 10, 10 and 3."""
    batches = [Batch(X[p], Y[p], p) for p in torch.arange(N).split(10)]
    return ProbeInput(linear, theta, to_params, batches, loss, ctx, nn.Identity(), lambda params, x, names: {})


def hand_made(objective: str, logits: Tensor, y: Tensor, teacher: Tensor) -> Tensor:
    """The objectives' formulas, written out."""
    q, p = logits.softmax(1), teacher.softmax(1)
    ce = -q[torch.arange(len(y)), y].log().mean()
    kd = (p * (p.log() - q.log())).sum(1).mean()
    mean = q.mean(0)
    entropy = -(q * q.log()).sum(1).mean() + (mean * mean.log()).sum()
    return {"ce": ce, "head": ce, "kd": kd, "mix": (ce + kd) / 2, "entropy": entropy}[objective]


# -- objectives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_agree_with_their_formulas(objective) -> None:
    loss = ServerLoss(objective)(linear, {}, LINEAR, WHOLE, {"teacher": TEACHER})
    torch.testing.assert_close(loss, hand_made(objective, linear(LINEAR, X), Y, TEACHER))


@pytest.mark.parametrize("objective", ["kd", "mix"])
def test_the_teacher_is_looked_up_by_position(objective) -> None:
    picked = torch.tensor([20, 3, 3, 11])
    loss = ServerLoss(objective)(linear, {}, LINEAR, Batch(X[picked], Y[picked], picked), {"teacher": TEACHER})
    torch.testing.assert_close(loss, hand_made(objective, linear(LINEAR, X[picked]), Y[picked], TEACHER[picked]))


@pytest.mark.parametrize("objective", ["kd", "entropy"])
def test_surrogates_do_not_read_labels(objective) -> None:
    class Unreadable:
        pass

    blind = WHOLE._replace(y=Unreadable())
    ctx = {"teacher": TEACHER}
    assert ServerLoss(objective)(linear, {}, LINEAR, blind, ctx) == ServerLoss(objective)(
        linear, {}, LINEAR, WHOLE, ctx
    )
    with pytest.raises((TypeError, AttributeError)):
        ServerLoss("ce")(linear, {}, LINEAR, blind, ctx)


def test_distillation_is_zero_at_the_teacher_and_ignores_a_shift_of_logits() -> None:
    assert distillation(TEACHER + 3.0, TEACHER).abs() < 1e-12
    assert distillation(-TEACHER, TEACHER) > 0.1


def test_entropy_prefers_confident_and_diverse_predictions_and_survives_certainty() -> None:
    certain = 1e4 * F.one_hot(torch.arange(6) % 3).double()
    assert confident_and_diverse(certain) == pytest.approx(-torch.tensor(3.0).log().item())
    assert confident_and_diverse(certain[[0] * 6]) == pytest.approx(0.0)
    assert confident_and_diverse(torch.zeros(6, 3)) == pytest.approx(0.0, abs=1e-6)


def test_entropy_has_a_slope_where_nobody_predicts_a_class() -> None:
    logits = torch.tensor([[0.0, 1.0, -300.0], [2.0, 0.0, -400.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(confident_and_diverse(logits), logits)
    two = logits.detach()[:, :2].double().requires_grad_()
    q = two.softmax(1)
    mean = q.mean(0)
    (expected,) = torch.autograd.grad((mean * mean.log()).sum() - (q * q.log()).sum(1).mean(), two)
    assert torch.allclose(slope[:, :2].double(), expected, atol=1e-6)
    assert not slope[:, 2].any()


# -- the search's loss ------------------------------------------------------------------------------------------------


def atlas_span(constraint: str, columns: int) -> tuple[AtlasSpan, dict[str, Any]]:
    layout = Layout.of({"body.weight": LINEAR["weight"], "head.bias": LINEAR["bias"]})
    frozen = {
        "origin": flatten(LINEAR),
        "anchors": [random(10 + k, CLASSES * (WIDTH + 1)) for k in range(K)],
        "scales": random(4, K, 1).exp(),
        "total": torch.tensor(1.0, dtype=torch.float64),
    }
    return AtlasSpan(layout, segments(layout, columns), constraint), frozen  # type: ignore[arg-type]


def as_linear(span: AtlasSpan, frozen: dict[str, Any]) -> Callable[[Params], Params]:
    return lambda theta: dict(zip(LINEAR, span(theta, frozen).values(), strict=True))


@pytest.mark.parametrize("columns", [1, 2])
def test_the_pull_towards_the_default_is_of_the_projected_coefficients(columns) -> None:
    span, frozen = atlas_span("affine", columns)
    u, default = random(5, K, columns), random(6, K, columns)
    ctx = {"default": default, "prox": 0.3, "span_frozen": frozen}
    at = as_linear(span, frozen)({"c": u})
    bare = ServerLoss("ce")(linear, {}, at, WHOLE, {})
    pulled = SearchLoss("ce", span)(linear, {"c": u}, at, WHOLE, ctx)
    c = u - u.mean(0) + 1 / K
    torch.testing.assert_close(pulled - bare, 0.3 * (c - default).square().sum() / columns)
    assert torch.equal(SearchLoss("ce", span)(linear, {"c": u}, at, WHOLE, ctx | {"prox": 0.0}), bare)


# -- probes -----------------------------------------------------------------------------------------------------------


def test_the_mean_loss_weighs_chunks_by_their_examples() -> None:
    probe = seen(LINEAR, lambda theta: theta, cross_entropy)
    torch.testing.assert_close(probes.mean_loss(probe), F.cross_entropy(linear(LINEAR, X), Y))


def test_logits_come_in_the_order_of_the_view() -> None:
    torch.testing.assert_close(probes.logits(seen(LINEAR, lambda theta: theta, cross_entropy)), linear(LINEAR, X))


def test_the_gradient_is_autograds_and_zero_for_what_is_not_used() -> None:
    theta = {name: tensor.clone().requires_grad_() for name, tensor in LINEAR.items()}
    expected = torch.autograd.grad(F.cross_entropy(linear(theta, X), Y), list(theta.values()))
    found = probes.gradient(seen(LINEAR | {"idle": torch.ones(2)}, lambda theta: theta, cross_entropy))
    torch.testing.assert_close(found, dict(zip(theta, expected, strict=True)) | {"idle": torch.zeros(2)})


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("constraint", ["affine", "free"])
@pytest.mark.parametrize("objective", ["ce", "kd", "mix"])
def test_gauss_newton_is_gradient_and_curvature_for_a_net_linear_in_the_coordinates(
    objective, constraint, columns
) -> None:
    span, frozen = atlas_span(constraint, columns)
    loss, to_params, c = ServerLoss(objective), as_linear(span, frozen), random(7, K, columns)
    found = probes.gauss_newton(seen({"c": c}, to_params, loss, teacher=TEACHER))

    def naive(flat: Tensor) -> Tensor:
        u = flat.view(K, columns)
        c = (span.coefficients({"c": u}, frozen) * frozen["scales"]).expand(-1, 2)
        each = torch.cat([c[:, :1].expand(-1, CLASSES * WIDTH), c[:, 1:].expand(-1, CLASSES)], dim=1)
        merged = frozen["origin"] + (each * torch.stack(frozen["anchors"])).sum(0)
        logits = X @ merged[: CLASSES * WIDTH].view(CLASSES, WIDTH).T + merged[CLASSES * WIDTH :]
        return hand_made(objective, logits, Y, TEACHER)

    flat = c.reshape(-1).requires_grad_()
    torch.testing.assert_close(found["gradient"], torch.autograd.grad(naive(flat), flat)[0])
    hessian = torch.autograd.functional.hessian(naive, flat.detach())
    assert hessian.abs().max() > 1e-3
    torch.testing.assert_close(found["matrix"], hessian, rtol=1e-9, atol=1e-12)
