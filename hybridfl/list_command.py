"""``hybridfl list``: the choices of the config groups."""

from __future__ import annotations

import argparse
from pathlib import Path

from hybridfl.errors import ConfigError, nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``hybridfl list``."""
    parser.add_argument("group", nargs="?", help="a config group; without it, all of them")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="a folder with config groups of your own")


def run(chosen: argparse.Namespace) -> int:
    """Prints the choices and returns the exit status."""
    from hybridfl.config import GROUPS, check_folder, choices

    if chosen.group and chosen.group not in GROUPS:
        raise ConfigError(chosen.group, f"unknown config group. {nearest(chosen.group, GROUPS)}")
    check_folder(chosen.config_dir)
    for group in [chosen.group] if chosen.group else GROUPS:
        found = choices(group, chosen.config_dir)
        width = max(map(len, found), default=0)
        print(group if chosen.group else f"\n{group}")
        for name, file in found.items():
            print(f"  {name:{width}}  {_first_comment(file)}{_of_preset(file) if group == 'experiment' else ''}")
    return 0


def _of_preset(file: Path) -> str:
    """What a preset brings beside settings: claims, and methods with settings of their own."""
    import yaml

    try:
        node = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError:  # said when it is used
        return ""
    found = {key: node.get(key) for key in ("claims", "tuned")} if isinstance(node, dict) else {}
    claims, tuned = found.get("claims"), found.get("tuned")
    told = [f"{len(claims)} claim{'s' if len(claims) > 1 else ''}"] if isinstance(claims, list) and claims else []
    told += [f"tuned: {', '.join(map(str, tuned))}"] if isinstance(tuned, dict) and tuned else []
    return f" [{'; '.join(told)}]" if told else ""


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    # Hydra sees `# @package` only above the first ordinary comment, so there it may stand.
    told = next((line for line in lines if not line.startswith("# @package")), "")
    return told.lstrip("# ").strip() if told.startswith("#") else "(no description)"
