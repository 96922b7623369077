"""Errors meant for people: one readable message, an exit status, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HybridflError(Exception):
    """Something went wrong that the user can understand; exit status 1."""

    exit_status = 1


class ConfigError(HybridflError):
    """Wrong input, found before the first round; exit status 2.

    Args:
        key: the config key as the user would type it, such as ``clients.per_round``.
        problem: what is wrong with its value and what would be right.
    """

    exit_status = 2

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem

    def under(self, prefix: str) -> ConfigError:
        """The same error seen from a node further up, ``prefix`` put before the key."""
        key = ".".join(part for part in (prefix, self.key) if part)
        return type(self)(key, self.problem)

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}" if self.key else self.problem


class DataError(HybridflError):
    """A data file is missing, truncated or not what it claims to be; exit status 2."""

    exit_status = 2


def nearest(value: object, choices: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """A sentence that names the valid choice closest to ``value`` and lists them all, or only those ``listed``."""
    valid = sorted(set(choices))
    if not valid:
        return ""
    close = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    valid = sorted(set(listed)) if listed is not None else valid
    shown = ", ".join(valid[:30]) + (", …" if len(valid) > 30 else "")
    return f"{hint}Valid: {shown}."
