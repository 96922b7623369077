"""What is promised around the code: configs that explain themselves, make, pinned versions, a package free of its cradle."""

import re
import shutil
import subprocess
import tomllib
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest

import hybridfl

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONFIGS = sorted(path for path in (ROOT / "conf").rglob("*.yaml") if path != ROOT / "conf" / "config.yaml")


def canonical(name: str) -> str:
    """The project name of a requirement in the one spelling PyPI compares: lower case, runs of ``-_.`` as one ``-``."""
    match = re.match(r"[A-Za-z0-9._-]+", name)
    assert match, name
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonical(line): line.split("==")[1] for line in lines if line}


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "conf")))
def test_config_begins_by_telling_what_it_is(path: Path) -> None:
    lines = path.read_text().splitlines()
    # Hydra reads `# @package` only above the first ordinary comment, and ignores it in silence anywhere below.
    header = [number for number, line in enumerate(lines) if re.match(r"\s*#\s*@", line)]
    assert header in ([], [0]), f"{path}: '# @package' must be the first line, or Hydra does not see it"
    told = "\n".join(lines[len(header) :][:1])
    assert told.startswith("# ") and len(told) >= 20, f"{path}: begins with {told!r}, not with a comment that tells"
    sourced = re.search(r"[A-Z]\w+( et al\.)? (19|20)\d\d\b", told) or told.endswith("(no paper)")
    assert sourced, f"{path}: the first comment names authors and year, or ends with '(no paper)': {told!r}"


def test_make_help_lists_every_target() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^\.PHONY: (\S+)", text, flags=re.MULTILINE)) - {"moved"}
    assert {"install", "train", "test", "check", "clean"} <= targets
    for command in ([make], [make, "help"]):
        shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        listed = dict(re.findall(r"^  (\S+) +(\S.*)$", shown, flags=re.MULTILINE))
        assert listed.keys() == targets


def test_torch_is_pinned_first() -> None:
    assert pins()["torch"] == "2.13.0"
    assert next(iter(pins())) == "torch"


def test_every_direct_dependency_is_pinned() -> None:
    project = PYPROJECT["project"]
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    assert {canonical(name) for name in wanted} <= pins().keys()


def test_constraints_are_exact() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line)] == []


def test_versions_agree() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "hybridfl/__init__.py"
    try:
        installed = installed_version("hybridfl")
    except ModuleNotFoundError:
        pytest.skip("hybridfl is not installed, only on the path")
    assert installed == hybridfl.__version__


def test_no_file_names_the_machine_it_was_written_on() -> None:
    # Spelled in parts, or this file would be the first to be found. `.ci/run` looks for the data beside the clone.
    forbidden = re.compile("/" + r"work\b|" + "shared" + "/data|/" + "opt/")
    kinds = {".py", ".yaml", ".md", ".toml", ".txt", ".sh", ".ipynb", ".csv", ".json", ""}
    folders = [ROOT / name for name in ("hybridfl", "conf", "scripts", "tests", "docs")]
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    read = [path for path in files if path.suffix in kinds and "__pycache__" not in path.parts]
    assert ROOT / "hybridfl" / "__init__.py" in read
    found = [
        str(path.relative_to(ROOT))
        for path in read
        if forbidden.search(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []
