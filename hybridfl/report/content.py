"""What a report shows, as plain containers for JSON; a section without data is not among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hybridfl import __version__
from hybridfl.finding import find_runs
from hybridfl.report.configs import configs
from hybridfl.report.curves import curves
from hybridfl.report.participants import clients, coefficients
from hybridfl.report.rows import Shown, described
from hybridfl.report.sheets import parts, sheets
from hybridfl.report.splits import Splits, splits
from hybridfl.report.streams import streams
from hybridfl.report.verdicts import verdicts
from hybridfl.runs import to_stderr
from hybridfl.tabulate import Options, tabulate


def content(
    paths: Sequence[Path], title: str, config_dir: Path | None = None, warn: Callable[[str], None] = to_stderr
) -> dict[str, Any]:
    """Everything about the finished runs under ``paths``.

    Args:
        paths: run folders, sweep folders and output folders, in any mix.
        title: of the page.
        config_dir: config groups of the user.
        warn: takes what was left out or split; ``notes`` has it too.

    Raises:
        ConfigError: a path holds no runs.
        HybridflError: no run is finished, or none has an evaluation.
    """
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        warn(text)

    runs = find_runs(paths, note)
    shown = Shown(runs, tabulate(runs, Options(), note), note)
    rows, read = described(shown), Splits()
    sections = {
        "tables": sheets(shown),
        "curves": curves(shown),
        "parts": parts(shown),
        "clients": clients(shown, read),
        "streams": streams(shown),
        "coefficients": coefficients(shown, read),
        "splits": splits(shown, read, rows),
        "claims": verdicts(shown, paths, config_dir),
        "configs": configs(shown, read),
    }
    return {
        "title": title,
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "version": __version__,
        "notes": notes,
        "rows": rows,
        **{name: section for name, section in sections.items() if section},
    }
