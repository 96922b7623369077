"""Chains of dense layers, whose passes are written out for all clients at once (hybridfl/executors/stacked.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl import params as P
from hybridfl.executors.stacked import chain
from hybridfl.local import run_net


class Written(nn.Module):
    """With functions and methods in place of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(torch.tanh(F.relu(self.first(x.flatten(1)))).sigmoid())
        return logits


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return x + self.layer(x)


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1))
        return logits if x.shape[1] == 1 else logits * 2


def tied() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 8))
    net[2].weight = net[1].weight
    return net


def with_a_spare() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    net.register_parameter("spare", nn.Parameter(torch.zeros(2)))
    return net


class Trains(nn.Module):
    """Does something else in training, and is looked at when it was last evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x.flatten(1))
        return 2 * logits if self.training else logits


def with_a_hook() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    net[1].register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))
    return net


def one_layer_twice() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer)


CHAINS = {
    "relu": nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),
    "others": nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(8, 5), nn.GELU(), nn.Identity(), nn.Linear(5, 3)),
    "in place, no bias": nn.Sequential(
        nn.Flatten(), nn.Linear(8, 5, bias=False), nn.ReLU(inplace=True), nn.Linear(5, 3)
    ),
    "several rows an example": nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)),
    "functions": Written(),
}
OTHERS = {
    "used twice": Twice(),
    "one layer twice": one_layer_twice(),
    "tied weights": tied(),
    "a parameter that no layer has": with_a_spare(),
    "traceable but unknown": nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)),
    "flattens otherwise": nn.Sequential(nn.Flatten(2), nn.Linear(8, 3), nn.Flatten(), nn.Linear(3, 3)),
    "looks at shapes": Looks(),
    "other in training": Trains(),
    "a hook before a layer": with_a_hook(),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_written_out_passes_of_a_chain_of_dense_layers(name: str) -> None:
    net = CHAINS[name].double()
    layers = chain(net)
    assert layers is not None
    rng = np.random.default_rng(0)
    params = {n: torch.from_numpy(rng.standard_normal((3, *p.shape))) for n, p in net.named_parameters()}
    x = torch.from_numpy(rng.standard_normal((3, 5, 1, 2, 4)))
    upstream = torch.from_numpy(rng.standard_normal((3, 5, 3)))
    tape = layers.forward(params, x)
    found = layers.gradients(params, tape, upstream)
    stepped = P.clone(params)
    rates = {n: 0.1 * (i + 1) for i, n in enumerate(params)}
    layers.descend(stepped, layers.forward(stepped, x), upstream, rates, weight_decay=0.2)
    for k in range(3):
        own = {n: tensor[k].clone().requires_grad_() for n, tensor in params.items()}
        logits = run_net(net, own, {}, x[k].clone())
        assert torch.allclose(tape[-1].after[k], logits, rtol=0, atol=1e-12)
        expected = torch.autograd.grad((logits * upstream[k]).sum(), list(own.values()))
        for (n, tensor), grad in zip(own.items(), expected, strict=True):
            assert torch.allclose(found[n][k], grad, rtol=0, atol=1e-12)
            after = (1 - rates[n] * 0.2) * tensor - rates[n] * grad
            assert torch.allclose(stepped[n][k], after, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_more_than_a_chain_of_dense_layers_is_left_to_autograd(name: str) -> None:
    training = OTHERS[name].training
    assert chain(OTHERS[name]) is None
    assert OTHERS[name].training == training
