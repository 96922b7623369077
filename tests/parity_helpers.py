"""Runs of every method and of every kind of work, their last numbers, and how far two of them are apart."""

from __future__ import annotations

import functools
import math
from typing import Any

import helpers
import torch

from hybridfl.checkpoints import pack
from hybridfl.config import choices
from hybridfl.executors import Executor
from hybridfl.executors.sequential import Sequential
from hybridfl.experiment import packed
from hybridfl.snapshot import Snapshot

TWICE = {"none", *choices("merging")}  # a baseline that has the name of a merging method is that one
METHODS = [f"merging={name}" for name in choices("merging")]
METHODS += [f"baseline={name}" for name in choices("baseline") if name not in TWICE]

IMAGES = "dataset.shape=[1,8,8]"
RESNET = ("model=resnet20", "model.channels=[4,8]", "model.blocks=[1,1]", IMAGES)
VIT = ("model=vit", "model.dim=8", "model.depth=1", "model.heads=2", IMAGES)
WORK: dict[str, tuple[str, ...]] = {
    "momentum": (
        "client_optimizer.momentum=0.9",
        "client_optimizer.weight_decay=0.01",
        "client_optimizer.clip_norm=0.5",
    ),
    "nesterov": ("client_optimizer.momentum=0.9", "client_optimizer.nesterov=true", "client_optimizer.steps=7"),
    "adam": ("client_optimizer=adam", "client_optimizer.weight_decay=0.01", "client_optimizer.schedule.kind=cosine"),
    "adamw": ("client_optimizer=adamw", "client_optimizer.weight_decay=0.01", "client_optimizer.schedule.warmup=1"),
    "nadam": ("client_optimizer=nadam", "client_optimizer.lr_decay=0.9", "+client_optimizer.lr_factors={head*:0.5}"),
    "cnn": ("model=cnn", "model.channels=[4,8]", "model.hidden=8", IMAGES),
    "dropout": (*VIT, "model.dropout=0.1"),
    "batch norm": (*RESNET, "model.norm=batch"),
    "batch norm of each client": (*RESNET, "model.norm=batch", "model.batch_norm=local"),
    "frozen batch norm": (*RESNET, "model.norm=batch", "model.batch_norm=frozen"),
    "crop and flip": ("augmentation=standard", "augmentation.crop=1"),
    "mixup": ("augmentation=mixup", *RESNET),
    "single precision": (*RESNET, "dtype=float32", "augmentation=standard", "client_optimizer.momentum=0.9"),
    "late": ("baseline=fedbuff", "clients.delay=1.5", "clients.dropout=0.2"),
    "event queue": ("baseline=fedbuff", "clients=event_queue", "clients.number=5", "clients.concurrency=3"),
    "hostile": ("clients=hostile", "clients.number=5", "clients.per_round=5"),
    "uneven": ("partitioning.alpha=0.1", "clients.per_round=5", "client_optimizer.batch_size=16"),
    "tasks": ("merging=lorm", "tasks.number=3", *VIT),
    "feddle on images": ("merging=feddle", *RESNET, "merging.search.steps=3"),
    "feddle's extensions": (
        "merging=feddle_joint",
        "merging.ema=0.9",
        "merging.origin_drop=2",
        "merging.server_axis.examples=halves",
        "merging.atlas.storage=bfloat16",
        "merging.mix_weight=agreement",
        "merging.residual.max_ratio=0.5",
        "clients.delay=1.5",
    ),
    "widths": ("merging=split_mix", "clients=tiers", "clients.number=5", "clients.per_round=4"),
    "narrow nets": ("baseline=slimmable_heterofl", "clients=tiers", "clients.number=5", "clients.per_round=4"),
    "start alone": ("baseline=local_only", "start=solo", "start_steps=5"),
}
LINES = {line.partition("=")[2]: (line, "rounds=2", "client_optimizer.epochs=1") for line in METHODS}
LINES |= {
    name: line if line[0].startswith(("merging=", "baseline=")) else ("baseline=fedavg", *line)
    for name, line in WORK.items()
}


plan = functools.cache(helpers.plan)


def end(line: tuple[str, ...], executor: Executor | None = None) -> Any:
    """All of the last snapshot but the time it took."""
    engine = helpers.engine_of(plan(*line))
    engine.executor = executor or Sequential()
    last: Snapshot = helpers.snapshots(engine)[-1]
    assert last.round == engine.rounds
    return pack(packed(last) | {"seconds": 0.0})


reference = functools.cache(end)


def difference(a: Any, b: Any) -> float:
    """The largest of any two numbers in containers of the same form."""
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        return (
            float((a - b).abs().max())
            if a.is_floating_point() and a.numel()
            else 0.0
            if torch.equal(a, b)
            else math.inf
        )
    if isinstance(a, dict):
        assert list(a) == list(b)
        return max((difference(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        return max((difference(*pair) for pair in zip(a, b, strict=True)), default=0.0)
    assert type(a) is type(b)
    if isinstance(a, float):
        return 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b)
    return 0.0 if a == b else math.inf
