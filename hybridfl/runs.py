"""Run folders as ``compare`` and ``show`` see them.

A run folder ``<output_dir>/runs/<digest>[-N]`` holds ``config.yaml``, ``status.json`` and ``metrics.csv``. Everything
is read lazily, so that a command over a thousand runs pays only for what it uses.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridfl.errors import DataError

if TYPE_CHECKING:
    from hybridfl.tasks import TaskStream

BYTES = ("bytes_up", "bytes_down", "bytes_peer")
COSTS = (*BYTES, "macs", "server_macs", "local_steps", "seconds", "sim_seconds")
FACTS = ("name", "moves_raw_data", "upper_bound")
"""What ``config.yaml`` of a run tells of its method beside the method's own options."""
SHOWN = ("global", "clients", "served")
WAY_OUT = "put the original back, or remove the run's folder and train it again"
ABSENT = object()
"""The value of a config key that a run does not have (``None`` is a value of its own)."""


def number(text: str | None) -> float:
    """A cell of ``metrics.csv``; NaN where it is empty."""
    try:
        return float(text) if text else math.nan
    except ValueError:
        return math.nan


@dataclass(frozen=True)
class Curve:
    """The rows of one scope, in the order of rounds, as lines of text; numbers are parsed when asked for."""

    header: Sequence[str]
    lines: Sequence[str]

    @cached_property
    def _rows(self) -> list[list[str]]:
        return [_fields(line) for line in self.lines]

    def column(self, name: str, last: int | None = None) -> list[float]:
        """One number per evaluated round, or of the ``last`` only; NaN where it is not defined or the column is missing."""
        if name not in self.header:
            return [math.nan] * len(self.lines[-last:] if last else self.lines)
        place = self.header.index(name)
        rows = [_fields(line) for line in self.lines[-last:]] if last else self._rows
        return [number(row[place]) for row in rows]

    @cached_property
    def rounds(self) -> list[int]:
        """The evaluated rounds."""
        return [int(value) for value in self.column("round")]

    def until(self, round: int) -> Curve:
        """The evaluations up to a round."""
        place = self.header.index("round")
        count = bisect_right(self.lines, round, key=lambda line: int(_fields(line)[place]))
        return Curve(self.header, self.lines[:count])

    @cached_property
    def last_round(self) -> int:
        """The last evaluated round."""
        return int(self.column("round", 1)[0])

    @cached_property
    def bytes(self) -> list[float]:
        """Bytes moved until each evaluation, in all directions; an empty direction counts as none."""
        return self._moved()

    def spent(self, cost: str, last: int | None = None) -> list[float]:
        """What was spent until each evaluation, or each of the ``last``: ``bytes``, ``rounds`` or a column."""
        if cost == "bytes":
            return self._moved(last) if last else self.bytes
        return self.column("round" if cost == "rounds" else cost, last)

    def _moved(self, last: int | None = None) -> list[float]:
        directions = zip(*(self.column(name, last) for name in BYTES), strict=True)
        return [_sum_of_defined(values) for values in directions]


def _fields(line: str) -> list[str]:
    return next(csv.reader([line])) if '"' in line else line.split(",")


def _sum_of_defined(values: Iterable[float]) -> float:
    defined = [value for value in values if math.isfinite(value)]
    return math.fsum(defined) if defined else math.nan


@dataclass(frozen=True)
class Run:
    """A run folder with its composed config and status."""

    folder: Path
    config: dict[str, Any]
    status: dict[str, Any]
    job: int | None = None  # place among the jobs of the sweeps that name it

    @property
    def digest(self) -> str:
        """What names the run, without the number of the attempt."""
        return self.folder.name.partition("-")[0]

    @property
    def attempt(self) -> int:
        """1 for ``<digest>``, N for ``<digest>-N``."""
        suffix = self.folder.name.partition("-")[2]
        return int(suffix) if suffix.isdecimal() else 1

    @property
    def state(self) -> str:
        """``done``, ``failed``, ``skipped``, ``running``, ``interrupted`` or ``unknown``."""
        return str(self.status.get("status", "unknown"))

    @property
    def done(self) -> bool:
        """Whether the last round was reached."""
        return self.state == "done"

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The config as dotted key → value, lists kept whole."""
        return dict(flattened(self.config))

    def value(self, key: str) -> Any:
        """The value of a dotted config key, or of a whole group (``method``): its name; ``ABSENT`` if there is none."""
        if key in self.flat:
            return self.flat[key]
        if (name := self.flat.get(f"{key}.name")) is not None:
            return name
        target = self.flat.get(f"{key}._target_")
        return str(target).rpartition(".")[2] if target is not None else ABSENT

    @cached_property
    def tasks(self) -> TaskStream:
        """Which task was on when, without the classes; one task if the config does not say."""
        from hybridfl.tasks import TaskStream  # numpy, which no --help needs

        return TaskStream(((),) * self.flat.get("tasks.number", 1), self.flat.get("rounds", 1))

    def matrix(self, scope: str) -> list[list[float]]:
        """Accuracies after each task that is over (rows) on it and those before (columns); empty without a stream.

        NaN where the last round of a task was not evaluated.
        """
        tasks = self.tasks
        curves = [self.curves.get(f"{scope}/task={task}") for task in range(len(tasks))]
        if len(tasks) == 1 or curves[0] is None:
            return []
        by_round = [dict(zip(c.rounds, c.column("accuracy"), strict=True)) if c else {} for c in curves]
        ends = [round + 1 for round in range(max(by_round[0])) if tasks.ends(round)]
        return [[found.get(end, math.nan) for found in by_round[: task + 1]] for task, end in enumerate(ends)]

    def summary(self) -> str:
        """The last accuracies, what was sent and where the run is, in a line."""
        curves = self.curves
        said = [f"{scope} {100 * curves[scope].column('accuracy')[-1]:.1f} %" for scope in SHOWN if scope in curves]
        moved = [f"{self.bytes / 1e6:.1f} MB"] if math.isfinite(self.bytes) else []
        return ", ".join([*([f"accuracy {', '.join(said)}"] if said else []), *moved, str(self.folder)])

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Scope → its rows of ``metrics.csv``; empty before the first evaluation."""
        try:
            text = (self.folder / "metrics.csv").read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as problem:
            raise DataError(f"{self.folder / 'metrics.csv'}: cannot be read ({problem})") from problem
        title, *lines = text.splitlines() or [""]
        header = tuple(_fields(title))
        if not {"round", "scope"} <= set(header):
            if self.done:
                raise self._damaged("its first line names no round and scope")
            return {}
        place, at, commas = header.index("scope"), header.index("round"), len(header) - 1
        scopes: dict[str, list[str]] = {}
        for number, line in enumerate(lines, 2):
            quoted = _fields(line) if '"' in line else None
            told = quoted or line.split(",", max(place, at) + 1)
            if (len(quoted) - 1 if quoted else line.count(",")) == commas and told[at].isdecimal():
                scopes.setdefault(told[place], []).append(line)
            elif line and (self.done or number <= len(lines)):  # a run that is being written may end in half a line
                raise self._damaged(f"line {number} is none of its rows")
        return {name: Curve(header, found) for name, found in scopes.items()}

    def until(self, round: int) -> Run:
        """The run as it stood after an evaluated round."""
        as_it_stood = copy(self)
        curves = {scope: curve.until(round) for scope, curve in self.curves.items()}
        vars(as_it_stood)["curves"] = {scope: curve for scope, curve in curves.items() if curve.lines}
        return as_it_stood

    @property
    def bytes(self) -> float:
        """Bytes moved until the last evaluation of any scope; NaN before the first."""
        return self.spent("bytes")

    def spent(self, cost: str) -> float:
        """What was spent until the last evaluation of any scope; NaN before the first."""
        last = max(self.curves.values(), key=lambda curve: curve.last_round, default=None)
        return last.spent(cost, 1)[0] if last else math.nan

    def _damaged(self, problem: str) -> DataError:
        return DataError(f"{self.folder / 'metrics.csv'}: {problem}; {WAY_OUT}.")


def flattened(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A config as dotted keys and values, lists kept whole."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a run folder, finished or not."""
    return (folder / "config.yaml").is_file() or (folder / "status.json").is_file()


def read_run(folder: Path, job: int | None = None, known: dict[str, Any] | None = None) -> Run:
    """The run in ``folder``.

    Args:
        known: sections of configs read before, by their text; runs that are read with one share what they agree in.

    Raises:
        DataError: config or status are there but are not what they claim to be.
    """
    import yaml

    config, status = folder / "config.yaml", folder / "status.json"
    path = config
    try:
        found = _config(config.read_text(encoding="utf-8"), {} if known is None else known) if config.is_file() else {}
        path = status
        state = json.loads(status.read_text(encoding="utf-8")) if status.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as problem:
        raise DataError(f"{path}: cannot be read ({' '.join(str(problem).split())})") from problem
    if not isinstance(found or {}, dict) or not isinstance(state, dict):
        raise DataError(f"{folder}: config.yaml and status.json must hold one mapping each")
    if state.get("status") == "done" and "digest" not in (found or {}):  # its last line
        reason = "is cut short" if found else "is not there or empty"
        raise DataError(f"{config}: {reason}, though the run is done; {WAY_OUT}.")
    return Run(folder, found or {}, state, job)


def _config(text: str, known: dict[str, Any]) -> Any:
    """A config, each of its sections parsed once: runs of a sweep differ in few of them, and YAML is slow.

    A section is a key that begins a line, with all below it that does not; a text that cannot be cut so is parsed whole.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is there
    found: dict[str, Any] = {}
    for section in re.split(r"\n(?=\w)", text):
        if section not in known:
            try:
                known[section] = yaml.load(section, loader) if re.match(r"\w+:\s", section + "\n") else None
            except yaml.YAMLError:
                known[section] = None
        if known[section] is None:
            return yaml.load(text, loader)
        found |= known[section]
    return found


def to_stderr(text: str) -> None:
    """One line beside the output, never inside it."""
    print(text, file=sys.stderr)
