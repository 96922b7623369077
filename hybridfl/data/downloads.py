"""What a reader may state about its files: where they lie, what they may be used for, where they come from.

``hybridfl data`` reads these attributes of its class. All are optional, for readers outside the package too::

    class Letters:
        licence: ClassVar[str] = "CC BY 4.0"
        downloads: ClassVar[tuple[Download, ...]] = (
            Download("https://example.org/letters.npz", "md5:ec16…", "letters/letters.npz"),
        )

A set without public files of this very form has ``files`` and ``by_hand`` in place of ``downloads``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from hybridfl.errors import ConfigError


def checksum(text: str) -> tuple[str, str]:
    """Algorithm and hex digits, both in lower case, of a checksum as :class:`Download` has it."""
    algorithm, _, digits = text.lower().rpartition(":")
    return algorithm or "sha256", digits


@dataclass(frozen=True)
class Download:
    """One public file.

    Args:
        url: its address, http or https.
        hash: its checksum in hex digits, SHA-256 unless another algorithm is named before it: ``md5:ec16…``.
        target: its place below the data root; of an archive, the folder that it is unpacked to.
        unpack: of a tar archive, packed by gzip, bzip2, xz or not at all: the files to take out of it, and the checksum
            of each. Nothing else in the archive is written.

    Raises:
        ValueError: a place is not below the data root, or a checksum is none.
    """

    url: str
    hash: str
    target: str
    unpack: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place in (self.target, *self.unpack):
            path = PurePosixPath(place)
            if path.is_absolute() or ".." in path.parts or not path.parts:
                raise ValueError(f"'{place}' is no place below the data root")
        for known in (self.hash, *self.unpack.values()):
            algorithm, digits = checksum(known)
            if algorithm not in hashlib.algorithms_guaranteed or len(digits) != 2 * hashlib.new(algorithm).digest_size:
                raise ValueError(f"'{known}' is no checksum; write algorithm:digits, or the 64 digits of SHA-256")

    @property
    def name(self) -> str:
        """The last part of the address, by which a mirror has it too."""
        return PurePosixPath(urlsplit(self.url).path).name

    @property
    def files(self) -> dict[str, str]:
        """What it becomes: places below the data root, and the checksum of each."""
        if not self.unpack:
            return {self.target: self.hash}
        return {f"{self.target}/{member}": known for member, known in self.unpack.items()}


@dataclass(frozen=True)
class About:
    """What one reader states.

    Attributes:
        licence: in a few words.
        downloads: the public originals, which ``load`` reads as they are.
        files: the files or folders that ``load`` reads, below the data root; those of ``downloads`` if not stated, ``()``
            if it needs none, ``None`` if neither is stated.
        by_hand: where no download can bring the files: a sentence that says where they are to be had.
    """

    licence: str = "unknown"
    downloads: tuple[Download, ...] = ()
    files: tuple[str, ...] | None = None
    by_hand: str = ""

    @classmethod
    def of(cls, reader: Any) -> About:
        """What the reader has among these attributes.

        Raises:
            ConfigError: an attribute is of the wrong type.
        """
        given = {name: getattr(reader, name) for name in cls.__dataclass_fields__ if hasattr(reader, name)}
        for name, value in given.items():
            kind = {"downloads": Download}.get(name, str)
            items = value if name in ("downloads", "files") else (value,)
            if not isinstance(items, tuple) or not all(isinstance(item, kind) for item in items):
                wanted = f"a tuple of {kind.__name__}" if items is value else "a text"
                raise ConfigError("_target_", f"{type(reader).__name__}.{name} is {value!r}, expected {wanted}.")
        if given.get("downloads") and "files" not in given:
            given["files"] = tuple(file for download in given["downloads"] for file in download.files)
        return cls(**given)
