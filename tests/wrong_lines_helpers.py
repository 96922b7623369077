"""What a mistake finds: files to be damaged, and how it is written down."""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cli_helpers import SMALL_DATA, SMALL_WORK, TINY
from PIL import Image
from safetensors.torch import load_file, save_file

DATA = "server_data.examples=10 clients.number=3 clients.per_round=2 data_root=data"
WORDS = {
    "TINY": " ".join(TINY),
    "WORK": " ".join(SMALL_WORK),
    "DATA": DATA,
    "ONE": f"pretrain {' '.join(SMALL_DATA)} rounds=1",
}
"""What stands in a row's line for several words; RUN and SWEEP are the names of folders."""


class Place(NamedTuple):
    """A folder with a finished run, a finished sweep and the weights ``w.safetensors`` of the run."""

    root: Path
    run: Path
    sweep: Path
    patch: pytest.MonkeyPatch


Prepare = Callable[[Place], object]


class Row(NamedTuple):
    """A mistake.

    Attributes:
        prepare: what is done in the place before, such as damage.
        line: what is typed after ``hybridfl``.
        parts: what the answer holds, the first one at its beginning.
        status: 1 where nothing is wrong with the input.
    """

    name: str
    prepare: Prepare | None
    line: str
    parts: tuple[str, ...]
    status: int = 2


# -- what is there before ---------------------------------------------------------------------------------------------


def file(name: str, content: str | bytes) -> Prepare:
    """A new or other file; RUN and SWEEP begin names of files in theirs."""

    def prepare(place: Place) -> None:
        path = at(place, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def cut(name: str, size: int) -> Prepare:
    """A file of which the rest is missing: so many bytes are there, or are not if it is negative."""

    def prepare(place: Place) -> None:
        for path in sorted(place.root.glob(str(at(place, name).relative_to(place.root)))):
            path.write_bytes(path.read_bytes()[:size])

    return prepare


def swapped(name: str, old: str, new: str) -> Prepare:
    def prepare(place: Place) -> None:
        text = at(place, name).read_text()
        assert old in text
        at(place, name).write_text(text.replace(old, new))

    return prepare


def exchanged(name: str, other: str) -> Prepare:
    """In the place of a file is another one."""
    return lambda place: shutil.copy(place.root / other, place.root / name)


def folder(name: str) -> Prepare:
    return lambda place: (place.root / name).mkdir(parents=True)


def gone(name: str) -> Prepare:
    def prepare(place: Place) -> None:
        path = at(place, name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def both(*steps: Prepare) -> Prepare:
    return lambda place: [step(place) for step in steps]


def at(place: Place, name: str) -> Path:
    first, _, rest = name.partition("/")
    return {"RUN": place.run, "SWEEP": place.sweep}.get(first, place.root / first) / rest


def mnist(place: Place) -> None:
    (place.root / "data/mnist").mkdir(parents=True)
    for part, number in (("train", 60), ("t10k", 40)):
        images = struct.pack(">4I", 2051, number, 28, 28) + bytes(number * 784)
        labels = struct.pack(">2I", 2049, number) + bytes(k % 10 for k in range(number))
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            (place.root / f"data/mnist/{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))


CIFAR = "data/cifar10/cifar-10-batches-py"


def cifar(place: Place) -> None:
    batch = {"data": np.zeros((20, 3072), dtype=np.uint8), "labels": [k % 10 for k in range(20)]}
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        file(f"{CIFAR}/{name}", pickle.dumps(batch, protocol=4))(place)


def npz(**arrays: object) -> Prepare:
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    return file("data/mnist_m/mnist_m.npz", content.getvalue())


IMAGES, LABELS = np.zeros((20, 32, 32, 3), dtype=np.uint8), np.arange(20) % 10
PARTS = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES, "y_test": LABELS}


def images(place: Place) -> None:
    for kind in ("cat", "dog"):
        for number in range(5):
            content = io.BytesIO()
            Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(content, "PNG")
            file(f"data/images/{kind}/{number}.png", content.getvalue())(place)


def member(name: str, content: str) -> Prepare:
    """A zip of the class cow with this one member."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(name, content)
    return both(images, file("data/images/cow.zip", packed.getvalue()))


class Evil:
    """A pickle of it would make a folder when it is read."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("pwned",)


def saved(value: object) -> Prepare:
    """By ``torch.save``, as ``e.pt``."""
    return lambda place: torch.save(value, place.root / "e.pt")


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Prepare:
    """``e.safetensors``, the run's weights changed."""

    def prepare(place: Place) -> None:
        found = load_file(place.root / "w.safetensors")
        save_file({name: change(tensor) for name, tensor in found.items()}, place.root / "e.safetensors")

    return prepare


def preset(text: str) -> Prepare:
    """A preset of the user's, ``experiment=mine``."""
    return file("c/experiment/mine.yaml", f"# @package _global_\n# Mine.\n{text}\n")


def claim(text: str) -> Prepare:
    return preset(f"claims: [{{id: a, text: told, better: fedavg, than: fedprox, {text}}}]")


def without(package: str, *modules: str) -> Prepare:
    """As if the package were not installed; the modules are imported anew."""

    def prepare(place: Place) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == package or name in modules]:
            place.patch.delitem(sys.modules, name)
        place.patch.setitem(sys.modules, package, None)

    return prepare


def frozen(place: Place) -> None:
    """Below ``frozen`` is a disk that can only be read."""
    mkdir = Path.mkdir

    def refused(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if "frozen" in path.parts:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        mkdir(path, mode, parents, exist_ok)

    place.patch.setattr(Path, "mkdir", refused)


def unfinished(place: Place) -> None:
    swapped("RUN/status.json", '"done"', '"running"')(place)
