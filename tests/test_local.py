"""Local work: the optimisers are torch's, every batch is keyed, and nothing outside is touched."""

from __future__ import annotations

import math
from typing import Any

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from local_helpers import N, bench, model_of, task
from torch import nn

from hybridfl import params as P
from hybridfl import probes
from hybridfl.checkpoints import pack, unpack
from hybridfl.errors import ConfigError
from hybridfl.local import predict, run_task
from hybridfl.optimizers import SGD, Adam, AdamW, LocalWork, batches, clipped, learning_rates
from hybridfl.rng import stream
from hybridfl.types import Model

# -- optimisers ------------------------------------------------------------------------------------------------------

OPTIMISERS = {
    "sgd": (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "decay": (SGD(lr=0.1, weight_decay=0.2), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2)),
    "momentum": (
        SGD(lr=0.1, momentum=0.9, weight_decay=0.2),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.2),
    ),
    "nesterov": (
        SGD(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    ),
    "adam": (Adam(lr=0.05), lambda p: torch.optim.Adam(p, lr=0.05)),
    "adam options": (
        Adam(lr=0.05, beta1=0.7, beta2=0.9, eps=1e-3, weight_decay=0.3),
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.3),
    ),
    "adamw": (
        AdamW(lr=0.05, beta1=0.8, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.999), weight_decay=0.3),
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_agree_with_torch(name: str) -> None:
    """20 steps on a quadratic, the state packed and unpacked after 7 of them."""
    work, reference = OPTIMISERS[name]
    generator = torch.Generator().manual_seed(1)
    theta = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in (("a", (3, 2)), ("b", (4,)))}
    target = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in theta.items()}
    parameters = {n: nn.Parameter(t.clone()) for n, t in theta.items()}
    optimiser = reference(parameters.values())
    state: dict[str, Any] = {}
    lrs = learning_rates(work, theta, 0, 1)
    for step in range(20):
        work.update(theta, {n: t - target[n] for n, t in theta.items()}, state, lrs)
        for n, parameter in parameters.items():
            parameter.grad = parameter.detach() - target[n]
        optimiser.step()
        if step == 7:
            state = unpack(pack(state))
    assert helpers.close(theta, P.detach(parameters), 1e-12)


def test_a_task_is_a_torch_training_loop_in_two_parts() -> None:
    """Momentum, weight decay, clipping and continued optimiser state, batch by batch."""
    work = SGD(lr=0.2, momentum=0.9, weight_decay=0.01, clip_norm=0.7, batch_size=4, steps=6)
    table = bench()
    first = run_task(table, task(table, work, seed=1, keep_optimizer=True)).result
    second = run_task(table, task(table, work, seed=2, start=first.model, optimizer_state=first.optimizer_state)).result
    assert second.optimizer_state is None
    parameters = list(table.net.parameters())
    optimiser = torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=0.01)
    norms, losses = [], []
    for seed in (1, 2):
        for picked in batches(N - 1, work, stream(seed, "local"), 6):
            rows = torch.arange(N - 1, 0, -1)[torch.from_numpy(picked)]
            optimiser.zero_grad()
            loss = F.cross_entropy(table.net(table.x[rows]), table.y[rows])
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(parameters, 0.7).item())
            losses.append(loss.item())
            optimiser.step()
    assert min(norms) < 0.7 < max(norms)  # some are clipped and some are not
    assert helpers.close(second.model.params, P.detach(dict(table.net.named_parameters())), 1e-12)
    assert math.isclose(second.loss, np.mean(losses[6:]), abs_tol=1e-12)


def test_continuing_leaves_the_state_it_continues_from() -> None:
    table = bench()
    work = Adam(steps=2)
    state = run_task(table, task(table, work, keep_optimizer=True)).result.optimizer_state
    before = unpack(pack(state))
    again = run_task(table, task(table, work, optimizer_state=state, keep_optimizer=True)).result.optimizer_state
    assert again is not None
    assert again["step"] == 4
    assert helpers.identical(state, before)


@pytest.mark.parametrize("limit", [0.01, 1.0, 100.0])
def test_clipping_is_torchs(limit: float) -> None:
    grads = {"a": torch.tensor([3.0, -1.0]).double(), "b": torch.tensor([[2.0]]).double()}
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
    for parameter, grad in zip(parameters, grads.values(), strict=True):
        parameter.grad = grad.clone()
    nn.utils.clip_grad_norm_(parameters, limit)
    for mine, parameter in zip(clipped(grads, limit).values(), parameters, strict=True):
        assert torch.allclose(mine, parameter.grad, rtol=0, atol=1e-15)


def test_the_rate_decays_by_the_round_of_birth() -> None:
    table = bench()
    decayed = run_task(table, task(table, SGD(lr=0.8, lr_decay=0.5), round=3)).result
    constant = run_task(table, task(table, SGD(lr=0.1), round=0)).result
    assert decayed.birth == 3
    assert helpers.identical(decayed.model.params, constant.model.params)


def test_factors_scale_the_rate_of_matching_entries() -> None:
    work = SGD(lr=0.5, lr_decay=0.1, lr_factors={"2.*": 0.0, "*.bias": 0.5})
    rates = learning_rates(work, dict.fromkeys(["0.weight", "0.bias", "2.bias"], torch.zeros(1)), 1, 2)
    assert rates == pytest.approx({"0.weight": 0.05, "0.bias": 0.025, "2.bias": 0.0})
    table = bench()
    start = model_of(table.net)
    moved = run_task(table, task(table, work, start=start)).result.delta
    assert [name for name, t in moved.items() if t.any()] == ["0.weight", "0.bias"]


def test_local_work_itself_is_no_optimiser() -> None:
    with pytest.raises(ConfigError, match="_target_: is required"):
        LocalWork()


# -- batches ---------------------------------------------------------------------------------------------------------


@given(examples=st.integers(1, 40), size=st.integers(1, 50), epochs=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_epoch_covers_all_examples(examples: int, size: int, epochs: int, seed: int) -> None:
    work = SGD(batch_size=size, epochs=epochs)
    seen = list(batches(examples, work, stream(seed, "t"), work.count(examples)))
    per_epoch = math.ceil(examples / size)
    assert len(seen) == epochs * per_epoch
    for epoch in range(epochs):
        passed = seen[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(np.concatenate(passed).tolist()) == list(range(examples))
        assert [len(b) for b in passed[:-1]] == [size] * (per_epoch - 1)
        assert 1 <= len(passed[-1]) <= size


@given(examples=st.integers(1, 40), size=st.integers(1, 50), steps=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_steps_are_a_stream_of_full_batches(examples: int, size: int, steps: int, seed: int) -> None:
    work = SGD(batch_size=size, steps=steps, epochs=7)
    assert work.count(examples) == steps
    seen = list(batches(examples, work, stream(seed, "t"), steps))
    assert [len(batch) for batch in seen] == [min(size, examples)] * steps
    flat = np.concatenate(seen)
    for begin in range(0, len(flat) - examples + 1, examples):
        assert sorted(flat[begin : begin + examples].tolist()) == list(range(examples))


def test_epochs_are_reshuffled_and_keyed() -> None:
    work = SGD(batch_size=20, epochs=2)
    one, two = batches(20, work, stream(0, "t"), 2)
    assert one.tolist() != two.tolist()
    again = next(iter(batches(20, work, stream(0, "t"), 2)))
    assert again.tolist() == one.tolist()


# -- tasks -----------------------------------------------------------------------------------------------------------


def test_a_task_reads_its_own_rows_and_leaves_its_start() -> None:
    table = bench()
    table.x[0] = math.nan  # nobody's example
    start = model_of(table.net)
    before = P.clone(start.params)
    outcome = run_task(table, task(table, SGD(epochs=3, batch_size=4), start=start))
    assert helpers.identical(start.params, before)
    assert P.all_finite(outcome.result.model.params)
    assert (outcome.result.examples, outcome.result.steps, outcome.passes) == (10, 9, {1.0: 3 * 30})
    assert helpers.identical(P.subtract(outcome.result.model.params, before), outcome.result.delta)


def test_dropout_is_keyed_and_torchs_own_stream_untouched() -> None:
    table = bench(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = run_task(table, task(table, SGD())).result.model
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    two = run_task(table, task(table, SGD())).result.model
    assert helpers.identical(one, two)
    same_batches = task(table, SGD(), seed=1)
    vars(same_batches)["shuffle"] = task(table, SGD()).shuffle
    assert not helpers.identical(one, run_task(table, same_batches).result.model)


def test_buffers_are_trained_along_and_come_back() -> None:
    table = bench(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    start = model_of(table.net)
    result = run_task(table, task(table, SGD(batch_size=5, epochs=2), start=start)).result
    assert result.model.buffers["0.num_batches_tracked"].item() == 4
    assert start.buffers["0.num_batches_tracked"].item() == 0
    assert not start.buffers["0.running_mean"].any()
    assert result.model.buffers["0.running_mean"].any()


def test_a_measurement_leaves_theta_and_reads_the_view_in_evaluation_mode() -> None:
    table = bench(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.9), nn.Linear(5, 3)))
    start = model_of(table.net)
    wanted = {"loss": probes.mean_loss, "logits": probes.logits, "gradient": probes.gradient}
    outcome = run_task(table, task(table, SGD(), steps=0, start=start, probes=wanted))
    result = outcome.result
    assert result.model.params is start.params
    assert (result.steps, outcome.passes) == (0, {1.0: 10 * (1 + 1 + 3)})
    assert math.isnan(result.loss)
    net = table.net.eval()
    rows = torch.arange(N - 1, 0, -1)
    loss = F.cross_entropy(net(table.x[rows]), table.y[rows])
    loss.backward()
    assert torch.allclose(result.probes["loss"], loss, rtol=0, atol=1e-14)
    assert torch.allclose(result.probes["logits"], net(table.x[rows]), rtol=0, atol=1e-14)
    expected = {name: p.grad for name, p in net.named_parameters()}
    assert helpers.close(result.probes["gradient"], expected, 1e-14)


def test_rules_see_theta_and_context() -> None:
    table = bench()

    def loss(apply: Any, theta: Any, params: Any, batch: Any, ctx: Any) -> torch.Tensor:
        return ctx["scale"] * F.cross_entropy(apply(params, batch.x), batch.y)

    def grad(grads: Any, theta: Any, ctx: Any) -> Any:
        return {name: g / ctx["scale"] for name, g in grads.items()}

    plain = run_task(table, task(table, SGD())).result
    ruled = run_task(table, task(table, SGD(), loss=loss, grad=grad, ctx={"scale": 4.0})).result
    assert helpers.identical(ruled.model.params, plain.model.params)
    assert ruled.loss == 4 * plain.loss


def test_entries_of_theta_that_the_loss_does_not_read_stay() -> None:
    table = bench()
    start = model_of(table.net)
    extra = Model(start.params | {"unused": torch.ones(2).double()}, start.buffers)

    def without(theta: Any, frozen: Any) -> Any:
        return {name: t for name, t in theta.items() if name != "unused"}

    result = run_task(table, task(table, SGD(), start=extra, parametrization=without)).result
    assert result.model.params["unused"].tolist() == [1, 1]


def test_predict_is_the_same_in_chunks() -> None:
    table = bench(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.9), nn.Linear(5, 3)))
    model = model_of(table.net)
    whole = predict(table.net, model, table.x, chunk=100)
    assert whole.shape == (N, 3)
    assert torch.allclose(predict(table.net, model, table.x, chunk=4), whole, rtol=0, atol=1e-15)
