"""Convolutional nets with the channels of all clients side by side (hybridfl/executors/grouped.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hybridfl.executors.grouped import grouped
from hybridfl.local import run_net


def pooled(*stages: nn.Module, dense: tuple[nn.Module, ...]) -> nn.Module:
    return nn.Sequential(*stages, nn.Flatten(), *dense)


CONVOLUTIONAL = {
    "pooling and a hidden layer": pooled(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), dense=(nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3))
    ),
    "normalised, no bias": pooled(
        nn.Conv2d(2, 4, 3, padding="same", bias=False),
        nn.GroupNorm(2, 4),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        dense=(nn.Linear(4, 3, bias=False),),
    ),
    "groups, strides and gaps": pooled(
        nn.Conv2d(2, 4, (2, 3), stride=(1, 2), groups=2),
        nn.GroupNorm(4, 4, affine=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 2, 2, dilation=(2, 1)),
        nn.AvgPool2d(1),
        dense=(nn.Linear(2, 3),),
    ),
}
LEFT_TO_VMAP = {
    "dense alone": nn.Sequential(nn.Flatten(), nn.Linear(48, 3)),
    "pooling alone": pooled(nn.MaxPool2d(2), dense=(nn.Linear(12, 3),)),
    "pads with itself": pooled(nn.Conv2d(2, 1, 3, padding=1, padding_mode="circular"), dense=(nn.Linear(24, 3),)),
    "batch norm": pooled(nn.Conv2d(2, 1, 1), nn.BatchNorm2d(1), dense=(nn.Linear(24, 3),)),
    "dense over columns": pooled(nn.Conv2d(2, 1, 1), nn.Linear(6, 6), dense=(nn.Linear(24, 3),)),
    "not flattened": nn.Sequential(nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1)),
    "one convolution twice": pooled(*[nn.Conv2d(2, 2, 1)] * 2, dense=(nn.Linear(48, 3),)),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_channels_of_all_clients_side_by_side(name: str) -> None:
    net = CONVOLUTIONAL[name].double()
    layers = grouped(net)
    assert layers is not None
    rng = np.random.default_rng(0)
    params = {
        n: torch.from_numpy(rng.standard_normal((3, *p.shape))).requires_grad_() for n, p in net.named_parameters()
    }
    x = torch.from_numpy(rng.standard_normal((3, 5, 2, 4, 6)))
    upstream = torch.from_numpy(rng.standard_normal((3, 5, 3)))
    logits = layers.forward(params, x)
    found = dict(zip(params, torch.autograd.grad(logits, list(params.values()), upstream), strict=True))
    for k in range(3):
        own = {n: tensor[k].detach().clone().requires_grad_() for n, tensor in params.items()}
        expected = run_net(net, own, {}, x[k].clone())
        assert torch.allclose(logits[k], expected, rtol=0, atol=1e-12)
        grads = torch.autograd.grad(expected, list(own.values()), upstream[k])
        for (n, _), grad in zip(own.items(), grads, strict=True):
            assert torch.allclose(found[n][k], grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LEFT_TO_VMAP)
def test_what_is_more_than_convolutions_and_dense_layers_is_left_to_vmap(name: str) -> None:
    assert grouped(LEFT_TO_VMAP[name]) is None
