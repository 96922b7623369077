"""What merges measure: the inputs of layers, Gram matrices, the Fisher information and barriers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl import params as P
from hybridfl import probes
from hybridfl.activations import inputs_of
from hybridfl.local import Task, Workbench, run_task
from hybridfl.merging.barrier import barrier
from hybridfl.optimizers import SGD
from hybridfl.params import Params
from hybridfl.types import Job, Model


def vector(*values: float) -> Params:
    return {"w": torch.tensor(values, dtype=torch.float64)}


# -- barriers --------------------------------------------------------------------------------------------------------


def test_a_barrier_by_hand() -> None:
    """A double well with unequal floors: the loss x² (1 - x)² + x on the way from 0 to 1 exceeds the line by 1/16."""
    seen = []

    def loss(params: Params) -> float:
        x = float(params["w"])
        seen.append(x)
        return x**2 * (1 - x) ** 2 + x

    found = barrier(loss, vector(0), vector(1))
    assert seen == pytest.approx([i / 10 for i in range(11)])
    assert found.height == pytest.approx(1 / 16, abs=1e-15)
    assert found.at == 0.5
    assert barrier(lambda p: loss(p) ** 0 - float(p["w"]) * (1 - float(p["w"])), vector(0), vector(1)).height == 0
    assert barrier(lambda p: math.nan if float(p["w"]) == 0.3 else 0.0, vector(0), vector(1), 11).at == 0.3


# -- inputs of layers ------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer that is called twice, one that is not called, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle, self.head = nn.Linear(3, 3), nn.Linear(2, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.layer(self.layer(x))))
        return out


def test_inputs_are_caught_and_hooks_removed() -> None:
    net, x = Twice(), torch.randn(4, 3)
    found = inputs_of(lambda: net(x), net, ["head", "layer", "idle"])
    assert list(found) == ["head", "layer", "idle"]
    once = net.layer(x)
    assert torch.equal(torch.cat(found["layer"]), torch.cat([x, once]))
    assert torch.equal(found["head"][0], torch.relu(net.layer(once)))
    assert found["idle"] == []
    assert not found["head"][0].requires_grad
    with pytest.raises(RuntimeError, match="shapes"):
        inputs_of(lambda: net(torch.zeros(1, 5)), net, ["layer", "head"])
    assert not any(module._forward_pre_hooks for module in net.modules())


def measured(net: nn.Module, x: Tensor, y: Tensor, probe: Any, chunk: int = 3) -> tuple[Any, int]:
    """A probe's answer, and the passes of an example it took."""
    bench = Workbench(net.double(), x.double(), y, chunk)
    model = Model(P.clone(dict(net.named_parameters())), P.clone(dict(net.named_buffers())))
    job = Job(0, model, steps=0, probes={"it": probe})
    task = Task(job, SGD(), 0, torch.arange(len(x)), 0, 1, 0, ())
    outcome = run_task(bench, task)
    return outcome.result.probes["it"], outcome.passes[1.0]


CONVOLUTIONS = {
    "plain": nn.Conv2d(2, 3, 3),
    "oblong": nn.Conv2d(2, 3, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "same": nn.Conv2d(2, 3, 4, padding="same"),
    "circular": nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_gram_of_a_convolution_is_that_of_its_patches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are 1 at one place each copy the patches out."""
    monkeypatch.setattr(probes, "PIECE", 100)  # several pieces
    layer = CONVOLUTIONS[name].double()
    x = torch.randn(5, 2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))
    net.double()(x)
    grams, passes = measured(net, x, torch.zeros(5).long(), probes.Gram())
    assert passes == 5
    gram = grams["0"]
    size = layer.weight[0].numel()
    assert gram.shape == (size, size)
    with torch.no_grad():
        weights = torch.eye(size).double().reshape(size, *layer.weight.shape[1:])
        wide = copy.deepcopy(layer)
        wide.weight, wide.bias, wide.out_channels = nn.Parameter(weights), None, size
        y = wide(x).transpose(0, 1).flatten(1)
    assert torch.allclose(gram, y @ y.T, rtol=0, atol=1e-11)
    diagonal, _ = measured(net, x, torch.zeros(5).long(), probes.Gram(("0",), diagonal=True))
    assert list(diagonal) == ["0"]
    assert torch.allclose(diagonal["0"], gram.diagonal(), rtol=0, atol=1e-11)


def test_the_gram_of_a_linear_layer_is_over_all_tokens() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten()), torch.randn(7, 5, 3).double()
    grams, passes = measured(net, x, torch.zeros(7).long(), probes.Gram())
    assert passes == 7
    hidden = net[:2](x)
    assert torch.allclose(grams["0"], torch.einsum("bti,btj->ij", x, x), rtol=0, atol=1e-12)
    assert torch.allclose(grams["2"], torch.einsum("bti,btj->ij", hidden, hidden), rtol=0, atol=1e-12)


def test_grams_of_layers_that_are_not_called_or_not_of_the_kind() -> None:
    x, y = torch.randn(4, 3), torch.zeros(4).long()
    assert list(measured(Twice(), x, y, probes.Gram())[0]) == ["layer", "head"]
    grouped = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Flatten(), nn.Linear(2, 2))
    assert list(measured(grouped, torch.randn(4, 2, 1, 1), y, probes.Gram())[0]) == ["2"]
    with pytest.raises(ValueError, match=r"'0' is no linear layer .* without groups"):
        measured(grouped, torch.randn(4, 2, 1, 1), y, probes.Gram(("0",)))
    with pytest.raises(ValueError, match="Did you mean 'layer'"):
        measured(Twice(), x, y, probes.Gram(("layr",)))


# -- Fisher information ----------------------------------------------------------------------------------------------


def linear_classifier() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    net = nn.Linear(3, 4).double()
    with torch.no_grad():
        net.weight.copy_(torch.randn(4, 3, generator=generator))
    return net, torch.randn(8, 3, generator=generator).double(), torch.randint(4, (8,), generator=generator)


@pytest.mark.parametrize("examples", [None, 5, 100])
def test_the_empirical_fisher_of_a_linear_classifier(examples: int | None) -> None:
    """The gradient of an example is ``(q - e_y) xᵀ``."""
    net, x, y = linear_classifier()
    found, passes = measured(net, x, y, probes.DiagonalFisher(examples=examples))
    n = min(examples or 8, 8)
    assert passes == 3 * n
    error = F.softmax(net(x), 1) - F.one_hot(y, 4)
    assert torch.allclose(found["bias"], error[:n].square().mean(0), rtol=0, atol=1e-14)
    weight = torch.einsum("ni,nj->ij", error[:n].square(), x[:n].square()) / n
    assert torch.allclose(found["weight"], weight, rtol=0, atol=1e-14)
    assert not found["weight"].requires_grad


def test_the_sampled_fisher_is_right_on_the_mean_and_reads_no_labels() -> None:
    """With labels from the prediction q the expectation of ``(q - e_y)²`` is ``q (1 - q)``."""
    net, x, y = linear_classifier()
    q = F.softmax(net(x), 1)
    draws = [measured(net, x, y * 0 - 1, probes.DiagonalFisher("sampled", seed=seed))[0]["bias"] for seed in range(100)]
    expected = (q * (1 - q)).mean(0)
    assert torch.allclose(torch.stack(draws).mean(0), expected, rtol=0, atol=0.02)
    assert not torch.allclose(draws[0], expected, atol=0.01)
    again, _ = measured(net, x, y, probes.DiagonalFisher("sampled", seed=3), chunk=8)
    assert torch.allclose(again["bias"], draws[3], rtol=0, atol=1e-14)
