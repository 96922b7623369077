"""What a run costs: bytes between participants, multiply–accumulates, local steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hybridfl.kept import without
from hybridfl.params import nbytes, tensors
from hybridfl.types import Job, Result


@dataclass(frozen=True)
class Costs:
    """Cumulative counters of a run.

    Attributes:
        bytes_up, bytes_down: from clients to the server, and back; raw examples that move count too.
        bytes_peer: between clients.
        macs: multiply–accumulates of all local work and measurements: passes of the net, and maps such as the atlas's
            from coefficients to weights. Evaluation, optimisers and averages are left out.
        server_macs: the server's part of them.
        local_steps: optimiser steps of the clients.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    bytes_peer: int = 0
    macs: int = 0
    server_macs: int = 0
    local_steps: int = 0

    def plus(self, **more: int) -> Costs:
        return replace(self, **{name: getattr(self, name) + value for name, value in more.items()})


def sent(*jobs: Job, kept: Collection[str] = ()) -> int:
    """Bytes that a participant must be sent to start its jobs: what it does not hold, each tensor once.

    Args:
        kept: names of the start's tensors that every participant keeps to itself.
    """
    return nbytes(tensors([_needed(job, kept) for job in jobs]))


def _needed(job: Job, kept: Collection[str]) -> list[Any]:
    start = [] if job.source is None else [without(job.start, kept)]
    named = {**job.frozen, **job.ctx, "optimizer_state": job.optimizer_state}
    return [*start, *(value for name, value in named.items() if name not in job.held)]


def returned(job: Job, result: Result, kept: Collection[str] = ()) -> int:
    """Bytes that come back: the trained model unless the job was a measurement, statistics, optimiser state.

    Args:
        kept: names of the model's tensors that the participant keeps to itself.
    """
    if job.returns == "nothing":
        return 0
    if job.returns == "probes":
        return nbytes(tensors([result.probes]))
    if not (job.is_measurement or result.probes or result.optimizer_state):
        # The same, quickly: a trained model names no tensor twice.
        if result.deferred and not kept:
            return result.deferred.stack.nbytes
        return sum(tensor.nbytes for part in result.model for name, tensor in part.items() if name not in kept)
    model = [] if job.is_measurement else [without(result.model, kept)]
    state = None if "optimizer_state" in job.held else result.optimizer_state
    return nbytes(tensors([*model, result.probes, state]))


class FlopCounter(TorchDispatchMode):
    """Floating-point operations by torch's own formulas; one multiply–accumulate is two.

    ``torch.utils.flop_counter.FlopCounterMode`` counts the same, but its bookkeeping by module imports the compiler,
    which costs 2 s at the start of every run.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would otherwise import the compiler, only to tell it to keep out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            with self:
                inner = func.decompose(*args, **kwargs)
            if inner is not NotImplemented:
                return inner
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
        return out


def forward_macs(net: nn.Module, examples: Tensor) -> int:
    """Multiply–accumulates of one example's forward pass through the net.

    Args:
        examples: ``(b, …)``, for their shape, at least two: BatchNorm without running statistics refuses a single one.
    """
    net.eval()
    # With gradients, and attention written out: fused kernels of attention have no formula on a CPU.
    params = {name: tensor.detach().requires_grad_() for name, tensor in net.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), FlopCounter() as counter:
        torch.func.functional_call(net, {**params, **dict(net.named_buffers())}, (torch.zeros_like(examples),))
    macs: int = counter.flops // 2 // len(examples)
    return macs
