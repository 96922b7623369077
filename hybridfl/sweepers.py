"""Who chooses the jobs of a sweep: the choices of ``hydra/sweeper=`` and their options, ``hydra.sweeper.…``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hybridfl.build import NonNegativeInt, PositiveInt, call
from hybridfl.errors import ConfigError, nearest
from hybridfl.launchers import need_extra

SWEEPERS = ("basic", "optuna")


@dataclass(frozen=True)
class Optuna:
    """A search by Optuna's TPE.

    Attributes:
        n_trials: in all, those of an earlier call among them.
        metric: ``SCOPE`` or ``SCOPE.COLUMN`` of metrics.csv; ``None`` is the accuracy on validation examples.
        direction: ``None`` is ``maximize`` for accuracies and ``minimize`` otherwise.
        seed: of the choices; that of the runs is typed as ever.
    """

    n_trials: PositiveInt = 20
    metric: str | None = None
    direction: Literal["maximize", "minimize"] | None = None
    seed: NonNegativeInt = 0


def sweeper(name: str, options: Mapping[str, Any]) -> Optuna | None:
    """The sweeper of this name; None for all combinations of what is typed.

    Raises:
        ConfigError: there is none such, an option is wrong, or the extra that it needs is not installed.
    """
    if name not in SWEEPERS:
        raise ConfigError("hydra/sweeper", f"got '{name}'. {nearest(name, SWEEPERS)}")
    if name == "basic":
        if options:
            raise ConfigError(f"hydra.sweeper.{next(iter(options))}", "is for a search: type hydra/sweeper=optuna.")
        return None
    made: Optuna = call(Optuna, options, "hydra.sweeper", {})
    need_extra("optuna", "hydra/sweeper=optuna")
    return made
