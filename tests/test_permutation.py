"""Which hidden units of a net are interchangeable, and that changing them round changes nothing."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import helpers
import numpy as np
import permutation_helpers as nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl.errors import ConfigError
from hybridfl.merging.groups import Group
from hybridfl.merging.matching import fixed_points
from hybridfl.merging.permutation import (
    PermutationSpec,
    identity,
    inverse,
    permutation_spec,
    permuted,
    random_permutations,
)
from hybridfl.models.cnn import CNN
from hybridfl.models.mlp import MLP


def spec_of(net: nn.Module) -> PermutationSpec:
    return permutation_spec(net, nets.inputs(number=2))


def group_of(spec: PermutationSpec, name: str) -> Group:
    (group,) = (group for group in spec.groups if group.name == name)
    return group


def axes(group: Group) -> list[tuple[str, int]]:
    return [(entry.name, entry.axis) for entry in group.entries]


# -- the function stays ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", nets.NETS)
def test_a_permuted_net_is_the_same_function(name: str) -> None:
    net, x = nets.NETS[name](), nets.inputs()
    spec, model = spec_of(net), nets.model(net)
    before, kept = nets.run(net, model, x), copy.deepcopy(model)
    for seed in range(3):
        permutations = random_permutations(spec, np.random.default_rng(seed))
        moved = permuted(model, spec, permutations)
        torch.testing.assert_close(nets.run(net, moved, x), before, rtol=0, atol=1e-10)
        assert not helpers.identical(moved, model)
        assert helpers.identical(permuted(moved, spec, inverse(permutations)), model)
    assert helpers.identical(model, kept)
    assert helpers.identical(permuted(model, spec, identity(spec)), model)


# Not where a norm of single channels takes away the bias before it, or a ReLU what is constant and negative.
@pytest.mark.parametrize(
    "name", sorted(set(nets.NETS) - {"cnn, one channel a group", "plain, instance norm", "padded"})
)
def test_every_entry_is_needed(name: str) -> None:
    # A group moved in all its axes but one gives another function.
    net, x = nets.NETS[name](), nets.inputs(number=2)
    spec, model = spec_of(net), nets.model(net)
    before = nets.run(net, model, x)
    rng = np.random.default_rng(0)
    for g, group in enumerate(spec.groups):
        permutation = torch.arange(group.size)
        while group.size > 1 and fixed_points([permutation]) == 1:
            permutation = random_permutations(spec, rng)[g]
        for left_out in range(len(group.entries) if group.size > 1 else 0):
            entries = tuple(e for i, e in enumerate(group.entries) if i != left_out)
            partly = PermutationSpec((Group(group.name, group.size, entries, group.features),))
            moved = nets.run(net, permuted(model, partly, [permutation]), x)
            assert (moved - before).abs().max() > 1e-6, (group.name, group.entries[left_out].name)


def test_statistics_of_norms_move_with_their_channels() -> None:
    net = nets.plain(nn.BatchNorm2d)
    spec, model = spec_of(net), nets.model(net)
    permutations = identity(spec)
    permutations[0] = torch.tensor([3, 0, 1, 2, 5, 4])
    moved = permuted(model, spec, permutations)
    for name in ("1.running_mean", "1.running_var"):
        assert torch.equal(moved.buffers[name], model.buffers[name][permutations[0]])
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert torch.equal(moved.params[name], model.params[name][permutations[0]])
    assert torch.equal(moved.params["4.weight"], model.params["4.weight"][:, permutations[0]])
    assert moved.params["12.bias"] is model.params["12.bias"]


# -- the groups ----------------------------------------------------------------------------------------------------------


def test_an_mlp_has_a_group_a_hidden_layer_and_keeps_inputs_and_logits() -> None:
    spec = spec_of(MLP((3, 8, 8), 5, (7, 6)))
    assert [axes(group) for group in spec.groups] == [
        [("body.1.weight", 0), ("body.1.bias", 0), ("body.3.weight", 1)],
        [("body.3.weight", 0), ("body.3.bias", 0), ("head.weight", 1)],
    ]
    assert spec.modules == ["body.3", "head"]
    assert spec_of(MLP((3, 8, 8), 5, ())).groups == ()


def test_a_flattened_channel_has_consecutive_places() -> None:
    spec = spec_of(CNN((3, 8, 8), 5, (4, 8), 9, groups=2))
    group = group_of(spec, "body.4")
    (dense,) = (entry for entry in group.entries if entry.axis == 1)
    assert dense.name == "body.9.weight"
    assert torch.equal(dense.index, torch.arange(8 * 4).view(8, 4))
    # The pooling stands in front of the next layer: its input has all positions.
    assert [g.features.module for g in spec.groups] == ["body.3", "body.7", "head"]


def test_a_group_norm_keeps_its_groups_of_channels_together() -> None:
    def blocks(groups: int) -> list[list[int]] | None:
        found = group_of(spec_of(CNN((3, 8, 8), 5, (4,), 9, groups)), "body.0").blocks
        return None if found is None else found.tolist()

    assert [blocks(groups) for groups in (1, 2, 4)] == [None, [[0, 1], [2, 3]], None]


def test_where_group_norms_disagree_units_stay_within_a_group_of_channels() -> None:
    def found(net: nn.Module) -> list[list[list[int]]]:
        """Of the units of every group, their places in the last norm; in brackets those that stay together."""
        groups = [group for group in spec_of(net).groups if any(e.name == "norm.weight" for e in group.entries)]
        places = [next(e.index for e in group.entries if e.name == "norm.weight").flatten() for group in groups]
        return [
            [place.tolist()] if group.blocks is None else [place[block].tolist() for block in group.blocks]
            for group, place in zip(groups, places, strict=True)
        ]

    def after(groups: int, *layers: nn.Module) -> nn.Module:
        net = nn.Sequential(nn.Flatten(), *layers)
        net.add_module("norm", nn.GroupNorm(groups, 8))
        net.add_module("head", nn.Linear(8, 5))
        return net

    dense = nn.Linear(192, 8)
    assert found(after(2, dense)) == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    # Two norms that agree, up to the order of their groups.
    turned = Apply(lambda x: x.roll(4, 1))
    assert found(after(2, dense, nn.GroupNorm(2, 8), turned)) == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    # Blocks of 2 within blocks of 4, the larger first or last.
    nested = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert found(after(2, dense, nn.GroupNorm(4, 8))) == nested
    assert found(after(4, dense, nn.GroupNorm(2, 8))) == nested
    # Groups that cross leave no pair.
    crossed = Apply(lambda x: x.view(-1, 4, 2).transpose(1, 2).reshape(-1, 8))
    assert sorted(found(after(4, dense, nn.GroupNorm(4, 8), crossed))) == [[[i]] for i in range(8)]
    # Channels 0 to 2 and 3 to 7 are of two layers: the second half is of one.
    parts = nn.ModuleList([nn.Linear(192, 3), nn.Linear(192, 5)])
    assert found(after(2, Beside(parts))) == [[[0, 1, 2]], [[3]], [[4, 5, 6, 7]]]
    assert spec_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.GroupNorm(2, 6))).groups == ()


@pytest.mark.parametrize("seed", range(5))
def test_random_permutations_respect_blocks(seed: int) -> None:
    spec = spec_of(CNN((3, 8, 8), 5, (4, 8), 9, groups=2))
    for group, permutation in zip(spec.groups, random_permutations(spec, np.random.default_rng(seed)), strict=True):
        assert sorted(permutation.tolist()) == list(range(group.size))
        if group.blocks is not None:
            together = {frozenset(block.tolist()) for block in group.blocks}
            assert {frozenset(permutation[block].tolist()) for block in group.blocks} == together


def test_layers_of_a_residual_stream_share_one_permutation() -> None:
    spec = spec_of(nets.ResNet((2, 2)))
    assert len(spec.groups) == 4 + 2
    stream = group_of(spec, "stages.1.0.conv2")
    writers = {"stages.1.0.conv2", "stages.1.0.shortcut.0", "stages.1.1.conv2"}
    assert {name.removesuffix(".weight") for name, axis in axes(stream) if axis == 0 and "conv" in name} | {
        "stages.1.0.shortcut.0"
    } == writers
    assert ("stages.1.0.shortcut.0.weight", 0) in axes(stream)
    assert ("stages.1.0.shortcut.1.running_var", 0) in axes(stream)
    assert [key for key in axes(stream) if key[1] == 1] == [("stages.1.1.conv1.weight", 1), ("head.weight", 1)]
    first = group_of(spec, "conv1")
    assert [key[0] for key in axes(first) if key[1] == 1] == [
        "stages.0.0.conv1.weight",
        "stages.0.1.conv1.weight",
        "stages.1.0.conv1.weight",
        "stages.1.0.shortcut.0.weight",
    ]
    inner = group_of(spec, "stages.0.1.conv1")
    assert inner.features.module == "stages.0.1.conv2"
    # Streams are seen where their last reader takes them up: at the stage's end, before pooling.
    assert first.features.module == "stages.1.0.conv1"
    assert stream.features.module == "pool"
    without = group_of(spec_of(nets.ResNet((2, 2), pool=False)), "stages.1.0.conv2")
    assert without.features.module == "head"


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_resnet_20_has_twelve_permutations(shortcut: str) -> None:
    spec = spec_of(nets.ResNet((3, 3, 3), width=4, shortcut=shortcut))
    inner = [group for group in spec.groups if ".conv1" in group.name]
    assert (len(inner), len(spec.groups)) == (9, 12)
    sizes = Counter(group.size for group in spec.groups if group not in inner)
    # With padding a stream is the one before and as many new channels.
    assert sizes == (Counter([4, 8, 16]) if shortcut == "B" else Counter([4, 4, 8]))


def test_a_padded_stream_carries_the_channels_of_the_one_before() -> None:
    spec = spec_of(nets.ResNet((1, 1), width=4, shortcut="A"))
    old, new = group_of(spec, "conv1"), group_of(spec, "stages.1.0.conv2")
    for group, places in [(old, [2, 3, 4, 5]), (new, [0, 1, 6, 7])]:
        (entry,) = (e for e in group.entries if e.name == "stages.1.0.norm2.weight")
        assert entry.index.flatten().tolist() == places


def test_a_concatenation_gives_its_parts_their_own_places() -> None:
    spec = spec_of(nets.squeeze())
    assert [(g.name, g.size) for g in spec.groups] == [("0", 8), ("3.squeeze", 4), ("3.one", 4), ("3.three", 5)]
    places = [
        entry.index.flatten().tolist() for g in spec.groups[2:] for entry in g.entries if entry.name == "4.weight"
    ]
    assert places == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]


def test_a_depthwise_convolution_keeps_its_channels() -> None:
    spec = spec_of(nets.mobile())
    assert [(g.name, g.size) for g in spec.groups] == [("0", 6), ("6", 8)]
    index = {entry.name: entry.index for entry in spec.groups[0].entries}
    assert torch.equal(index["5.weight"], torch.arange(12).view(6, 2))
    assert torch.equal(index["6.weight"], torch.arange(12).view(6, 2))


def test_a_product_with_a_gate_of_channels_ties_and_one_of_positions_does_not() -> None:
    spec = spec_of(nets.gated())
    assert [(g.name, g.size) for g in spec.groups] == [
        ("0", 6),
        ("2.down", 3),
        ("4", 4),
        ("7", 8),
        ("8.inner", 7),
        ("9.inner", 7),
    ]
    assert ("2.up.weight", 0) in axes(spec.groups[0])
    assert ("8.gamma", 0) in axes(spec.groups[3])


def test_units_that_a_layer_treats_as_a_set_are_a_group() -> None:
    spec = spec_of(nets.Odd())
    assert [(g.name, g.size) for g in spec.groups] == [("embed", 4), ("embed", 4), ("embed", 4)]
    # A unit of a gated linear unit has a place in both halves; a layer that runs twice has its input's units at both ends.
    for number, group in enumerate(spec.groups):
        index = {(entry.name, entry.axis): entry.index for entry in group.entries}
        first = torch.arange(4 * number, 4 * number + 4)
        assert torch.equal(index["embed.weight", 0], torch.stack([first, first + 12], 1))
        assert torch.equal(index["turn.weight", 0].flatten(), first)
        assert torch.equal(index["turn.weight", 1].flatten(), first)
        assert group.features.module == "head"


def test_a_norm_makes_features_of_constant_channels() -> None:
    spec = spec_of(nets.Padded())
    assert [(g.name, g.size) for g in spec.groups] == [("conv1", 4), ("norm", 2), ("conv2", 5)]
    assert [
        next(e.index for e in g.entries if e.name == "norm.weight").flatten().tolist() for g in spec.groups[:2]
    ] == [
        [1, 2, 3, 4],
        [0, 5],
    ]
    # The pooling is in front of the head, but it runs twice.
    assert [g.features.module for g in spec.groups] == ["conv2", "conv2", "head"]


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Beside(nn.Module):
    def __init__(self, parts: nn.ModuleList) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


class Bare(nn.Module):
    """Weights without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 192)), nn.Parameter(torch.randn(5, 6))
        self.register_buffer("order", torch.arange(192).flip(0))
        self.register_buffer("shift", torch.randn(192))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, self.order] - self.shift
        assert x.shape[1] == len(self.shift)
        return F.linear(F.relu_(F.linear(x, self.a)), self.b)


# -- refusals --------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 4), nn.Linear(4, 5)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2))
        return self.head(self.attend(x, x, x)[0].mean(1))


def around(layer: nn.Module, channels: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)
    )


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(192, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.flatten(1))
        return self.head(x if x[0, 0] > 0 else -x)


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.auxiliary = nn.Linear(192, 5), nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention": (Attention, "layer 'attend' uses multi_head_attention_forward, which is not known"),
    "groups of channels": (lambda: around(nn.Conv2d(4, 4, 3, groups=2)), "layer '2' is a convolution in 2 groups of 2"),
    "transposed": (lambda: around(nn.ConvTranspose2d(4, 4, 3)), "layer '2' uses conv_transpose2d"),
    "shuffled": (lambda: around(nn.PixelShuffle(2), 1), "layer '2' uses pixel_shuffle"),
    "reduced": (lambda: around(Apply(lambda x: x.sum(1, keepdim=True)), 1), "layer '2' reduces over hidden units"),
    "mixed": (lambda: around(nn.Sequential(Apply(lambda x: x.transpose(1, 2)), nn.Conv2d(6, 4, 3))), "layer '2.1' takes"),
    "computed": (
        lambda: around(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))),
        "layer '2.parametrizations.weight.0' uses weight_norm",
    ),
    "values": (Looks, r"the net reads or sets values \(bool\)"),
    "idle": (Idle, "its parameter 'auxiliary.weight' takes no part"),
    "modules": (Bare, "no module that runs once takes the features of layer 'a'"),
    "tuple": (lambda: Apply(lambda x: (x, x)), "gives a tuple"),
    "turned": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), Apply(lambda x: torch.cat([x[:, :2], x[:, 2:].flip(3)], 1)), nn.Flatten(), nn.Linear(144, 5)
        ),
        "its logits change by",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_by_the_name_of_its_layer(name: str) -> None:
    make, text = REFUSED[name]
    with pytest.raises(ConfigError, match=text) as caught:
        spec_of(make())
    assert caught.value.key == "model"


def test_net_and_example_are_left_as_they_are() -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nets.ResNet()).train()
    before, example = copy.deepcopy(net.state_dict()), nets.inputs(number=2)
    permutation_spec(net, example)
    assert torch.equal(example, nets.inputs(number=2))
    assert helpers.identical(dict(net.state_dict()), dict(before))
    assert net.training
    assert all(p.dtype == torch.float32 for p in net.parameters())
