"""Short messages between processes, each with at most one descriptor of a file or a socket.

What is long lies in a parcel, so that nobody ever waits for a reader to make room.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_FORM = struct.Struct("<Bqq")


class Kind(enum.IntEnum):
    """What a message is about, and what its number and descriptor are.

    To the template process: FORK a worker at this end of a socket, REAP a child by its process id. Its answers: FORKED the
    process id, REAPED the status of its end. To a worker: POOL, NETS and TASKS in parcels, WORK on a task by its number,
    FORGET the tasks. Its answers to WORK: DONE or FAILED, in a parcel.
    """

    FORK = 0
    REAP = 1
    FORKED = 2
    REAPED = 3
    POOL = 4
    NETS = 5
    TASKS = 6
    WORK = 7
    FORGET = 8
    DONE = 9
    FAILED = 10


class Gone(Exception):
    """The other end is closed: the process there has ended."""


def send(to: socket.socket, kind: Kind, number: int = 0, fd: int | None = None) -> None:
    """Send a message.

    Raises:
        Gone: nobody can receive it.
    """
    text = _FORM.pack(kind, number, fd is not None)
    try:
        if fd is None:
            to.sendall(text)
        else:
            socket.send_fds(to, [text], [fd])
    except OSError as error:
        raise Gone from error


@contextmanager
def received(source: socket.socket) -> Iterator[tuple[Kind, int, int]]:
    """The next message's kind, number and descriptor (-1 for none), which is closed after the block.

    Raises:
        Gone: there will be none.
    """
    text, fds = b"", list[int]()
    while len(text) < _FORM.size:
        try:
            piece, more, _, _ = socket.recv_fds(source, _FORM.size - len(text), 1)
        except OSError as error:
            raise Gone from error
        if not piece:
            raise Gone
        text, fds = text + piece, fds + more
    kind, number, _ = _FORM.unpack(text)
    try:
        yield Kind(kind), number, fds[0] if fds else -1
    finally:
        for fd in fds:
            os.close(fd)
