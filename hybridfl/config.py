"""From a command line to a composed config: Hydra composes, and what it refuses is said in one readable message."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridfl.errors import ConfigError, nearest

if TYPE_CHECKING:
    from hybridfl.config_memory import Composition

PATHS = ("data_root", "output_dir", "start", "partitioning.path", "tracker.folder")
GROUPS = (
    "dataset",
    "partitioning",
    "server_data",
    "clients",
    "model",
    "client_optimizer",
    "augmentation",
    "merging",
    "baseline",
    "topology",
    "executor",
    "tracker",
    "experiment",
)

NOT_IDENTITY = frozenset(
    {
        "baseline",  # the chosen node is in the identity as `method`, whichever group it came from
        "merging",
        "experiment",
        "tuned",  # what was tuned is in the identity where it applies
        "claims",
        "scale",
        "sweeps",
        "executor",
        "tracker",
        "device",
        "output_dir",
        "data_root",
        "ui",
        "rerun",
        "fail_fast",
        "checkpoint_seconds",
        "max_bad_rounds",
    }
)
"""Keys that do not decide a run's numbers (``max_bad_rounds`` only decides whether there are any)."""


@dataclass(frozen=True)
class Composed:
    """A composed config.

    Attributes:
        config: plain containers, interpolations resolved, Hydra's own node left out.
        method_key: ``"baseline"`` or ``"merging"``: the group the method was chosen from.
        method_name: the chosen file's name.
        overrides: what was typed.
        has_sweep: whether a preset brings sweep parameters, which only ``-m`` runs.
    """

    config: dict[str, Any]
    method_key: str
    method_name: str
    overrides: tuple[str, ...]
    has_sweep: bool = False

    @property
    def line(self) -> str:
        return " ".join(self.overrides)


def conf_dir() -> Path:
    """The shipped config folder: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def check_folder(extra: Path | None) -> None:
    """Refuse a config folder of the user's that would not do what it seems to.

    Raises:
        ConfigError: it is missing, or one of its files cannot be read or has the name of a shipped choice, which Hydra
            would take instead.
    """
    if extra is None:
        return
    if not extra.is_dir():
        raise ConfigError("--config-dir", f"'{extra}' is not a folder.")
    for group in GROUPS:
        for file in choices(group, extra).values():
            if not file.is_relative_to(extra):
                continue
            try:
                file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(
                    "--config-dir", f"'{file}' cannot be read ({error}); a config is text in UTF-8."
                ) from error
        for name, file in choices(group).items():
            own = extra / group / file.name
            if own.is_file() and not own.samefile(file):
                raise ConfigError("--config-dir", f"'{own}' has the name of the shipped {group}={name}; rename it.")


def choices(group: str, extra: Path | None = None) -> dict[str, Path]:
    """Choices of a config group by name: the shipped ones and those in the user's own folder."""
    found: dict[str, Path] = {}
    for root in filter(None, (conf_dir(), extra)):
        for file in sorted((root / group).glob("*.yaml")):
            found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


class Composer:
    """Composes configs from the shipped folder and, if given, the user's own; use as a context manager."""

    def __init__(self, config_dir: Path | None = None) -> None:
        check_folder(config_dir)
        self.extra = config_dir.resolve() if config_dir else None
        self._read: dict[str, Any] = {}

    def __enter__(self) -> Composer:
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra

        GlobalHydra.instance().clear()
        self._hydra = initialize_config_dir(str(conf_dir().resolve()), version_base="1.3", job_name="hybridfl")
        self._hydra.__enter__()
        self._read.clear()  # what was read knows the loader of its time
        return self

    def __exit__(self, *exception: object) -> None:
        from hydra.core.global_hydra import GlobalHydra

        GlobalHydra.instance().clear()

    def compose(self, overrides: Sequence[str]) -> Composed:
        """One config, with what its preset has ``tuned`` for its method below what is typed.

        Raises:
            ConfigError: an unknown key, group or choice, or overrides that cannot be read.
        """
        from hybridfl.tuned import with_tuned

        composed = self._composed(overrides)
        if not composed.config.get("tuned"):
            return composed
        return with_tuned(composed, self._composed, self.methods())

    def methods(self) -> list[str]:
        """Names of all methods, as in ``baseline=`` or ``merging=``."""
        return sorted({*choices("merging", self.extra), *choices("baseline", self.extra)} - {"none"})

    def _composed(self, overrides: Sequence[str]) -> Composed:
        from hybridfl.config_memory import resolved

        overrides = [_without_tilde(override) for override in overrides]
        with self._explained(overrides):
            composed = self.composition(overrides)
            config = resolved(composed.config)
        for nested in composed.choices:
            place = nested.partition("@")[2]
            if isinstance(value := _at(config, place) if place else None, str):
                raise ConfigError(place, f"got '{value}', and it is a config group; write {nested}={value}.")
        key = "baseline" if "_target_" in (config.get("baseline") or {}) else "merging"
        has_sweep = composed.has_sweep or bool(config.get("sweeps"))
        return Composed(config, key, composed.choices.get(key, "None"), tuple(overrides), has_sweep)

    def expand(self, overrides: Sequence[str]) -> list[list[str]]:
        """The jobs of a sweep, each once, in the order of a preset's cells and of what was typed.

        Raises:
            ConfigError: as :meth:`cells`.
        """
        jobs = [tuple(job) for jobs in self.cells(overrides).values() for job in jobs]
        return [list(job) for job in dict.fromkeys(jobs)]

    def cells(self, overrides: Sequence[str]) -> dict[str, list[list[str]]]:
        """The jobs of a sweep by the preset's cells: the product of all comma lists, ranges and globs, in the order typed.

        Raises:
            ConfigError: a pattern that matches nothing, overrides that cannot be read, or an unknown scale.
        """
        overrides = [_without_tilde(override) for override in overrides]
        typed = {text.split("=", 1)[0] for text in overrides}
        with self._explained(overrides, sweep=True):
            swept = self._preset_sweeps(choices_only(overrides), typed)
            return {name: self._product([*lines, *overrides]) for name, lines in swept.items()}

    def _product(self, lines: Sequence[str]) -> list[list[str]]:
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        parsed = self.parse(lines)
        for override in parsed:
            if override.is_interval_sweep():
                key = str(override.key_or_group)
                problem = "an interval has no end of values; a search chooses among them: hydra/sweeper=optuna"
                raise ConfigError(key, f"got '{override.get_value_string()}': {problem}.")
            if override.is_sweep_override() and not list(override.sweep_string_iterator()):
                key = override.key_or_group
                raise ConfigError(key, f"'{override.input_line}' matches nothing. {self._valid_choices(key)}".rstrip())
        jobs = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
        return [[_with_interpolations(text) for text in job] for job in jobs]

    def composition(self, overrides: Sequence[str]) -> Composition:
        """What Hydra makes of these overrides, interpolations unresolved; its own errors."""
        from hybridfl.config_memory import composition

        roots = [conf_dir(), *([self.extra] if self.extra else [])]
        return composition(overrides, roots, self.search_path())

    def _preset_sweeps(self, overrides: Sequence[str], typed: Collection[str]) -> dict[str, list[str]]:
        """Overrides that a preset's sweep brings, by its cells; of a preset without cells, or none, under an empty name."""
        from hybridfl.config_memory import whole
        from hybridfl.preset_sweeps import ONLY, sweep_at

        composed = self.composition(overrides)
        product: Mapping[str, Any] = {}
        if composed.has_sweep:
            product = whole([*overrides, *self.search_path()]).hydra.sweeper.params
        lines = [f"{key}={value}" for key, value in product.items() if key not in typed]
        sweep = sweep_at(composed.config)
        return {name: [*lines, *own] for name, own in (sweep.lines(typed) if sweep else {ONLY: []}).items()}

    def search_path(self) -> list[str]:
        """The override by which Hydra finds the user's own folder."""
        if self.extra is None:
            return []
        path = str(self.extra).replace("'", "\\'")
        return [f"hydra.searchpath=['file://{path}']"]

    def parse(self, overrides: Sequence[str]) -> list[Any]:
        """What Hydra reads in each of them; its own errors."""
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.override_parser.overrides_parser import OverridesParser

        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        for text in overrides:  # the cells of a sweep share most of them, and one takes milliseconds
            if text not in self._read:
                (self._read[text],) = parser.parse_overrides([text])
        return [self._read[text] for text in overrides]

    @contextmanager
    def _explained(self, overrides: Sequence[str], sweep: bool = False) -> Iterator[None]:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        try:
            yield
        except YAMLError as error:  # in a file of the user's; its text names file and line
            raise ConfigError("--config-dir", " ".join(str(error).split())) from error
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            from hybridfl.config_mistakes import diagnosis

            raise diagnosis(self, overrides, sweep, error) from error

    def _valid_choices(self, group: str) -> str:
        return nearest("", choices(group, self.extra))


def _at(config: Any, place: str) -> Any:
    """What is at a dotted key; None if nothing is."""
    for name in place.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _with_interpolations(text: str) -> str:
    """An override of a job as one would type it: the sweeper escapes the braces of an interpolation, and what is within."""
    return re.sub(r"\$\\\{.*?\\\}", lambda told: re.sub(r"\\(.)", r"\1", told[0]), text)


def _without_tilde(override: str) -> str:
    """A path that begins with the user's home, which the grammar of overrides cannot read unless it is quoted."""
    key, _, value = override.partition("=")
    if key in PATHS and value.startswith("~"):
        return f"{key}='{Path(value).expanduser()}'"
    return override


def choices_only(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose a single file of a group, or the scale of a preset's sweep."""
    kept = []
    for text in overrides:
        key, _, value = text.partition("=")
        group = key.lstrip("+~").split("@", 1)[0]
        if group in (*GROUPS, "scale") and value and not any(mark in value for mark in ",({*"):
            kept.append(text)
    return kept
