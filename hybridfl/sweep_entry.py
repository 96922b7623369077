"""A job of a sweep as its table has it, checked before it is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybridfl.config import Composed
from hybridfl.engine import Unsuitable
from hybridfl.errors import ConfigError, DataError
from hybridfl.plan import DataCache, digest_before_draw, make_plan
from hybridfl.store import finished_attempt
from hybridfl.sweep_disk import run_bytes
from hybridfl.sweep_table import Row


@dataclass(frozen=True)
class Entry:
    """A job of a sweep: a row of its ``runs.csv``."""

    composed: Composed
    digest: str
    cells: tuple[str, ...] = ()
    run: str = ""
    status: str = "pending"
    error: str = ""
    size: int = 0
    """Bytes that the run will take on disk, of one that is to be done."""

    @property
    def row(self) -> Row:
        name, composed = self.run or self.digest, self.composed
        return Row(name, self.status, composed.method_name, composed.line, self.error, self.cells)


@dataclass(frozen=True)
class Finished:
    """How a sweep ended: its folder, how many jobs failed, or were left because something stopped them; what is to be said."""

    folder: Path
    failed: int
    left: int = 0
    told: tuple[str, ...] = ()


def checked(composed: Composed, cache: DataCache) -> Entry:
    """The job as it stands: one that is finished has been checked before, and takes no more than its digest."""
    try:
        digest = None if composed.config["rerun"] else digest_before_draw(composed, cache)
        if digest and (folder := finished_attempt(Path(composed.config["output_dir"]), digest)):
            return Entry(composed, digest, run=folder.name, status="done")
        plan = make_plan(composed, cache)
        return Entry(composed, plan.digest, size=run_bytes(plan))
    except Unsuitable as reason:
        return Entry(composed, "", status="skipped", error=str(reason))
    except (ConfigError, DataError) as error:
        where = f"in the job '{composed.line}': " if composed.line else ""
        raise ConfigError("", f"{where}{error}") from error
