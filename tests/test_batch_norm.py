"""BatchNorm under every policy, against statistics by hand and torch's own cumulative average."""

from __future__ import annotations

import copy

import helpers
import pytest
import torch
from torch import Tensor, nn

from hybridfl.errors import ConfigError
from hybridfl.federation import initial_model
from hybridfl.models.batch_norm import names, reestimated, with_policy
from hybridfl.models.resnet import ResNet
from hybridfl.types import Model

CPU = torch.device("cpu")


class Activated(nn.BatchNorm1d):
    """A layer that does more than BatchNorm, as some of timm's do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def two_layers() -> nn.Module:
    """A net in float64 with statistics of some training, and dropout."""
    torch.manual_seed(0)
    layers = (
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4, 2),
        nn.BatchNorm1d(2, momentum=0.3),
    )
    net = nn.Sequential(*layers).double()
    for _ in range(3):
        net(torch.randn(5, 3, dtype=torch.float64))
    return net


def model_of(net: nn.Module) -> Model:
    return initial_model(net, CPU, torch.float64)


def some(number: int, size: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(size, 3, generator=generator, dtype=torch.float64) for _ in range(number)]


def called(net: nn.Module, model: Model, x: Tensor, training: bool) -> Tensor:
    net.train(training)
    return torch.func.functional_call(net, {**model.params, **model.buffers}, (x,))


# -- names -----------------------------------------------------------------------------------------------------------


def test_names_are_those_of_batch_norm_alone() -> None:
    fields = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert names(two_layers()) == {f"{layer}.{field}" for layer in (1, 5) for field in fields}
    assert names(nn.BatchNorm1d(3)) == set(fields)
    assert names(nn.BatchNorm1d(3, affine=False, track_running_stats=False)) == set()
    assert names(nn.Sequential(nn.GroupNorm(1, 2), nn.InstanceNorm1d(2), nn.LayerNorm(2))) == set()
    net = ResNet((3, 32, 32), 10, norm="batch")
    kept = names(net)
    assert {name for name, _ in net.named_buffers()} <= kept
    assert len(kept) == 5 * 19
    assert all("norm" in name for name in kept)


# -- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["average", "local", "reestimate"])
def test_some_policies_leave_the_net(policy: str) -> None:
    net = two_layers()
    assert with_policy(net, policy) is net  # type: ignore[arg-type]


def test_statistics_of_the_batch_in_training_and_evaluation() -> None:
    net = two_layers()
    before = copy.deepcopy(net.state_dict())
    changed = with_policy(net, "batch")
    assert list(changed.buffers()) == []
    assert [name for name, _ in changed.named_parameters()] == [name for name, _ in net.named_parameters()]
    changed[3].p = 0.0
    (x,) = some(1)
    y = x @ net[0].weight.T + net[0].bias
    y = (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()
    y = y.relu() @ net[4].weight.T + net[4].bias
    y = (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()
    for training in (True, False):
        torch.testing.assert_close(changed.train(training)(x), y, rtol=1e-12, atol=1e-12)
    assert helpers.identical(dict(net.state_dict()), dict(before))
    assert [layer.track_running_stats for layer in (net[1], changed[1])] == [True, False]


def test_frozen_statistics_in_training_and_evaluation() -> None:
    net = two_layers()
    frozen = with_policy(net, "frozen")
    frozen[3].p = 0.0
    model, (x,) = model_of(frozen), some(1)
    expected = copy.deepcopy(net).eval()(x)
    before = copy.deepcopy(model.buffers)
    for training in (True, False, True):
        assert torch.equal(called(frozen, model, x, training), expected)
    assert helpers.identical(model.buffers, before)
    params = {name: tensor.requires_grad_() for name, tensor in model.params.items()}
    out = called(frozen, Model(params, model.buffers), x, True)
    gradient = torch.autograd.grad(out[0, 0], list(params.values()))
    assert all(g.abs().sum() > 0 for g in gradient)
    assert not torch.equal(net.train()(x), expected)  # the net itself is as it was


def test_a_layer_that_does_more_than_batch_norm_still_does() -> None:
    net = nn.Sequential(Activated(3))
    x = torch.randn(20, 3)
    for policy in ("batch", "frozen"):
        out = with_policy(net, policy).train()(x)  # type: ignore[arg-type]
        assert (out >= 0).all()
        assert (out == 0).any()


@pytest.mark.parametrize("policy", ["local", "reestimate", "batch", "frozen"])
def test_a_net_without_batch_norm_is_refused(policy: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"got {policy}: .* no BatchNorm layers; nearest valid choice: average"
    ) as caught:
        with_policy(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)), policy)  # type: ignore[arg-type]
    assert caught.value.key == "model.batch_norm"


@pytest.mark.parametrize("policy", ["reestimate", "frozen"])
def test_a_policy_about_running_statistics_needs_some(policy: str) -> None:
    with pytest.raises(ConfigError, match=rf"got {policy}: .* have no running statistics; .* average"):
        with_policy(nn.BatchNorm1d(2, track_running_stats=False), policy)  # type: ignore[arg-type]


# -- statistics computed anew ----------------------------------------------------------------------------------------


def test_of_one_batch_they_are_its_mean_and_unbiased_variance() -> None:
    net = two_layers()
    model, (x,) = model_of(net), some(1)
    found = reestimated(net, model, [x]).buffers
    y = x @ net[0].weight.T + net[0].bias
    torch.testing.assert_close(found["1.running_mean"], y.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["1.running_var"], y.var(0, unbiased=True), rtol=1e-12, atol=1e-12)
    y = (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-5).sqrt()
    y = y.relu() @ net[4].weight.T + net[4].bias  # no dropout
    torch.testing.assert_close(found["5.running_mean"], y.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["5.running_var"], y.var(0, unbiased=True), rtol=1e-12, atol=1e-12)
    assert found["1.num_batches_tracked"] == 1


def test_the_same_batch_again_changes_nothing_and_the_order_does_not_matter() -> None:
    net = two_layers()
    model, batches = model_of(net), some(3)
    one, two = (reestimated(net, model, batches[:1] * times).buffers for times in (1, 2))
    assert helpers.close(one | {n: two[n] for n in one if "tracked" in n}, two)
    forward, backward = (reestimated(net, model, order).buffers for order in (batches, batches[::-1]))
    assert helpers.close(forward, backward)
    assert not helpers.close(forward, one, 1e-3)


def test_they_are_torchs_own_cumulative_average() -> None:
    net = two_layers()
    model, batches = model_of(net), [*some(3), *some(2, 9)]
    reference = copy.deepcopy(net).train()
    reference[3].p = 0.0
    for layer in (reference[1], reference[5]):
        layer.reset_running_stats()
        layer.momentum = None
    for x in batches:
        reference(x)
    assert helpers.identical(reestimated(net, model, iter(batches)).buffers, dict(reference.named_buffers()))


def test_what_was_there_before_does_not_matter_and_stays() -> None:
    net = two_layers()
    model = model_of(net)
    wild = Model(model.params, {name: torch.full_like(t, 77) for name, t in model.buffers.items()})
    state = copy.deepcopy(net.state_dict())
    found = reestimated(net, wild, some(2))
    assert helpers.identical(found.buffers, reestimated(net, model, some(2)).buffers)
    assert found.params is wild.params
    assert all((t == 77).all() for t in wild.buffers.values())
    assert helpers.identical(dict(net.state_dict()), dict(state))
    assert [net[1].momentum, net[5].momentum] == [0.1, 0.3]
    assert not any(module.training for module in net.modules())


def test_an_error_leaves_the_momentum() -> None:
    net = two_layers()
    with pytest.raises(RuntimeError):
        reestimated(net, model_of(net), [*some(1), torch.zeros(2, 99, dtype=torch.float64)])
    assert [net[1].momentum, net[5].momentum] == [0.1, 0.3]


def test_without_batches_there_are_none() -> None:
    net = two_layers()
    with pytest.raises(ValueError, match="no batches"):
        reestimated(net, model_of(net), [])


def test_a_layer_at_the_top_and_one_without_statistics() -> None:
    x = torch.randn(8, 3, dtype=torch.float64)
    net = nn.BatchNorm1d(3).double()
    torch.testing.assert_close(reestimated(net, model_of(net), [x]).buffers["running_mean"], x.mean(0))
    bare = nn.BatchNorm1d(3, track_running_stats=False).double()
    assert reestimated(bare, model_of(bare), [x]).buffers == {}


def test_scores_with_statistics_of_the_data_are_those_of_training_mode() -> None:
    torch.manual_seed(3)
    net = ResNet((1, 8, 8), 3, (4, 6), (1, 1), norm="batch", groups=2).double()
    model, x = model_of(net), torch.randn(40, 1, 8, 8, dtype=torch.float64)
    found = reestimated(net, model, [x])
    fresh = called(net, Model(model.params, copy.deepcopy(model.buffers)), x, training=True)
    # Training mode divides by the biased variance, of 640 or 2,560 pixels.
    torch.testing.assert_close(called(net, found, x, training=False), fresh, rtol=0.01, atol=0.01)
