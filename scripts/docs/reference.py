"""Reference pages of the config, written from what decides: the YAML files, signatures and docstrings.

    python scripts/docs/reference.py merging          # one page, to look at

A key's row has its default from the YAML, what is allowed from the annotation, and what it means from the comment above or
beside it in the YAML, or from the docstring of what it builds.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from hybridfl.build import EMPTY, Range, locate, signature_of
from hybridfl.config import GROUPS, choices, conf_dir
from hybridfl.models.options import ModelOptions
from hybridfl.plan import Settings
from hybridfl.runs import flattened

ABOUT = {
    "dataset": "What the examples are.",
    "partitioning": "Which client owns which training examples.",
    "server_data": "What the server owns.",
    "clients": "How many clients there are and how they behave.",
    "model": "The net. Any model takes the keys of the first table too.",
    "client_optimizer": "Local work: optimiser, batches and amount.",
    "augmentation": "What training steps see instead of the examples as they are; never measurements, validation or test.",
    "merging": "The method under study.",
    "baseline": "A rival in its place; `none` leaves `merging` in charge.",
    "topology": "Who talks to whom.",
    "executor": "Who does the work; the method never knows.",
    "tracker": "Where else a run's numbers are shown while it works.",
    "experiment": "Presets: settings of several groups, and what is claimed of their runs.",
}
WORDS = {int: "whole number", float: "number", bool: "true, false", str: "text", type(None): "null"}
KEY = re.compile(r"^(?P<indent> *)(?P<key>[\w.*?\"-]+|\"[^\"]+\"):(?P<rest>.*)$")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
ENTRY = re.compile(r"^ {4,8}(?P<names>\w+(?:, \w+)*): (?P<text>.*)$")


def pages() -> dict[str, str]:
    """Path below the documentation → Markdown: an index, the keys at the top, and a page for every config group."""
    found = {"reference/index.md": _index(), "reference/settings.md": _settings()}
    return found | {f"reference/{group}.md": page(group) for group in GROUPS}


def page(group: str) -> str:
    """The page of a config group: a section for every choice."""
    lines = [f"# {group}", "", ABOUT.get(group, ""), "", f"    hybridfl list {group}", ""]
    if group == "model":
        lines += _table(_options(ModelOptions, dataclasses.asdict(ModelOptions()), {}))
    for name, file in choices(group).items():
        lines += _choice(group, name, file)
    return "\n".join(lines).rstrip() + "\n"


def _index() -> str:
    lines = [
        "# Reference",
        "",
        "Written from the code when this site is built.",
        "",
        "| group | what it decides | choices |",
    ]
    lines += ["|---|---|---|", "| [keys at the top](settings.md) | seed, rounds, start, evaluation, device | |"]
    for group in GROUPS:
        names = ", ".join(f"[`{name}`]({group}.md#{group}-{name})" for name in choices(group))
        lines.append(f"| [`{group}`]({group}.md) | {ABOUT.get(group, '')} | {names} |")
    return "\n".join(lines) + "\n"


def _settings() -> str:
    text = (conf_dir() / "config.yaml").read_text(encoding="utf-8")
    values = {key: value for key, value in yaml.safe_load(text).items() if key != "defaults"}
    defaults = yaml.safe_load(text)["defaults"]
    chosen = ", ".join(f"`{g}={name}`" for entry in defaults if isinstance(entry, dict) for g, name in entry.items())
    head = ["# Keys at the top", "", f"The choices without any override are {chosen}.", ""]
    return "\n".join([*head, *_table(_options(Settings, values, comments(text)))]) + "\n"


def _choice(group: str, name: str, file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8")
    node: dict[str, Any] = yaml.safe_load(text) or {}
    # The name of the group keeps the anchors of two tables of contents apart.
    lines = [f"## `{name}` {{ #{group}-{name} }}", "", _escaped(_first_comment(text)), ""]
    brought = [entry for entry in node.pop("defaults", []) if entry != "_self_"]
    node.pop("hydra", None)
    target = node.pop("_target_", None)
    if brought and group != "experiment":  # which shows its whole file
        told = ", ".join(
            f"`{e}`" if isinstance(e, str) else ", ".join(f"`{k}: {v}`" for k, v in e.items()) for e in brought
        )
        lines += [f"Begins with {told}; the keys below are its own.", ""]
    if target is None:  # a preset, or a file that only changes another one
        told = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        return [*lines, *(["```yaml", told.strip(), "```", ""] if node and group == "experiment" else _changes(node))]
    built = locate(str(target), file.stem)
    lines += [*_docstring(built), f"`_target_: {target}`", ""]
    return lines + _table(_options(built, node, comments(text)))


def _changes(node: Mapping[str, Any]) -> list[str]:
    """A table of what a file has in place of what it begins with."""
    rows = [f"| `{key}` | `{_shown(value)}` |" for key, value in flattened(node)]
    return ["| key | value |", "|---|---|", *rows, ""] if rows else []


Option = tuple[str, str, str, str]
"""Of a key: its name, default, what is allowed, and what it means."""


def _options(
    target: Callable[..., Any], values: Mapping[str, Any], told: Mapping[str, str], prefix: str = ""
) -> list[Option]:
    """The keys of a node, those of options within options with dots."""
    _, hints = signature_of(target)
    documented = attributes(target)
    found: list[Option] = []
    for key, value in values.items():
        hint, place = hints.get(key, EMPTY), f"{prefix}{key}"
        text = told.get(place) or documented.get(key, "")
        group = next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)
        if isinstance(value, dict) and value and "_target_" not in value and isinstance(group, type):
            if text:
                found.append((place, "", "", text))
            found += _options(group, value, told, f"{place}.")
        else:
            found.append((place, _shown(value), allowed(hint), text))
    return found


def _table(options: Sequence[Option]) -> list[str]:
    if not options:
        return []
    rows = [
        (f"`{key}`", f"`{value}`" if value else "", _escaped(kind), _escaped(text))
        for key, value, kind, text in options
    ]
    return [
        "| key | default | allowed | meaning |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _shown(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _escaped(text: str) -> str:
    """Nothing in it is taken for the end of a cell, for HTML or for emphasis."""
    return re.sub(r"([|<>*_\[\]])", r"\\\1", text)


# -- what is allowed -------------------------------------------------------------------------------------------------


def allowed(annotation: Any) -> str:
    """An annotation in words: ``number > 0, or null``."""
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    if origin is Annotated:
        bounds = [_bounds(constraint) for constraint in args[1:] if isinstance(constraint, Range)]
        return " ".join([allowed(args[0]), *filter(None, bounds)])
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        members = [allowed(member) for member in args if member is not type(None)]
        told = " or ".join(dict.fromkeys(filter(None, members)))
        return f"{told}, or null" if type(None) in args else told
    if origin in (tuple, list, Sequence) or getattr(origin, "__name__", "") == "Sequence":
        inner = allowed(args[0]) if args else ""
        return f"list of: {inner}" if inner else "list"
    if origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping":
        return "mapping"
    if isinstance(annotation, type) and annotation is not EMPTY and annotation is not object:
        return "options" if dataclasses.is_dataclass(annotation) else "config group"
    return ""


def _bounds(bounds: Range) -> str:
    marks = [("≥", bounds.low), (">", bounds.above), ("≤", bounds.high), ("<", bounds.below)]
    return ", ".join(f"{mark} {number:g}" for mark, number in marks if number is not None)


# -- what is said ----------------------------------------------------------------------------------------------------


def comments(text: str) -> dict[str, str]:
    """Of a YAML file the comment of every key, by its dotted name: the lines above it, or what stands beside it."""
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    above: list[str] = []
    for number, line in enumerate(text.splitlines()):
        if line.lstrip().startswith("#"):
            # The first comment tells of the whole file.
            above += [line.strip("# ")] if number and "# @package" not in line else []
            above = [] if number == 1 and text.startswith("# @package") else above
            continue
        match = KEY.match(line)
        if match is None:
            above = [] if not line.strip() else above
            continue
        indent = len(match["indent"])
        while parents and parents[-1][0] >= indent:
            parents.pop()
        parents.append((indent, match["key"].strip('"')))
        beside = re.search(r"\s# (.*)$", QUOTED.sub("", match["rest"]))
        told = [*above, *([beside[1]] if beside else [])]
        if told:
            found[".".join(key for _, key in parents)] = " ".join(told)
        above = []
    return found


def attributes(target: Callable[..., Any]) -> dict[str, str]:
    """What a docstring says of single attributes or arguments."""
    found: dict[str, str] = {}
    documents = [inspect.getdoc(target) or "", inspect.getdoc(getattr(target, "__init__", target)) or ""]
    for document in documents:
        names: list[str] = []
        inside = False
        for line in document.splitlines():
            if line.strip() in ("Attributes:", "Args:"):
                inside, names = True, []
            elif line and not line.startswith(" "):
                inside = False
            elif inside and (match := ENTRY.match(line)):
                names = match["names"].split(", ")
                found |= dict.fromkeys(names, match["text"])
            elif inside and names and line.strip():
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return {name: _plain(text) for name, text in found.items()}


def _docstring(target: Callable[..., Any]) -> list[str]:
    """The text before the sections on attributes, and nothing inherited."""
    document = inspect.cleandoc(target.__doc__ or "")
    text = re.split(r"^(?:Attributes|Args|Raises|Returns):", document, flags=re.MULTILINE)[0].strip()
    if not text or text.startswith(f"{getattr(target, '__name__', '')}("):  # the signature, which dataclasses give
        return []
    return [_escaped(_plain(text)), ""]


def _plain(text: str) -> str:
    """Without the marks of reStructuredText."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"\1", text)
    return text.replace("``", "")


def _first_comment(text: str) -> str:
    lines = [line for line in text.splitlines() if not line.startswith("# @package")]
    return lines[0].lstrip("# ") if lines and lines[0].startswith("#") else ""


if __name__ == "__main__":
    print("\n".join(page(group) for group in sys.argv[1:] or GROUPS))
