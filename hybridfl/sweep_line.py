"""What is said to the sweep itself on an ``-m`` line, ``hydra/launcher=joblib``, apart from what is said of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hybridfl.errors import ConfigError
from hybridfl.launchers import Launcher, launcher
from hybridfl.sweepers import Optuna, sweeper


@dataclass(frozen=True)
class SweepLine:
    """An ``-m`` line.

    Attributes:
        typed: all of it.
        overrides: those of the runs.
        launcher: who does them.
        sweeper: who chooses them; None if they are all combinations.
    """

    typed: tuple[str, ...]
    overrides: tuple[str, ...]
    launcher: Launcher
    sweeper: Optuna | None = None


def sweep_line(typed: Sequence[str]) -> SweepLine:
    """The line with its parts told apart.

    Raises:
        ConfigError: an unknown launcher, option or value, or one that needs an extra that is not installed.
    """
    overrides = [text for text in typed if not is_about_sweep(text)]
    chosen: dict[str, str] = {}
    options: dict[str, dict[str, Any]] = {"launcher": {}, "sweeper": {}}
    for text in typed:
        if not is_about_sweep(text):
            continue
        key, value = _read(text)
        if "/" in key:
            chosen[key.partition("/")[2]] = str(value)
        else:
            _, group, *names = key.split(".")
            _put(options[group], names, value)
    made = launcher(chosen.get("launcher", "basic"), options["launcher"])
    return SweepLine(tuple(typed), tuple(overrides), made, sweeper(chosen.get("sweeper", "basic"), options["sweeper"]))


def is_about_sweep(text: str) -> bool:
    """Whether an override is for the launcher or the sweeper; parameters of a sweep, ``hydra.sweeper.params``, are not."""
    key = text.partition("=")[0].lstrip("+~")
    if key.split(".")[:3] == ["hydra", "sweeper", "params"]:
        return False
    return key in ("hydra/launcher", "hydra/sweeper") or key.startswith(("hydra.launcher.", "hydra.sweeper."))


def refuse_outside(overrides: Sequence[str]) -> None:
    """Refuse words for a sweep where there is none.

    Raises:
        ConfigError: there is such a word.
    """
    for text in filter(is_about_sweep, overrides):
        key, _, value = text.partition("=")
        raise ConfigError(key, f"got '{value}', which is for a sweep: type -m, or leave it out.")


def _read(text: str) -> tuple[str, Any]:
    key = text.partition("=")[0]
    try:
        (override,) = OverridesParser.create().parse_overrides([text])
    except (HydraException, ValueError) as error:
        raise ConfigError(key, f"cannot read '{text}'; write {key.lstrip('+~')}=VALUE.") from error
    if override.is_delete() or override.is_add() or override.is_force_add():
        raise ConfigError(key, f"there is one always; write {key.lstrip('+~')}=VALUE.")
    if override.is_sweep_override():
        raise ConfigError(key, f"got '{text.partition('=')[2]}': there is one for all jobs of a sweep.")
    return str(override.key_or_group), override.value()


def _put(options: dict[str, Any], names: Sequence[str], value: Any) -> None:
    first, *rest = names
    if rest:
        _put(options.setdefault(first, {}), rest, value)
    else:
        options[first] = value
