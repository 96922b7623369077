"""From a command line to a composed config: Hydra composes, and what it refuses is said in one readable message."""

from __future__ import annotations

import difflib
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
            composed = self._composition(overrides)
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
            swept = self._preset_sweeps(_choices_only(overrides), typed)
            return {name: self._product([*lines, *overrides]) for name, lines in swept.items()}

    def _product(self, lines: Sequence[str]) -> list[list[str]]:
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        parsed = self._parse(lines)
        for override in parsed:
            if override.is_interval_sweep():
                key = str(override.key_or_group)
                problem = "an interval has no end of values; a search chooses among them: hydra/sweeper=optuna"
                raise ConfigError(key, f"got '{override.get_value_string()}': {problem}.")
            if override.is_sweep_override() and not list(override.sweep_string_iterator()):
                key = override.key_or_group
                raise ConfigError(key, f"'{override.input_line}' matches nothing. {self._valid_choices(key)}".rstrip())
        return [list(job) for job in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]]

    def _composition(self, overrides: Sequence[str]) -> Composition:
        from hybridfl.config_memory import composition

        roots = [conf_dir(), *([self.extra] if self.extra else [])]
        return composition(overrides, roots, self._search_path())

    def _preset_sweeps(self, overrides: Sequence[str], typed: Collection[str]) -> dict[str, list[str]]:
        """Overrides that a preset's sweep brings, by its cells; of a preset without cells, or none, under an empty name."""
        from hybridfl.config_memory import whole
        from hybridfl.preset_sweeps import ONLY, sweep_at

        composed = self._composition(overrides)
        product: Mapping[str, Any] = {}
        if composed.has_sweep:
            product = whole([*overrides, *self._search_path()]).hydra.sweeper.params
        lines = [f"{key}={value}" for key, value in product.items() if key not in typed]
        sweep = sweep_at(composed.config)
        return {name: [*lines, *own] for name, own in (sweep.lines(typed) if sweep else {ONLY: []}).items()}

    def _search_path(self) -> list[str]:
        if self.extra is None:
            return []
        path = str(self.extra).replace("'", "\\'")
        return [f"hydra.searchpath=['file://{path}']"]

    def _parse(self, overrides: Sequence[str]) -> list[Any]:
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
            raise self._diagnosis(overrides, sweep, error) from error

    def _diagnosis(self, overrides: Sequence[str], sweep: bool, error: Exception) -> ConfigError:
        """Which override is at fault, found by looking at them one by one rather than by reading Hydra's text."""
        from hydra.errors import HydraException

        keys = self._keys(overrides)
        for text in overrides:
            try:
                (override,) = self._parse([text])
            except (HydraException, ValueError) as broken:
                if not text.partition("=")[0] or "=" not in text:
                    return ConfigError(text, "is not an override; write it as key=value, such as rounds=10.")
                hint = "Quote a value with special characters, key=\"'a=b'\", and leave no space after a comma"
                return ConfigError(
                    text.split("=", 1)[0],
                    f"cannot read '{text}'. {hint} ({_first_line(broken).partition(' expecting')[0]}).",
                )
            found = self._wrong_override(override, keys)
            if not found and override.is_sweep_override() and not sweep:
                value = text.partition("=")[2]
                problem = f"got '{value}': several values make a sweep, which needs -m (a list is written [a,b])."
                found = ConfigError(str(override.key_or_group), problem)
            if found:
                return found
        # Of a sweep Hydra would only say that there are several values.
        error = self._in_its_own_words(_choices_only(overrides) if sweep else overrides) or error
        key, told = getattr(error, "full_key", None), _first_line(error)
        if re.search(r"hydra/(launcher|sweeper)|(Launcher|Sweeper)Conf\b", told):
            problem = (
                "a preset cannot bring a launcher or a sweeper; type it on the line, such as hydra/launcher=joblib"
            )
            return ConfigError("experiment", f"{problem} ({told}).")
        for text in overrides:
            place, _, value = text.partition("=")
            if "@" in place and f"'{place}'" in told:
                whole = f"{place.partition('@')[0]}={value}"
                return ConfigError(place, f"is no place for a choice in this config; nearest valid choice: {whole}.")
        return ConfigError(key if isinstance(key, str) else "", told)

    def _in_its_own_words(self, overrides: Sequence[str]) -> Exception | None:
        """What Hydra says of these overrides where it takes them up by itself."""
        from hybridfl.config_memory import whole

        try:
            whole([*overrides, *self._search_path()])
        except Exception as error:
            return error
        return None

    def _keys(self, overrides: Sequence[str]) -> list[str]:
        """All keys of the config with these choices; none if a choice is at fault."""
        try:
            config = self._composition(_choices_only(overrides)).config
        except Exception:
            return []
        return list(_leaves(config))

    def _wrong_override(self, override: Any, keys: Sequence[str]) -> ConfigError | None:
        key = str(override.key_or_group)
        place = f"{key}@{override.package}" if override.package else key
        if not key:
            return ConfigError(
                str(override.input_line), "is not an override; write it as key=value, such as rounds=10."
            )
        if key.startswith("hydra"):
            return None
        if isinstance(override.value(), dict) and key not in keys:  # options of a group, merged into it
            for option in override.value():
                if keys and f"{key}.{option}" not in keys and not any(k.startswith(f"{key}.{option}.") for k in keys):
                    return ConfigError(f"{key}.{option}", f"unknown key. {nearest_key(f'{key}.{option}', keys)}")
            return None
        group = key.split("@", 1)[0].lstrip("/")
        if found := choices(group, self.extra):
            if override.is_delete():
                return ConfigError(key, f"cannot be left out. {nearest('', found)}")
            values = [str(v) for v in (override.sweep_string_iterator() if override.is_sweep_override() else [])]
            for value in values or ["null" if override.value() is None else str(override.value())]:
                if value not in found:
                    other = {"baseline": "merging", "merging": "baseline"}.get(key, "")
                    if other and value in choices(other, self.extra):
                        also = " baseline=none" if other == "merging" else ""
                        return ConfigError(place, f"got '{value}'; nearest valid choice: {other}={value}{also}.")
                    return ConfigError(place, f"got '{value}'. {nearest(value, found)}")
            if override.is_add() and not override.is_force_add() and group in GROUPS and "@" not in key:
                return ConfigError(key, "is chosen already; leave out the +.")
            return None
        if not keys:
            return None  # another override is at fault; the loop over all of them finds it
        known = key in keys or any(leaf.startswith(f"{key}.") for leaf in keys)
        if override.is_add():
            return (
                None if override.is_force_add() or not known else ConfigError(key, "is there already; leave out the +.")
            )
        return None if known else ConfigError(key, f"unknown key. {nearest_key(key, keys)}")

    def _valid_choices(self, group: str) -> str:
        return nearest("", choices(group, self.extra))


def nearest_key(key: str, keys: Sequence[str]) -> str:
    """The hint for a key that is not there: what the innermost group that is there has, all keys if none is there."""
    parent, _, last = key.rpartition(".")
    while parent:
        siblings = {k.removeprefix(f"{parent}.").partition(".")[0] for k in keys if k.startswith(f"{parent}.")}
        if siblings:
            # Without what they all begin with, which would make any two of them look near.
            wrong = key.removeprefix(f"{parent}.").partition(".")[0]
            near = difflib.get_close_matches(wrong, siblings - {"_target_"}, n=1, cutoff=0.5)
            hint = f"Did you mean '{parent}.{near[0]}'? " if near else ""
            return hint + nearest("", [f"{parent}.{name}" for name in siblings])
        parent = parent.rpartition(".")[0]
    keys = [k for k in keys if not k.startswith(("sweeps.", "tuned."))]  # which hold keys of the config themselves
    top = [*GROUPS, *(k.partition(".")[0] for k in keys)]
    same = next((k for k in keys if k.rpartition(".")[2] == last), None)
    return nearest(same or key, [*top, *keys], top)


def _at(config: Any, place: str) -> Any:
    """What is at a dotted key; None if nothing is."""
    for name in place.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _without_tilde(override: str) -> str:
    """A path that begins with the user's home, which the grammar of overrides cannot read unless it is quoted."""
    key, _, value = override.partition("=")
    if key in PATHS and value.startswith("~"):
        return f"{key}='{Path(value).expanduser()}'"
    return override


def _choices_only(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose a single file of a group, or the scale of a preset's sweep."""
    kept = []
    for text in overrides:
        key, _, value = text.partition("=")
        group = key.lstrip("+~").split("@", 1)[0]
        if group in (*GROUPS, "scale") and value and not any(mark in value for mark in ",({*"):
            kept.append(text)
    return kept


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix


def _first_line(error: BaseException) -> str:
    """What an error says, or what caused it if it says nothing itself."""
    cause: BaseException | None = error
    while cause is not None:
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        if lines:
            return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        cause = cause.__cause__
    return type(error).__name__
