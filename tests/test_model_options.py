"""Keys of a model node that the program handles: for any model, one of the user's own too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from cli_helpers import SMALL_DATA, done, rows
from torch import Tensor, nn

from hybridfl.data.dataset import Dataset, Examples
from hybridfl.errors import ConfigError
from hybridfl.local import predict
from hybridfl.models.options import InputScale, ModelOptions, separated


def images(channels: int = 3, dtype: Any = np.uint8) -> Dataset:
    x = np.random.default_rng(0).integers(0, 256, (12, channels, 4, 4)).astype(dtype)
    examples = Examples(x, np.arange(12) % 3)
    return Dataset("noise", examples, examples, 3, (100.0,) * channels, (50.0,) * channels)


class Photos:
    """A reader of the test's own: images of three channels in bytes."""

    def load(self, root: Path) -> Dataset:
        x = np.random.default_rng(1).integers(0, 256, (180, 3, 4, 4), dtype=np.uint8)
        y = np.arange(180) % 3
        return Dataset("photos", Examples(x[:120], y[:120]), Examples(x[120:], y[120:]), 3, (127.0,) * 3, (64.0,) * 3)


PHOTOS = [
    "baseline=fedavg",
    "model=vit",
    "model.patch=4",
    "model.depth=1",
    "dataset=digits",
    f"dataset._target_={__name__}.Photos",
]


# -- the scale of the input -------------------------------------------------------------------------------------------


def test_named_scales_are_those_of_values_from_0_to_1() -> None:
    x = torch.from_numpy(images().train.x).double()
    for name, expected in [
        ("dataset", (x - 100) / 50),
        ("imagenet", torch.stack([(x[:, i] / 255 - m) / s for i, m, s in IMAGENET], 1)),
        ("imagenet_bytes", torch.stack([x[:, i] - m for i, m in enumerate((123.68, 116.779, 103.939))], 1)),
    ]:
        options = ModelOptions(input=name)  # type: ignore[arg-type]
        scale = options.scale(images())
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (scale.mean, scale.std))
        torch.testing.assert_close((x - mean) / std, expected, rtol=1e-12, atol=1e-12)


IMAGENET = [(0, 0.485, 0.229), (1, 0.456, 0.224), (2, 0.406, 0.225)]


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.float32)])
@pytest.mark.parametrize("name", ["imagenet", "imagenet_bytes"])
def test_named_scales_are_for_coloured_bytes(name: str, channels: int, dtype: Any) -> None:
    text = f"got {name}, which is for 3 channels of uint8, but noise has {channels} of {np.dtype(dtype)}"
    with pytest.raises(ConfigError, match=text) as caught:
        ModelOptions(input=name).scale(images(channels, dtype))  # type: ignore[arg-type]
    assert caught.value.key == "model.input"
    assert "nearest valid choice: dataset" in caught.value.problem


def test_a_scale_of_ones_own_is_for_any_images() -> None:
    own = InputScale((1.0,), (2.0,))
    assert ModelOptions(input=own).scale(images(1, np.float32)) is own


@pytest.mark.parametrize(
    ("override", "key", "text"),
    [
        ("model.input=imagnet", "model.input", "Did you mean 'imagenet'?"),
        ("model.input={mean:[0,0,0]}", "model.input.std", "is required"),
        ("model.input={mean:[0,0,0],std:[1,1,1],max:2}", "model.input.max", "unknown key"),
        ("model.input={mean:[0,0],std:[1,1,1]}", "model.input.mean", "got 2 numbers: synthetic has 3 channels"),
        ("model.input={mean:[0,0,0],std:[1,1]}", "model.input.std", "got 2 numbers"),
        ("model.input={mean:[0,0,0],std:[1,1,0]}", "model.input.std[2]", "must be above 0"),
        ("model.input=imagenet", "model.input", "synthetic has 3 of float32"),
        ("+model.batch_norm=none", "model.batch_norm", "Valid: average, batch, frozen, local, reestimate"),
        ("+model.reestimate_on=clients", "model.reestimate_on", "Valid: all, own, server"),
    ],
)
def test_wrong_options_are_refused_under_their_key(override: str, key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        helpers.plan("baseline=fedavg", "model=vit", "dataset.shape=[3,4,4]", override)
    assert caught.value.key == key
    assert text in caught.value.problem


@pytest.mark.parametrize("given", ["imagenet", "{mean:[1,2,3],std:[4,5,6]}"])
def test_the_federation_feeds_what_the_option_says(given: str) -> None:
    federation = helpers.plan(*PHOTOS, f"model.input={given}").federation
    mean, std = (
        ([1, 2, 3], [4, 5, 6]) if "{" in given else ([255 * m for _, m, _ in IMAGENET], [255 * s for *_, s in IMAGENET])
    )
    for x, examples in [(federation.bench.x, federation.dataset.train), (federation.test[0], federation.dataset.test)]:
        expected = (examples.x - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
        np.testing.assert_allclose(x.numpy(), expected, rtol=1e-12)


def test_the_option_names_the_run() -> None:
    digests = {helpers.plan(*PHOTOS, f"model.input={name}").digest for name in ("dataset", "imagenet")}
    assert len(digests) == 2


# -- any model -------------------------------------------------------------------------------------------------------


def test_the_net_never_sees_the_programs_keys() -> None:
    node = {"_target_": "x.Y", "hidden": 3, "input": {"mean": [0], "std": [1]}, "batch_norm": "local"}
    options, left = separated(node)
    assert left == {"_target_": "x.Y", "hidden": 3}
    assert options == ModelOptions("local", "own", InputScale((0.0,), (1.0,)))
    assert separated({"_target_": "x.Y"}) == (ModelOptions(), {"_target_": "x.Y"})


def outside(num_classes: int, channels: int = 8, **options: Any) -> nn.Module:
    """A factory as torchvision and timm have them: a plain module whose classifier has a name of its own."""
    net = nn.Sequential()
    net.add_module("conv1", nn.Conv2d(options.pop("in_chans", 1), channels, 3, padding=1, bias=False))
    net.add_module("bn1", nn.BatchNorm2d(channels))
    net.add_module("relu", nn.ReLU(inplace=True))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(channels, num_classes))
    assert not options
    return net


def anything(**options: Any) -> nn.Module:
    """A factory whose signature names nothing, as ``torchvision.models.resnet18``."""
    return outside(**options)


OUTSIDE = ["baseline=fedavg", "~model.hidden", "~model.width", f"model._target_={__name__}.outside"]


def test_a_factory_from_elsewhere_trains() -> None:
    plan = helpers.plan(*OUTSIDE, "+model.in_chans=1", "+model.channels=6")
    assert {n: tuple(t.shape) for n, t in plan.federation.start.params.items()}["fc.weight"] == (3, 6)
    first, *_, last = (snapshot.state["global"] for snapshot in helpers.snapshots(helpers.engine_of(plan)))
    assert all(not torch.equal(first.params[n], last.params[n]) for n in first.params)
    assert last.buffers["bn1.num_batches_tracked"] > 0
    x, y = plan.federation.test
    assert predict(plan.federation.net, last, x, 100).shape == (len(y), 3)


def test_a_factory_whose_signature_names_nothing_is_told_the_classes() -> None:
    line = [*OUTSIDE[:-1], f"model._target_={__name__}.anything"]
    assert helpers.plan(*line).federation.start.params["fc.bias"].shape == (3,)
    assert helpers.plan(*line, "+model.num_classes=3").federation.start.params["fc.bias"].shape == (3,)
    with pytest.raises(ConfigError, match=r"gives \(2, 7\) for 2 examples; expected logits \(2, 3\)"):
        helpers.plan(*line, "+model.num_classes=7")


def test_frozen_statistics_stay_through_a_run_and_those_of_a_file_are_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = outside(3)
    net.bn1.running_mean.normal_()
    net.bn1.running_var.uniform_(1, 2)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    plan = helpers.plan(*OUTSIDE, "+model.batch_norm=frozen", f"start={tmp_path / 'w.pt'}")
    first, *_, last = (snapshot.state["global"] for snapshot in helpers.snapshots(helpers.engine_of(plan)))
    assert torch.equal(first.buffers["bn1.running_mean"], net.bn1.running_mean.double())
    assert helpers.identical(first.buffers, last.buffers)
    assert not torch.equal(first.params["bn1.weight"], last.params["bn1.weight"])
    logits = predict(plan.federation.net, first, plan.federation.test[0], 100)
    torch.testing.assert_close(logits, net.double().eval()(plan.federation.test[0]), rtol=1e-12, atol=1e-12)


def test_statistics_of_the_batch_leave_no_buffers(tmp_path: Path) -> None:
    torch.save(outside(3).state_dict(), tmp_path / "w.pt")
    plan = helpers.plan(*OUTSIDE, "+model.batch_norm=batch", f"start={tmp_path / 'w.pt'}")
    assert plan.federation.start.buffers == {}
    last = helpers.snapshots(helpers.engine_of(plan))[-1].state["global"]
    x = plan.federation.test[0][:10]
    training = plan.federation.net.train()

    def run(x: Tensor) -> Tensor:
        return torch.func.functional_call(training, last.params, (x,))

    assert torch.equal(predict(plan.federation.net, last, x, 10), run(x))


class Dense(nn.Module):
    """BatchNorm over vectors, which needs two examples for statistics of the batch."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.flatten(1)))


def test_operations_are_counted_without_running_statistics() -> None:
    line = [*OUTSIDE[:-1], f"model._target_={__name__}.Dense", "+model.batch_norm=batch"]
    assert helpers.plan(*line).federation.forward_macs == 16 * 3


@pytest.mark.parametrize("policy", ["local", "reestimate", "batch", "frozen"])
def test_a_policy_needs_batch_norm(policy: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"got {policy}: the net has no BatchNorm .* nearest valid choice: average"
    ) as caught:
        helpers.plan("baseline=fedavg", f"+model.batch_norm={policy}")
    assert caught.value.key == "model.batch_norm"


def test_a_run_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = [*SMALL_DATA, "model=resnet20", "model.width=0.25", "model.norm=batch", "model.batch_norm=frozen"]
    run = done(*line, "baseline=fedavg", "rounds=1", "clients.number=5", "client_optimizer.steps=1", "ui=none")
    assert rows(run / "metrics.csv")[-1]["round"] == "1"
