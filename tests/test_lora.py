"""LoRA: the map, which layers it adapts, and averages of factors."""

from __future__ import annotations

import itertools
import math

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl import params as P
from hybridfl.errors import ConfigError
from hybridfl.lora import Adapters, Lora, LowRank, is_factor, key
from hybridfl.params import Params
from hybridfl.types import SERVER


def factors(layer: str, out: int, into: int, rank: int = 2) -> Params:
    generator = torch.Generator().manual_seed(0)
    shapes = {key(layer, "A"): (rank, into), key(layer, "B"): (out, rank)}
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}


def test_of_a_linear_layer_it_is_a_second_path_through_r_features() -> None:
    layer, theta = nn.Linear(5, 4).double(), factors("", 4, 5)
    net = nn.Sequential(layer)
    theta = {f"0{name}": tensor for name, tensor in theta.items()}
    x = torch.randn(7, 5, dtype=torch.float64)
    params = LowRank(("0",), 2, scale=0.5)(theta, {"base": dict(net.named_parameters())})
    expected = layer(x) + 0.5 * x @ theta["0.lora_A"].T @ theta["0.lora_B"].T
    assert torch.allclose(torch.func.functional_call(net, params, (x,)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_of_a_convolution_it_is_one_to_r_channels_and_a_pointwise_one_back(groups: int) -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=groups).double()
    net, theta = nn.Sequential(layer), factors("0", 6, 4 // groups * 9)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    params = LowRank(("0",), 2)(theta, {"base": dict(net.named_parameters())})
    found = torch.func.functional_call(net, params, (x,))
    down, up = theta["0.lora_A"].reshape(2, 4 // groups, 3, 3), theta["0.lora_B"].reshape(6, 2, 1, 1)
    added = []
    for part, to in zip(x.chunk(groups, 1), up.chunk(groups), strict=True):
        added.append(F.conv2d(F.conv2d(part, down, padding=1, stride=2), to))
    assert torch.allclose(found, layer(x) + torch.cat(added, 1), rtol=0, atol=1e-12)


def test_what_is_not_trained_is_frozen_and_other_entries_are_parameters() -> None:
    base = {"a.weight": torch.ones(3, 2), "a.bias": torch.zeros(3), "b.weight": torch.ones(2, 3)}
    theta = {"a.lora_B": torch.ones(3, 1), "a.bias": torch.full((3,), 5.0)}
    params = LowRank(("a",), 1)(theta, {"base": base, "factors": {"a.lora_A": torch.full((1, 2), 2.0)}})
    assert torch.equal(params["a.weight"], torch.full((3, 2), 3.0))
    assert torch.equal(params["a.bias"], theta["a.bias"])
    assert params["b.weight"] is base["b.weight"]
    assert LowRank(("a", "b"), 2).macs({"base": base}) == 2 * 6 + 2 * 6
    assert LowRank(("a",), 9).macs({"base": base}) == 2 * 6


@pytest.mark.parametrize("zero", ["A", "B"])
def test_fresh_factors_change_nothing_and_the_other_is_kaiming_uniform(zero) -> None:
    params = {"a.weight": torch.ones(300, 40, 2, 2), "b.weight": torch.ones(3, 2)}
    fresh = Adapters(("a", "b"), (), 4, 1.0).fresh(params, np.random.default_rng(0), zero)
    assert {name: tuple(tensor.shape) for name, tensor in fresh.items()} == {
        "a.lora_A": (4, 160),
        "a.lora_B": (300, 4),
        "b.lora_A": (2, 2),
        "b.lora_B": (3, 2),
    }
    assert not any(tensor.any() for name, tensor in fresh.items() if name.endswith(zero))
    other = fresh["a.lora_B" if zero == "A" else "a.lora_A"]
    reference = nn.init.kaiming_uniform_(
        torch.empty_like(other), a=math.sqrt(5), generator=torch.Generator().manual_seed(0)
    )
    assert float(other.abs().max()) <= 1 / math.sqrt(other.shape[1])
    assert float(other.std()) == pytest.approx(float(reference.std()), rel=0.05)


def fitted(*overrides: str, **options) -> Adapters:
    return Lora(**options).fitted(helpers.plan("baseline=fedavg", *overrides).federation)


def test_layers_by_the_patterns_of_their_names() -> None:
    cnn = ("model=cnn", "model.channels=[4,4]")
    assert fitted(*cnn).layers == ("body.0", "body.4", "body.9")
    assert fitted(*cnn).full == ("head.weight", "head.bias")
    assert fitted(*cnn, targets=("body.[04]",)).layers == ("body.0", "body.4")
    assert fitted(*cnn, full=()).layers == ("body.0", "body.4", "body.9", "head")
    assert fitted(*cnn, full=("head.*", "body.1.*", "*.bias")).full[:3] == (
        "body.0.bias",
        "body.1.weight",
        "body.1.bias",
    )
    vit = fitted("model=vit", "model.patch=2", "model.depth=1", targets=("blocks.*",))
    assert vit.layers == tuple(f"blocks.0.{n}" for n in ("attention.qkv", "attention.projection", "mlp.fc1", "mlp.fc2"))


@pytest.mark.parametrize(
    ("options", "key_", "told"),
    [
        ({"targets": ("bodi.1",)}, "lora.targets[0]", "got 'bodi.1': no linear or convolutional layer .* 'body.1'"),
        ({"targets": ("*", "head")}, "lora.targets[1]", "not trained in full"),
        ({"targets": ()}, "lora.targets", "nothing to adapt. Valid: body.1"),
        ({"full": ("haed.*",)}, "lora.full[0]", "no parameter has such a name. Did you mean 'head"),
        ({"full": ("*",)}, "lora.targets[0]", "There is none"),
    ],
)
def test_patterns_that_fit_nothing(options, key_: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refusal:
        fitted(**options)
    assert refusal.value.key == key_


def test_rates_of_their_own() -> None:
    line = ["baseline=lora_fedavg", "client_optimizer.lr=0.3", "rounds=1"]
    rates = ["baseline.lora.rates.A=0.5", "baseline.lora.rates.B=2", "baseline.lora.rates.full=3"]
    line += ["client_optimizer.batch_size=200", "client_optimizer.epochs=1"]
    plain, changed = (helpers.snapshots(helpers.plan(*line, *more).engine()) for more in ([], rates))
    start = plain[0].state["theta"]
    moved, moved_more = (P.subtract(run[-1].state["theta"], start) for run in (plain, changed))
    factors = {"body.1.lora_A": 0.5, "body.1.lora_B": 2, "head.weight": 3, "head.bias": 3}
    for name, factor in factors.items():
        assert torch.allclose(moved_more[name], factor * moved[name], rtol=1e-9, atol=1e-12)
    assert moved["body.1.lora_B"].any()


def test_a_refusal_names_the_key_as_typed() -> None:
    for line, key_ in (
        (["baseline=lora_fedavg", "baseline.lora.targets=[x]"], "baseline.lora.targets[0]"),
        (["merging=lorm", "merging.lora.full=[x]"], "merging.lora.full[0]"),
    ):
        with pytest.raises(ConfigError) as refusal:
            helpers.plan(*line)
        assert refusal.value.key == key_


# -- averages of factors ---------------------------------------------------------------------------------------------


class Reference(nn.Module):
    """The default net with both factors as tensors of its own."""

    def __init__(self, base: Params, theta: Params) -> None:
        super().__init__()
        self.base = base
        self.theta = nn.ParameterDict({n.replace(".", "/"): nn.Parameter(t.clone()) for n, t in theta.items()})

    def forward(self, x: Tensor) -> Tensor:
        theta, x = self.theta, x.flatten(1)
        path = x @ theta["body/1/lora_A"].T @ theta["body/1/lora_B"].T
        hidden = torch.relu(x @ self.base["body.1.weight"].T + path + self.base["body.1.bias"])
        return hidden @ theta["head/weight"].T + theta["head/bias"]


def test_one_client_is_central_training_of_the_factors() -> None:
    plan = helpers.plan("baseline=lora_fedavg", "clients.number=1", "clients.per_round=1", "client_optimizer.lr=0.3")
    before, *_, after = helpers.snapshots(plan.engine())
    net = Reference(before.state["base"], before.state["theta"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    owned, bench = plan.federation.owned(0), plan.federation.bench
    for round in range(3):
        for picked in helpers.job_batches(plan.federation, plan.federation.work, owned, round, 0):
            optimizer.zero_grad()
            F.cross_entropy(net(bench.x[picked]), bench.y[picked]).backward()
            optimizer.step()
    found = {name.replace("/", "."): tensor.detach() for name, tensor in net.theta.items()}
    assert helpers.close(dict(sorted(after.state["theta"].items())), dict(sorted(found.items())))
    served = plan.method.serve(after.state, SERVER)[0].model.params
    assert list(served) == list(plan.federation.start.params)
    assert torch.allclose(
        served["body.1.weight"],
        net.base["body.1.weight"] + found["body.1.lora_B"] @ found["body.1.lora_A"],
        rtol=0,
        atol=1e-12,
    )
    assert torch.equal(served["body.1.bias"], plan.federation.start.params["body.1.bias"])


def test_ffa_lora_averages_products_exactly_and_never_moves_a() -> None:
    plan = helpers.plan("baseline=ffa_lora", "client_optimizer.lr=0.3", "rounds=2")
    start, *_, after = helpers.snapshots(plan.engine())
    assert list(start.state["fixed"]) == ["body.1.lora_A"]
    assert helpers.identical(start.state["fixed"], after.state["fixed"])
    assert after.state["theta"]["body.1.lora_B"].any()
    change = after.state["global"].params["body.1.weight"] - start.state["base"]["body.1.weight"]
    product = after.state["theta"]["body.1.lora_B"] @ start.state["fixed"]["body.1.lora_A"]
    assert torch.allclose(change, product, rtol=0, atol=1e-12)


def test_the_backbone_is_sent_once() -> None:
    plan = helpers.plan("baseline=lora_fedavg", "clients.per_round=5", "rounds=3")
    seen = helpers.snapshots(plan.engine())
    down = [after.costs.bytes_down - before.costs.bytes_down for before, after in itertools.pairwise(seen)]
    state = seen[0].state
    theta, base = (P.nbytes(part.values()) for part in (state["theta"], state["base"]))
    assert down == [5 * (theta + base), 5 * theta, 5 * theta]
    assert seen[-1].costs.bytes_up == 3 * 5 * theta
    assert {name for name in state["theta"] if not is_factor(name)} == {"head.weight", "head.bias"}
    assert not set(state["base"]) & set(state["theta"])
