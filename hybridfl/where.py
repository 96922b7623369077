"""Which of the stored runs a table is about: conditions on config keys, as ``hybridfl compare --where`` takes them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybridfl.errors import ConfigError, nearest
from hybridfl.keys import check_key, label, token
from hybridfl.runs import ABSENT, Run, to_stderr

OPTION = "--where"
FORM = re.compile(r"\s*([^\s=<>!]+)\s*(>=|<=|!=|==?|>|<)\s*(.*\S)\s*")
ORDERS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Condition:
    """``key=a,b``, ``key!=a,b`` or an order such as ``key>=0.1``, as typed in ``text``."""

    text: str
    key: str
    sign: str
    values: tuple[str, ...]

    def holds(self, run: Run) -> bool:
        """Whether a run meets it. A run without the key, or with no number to put in order, meets ``!=`` alone."""
        value = run.value(self.key)
        if self.sign in ORDERS:
            return _is_number(value) and ORDERS[self.sign](value, float(self.values[0]))
        return any(self.means(text, run) for text in self.values) == (self.sign == "=")

    def means(self, text: str, run: Run) -> bool:
        """Whether ``text`` is what the run has: the value, or a choice of a group by the name of its class."""
        value = run.value(self.key)
        if value is ABSENT:
            return False
        if label(value) == text or token(value) == token(_typed(text)):
            return True
        # partitioning=dirichlet_mix is stored as the class DirichletMix
        return self.key not in run.flat and _plain(str(value)) == _plain(text)


def parse(text: str) -> Condition:
    """A condition as typed; commas part values, save within brackets.

    Raises:
        ConfigError: it is none, or puts something in order that is no number.
    """
    if (found := FORM.fullmatch(text)) is None:
        key = re.split(r"[\s=<>!]", text.strip())[0] or "seed"
        problem = f"got '{text}': not a condition; nearest valid form: {key}=VALUE[,VALUE], or with !=, >=, <=, > or <."
        raise ConfigError(OPTION, problem)
    key, sign, rest = found.groups()
    values = tuple(part.strip() for part in re.split(r",(?![^\[]*\])", rest))
    if sign in ORDERS and (len(values) > 1 or not _is_number(_typed(rest))):
        raise ConfigError(OPTION, f"got '{text}': {sign} takes one number; nearest valid form: {key}={rest}.")
    return Condition(text.strip(), key, "=" if sign == "==" else sign, values)


def chosen(runs: Sequence[Run], given: Sequence[str], warn: Callable[[str], None] = to_stderr) -> list[Run]:
    """The runs that meet all conditions.

    Args:
        warn: told of a value that no run has, where others leave some.

    Raises:
        ConfigError: a condition that is none, a key that no run has, or conditions that leave no run.
    """
    left, before = list(runs), ""
    for condition in map(parse, given):
        condition = _stored(condition, runs)
        check_key(OPTION, condition.key, runs)
        found = {token(run.value(condition.key)): run.value(condition.key) for run in left}
        there = [label(value) for value in found.values() if value is not ABSENT]
        if condition.sign in ORDERS and not any(map(_is_number, found.values())):
            problem = f"got '{condition.text}', and no value of {condition.key} is a number."
            raise ConfigError(
                OPTION, f"{problem} Valid: {', '.join(f'{condition.key}={text}' for text in sorted(there))}."
            )
        unknown = [text for text in condition.values if not any(condition.means(text, run) for run in left)]
        kept = [run for run in left if condition.holds(run)]
        if not kept:
            of = f"none of the {len(left)} runs{f' that {before} leaves' if before else ''}"
            raise ConfigError(OPTION, f"'{condition.text}' leaves {of}. {nearest(condition.values[0], there)}")
        if condition.sign not in ORDERS and unknown:
            warn(f"{OPTION} {condition.text}: no run has {', '.join(unknown)}. {nearest(unknown[0], there)}")
        left, before = kept, f"{before} {condition.text}".strip()
    return left


def _stored(condition: Condition, runs: Sequence[Run]) -> Condition:
    """``baseline`` and ``merging`` are two ways to type what is stored as ``method``."""
    key = re.sub(r"^(baseline|merging)(?=\.|$)", "method", condition.key)
    if key == condition.key or any(run.value(condition.key) is not ABSENT for run in runs):
        return condition
    return Condition(condition.text, key, condition.sign, condition.values)


def _typed(text: str) -> Any:
    """A typed value as YAML has it, and numbers such as 1e-3 besides."""
    import yaml

    try:
        return float(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
