"""Who talks to whom. A server and its clients are a star; peers come with methods that need them."""

from __future__ import annotations

from dataclasses import dataclass

from hybridfl.types import Method


@dataclass(frozen=True)
class Auto:
    """The topology the method was made for."""

    def name_for(self, method: Method) -> str:
        return method.topology


@dataclass(frozen=True)
class Star:
    """Clients that talk to a server."""

    def name_for(self, method: Method) -> str:
        return "star"
