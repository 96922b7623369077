"""Hidden units followed through a forward pass.

A :class:`Trace` intercepts torch's functions while a net runs on an example. To every activation it keeps a tensor of
tags (:mod:`hybridfl.merging.units`) of the same shape: operations that only move elements are run on the tags too,
weights make new units, additions tie the units they add. The pass is a real one, so Python code in ``forward`` that
looks at shapes is followed as it is. What is not known to leave units apart is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hybridfl.errors import ConfigError
from hybridfl.merging.layer_units import LAYERS, bound, spread
from hybridfl.merging.units import CONSTANT, FIXED, Units
from hybridfl.params import tensors


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


# Names of functions and methods without underscores around them: "add" is also Tensor.add_.
_POOLS = _words(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d",
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate",
)
_ELEMENTWISE = _words(
    "relu relu6 leaky_relu rrelu elu selu celu gelu silu mish softplus softsign sigmoid logsigmoid tanh tanhshrink",
    "hardtanh hardswish hardsigmoid hardshrink softshrink threshold",
    "add radd iadd sub rsub isub mul rmul imul div rdiv truediv rtruediv itruediv true_divide pow rpow ipow",
    "square sqrt rsqrt exp log log1p neg abs sign reciprocal clamp clamp_min clamp_max maximum minimum where lerp",
    "addcmul addcdiv gt ge lt le eq ne",
)
_SAME = _words(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout",
    "contiguous clone detach to float double type_as requires_grad",
)
_MOVES = _words(
    "view view_as reshape reshape_as flatten unflatten permute transpose swapaxes movedim t squeeze unsqueeze expand",
    "expand_as broadcast_to repeat tile cat concat concatenate stack chunk split tensor_split unbind narrow select",
    "index_select getitem flip roll pad",
)
_REDUCTIONS = _words("mean sum amax amin")
_KNOWN = _POOLS | _ELEMENTWISE | _SAME | _REDUCTIONS | set(LAYERS)
_CREATE = _words("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor")
_FACTS = _words(
    "size dim ndimension numel nelement len stride storage_offset is_contiguous is_floating_point is_complex",
    "element_size get_device data_ptr hash",
)


class Read(NamedTuple):
    """A layer that takes up all its input channels: their units ``(n,)``, and which version of the features they are."""

    units: Tensor
    version: int


class Call(NamedTuple):
    """A module that ran: the tags of its first input, and which version of the features that was."""

    module: str
    tags: Tensor
    version: int


class _Activation(NamedTuple):
    tensor: Tensor  # kept, so that its address, by which it is found, is not used again
    tags: Tensor
    version: int


class Trace(TorchFunctionMode):
    """What one pass of ``net`` on ``x`` says about its units.

    Attributes:
        units: which of them are one.
        axes: by (tensor name, axis), the unit of every index.
        sets: units that a layer treats as a set, such as those of a LayerNorm.
        grouped: units that GroupNorms treat as sets, ``(groups, channels of a group)``.
        reads, calls: in the order of execution.
        takers: names of the modules that pool or take up channels themselves.

    Raises:
        ConfigError: key ``model``, naming the layer that cannot be followed.
    """

    def __init__(self, net: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.units = Units()
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.sets: list[Tensor] = []
        self.reads: list[Read] = []
        self.calls: list[Call] = []
        self.grouped: list[Tensor] = []
        self.takers: set[str] = set()
        stored = itertools.chain(net.named_parameters(), net.named_buffers())
        self._names = {id(tensor): name for name, tensor in stored if tensor.is_floating_point()}
        self._used: set[str] = set()
        self._activations: dict[int, _Activation] = {}
        self._versions = itertools.count()
        self._layers: list[str] = []
        self._follow(net, x)
        for name, _ in net.named_parameters():
            if name not in self._used:
                raise ConfigError(
                    "model", f"its parameter '{name}' takes no part in evaluation, so it cannot be permuted."
                )

    def _follow(self, net: nn.Module, x: Tensor) -> None:
        hooks = []
        for name, module in net.named_modules():
            if name:
                hooks.append(module.register_forward_pre_hook(self._entering(name)))
                hooks.append(module.register_forward_hook(lambda *_: self._left()))
        try:
            self._set(x, torch.full(x.shape, FIXED))
            with torch.no_grad(), self:
                out = net(x)
            if not isinstance(out, Tensor) or not self._knows(out):
                self.refuse(f"gives a {type(out).__name__} and not logits that come from its input")
            self.units.tie(self.tags(out), torch.tensor(FIXED))
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._layers.append(name)
            if args and isinstance(args[0], Tensor) and id(args[0]) in self._activations:
                _, tags, version = self._activations[id(args[0])]
                self.calls.append(Call(name, tags, version))

        return enter

    def _left(self) -> None:
        self._layers.pop()

    @property
    def _layer(self) -> str:
        """The innermost module that is running; the net itself has no name."""
        return self._layers[-1] if self._layers else ""

    # -- what is known of a tensor -------------------------------------------------------------------------------------

    def _knows(self, tensor: Tensor) -> bool:
        return id(tensor) in self._activations or id(tensor) in self._names

    def _set(self, tensor: Tensor, tags: Tensor, version: int | None = None) -> None:
        self._activations[id(tensor)] = _Activation(tensor, tags, next(self._versions) if version is None else version)

    def tags(self, tensor: Tensor) -> Tensor:
        """Of an activation, or of a parameter with one axis, whose elements are units of their own."""
        if id(tensor) in self._activations:
            return self._activations[id(tensor)].tags
        name = self._names[id(tensor)]
        self._used.add(name)
        wide = [axis for axis, size in enumerate(tensor.shape) if size > 1]
        if not wide:
            return torch.full(tensor.shape, CONSTANT)
        if len(wide) > 1:
            self.refuse(f"uses '{name}', a parameter of {len(wide)} axes, element by element")
        return spread(self.made(tensor, wide[0]), wide[0], tensor.shape)

    def version(self, tensor: Tensor) -> int:
        """Equal for features that differ by pooling, dropout or the place of their elements only."""
        known = self._activations.get(id(tensor))
        return known.version if known else next(self._versions)

    def channels(self, x: Tensor, axis: int) -> Tensor:
        """The unit of every index of an axis, ``(n,)``; refused if other axes tell units apart too."""
        units = self.units.along(self.tags(x), axis)
        if units is None:
            self.refuse(f"takes elements of different hidden units for one channel (axis {axis} of its input)")
        return units

    def write(self, parameter: Tensor | None, axis: int, units: Tensor) -> None:
        """The indices of a parameter's axis belong to these units."""
        if parameter is None:
            return
        if id(parameter) not in self._names:
            self.refuse("has weights that are computed from others")
        key = self._names[id(parameter)], axis
        self._used.add(key[0])
        if key in self.axes:
            self.units.tie(self.axes[key], units)
        else:
            self.axes[key] = units

    def made(self, weight: Tensor, axis: int = 0) -> Tensor:
        """The units that a parameter makes along an axis: new ones, or those of its last use."""
        key = self._names.get(id(weight), ""), axis
        if key not in self.axes:
            self.write(weight, axis, self.units.fresh(weight.shape[axis]))
        return self.axes[key]

    def read(self, x: Tensor, weight: Tensor, units: Tensor) -> None:
        """A layer takes up these units of ``x`` along axis 1 of its weight."""
        self.write(weight, 1, units)
        self.reads.append(Read(units, self.version(x)))
        self.takers.add(self._layer)

    def solid(self, units: Tensor) -> Tensor:
        """New units where the input is constant: a weight for each channel makes a feature of it."""
        empty = units == CONSTANT
        return torch.where(empty, self.units.fresh(len(units)), units) if bool(empty.any()) else units

    def normalised_together(self, units: Tensor, groups: int = 1) -> None:
        """Units ``(n,)`` whose statistics are shared, by all or in consecutive groups."""
        if groups < len(units):
            self.sets.append(units)
        if 1 < groups < len(units):
            self.grouped.append(units.view(groups, -1))

    def refuse(self, why: str) -> NoReturn:
        where = f"layer '{self._layer}'" if self._layer else "the net"
        raise ConfigError("model", f"{where} {why}, so its hidden units cannot be permuted.")

    # -- operations ----------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = list(tensors((args, kwargs)))
        is_getter = getattr(func, "__name__", "") == "__get__"
        name = func.__self__.__name__ if is_getter else getattr(func, "__name__", str(func)).strip("_")
        if name in _CREATE or not any(map(self._knows, operands)):
            return func(*args, **kwargs)
        for tensor in operands:
            if not self._knows(tensor):
                uniform = bool((tensor == tensor.flatten()[:1]).all())
                self._set(tensor, torch.full(tensor.shape, CONSTANT if uniform else FIXED))
        out = func(*args, **kwargs)
        results = list(tensors(out))
        if results and (is_getter or name in _MOVES):
            self._move(name, func, args, kwargs, results)
        elif results:
            self._compute(name, operands, args, kwargs, out)
        elif not is_getter and name not in _FACTS:
            self.refuse(f"reads or sets values ({name})")
        return out

    def _compute(
        self, name: str, operands: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        x = operands[0]
        version = None
        if name not in _KNOWN:
            self.refuse(f"uses {name}, which is not known to keep units apart")
        elif not isinstance(out, Tensor) or kwargs.get("out") is not None:
            self.refuse(f"uses {name} in a way that is not known")
        elif name in _SAME:
            tags, version = self.tags(x), self.version(x)
        elif name in _ELEMENTWISE:
            tags = self.elementwise(operands, out.shape)
        elif name in _POOLS:
            tags, version = spread(self.channels(x, 1), 1, out.shape), self.version(x)
            self.takers.add(self._layer)
        elif name in _REDUCTIONS:
            tags, version = self._reduce(*bound(args, kwargs, "input dim keepdim")), self.version(x)
        else:
            tags = LAYERS[name](self, args, kwargs, out)
        if tags.shape != out.shape:
            self.refuse(f"uses {name} in a way that is not known")
        self._set(out, tags, version)

    def _move(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Tensor]) -> None:
        """The same move, of the tags."""

        def swapped(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(swapped, value))
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point() and bool((self.tags(value) > FIXED).any()):
                self.refuse(f"reads or sets values ({name})")
            return self.tags(value) if value.is_floating_point() else value

        moved, options = tuple(map(swapped, args)), {key: swapped(value) for key, value in kwargs.items()}
        if name == "pad":
            tags, pad, mode, _ = bound(moved, options, "input pad mode value")
            constant = mode in (None, "constant")
            # Padding by reflection is not written for whole numbers.
            tags = F.pad(tags.double(), pad, mode or "constant", CONSTANT if constant else None).long()
        else:
            tags = func(*moved, **options)
        sources = [t for t in tensors((args, kwargs)) if t.is_floating_point()]
        version = self.version(sources[0]) if len(sources) == 1 else next(self._versions)
        for tensor, moved_tags in zip(results, tensors(tags), strict=True):
            if moved_tags.dtype != torch.int64 or moved_tags.shape != tensor.shape:
                self.refuse(f"uses {name} in a way that is not known")
            self._set(tensor, moved_tags, version)

    def elementwise(self, operands: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Tags of a result of this shape in which elements that meet belong to one unit."""
        out = torch.full(shape, CONSTANT)
        for tags in sorted(map(self.tags, operands), key=Tensor.numel, reverse=True):
            padded = tags.view([1] * (len(shape) - tags.dim()) + list(tags.shape))
            shared = [axis for axis, size in enumerate(shape) if padded.shape[axis] == 1 < size]
            if any(self.units.vary(out, axis) for axis in shared):
                # One element meets many units, as that of a gate over positions does: it stays what it is.
                self.units.tie(padded, torch.tensor(FIXED))
                continue
            self.units.tie(out, padded)
            out = torch.where(out == CONSTANT, padded, out)
        return out

    def _reduce(self, x: Tensor, dim: Any, keepdim: Any) -> Tensor:
        tags = self.units.canonical(self.tags(x))
        axes = tuple(range(x.dim())) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
        if any(self.units.vary(tags, axis) for axis in axes):
            self.refuse(f"reduces over hidden units (axes {axes} of its input)")
        return tags.amax(axes, keepdim=bool(keepdim))
