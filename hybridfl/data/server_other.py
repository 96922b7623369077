"""Server data that the clients do not have: examples of another data set, in the form of the clients' images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from hybridfl.data.conversion import Form, converted
from hybridfl.data.dataset import Dataset, Examples, IntArray, Reader
from hybridfl.data.server_data import Amount, Load, ServerShare
from hybridfl.errors import ConfigError


@dataclass(frozen=True)
class OtherDataset(Amount):
    """Training examples of another data set; the clients keep all of theirs.

    Public data beside private ones, as in Lin, Kong, Stich, Jaggi 2020 (FedDF), arXiv 2006.07242, section 4: CIFAR-100
    for clients with CIFAR-10. Images get the size, channels, range and type of the clients', and are standardised as
    theirs are. Two different sets may still share examples, such as a set and its first thousand: nobody looks.

    Args:
        dataset: the other set, a node of the group ``dataset``.
        labels: ``task``: its labels are those of the clients' task, number by number; ``own``: they are another task's;
            ``none``: the server does not know them.
        invert: take the negative, such as of black on white for clients with white on black.

    Other options as in :class:`~hybridfl.data.server_data.Amount`; ``classes`` and ``fraction`` are of the other set.
    """

    labels_by: ClassVar[str] = "server_data.labels=task"

    dataset: Reader = field(kw_only=True)
    labels: Literal["task", "own", "none"] = "task"
    invert: bool = False

    @property
    def provides(self) -> frozenset[str]:
        """As :class:`~hybridfl.data.server_data.ServerData` says."""
        known = {"task": {"server_labels"}, "own": {"server_own_labels"}, "none": set[str]()}
        return frozenset({"server_data", *known[self.labels]})

    def share(self, dataset: Dataset, free: IntArray, load: Load, rng: np.random.Generator) -> ServerShare:
        """As :class:`~hybridfl.data.server_data.ServerData` says."""
        other = load("dataset")
        if other.fingerprint == dataset.fingerprint:
            problem = f"got {other.name}, which the clients have; name another, or use server_data=share"
            raise ConfigError("dataset", f"{problem}.")
        if self.labels == "task" and max(self.chosen(other.classes)) >= dataset.classes:
            problem = f"got task: {other.name} has {other.classes} classes and the clients' task {dataset.classes}"
            way_out = f"use own or none, or choose server_data.classes from 0 to {dataset.classes - 1}"
            raise ConfigError("labels", f"{problem}; {way_out}.")
        taken = self.draw(other.train.y, other.classes, rng, f" of {other.name}")
        own = self._converted(other, other.train.at(taken), Form.of(dataset))
        return ServerShare(own=own, domains=other.domains, sources=(other.fingerprint,))

    def _converted(self, other: Dataset, examples: Examples, form: Form) -> Examples:
        try:
            return converted(other, examples, form, self.invert)
        except ConfigError as error:
            raise error.under("dataset") from error
