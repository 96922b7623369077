"""What is wrong with a line, found by looking at its overrides one by one rather than by reading Hydra's text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.errors import HydraException

from hybridfl.config import GROUPS, Composer, choices, choices_only
from hybridfl.config_memory import whole
from hybridfl.errors import ConfigError, nearest


def diagnosis(composer: Composer, overrides: Sequence[str], sweep: bool, error: Exception) -> ConfigError:
    """What is wrong with these overrides, under the key that is at fault.

    Args:
        sweep: whether they may have several values.
        error: what Hydra or OmegaConf said.
    """
    keys = _keys(composer, overrides)
    for text in overrides:
        try:
            (override,) = composer.parse([text])
        except (HydraException, ValueError) as broken:
            if not text.partition("=")[0] or "=" not in text:
                return ConfigError(text, "is not an override; write it as key=value, such as rounds=10.")
            hint = "Quote a value with special characters, key=\"'a=b'\", and leave no space after a comma"
            return ConfigError(
                text.split("=", 1)[0],
                f"cannot read '{text}'. {hint} ({_first_line(broken).partition(' expecting')[0]}).",
            )
        found = _wrong_override(composer, override, keys)
        if not found and override.is_sweep_override() and not sweep:
            value = text.partition("=")[2]
            problem = f"got '{value}': several values make a sweep, which needs -m (a list is written [a,b])."
            found = ConfigError(str(override.key_or_group), problem)
        if found:
            return found
    # Of a sweep Hydra would only say that there are several values.
    error = _in_its_own_words(composer, choices_only(overrides) if sweep else overrides) or error
    key, told = getattr(error, "full_key", None), _first_line(error)
    if re.search(r"hydra/(launcher|sweeper)|(Launcher|Sweeper)Conf\b", told):
        problem = "a preset cannot bring a launcher or a sweeper; type it on the line, such as hydra/launcher=joblib"
        return ConfigError("experiment", f"{problem} ({told}).")
    for text in overrides:
        place, _, value = text.partition("=")
        if "@" in place and f"'{place}'" in told:
            without = f"{place.partition('@')[0]}={value}"
            return ConfigError(place, f"is no place for a choice in this config; nearest valid choice: {without}.")
    return ConfigError(key if isinstance(key, str) else "", told)


def _in_its_own_words(composer: Composer, overrides: Sequence[str]) -> Exception | None:
    """What Hydra says of these overrides where it takes them up by itself."""
    try:
        whole([*overrides, *composer.search_path()])
    except Exception as error:
        return error
    return None


def _keys(composer: Composer, overrides: Sequence[str]) -> list[str]:
    """All keys of the config with these choices; none if a choice is at fault."""
    try:
        config = composer.composition(choices_only(overrides)).config
    except Exception:
        return []
    return list(_leaves(config))


def _wrong_override(composer: Composer, override: Any, keys: Sequence[str]) -> ConfigError | None:
    key = str(override.key_or_group)
    place = f"{key}@{override.package}" if override.package else key
    if not key:
        return ConfigError(str(override.input_line), "is not an override; write it as key=value, such as rounds=10.")
    if key.startswith("hydra"):
        return None
    if isinstance(override.value(), dict) and key not in keys:  # options of a group, merged into it
        for option in override.value():
            if keys and f"{key}.{option}" not in keys and not any(k.startswith(f"{key}.{option}.") for k in keys):
                return ConfigError(f"{key}.{option}", f"unknown key. {nearest_key(f'{key}.{option}', keys)}")
        return None
    group = key.split("@", 1)[0].lstrip("/")
    if found := choices(group, composer.extra):
        if override.is_delete():
            return ConfigError(key, f"cannot be left out. {nearest('', found)}")
        values = [str(v) for v in (override.sweep_string_iterator() if override.is_sweep_override() else [])]
        for value in values or ["null" if override.value() is None else str(override.value())]:
            if value not in found:
                other = {"baseline": "merging", "merging": "baseline"}.get(key, "")
                if other and value in choices(other, composer.extra):
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
        return None if override.is_force_add() or not known else ConfigError(key, "is there already; leave out the +.")
    return None if known else ConfigError(key, f"unknown key. {nearest_key(key, keys)}")


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
