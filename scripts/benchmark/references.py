"""Plain torch on the same examples: the loop that everybody writes, and the limits.

Those are one model trained on as many batches as the cohort has, without copies and means.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmark.workloads import BATCH, LR, MEAN, STD, Conv, Workload, images


@dataclass(frozen=True)
class Given:
    """What is trained: for the references here, and for programs of the user's.

    Attributes:
        x: ``(N, channels, rows, columns)`` standardised images. y: ``(N,)`` labels.
        clients: positions of each client's examples.
        cohorts: ``(rounds, per_round)``, who works when.
        net: with the weights of round 0.
    """

    x: Tensor
    y: Tensor
    clients: list[np.ndarray]
    cohorts: np.ndarray
    net: nn.Module

    @classmethod
    def read(cls, file: Path, workload: Workload) -> Given:
        x, y = images(workload.train, workload.test, workload.shape)
        device = torch.device(workload.device)
        scaled = torch.from_numpy(x[: workload.train]).to(torch.float32).sub_(MEAN).div_(STD).to(device)
        found = np.load(file)
        clients = np.split(found["rows"], np.cumsum(found["sizes"])[:-1])
        net = untrained(workload)
        with torch.no_grad():
            for i, tensor in enumerate(net.parameters()):
                tensor.copy_(torch.from_numpy(found[f"start {i}"]))
        labels = torch.from_numpy(y[: workload.train]).to(device)
        return cls(scaled, labels, clients, found["cohorts"], net.to(device))


def untrained(workload: Workload) -> nn.Module:
    """The workload's net, its parameters in the order in which hybridfl has them."""
    if workload.net == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    if workload.net == "resnet18":
        from hybridfl.models.resnet import ResNet

        return ResNet(workload.shape, 10, channels=(64, 128, 256, 512), blocks=(2, 2, 2, 2), groups=32, shortcut="B")
    return Conv(workload.shape, 10)


class Reference:
    """Rounds of plain torch.

    Attributes:
        order: the shuffle of a client's ``n`` examples in a round.
    """

    def __init__(self, given: Given) -> None:
        self.given, self.net = given, copy.deepcopy(given.net)
        rng = np.random.default_rng(1)
        self.order: Callable[[int, int, int], np.ndarray] = lambda number, client, n: rng.permutation(n)

    def round(self, number: int) -> None:
        raise NotImplementedError

    def batches(self, number: int, client: int) -> Sequence[Tensor]:
        """Positions of an epoch's batches, the last one short."""
        rows = self.given.clients[client]
        order = torch.from_numpy(rows[self.order(number, client, len(rows))]).to(self.given.x.device)
        parts: Sequence[Tensor] = order.split(BATCH)
        return parts

    def train(self, net: nn.Module, batches: Sequence[Tensor]) -> None:
        """Stochastic gradient descent without an optimiser object, which would cost a small net half as much again."""
        params = list(net.parameters())
        for rows in batches:
            loss = F.cross_entropy(net(self.given.x[rows]), self.given.y[rows])
            grads = torch.autograd.grad(loss, params)
            with torch.no_grad():
                for tensor, grad in zip(params, grads, strict=True):
                    tensor.sub_(grad, alpha=LR)

    def weights(self) -> list[Tensor]:
        """Copies of the net's tensors."""
        return [tensor.detach().clone() for tensor in self.net.parameters()]


class Plain(Reference):
    """Federated averaging as a plain loop: load the weights into a net, train it on a client, add it to the mean."""

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.local = copy.deepcopy(given.net)

    def round(self, number: int) -> None:
        cohort = self.given.cohorts[number].tolist()
        total = sum(len(self.given.clients[client]) for client in cohort)
        mean = [torch.zeros_like(tensor) for tensor in self.net.parameters()]
        for client in cohort:
            with torch.no_grad():
                for ours, theirs in zip(self.local.parameters(), self.net.parameters(), strict=True):
                    ours.copy_(theirs)
            self.train(self.local, self.batches(number, client))
            share = len(self.given.clients[client]) / total
            for merged, tensor in zip(mean, self.local.parameters(), strict=True):
                merged.add_(tensor.detach(), alpha=share)
        with torch.no_grad():
            for tensor, merged in zip(self.net.parameters(), mean, strict=True):
                tensor.copy_(merged)


class Central(Reference):
    """One model on all batches of the cohort: what is left of a round without copies and means."""

    def round(self, number: int) -> None:
        for client in self.given.cohorts[number].tolist():
            self.train(self.net, self.batches(number, client))


class ChannelsLast(Central):
    """The same with channels last, in which a CPU convolves fastest."""

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.net = self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class ByHand(Reference):
    """The perceptron's step written out: no autograd, no optimiser, every product into memory that is there already."""

    def __init__(self, given: Given) -> None:
        super().__init__(given)
        self.w1, self.b1, self.w2, self.b2 = (tensor.detach() for tensor in self.net.parameters())
        self.x = given.x.flatten(1)
        hidden, classes, inputs = len(self.b1), len(self.b2), self.x.shape[1]
        self.buffers = [self.x.new_empty(BATCH, size) for size in (inputs, hidden, classes, hidden)]
        self.labels = given.y.new_empty(BATCH)
        self.minus_one = self.x.new_full((BATCH, 1), -1.0)

    def round(self, number: int) -> None:
        with torch.inference_mode():
            for client in self.given.cohorts[number].tolist():
                for rows in self.batches(number, client):
                    self.step(rows)

    def step(self, rows: Any) -> None:
        n, w1, b1, w2, b2 = len(rows), self.w1, self.b1, self.w2, self.b2
        x, hidden, logits, back = (buffer[:n] for buffer in self.buffers)
        torch.index_select(self.x, 0, rows, out=x)
        y = torch.index_select(self.given.y, 0, rows, out=self.labels[:n])
        torch.addmm(b1, x, w1.t(), out=hidden).relu_()
        torch.addmm(b2, hidden, w2.t(), out=logits)
        # The gradient of the mean cross-entropy is softmax - one-hot, over n.
        torch.softmax(logits, 1, out=logits).scatter_add_(1, y.unsqueeze(1), self.minus_one[:n])
        torch.mm(logits, w2, out=back).mul_(hidden > 0)
        rate = -LR / n
        w2.addmm_(logits.t(), hidden, alpha=rate)
        b2.add_(logits.sum(0), alpha=rate)
        w1.addmm_(back.t(), x, alpha=rate)
        b1.add_(back.sum(0), alpha=rate)


REFERENCES: dict[str, type[Reference]] = {
    "plain": Plain,
    "central": Central,
    "channels_last": ChannelsLast,
    "by_hand": ByHand,
}
