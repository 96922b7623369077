"""The nets: shapes, and options that cannot be."""

from __future__ import annotations

import itertools
from pathlib import Path

import helpers
import pytest
import torch
from cli_helpers import SMALL_DATA, call, done
from torch import nn

from hybridfl.build import build
from hybridfl.errors import ConfigError
from hybridfl.federation import initial_model
from hybridfl.models.cnn import CNN
from hybridfl.models.files import read_weights
from hybridfl.models.mlp import MLP
from hybridfl.types import Model


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), (3, 4, 4)])
def test_an_mlp_takes_any_shape(shape: tuple[int, ...], hidden: tuple[int, ...]) -> None:
    net = MLP(shape, 7, hidden)
    assert net(torch.zeros(2, *shape)).shape == (2, 7)
    widths = [torch.Size(shape).numel(), *hidden, 7]
    assert sum(p.numel() for p in net.parameters()) == sum((a + 1) * b for a, b in itertools.pairwise(widths))


def test_an_mlp_without_hidden_layers_is_linear() -> None:
    net = MLP((3,), 2, ()).double()
    a, b = torch.randn(2, 1, 3, dtype=torch.float64)
    assert torch.allclose(net(a) + net(b), net(a + b) + net(torch.zeros(1, 3).double()), atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "channels", "flat"),
    [((1, 8, 8), (4, 8), 8 * 4), ((3, 9, 13), (4, 8), 8 * 2 * 3), ((2, 4, 4), (4, 4), 4), ((2, 3, 5), (), 30)],
)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_cnn_halves_each_side_a_stage(
    shape: tuple[int, ...], channels: tuple[int, ...], flat: int, kernel: int
) -> None:
    net = CNN(shape, 7, channels, hidden=5, groups=4, kernel=kernel)
    assert net(torch.zeros(1, *shape)).shape == (1, 7)
    assert net.train()(torch.zeros(2, *shape)).shape == (2, 7)
    (dense,) = (layer for layer in net.body if isinstance(layer, nn.Linear))
    assert dense.in_features == flat


def test_a_cnn_keeps_no_running_statistics() -> None:
    net = CNN((1, 8, 8), 3)
    assert list(net.buffers()) == []
    a, b = torch.randn(2, 1, 1, 8, 8)
    together, alone = net(torch.cat([a, b]))[:1], net(a)
    assert torch.allclose(together, alone, atol=1e-6)  # examples do not see each other


@pytest.mark.parametrize(
    ("overrides", "key", "text"),
    [
        (["model=cnn", "model.kernel=4"], "model.kernel", "nearest valid value: 5"),
        (["model=cnn", "model.groups=3"], "model.groups", "does not divide the 16 channels"),
        (["model=cnn", "model.channels=[16,18]"], "model.groups", "does not divide the 18 channels"),
        (["model=cnn", "model.channels=[4,4,4]"], "model.channels", "3 poolings are too many for images of 4 pixels"),
        (["model=cnn", "model.channels=[0]"], "model.channels[0]", "must be at least 1"),
        (["model=cnn", "model.channels=16"], "model.channels", "expected a list"),
        (["model.hidden=[0]"], "model.hidden[0]", "must be at least 1"),
        (["model.hidden=64"], "model.hidden", "expected a list"),
        (["model.hiden=[64]"], "model.hiden", "Did you mean 'model.hidden'?"),
        (["+model.depth=2"], "model.depth", "unknown key"),
        (["model=resnet"], "model", "got 'resnet'"),
        (["model._target_=hybridfl.models.mlp.MPL"], "model._target_", "Did you mean 'MLP'?"),
        (
            ["model._target_=hybridfl.methods.fedavg.FedAvg", "~model.hidden", "~model.width"],
            "model._target_",
            "torch.nn.Module",
        ),
    ],
)
def test_impossible_options_are_refused_under_their_key(overrides: list[str], key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        helpers.plan("baseline=fedavg", *overrides)
    assert caught.value.key == key
    assert text in caught.value.problem


class Wrong(nn.Module):
    """Gives a logit too many."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(16, num_classes + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


class Narrow(Wrong):
    """Wants other inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("name", "text"), [("Wrong", r"gives \(2, 4\) for 2 examples; expected"), ("Narrow", "does not accept")]
)
def test_a_net_that_does_not_fit_the_data_is_refused_before_any_work(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        helpers.plan("baseline=fedavg", f"model._target_={__name__}.{name}", "~model.hidden", "~model.width")
    assert caught.value.key == "model"


def test_tied_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="tied"):
        initial_model(Tied(), torch.device("cpu"), torch.float32)


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = helpers.plan("baseline=fedavg").federation.start
    torch.manual_seed(2)
    two = helpers.plan("baseline=local_only", "clients.number=4").federation.start
    other = helpers.plan("baseline=fedavg", "seed=1").federation.start
    assert helpers.identical(one, two)
    assert not helpers.identical(one, other)


def test_a_model_has_its_own_tensors_in_the_runs_precision() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model = initial_model(net, torch.device("cpu"), torch.float64)
    assert {t.dtype for t in model.params.values()} == {torch.float64}
    assert model.buffers["1.num_batches_tracked"].dtype == torch.int64
    model.params["0.weight"].zero_()
    assert net[0].weight.abs().sum() > 0


# -- weights from files ----------------------------------------------------------------------------------------------


def net_model() -> Model:
    return initial_model(MLP((3,), 2, (4,)), torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_come_back_in_the_runs_precision(tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    other = {name: torch.randn(t.shape) for name, t in net_model().params.items()}
    path = tmp_path / f"weights{suffix}"
    save_file(other, path) if suffix == ".safetensors" else torch.save({"state_dict": other}, path)
    read = read_weights(path, net_model())
    assert helpers.identical(read.model.params, {name: t.double() for name, t in other.items()})
    assert read.notes == ()


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    like, path = net_model(), tmp_path / "weights.pt"
    for content, text in [
        ({k: v for k, v in like.params.items() if k != "head.bias"}, "missing head.bias; not in the net nothing"),
        (like.params | {"extra": torch.zeros(1)}, "missing nothing; not in the net extra"),
        (
            {k.replace("body.1", "body.2"): v for k, v in like.params.items()},
            r"missing body.1.bias, body.1.weight; .* For 'body.1.bias': Did you mean 'body.2.bias'\?",
        ),
        (like.params | {"head.bias": torch.zeros(5)}, r"'head.bias' is \(5,\) in the file, \(2,\) in the net"),
        ([1, 2], "holds no name → tensor dict"),
    ]:
        torch.save(content, path)
        with pytest.raises(ConfigError, match=text) as caught:
            read_weights(path, like)
        assert caught.value.key == "start"
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot read"):
        read_weights(path, like)


def test_a_head_for_other_classes_is_left_out_and_said_so(tmp_path: Path) -> None:
    like, path = net_model(), tmp_path / "weights.pt"
    body = {name: torch.randn_like(t) for name, t in like.params.items() if name.startswith("body.")}
    head = {name: t for name, t in like.params.items() if name.startswith("head.")}
    for other, text in [
        ({}, "no classifier"),
        ({"head.weight": torch.zeros(5, 4), "head.bias": torch.zeros(5)}, "a classifier of 5 classes"),
        ({"head.0.weight": torch.zeros(9, 4), "head.2.weight": torch.zeros(2, 9)}, "a classifier of other layers"),
    ]:
        torch.save(other | body, path)
        read = read_weights(path, like)
        assert helpers.identical(read.model.params, body | head)
        assert read.notes == (f"{path} has {text}: the head keeps its first weights",)


@pytest.mark.parametrize(
    ("head", "text"),
    [
        ({"head.weight": torch.zeros(5, 4)}, "missing head.bias"),
        ({"head.weight": torch.zeros(5, 4), "head.bias": torch.zeros(6)}, r"'head.weight' is \(5, 4\) in the file"),
        ({"head.weight": torch.zeros(5, 3), "head.bias": torch.zeros(5)}, r"'head.weight' is \(5, 3\) in the file"),
        ({"head.weight": torch.tensor(1.0), "head.bias": torch.zeros(5)}, r"'head.weight' is \(\) in the file"),
    ],
)
def test_a_head_that_is_broken_is_refused(tmp_path: Path, head: dict[str, torch.Tensor], text: str) -> None:
    like = net_model()
    body = {name: tensor for name, tensor in like.params.items() if name.startswith("body.")}
    torch.save(body | head, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=text):
        read_weights(tmp_path / "w.pt", like)


def test_names_are_rewritten_part_by_part(tmp_path: Path) -> None:
    like, path = net_model(), tmp_path / "weights.th"
    theirs = {"module.dense.weight": "body.1.weight", "module.dense.bias": "body.1.bias"}
    theirs |= {"module.fc.weight": "head.weight", "module.fc.bias": "head.bias"}
    values = {name: torch.randn_like(t) for name, t in like.params.items()}
    torch.save({"state_dict": {their: values[our] for their, our in theirs.items()}}, path)
    key_map = {"module": "", "dense": "body.1", "fc": "head", "weight.": "", "body": "other"}
    assert helpers.identical(read_weights(path, like, key_map).model.params, values)
    with pytest.raises(ConfigError, match=r"not in the net module\.dense\.bias"):
        read_weights(path, like)
    torch.save(values, path)  # the map would make `other.1.weight` of these
    assert helpers.identical(read_weights(path, like, key_map).model.params, values)
    torch.save(values | {"fc.weight": values["head.weight"]}, path)
    with pytest.raises(ConfigError, match=r"not in the net fc\.weight"):  # which of the two is the head?
        read_weights(path, like, {"fc": "head"})


def test_counters_of_batch_norm_may_be_missing(tmp_path: Path) -> None:
    like = initial_model(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.device("cpu"), torch.float32)
    file = {name: torch.randn_like(t) for name, t in (like.params | like.buffers).items() if t.is_floating_point()}
    torch.save(file, tmp_path / "old.pt")
    read = read_weights(tmp_path / "old.pt", like).model
    assert helpers.identical(read.buffers, {n: file.get(n, torch.tensor(0)) for n in like.buffers})
    torch.save(file | {"1.num_batches_tracked": torch.tensor(7)}, tmp_path / "new.pt")
    assert read_weights(tmp_path / "new.pt", like).model.buffers["1.num_batches_tracked"] == 7
    del file["1.running_var"]
    torch.save(file, tmp_path / "broken.pt")
    with pytest.raises(ConfigError, match=r"missing 1\.running_var; not in the net nothing"):
        read_weights(tmp_path / "broken.pt", like)


def test_what_was_left_out_is_said_before_the_run_and_in_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    size = ("model.hidden=[16]", "dataset.shape=[1,4,4]")
    body = {"body.1.weight": torch.randn(16, 16), "body.1.bias": torch.randn(16)}
    torch.save(body, "body.pt")
    said = "body.pt has no classifier: the head keeps its first weights"
    dry = call("train", "--dry-run", *SMALL_DATA, *size, "start=body.pt", "baseline=fedavg")
    assert f"note       {said}" in dry.out
    run = done(*SMALL_DATA, *size, "start=body.pt", "baseline=fedavg", "rounds=1", "clients.number=5", "ui=none")
    assert (run / "log.txt").read_text().count(said) == 1
    assert "note " not in call("train", "--dry-run", *SMALL_DATA, *size, "baseline=fedavg").out


def test_a_start_that_is_no_file_names_the_nearest_choice() -> None:
    with pytest.raises(ConfigError, match=r"^start: got 'sever'\. Did you mean 'server'\?"):
        build({"_target_": f"{__name__}.read_sever"}, "")


def read_sever() -> Model:
    return read_weights(Path("sever"), net_model()).model
