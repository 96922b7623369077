"""A workbench of a few examples and tasks on it, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from hybridfl import params as P
from hybridfl.data.augmentation import Augment
from hybridfl.local import Task, Workbench
from hybridfl.optimizers import LocalWork
from hybridfl.types import Job, Model

N = 11


def bench(net: nn.Module | None = None) -> Workbench:
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.standard_normal((N, 4))), torch.from_numpy(rng.integers(3, size=N))
    generator = torch.Generator().manual_seed(0)
    net = (net or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return Workbench(net, x, y, chunk=4)


def model_of(net: nn.Module) -> Model:
    return Model(P.clone(dict(net.named_parameters())), P.clone(dict(net.named_buffers())))


def task(
    bench: Workbench,
    work: LocalWork,
    round: int = 0,
    seed: int = 0,
    steps: int | None = None,
    augment: Augment | None = None,
    **job: Any,
) -> Task:
    """All examples of the bench but the first, in reverse."""
    rows = torch.arange(N - 1, 0, -1)
    start = job.pop("start", None) or model_of(bench.net)
    count = work.count(len(rows)) if steps is None else steps
    return Task(Job(0, start, steps=steps, **job), work, count, rows, round, round + 1, seed, (), augment)
