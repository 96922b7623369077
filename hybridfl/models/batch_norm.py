"""BatchNorm in federations: which tensors are its own, and what running statistics to use.

Running statistics are averages over the examples of whoever trained, so models of clients with other classes disagree
about them, and those of a merged net are those of none (Hsieh et al. 2020, arXiv 1910.00189).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hybridfl import params as P
from hybridfl.errors import ConfigError
from hybridfl.models.options import BatchNormPolicy
from hybridfl.params import Params
from hybridfl.types import Model

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def with_policy(net: nn.Module, policy: BatchNormPolicy) -> nn.Module:
    """A copy of the net whose BatchNorm layers do in training and evaluation what the policy says of the forward pass.

    ``batch``: they have no running statistics, and use those of the batch in evaluation too. ``frozen``: they use their
    running statistics in training too and leave them as they are; scale and shift are trained. Other policies change
    nothing in the net, which is returned itself.

    Raises:
        ConfigError: key ``model.batch_norm``: the net has no BatchNorm layers, or none with the statistics it needs.
    """
    if policy == "average":
        return net
    layers = _layers(net)
    if not layers:
        problem = f"got {policy}: the net has no BatchNorm layers; nearest valid choice: average"
        raise ConfigError("model.batch_norm", f"{problem} (or model.norm=batch, if the model has that option).")
    if policy in ("frozen", "reestimate") and not any(_tracks(layer) for layer in layers.values()):
        problem = f"got {policy}: the BatchNorm layers of the net have no running statistics"
        raise ConfigError("model.batch_norm", f"{problem}; nearest valid choice: average.")
    if policy not in ("batch", "frozen"):
        return net
    net = copy.deepcopy(net)
    for layer in _layers(net).values():
        if policy == "batch":
            layer.track_running_stats = False
            for name in STATISTICS:
                setattr(layer, name, None)
        else:
            # At each pass: whoever runs the net puts all of it into training mode before.
            layer.register_forward_pre_hook(_evaluate)
    return net


def _evaluate(layer: nn.Module, inputs: Any) -> None:
    layer.training = False


def names(net: nn.Module) -> frozenset[str]:
    """Full names of all parameters and buffers of BatchNorm layers: what a client keeps in FedBN."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in _layers(net).items()
        for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    )


def has_statistics(net: nn.Module) -> bool:
    """Whether there are running statistics of BatchNorm layers in the net."""
    return any(map(_tracks, _layers(net).values()))


def reestimated(
    net: nn.Module, model: Model, batches: Iterable[Tensor], run: Callable[[Params, Tensor], object] | None = None
) -> Model:
    """The model with the running statistics that its parameters have on these batches.

    They are the plain averages over the batches of each batch's mean and unbiased variance, whatever was there before;
    so batches should be of one size. The layers before a BatchNorm layer are normalised by the batch meanwhile, as in
    training; everything else, such as dropout, is in evaluation mode.

    Args:
        net: a template; its own tensors are neither read nor changed.
        model: parameters (shared with the result, not copied) and buffers.
        batches: inputs ``(b, …)``, at least one batch.
        run: ``run(tensors, x)`` is a pass of this net with these parameters and buffers; ``None`` makes one that nobody
            counts.

    Raises:
        ValueError: there are no batches.
    """
    layers = {prefix: layer for prefix, layer in _layers(net).items() if _tracks(layer)}
    buffers = P.clone(model.buffers)
    for prefix in layers:
        for name in STATISTICS:  # of the averages, the first batch overwrites whatever is there
            buffers[f"{prefix}.{name}" if prefix else name].zero_()
    momenta = [layer.momentum for layer in layers.values()]
    run = run or (lambda tensors, x: torch.func.functional_call(net, tensors, (x,)))
    net.eval()
    seen = 0
    try:
        for layer in layers.values():
            layer.train()
            layer.momentum = None  # a cumulative average
        with torch.no_grad():
            for x in batches:
                run({**model.params, **buffers}, x)
                seen += 1
    finally:
        for layer, momentum in zip(layers.values(), momenta, strict=True):
            layer.momentum = momentum
        net.eval()
    if not seen:
        raise ValueError("no batches to estimate statistics on")
    return Model(model.params, buffers)


def _layers(net: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in net.named_modules() if isinstance(module, _BatchNorm)}


def _tracks(layer: _BatchNorm) -> bool:
    return layer.running_mean is not None
