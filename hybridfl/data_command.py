"""``hybridfl data``: which data sets there are, which of them are at hand, and downloads of the public ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridfl.config import choices
from hybridfl.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from hybridfl.config import Composer
    from hybridfl.datasets import Choice

LIST_HELP = "Every data set: whether its files are there and whole, what it holds, its licence and fingerprint."
FETCH_HELP = "Download the public original files of data sets to where their readers look, and read them once."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl data``."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help=LIST_HELP, description=LIST_HELP)
    fetching = commands.add_parser("fetch", help=FETCH_HELP, description=FETCH_HELP)
    fetching.add_argument("names", nargs="+", metavar="NAME", help="a choice of the config group dataset")
    for command in (listing, fetching):
        add = command.add_argument
        add("--data-root", metavar="DIR", help="default: $HYBRIDFL_DATA, else ~/.cache/hybridfl")
        add("--config-dir", type=Path, metavar="DIR", help="a folder with config groups of your own")
    fetching.add_argument("--mirror", metavar="URL", help="take files of the same names from this address instead")
    fetching.add_argument("--force", action="store_true", help="replace files that are not the originals")


def run(args: argparse.Namespace) -> int:
    """Does what was asked for and returns the exit status."""
    from hybridfl.config import Composer

    with Composer(args.config_dir) as composer:
        root = Path(args.data_root or composer.compose([]).config["data_root"]).expanduser()
        if args.command == "fetch":
            _fetch(list(dict.fromkeys(args.names)), composer, root, args.mirror, args.force)
        else:
            _list(composer, root)
    return 0


def _list(composer: Composer, root: Path) -> None:
    from hybridfl.datasets import look, table

    print(f"data root: {root}\n")
    print(table([look(name, composer, root) for name in choices("dataset", composer.extra)]))


def _fetch(names: Sequence[str], composer: Composer, root: Path, mirror: str | None, force: bool) -> None:
    """All names, and all that is there already, are checked before the first download."""
    from hybridfl.datasets import Choice, summary
    from hybridfl.fetch import fetch, missing

    valid = choices("dataset", composer.extra)
    for name in names:
        if name not in valid:
            raise ConfigError(name, f"unknown data set. {nearest(name, valid)}")
    wanted = [Choice.of(name, composer) for name in names]
    for choice in wanted:
        stated = choice.about
        if stated.files == ():
            raise ConfigError(choice.name, "there is nothing to fetch, it needs no files.")
        if not stated.downloads:
            where = stated.by_hand or "Its reader names no public files."
            problem = choice.look(root).problem or f"It is at hand below {root}."
            raise ConfigError(choice.name, f"cannot be fetched. {where} {problem}")
    if mirror is not None:
        _check_mirror(mirror, wanted)
    for choice in wanted:
        missing(choice.about.downloads, root, force)
    for choice in wanted:
        needed = missing(choice.about.downloads, root, force)
        if not needed:
            print(f"{choice.name}: all files are there already")
        for download in needed:
            fetch(download, root, mirror)
        found = choice.look(root)
        if found.state != "present":
            raise DataError(f"{choice.name}: {found.problem}")
        print(summary(found), flush=True)


def _check_mirror(mirror: str, wanted: Sequence[Choice]) -> None:
    """A mirror has one file of a name."""
    if not mirror.startswith(("http://", "https://")):
        raise ConfigError("--mirror", f"got '{mirror}': expected an address that begins with https:// or http://.")
    first: dict[str, tuple[str, str]] = {}
    for choice in wanted:
        for download in choice.about.downloads:
            other, known = first.setdefault(download.name, (choice.name, download.hash))
            if known != download.hash:
                both = f"{other} and {choice.name} have different files named {download.name}"
                raise ConfigError("--mirror", f"{both}; fetch one after the other.")
