"""Image files in folders or zips, such as PACS (Li, Yang, Song, Hospedales 2017, arXiv 1710.03077).

Two trees are read, each folder of the first level as it is or packed as a zip of the same name::

    ROOT/FOLDER/CLASS/IMAGE              first_level: class
    ROOT/FOLDER/DOMAIN/CLASS/IMAGE       first_level: domain

A file ``index.csv`` beside the first level says which image is train and which is test: columns ``class``, ``file`` (its
place inside the folder or zip of the first level), ``split`` (train or test), in a tree of domains ``domain``, and
optionally ``label``, the number of the class. Only the images it lists are read. Nothing is unpacked to disk.
"""

from __future__ import annotations

import csv
import io
import itertools
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hybridfl.build import PositiveInt, Range
from hybridfl.data.dataset import Dataset, Examples, advice, checked, readable
from hybridfl.errors import ConfigError, DataError, nearest

INDEX = "index.csv"
FORMATS = {"BMP", "GIF", "JPEG", "PNG", "PPM"}  # and no other: Pillow hands some, such as EPS, to other programs
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm"}
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}  # modes of at most 8 bits a channel
# ImageNet's, as usual for photographs: they must not depend on which files or domains are chosen.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = 0.459, 0.226


@dataclass(frozen=True)
class ImageFolder:
    """Images (red, green, blue, or grey) squeezed to a square, uint8. Examples are stored by domain, and within
    it by class and name or in the order of ``index.csv``. Labels number the sorted names of the classes of *all* domains,
    unless ``index.csv`` has labels.

    Args:
        folder: below the data root.
        first_level: what a folder or zip of the first level is.
        size: height and width in pixels; ``None`` keeps the images as they are, and all must be of one size.
        domains: which to read, in this order; ``None`` reads all.
        test_fraction: of each class in each domain, evenly spaced over the sorted names; without ``index.csv`` only.
        grey: one channel instead of three.
    """

    licence: ClassVar[str] = "that of your images"
    by_hand: ClassVar[str] = "The images are your own."

    folder: str = "images"
    first_level: Literal["class", "domain"] = "class"
    size: PositiveInt | None = 64
    domains: tuple[str, ...] | None = None
    test_fraction: Annotated[float, Range(above=0, below=1)] = 0.2
    grey: bool = False

    def __post_init__(self) -> None:
        if self.domains is None:
            return
        if self.first_level == "class":
            raise ConfigError("domains", f"got {list(self.domains)}: there are none unless first_level is domain.")
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ConfigError("domains", f"got {list(self.domains)}: expected one or more different names, or null.")

    @property
    def files(self) -> tuple[str, ...]:
        """What is read, below the data root."""
        return (self.folder,)

    def load(self, root: Path) -> Dataset:
        """Reads the images below ``root/folder``; errors as in :class:`~hybridfl.data.dataset.Reader`."""
        top = root / self.folder
        todo = advice(f"a folder or zip of images for every {self.first_level}", root, self.folder)
        entries = _entries(top, todo)
        chosen = self._chosen(entries)
        if (top / INDEX).exists():
            parts, numbers = self._listed(top / INDEX, chosen, todo)
        else:
            found = {name: self._pictures(entry) for name, entry in entries.items()}
            kinds = sorted({picture.kind for pictures in found.values() for picture in pictures})
            numbers = {kind: number for number, kind in enumerate(kinds)}
            parts = _held_out([found[name] for name in chosen], self.test_fraction)
        for part, pictures in zip(("train", "test"), parts, strict=True):
            if not pictures:
                raise DataError(f"{top}: there are no {part} images. Add images, or set another dataset.test_fraction.")
        train, test = self._read(chosen, parts, numbers)
        units = ((GREY_MEAN,), (GREY_STD,)) if self.grey else (MEAN, STD)
        mean, std = (tuple(255 * value for value in values) for values in units)
        domains = tuple(chosen) if self.first_level == "domain" else ()
        return Dataset(top.name, train, test, len(numbers), mean, std, domains)

    def _chosen(self, entries: dict[str, Path]) -> dict[str, Path]:
        for number, name in enumerate(self.domains or ()):
            if name not in entries:
                raise ConfigError(f"domains[{number}]", f"got '{name}'. {nearest(name, entries)}")
        return entries if self.domains is None else {name: entries[name] for name in self.domains}

    def _listed(self, index: Path, chosen: dict[str, Path], todo: str) -> tuple[list[list[Picture]], dict[str, int]]:
        """Train and test pictures by ``index.csv``, and the number of each class."""
        rows, numbers = _read_index(index, self.first_level)
        known = {picture for entry in chosen.values() for picture in self._pictures(entry)}
        rows = [row for row in rows if self.domains is None or row.picture.entry in chosen]
        for line, (entry, file, kind), _ in rows:
            if (entry, file, kind) not in known:
                raise DataError(f"{index}: line {line} lists {entry}/{file} of class {kind}: not there. {todo}")
        order = {name: place for place, name in enumerate(chosen)}
        rows.sort(key=lambda row: order[row.picture.entry])
        return [[row.picture for row in rows if row.split == part] for part in ("train", "test")], numbers

    def _pictures(self, entry: Path) -> list[Picture]:
        depth = 2 if self.first_level == "domain" else 1
        pictures = []
        for file in sorted(_names(entry)):
            *folders, image = file.split("/")
            if any(part.startswith((".", "__MACOSX")) for part in (*folders, image)):
                continue
            if Path(image).suffix.lower() not in SUFFIXES:
                continue
            if len(folders) != depth - 1 or "" in folders:
                wanted = "CLASS/IMAGE" if depth == 2 else "IMAGE"
                raise DataError(
                    f"{entry}: holds {file}, expected {wanted} as the first level is a {self.first_level}. Move the "
                    f"images, or set dataset.first_level={'class' if depth == 2 else 'domain'}."
                )
            pictures.append(Picture(_stem(entry), file, folders[0] if folders else _stem(entry)))
        if not pictures:
            raise DataError(f"{entry}: there are no images ({', '.join(sorted(SUFFIXES))}). Add some, or remove it.")
        return sorted(pictures, key=lambda picture: (picture.kind, picture.file))

    def _read(
        self, entries: dict[str, Path], parts: Sequence[Sequence[Picture]], numbers: dict[str, int]
    ) -> Iterator[Examples]:
        order = {name: number for number, name in enumerate(entries)} if self.first_level == "domain" else {}
        pixels: dict[Picture, NDArray[np.uint8]] = {}
        first: tuple[Path, tuple[int, ...]] | None = None
        wanted: dict[str, list[Picture]] = {}
        for picture in itertools.chain(*parts):
            wanted.setdefault(picture.entry, []).append(picture)
        for name, pictures in wanted.items():
            entry = entries[name]
            with _reading(entry) as content:
                for picture in pictures:
                    image = _decoded(content(picture.file), entry / picture.file, self.size, self.grey)
                    first = first or (entry / picture.file, image.shape)
                    if image.shape != first[1]:
                        raise DataError(
                            f"{entry / picture.file}: {_side(image.shape)} pixels, but {first[0]} has "
                            f"{_side(first[1])}. Set dataset.size."
                        )
                    pixels[picture] = image
        for part in parts:
            labels = np.array([numbers[picture.kind] for picture in part])
            images = np.stack([pixels.pop(picture) for picture in part])
            examples = checked(images, labels, len(numbers), self.folder)
            domains = np.array([order.get(picture.entry, 0) for picture in part], dtype=np.int64)
            yield Examples(examples.x, examples.y, domains)


class Picture(NamedTuple):
    """One image: the name of its folder or zip on the first level, its place in there, its class."""

    entry: str
    file: str
    kind: str


class Row(NamedTuple):
    """A line of ``index.csv``."""

    line: int
    picture: Picture
    split: str


def _entries(top: Path, todo: str) -> dict[str, Path]:
    """Folders and zips of the first level by name, sorted."""
    with readable(top, todo):
        paths = [path for path in sorted(top.iterdir()) if not path.name.startswith((".", "__MACOSX"))]
    entries: dict[str, Path] = {}
    for path in paths:
        if not path.is_dir() and path.suffix.lower() != ".zip":
            continue
        if _stem(path) in entries:
            raise DataError(f"{path}: {entries[_stem(path)].name} is there too. Remove one of them.")
        entries[_stem(path)] = path
    if not entries:
        raise DataError(f"{top}: holds no folder and no zip. {todo}")
    return dict(sorted(entries.items()))


def _stem(entry: Path) -> str:
    return entry.stem if entry.suffix.lower() == ".zip" and not entry.is_dir() else entry.name


def _names(entry: Path) -> list[str]:
    """Files in a folder or zip, ``/`` between the parts."""
    if entry.is_dir():
        return [path.relative_to(entry).as_posix() for path in entry.rglob("*") if path.is_file()]
    with _archive(entry) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


@contextmanager
def _archive(entry: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(entry)
    except Exception as error:  # a broken directory can raise nearly anything
        raise DataError(f"{entry}: no zip file or truncated ({error}). Put the original back.") from error
    with archive:
        yield archive


@contextmanager
def _reading(entry: Path) -> Iterator[Callable[[str], bytes]]:
    """A function from a file's place in a folder or zip to its bytes."""
    if entry.is_dir():
        yield lambda file: _content((entry / file).read_bytes, entry / file)
    else:
        with _archive(entry) as archive:
            yield lambda file: _content(lambda: archive.read(file), entry / file)


def _content(read: Callable[[], bytes], place: Path) -> bytes:
    try:
        return read()
    except Exception as error:  # OSError, BadZipFile, zlib.error, RuntimeError if encrypted, …
        raise DataError(f"{place}: cannot be read ({error}). Put the original back.") from error


def _decoded(content: bytes, place: Path, size: int | None, grey: bool) -> NDArray[np.uint8]:
    """``(C, H, W)``."""
    try:
        with Image.open(io.BytesIO(content), formats=sorted(FORMATS)) as image:
            mode = image.mode
            if mode in MODES:
                plain = image.convert("L" if grey else "RGB")
                if size is not None and plain.size != (size, size):
                    plain = plain.resize((size, size), Image.Resampling.BILINEAR)
                array: NDArray[Any] = np.asarray(plain, dtype=np.uint8)
    except Exception as error:  # broken images raise OSError, SyntaxError, ValueError, struct.error, …
        raise DataError(f"{place}: no image or truncated ({error}). Put the original back or remove it.") from error
    if mode not in MODES:
        raise DataError(f"{place}: pixels of mode {mode}, expected at most 8 bits a channel. Convert it first.")
    return array[None] if grey else array.transpose(2, 0, 1)


def _side(shape: tuple[int, ...]) -> str:
    return f"{shape[-1]}x{shape[-2]}"


def _held_out(groups: Sequence[Sequence[Picture]], fraction: float) -> list[list[Picture]]:
    """Train and test pictures; a class in a group, sorted by class, gives ``fraction`` of its own, rounded down."""
    train: list[Picture] = []
    test: list[Picture] = []
    for group in groups:
        for _, own in itertools.groupby(group, key=lambda picture: picture.kind):
            pictures = list(own)
            # The small number is against 0.29 * 100 = 28.999…
            steps = np.floor(np.arange(len(pictures) + 1) * fraction + 1e-9)
            for picture, step in zip(pictures, np.diff(steps), strict=True):
                (test if step else train).append(picture)
    return [train, test]


def _read_index(file: Path, first_level: str) -> tuple[list[Row], dict[str, int]]:
    """The rows of ``index.csv``, and the number of each class."""
    todo = "Put the original back, or remove it to split by dataset.test_fraction."
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            table = [(reader.line_num, row) for row in reader]
            columns = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read ({error}). {todo}") from error
    entry = "domain" if first_level == "domain" else "class"
    needed = sorted({entry, "class", "file", "split"})
    missing = [column for column in needed if column not in columns]
    if missing:
        raise DataError(f"{file}: has no column {', '.join(missing)}. {todo}")
    rows: dict[tuple[str, str], Row] = {}
    numbers: dict[str, int] = {}
    for line, cells in table:
        if None in cells or None in cells.values():
            raise DataError(f"{file}: line {line} has not {len(columns)} values. {todo}")
        if cells["split"] not in ("train", "test"):
            raise DataError(f"{file}: line {line} has split '{cells['split']}', expected train or test. {todo}")
        row = Row(line, Picture(cells[entry], cells["file"], cells["class"]), cells["split"])
        if rows.setdefault((row.picture.entry, row.picture.file), row) is not row:
            raise DataError(f"{file}: line {line} lists {cells[entry]}/{cells['file']} again. {todo}")
        label = cells.get("label", "0")
        if not label.isdecimal() or numbers.setdefault(cells["class"], int(label)) != int(label):
            raise DataError(f"{file}: line {line} has label '{label}', no number or not its class's. {todo}")
    if "label" not in columns:
        numbers = {kind: number for number, kind in enumerate(sorted(numbers))}
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise DataError(f"{file}: the labels of the {len(numbers)} classes are not 0 to {len(numbers) - 1}. {todo}")
    return list(rows.values()), numbers
