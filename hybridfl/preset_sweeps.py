"""What ``-m`` runs of a preset: ``sweeps``, one a scale, each of them named cells.

A preset that Hydra's own ``hydra.sweeper.params`` can tell, one product of choices, needs none of this. A study with cells of
different keys does, and one that comes in several sizes::

    scale: cpu
    sweeps:
      cpu:
        each: {baseline: [none, fedbuff], seed: [0, 1, 2]}
        cells:
          base: {}
          half of them noisy: {clients.noisy_labels: 0.5}
          one a round: {clients.per_round: 1}

Every cell is a product of its own, of the values of ``each`` and its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from hybridfl.build import PositiveFloat, convert
from hybridfl.errors import ConfigError, nearest
from hybridfl.tuned import written

ONLY = ""
"""The name of the cell of a sweep that has none."""


@dataclass(frozen=True)
class PresetSweep:
    """A sweep at one scale.

    Attributes:
        each: overrides of every cell, key → value, or a list of values that are swept over.
        cells: further ones by the cell's name; those of a cell replace those of ``each``.
        pretrained: files in the output folder that cells start from, and what is typed after ``hybridfl pretrain`` for each.
        core_minutes: what it took, measured, on one core; what presets of a study share is counted in the first of them.
    """

    each: dict[str, Any] = field(default_factory=dict)
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    pretrained: dict[str, str] = field(default_factory=dict)
    core_minutes: PositiveFloat | None = None

    def __post_init__(self) -> None:
        if not self.each and not self.cells:
            raise ConfigError("each", "a sweep needs values to sweep over, such as {seed: [0, 1, 2]}.")

    def lines(self, typed: Collection[str]) -> dict[str, list[str]]:
        """Overrides by cell, commas for lists; keys that were typed are left out, as what is typed counts."""
        return {
            name: [f"{key}={_values(value)}" for key, value in {**self.each, **own}.items() if key not in typed]
            for name, own in (self.cells or {ONLY: {}}).items()
        }


def sweep_at(config: Mapping[str, Any]) -> PresetSweep | None:
    """The sweep of a config's preset at the config's ``scale``; None if its preset has none.

    Raises:
        ConfigError: under ``sweeps``, or ``scale`` is unknown.
    """
    sweeps: dict[str, PresetSweep] = convert(config.get("sweeps") or {}, dict[str, PresetSweep], "sweeps")
    scale = config.get("scale")
    if not sweeps:
        if scale is not None:
            problem = "there is no preset, or it has no scales"
            raise ConfigError("scale", f"got '{scale}', but {problem}; leave it out, or choose one that has.")
        return None
    if scale not in sweeps:
        raise ConfigError("scale", f"got '{scale}'. {nearest(str(scale), sweeps)}")
    return sweeps[scale]


def _values(value: Any) -> str:
    return ",".join(map(_value, value)) if isinstance(value, list) else _value(value)


def _value(value: Any) -> str:
    """A value as typed: a text may be anything that an override's right-hand side may be."""
    return value if isinstance(value, str) else written(value)
