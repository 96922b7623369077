"""Mixup: what it does to a step, whatever its loss, and how often the net runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from augmentation_helpers import fitted, images, rng, standardised
from local_helpers import N, bench, model_of, task
from torch import Tensor, nn

from hybridfl import params as P
from hybridfl.data.augmentation import Augment, Augmented
from hybridfl.local import _recorded, run_task
from hybridfl.optimizers import SGD, batches
from hybridfl.rng import stream


def test_mixup_draws_one_share_a_batch_and_a_permutation() -> None:
    dataset = images(30)
    x = standardised(dataset.train.x, torch.float64)
    mix, shares = fitted(dataset, mixup=1.0), []
    draws = rng()
    for _ in range(400):
        out, partners, share = mix(x, draws)
        assert partners is not None
        assert sorted(partners.tolist()) == list(range(30))
        assert torch.allclose(out, share * x + (1 - share) * x[partners], rtol=0, atol=1e-14)
        shares.append(share)
    assert 0 <= min(shares) < 0.02 and 0.98 < max(shares) <= 1  # Beta(1, 1) is uniform
    assert abs(np.mean(shares) - 0.5) < 0.08
    narrow = [fitted(dataset, mixup=200.0)(x, draws).share for _ in range(50)]
    assert all(0.35 < share < 0.65 for share in narrow)
    either = [fitted(dataset, mixup=1e-6)(x, draws).share for _ in range(50)]
    assert set(np.round(either, 9)) == {0.0, 1.0}


def mixing(share: float) -> Augment:
    """Mixup with this λ and with the next example of the batch."""

    def augment(x: Tensor, rng: np.random.Generator, /) -> Augmented:
        partners = torch.arange(1, len(x) + 1) % len(x)
        return Augmented(share * x + (1 - share) * x[partners], partners, share)

    return augment


def test_a_mixed_step_is_the_hand_written_one() -> None:
    """Three steps through normalisation, dropout left out: the statistics move once a step."""
    table = bench(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))
    work = SGD(lr=0.3, batch_size=5, steps=3)
    start = model_of(table.net)
    result = run_task(table, task(table, work, augment=mixing(0.3), start=start)).result
    net = table.net.train()
    optimiser, losses = torch.optim.SGD(net.parameters(), lr=0.3), []
    for picked in batches(N - 1, work, stream(0, "local"), 3):
        index = torch.arange(N - 1, 0, -1)[torch.from_numpy(picked)]
        x, y = table.x[index], table.y[index]
        order = [1, 2, 3, 4, 0]
        logits = net(0.3 * x + 0.7 * x[order])
        loss = 0.3 * F.cross_entropy(logits, y) + 0.7 * F.cross_entropy(logits, y[order])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert helpers.close(result.model.params, P.detach(dict(net.named_parameters())), 1e-12)
    assert helpers.close(result.model.buffers, P.detach(dict(net.named_buffers())), 1e-12)
    assert result.model.buffers["1.num_batches_tracked"].item() == 3
    assert result.loss == pytest.approx(np.mean(losses), abs=1e-12)


def test_the_limits_of_mixup_are_plain_steps() -> None:
    table = bench()
    work = SGD(lr=0.3, batch_size=4, steps=5)
    plain = run_task(table, task(table, work)).result.model.params
    assert helpers.identical(run_task(table, task(table, work, augment=mixing(1.0))).result.model.params, plain)
    # λ = 0 trains on the partners alone, who are the same examples in another order.
    assert helpers.close(run_task(table, task(table, work, augment=mixing(0.0))).result.model.params, plain, 1e-14)
    assert not helpers.close(run_task(table, task(table, work, augment=mixing(0.5))).result.model.params, plain, 1e-3)


class Counting(nn.Sequential):
    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.passes += 1
        out: Tensor = super().forward(x)
        return out


def by_position(apply: Any, theta: Any, params: Any, batch: Any, ctx: Mapping[str, Any]) -> Tensor:
    return F.cross_entropy(apply(params, batch.x), ctx["labels"][batch.positions])


def by_label(apply: Any, theta: Any, params: Any, batch: Any, ctx: Mapping[str, Any]) -> Tensor:
    return F.cross_entropy(apply(params, batch.x), batch.y)


def twice(apply: Any, theta: Any, params: Any, batch: Any, ctx: Mapping[str, Any]) -> Tensor:
    """Two passes with dropout of their own, pulled together (as R-Drop does)."""
    one, two = apply(params, batch.x), apply(params, batch.x)
    assert not torch.equal(one, two)
    return F.cross_entropy(one, batch.y) + F.mse_loss(one, two)


def near_the_start(apply: Any, theta: Any, params: Any, batch: Any, ctx: Mapping[str, Any]) -> Tensor:
    """A pass without gradient first, of the very same parameters; then one of others; then the net's own."""
    with torch.no_grad():
        target = apply(params, batch.x)
    other = apply(ctx["other"], batch.x)
    logits = apply({**params}, batch.x)
    assert logits.requires_grad and not target.requires_grad
    return F.cross_entropy(logits, batch.y) + F.mse_loss(logits, target) + F.mse_loss(logits, other)


@pytest.mark.parametrize(("rule", "passes"), [(by_label, 1), (by_position, 1), (twice, 2), (near_the_start, 3)])
def test_mixup_takes_any_loss_and_runs_the_net_no_more_often(rule: Callable[..., Tensor], passes: int) -> None:
    net = Counting(nn.Linear(4, 5), nn.Dropout(0.3), nn.Linear(5, 3))
    table = bench(net)
    start = model_of(net)
    other = {name: 2 * t for name, t in start.params.items()}
    ctx = {"labels": table.y[torch.arange(N - 1, 0, -1)], "other": other}
    given = task(table, SGD(lr=0.1, batch_size=4, steps=6), start=start, loss=rule, ctx=ctx)
    Counting.passes = 0
    plain = run_task(table, given)
    assert Counting.passes == 6 * passes
    Counting.passes = 0
    mixed = run_task(table, replace(given, augment=mixing(0.5)))
    assert Counting.passes == 6 * passes
    assert mixed.passes == plain.passes
    assert mixed.passes[1.0] >= 3 * 24
    assert not helpers.close(mixed.result.model.params, plain.result.model.params, 1e-3)
    same = run_task(table, replace(given, augment=mixing(1.0)))
    assert helpers.identical(same.result.model.params, plain.result.model.params)


def test_targets_found_by_position_are_mixed_like_labels() -> None:
    table = bench()
    ctx = {"labels": table.y[torch.arange(N - 1, 0, -1)]}
    work = SGD(lr=0.3, batch_size=4, steps=6)
    ends = [
        run_task(table, task(table, work, augment=mixing(0.4), loss=rule, ctx=ctx)).result.model.params
        for rule in (None, by_label, by_position)
    ]
    assert helpers.identical(ends[0], ends[1])
    assert helpers.identical(ends[0], ends[2])


def test_two_losses_of_one_pass_are_the_loss_of_two_passes() -> None:
    """Without dropout it makes no difference whether the net runs once or twice."""

    def unseen(apply: Any, theta: Any, params: Any, batch: Any, ctx: Mapping[str, Any]) -> Tensor:
        return F.cross_entropy(apply({n: t * 1 for n, t in params.items()}, batch.x), batch.y)

    table = bench()
    work = SGD(lr=0.3, batch_size=4, steps=3)
    ends = [
        run_task(table, task(table, work, augment=mixing(0.4), loss=rule)).result.model.params
        for rule in (None, unseen)
    ]
    assert helpers.close(*ends, 1e-14)


def test_only_the_same_tensors_have_an_old_answer() -> None:
    asked: list[float] = []

    def apply(params: P.Params, x: Tensor, width: float | None = None) -> Tensor:
        asked.append(float(params["w"]))
        return params["w"] * x

    first, again = _recorded(apply)
    one, two, x = torch.tensor(1.0), torch.tensor(2.0), torch.ones(2)
    answers = [first({"w": one}, x), first({"w": two}, x)]
    assert again({"w": two}, x) is answers[1]
    assert again({"w": one}, x.clone()) is not answers[0]
    assert again({"w": one, "b": two}, x) is not answers[0]
    assert again({"w": one}, x) is answers[0]
    assert again({"w": one}, x) is not answers[0]  # asked once more than the first time
    assert asked == [1, 2, 1, 1, 1]
