"""A net run with other tensors in place of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hybridfl.stateless import run_net


class Tied(nn.Module):
    """Two layers that share a weight, a norm with buffers, a layer without bias, and a way to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("as asked")
        found: Tensor = self.second(self.norm(self.first(x)))
        return found


def others(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    params = {name: torch.randn_like(tensor).requires_grad_() for name, tensor in net.named_parameters()}
    return params, {name: tensor.clone() for name, tensor in net.named_buffers()}


def test_it_is_torchs_functional_call() -> None:
    torch.manual_seed(0)
    net, x = Tied(), torch.randn(6, 4)
    params, buffers = others(net)
    assert list(params) == ["first.weight", "first.bias", "norm.weight", "norm.bias"]
    expected_buffers = {name: tensor.clone() for name, tensor in buffers.items()}
    expected = torch.func.functional_call(net, {**expected_buffers, **params}, (x,))
    found = run_net(net, params, buffers, x)
    assert torch.equal(found, expected)
    # running statistics have moved in the tensors that were given
    assert all(torch.equal(buffers[name], expected_buffers[name]) for name in buffers)
    ours = torch.autograd.grad(found.square().sum(), list(params.values()))
    theirs = torch.autograd.grad(expected.square().sum(), list(params.values()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_the_net_has_its_own_tensors_again(fails: bool) -> None:
    net = Tied()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
    net.fails = fails
    if fails:
        with pytest.raises(RuntimeError, match="as asked"):
            run_net(net, *others(net), torch.randn(6, 4))
    else:
        run_net(net, *others(net), torch.randn(6, 4))
    after = dict([*net.named_parameters(), *net.named_buffers()])
    assert all(id(after[name]) == place and torch.equal(after[name], value) for name, (place, value) in before.items())
    assert net.second.weight is net.first.weight


def test_what_is_not_given_stays_the_nets_own() -> None:
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double(), torch.randn(2, 3).double()
    own = net[1].bias.detach().clone()
    params = {"1.weight": torch.zeros(2, 3).double()}
    assert torch.equal(run_net(net, params, {}, x), own.expand(2, 2))


def test_params_go_before_buffers_and_layers_move_with_the_net() -> None:
    net, x = nn.BatchNorm1d(2, affine=False).eval(), torch.ones(1, 2)
    buffers = {name: tensor.clone() for name, tensor in net.named_buffers()}
    shifted = run_net(net, {"running_mean": torch.tensor([1.0, 3.0])}, buffers, x)
    assert torch.allclose(shifted, torch.tensor([[0.0, -2.0]]), atol=1e-4)
    assert run_net(net.double(), {}, {}, x.double()).dtype is torch.float64
