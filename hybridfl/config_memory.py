"""What Hydra composes from the same files and choices is remembered: composing anew takes a tenth of a second or more.

Choices of files are Hydra's work, unless the files are plain. Plain values are then put into a copy of what was composed; those
that do more than replace a value, by the operations of OmegaConf that Hydra uses itself. Every line with more in it than choices
and plain values is left to Hydra altogether.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf

from hybridfl.config_files import Stamps, plain_config

ENVIRONMENT = re.compile(r"\$\{oc\.env:(\w+)(,[^${}]*)?\}")
"""A text that only stands for what a variable of the environment says."""
MOST_FILES = 5000
"""Of folders with more in them nothing is remembered: looking for changes would take too long."""


@dataclass(frozen=True)
class Composition:
    """What Hydra composed.

    Attributes:
        config: plain containers, without Hydra's own node, interpolations unresolved.
        choices: the chosen file of every config group.
        has_sweep: whether a preset brings parameters of a sweep.
    """

    config: dict[str, Any]
    choices: dict[str, str]
    has_sweep: bool


def composition(overrides: Sequence[str], roots: Sequence[Path], fixed: Sequence[str] = ()) -> Composition:
    """What ``hydra.compose`` gives for ``config.yaml`` and these overrides; Hydra must be initialised.

    Args:
        overrides: as typed.
        roots: the folders with config groups.
        fixed: overrides that come with the roots, such as Hydra's search path.

    Raises:
        HydraException, OmegaConfBaseException, YAMLError, ValueError: what does not go together.
    """
    told = _split(overrides, roots)
    stamps = _stamps(roots) if told else None
    if told is None or stamps is None:
        return by_hydra([*overrides, *fixed])
    choices, values = told
    lines = tuple(str(choice.input_line) for choice in choices)
    remembered = _remembered(lines, tuple(fixed), tuple(roots), stamps)
    found: Composition = pickle.loads(remembered)
    if all(_replaced(found.config, value) for value in values):
        return found
    found = pickle.loads(remembered)
    return Composition(_updated(found.config, values), found.choices, found.has_sweep)


def by_hydra(overrides: Sequence[str]) -> Composition:
    """What Hydra composes, nothing remembered."""
    config = whole(overrides)
    choices = {str(group): str(name) for group, name in config.hydra.runtime.choices.items()}
    has_sweep = bool(config.hydra.sweeper.get("params"))
    plain = OmegaConf.to_container(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    assert isinstance(plain, dict)
    return Composition({str(key): value for key, value in plain.items()}, choices, has_sweep)


def whole(overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes, with its own node."""
    return compose("config", overrides=list(overrides), return_hydra_config=True)


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    """With the values that interpolations stand for.

    Raises:
        OmegaConfBaseException: one stands for nothing, or a mandatory value is missing.
    """
    texts = [text for text in _texts(config) if "${" in text or text == "???"]
    names = {
        text: told[1] for text in texts if (told := ENVIRONMENT.fullmatch(text)) and (told[2] or told[1] in os.environ)
    }
    if len(names) < len(set(texts)):
        plain = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=True)
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}
    if not texts:
        return config
    # One at a time: OmegaConf takes a hundredth of a second and more for the whole.
    known = {text: _from_environment(text, os.environ.get(name)) for text, name in names.items()}
    found = _put_in(config, known)
    assert isinstance(found, dict)
    return found


@functools.lru_cache(maxsize=64)
def _from_environment(text: str, value: str | None) -> Any:
    """What an interpolation stands for where the variable that it names has this value."""
    return OmegaConf.create({"found": text})["found"]


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _texts(value)


def _put_in(node: Any, known: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        return {key: _put_in(value, known) for key, value in node.items()}
    if isinstance(node, list):
        return [_put_in(value, known) for value in node]
    return known.get(node, node) if isinstance(node, str) else node


@functools.lru_cache(maxsize=1024)
def _remembered(choices: tuple[str, ...], fixed: tuple[str, ...], roots: tuple[Path, ...], stamps: Stamps) -> bytes:
    return pickle.dumps(_by_files(choices, roots, stamps) or by_hydra([*choices, *fixed]))


def _by_files(choices: Sequence[str], roots: Sequence[Path], stamps: Stamps) -> Composition | None:
    """Without Hydra; None if it takes Hydra."""
    chosen = {}
    for text in choices:
        override = _parsed(text)
        value = override.value()
        if override.is_add() or override.is_force_add() or not isinstance(value, str):
            return None
        group, place = override.key_or_group, override.package
        chosen[group if place is None else f"{group}@{place}"] = value
    found = plain_config(chosen, roots, stamps)
    return None if found is None else Composition(found.config, found.choices, found.has_sweep)


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Override:
    return OverridesParser.create().parse_overrides([text])[0]


def _split(overrides: Sequence[str], roots: Sequence[Path]) -> tuple[list[Override], list[Override]] | None:
    """Choices of files, and plain values; None where there is something else, or something wrong."""
    choices: list[Override] = []
    values: list[Override] = []
    for text in overrides:
        try:
            override = _parsed(text)
        except (HydraException, ValueError):
            return None
        key = override.key_or_group
        if override.is_delete() or override.is_sweep_override() or key.split("/")[0].split(".")[0] == "hydra":
            return None
        is_group = any(os.path.isdir(f"{root}/{key}") for root in roots)
        if override.package is not None or (is_group and not isinstance(override.value(), dict)):
            choices.append(override)
        else:
            values.append(override)
    return choices, values


def _replaced(config: dict[str, Any], override: Override) -> bool:
    """Whether the override only replaces a value by another one, which is done."""
    *path, last = override.key_or_group.split(".")
    node: Any = config
    for name in path:
        node = node.get(name) if isinstance(node, dict) else None
    value = override.value()
    if not isinstance(node, dict) or last not in node or isinstance(value, dict) or override.is_add():
        return False
    if isinstance(node[last], dict) or "${" in f"{node[last]}{value}":
        return False
    node[last] = value
    return True


def _updated(config: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    whole = OmegaConf.create(config)
    OmegaConf.set_struct(whole, True)
    for override in overrides:
        _put(whole, override)
    plain = OmegaConf.to_container(whole)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _put(config: DictConfig, override: Override) -> None:
    key, value = override.key_or_group, override.value()
    replaces = not isinstance(value, dict | list)
    if override.is_add() and replaces and OmegaConf.select(config, key, throw_on_missing=False) is not None:
        raise ConfigCompositionException(f"Could not append to config. An item is already at '{key}'.")
    OmegaConf.update(config, key, value, merge=True, force_add=override.is_add() or override.is_force_add())


def _stamps(roots: Sequence[Path]) -> Stamps | None:
    """What tells the files in folders, and below, from what they were before; None if there are too many."""
    found = []
    folders = [str(root) for root in roots]
    try:
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    seen = entry.stat()
                    found.append((entry.path, seen.st_mtime_ns, seen.st_size, seen.st_ino))
                    if len(found) > MOST_FILES:
                        return None
                    if entry.is_dir():
                        folders.append(entry.path)
    except OSError:  # a folder that may not be looked into, or a link to nothing
        return None
    return tuple(found)
