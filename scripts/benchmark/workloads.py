"""What is trained: the images, the clients and the nets of all contenders, as nodes for a run of hybridfl."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

LR, BATCH = 0.05, 32
MEAN, STD = 127.0, 58.0


@dataclass(frozen=True)
class Workload:
    """Attributes:
    net: a config node.
    partitioning: overrides.
    clients, per_round: of all, and in a round.
    together: rounds that are timed as one, where one is too short.
    train, test: numbers of images.
    shape: of an image.
    device: where all contenders work.
    """

    name: str
    net: str
    partitioning: tuple[str, ...]
    clients: int
    per_round: int
    together: int
    train: int = 60_000
    test: int = 10_000
    shape: tuple[int, int, int] = (1, 28, 28)
    device: str = "cpu"

    def line(self, rounds: int) -> list[str]:
        """Overrides of a run."""
        return [
            "baseline=fedavg",
            "~dataset",
            f"+dataset={{_target_:benchmark.workloads.Images,train:{self.train},test:{self.test},shape:{list(self.shape)}}}",
            *self.partitioning,
            "server_data=none",
            f"clients.number={self.clients}",
            f"clients.per_round={self.per_round}",
            *NETS.get(self.net, ("~model", f"+model={{_target_:{self.net}}}")),
            f"client_optimizer.lr={LR}",
            f"client_optimizer.batch_size={BATCH}",
            "client_optimizer.epochs=1",
            f"rounds={rounds}",
            f"device={self.device}",
            "ui=none",
        ]

    def small(self) -> Workload:
        """The same at a toy size."""
        clients = {100: 8, 1000: 20, 10_000: 100}[self.clients]
        return replace(self, clients=clients, per_round=4, together=1, train=1200, test=200)


CONV = "benchmark.workloads.Conv"
NETS = {"mlp": ("model.hidden=[64]",), "resnet18": ("model=resnet18",)}
SKEWED = ("partitioning=dirichlet", "partitioning.alpha=0.3", "partitioning.min_examples=20")
SHARED = ("~partitioning", "+partitioning={_target_:benchmark.workloads.WithReplacement,size:60}")
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", CONV, SKEWED, clients=100, per_round=10, together=1),
        Workload("W2", "mlp", SKEWED, clients=100, per_round=10, together=4),
        Workload("W3", "mlp", ("partitioning=iid",), clients=1000, per_round=100, together=3),
        Workload("W4", "mlp", SHARED, clients=10_000, per_round=100, together=3),
        Workload("W5", "resnet18", SKEWED, 100, 10, 1, train=50_000, shape=(3, 32, 32)),
    )
}
FOR_CPUS = ("W1", "W2", "W3", "W4")


def images(train: int, test: int, shape: Sequence[int] = (1, 28, 28)) -> tuple[np.ndarray, np.ndarray]:
    """Images of ten classes ``(train + test, *shape)`` uint8, and labels of which a fifth are random.

    Without those the loss would vanish within a few rounds, and arithmetic on nearly nothing has a speed of its own.
    """
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, train + test)
    prototypes = rng.integers(0, 64, (10, *shape), dtype=np.uint8)
    x = rng.integers(0, 192, (len(y), *shape), dtype=np.uint8)
    for label in range(10):
        x[y == label] += prototypes[label]
    noisy = rng.random(len(y)) < 0.2
    y[noisy] = rng.integers(0, 10, noisy.sum())
    return x, y


@dataclass(frozen=True)
class Images:
    """:func:`images` as a config node of the group ``dataset``."""

    seconds: ClassVar[float] = 0.0

    train: int = 60_000
    test: int = 10_000
    shape: tuple[int, ...] = (1, 28, 28)

    def load(self, root: Path) -> Any:
        from hybridfl.data.dataset import Dataset, Examples

        began = time.perf_counter()
        x, y = images(self.train, self.test, self.shape)
        train, test = Examples(x[: self.train], y[: self.train]), Examples(x[self.train :], y[self.train :])
        Images.seconds = time.perf_counter() - began
        channels = self.shape[0]
        return Dataset("bench", train, test, 10, (MEAN,) * channels, (STD,) * channels)


@dataclass(frozen=True)
class WithReplacement:
    """A partitioning in which every client draws ``size`` of all examples with replacement."""

    size: int = 60
    seed: int | None = None

    def split(self, labels: Any, clients: int, rng: np.random.Generator) -> Any:
        from hybridfl.data.partitioning import Partition

        shares = [np.sort(rng.integers(0, len(labels), self.size)) for _ in range(clients)]
        return Partition(shares, complete=False, shared=True)


class Conv(nn.Sequential):
    """Two stages of 3 × 3 convolution, ReLU and pooling, then a dense layer of 64; logits ``(b, classes)``."""

    def __init__(self, input_shape: tuple[int, ...], classes: int) -> None:
        channels, rows, columns = input_shape
        first = nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        second = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        dense = nn.Linear(32 * (rows // 4) * (columns // 4), 64)
        super().__init__(*first, *second, nn.Flatten(), dense, nn.ReLU(), nn.Linear(64, classes))
