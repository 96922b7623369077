"""How a command line is read."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import NoReturn

from hybridfl.errors import ConfigError, nearest


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a line as all of the program does, in one message that names the argument."""

    def error(self, message: str) -> NoReturn:
        what, _, rest = message.partition(": ")
        if what == "unrecognized arguments":
            name = rest.split()[0].partition("=")[0]
            raise ConfigError(name, self._unknown(name))
        if what.endswith("are required"):
            raise ConfigError(rest, f"is missing; `{self.prog} --help` explains it.")
        if wrong := re.fullmatch(r"invalid choice: '(.*)' \(choose from (.*)\)", rest):
            valid = [choice.strip("'") for choice in wrong[2].split(", ")]
            rest = f"got '{wrong[1]}'. {nearest(wrong[1], valid)}"
        elif wrong := re.fullmatch(r"invalid (float|int) value: ('.*')", rest):
            rest = f"got {wrong[2]}: expected {'a number' if wrong[1] == 'float' else 'a whole number'}."
        raise ConfigError(what.removeprefix("argument "), f"{rest.removesuffix('.')}.")

    def _unknown(self, name: str) -> str:
        if not name.startswith("-"):
            return f"is more than `{self.prog}` takes."
        options = [text for action in self._actions for text in action.option_strings if text.startswith("--")]
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        if not near and name.startswith("--") and any(action.dest == "overrides" for action in self._actions):
            hint = f"A config key has no dashes: {name.lstrip('-')}=VALUE. "
        return f"unknown option of `{self.prog}`. {hint}Valid: {', '.join(sorted(options))}."

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """What was typed, options before, between and after the rest."""
        if any(action.nargs == argparse.PARSER for action in self._actions):  # argparse cannot do both
            return self.parse_args(arguments)
        return self.parse_intermixed_args(arguments)
