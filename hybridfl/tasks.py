"""Class-incremental streams of tasks: the classes come in groups, one after the other.

As in van de Ven, Tuytelaars, Tolias 2022 (class-incremental learning), Nature Machine Intelligence 4; for federations Dong
et al. 2022, arXiv 2203.11473. One task is the ordinary run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hybridfl.build import PositiveInt
from hybridfl.errors import ConfigError
from hybridfl.rng import stream

Which = int | Literal["current", "seen", "all"]
"""A task by its number, the one of the round, all up to it, or all of the stream."""


@dataclass(frozen=True)
class Tasks:
    """How the classes are dealt out to tasks.

    Attributes:
        number: of tasks; the rounds are shared out equally among them.
        order: of the classes: ``natural``, as they are numbered, or ``shuffled`` by the run's seed.
        mask: whether losses see only the logits of the classes that the job's examples can have.
    """

    number: PositiveInt = 1
    order: Literal["natural", "shuffled"] = "natural"
    mask: bool = True

    def stream(self, classes: int, rounds: int, seed: int) -> TaskStream:
        """The stream over ``classes`` classes.

        Raises:
            ConfigError: there are more tasks than classes or rounds.
        """
        for most, what in ((classes, "classes"), (rounds, "rounds")):
            if self.number > most:
                raise ConfigError("tasks.number", f"got {self.number}: there are {most} {what}; nearest: {most}.")
        order = np.arange(classes)
        if self.order == "shuffled":
            order = stream(seed, "tasks").permutation(classes)
        groups = tuple(tuple(sorted(group.tolist())) for group in np.array_split(order, self.number))
        return TaskStream(groups, rounds, self.mask)


@dataclass(frozen=True)
class TaskStream:
    """Which task is on when.

    Attributes:
        classes: of each task; disjoint, and together all.
        rounds: of the whole run.
        mask: as in :class:`Tasks`.
    """

    classes: tuple[tuple[int, ...], ...]
    rounds: int
    mask: bool = True

    def __len__(self) -> int:
        return len(self.classes)

    def at(self, round: int) -> int:
        """The task of a round; the last one for rounds after the last."""
        return min(round * len(self) // self.rounds, len(self) - 1)

    def begins(self, round: int) -> bool:
        """Whether the round is the first of its task."""
        return round == 0 or self.at(round - 1) < self.at(round)

    def ends(self, round: int) -> bool:
        """Whether the round is the last of its task."""
        return round + 1 >= self.rounds or self.at(round + 1) > self.at(round)

    def labels(self, which: Which, round: int) -> tuple[int, ...] | None:
        """Classes of the task or tasks, as seen from a round; ``None`` if there is only one task.

        Raises:
            ValueError: there is no task of that number.
        """
        if len(self) == 1:
            return None
        if isinstance(which, int):
            if not 0 <= which < len(self):
                raise ValueError(f"there is no task {which}: they are 0 to {len(self) - 1}")
            return self.classes[which]
        now = self.at(round)
        chosen = {"current": self.classes[now : now + 1], "seen": self.classes[: now + 1], "all": self.classes}[which]
        return tuple(sorted(label for group in chosen for label in group))
