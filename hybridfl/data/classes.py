"""A data set with part of its classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hybridfl.data.dataset import Dataset, Examples
from hybridfl.errors import ConfigError

RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


def only_classes(dataset: Dataset, chosen: Sequence[int] | str) -> Dataset:
    """The data set's examples of the chosen classes, which become 0, 1, … in the order of their numbers.

    Args:
        chosen: class numbers, or ranges of them with both ends included, such as ``"0-4,7"``.

    Raises:
        ConfigError: under the key ``classes``: no such class, fewer than two, or a text of another form.
    """
    wanted = sorted(set(_numbers(chosen) if isinstance(chosen, str) else chosen))
    wrong = [label for label in wanted if not 0 <= label < dataset.classes]
    if wrong:
        raise ConfigError("classes", f"got {wrong[0]}: the classes of {dataset.name} are 0 to {dataset.classes - 1}.")
    if len(wanted) < 2:
        given = f"'{chosen}'" if isinstance(chosen, str) else list(chosen)
        raise ConfigError("classes", f"got {given}: expected two classes or more.")
    number = np.full(dataset.classes, -1)
    number[wanted] = np.arange(len(wanted))

    def kept(part: Examples) -> Examples:
        inside = part.at(number[part.y] >= 0)
        return replace(inside, y=number[inside.y])

    return replace(dataset, train=kept(dataset.train), test=kept(dataset.test), classes=len(wanted))


def _numbers(text: str) -> list[int]:
    compact = text.replace(" ", "")
    if not RANGES.fullmatch(compact):
        raise ConfigError("classes", f"got '{text}': expected ranges such as 50-99 or 0-4,7, or a list such as [0, 3].")
    numbers: list[int] = []
    for part in compact.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise ConfigError("classes", f"got '{text}': {part} goes down; nearest valid value: {last}-{first}.")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
