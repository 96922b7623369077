"""Ways to convolve for many clients at once: a step of all of them forward and backward, without the optimiser."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmark.references import untrained
from benchmark.workloads import BATCH, Workload
from hybridfl.executors.grouped import Grouped, OfChannels, grouped
from hybridfl.local import laid_out
from hybridfl.params import Params
from hybridfl.stateless import run_net

ALONE = "alone"


class Convolutions:
    """The net of a workload with weights of its own, and a batch, for every client of a round.

    Attributes:
        params: ``(clients, …)``. x: ``(clients, b, channels, rows, columns)``. upstream: the gradient of the logits.
        ways: gradients as ``params``. ``alone`` is one client after the other with channels last; ``grouped`` one net with
            the channels of all, as in :mod:`hybridfl.executors.grouped`; ``vmap`` the net under ``torch.func.vmap``;
            ``unfold`` matrix products of every client's patches.
    """

    def __init__(self, workload: Workload) -> None:
        self.net = untrained(workload)
        layers = grouped(self.net)
        assert layers is not None
        rng = torch.Generator().manual_seed(0)
        clients, device = workload.per_round, torch.device(workload.device)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng).to(device)

        start = {name: tensor.detach().to(device) for name, tensor in self.net.named_parameters()}
        self.params = {name: tensor + 0.01 * drawn(clients, *tensor.shape) for name, tensor in start.items()}
        self.x, self.upstream = drawn(clients, BATCH, *workload.shape), drawn(clients, BATCH, 10)
        self.ways: dict[str, Callable[[], Params]] = {
            ALONE: self.alone,
            "grouped": lambda: self.together(layers.forward),
            "vmap": lambda: self.together(torch.func.vmap(lambda params, x: run_net(self.net, params, {}, x))),
            "unfold": lambda: self.together(lambda params, x: unfolded(layers, params, x)),
        }

    def alone(self) -> Params:
        found = []
        for k, x in enumerate(self.x):
            own = {name: laid_out(stack[k].clone()).requires_grad_() for name, stack in self.params.items()}
            found.append(gradients(run_net(self.net, own, {}, laid_out(x)), own, self.upstream[k]))
        return {name: torch.stack([one[name] for one in found]) for name in self.params}

    def together(self, forward: Callable[[Params, Tensor], Tensor]) -> Params:
        leaves = {name: stack.clone().requires_grad_() for name, stack in self.params.items()}
        return gradients(forward(leaves, self.x), leaves, self.upstream)

    def timed(self, number: int) -> dict[str, float]:
        """Seconds of each way, the one that begins in turn."""
        names = list(self.ways)
        turn, found = number % len(names), {}
        for name in [*names[turn:], *names[:turn]]:
            began = time.perf_counter()
            self.ways[name]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            found[name] = time.perf_counter() - began
        return found


def gradients(logits: Tensor, leaves: Mapping[str, Tensor], upstream: Tensor) -> Params:
    found = torch.autograd.grad(logits, list(leaves.values()), upstream)
    return dict(zip(leaves, found, strict=True))


def unfolded(layers: Grouped, params: Params, x: Tensor) -> Tensor:
    """Logits ``(clients, b, classes)``; every convolution a product of weights with all patches of the images."""
    clients, batch = x.shape[:2]
    first_dense = next(i for i, layer in enumerate(layers.layers) if not _on_images(layer))
    images = x.flatten(0, 1)
    for layer in layers.layers[:first_dense]:
        if not isinstance(layer, OfChannels):
            images = layer.function(images)  # type: ignore[union-attr]
        elif not isinstance(layer.module, nn.Conv2d):
            images = layer.module(images)
        else:
            weight, bias = params[f"{layer.name}.weight"], params[f"{layer.name}.bias"]
            patches = F.unfold(images, weight.shape[-2:], padding=layer.module.padding)  # type: ignore[arg-type]
            out = torch.matmul(weight.flatten(2).unsqueeze(1), patches.unflatten(0, (clients, batch)))
            images = (out + bias[:, None, :, None]).view(clients * batch, weight.shape[1], *images.shape[2:])
    # From there on all ways are the same.
    rows = images.view(clients, batch, -1, 1, 1)
    return Grouped(layers.layers[first_dense:]).forward(params, rows)


def _on_images(layer: object) -> bool:
    return isinstance(layer, OfChannels) or hasattr(layer, "function")
