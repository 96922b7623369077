"""Nets made narrower: what is scaled, how it is rounded, and that nothing happens at width 1."""

from __future__ import annotations

import helpers
import pytest
import torch
from torch import nn

from hybridfl.errors import ConfigError
from hybridfl.local import torch_random
from hybridfl.models.cnn import CNN
from hybridfl.models.mlp import MLP
from hybridfl.models.width import scaled, scaled_groups

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "width", "result"),
    [(64, 1.0, 64), (64, 0.125, 8), (5, 0.5, 3), (3, 0.5, 2), (7, 0.2, 1), (3, 0.1, 1), (1, 0.001, 1), (16, 1.5, 24)],
)
def test_sizes_are_rounded_half_up_and_at_least_1(size: int, width: float, result: int) -> None:
    assert scaled(size, width) == result


@pytest.mark.parametrize(
    ("groups", "channels", "width", "result"),
    [
        (4, 16, 1.0, 4),
        (16, 16, 1.0, 16),
        (4, 16, 0.5, 2),  # 8 channels: four a group, as before
        (4, 16, 0.125, 1),
        (4, 16, 2.0, 8),
        (4, 20, 0.75, 3),  # 15 channels
        (4, 28, 0.5, 2),  # 14 channels
        (4, 24, 0.7, 1),  # 17 channels, which only 1 divides among 1, 2, 3
        (8, 24, 0.6, 2),  # 14 channels, 5 groups wanted
    ],
)
def test_groups_are_scaled_with_the_channels(groups: int, channels: int, width: float, result: int) -> None:
    assert scaled_groups(groups, channels, width) == result
    assert scaled(channels, width) % result == 0


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_groups_that_do_not_divide_at_width_1_are_refused(width: float) -> None:
    with pytest.raises(ConfigError, match=r"got 5, which does not divide the 12 .* nearest valid value: 4\.") as caught:
        scaled_groups(5, 12, width)
    assert caught.value.key == "groups"


def test_at_width_1_an_mlp_is_drawn_as_ever() -> None:
    with torch_random(3, CPU):
        net = MLP((1, 4, 4), 3, (7, 5), width=1.0)
    with torch_random(3, CPU):
        flat, a, b, c = nn.Flatten(), nn.Linear(16, 7), nn.Linear(7, 5), nn.Linear(5, 3)
    reference = nn.Sequential(flat, a, nn.ReLU(), b, nn.ReLU(), c)
    x = torch.randn(6, 1, 4, 4)
    assert torch.equal(net(x), reference(x))


def test_at_width_1_a_cnn_is_drawn_as_ever() -> None:
    with torch_random(3, CPU):
        net = CNN((2, 8, 12), 3, (4, 8), hidden=5, groups=2, width=1.0)
    with torch_random(3, CPU):
        first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        dense, head = nn.Linear(8 * 2 * 3, 5), nn.Linear(5, 3)
    one = nn.Sequential(first, nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2))
    two = nn.Sequential(second, nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2))
    x = torch.randn(6, 2, 8, 12)
    assert torch.equal(net(x), head(dense(two(one(x)).flatten(1)).relu()))


@pytest.mark.parametrize("part", [1, 2, 4, 8])
def test_parameters_of_a_narrow_mlp(part: int) -> None:
    net, a, b = MLP((16,), 10, (64, 32), width=1 / part), 64 // part, 32 // part
    assert sum(p.numel() for p in net.parameters()) == (16 * a + a) + (a * b + b) + (b * 10 + 10)
    _, hidden = (layer for layer in net.body if isinstance(layer, nn.Linear))
    assert hidden.weight.numel() * part**2 == 64 * 32


@pytest.mark.parametrize("part", [1, 2, 4, 8])
def test_parameters_of_a_narrow_cnn(part: int) -> None:
    net, a, b, c = CNN((3, 8, 8), 10, width=1 / part), 16 // part, 32 // part, 64 // part
    convolutions = (27 * a + a) + (9 * a * b + b)
    norms = 2 * a + 2 * b
    dense = (4 * b * c + c) + (10 * c + 10)
    assert sum(p.numel() for p in net.parameters()) == convolutions + norms + dense
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    assert [m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)] == [max(1, 4 // part)] * 2


def test_a_wide_net_scales_the_other_way() -> None:
    assert MLP((16,), 10, (8,), width=2.5).head.in_features == 20


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_width_of_nothing_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.width: got 0: must be above 0") as caught:
        helpers.plan("baseline=fedavg", f"model={model}", "model.width=0")
    assert caught.value.key == "model.width"
