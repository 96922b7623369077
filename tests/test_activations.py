"""The inputs of modules, read in one pass."""

from __future__ import annotations

import permutation_helpers as nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl.activations import activations
from hybridfl.models.mlp import MLP


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules())


def test_they_are_what_the_model_computes_up_to_there() -> None:
    net = MLP((3, 8, 8), 5, (7, 6))
    model, x = nets.model(net, 1), nets.inputs(number=4)
    seen = activations(net, model, x, ["head", "body.1", "head", "body.4"])
    assert list(seen) == ["head", "body.1", "body.4"]
    p = model.params
    first = F.relu(x.flatten(1) @ p["body.1.weight"].T + p["body.1.bias"])
    second = first @ p["body.3.weight"].T + p["body.3.bias"]
    assert torch.equal(seen["body.1"], x.flatten(1))
    torch.testing.assert_close(seen["body.4"], second)
    torch.testing.assert_close(seen["head"], F.relu(second))


def test_the_pass_is_one_of_evaluation_without_gradient_or_trace() -> None:
    net = nets.plain(nn.BatchNorm2d).train()
    model, x = nets.model(net), nets.inputs(number=6)
    before = {name: tensor.clone() for name, tensor in model.buffers.items()}
    params = {name: tensor.requires_grad_() for name, tensor in model.params.items()}
    seen = activations(net, model._replace(params=params), x, ["12"])
    one_by_one = [activations(net, model, x[i : i + 1], ["12"])["12"] for i in range(6)]
    torch.testing.assert_close(seen["12"], torch.cat(one_by_one))
    assert not seen["12"].requires_grad
    assert hooks(net) == 0
    assert all(torch.equal(model.buffers[name], before[name]) for name in before)


class InPlace(nn.Module):
    """What the layer was given changes after it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = 1 * x
        out = self.layer(input=x)
        x += out
        return x


def test_later_changes_in_place_do_not_show() -> None:
    net, x = InPlace(), torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(activations(net, nets.model(net), x, ["layer"])["layer"], x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise RuntimeError("four, please")
        return self.layer(self.layer(x))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("layer", "'layer' ran 2 times"),
        ("idle", "'idle' ran 0 times"),
        ("lair", r"no module 'lair'\. Did you mean 'layer'"),
    ],
)
def test_a_module_that_does_not_run_once_is_named(name: str, text: str) -> None:
    net = Twice()
    with pytest.raises(ValueError, match=text):
        activations(net, nets.model(net), torch.zeros(2, 4, dtype=torch.float64), [name])
    assert hooks(net) == 0


def test_hooks_are_gone_after_an_error() -> None:
    net = Twice()
    with pytest.raises(RuntimeError, match="four"):
        activations(net, nets.model(net), torch.zeros(2, 3, dtype=torch.float64), ["layer"])
    assert hooks(net) == 0
