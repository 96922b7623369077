"""A preset as a study: its claims, the cells they are about, and the stored runs that each line would make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from hybridfl.build import convert
from hybridfl.claims import Claim
from hybridfl.config import PATHS, Composer
from hybridfl.errors import ConfigError, nearest
from hybridfl.keys import NOT_RESULTS, token
from hybridfl.preset_sweeps import ONLY
from hybridfl.runs import FACTS, Run
from hybridfl.tabulate import one_a_seed
from hybridfl.tuned import METHOD, written

SEEDS = "0,1,2,3,4"
"""Suggested where a preset sweeps fewer than two."""


@dataclass(frozen=True)
class Study:
    """A preset as it was typed.

    Attributes:
        name: of the preset.
        fixed: overrides of every job, without method and seed.
        swept: of every cell that the jobs are swept over, key → value; one without keys if over none.
        seeds: that the jobs have, as a choice of ``seed=``.
        merging: the method of ``baseline=none``.
        output: the output folder.
        named: those of the cells that the preset has names for, by name.
    """

    name: str
    claims: tuple[Claim, ...]
    fixed: tuple[str, ...]
    swept: tuple[dict[str, str], ...]
    seeds: str
    merging: str
    output: Path
    named: Mapping[str, tuple[dict[str, str], ...]] = field(default_factory=dict)

    def cells(self, claim: Claim) -> list[dict[str, str]]:
        """The cells of a claim: its own, in each of those swept that it does not name.

        Raises:
            ConfigError: under ``where``: a name that no cell of the preset has.
        """
        wanted = claim.where if isinstance(claim.where, list) else [claim.where]
        every = [
            cell
            for where in wanted
            for cell in (self._by_name(where) if isinstance(where, str) else self._by_keys(where))
        ]
        return list({tuple(cell.items()): cell for cell in every}.values())

    def _by_name(self, name: str) -> Sequence[dict[str, str]]:
        if name not in self.named:
            problem = (
                nearest(name, self.named) if self.named else "The preset has no cells with names; write {key: value}."
            )
            raise ConfigError("where", f"got '{name}'. {problem}")
        return self.named[name]

    def _by_keys(self, where: Mapping[str, Any]) -> list[dict[str, str]]:
        """Cells with names are settings that go together, so that one told by its keys stands beside them, not across."""
        across = self.swept if not where or not self.named else ({},)
        alternatives = [value if isinstance(value, list) else [value] for value in where.values()]
        own = [dict(zip(where, map(as_typed, values), strict=True)) for values in product(*alternatives)]
        return [{k: v for k, v in swept.items() if k not in cell} | cell for cell in own for swept in across]

    def line(self, method: str, cell: Mapping[str, str], baselines: Mapping[str, Path]) -> tuple[str, ...]:
        """The overrides of a method in a cell."""
        if method == self.merging:
            chosen = ["baseline=none"]
        elif method in baselines:
            chosen = [f"baseline={method}"]
        else:
            chosen = [f"merging={method}", "baseline=none"]
        fixed = [text for text in self.fixed if text.partition("=")[0] not in cell]
        return (*fixed, *chosen, *(f"{key}={value}" for key, value in cell.items()))


def as_typed(value: Any) -> str:
    """A value of ``where`` as the right-hand side of an override."""
    return value if isinstance(value, str) else written(value)


def preset_of(overrides: Sequence[str]) -> str:
    """The override that chooses a preset; empty if none does."""
    return next((text for text in overrides if text.startswith("experiment=")), "")


def study_of(composer: Composer, line: Sequence[str]) -> Study:
    """The study that an ``-m`` line with a preset is.

    Raises:
        ConfigError: an override or a claim is wrong, or there is no claim.
    """
    by_cell = {name: [dict(map(_split, job)) for job in jobs] for name, jobs in composer.cells(line).items()}
    jobs = [job for found in by_cell.values() for job in found]
    shared = {key: value for key, value in jobs[0].items() if all(job.get(key) == value for job in jobs)}
    fixed = [f"{key}={value}" for key, value in shared.items() if key not in ("seed", "baseline")]
    fixed.sort(key=lambda text: not text.startswith("experiment="))
    cells = {
        name: _distinct({key: job[key] for key in job if key not in (*shared, "seed", *METHOD)} for job in found)
        for name, found in by_cell.items()
    }
    seeds = list(dict.fromkeys(job["seed"] for job in jobs if "seed" in job))
    base = composer.compose([*fixed, "baseline=none"])
    claims: tuple[Claim, ...] = convert(base.config.get("claims") or [], tuple[Claim, ...], "claims")
    for place, claim in enumerate(claims):
        if claim.id in {other.id for other in claims[:place]}:
            raise ConfigError(
                f"claims[{place}].id", f"got '{claim.id}', as another claim has; give every claim its own."
            )
    name = preset_of(fixed).partition("=")[2]
    if not claims:
        raise ConfigError(f"experiment={name}", "lists no claims; see docs/claims.md for how it would.")
    swept = _distinct(cell for found in cells.values() for cell in found)
    named = {name: found for name, found in cells.items() if name != ONLY}
    suggested = ",".join(seeds) if len(seeds) > 1 else SEEDS
    output = Path(base.config["output_dir"])
    return Study(name, claims, tuple(fixed), swept, suggested, base.method_name, output, named)


def _distinct(cells: Iterable[dict[str, str]]) -> tuple[dict[str, str], ...]:
    return tuple({tuple(cell.items()): cell for cell in cells}.values())


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key, value


class Runs:
    """Stored runs by their settings."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.by_settings: dict[Settings, list[Run]] = {}
        for one in runs:
            self.by_settings.setdefault(settings_of(one), []).append(one)

    def of(self, composer: Composer, line: Sequence[str]) -> list[Run]:
        """Those that the line makes with any seed, the newest of each.

        Raises:
            ConfigError: there is something wrong with the line.
        """
        composed = composer.compose([*line, f"seed={NO_SEED}"])
        wanted = Run(Path(), composed.config | {"method": composed.config[composed.method_key]}, {})
        same = self.by_settings.get(settings_of(wanted), ())
        return one_a_seed(one for one in same if seeds_fit(one, wanted))


NO_SEED = 2**31 - 1
"""Tells keys that follow the run's seed from those that only have the same value."""
Settings = tuple[tuple[str, str], ...]


def settings_of(one: Run) -> Settings:
    """What runs share that differ in nothing but seeds: all that is in the identity, files by their names."""
    found = []
    for key, value in one.flat.items():
        group, _, rest = key.partition(".")
        if group in NOT_RESULTS or key.endswith("seed") or (group == "method" and rest in FACTS):
            continue
        found.append((key, token(Path(value).name if key in PATHS and value is not None else value)))
    return tuple(sorted(found))


def seeds_fit(one: Run, wanted: Run) -> bool:
    """Whether the seeds of a run's parts are those of ``wanted``, the run's own where that has its own."""
    parts = {
        key for key in (*one.flat, *wanted.flat) if key.endswith("seed") and key.partition(".")[0] not in NOT_RESULTS
    }
    own = {key for key in parts if wanted.value(key) == NO_SEED}
    return all(token(one.value(key)) == token(one.value("seed") if key in own else wanted.value(key)) for key in parts)
