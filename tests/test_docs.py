"""The documentation is true: its commands are valid, its own method and tracker run, its reference is that of the code."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from cli_helpers import call

from hybridfl import (
    claims_command,
    clean_command,
    compare,
    data_command,
    export_command,
    merge_command,
    pretrain_command,
    show,
    split,
    split_command,
    sweeps_command,
    train_command,
)
from hybridfl import track_command as track
from hybridfl.build import Fraction, PositiveInt, Range
from hybridfl.config import GROUPS, Composer, choices
from hybridfl.plan import settings_of
from hybridfl.report import command as report
from hybridfl.search_space import space_of
from hybridfl.sweep_line import sweep_line

ROOT = Path(__file__).parents[1]
SITE = ROOT / "scripts" / "docs"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<kind>\w*)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[str]:
    """Lines that begin with hybridfl, in code of any kind."""
    text = page.read_text(encoding="utf-8")
    outside = FENCE.sub("", text)
    lines = [line for block in FENCE.finditer(text) for line in block["text"].splitlines()]
    lines += [line for line in outside.splitlines() if line.startswith("    ")]
    lines += [" ".join(inline.split()) for inline in re.findall(r"`(hybridfl\s+[^`\s]+\s[^`]+)`", outside)]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():  # a line that goes on in the next
        words = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
        if re.match(r"hybridfl( |$)", words) and "…" not in words and "COMMAND" not in words:
            yield words


WRITTEN = sorted({(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page)})
WRONG_ON_PURPOSE = ("per_rond", "baseline.bound=-1")
OF_THE_PAGE = ("my_conf", "server_momentum", "two_moons")
"""What a page brings itself; such lines are followed to the letter by other tests."""


@pytest.fixture(scope="module")
def composer() -> Iterator[Composer]:
    with Composer() as one:
        yield one


@pytest.fixture
def checked_only(monkeypatch: pytest.MonkeyPatch, composer: Composer) -> None:
    """Commands read their line as always, and a run's config is composed and built, but nothing is done."""

    def single(chosen: object) -> int:
        settings_of(composer.compose(chosen.overrides))
        return 0

    def sweep(chosen: object) -> int:
        line = sweep_line(chosen.overrides)
        if line.sweeper:
            space = space_of(line.overrides)
            settings_of(
                composer.compose([*space.fixed, *(f"{key}={d.ends[0]}" for key, d in space.dimensions.items())])
            )
            return 0
        jobs = composer.expand(line.overrides)
        for job in jobs[:: -(-len(jobs) // 2)]:
            settings_of(composer.compose(job))
        return 0

    def presets(args: object) -> int:
        named = [word for word in args.what if "=" not in word and "outputs" not in word and not word.startswith("my_")]
        assert set(named) <= set(choices("experiment")), named
        return 0

    def pretrain(chosen: Namespace) -> int:
        settings_of(composer.compose(pretrain_command.completed(chosen)))
        return 0

    monkeypatch.setattr(train_command, "_single", single)
    monkeypatch.setattr(train_command, "_sweep", sweep)
    monkeypatch.setattr(split_command, "composed_of", lambda chosen: composer.compose(chosen.overrides))
    monkeypatch.setattr(split, "show", lambda composed, out, whole: str(settings_of(composed)))
    monkeypatch.setattr(pretrain_command, "run", pretrain)
    monkeypatch.setattr(claims_command, "run", presets)
    for command in (
        clean_command,
        compare,
        data_command,
        export_command,
        merge_command,
        report,
        show,
        sweeps_command,
        track,
    ):
        monkeypatch.setattr(command, "run", lambda args: 0)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("checked_only")
@pytest.mark.parametrize(("page", "line"), WRITTEN, ids=[f"{page}: {line[:70]}" for page, line in WRITTEN])
def test_every_command_is_valid(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    if any(word in line for word in OF_THE_PAGE):
        pytest.skip("followed to the letter by another test")
    answer = call(*words)
    wrong = any(word in line for word in WRONG_ON_PURPOSE)
    assert answer.status == (2 if wrong else 0), f"{page}: {line}\n{answer.err}"


def test_commands_are_found_in_every_kind_of_code(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "    hybridfl list   # why\n\nSay `hybridfl show\nRUN` or `hybridfl train …`, or hybridfl compare.\n\n"
        "```shell\nhybridfl split\n```\n\n```text\n$ hybridfl data list\nhybridfls\n```\n"
    )
    assert sorted(commands(page)) == [
        "hybridfl data list",
        "hybridfl list   # why",
        "hybridfl show RUN",
        "hybridfl split",
    ]
    assert len(WRITTEN) > 100


@pytest.mark.usefixtures("checked_only")
@pytest.mark.parametrize(
    "line",
    ["train baseline=fedavgg", "train -m seed=0,1 round=3", "show --scope global", "claims feddle_digit", "pretrain"],
)
def test_a_line_that_is_wrong_would_be_found(line: str) -> None:
    try:
        assert call(*line.split()).status != 0
    except AssertionError as error:
        assert "feddle_digit" in str(error)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


# -- pages followed to the letter ------------------------------------------------------------------------------------


def blocks(page: str) -> list[re.Match[str]]:
    return list(FENCE.finditer((ROOT / "docs" / page).read_text(encoding="utf-8")))


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, from which a user's modules are found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def written(page: str, folder: Path) -> list[str]:
    """The files of a page, at the places that it names."""
    files = {block["title"]: block["text"] for block in blocks(page) if "." in (block["title"] or "")}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return list(files)


def shell(page: str, title: str | None = None) -> list[list[str]]:
    found = [block["text"] for block in blocks(page) if block["kind"] == "shell" and block["title"] == title]
    return [shlex.split(line, comments=True) for text in found for line in text.splitlines()]


def pytest_of(words: list[str], folder: Path, path: Path) -> str:
    """What ``python -m pytest …`` prints in a folder, with the package from ``path``."""
    assert words[:3] == ["python", "-m", "pytest"]
    environment = os.environ | {"PYTHONPATH": str(path)}
    options = ["-p", "no:cacheprovider"]
    line = [sys.executable, *words[1:], *options]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_method_in_ten_minutes(users: Path) -> None:
    assert written("add-a-method.md", users) == [
        "my_methods.py",
        "my_conf/baseline/norm_bounding.yaml",
        "test_norm_bounding.py",
    ]
    assert re.search("norm_bounding +Norm bounding:", call("list", "baseline", "--config-dir", "my_conf").out)
    sweep, tests = shell("add-a-method.md")
    answer = call(*sweep[1:], "ui=plain", "device=cpu")
    assert answer.status == 0, answer.both
    told = next(block["text"] for block in blocks("add-a-method.md") if block["kind"] == "text")
    for name in ("norm_bounding", "fedavg"):
        shown, printed = (
            float(re.search(rf"^ *{name} +1 +([\d.]+) ", text, re.MULTILINE)[1]) for text in (told, answer.out)
        )
        assert abs(shown - printed) < 2, name  # on another kind of processor a few examples may fall otherwise
    (console,) = [block["text"] for block in blocks("add-a-method.md") if block["kind"] == "console"]
    typed, *expected = console.splitlines()
    answer = call(*shlex.split(typed)[2:])
    assert (answer.status, answer.err.splitlines()) == (2, expected)
    assert "1 passed" in pytest_of(tests, users, ROOT)


def test_the_same_method_in_a_copy_of_the_tree(users: Path) -> None:
    written("add-a-method.md", users)
    tree = users / "tree"
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("hybridfl", "conf", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tree)
    shutil.move(users / "my_methods.py", tree / "hybridfl/methods/norm_bounding.py")
    text = (users / "my_conf/baseline/norm_bounding.yaml").read_text()
    (page,) = [page for page in PAGES if page.name == "add-a-method.md"]
    (target,) = re.findall(r"with `(_target_: hybridfl[\w.]+)`", page.read_text())
    moved = text.replace("_target_: my_methods.NormBounding", target)
    assert moved != text
    (tree / "conf/baseline/norm_bounding.yaml").write_text(moved)
    (words,) = shell("add-a-method.md", "in the clone")
    passed = re.search(r"(\d+) passed", pytest_of(words, tree, tree))
    assert passed and int(passed[1]) >= 8


def test_a_tracker_of_ones_own_runs_as_its_guide_says(users: Path) -> None:
    assert written("guides/trackers.md", users) == ["my_trackers.py", "my_conf/tracker/printer.yaml"]
    (line,) = shell("guides/trackers.md")
    answer = call(*line[1:], "ui=none")
    assert answer.status == 0, answer.both
    assert re.search(r"begins: feddle seed 0 \w+ in .*\n1: 0\.\d+\n2: 0\.\d+\n3: 0\.\d+\ndone\n", answer.out)


# -- the reference ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> Iterator[object]:
    spec = importlib.util.spec_from_file_location("reference", SITE / "reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (PositiveInt, "whole number ≥ 1"),
        (Fraction | None, "number ≥ 0, ≤ 1, or null"),
        (Annotated[float, Range(above=0, below=2)], "number > 0, < 2"),
        (Literal["a", "b"] | int, "a, b or whole number"),
        (tuple[int, ...] | None, "list of: whole number, or null"),
        (dict[str, float], "mapping"),
        (Path, "config group"),
        (inspect.Parameter.empty, ""),
    ],
)
def test_what_is_allowed_in_words(reference, annotation: object, words: str) -> None:
    assert reference.allowed(annotation) == words


def test_comments_belong_to_their_keys(reference) -> None:
    text = "# The file.\n_target_: a.B\n# Above,\n# and more.\nrate: 1\nplain: 2\ninner:\n  # Within.\n  deep: 3 # beside\nlast: 'a # b'\n"
    assert reference.comments(text) == {"rate": "Above, and more.", "inner.deep": "Within. beside"}


def test_docstrings_tell_what_the_yaml_does_not(reference) -> None:
    class Documented:
        """A class.

        Args:
            a, b: of both,
                in two lines; see :class:`~x.Y`.
            c: alone.

        Raises:
            d: not an argument.
        """

    assert reference.attributes(Documented) == {"a": "of both, in two lines; see x.Y.", "b": "of both, in two lines; see x.Y.", "c": "alone."}  # fmt: skip


def test_the_reference_has_every_choice_and_every_key(reference) -> None:
    pages = reference.pages()
    assert {f"reference/{group}.md" for group in GROUPS} < set(pages)
    assert all(reference.ABOUT.get(group) for group in GROUPS)
    for group in GROUPS:
        sections = re.split(r"^## ", pages[f"reference/{group}.md"], flags=re.MULTILINE)[1:]
        assert [section.split("`")[1] for section in sections] == list(choices(group))
        for section, (name, file) in zip(sections, choices(group).items(), strict=True):
            node = yaml.safe_load(file.read_text()) or {}
            keys = set(node) - {"_target_", "defaults", "hydra"}
            told = set(re.findall(r"^\| `(\w+)", section, re.MULTILINE)) if "```yaml" not in section else keys
            assert told == keys, (group, name)


def test_a_row_of_the_reference(reference) -> None:
    rows = reference.page("merging").splitlines()
    assert (
        "| `search.prox` | `0.1` | number ≥ 0 or auto | Pull towards the mean of what arrived; auto is 0.2 · anchors / examples. |"
        in rows
    )


# -- the site --------------------------------------------------------------------------------------------------------


def built(tree: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """The site of a tree, by the line of the Makefile."""
    pytest.importorskip("mkdocs", reason="the extra hybridfl[docs] is not installed; `make docs` builds the site")
    (line,) = re.findall(r"^\t.*\$\(BIN\)/python (-m mkdocs .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    words = [sys.executable, *line.split(), "-d", str(target)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)


def test_the_site_is_whole_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    done = built(ROOT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES[1:]:
        assert (tmp_path / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()
    html = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert "Longest update that is left as it is." in html[tmp_path / "add-a-method.html"]
    assert "anchors / examples" in html[tmp_path / "reference" / "merging.html"]
    assert "../hybridfl/" not in re.sub(r"<[^>]*>", "", html[tmp_path / "theory.html"])
    elsewhere = re.compile(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"(?:https?:)?//[^>]*>")
    assert [found for text in html.values() for found in elsewhere.findall(text)] == []


def test_a_broken_link_breaks_the_build(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "docs", tree / "docs")
    shutil.copytree(SITE, tree / "scripts" / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("hybridfl", "conf", "README.md"):
        (tree / name).symlink_to(ROOT / name)
    (tree / "docs" / "new.md").write_text("# New\n\n[there](../conf/config.yaml), [gone](../hybridfl/gone.py)\n")
    done = built(tree, tmp_path / "site")
    warnings = [line for line in (done.stdout + done.stderr).splitlines() if "WARNING" in line]
    # Not that the new page is missing in the navigation, where it comes under "More".
    assert len(warnings) == 1 and "'new.md' contains a link '../hybridfl/gone.py'" in warnings[0]
    assert done.returncode != 0
