"""Config files that only hold options, put together without Hydra, which takes a tenth of a second for it.

This is what Hydra does with a choice from a group whose file has no package of its own: the file's content becomes the node of
the group, on top of that of files which it starts from. A preset, for which the package is the whole config, chooses files of other groups,
may start from another preset, and its content is merged on top.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

Stamps = tuple[tuple[str, int, int, int], ...]
"""Path, time of the last change, size and inode of files and folders."""


NAME = re.compile(r"(?!_self_$)\w[\w-]*")
Find = Callable[[str, str], tuple[Any, ...]]
"""The path and the stamp of a file by its group and name; empty if there is none."""


@dataclass
class PlainConfig:
    """What was put together.

    Attributes:
        config: in its order; its nodes are kept, and not to be changed.
        choices: the chosen file of every group.
        has_sweep: whether a preset brings parameters of a sweep.
    """

    config: dict[str, Any]
    choices: dict[str, str]
    has_sweep: bool = False


@dataclass
class _Preset:
    """Files that are put on top of each other, at their common place.

    Attributes:
        choices: files of other groups, or of any at a place (``group@place``); what a preset says itself goes before what those say that it starts from.
        contents: those that it starts from first.
    """

    choices: dict[str, str] = field(default_factory=dict)
    contents: list[dict[Any, Any]] = field(default_factory=list)
    has_sweep: bool = False


def plain_config(chosen: Mapping[str, str], roots: Sequence[Path], stamps: Stamps) -> PlainConfig | None:
    """The config of these choices; None if it takes Hydra to make it.

    Args:
        chosen: the name of a file by group; the other groups have their defaults.
        roots: the folders with config groups, the first one with ``config.yaml``.
        stamps: of all files in them.
    """
    seen = {path: (path, *stamp) for path, *stamp in stamps}

    def find(group: str, name: str) -> tuple[Any, ...]:
        # Hydra takes the first folder that has the file.
        return next((seen[file] for root in roots if (file := str(root / group / f"{name}.yaml")) in seen), ("",))

    primary = _content(*find("", "config"))
    if primary is None or "hydra" in primary:
        return None
    entries = list(primary.get("defaults", []))
    own = {key: value for key, value in primary.items() if key != "defaults"}
    choices: dict[str, str] = {}
    preset = _Preset()
    if entries and isinstance(entries[-1], dict) and len(entries[-1]) == 1:
        ((group, default),) = entries[-1].items()
        chosen_preset = chosen.get(group, default)
        if group not in own and (found := _preset(group, chosen_preset, find)):
            preset = found
            entries.pop()
            choices[group] = chosen_preset
    chosen = {**preset.choices, **chosen}
    whole: dict[str, Any] = {}
    for entry in entries:
        if entry == "_self_":
            whole |= own
            continue
        if not isinstance(entry, dict) or len(entry) != 1:
            return None
        ((group, default),) = entry.items()
        name = str(chosen.get(group, default))
        parts = _parts(group, name, find, chosen, group)
        if parts is None or group in own or group in choices:
            return None
        choices |= {group: name, **parts.choices}
        whole[group] = _merged({}, parts.contents) if len(parts.contents) > 1 else parts.contents[0]
    if set(chosen) - set(choices) or not set(own) <= set(whole):
        return None
    return PlainConfig(_merged(whole, preset.contents), choices, preset.has_sweep)


def _merged(config: dict[str, Any], contents: Sequence[dict[Any, Any]]) -> dict[str, Any]:
    found: dict[Any, Any] | None = config
    for content in contents:
        found = None if found is None else _over(found, content)
    if found is None:  # OmegaConf says what becomes of a text that stands for a node, or for none yet
        whole = OmegaConf.create(config)
        for content in contents:
            whole.merge_with(OmegaConf.create(content))
        merged = OmegaConf.to_container(whole)
        assert isinstance(merged, dict)
        found = merged
    return {str(key): value for key, value in found.items()}


def _over(below: dict[Any, Any], above: dict[Any, Any]) -> dict[Any, Any] | None:
    """Both, mappings key by key; None if that is left to OmegaConf.

    As OmegaConf merges plain values, which takes it a tenth of a second for a preset.
    """
    found = dict(below)
    for key, value in above.items():
        there = found.get(key)
        if value == "???" or (isinstance(there, str) and "${" in there):
            return None
        if isinstance(there, dict) and isinstance(value, dict):
            inner = _over(there, value)
            if inner is None:
                return None
            found[key] = inner
        elif isinstance(there, dict | list) and isinstance(value, dict | list) and type(there) is not type(value):
            return None  # which it refuses
        else:
            found[key] = value
    return found


def _parts(
    group: str,
    name: str,
    find: Find,
    chosen: Mapping[str, str],
    place: str,
    parents: tuple[tuple[str, str], ...] = (),
) -> _Preset | None:
    """What a file of a group says, and those that it starts from or has at a place within; None if it has other defaults.

    Args:
        chosen: other names, by ``group@place``.
        place: the dotted key where its content goes.
    """
    loaded = _content(*find(group, name))
    if loaded is None or (group, name) in parents:
        return None
    parts = _Preset()
    for entry in _before_self(loaded.get("defaults", [])):
        other, base = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else ("", entry)
        told = re.fullmatch(r"/(\w+)@([\w.]+)", other)
        if not isinstance(base, str) or not (told or not other):
            return None
        inner = [] if told is None or told[2] == "_here_" else told[2].split(".")
        there = ".".join([place, *inner])
        key = f"{told[1]}@{there}" if told else ""
        base = chosen.get(key, base)
        if not NAME.fullmatch(base) or key in parts.choices:
            return None
        found = _parts(told[1] if told else group, base, find, chosen, there, (*parents, (group, name)))
        if found is None or parts.choices.keys() & found.choices.keys():
            return None
        parts.contents += [_nested(content, inner) for content in found.contents]
        parts.choices |= ({key: base} if told else {}) | found.choices
    parts.contents.append({key: value for key, value in loaded.items() if key != "defaults"})
    return parts


def _nested(content: dict[Any, Any], path: Sequence[str]) -> dict[Any, Any]:
    for step in reversed(path):
        content = {step: content}
    return content


def _before_self(entries: Sequence[Any]) -> Sequence[Any]:
    """The defaults of a file above which its own content goes, as it does if it does not say so."""
    return entries[:-1] if entries and entries[-1] == "_self_" else entries


def _preset(group: str, name: str, find: Find, parents: tuple[str, ...] = ()) -> _Preset | None:
    """What a file for the whole config says, and those it starts from; None if it is none, or says more than choices."""
    loaded = _content(*find(group, name), package="_global_")
    if loaded is None or name in parents:
        return None
    content = {key: value for key, value in loaded.items() if key not in ("defaults", "hydra")}
    preset = _Preset(contents=[content])
    bases = []
    for entry in _before_self(loaded.get("defaults", [])):
        if isinstance(entry, str) and NAME.fullmatch(entry) and not preset.choices:
            bases.append(entry)
            continue
        told = re.fullmatch(r"override /([\w/]+)", next(iter(entry))) if isinstance(entry, dict) else None
        if told is None or len(entry) != 1 or told[1] in preset.choices or not isinstance(entry[told[0]], str):
            return None
        preset.choices[told[1]] = entry[told[0]]
    hydra = loaded.get("hydra", {"sweeper": {"params": None}})
    if list(hydra) != ["sweeper"] or list(hydra["sweeper"]) != ["params"]:
        return None
    preset.has_sweep = bool(hydra["sweeper"]["params"])
    for base in reversed(bases):
        found = _preset(group, base, find, (*parents, name))
        if found is None:
            return None
        preset.choices = {**found.choices, **preset.choices}
        preset.contents = [*found.contents, *preset.contents]
        preset.has_sweep |= found.has_sweep
    return preset


@functools.lru_cache(maxsize=1024)
def _content(path: str, *stamp: int, package: str = "") -> dict[Any, Any] | None:
    """What a file holds; None if it is missing, has a header for Hydra other than for this package, or is no mapping."""
    if not path:
        return None
    text = Path(path).read_text(encoding="utf-8")
    if package and not text.startswith(f"# @package {package}\n"):
        return None
    if len(re.findall(r"^\s*#\s*@", text, re.MULTILINE)) != bool(package):
        return None
    with open(path, encoding="utf-8") as file:  # whose name errors tell
        content = yaml.load(file, _loader())
    return {} if content is None else content if isinstance(content, dict) else None


@functools.cache
def _loader() -> type[Any]:
    """OmegaConf's rules for YAML, by libyaml where it is there, which takes a tenth of the time."""
    rules: type[Any] = get_yaml_loader()
    if not yaml.__with_libyaml__:
        return rules
    from yaml.cyaml import CParser  # type: ignore[attr-defined]

    class Loader(CParser, rules):  # type: ignore[misc]
        def __init__(self, stream: IO[str]) -> None:
            CParser.__init__(self, stream)
            SafeConstructor.__init__(self)
            Resolver.__init__(self)

    return Loader
