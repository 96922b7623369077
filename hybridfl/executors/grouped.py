"""Convolutional nets of many clients as one net: the channels of all of them side by side, each client's a group.

``torch.func.vmap`` convolves in groups too, but takes the clients apart again for every pooling and normalisation, and
loses the layout in which a CPU convolves fastest. docs/performance.md has what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl.executors.stacked import Dense, Flatten, Layer, known_layer, layers_of, uses_every_parameter
from hybridfl.local import laid_out
from hybridfl.params import Params

if TYPE_CHECKING:
    import torch.fx

POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


@dataclass(frozen=True, eq=False)
class OfChannels:
    """A module that treats channels, or groups of them, apart: a convolution, GroupNorm, or a pooling."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class Grouped:
    """Layers on channels, then dense ones, one after the other."""

    layers: tuple[Layer | OfChannels, ...]

    def forward(self, params: Params, x: Tensor) -> Tensor:
        """Logits ``(clients, b, classes)``, for autograd.

        Args:
            params: with the clients as first axis.
            x: ``(clients, b, channels, rows, columns)``.
        """
        clients = len(x)
        x = laid_out(x.transpose(0, 1).flatten(1, 2))
        for layer in self.layers:
            if isinstance(layer, OfChannels):
                x = _of_channels(layer, params, x, clients)
            elif isinstance(layer, Flatten):
                x = x.unflatten(1, (clients, -1)).flatten(2).transpose(0, 1)
            elif isinstance(layer, Dense):
                weight = params[f"{layer.name}.weight"].transpose(1, 2)
                x = torch.baddbmm(params[f"{layer.name}.bias"].unsqueeze(1), x, weight) if layer.bias else x @ weight
            else:
                x = layer.function(x)
        return x


def _of_channels(layer: OfChannels, params: Params, x: Tensor, clients: int) -> Tensor:
    """``(b, clients · channels, rows, columns)`` → the same."""
    module = layer.module
    own = {name: params[f"{layer.name}.{name}"].flatten(0, 1) for name, _ in module.named_parameters()}
    weight, bias = own.get("weight"), own.get("bias")
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, clients * module.num_groups, weight, bias, module.eps)
    if isinstance(module, nn.Conv2d):
        assert weight is not None
        groups = clients * module.groups
        return F.conv2d(x, laid_out(weight), bias, module.stride, module.padding, module.dilation, groups)
    found: Tensor = module(x)
    return found


def grouped(net: nn.Module) -> Grouped | None:
    """The net as such layers, if it is no more than that and has a convolution; found once."""
    if net not in _GROUPED:
        layers: list[Layer | OfChannels] | None = layers_of(net, _layer)
        _GROUPED[net] = Grouped(tuple(layers)) if layers and _fits(net, layers) else None
    return _GROUPED[net]


_GROUPED: WeakKeyDictionary[nn.Module, Grouped | None] = WeakKeyDictionary()


def _layer(net: nn.Module, node: torch.fx.Node) -> Layer | OfChannels | None:
    if node.op == "call_module" and not node.kwargs and len(node.args) == 1:
        name = str(node.target)
        module = net.get_submodule(name)
        zeros = type(module) is nn.Conv2d and module.padding_mode == "zeros"
        pooling = type(module) in POOLING and not getattr(module, "return_indices", False)
        if zeros or pooling or type(module) is nn.GroupNorm:
            return OfChannels(name, module)
    return known_layer(net, node)


def _fits(net: nn.Module, layers: list[Layer | OfChannels]) -> bool:
    """Whether a single flattening lies between what works on channels, a convolution among it, and what is dense."""
    flat = [i for i, layer in enumerate(layers) if isinstance(layer, Flatten)]
    if len(flat) != 1 or not any(isinstance(layer, OfChannels) and type(layer.module) is nn.Conv2d for layer in layers):
        return False
    before, after = layers[: flat[0]], layers[flat[0] + 1 :]
    apart = not any(isinstance(layer, Dense) for layer in before)
    apart = apart and not any(isinstance(layer, OfChannels) for layer in after)
    names = [
        f"{layer.name}.{name}"
        for layer in before
        if isinstance(layer, OfChannels)
        for name, _ in layer.module.named_parameters()
    ]
    return apart and uses_every_parameter(net, layers, names)
