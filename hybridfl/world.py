"""Where a process stands among those that ``torchrun`` started together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hybridfl.errors import ConfigError


class World(NamedTuple):
    """Where this process stands among those started together.

    Attributes:
        rank, size: which of how many.
        local: which of those on this machine.
        address, port: where they meet.
    """

    rank: int
    size: int
    local: int
    address: str
    port: int


def world_of(environment: Mapping[str, str]) -> World | None:
    """What ``torchrun`` says in the environment; None for a process by itself.

    Raises:
        ConfigError: a part of it is missing or no number.
    """
    if environment.get("WORLD_SIZE", "1") == "1" or "RANK" not in environment:
        return None
    try:
        rank, size, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local = int(environment.get("LOCAL_RANK", rank))
        return World(rank, size, local, environment["MASTER_ADDR"], port)
    except (KeyError, ValueError) as error:
        problem = f"RANK and WORLD_SIZE are set, but the rest is not as torchrun sets it ({error})"
        raise ConfigError("executor", f"{problem}; start with torchrun, or unset RANK and WORLD_SIZE.") from error
