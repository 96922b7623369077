"""Small data sets for a server's examples, and draws of who owns what."""

from __future__ import annotations

from typing import Any

import numpy as np
from partition_helpers import unread

from hybridfl.data.dataset import Dataset, Examples
from hybridfl.data.partitioning import IID
from hybridfl.data.split import Drawn, draw_split
from hybridfl.tasks import Tasks

OTHER = (
    "server_data=dataset",
    "dataset@server_data.dataset=synthetic",
    "server_data.dataset.shape=[1,4,4]",
    "server_data.dataset.train=60",
    "server_data.dataset.classes=5",
    "server_data.dataset.seed=1",
    "server_data.examples=20",
)
"""Of five classes, for the tiny federation of three."""


def images(number: int, shape: tuple[int, ...], seed: int = 0, white: float = 255, dtype: str = "uint8") -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, int(white) + 1, (number, *shape))
    return values.astype(dtype)


def dataset(
    name: str = "theirs",
    number: int = 60,
    classes: int = 3,
    shape: tuple[int, ...] = (1, 4, 4),
    white: float | None = 255.0,
    dtype: str = "uint8",
    domains: tuple[str, ...] = (),
    seed: int = 0,
) -> Dataset:
    """Random images; classes in turn, domains in blocks."""

    def part(number: int, seed: int) -> Examples:
        x = images(number, shape, seed, white or 255, dtype)
        domain = np.arange(number) * max(1, len(domains)) // number
        return Examples(x, np.arange(number) % classes, domain)

    channels = shape[0]
    parts = part(number, seed), part(number // 2, seed + 1)
    return Dataset(name, *parts, classes, (0.0,) * channels, (1.0,) * channels, domains, white)


def draw(data: Dataset, server_data: Any, other: Dataset | None = None, **changes: Any) -> Drawn:
    options: dict[str, Any] = {"partitioning": IID(), "clients": 4, "client_validation": 0.0, "min_test": 1, "seed": 0}
    return draw_split(
        data,
        server_data=server_data,
        **{**options, **changes},
        load=unread if other is None else of(other),
        tasks=Tasks().stream(data.classes, 1, 0),
    )


def of(other: Dataset) -> Any:
    """Reads the other data set, under the option that holds it."""

    def load(option: str) -> Dataset:
        assert option == "dataset"
        return other

    return load


def servers(drawn: Drawn) -> np.ndarray:
    return np.concatenate([drawn.split.server_train, drawn.split.server_val])


def clients(drawn: Drawn) -> np.ndarray:
    return np.concatenate([*drawn.split.clients_train, *drawn.split.clients_val])
