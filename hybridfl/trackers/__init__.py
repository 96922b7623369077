"""Trackers show a run's numbers in another program while it works. They decide nothing: ``metrics.csv`` is the record."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from hybridfl.errors import ConfigError

Ending = Literal["done", "interrupted", "failed"]


@dataclass(frozen=True)
class Tracked:
    """A run as a tracker sees it.

    Attributes:
        folder: of the run; its name is the same whenever the run is continued, and no other attempt has it.
        config: what its ``config.yaml`` holds.
    """

    folder: Path
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def title(self) -> str:
        """For people: the method, the seed and the run."""
        method = self.config.get("method") or {}
        return f"{method.get('name', 'run')} seed {self.config.get('seed', '?')} {self.name}"

    @property
    def output_dir(self) -> Path:
        return self.folder.parent.parent


class Session(Protocol):
    """A run under way in a tracker.

    Attributes:
        last: the last round that the tracker holds already, 0 for none; only later ones are given to ``log``.
    """

    @property
    def last(self) -> int: ...

    def log(self, round: int, values: Mapping[str, float]) -> None:
        """The numbers of a round, see :func:`hybridfl.tracking.named`."""
        ...

    def close(self, ending: Ending) -> None:
        """The run has ended, or was stopped and may be continued."""
        ...


class Tracker(Protocol):
    """A config node of the group ``tracker``."""

    def check(self) -> None:
        """Raises ConfigError if it cannot work here, such as for want of its package."""
        ...

    def open(self, run: Tracked) -> Session:
        """Begin a run, or continue the one of this name."""
        ...


def needed(module: str, extra: str) -> Any:
    """A module of an extra of this package.

    Raises:
        ConfigError: it is not installed, or broken.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        problem = f"got {extra}, which needs the extra of that name: pip install 'hybridfl[{extra}]' ({error})"
        raise ConfigError("tracker", f"{problem}; nearest valid choice: none.") from error
