"""The command line of ``hybridfl report``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from hybridfl.errors import ConfigError
from hybridfl.runs import to_stderr
from hybridfl.store import write_text_atomic

NAME = "report.html"
EPILOG = """\
  hybridfl report                                  # everything finished below outputs/, as report.html here
  hybridfl report outputs/sweeps/<digest>          # a sweep, as report.html in its folder
  hybridfl report RUN RUN --out two.html --title "Two runs"

The page holds all it shows and asks for nothing from the network.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl report``."""
    parser.epilog = EPILOG
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="run, sweep or output folders (default: outputs)")
    add("--out", type=Path, metavar="FILE", help=f"default: {NAME} in the one sweep folder that is given, else here")
    add("--title", metavar="TEXT", help="default: the names of the folders")
    add("--config-dir", type=Path, metavar="DIR", help="a folder with config groups of your own, for their claims")


def run(args: argparse.Namespace) -> int:
    """Writes the page, prints where it is and returns the exit status."""
    paths = [Path(path) for path in args.paths] or [Path("outputs")]
    print(f"report: {write(paths, args.out, args.title, args.config_dir).resolve()}")
    return 0


def write(
    paths: Sequence[Path],
    out: Path | None = None,
    title: str | None = None,
    config_dir: Path | None = None,
    warn: Callable[[str], None] = to_stderr,
) -> Path:
    """Writes the page of all finished runs under ``paths``, the whole of it or nothing.

    Args:
        paths: run folders, sweep folders and output folders, in any mix.
        out: the file; made with its folder if need be, replaced if it is there.
        title: of the page.
        config_dir: config groups of the user, for presets with claims.
        warn: takes what was left out; the page says it too.

    Returns:
        The file.

    Raises:
        ConfigError: a path holds no runs, ``config_dir`` is no folder, or ``out`` cannot be written to.
        HybridflError: no run is finished, or none has an evaluation.
    """
    file = _file(paths, out)
    from hybridfl.config import check_folder
    from hybridfl.report.content import content
    from hybridfl.report.page import page

    check_folder(config_dir)
    text = page(content(paths, title or ", ".join(_name(path) for path in paths), config_dir, warn))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot make '{file.parent}' ({error.strerror or error}); name a folder that can be written to."
        raise ConfigError("--out", problem) from error
    write_text_atomic(file, text)
    return file


def _file(paths: Sequence[Path], out: Path | None) -> Path:
    if out is None:
        in_sweep = len(paths) == 1 and (paths[0] / "runs.csv").is_file()
        return paths[0] / NAME if in_sweep else Path(NAME)
    if out.is_dir():
        raise ConfigError("--out", f"got '{out}', which is a folder; nearest valid value: '{out / NAME}'.")
    return out


def _name(path: Path) -> str:
    return path.resolve().name or str(path)
