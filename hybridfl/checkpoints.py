"""Checkpoints of a run: the whole state after a round in one file that `torch.load(…, weights_only=True)` reads.

A file is called ``round-000012-<first 16 digits of the sha256 of its bytes>.pt``, so damage is seen before it is used.
The newest two are kept: if the last one is damaged, the run goes on from the one before.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hybridfl.store import StoreError, readable_errors, remove_leftovers, write_bytes_atomic

FORMAT = 1
MARK = "__hybridfl__"  # the key under which a packed NamedTuple keeps its name
NAMED_TUPLES = ("Model",)  # the NamedTuples of hybridfl/types.py that a state may hold
_NAME = re.compile(r"round-(-?\d{5,})-([0-9a-f]{16})\.pt")
_LONGEST_INT = 2000  # bits: torch's safe reader takes no longer ones


def save(folder: Path, round: int, state: object, keep: int = 2) -> Path:
    """Writes a checkpoint, then removes those before it but the newest ``keep`` (this one among them) and damaged ones.

    Tensors are stored on the CPU, without the rest of a larger storage they may be a view of; those that several places
    of the state share are stored once. Strides of dense tensors are kept; autograd history is not.

    Raises:
        StoreError: the state holds something that cannot be stored, with its path in the message, or the file cannot be
            written; earlier checkpoints are untouched then.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "round": round, "state": pack(state)}, buffer)
    with readable_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with buffer.getbuffer() as data:
        path = folder / f"round-{round:06d}-{hashlib.sha256(data).hexdigest()[:16]}.pt"
        write_bytes_atomic(path, data)
    _prune(path, round, keep)
    return path


def load_latest(
    folder: Path, device: torch.device | str = "cpu", on_note: Callable[[str], None] | None = None
) -> tuple[int, Any, list[str]] | None:
    """The newest checkpoint that is whole: its round, its state on ``device``, and a note for each one skipped.

    None if there is none; ``on_note`` hears the notes in that case too. Nothing is deleted.

    Raises:
        StoreError: the folder cannot be read.
    """
    notes: list[str] = []
    for path in reversed(_files(folder)):
        try:
            payload = _read(path)
        except _Unusable as problem:
            notes.append(f"Checkpoint {path} is skipped: {problem}.")
            if on_note:
                on_note(notes[-1])
            continue
        return payload["round"], unpack(payload["state"], device), notes
    return None


def pack(state: object) -> Any:
    """The state as plain dicts, lists, numbers, strings and compact CPU tensors.

    Raises:
        StoreError: it holds anything else; the message names where, such as ``state.atlas[3].update``.
    """
    try:
        return _Packer().value(state, "state")
    except RecursionError:
        raise StoreError("The state cannot be stored: it contains itself, or is nested too deeply.") from None


def unpack(packed: Any, device: torch.device | str = "cpu") -> Any:
    """What `pack` was given, its tensors on ``device``, each of them once however many places share it.

    Raises:
        StoreError: it holds a NamedTuple that this version does not know.
    """
    return _unpack(packed, torch.device(device), {})


# -- state <-> plain data ---------------------------------------------------------------------------------------------


class _Packer:
    def __init__(self) -> None:
        self._tensors: dict[tuple[object, ...], Tensor] = {}

    def value(self, value: object, where: str) -> Any:
        # Exact types: a subclass (numpy.float64, OrderedDict, an enum) would not come back as itself.
        if value is None or type(value) in (bool, float, str):
            return value
        if type(value) is int and value.bit_length() <= _LONGEST_INT:
            return value
        if type(value) in (Tensor, torch.nn.Parameter):
            return self.tensor(value, where)  # type: ignore[arg-type]
        if type(value) is list:
            return [self.value(item, f"{where}[{index}]") for index, item in enumerate(value)]
        if type(value) is dict:
            return {self.key(key, where): self.value(item, _below(where, key)) for key, item in value.items()}
        if isinstance(value, tuple) and _named_tuple(name := type(value).__name__) is type(value):
            fields = cast(Any, value)._asdict()
            return {MARK: name} | {field: self.value(item, f"{where}.{field}") for field, item in fields.items()}
        raise StoreError(
            f"{where} cannot be stored: {_describe(value)}. "
            "A state holds dicts, lists, tensors, int, float, bool, str, None and Model."
        )

    def key(self, key: object, where: str) -> object:
        if key == MARK:
            raise StoreError(f"{where} cannot be stored: the key {MARK!r} is reserved.")
        if type(key) not in (str, int):
            raise StoreError(f"{where} cannot be stored: its key {key!r} is {_describe(key)}; use str or int.")
        self.value(key, _below(where, key))  # an int may be too long
        return key

    def tensor(self, tensor: Tensor, where: str) -> Tensor:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise StoreError(f"{where} cannot be stored: only dense tensors with data can, not {_describe(tensor)}.")
        identity = _identity(tensor)
        if identity not in self._tensors:
            self._tensors[identity] = _compact(tensor)
        return self._tensors[identity]


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same numbers in the same memory (empty ones have no memory to compare)."""
    if tensor.numel() == 0:
        return (id(tensor),)
    memory = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.dtype)
    return (*memory, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())


def _compact(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    # torch.save writes the storage, not the tensor. One that fills its storage needs no copy.
    fills = tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size()
    return tensor if fills else tensor.clone()


def _unpack(packed: Any, device: torch.device, moved: dict[int, Tensor]) -> Any:
    if isinstance(packed, Tensor):
        if id(packed) not in moved:
            moved[id(packed)] = packed.to(device)
        return moved[id(packed)]
    if isinstance(packed, list):
        return [_unpack(item, device, moved) for item in packed]
    if not isinstance(packed, dict):
        return packed
    items = {key: _unpack(item, device, moved) for key, item in packed.items()}
    if MARK not in items:
        return items
    kind = _named_tuple(name := items.pop(MARK))
    if kind is None:
        raise StoreError(f"The checkpoint holds a {name}, which this version of hybridfl does not know.")
    return kind(**items)


def _named_tuple(name: str) -> Any:
    if name not in NAMED_TUPLES:
        return None
    import hybridfl.types  # late: reading a state without models must not need the nouns of a method

    return getattr(hybridfl.types, name)


def _below(where: str, key: object) -> str:
    return f"{where}.{key}" if isinstance(key, str) and key.isidentifier() else f"{where}[{key!r}]"


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.layout} {value.dtype} tensor on {value.device}"
    if type(value) is int:
        return f"an integer of {value.bit_length()} bits, more than {_LONGEST_INT}"
    kind = type(value)
    return f"a {kind.__qualname__}" if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__qualname__}"


# -- files ------------------------------------------------------------------------------------------------------------


class _Unusable(Exception):
    """Why a checkpoint is passed over."""


def _files(folder: Path) -> list[Path]:
    """The checkpoints there are, oldest first; of two of the same round the one written last is the newer."""
    with readable_errors(folder, "read"):
        try:
            found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
            keyed = [(int(match[1]), path.stat().st_mtime_ns, path) for match, path in found if match]
        except FileNotFoundError:
            return []
    return [path for _, _, path in sorted(keyed)]


def _read(path: Path) -> dict[str, Any]:
    try:
        intact, data = _intact(path), path.read_bytes()
    except OSError as error:
        raise _Unusable(f"it cannot be read ({error.strerror})") from None
    if not intact:
        raise _Unusable("it is damaged, its checksum does not match")
    try:
        # On the CPU first: a device that is missing or full says nothing about the file.
        payload = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        if payload["format"] == FORMAT and payload["round"] == _round(path):
            return dict(payload)
    except MemoryError:
        raise
    except Exception as error:  # torch and pickle raise almost anything on bytes that are no checkpoint
        raise _Unusable(f"torch cannot read it ({type(error).__name__})") from None
    raise _Unusable("it was written by another version of hybridfl")


def _prune(newest: Path, round: int, keep: int) -> None:
    """Removes what is not needed any more. Whole checkpoints of later rounds stay: their rounds were computed once."""
    kept = 1
    for path in reversed(_files(newest.parent)):
        with suppress(OSError):  # a file that cannot be removed now is tried again at the next save
            if path == newest or (_round(path) > round and _intact(path)):
                continue
            # Only whole ones count, or a damaged one would push out the one to fall back on.
            if _round(path) < round and kept < keep and _intact(path):
                kept += 1
                continue
            path.unlink()


def _intact(path: Path) -> bool:
    match = _NAME.fullmatch(path.name)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return match is not None and match[2] == found


def _round(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
