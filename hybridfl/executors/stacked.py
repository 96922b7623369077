"""Dense nets of many clients as batched matrix products.

``torch.func.vmap`` runs any net for all clients at once, but its bookkeeping costs as much as the arithmetic of a small dense
net. Such nets are traced once and run layer by layer on stacked weights instead.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl.local import run_net
from hybridfl.params import Params

StackedNet = Callable[[Params, Params, Tensor], Tensor]
"""``net(params, buffers, x)``: tensors with the clients as first axis, inputs ``(clients, b, …)`` → logits
``(clients, b, classes)``."""
Layer = Callable[[Params, Tensor], Tensor]

ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity)
FUNCTIONS = (torch.relu, F.relu, F.gelu, F.silu, torch.tanh, F.tanh, torch.sigmoid, F.sigmoid)
METHODS = ("relu", "tanh", "sigmoid")


def stacked(net: nn.Module) -> StackedNet:
    """The net for many clients at once: by batched products if it is a chain of dense layers, else under ``vmap``."""
    layers = _chain(net)
    if layers is None:
        return torch.func.vmap(lambda params, buffers, x: run_net(net, params, buffers, x))

    def run(params: Params, buffers: Params, x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(params, x)
        return x

    return run


def is_dense(net: nn.Module) -> bool:
    """Whether the net is a chain of dense layers and elementwise functions."""
    return _chain(net) is not None


def _chain(net: nn.Module) -> list[Layer] | None:
    """The net's layers one after the other, if it is no more than that and all of them are known; found once."""
    if net not in _CHAINS:
        _CHAINS[net] = _traced(net)
    return _CHAINS[net]


_CHAINS: WeakKeyDictionary[nn.Module, list[Layer] | None] = WeakKeyDictionary()


def _traced(net: nn.Module) -> list[Layer] | None:
    if any(True for _ in net.buffers()) or any(True for module in net.modules() if module._forward_hooks):
        return None
    import torch.fx

    try:
        graph = torch.fx.symbolic_trace(net).graph
    except Exception:  # code that looks at values or shapes cannot be traced, in as many ways as there is code
        return None
    layers: list[Layer] = []
    last: torch.fx.Node | None = None
    for node in graph.nodes:
        if node.op == "output":
            return layers if node.args == (last,) else None
        if last is not None:
            if not node.args or node.args[0] is not last or node.op == "get_attr":
                return None
            layer = _layer(net, node)
            if layer is None:
                return None
            layers.append(layer)
        elif node.op != "placeholder":
            return None
        last = node
    return None


def _layer(net: nn.Module, node: torch.fx.Node) -> Layer | None:
    if node.op == "call_module" and not node.kwargs and len(node.args) == 1:
        name = str(node.target)
        module = net.get_submodule(name)
        if type(module) is nn.Linear:
            return _linear(name, module.bias is not None)
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return lambda params, x: x.flatten(2)
        if type(module) in ELEMENTWISE:
            return lambda params, x: module(x)
        return None
    if node.target in ("flatten", torch.flatten) and node.args[1:] == (1,) and not node.kwargs:
        return lambda params, x: x.flatten(2)
    if len(node.args) > 1 or any(isinstance(value, torch.fx.Node) for value in node.kwargs.values()):
        return None
    options = dict(node.kwargs)
    if node.op == "call_function" and node.target in FUNCTIONS:
        function: Callable[..., Tensor] = node.target
        return lambda params, x: function(x, **options)
    if node.op == "call_method" and node.target in METHODS:
        method = getattr(torch, str(node.target))
        return lambda params, x: method(x, **options)
    return None


def _linear(name: str, bias: bool) -> Layer:
    def layer(params: Params, x: Tensor) -> Tensor:
        weight = params[f"{name}.weight"].transpose(1, 2)
        flat = x.flatten(1, -2)
        if not bias:
            return torch.bmm(flat, weight).view(*x.shape[:-1], -1)
        return torch.baddbmm(params[f"{name}.bias"].unsqueeze(1), flat, weight).view(*x.shape[:-1], -1)

    return layer
