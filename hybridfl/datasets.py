"""The choices of the config group ``dataset``: what each is, and whether its files are there and whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hybridfl.build import convert
from hybridfl.config import Composer
from hybridfl.data.dataset import Dataset, Reader, sound
from hybridfl.data.downloads import About
from hybridfl.errors import ConfigError, HybridflError
from hybridfl.progress import megabytes

State = Literal["present", "missing", "broken", "built in"]
HEADER = ("name", "state", "train", "test", "image", "classes", "size", "fingerprint", "fetch", "licence")
NUMBERS = ("train", "test", "classes", "size")


@dataclass(frozen=True)
class Entry:
    """A choice of the group as it was found.

    Attributes:
        state: ``missing``: none of its files is there, or an option of its YAML is the user's to give.
        cells: of what could be read, by the names of :data:`HEADER`.
        problem: why it could not be read.
    """

    name: str
    state: State
    about: About = field(default_factory=About)
    cells: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Choice:
    """A choice of the group with the default options of its YAML.

    Attributes:
        node: its config.
        about: what its reader states.
    """

    name: str
    node: Mapping[str, Any]
    reader: Reader
    about: About

    @classmethod
    def of(cls, name: str, composer: Composer) -> Choice:
        """Builds the reader.

        Raises:
            ConfigError: an option is wrong, or the reader is none, or states something of the wrong type.
        """
        node = composer.compose([f"dataset={name}"]).config["dataset"]
        reader: Reader = convert(node, Reader, "dataset")
        with _under_dataset():
            return cls(name, node, reader, About.of(reader))

    def look(self, root: Path) -> Entry:
        """What is found below ``root``; what is wrong is told, not raised."""
        size = _size(self.about, root)
        try:
            with _under_dataset():
                dataset = sound(self.reader.load(root), self.node)
        except Exception as error:  # a reader of the user's may fail in any way
            state: State = "missing" if _is_absent(self.about, root, error) else "broken"
            return Entry(self.name, state, self.about, size, _told(error))
        state = "built in" if self.about.files == () else "present"
        return Entry(self.name, state, self.about, _numbers(dataset) | size)


def look(name: str, composer: Composer, root: Path) -> Entry:
    """The choice ``name`` as it is found below ``root``; what is wrong is told, not raised."""
    try:
        choice = Choice.of(name, composer)
    except Exception as error:  # and so may its module
        return Entry(name, "missing" if _is_unset(error) else "broken", problem=_told(error))
    return choice.look(root)


def table(entries: Sequence[Entry]) -> str:
    """One line an entry, and below what is broken about those that are."""
    rows = [HEADER, *(tuple(_cells(entry).get(name, "–") for name in HEADER) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.rjust if name in NUMBERS else str.ljust for name in HEADER]
    lines = ["  ".join(s(c, w) for s, c, w in zip(sides, row, widths, strict=True)).rstrip() for row in rows]
    broken = [f"{entry.name}: {entry.problem}" for entry in entries if entry.state == "broken"]
    return "\n".join([*lines, *(["", *broken] if broken else [])])


def summary(entry: Entry) -> str:
    """An entry that could be read, as a sentence."""
    told = _cells(entry)
    return (
        f"{entry.name}: {told['train']} train and {told['test']} test examples {told['image']} of {told['classes']} classes, "
        f"{told['size']}, licence: {told['licence']}, fingerprint {told['fingerprint']}"
    )


def _cells(entry: Entry) -> dict[str, str]:
    stated = entry.about
    fetched = "–" if stated.files == () else "yes" if stated.downloads else "by hand" if stated.by_hand else "no"
    return {"name": entry.name, "state": entry.state, "fetch": fetched, "licence": stated.licence, **entry.cells}


@contextmanager
def _under_dataset() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise error.under("dataset") from error


def _numbers(dataset: Dataset) -> dict[str, str]:
    return {
        "train": f"{len(dataset.train):,}",
        "test": f"{len(dataset.test):,}",
        "image": "x".join(map(str, dataset.train.x.shape[1:])),
        "classes": str(dataset.classes),
        "fingerprint": dataset.fingerprint,
    }


def _size(stated: About, root: Path) -> dict[str, str]:
    """What its files take on disk, if any is there."""
    files = {file for place in stated.files or () for file in _below(root / place) if os.path.isfile(file)}
    return {"size": megabytes(sum(map(os.path.getsize, files)))} if files else {}


def _below(place: Path) -> Iterator[str]:
    yield str(place)
    for folder, _, names in os.walk(place):
        yield from (os.path.join(folder, name) for name in names)


def _is_absent(stated: About, root: Path, error: Exception) -> bool:
    """Whether nothing is there; a reader that does not state its files has to say it by its error."""
    if stated.files is None:
        return isinstance(error, FileNotFoundError) or isinstance(error.__context__, FileNotFoundError)
    return bool(stated.files) and not any(os.path.exists(root / place) for place in stated.files)


def _is_unset(error: Exception) -> bool:
    """Whether the YAML leaves an option to the user, by ``???``."""
    from omegaconf.errors import MissingMandatoryValue

    return isinstance(error.__cause__, MissingMandatoryValue)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, HybridflError) else f"{type(error).__name__}: {error}"
