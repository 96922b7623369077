"""SqueezeNet against the same net written as bare functions, its published size, and the published body."""

from __future__ import annotations

import os
from pathlib import Path

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl.errors import ConfigError
from hybridfl.federation import initial_model
from hybridfl.models.files import read_weights
from hybridfl.models.squeezenet import SqueezeNet

DATA = Path(os.environ.get("HYBRIDFL_DATA", "~/.cache/hybridfl")).expanduser()
BODY = DATA / "weights" / "squeezenet1_1_imagenet_notop.pt"
NARROW, WIDE = (16, 16, 32, 32, 48, 48, 64, 64), (64, 64, 128, 128, 192, 192, 256, 256)


def by_hand(w: dict[str, Tensor], x: Tensor, stride: int) -> Tensor:
    """Pooled features, layer by layer as in the table of the authors' release 1.1; w by torchvision's names."""

    def convolved(x: Tensor, at: int, name: str = "", **options: int) -> Tensor:
        key = f"features.{at}.{name}".rstrip(".")
        return F.conv2d(x, w[f"{key}.weight"], w[f"{key}.bias"], **options).relu()

    def fire(x: Tensor, at: int) -> Tensor:
        x = convolved(x, at, "squeeze")
        return torch.cat([convolved(x, at, "expand1x1"), convolved(x, at, "expand3x3", padding=1)], 1)

    def pooled(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    x = pooled(convolved(x, 0, stride=stride))
    x = pooled(fire(fire(x, 3), 4))
    x = pooled(fire(fire(x, 6), 7))
    return fire(fire(fire(fire(x, 9), 10), 11), 12).mean((2, 3))


@pytest.mark.parametrize(
    ("shape", "stride"), [((3, 32, 32), 2), ((1, 28, 28), 2), ((3, 64, 45), 2), ((1, 17, 17), 2), ((2, 10, 12), 1)]
)
def test_the_net_is_the_one_written_by_hand(shape: tuple[int, ...], stride: int) -> None:
    net = SqueezeNet(shape, 5, stride)
    w, x = dict(net.state_dict()), torch.randn(2, *shape)
    assert torch.equal(net(x), F.linear(by_hand(w, x, stride), w["head.weight"], w["head.bias"]))
    assert net(x).std() > 0


def test_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in SqueezeNet((3, 32, 32), 10).features.parameters()) == 722_496


@pytest.mark.parametrize("norm", ["none", "group", "batch"])
@pytest.mark.parametrize("part", [1, 2, 4, 8])
def test_parameters_of_a_narrow_squeezenet(part: int, norm: str) -> None:
    net = SqueezeNet((3, 32, 32), 10, stride=1, norm=norm, width=1 / part)
    inputs, expected = 64 // part, 28 * 64 // part
    channels = 64 // part
    for narrow, wide in zip(NARROW, WIDE, strict=True):
        squeeze, expand = narrow // part, wide // part
        expected += (inputs + 1) * squeeze + (squeeze + 1) * expand + (9 * squeeze + 1) * expand
        inputs, channels = 2 * expand, channels + squeeze + 2 * expand
    norms = 0 if norm == "none" else 2 * channels
    assert sum(p.numel() for p in net.parameters()) == expected + norms + (inputs + 1) * 10
    assert net.features[11].squeeze.weight.numel() * part**2 == 384 * 64
    assert net.train()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_norms_stand_behind_every_convolution() -> None:
    net = SqueezeNet((1, 28, 28), 4, norm="group").double()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            if name.endswith("bias") and "norm" not in name and name != "head.bias":
                tensor.zero_()
    before = net(x)
    with torch.no_grad():
        for module in net.features.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= 1000  # GroupNorm takes the scale out again, but for its epsilon
    torch.testing.assert_close(net(x), before, rtol=0.05, atol=0.05)
    assert sum(isinstance(m, nn.GroupNorm) for m in net.modules()) == sum(
        isinstance(m, nn.Conv2d) for m in net.modules()
    )


def test_dropout_is_before_the_head_and_only_in_training() -> None:
    net = SqueezeNet((1, 28, 28), 4, dropout=0.5)
    x = torch.randn(1, 1, 28, 28)
    seen: list[Tensor] = []
    net.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for training in (False, True):
        net.train(training)(x)
    features = net.features(x).mean((2, 3))
    assert torch.equal(seen[0], features)
    kept = seen[1] != 0
    torch.testing.assert_close(seen[1][kept], 2 * features[kept])
    assert 0 < kept.sum() < (features != 0).sum()


@pytest.mark.parametrize(
    ("overrides", "key", "text"),
    [
        (["dataset.shape=[1,16,16]"], "model.stride", "got 2: images of 16 .* at least 17 .* nearest valid value: 1"),
        (["dataset.shape=[1,30,23]", "model.stride=3"], "model.stride", "at least 24 .* nearest valid value: 2"),
        (["dataset.shape=[1,9,9]"], "model", "images of 9 .* at least 17 .*, or 10 with stride=1"),
        (["dataset.shape=[1,2,9]"], "model", "images of 2 pixels"),
        (["dataset.shape=[1,32,32]", "model.norm=batch"], "model.norm", "shrink to one pixel"),
        (["dataset.shape=[1,32,32]", "model.norm=group", "model.groups=64"], "model.groups", "the 16 channels"),
        (["dataset.shape=[1,32,32]", "model.dropout=1"], "model.dropout", "must be below 1"),
    ],
)
def test_impossible_options_are_refused(overrides: list[str], key: str, text: str) -> None:
    small = ["dataset=synthetic", "dataset.train=120", "dataset.test=60"]
    with pytest.raises(ConfigError, match=text) as caught:
        helpers.plan("baseline=fedavg", "model=squeezenet", *small, *overrides)
    assert caught.value.key == key


def test_a_file_of_torchvision_is_read_without_its_classifier(tmp_path: Path) -> None:
    net = SqueezeNet((3, 32, 32), 4)
    like = initial_model(net, torch.device("cpu"), torch.float32)
    body = {name: torch.randn_like(t) for name, t in like.params.items() if not name.startswith("head.")}
    classifier = {"classifier.1.weight": torch.zeros(1000, 512, 1, 1), "classifier.1.bias": torch.zeros(1000)}
    torch.save(body | classifier, tmp_path / "squeezenet1_1.pth")
    read = read_weights(tmp_path / "squeezenet1_1.pth", like, SqueezeNet.key_map)
    head = {name: like.params[name] for name in ("head.weight", "head.bias")}
    assert helpers.identical({n: read.model.params[n] for n in [*body, *head]}, body | head)
    (note,) = read.notes
    assert note.endswith("squeezenet1_1.pth has a classifier of other layers: the head keeps its first weights")


@pytest.mark.skipif(
    not BODY.is_file() or not (DATA / "cifar10").is_dir(),
    reason=f"weights/{BODY.name} or cifar10 is not in {DATA}; set HYBRIDFL_DATA",
)
def test_the_published_body_tells_images_apart() -> None:
    line = ["model=squeezenet", "model.input=imagenet_bytes", "dataset=cifar10", "dataset.limit=1000", f"start={BODY}"]
    plan = helpers.plan("baseline=fedavg", "dtype=float32", *line)
    (note,) = plan.notes
    assert "has no classifier" in note
    federation = plan.federation
    raw = torch.from_numpy(federation.dataset.test.x[:64]).float()
    pixels = raw - torch.tensor([123.68, 116.779, 103.939])[:, None, None]
    assert torch.equal(federation.test[0][:64], pixels)
    reference = by_hand(torch.load(BODY, "cpu", weights_only=True), pixels, 2)
    assert reference.shape == (64, 512)
    assert torch.isfinite(reference).all()
    assert reference.std(0).mean() > 0.1
    params = federation.start.params
    logits = torch.func.functional_call(federation.net, params, (pixels,))
    assert torch.equal(logits, F.linear(reference, params["head.weight"], params["head.bias"]))
