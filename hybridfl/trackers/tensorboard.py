"""TensorBoard: event files, by the package ``tensorboard`` alone (no TensorFlow)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridfl.trackers import Ending, Tracked, needed

WRITER = "torch.utils.tensorboard"


@dataclass(frozen=True)
class TensorBoard:
    """Event files of every run, in single precision, as TensorBoard's scalars are.

    Attributes:
        folder: a folder for each run is made here; ``None`` is ``tensorboard/`` in the run's own folder.
    """

    folder: str | None = None

    def check(self) -> None:
        needed(WRITER, "tensorboard")

    def open(self, run: Tracked) -> Events:
        place = run.folder / "tensorboard" if self.folder is None else Path(self.folder).expanduser() / run.name
        return Events(place, run)


class Events:
    """The event files of one run; every session writes one of its own, from the first round on."""

    last = 0

    def __init__(self, folder: Path, run: Tracked) -> None:
        # A reader drops what earlier files have of the same rounds.
        self.writer: Any = needed(WRITER, "tensorboard").SummaryWriter(str(folder), purge_step=0)
        import yaml

        text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
        # Markdown, in which an indented block stays as it is.
        self.writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), 0)

    def log(self, round: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, round)

    def close(self, ending: Ending) -> None:
        self.writer.close()
