"""The space of a search, from an ``-m`` line in Hydra's own syntax, as Optuna's distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from hybridfl.errors import ConfigError


@dataclass(frozen=True)
class Dimension:
    """Where a value may lie.

    Attributes:
        distribution: Optuna's.
        ends: two values that the others lie between, or the first and the last.
    """

    distribution: Any
    ends: tuple[Any, Any]


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        fixed: overrides of every trial.
        dimensions: by the key of the override.
    """

    fixed: tuple[str, ...]
    dimensions: Mapping[str, Dimension]

    @property
    def distributions(self) -> dict[str, Any]:
        return {key: dimension.distribution for key, dimension in self.dimensions.items()}

    def line(self, values: Mapping[str, Any]) -> list[str]:
        """The overrides of the run with these values."""
        return [*self.fixed, *(f"{key}={values[key]}" for key in self.dimensions)]


def space_of(overrides: Sequence[str]) -> Space:
    """Choices, ranges and intervals are dimensions, everything else is fixed; Hydra must be initialised.

    Raises:
        ConfigError: an override cannot be read, nothing is to be searched, seeds are, or a range is empty.
    """
    fixed: list[str] = []
    dimensions: dict[str, Dimension] = {}
    for text in overrides:
        key = text.partition("=")[0]
        try:
            (override,) = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([text])
        except (HydraException, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(key, f"cannot read '{text}' ({reason}); write {key}=VALUE.") from error
        if not override.is_sweep_override():
            fixed.append(text)
            continue
        if key.rpartition(".")[2] == "seed":
            problem = "a search would choose the luckiest seed; nearest valid choice: one of them"
            raise ConfigError(key, f"got '{text.partition('=')[2]}': {problem}.")
        dimensions[key] = _dimension(key, override)
    if not dimensions:
        hint = "client_optimizer.lr=tag(log,interval(0.001,1)), or a comma list"
        raise ConfigError("hydra/sweeper", f"got 'optuna', and there is nothing to search: type what, such as {hint}.")
    return Space(tuple(fixed), dimensions)


def _dimension(key: str, override: Override) -> Dimension:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    log = "log" in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        low, high = value.start, value.end
        if not low < high or (log and low <= 0):
            needed = "0 < a < b" if log else "a < b"
            raise ConfigError(key, f"got '{override.get_value_string()}': interval(a,b) needs {needed}.")
        if isinstance(low, int) and isinstance(high, int):
            return Dimension(IntDistribution(low, high, log=log), (low, high))
        return Dimension(FloatDistribution(low, high, log=log), (low, high))
    if isinstance(value, RangeSweep):
        values = list(value.range())
        if not values:
            raise ConfigError(key, f"got '{override.get_value_string()}': the range is empty.")
        first, last, step = values[0], values[-1], abs(value.step or 1)
        low, high = sorted((first, last))
        if all(isinstance(number, int) for number in values):
            if log and step != 1:
                raise ConfigError(key, "a range with tag log has the step 1; write tag(log,int(interval(a,b))).")
            return Dimension(IntDistribution(low, high, log=log, step=1 if log else int(step)), (low, high))
        if log:
            raise ConfigError(key, "a range of fractions has no tag log; write tag(log,interval(a,b)).")
        # As Hydra writes them, or 0.1 + 0.2 would be a value of its own.
        return Dimension(CategoricalDistribution([_rounded(number) for number in values]), (low, high))
    texts = list(override.sweep_string_iterator())
    if not texts:
        raise ConfigError(key, f"'{override.input_line}' matches nothing.")
    return Dimension(CategoricalDistribution(texts), (texts[0], texts[-1]))


def _rounded(number: Any) -> float:
    return float(number) if not math.isfinite(number) else float(f"{float(number):.12g}")
