"""The Vision Transformer against torch's own encoder, its size by hand, and under torch's function transforms."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl.errors import ConfigError
from hybridfl.models.vit import ViT

SMALL = {"patch": 2, "dim": 12, "depth": 2, "heads": 3, "mlp_ratio": 2.5}


def shaken(net: nn.Module) -> nn.Module:
    """The net in float64, every parameter moved so that none is without effect."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in net.double().parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return net


def encoder_of(net: ViT, features: int, heads: int, hidden: int) -> nn.TransformerEncoder:
    """Torch's encoder with the weights of the net's blocks."""
    layer = nn.TransformerEncoderLayer(
        features, heads, hidden, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, len(net.blocks), enable_nested_tensor=False).double()
    for theirs, ours in zip(encoder.layers, net.blocks, strict=True):
        theirs.self_attn.in_proj_weight.data = ours.attention.qkv.weight.data
        theirs.self_attn.in_proj_bias.data = ours.attention.qkv.bias.data
        theirs.self_attn.out_proj.load_state_dict(ours.attention.projection.state_dict())
        theirs.linear1.load_state_dict(ours.mlp.fc1.state_dict())
        theirs.linear2.load_state_dict(ours.mlp.fc2.state_dict())
        theirs.norm1.load_state_dict(ours.norm1.state_dict())
        theirs.norm2.load_state_dict(ours.norm2.state_dict())
    return encoder


@pytest.mark.parametrize("pooling", ["token", "mean"])
@pytest.mark.parametrize(("width", "features", "heads", "hidden"), [(1.0, 12, 3, 30), (2.0, 24, 6, 60)])
def test_the_net_is_torchs_encoder_over_patches(
    width: float, features: int, heads: int, hidden: int, pooling: str
) -> None:
    net = ViT((3, 6, 8), 5, **SMALL, pooling=pooling, width=width)
    shaken(net)
    x = torch.randn(4, 3, 6, 8, dtype=torch.float64)
    patches = F.unfold(x, 2, stride=2).transpose(1, 2)  # a linear map of flat patches, as in eq. 1
    tokens = patches @ net.embedding.weight.flatten(1).T + net.embedding.bias
    if pooling == "token":
        tokens = torch.cat([net.token.expand(4, 1, features), tokens], 1)
    out = encoder_of(net, features, heads, hidden).train()(tokens + net.positions)
    out = F.layer_norm(out, (features,), net.norm.weight, net.norm.bias, 1e-6)
    out = out[:, 0] if pooling == "token" else out.mean(1)
    torch.testing.assert_close(net(x), out @ net.head.weight.T + net.head.bias, rtol=1e-10, atol=1e-12)
    assert net(x).std() > 0.1


def test_without_positions_the_order_of_patches_is_lost() -> None:
    net = shaken(ViT((1, 4, 4), 3, **SMALL, pooling="mean"))
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    swapped = torch.cat([x[..., 2:, :], x[..., :2, :]], -2)
    assert not torch.allclose(net(x), net(swapped), atol=1e-6)
    with torch.no_grad():
        net.positions.zero_()
    torch.testing.assert_close(net(x), net(swapped), rtol=1e-10, atol=1e-12)


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "features", "heads"),
    [
        (1.0, 64, 4),
        (0.5, 32, 2),
        (0.25, 16, 1),
        (0.125, 8, 1),  # one head is the least, so its dimension shrinks
        (0.75, 48, 3),
        (0.6, 38, 2),  # 2.4 heads: 38.4 features in two heads of 19.2
        (0.68, 45, 3),  # 2.72 heads: 43.52 features in three heads of 14.5
        (0.01, 1, 1),
    ],
)
def test_heads_are_taken_away_before_their_dimension(width: float, features: int, heads: int) -> None:
    net = ViT((1, 8, 8), 3, width=width)
    attention = net.blocks[0].attention
    assert (attention.qkv.in_features, attention.heads) == (features, heads)
    assert features % heads == 0
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("pooling", ["token", "mean"])
@pytest.mark.parametrize("part", [1, 2, 4, 8])
def test_parameters_of_a_narrow_vit(part: int, pooling: str) -> None:
    net = ViT((3, 32, 32), 10, pooling=pooling, width=1 / part)
    d, h, token = 64 // part, 256 // part, pooling == "token"
    block = (3 * d * d + 3 * d) + (d * d + d) + (d * h + h) + (h * d + d) + 4 * d
    expected = (48 * d + d) + (64 + token) * d + token * d + 6 * block + 2 * d + (10 * d + 10)
    assert sum(p.numel() for p in net.parameters()) == expected
    assert net.blocks[3].mlp.fc1.weight.numel() * part**2 == 64 * 256


def test_linear_layers_are_separate_and_named() -> None:
    net = ViT((1, 8, 8), 3, depth=2)
    linear = {name for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    layers = ("attention.qkv", "attention.projection", "mlp.fc1", "mlp.fc2")
    assert linear == {f"blocks.{block}.{layer}" for block in (0, 1) for layer in layers} | {"head"}


def test_first_weights_are_uniform_with_the_variance_of_glorot() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ViT((1, 32, 32), 3, dim=128)
    for weight in net.blocks[0].attention.qkv.weight.chunk(3):  # each by itself, not as one wide layer
        bound = (6 / (128 + 128)) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert net.blocks[0].attention.qkv.bias.abs().max() == 0
    assert net.positions.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_works_in_training_only(dropout: float) -> None:
    net = ViT((1, 8, 8), 3, dropout=dropout).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(net.eval()(x), net(x))
    assert torch.equal(net.train()(x), net(x)) == (dropout == 0)


# -- function transforms ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_slow_paths() -> Iterator[None]:
    """Warnings are errors, also where pytest is told otherwise: vmap warns where it falls back to a loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # On its first use torch's forward mode warns of a deprecated function that it calls itself.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_derivatives_of_every_kind(pooling: str, dtype: torch.dtype) -> None:
    net = ViT((1, 4, 4), 3, patch=2, dim=4, depth=1, heads=2, mlp_ratio=1, pooling=pooling).to(dtype)
    params = {name: p.detach() for name, p in net.named_parameters()}
    x, y = torch.randn(5, 1, 4, 4, dtype=dtype), torch.tensor([0, 1, 2, 0, 1])

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, params, (x,)), y)

    gradient = torch.func.grad(loss)(params, x, y)
    each = torch.func.vmap(lambda x, y: torch.func.grad(loss)(params, x[None], y[None]))(x, y)
    for name in params:
        torch.testing.assert_close(each[name].mean(0), gradient[name], rtol=1e-4, atol=1e-5)
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    _, slope = torch.func.jvp(lambda p: loss(p, x, y), (params,), (direction,))
    torch.testing.assert_close(slope, sum((gradient[n] * direction[n]).sum() for n in params), rtol=1e-4, atol=1e-5)
    curved = torch.func.jvp(lambda p: torch.func.grad(loss)(p, x, y), (params,), (direction,))[1]
    assert max(c.abs().max() for c in curved.values()) > 0


def test_several_models_at_once() -> None:
    nets = [ViT((1, 4, 4), 3, patch=2, dim=4, depth=1, heads=2).double() for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(nets)
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    out = torch.func.vmap(lambda params: torch.func.functional_call(nets[0], params, (x,)))(stacked)
    torch.testing.assert_close(out, torch.stack([net(x) for net in nets]), rtol=1e-10, atol=1e-12)


def test_feddles_exact_search_works_on_it() -> None:
    plan = helpers.plan("model=vit", "model.patch=2", "model.depth=1", "merging.search.kind=closed_form", "rounds=2")
    states = [snapshot.state["global"] for snapshot in helpers.snapshots(helpers.engine_of(plan))]
    assert not helpers.identical(states[1], states[2])


@pytest.mark.parametrize(
    ("overrides", "key", "text"),
    [
        (
            ["model.patch=3"],
            "model.patch",
            "got 3, which does not divide images of 4 × 4 pixels; nearest valid value: 2",
        ),
        (["model.patch=9"], "model.patch", "nearest valid value: 4"),
        (["model.heads=5"], "model.heads", "got 5, which does not divide dim=64; nearest valid value: 4"),
        (["model.pooling=max"], "model.pooling", "Valid: mean, token"),
        (["model.mlp_ratio=0"], "model.mlp_ratio", "must be above 0"),
    ],
)
def test_impossible_options_are_refused(overrides: list[str], key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        helpers.plan("baseline=fedavg", "model=vit", *overrides)
    assert caught.value.key == key
    assert text in caught.value.problem
