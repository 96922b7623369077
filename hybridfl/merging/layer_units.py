"""Which units come out of a layer with weights, given those that go in.

A function here takes the trace, the arguments of the call and its output, and returns the tags of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hybridfl.merging.tracing import Trace

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def bound(args: Args, kwargs: Kwargs, names: str) -> list[Any]:
    """Arguments by the names of the signature; ``None`` for what is not given."""
    given = dict(zip(names.split(), args, strict=False)) | kwargs
    return [given.get(name) for name in names.split()]


def spread(units: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """The unit of every index of an axis as tags of a tensor of this shape."""
    return units.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


def _linear(trace: Trace, args: Args, kwargs: Kwargs, out: Tensor) -> Tensor:
    x, weight, bias = bound(args, kwargs, "input weight bias")
    trace.read(x, weight, trace.channels(x, x.dim() - 1))
    made = trace.made(weight)
    trace.write(bias, 0, made)
    return spread(made, out.dim() - 1, out.shape)


def _convolution(trace: Trace, args: Args, kwargs: Kwargs, out: Tensor) -> Tensor:
    x, weight, bias, *_, groups = bound(args, kwargs, "input weight bias stride padding dilation groups")
    units = trace.channels(x, 1)
    if groups in (None, 1):
        trace.read(x, weight, units)
        made = trace.made(weight)
    elif groups == len(units):
        made = trace.solid(units).repeat_interleave(len(weight) // groups)
        trace.write(weight, 0, made)
    else:
        trace.refuse(f"is a convolution in {groups} groups of {len(units) // groups} channels")
    trace.write(bias, 0, made)
    return spread(made, 1, out.shape)


def _norm_of_channels(trace: Trace, args: Args, kwargs: Kwargs, out: Tensor) -> Tensor:
    x, *parameters = bound(args, kwargs, "input running_mean running_var weight bias")
    units = trace.solid(trace.channels(x, 1))
    for parameter in parameters:
        trace.write(parameter, 0, units)
    return spread(units, 1, out.shape)


def _group_norm(trace: Trace, args: Args, kwargs: Kwargs, out: Tensor) -> Tensor:
    x, groups, weight, bias = bound(args, kwargs, "input num_groups weight bias")
    units = trace.solid(trace.channels(x, 1))
    trace.write(weight, 0, units)
    trace.write(bias, 0, units)
    trace.normalised_together(units, groups)
    return spread(units, 1, out.shape)


def _layer_norm(trace: Trace, args: Args, kwargs: Kwargs, out: Tensor) -> Tensor:
    x, shape, weight, bias = bound(args, kwargs, "input normalized_shape weight bias")
    first = x.dim() - len(shape)
    for axis in range(first, x.dim()):
        units = trace.units.along(trace.tags(x), axis)
        if units is not None:
            units = trace.solid(units)
            trace.write(weight, axis - first, units)
            trace.write(bias, axis - first, units)
            trace.normalised_together(units)
            return spread(units, axis, out.shape)
    trace.refuse(f"normalises over {tuple(shape)}, none of which is an axis of hidden units")


def _prelu(trace: Trace, args: Args, kwargs: Kwargs, out: Tensor) -> Tensor:
    x, weight = bound(args, kwargs, "input weight")
    if weight.numel() == 1:
        return trace.elementwise([x, weight], out.shape)
    units = trace.channels(x, 1)
    trace.write(weight, 0, units)
    return spread(units, 1, out.shape)


def _softmax(trace: Trace, args: Args, kwargs: Kwargs, out: Tensor) -> Tensor:
    x, axis = bound(args, kwargs, "input dim")
    if axis is None:
        trace.refuse("is a softmax that names no axis")
    if trace.units.vary(trace.tags(x), axis):
        trace.normalised_together(trace.channels(x, axis))
    return trace.tags(x)


LAYERS: dict[str, Callable[[Trace, Args, Kwargs, Tensor], Tensor]] = {
    "linear": _linear,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "batch_norm": _norm_of_channels,
    "instance_norm": _norm_of_channels,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "prelu": _prelu,
    "softmax": _softmax,
    "log_softmax": _softmax,
}
