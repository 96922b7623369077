"""Dense nets of many clients as batched matrix products, forward and backward.

``torch.func.vmap`` runs any net for all clients at once, but its bookkeeping, and that of autograd, cost as much as the
arithmetic of a small dense net. Such nets are traced once; their passes are written out here, so that a step of plain
gradient descent adds the product that makes up a gradient to the weights at once, without a gradient in between. As long
as all clients have the same weights, which are then one tensor expanded, there is one product for all their examples; for
the first layer, most often the largest, that stays so in the next steps: what they added is kept as products, see
:mod:`hybridfl.deferred`, while these have fewer numbers than the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridfl.deferred import Product, pieces
from hybridfl.models.precision import is_lowered
from hybridfl.params import Params

if TYPE_CHECKING:
    import torch.fx

ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity)
FUNCTIONS = (torch.relu, F.relu, F.gelu, F.silu, torch.tanh, F.tanh, torch.sigmoid, F.sigmoid)
METHODS = ("relu", "tanh", "sigmoid")
_through_relu = torch.ops.aten.threshold_backward.default
"""``grad * (after > 0)`` in one operation."""


@dataclass(frozen=True)
class Dense:
    """``x Wᵀ + b``, with ``W`` and ``b`` under the module's name."""

    name: str
    bias: bool


@dataclass(frozen=True)
class Flatten:
    """All axes of an example made one."""


@dataclass(frozen=True)
class Elementwise:
    """Attributes:
    function: of a layer's input.
    is_relu: whether it is that one, whose slope is written out; those of others are asked of autograd.
    """

    function: Callable[[Tensor], Tensor]
    is_relu: bool = False


Layer = Dense | Flatten | Elementwise
LayerOrMore = TypeVar("LayerOrMore")


class Passed(NamedTuple):
    """What a layer was given and made of it; of an elementwise one whose slope is not known, as autograd wants them."""

    before: Tensor
    after: Tensor


class Slope(NamedTuple):
    """The gradient of a parameter: ``left @ right`` of weights, ``left`` summed over its rows of biases.

    Attributes:
        left: ``(clients, out, rows)``.
        right: ``(clients, rows, in)``.
    """

    name: str
    left: Tensor
    right: Tensor | None


@dataclass(frozen=True)
class Chain:
    """Dense layers and elementwise functions, one after the other."""

    layers: tuple[Layer, ...]

    @cached_property
    def first(self) -> int:
        """Position of the first dense layer, whose input needs no gradient."""
        return next((i for i, layer in enumerate(self.layers) if isinstance(layer, Dense)), len(self.layers))

    @cached_property
    def first_weight(self) -> str | None:
        """Its weights, which products may be kept beside."""
        layer = self.layers[self.first] if self.first < len(self.layers) else None
        return f"{layer.name}.weight" if isinstance(layer, Dense) else None

    @property
    def reads_examples(self) -> bool:
        """Whether the first dense layer is given the examples' own numbers."""
        return all(isinstance(layer, Flatten) for layer in self.layers[: self.first])

    def forward(self, params: Params, x: Tensor, products: Sequence[Product] = ()) -> list[Passed]:
        """All layers' inputs and outputs; the last output is the logits ``(clients, b, classes)``.

        Args:
            params: with the clients as first axis; what they share may be expanded.
            x: ``(clients, b, …)``.
            products: to be added to the first layer's weights, which are shared then.
        """
        tape: list[Passed] = []
        for i, layer in enumerate(self.layers):
            x = x if not tape else tape[-1].after.detach()
            tape.append(_passed(layer, params, x, products if i == self.first else ()))
        return tape

    def backward(self, params: Params, tape: list[Passed], grad: Tensor) -> Iterator[Slope]:
        """Gradients of all parameters, those of the last layer first.

        A parameter may be changed, or replaced, as soon as its slope has been yielded, as it is not read any more.

        Args:
            grad: of the logits.
        """
        first = self.first
        for i in range(len(tape) - 1, first - 1, -1):
            layer, (before, after) = self.layers[i], tape[i]
            if isinstance(layer, Flatten):
                grad = grad.view(before.shape)
            elif isinstance(layer, Elementwise):
                grad = _through_relu(grad, after, 0) if layer.is_relu else torch.autograd.grad(after, before, grad)[0]
            else:
                weight, out = params[f"{layer.name}.weight"], grad.flatten(1, -2).transpose(1, 2)
                if i > first and is_shared(weight):
                    grad = grad @ weight[0]
                elif i > first:
                    grad = torch.bmm(weight.transpose(1, 2), out).transpose(1, 2).reshape(before.shape)
                yield Slope(f"{layer.name}.weight", out, before.flatten(1, -2))
                if layer.bias:
                    yield Slope(f"{layer.name}.bias", out, None)

    def descend(
        self,
        params: Params,
        tape: list[Passed],
        grad: Tensor,
        lrs: Mapping[str, float],
        weight_decay: float,
        products: list[Product] | None = None,
    ) -> None:
        """A step of gradient descent on all parameters: ``θ ← (1 - lr · weight_decay) θ - lr · gradient``.

        It is done in place, but puts new tensors where the clients shared one.

        Args:
            products: where the first layer's is added, instead of to the weights.
        """
        for name, left, right in self.backward(params, tape, grad):
            kept, rate, old = 1 - lrs[name] * weight_decay, -lrs[name], params[name]
            if right is not None and products is not None and name == self.first_weight:
                products.append(Product(left, right, rate))
            elif right is not None:
                out = torch.empty_like(old, memory_format=torch.contiguous_format) if is_shared(old) else old
                params[name] = torch.baddbmm(old, left, right, beta=kept, alpha=rate, out=out)
            else:
                if is_shared(old):
                    params[name] = old = old.contiguous()
                if weight_decay:
                    old.mul_(kept)
                old.add_(left.sum(2), alpha=rate)

    def gradients(self, params: Params, tape: list[Passed], grad: Tensor) -> Params:
        """By name, in the order of ``params``."""
        found = {
            name: left.sum(2) if right is None else torch.bmm(left, right)
            for name, left, right in self.backward(params, tape, grad)
        }
        return {name: found[name] for name in params}


def is_shared(stack: Tensor) -> bool:
    """Whether all clients' tensors are one, expanded."""
    return len(stack) > 1 and stack.stride(0) == 0


def _passed(layer: Layer, params: Params, x: Tensor, products: Sequence[Product]) -> Passed:
    if isinstance(layer, Flatten):
        return Passed(x, x.flatten(2))
    if isinstance(layer, Elementwise):
        if layer.is_relu:
            return Passed(x, layer.function(x))
        with torch.enable_grad():
            before = x.detach().requires_grad_()
            return Passed(before, layer.function(before))
    weight, bias = params[f"{layer.name}.weight"], params[f"{layer.name}.bias"] if layer.bias else None
    if products:
        rows = x.flatten(1, -2)
        found = _linear(rows, weight[0], None)
        for left, right, rate in products:
            those = slice(0, len(rows))
            found.baddbmm_(torch.bmm(rows, right[those].transpose(1, 2)), left[those].transpose(1, 2), alpha=rate)
        if bias is not None:
            found += bias.unsqueeze(1)
        return Passed(x, found.view(*x.shape[:-1], -1))
    if is_shared(weight):
        return Passed(x, _linear(x, weight[0], None if bias is None else bias[0]))
    # Weights on the left and features before rows is the order in which small products are fastest.
    rows = x.flatten(1, -2).transpose(1, 2)
    out = torch.bmm(weight, rows) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, rows)
    return Passed(x, out.transpose(1, 2).reshape(*x.shape[:-1], -1))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + b`` with weights that all clients share."""
    parts = pieces(x.numel() // x.shape[-1], x.device)
    if parts == 1:
        return F.linear(x, weight, bias)
    rows, by_part = x.reshape(parts, -1, x.shape[-1]), weight.t().expand(parts, -1, -1)
    found = torch.bmm(rows, by_part) if bias is None else torch.baddbmm(bias, rows, by_part)
    return found.view(*x.shape[:-1], -1)


def chain(net: nn.Module) -> Chain | None:
    """The net as layers one after the other, if it is no more than that and all of them are known; found once."""
    if net not in _CHAINS:
        layers: list[Layer] | None = layers_of(net, known_layer)
        _CHAINS[net] = Chain(tuple(layers)) if layers and uses_every_parameter(net, layers) else None
    return _CHAINS[net]


_CHAINS: WeakKeyDictionary[nn.Module, Chain | None] = WeakKeyDictionary()


def uses_every_parameter(net: nn.Module, layers: Sequence[object], others: Sequence[str] = ()) -> bool:
    """Whether the dense layers, and ``others``, have every parameter of the net, and each of them once."""
    dense = [layer for layer in layers if isinstance(layer, Dense)]
    names = [f"{layer.name}.{part}" for layer in dense for part in ("weight", "bias")[: 1 + layer.bias]]
    return sorted([*names, *others]) == sorted(name for name, _ in net.named_parameters())


def layers_of(
    net: nn.Module, layer_of: Callable[[nn.Module, torch.fx.Node], LayerOrMore | None]
) -> list[LayerOrMore] | None:
    """What the net is one after the other; ``None`` if it is more than that, or ``layer_of`` does not know one of them."""
    if (
        is_lowered(net)
        or any(True for _ in net.buffers())
        or any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    ):
        return None
    import torch.fx

    training = net.training
    try:
        graph = torch.fx.symbolic_trace(net.train()).graph  # as it is in steps
    except Exception:  # code that looks at values or shapes cannot be traced, in as many ways as there is code
        return None
    finally:
        net.train(training)
    layers: list[LayerOrMore] = []
    last: torch.fx.Node | None = None
    for node in graph.nodes:
        if node.op == "output":
            return layers if node.args == (last,) else None
        if last is not None:
            if not node.args or node.args[0] is not last or node.op == "get_attr":
                return None
            layer = layer_of(net, node)
            if layer is None:
                return None
            layers.append(layer)
        elif node.op != "placeholder":
            return None
        last = node
    return None


def known_layer(net: nn.Module, node: torch.fx.Node) -> Layer | None:
    """What a node of the net's graph is, if it is dense, elementwise or flattens."""
    if node.op == "call_module" and not node.kwargs and len(node.args) == 1:
        name = str(node.target)
        module = net.get_submodule(name)
        if type(module) is nn.Linear:
            return Dense(name, module.bias is not None)
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return Flatten()
        if type(module) in ELEMENTWISE:
            # Given a copy, it may write into it.
            function = (lambda x: module(x.clone())) if getattr(module, "inplace", False) else module
            return Elementwise(function, type(module) is nn.ReLU)
        return None
    if node.target in ("flatten", torch.flatten) and node.args[1:] == (1,) and not node.kwargs:
        return Flatten()
    if len(node.args) > 1 or any(isinstance(value, torch.fx.Node) for value in node.kwargs.values()):
        return None
    options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if node.op == "call_function" and node.target in FUNCTIONS:
        named: Callable[..., Tensor] = node.target
        return Elementwise(lambda x: named(x, **options), named in (torch.relu, F.relu))
    if node.op == "call_method" and node.target in METHODS:
        method = getattr(torch, str(node.target))
        return Elementwise(lambda x: method(x, **options), node.target == "relu")
    return None
