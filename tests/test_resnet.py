"""ResNets against the same nets written as bare functions, published numbers of parameters, and published weights."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl.errors import ConfigError
from hybridfl.federation import initial_model
from hybridfl.local import predict
from hybridfl.models.files import read_weights
from hybridfl.models.resnet import ResNet, ZeroPadded

CPU = torch.device("cpu")
DATA = Path(os.environ.get("HYBRIDFL_DATA", "~/.cache/hybridfl")).expanduser()
PUBLISHED = DATA / "weights" / "resnet20-12fca82f.th"

RESNET18 = {"channels": (64, 128, 256, 512), "blocks": (2, 2, 2, 2), "groups": 32, "shortcut": "B"}


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def shaken(net: nn.Module) -> dict[str, Tensor]:
    """The net's tensors, all of them drawn anew so that no part of it is without effect, and put into it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return dict(net.state_dict())


# -- the function ----------------------------------------------------------------------------------------------------


def by_hand(
    w: dict[str, Tensor], x: Tensor, norm: Callable[[Tensor, str], Tensor], blocks: list[int], stem: str, shortcut: str
) -> Tensor:
    """A residual net by functions alone."""
    if stem == "cifar":
        x = norm(F.conv2d(x, w["conv1.weight"], padding=1), "norm1").relu()
    else:
        x = norm(F.conv2d(x, w["conv1.weight"], stride=2, padding=3), "norm1").relu()
        x = F.max_pool2d(x, 3, 2, 1)
    for stage, number in enumerate(blocks):
        for block in range(number):
            at, stride = f"stages.{stage}.{block}", 2 if stage and not block else 1
            y = norm(F.conv2d(x, w[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.norm1").relu()
            y = norm(F.conv2d(y, w[f"{at}.conv2.weight"], padding=1), f"{at}.norm2")
            if stride == 2 and shortcut == "B":
                x = norm(F.conv2d(x, w[f"{at}.shortcut.0.weight"], stride=2), f"{at}.shortcut.1")
            elif stride == 2:
                more = y.shape[1] - x.shape[1]
                padded = torch.zeros_like(y)
                padded[:, more // 2 : more // 2 + x.shape[1]] = x[:, :, ::2, ::2]
                x = padded
            x = (y + x).relu()
    return F.linear(x.mean((2, 3)), w["head.weight"], w["head.bias"])


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("kind", ["group", "batch"])
def test_the_net_is_the_one_written_by_hand(kind: str, stem: str, shortcut: str) -> None:
    net = ResNet((3, 21, 26), 5, (4, 8, 12), (2, 1, 2), stem, kind, 2, shortcut).eval()
    w, x = shaken(net), torch.randn(3, 3, 21, 26)

    def norm(x: Tensor, at: str) -> Tensor:
        scale, shift = w[f"{at}.weight"], w[f"{at}.bias"]
        if kind == "group":
            return F.group_norm(x, 2, scale, shift)
        return F.batch_norm(x, w[f"{at}.running_mean"], w[f"{at}.running_var"], scale, shift)

    out = net(x)
    assert torch.equal(out, by_hand(w, x, norm, [2, 1, 2], stem, shortcut))
    assert out.std() > 0.01


def test_shortcut_a_takes_every_second_pixel_and_centres_the_channels() -> None:
    x = torch.arange(2 * 4 * 3, dtype=torch.float32).reshape(1, 2, 4, 3)
    out = ZeroPadded(3, 2)(x)
    assert out.shape == (1, 5, 2, 2)
    assert torch.equal(out[0, [0, 3, 4]], torch.zeros(3, 2, 2))
    assert out[0, 1].tolist() == [[0, 2], [6, 8]]
    assert out[0, 2].tolist() == [[12, 14], [18, 20]]


def test_a_block_with_silent_convolutions_is_its_shortcut() -> None:
    block = ResNet((4, 8, 8), 3, (4,), (1,)).stages[0][0]
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x.relu())


def test_first_weights_are_drawn_as_he_says() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ResNet((3, 32, 32), 10, (64, 128), (1, 1))
    for layer in (net.conv1, net.stages[1][0].conv2):
        expected = (2 / (9 * layer.out_channels)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_published_numbers_of_parameters() -> None:
    small = ResNet((3, 32, 32), 10, norm="batch")
    assert parameters(small) == 269_722
    statistics = sum(b.numel() for b in small.buffers() if b.is_floating_point())
    assert parameters(small) + statistics == 271_098
    assert parameters(ResNet((3, 224, 224), 1000, stem="imagenet", norm="batch", **RESNET18)) == 11_689_512
    assert parameters(ResNet((3, 32, 32), 10)) == 269_722  # GroupNorm has as many


@pytest.mark.parametrize("part", [1, 2, 4, 8])
def test_parameters_of_a_narrow_resnet_20(part: int) -> None:
    net = ResNet((3, 32, 32), 10, width=1 / part)
    a, b, c = 16 // part, 32 // part, 64 // part
    stages = 6 * 9 * a * a + (9 * a * b + 5 * 9 * b * b) + (9 * b * c + 5 * 9 * c * c)
    norms = 2 * (7 * a + 6 * b + 6 * c)
    assert parameters(net) == 27 * a + stages + norms + 10 * c + 10
    assert net.stages[1][1].conv1.weight.numel() * part**2 == 32 * 32 * 9
    assert net.conv1.weight.numel() * part == 3 * 16 * 9
    groups = {m.num_channels // m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == ({4, 8, 16} if part < 8 else {2, 4, 8})  # one group is the least
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("part", [1, 4, 8])
def test_parameters_of_a_narrow_resnet_18(part: int) -> None:
    net = ResNet((1, 28, 28), 10, width=1 / part, **RESNET18)
    widths = [64 // part, 128 // part, 256 // part, 512 // part]
    expected = 9 * widths[0] + 2 * widths[0] + 4 * (9 * widths[0] ** 2 + 2 * widths[0])
    for narrow, wide in itertools.pairwise(widths):
        expected += 9 * narrow * wide + 3 * 9 * wide**2 + narrow * wide + 5 * 2 * wide
    assert parameters(net) == expected + 10 * widths[-1] + 10


@pytest.mark.parametrize(
    ("overrides", "key", "text"),
    [
        (["model.blocks=[3,3]"], "model.blocks", "one number for each of the 3 stages"),
        (["model.channels=[]", "model.blocks=[]"], "model.channels", "one stage or more"),
        (["model.channels=[64,32,16]"], "model.shortcut", "nearest valid value: B"),
        (["model.groups=32"], "model.groups", "does not divide the 16 channels of a layer; nearest valid value: 16"),
        (["model.norm=layer"], "model.norm", "Valid: batch, group"),
        (["model.norm=batch"], "model.norm", "shrink to one pixel"),
        (["model.norm=batch", "model.stem=imagenet"], "model.norm", "shrink to one pixel"),
        (["model.stem=imagenet", "model.groups=16", "model.channels=[16,16,16]"], "model.groups", "a single value"),
        (["model.stem=tiny"], "model.stem", "Valid: cifar, imagenet"),
    ],
)
def test_impossible_options_are_refused(overrides: list[str], key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        helpers.plan("baseline=fedavg", "model=resnet20", *overrides)
    assert caught.value.key == key
    assert text in caught.value.problem


# -- weights from elsewhere ------------------------------------------------------------------------------------------


def test_names_of_torchvision_fit(tmp_path: Path) -> None:
    net, blank = (ResNet((3, 16, 16), 3, (4, 6, 8, 10), (1, 1, 1, 1), norm="batch", shortcut="B") for _ in range(2))
    w, like = shaken(net), initial_model(blank, CPU, torch.float32)
    theirs = {"conv1.weight": w["conv1.weight"], "fc.weight": w["head.weight"], "fc.bias": w["head.bias"]}
    layers = [(f"layer{n + 1}.0", f"stages.{n}.0") for n in range(4)]
    for their, our in layers:
        for name in ("conv1.weight", "conv2.weight"):
            theirs[f"{their}.{name}"] = w[f"{our}.{name}"]
    norms = [("bn1", "norm1"), *((f"{their}.bn{n}", f"{our}.norm{n}") for their, our in layers for n in (1, 2))]
    for their, our in layers[1:]:
        theirs[f"{their}.downsample.0.weight"] = w[f"{our}.shortcut.0.weight"]
        norms.append((f"{their}.downsample.1", f"{our}.shortcut.1"))
    for their, our in norms:
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            theirs[f"{their}.{name}"] = w[f"{our}.{name}"]
    torch.save(theirs, tmp_path / "theirs.pth")
    read = read_weights(tmp_path / "theirs.pth", like, ResNet.key_map)
    assert helpers.identical(read.model.params, {name: w[name] for name in like.params})
    assert helpers.identical(read.model.buffers, {name: w[name] for name in like.buffers})
    assert read.notes == ()


published = pytest.mark.skipif(
    not PUBLISHED.is_file() or not (DATA / "cifar10").is_dir(),
    reason=f"weights/{PUBLISHED.name} or cifar10 is not in {DATA}; set HYBRIDFL_DATA",
)
THEIRS = [
    "baseline=fedavg",
    "model=resnet20",
    "model.norm=batch",
    "model.input=imagenet",
    "dataset=cifar10",
    "dataset.limit=1000",
    "dtype=float32",
    f"start={PUBLISHED}",
]


@published
def test_published_weights_classify_cifar_10_as_published() -> None:
    federation = helpers.plan(*THEIRS).federation
    x, y = federation.test
    assert len(x) == 4000
    logits = predict(federation.net, federation.start, x[:500], 250)
    assert (logits.argmax(1) == y[:500]).float().mean() > 0.89  # 91.45 % of all 4,000
    w = {n.removeprefix("module."): t for n, t in torch.load(PUBLISHED, "cpu", weights_only=True)["state_dict"].items()}
    for theirs, ours in (("layer1", "stages.0"), ("layer2", "stages.1"), ("layer3", "stages.2"), ("bn", "norm")):
        w = {name.replace(theirs, ours): tensor for name, tensor in w.items()}
    w |= {"head.weight": w["linear.weight"], "head.bias": w["linear.bias"]}
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    pixels = torch.from_numpy(federation.dataset.test.x[:20]) / 255

    def norm(x: Tensor, at: str) -> Tensor:
        return F.batch_norm(x, *(w[f"{at}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")))

    reference = by_hand(w, (pixels - mean) / std, norm, [3, 3, 3], "cifar", "A")
    torch.testing.assert_close(logits[:20], reference, rtol=1e-4, atol=1e-4)


@published
def test_published_weights_without_their_norms_or_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"not in the net norm1\.running_mean.* try model\.norm=batch"):
        helpers.plan(*THEIRS, "model.norm=group")
    with pytest.raises(ConfigError, match=r"'conv1.weight' is \(16, 3, 3, 3\) in the file, \(8, 3, 3, 3\) in the net"):
        helpers.plan(*THEIRS, "model.width=0.5")
